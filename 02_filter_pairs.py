"""02: embeddings + pages -> the pairs to train on, neither unrelated nor nearly the same.

Reads   DATA: cls.npy [N, D] float32   pages.npy [N] int32   split.npy [N] uint8   names.npy [N] (which images were planted)
Writes  DATA: pairs.npy [P, 2] int64, (condition, target)   sims.npy [P] float32, their similarity   filter.png, the histogram

A pair (i, j), i != j, of two training images of one page is kept when

    low <= cos(cls_i, cls_j) <= high,    cos(a, b) = a.b / (|a| |b|)

low drops what shares a page but no subject; high drops near-duplicates, from which one learns to copy (Semantica). Both are
values, or quantiles of all same-page similarities, read off a histogram of 5,000 bins. The default quantiles suit the
digits, where a sixth of the pairs is unrelated and 1.5% nearly the same; look at filter.png for yours.
Runs on the CPU, in two passes over tiles of at most 1024 x 1024 similarities; pairs are in the order of their pages. Of N
processes each takes one stretch of the tiles, and the files are those of one process, bit for bit. Memory: some 30 bytes an
image (page, index, order); embeddings and pairs stay on disk.

    python 02_filter_pairs.py                                          # the digits, 5 s
    python 02_filter_pairs.py --data runs/mine --low 0.4 --high 0.95
    python 02_filter_pairs.py --data runs/mine --exclude runs/benchmark/cls.npy
    torchrun --nproc-per-node=8 02_filter_pairs.py --data runs/mine
"""
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import system

BINS, TILE, PACK = 5000, 1024, 256   # bins of the histogram; side of a tile; small pages share a tile up to this many images
EDGES = np.linspace(-1, 1, BINS + 1)
PAIR = np.dtype([("pair", np.int64, 2), ("sim", np.float32)])          # a row of both files, 20 bytes


def combine(array, op=dist.ReduceOp.SUM):
    """Replace an array by its sum (or maximum) over all processes."""
    if dist.is_initialized():
        dist.all_reduce(torch.from_numpy(array), op)


def unit(rows):
    """Rows scaled to length 1: [n, D] float32, numpy -> torch. Exits with one line if a value is not finite."""
    if not np.isfinite(rows).all():
        system.die("an embedding holds nan or infinite values; write cls.npy again with 01_embed.py")
    return torch.nn.functional.normalize(torch.tensor(rows), dim=1)


def tiles(pages):
    """(rows, columns) slices such that every pair within a page lies in exactly one tile. pages: [n], ascending."""
    found, start = [], 0
    while start < len(pages):
        end = np.searchsorted(pages, pages[start + PACK]) if start + PACK < len(pages) else len(pages)  # as many as fit
        if end == start:                                               # not even one page does: cut it
            end = np.searchsorted(pages, pages[start], side="right")
        cuts = [slice(c, min(c + TILE, end)) for c in range(start, end, TILE)]
        found += [(rows, columns) for rows in cuts for columns in cuts]
        start = end
    return found


def similarities(cls, pages, chosen, rank, world):
    """All ordered pairs within a page of the images `chosen` (sorted by page), by tile: i, j and cos(cls_i, cls_j), [p] each.

    Of this rank's tiles: one after another, the ranks give what one process gives, in the same order.
    """
    found = tiles(pages[chosen])
    mine = found[len(found) * rank // world:len(found) * (rank + 1) // world]
    for rows, columns in system.progress(mine, rank, unit="tile"):
        i, j = chosen[rows], chosen[columns]
        sims = (unit(cls[i]) @ unit(cls[j]).T).clamp(-1, 1).numpy()                        # [rows, columns]
        a, b = np.nonzero((pages[i][:, None] == pages[j]) & (i[:, None] != j))
        yield i[a], j[b], sims[a, b]


def most_similar(cls, chosen, other, rank=0, world=1):
    """Of each image in `chosen`, the largest cosine with a row of other [M, D]: [n] float32, shared by the processes."""
    best = np.full(len(chosen), -1, np.float32)
    for start in system.progress(range(0, len(other), TILE), rank, unit="tile"):
        theirs = unit(other[start:start + TILE]).T
        for rows in (slice(c, c + TILE) for c in range(rank * TILE, len(chosen), world * TILE)):
            best[rows] = np.maximum(best[rows], (unit(cls[chosen[rows]]) @ theirs).amax(1).numpy())
    combine(best, dist.ReduceOp.MAX)
    return best


def quantile(counts, q, upper):
    """The q-quantile of a histogram [BINS], rounded down to an edge of its bin, or up if `upper`: never too narrow."""
    edge = np.searchsorted(np.append(0, counts.cumsum()), q * counts.sum())   # the first with as many pairs under it
    return EDGES[edge if upper else max(edge - 1, 0)]


def plants(names):
    """A function (i, j) -> kind of each pair: 1 with a planted stranger, 2 planted near-duplicate and original, 0 any other."""
    stranger, double = (np.char.startswith(names, prefix) for prefix in ("stranger: ", "near-duplicate: "))
    if not (stranger.any() or double.any()):
        return lambda i, j: np.zeros(len(i), np.int64)
    original = np.unique(np.char.replace(names, "near-duplicate: ", ""), return_inverse=True)[1]
    return lambda i, j: np.where(stranger[i] | stranger[j], 1, 2 * ((double[i] | double[j]) & (original[i] == original[j])))


def picture(path, counts, low, high):
    """Save the histogram of the same-page similarities, counts [3, BINS] by kind, with the kept band marked."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    coarse, edges = counts.reshape(3, -1, 20).sum(2) / counts.sum(), EDGES[::20]
    for share, label in zip(coarse, ("pairs of one page", "with a planted stranger", "planted near-duplicates")):
        if share.any():
            axes.stairs(share, edges, fill=True, alpha=0.6, label=label)
    axes.axvspan(low, high, color="tab:gray", alpha=0.15, label=f"kept: {low:.3f} to {high:.3f}")
    axes.set(xlim=(edges[:-1][coarse.any(0)][0] - 0.02, 1), xlabel="cosine similarity", ylabel="share of the pairs")
    axes.legend(loc="upper left", frameon=False)
    with system.writing(path) as f:
        figure.savefig(f, dpi=120, format="png")


def main():
    p = system.parser(__doc__, device=False, seed=False)
    p.add_argument("--low", type=float, help="least similarity (default: by quantile)")
    p.add_argument("--high", type=float, help="greatest similarity (default: by quantile)")
    p.add_argument("--low-quantile", type=float, default=0.2, help="share of the pairs below the band (default 0.2)")
    p.add_argument("--high-quantile", type=float, default=0.985, help="share of the pairs up to its upper end (default 0.985)")
    p.add_argument("--exclude", type=Path, nargs="+", default=[], metavar="CLS.NPY",
                   help="embeddings of evaluation sets; a training image that nearly duplicates one of them is left out")
    p.add_argument("--exclude-above", type=float, default=0.95, help="what counts as nearly a duplicate (default 0.95)")
    args = system.parse(p)
    if not 0 <= args.low_quantile <= args.high_quantile <= 1:
        system.die(f"quantiles {args.low_quantile} and {args.high_quantile}: expected 0 <= low <= high <= 1")
    _, rank, world = system.start("cpu")
    data = system.Data(args.data)
    pages, kind = np.asarray(data.pages), plants(data.names)

    train = np.flatnonzero(data.split == 0)
    chosen = train[np.argsort(pages[train], kind="stable")]
    for path in args.exclude:
        other = system.read_array(path, np.float32, 2)
        if other.shape[1] != data.cls.shape[1]:
            system.die(f"{path} has {other.shape[1]} features an image, {data.folder} has {data.cls.shape[1]}: use one encoder")
        chosen = chosen[most_similar(data.cls, chosen, other, rank, world) <= args.exclude_above]

    counts = np.zeros((3, BINS), np.int64)                             # first pass: the histogram by kind, and the thresholds
    for i, j, sims in similarities(data.cls, pages, chosen, rank, world):
        bins = ((sims.astype(float) + 1) * (BINS / 2)).astype(np.int64).clip(max=BINS - 1)
        counts += np.bincount(kind(i, j) * BINS + bins, minlength=3 * BINS).reshape(3, BINS)
    combine(counts)
    total = counts.sum()
    if total == 0:
        system.die(f"{data.folder}: no two of its {len(chosen)} training images share a page, so there are no pairs")
    low = quantile(counts.sum(0), args.low_quantile, upper=False) if args.low is None else args.low
    high = quantile(counts.sum(0), args.high_quantile, upper=True) if args.high is None else args.high

    if rank == 0:
        picture(data.folder / "filter.png", counts, low, high)         # also where no pair will be kept: it shows why

    outcomes, paired = np.zeros((3, 3), np.int64), np.zeros(len(pages), np.uint8)   # [kind, below | kept | above]
    kept_by = np.zeros(world, np.int64)
    try:
        with tempfile.TemporaryFile(dir=data.folder) as rows:          # second pass: what lies between them
            for i, j, sims in similarities(data.cls, pages, chosen, rank, world):
                outcome = np.where(sims < low, 0, np.where(sims > high, 2, 1))
                outcomes += np.bincount(kind(i, j) * 3 + outcome, minlength=9).reshape(3, 3)
                i, j, sims = (a[outcome == 1] for a in (i, j, sims))
                paired[i] = 1
                row = np.empty(len(i), PAIR)
                row["pair"], row["sim"] = np.stack([i, j], 1), sims
                rows.write(row.data)
            kept_by[rank] = outcomes[:, 1].sum()
            for array, op in ((outcomes, dist.ReduceOp.SUM), (kept_by, dist.ReduceOp.SUM), (paired, dist.ReduceOp.MAX)):
                combine(array, op)
            below, kept, above = outcomes.sum(0).tolist()
            if kept == 0:
                system.die(f"no pair of {data.folder} lies between {low:.4f} and {high:.4f}: {below} are below, {above} above")
            start = kept_by[:rank].sum()                               # now their number is known: each rank to its place
            rows.seek(0)
            with (system.writing_array(data.folder / "pairs.npy", (kept, 2), np.int64, rank) as pairs,
                  system.writing_array(data.folder / "sims.npy", (kept,), np.float32, rank) as similar):
                while len(row := np.fromfile(rows, PAIR, 1 << 20)):
                    pairs[start:start + len(row)], similar[start:start + len(row)] = row["pair"], row["sim"]
                    start += len(row)
    except OSError as e:
        system.die(f"cannot write into {data.folder}: {e.strerror or e}; free some space")
    if rank > 0:
        return
    print(f"{len(train):12,} training images on {len(np.unique(pages[train])):,} pages")
    if args.exclude:
        print(f"{len(train) - len(chosen):12,} of them left out, above {args.exclude_above:g} to an excluded image")
    print(f"{total:12,} pairs of one page")
    print(f"{below:12,} dropped, similarity below {low:.4f} ({below / total:.1%})")
    print(f"{above:12,} dropped, similarity above {high:.4f} ({above / total:.1%})")
    print(f"{kept:12,} kept ({kept / total:.1%})")
    print(f"{len(chosen) - paired.sum():12,} training images left with no partner")
    for planted, name, dropped in ((1, "stranger", outcomes[:, 0]), (2, "near-duplicate", outcomes[:, 2])):
        if everywhere := outcomes[planted].sum():                      # 01 planted them, so the right answer is known
            precision, recall = dropped[planted] / max(1, dropped.sum()), dropped[planted] / everywhere
            print(f"planted {name} pairs: dropped with precision {precision:.2f} and recall {recall:.2f}; "
                  f"{everywhere / total:.1%} of all pairs, {outcomes[planted, 1] / kept:.1%} of the kept")
    print(f"wrote {data.folder}/pairs.npy, sims.npy and filter.png; next: python 03_train_recon.py --data {data.folder} "
          f"and python 04_train_pairs.py --data {data.folder}")


if __name__ == "__main__":
    main()
