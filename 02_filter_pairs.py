"""02: embeddings + pages -> the pairs to train on, neither unrelated nor nearly the same.

Reads   DATA of 01_embed.py: cls.npy [N, D], pages.npy [N], split.npy [N]
Writes  DATA/pairs.npy [P, 2] int64, (condition, target), sorted by page; DATA/sims.npy [P] float32, their similarities

A pair (i, j), i != j, of two training images of one page is kept when

    low <= cos(cls_i, cls_j) <= high,    cos(a, b) = a.b / (|a| |b|)

low drops pairs that share a page but no subject. high drops near-duplicates, from which a model learns to copy.

Thresholds belong to an encoder. Semantica (appendix C, which its section 5 calls D) uses high 0.9, and low 0.65 for
CLIP (its contrastive encoder is SigLIP). For DINOv2 the text prints low 0.9. This must be a misprint: low would equal
high and leave almost no pair, and the same paragraph says that DINOv2 gives lower similarities than CLIP, and that low
was set to keep about as many pairs with both. Quantiles of the same-page similarities, the default here, do that for
any encoder. 0.2 and 0.985 suit the digits: a sixth of their pairs is unrelated, 1.5% are nearly the same.

One process, on the CPU, in two passes over tiles of at most 1024 x 1024 similarities. Memory: about 45 bytes an image.
Embeddings and pairs stay on disk.

    python 02_filter_pairs.py                                                          # digits, 5 s
    python 02_filter_pairs.py --data runs/mine --low 0.65 --high 0.9
    python 02_filter_pairs.py --data runs/mine --exclude runs/benchmark/cls.npy --per-page 1000
"""
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common

EDGES = np.linspace(-1, 1, 5001)        # of the histogram
TILE, PACK = 1024, 256                  # side of a tile; small pages share a tile of up to so many images
ROW = np.dtype([("pair", np.int64, 2), ("sim", np.float32)])            # a row of pairs.npy and one of sims.npy


def unit(rows):
    """Rows [n, D] scaled to length 1, numpy -> torch."""
    return torch.nn.functional.normalize(torch.tensor(rows), dim=1)


def tiles(pages):
    """(rows, columns) slices such that every pair within a page lies in exactly one tile. pages: [n], ascending."""
    found, start = [], 0
    while start < len(pages):                                           # as many whole pages as fit
        end = np.searchsorted(pages, pages[start + PACK]) if start + PACK < len(pages) else len(pages)
        if end == start:                                                # not even one does: this page is cut
            end = np.searchsorted(pages, pages[start], side="right")
        cuts = [slice(c, min(c + TILE, end)) for c in range(start, end, TILE)]
        found += [(rows, columns) for rows in cuts for columns in cuts]
        start = end
    return found


def similarities(cls, pages, chosen, task):
    """The pairs within a page of the images `chosen`, sorted by page: of each tile i, j, cos(cls_i, cls_j), [p]."""
    for rows, columns in tqdm(tiles(pages[chosen]), desc=task, unit="tile", disable=None):
        i, j = chosen[rows], chosen[columns]
        sims = (unit(cls[i]) @ unit(cls[j]).T).clamp(-1, 1).numpy()     # [rows, columns]
        a, b = np.nonzero((pages[i][:, None] == pages[j]) & (i[:, None] != j))
        yield i[a], j[b], sims[a, b]


def most_similar(cls, chosen, other):
    """The largest cosine of each image of `chosen` [n] with a row of other [M, D]: [n]."""
    other = unit(other).T
    parts = np.array_split(chosen, len(chosen) // PACK + 1)
    return np.concatenate([(unit(cls[rows]) @ other).amax(1) for rows in tqdm(parts, desc="exclude", disable=None)])


def main():
    cosine = common.number(float, -1, 1)
    p = common.parser(__doc__)
    p.add_argument("--low", type=cosine, help="least similarity (default: --low-quantile)")
    p.add_argument("--high", type=cosine, help="greatest similarity (default: --high-quantile)")
    p.add_argument("--low-quantile", type=common.share, default=0.2, help="share of pairs below low (%(default)s)")
    p.add_argument("--high-quantile", type=common.share, default=0.985, help="share up to high (%(default)s)")
    p.add_argument("--per-page", type=common.count, help="at most so many pairs of a page, at random by --seed")
    p.add_argument("--exclude", type=Path, nargs="+", default=[], help="embeddings of evaluation sets (same encoder)")
    p.add_argument("--exclude-above", type=cosine, default=0.95, help="leave out what is so near them (%(default)s)")
    args = common.parse(p)
    cls, pages, split = (common.load(args.data / f"{name}.npy") for name in ("cls", "pages", "split"))
    chosen = np.flatnonzero(split == 0)
    chosen = chosen[np.argsort(pages[chosen], kind="stable")]
    for path in args.exclude:
        chosen = chosen[most_similar(cls, chosen, common.load(path)) <= args.exclude_above]

    histogram = np.zeros(len(EDGES) - 1, np.int64)                      # first pass: the thresholds
    for _, _, sims in similarities(cls, pages, chosen, "pass 1 of 2"):
        histogram += np.histogram(sims.astype(float), len(histogram), (-1, 1))[0]
    under, total = np.append(0, histogram.cumsum()), histogram.sum()    # pairs under each edge, and all
    first, last = np.searchsorted(under, [args.low_quantile * total, args.high_quantile * total])
    low = EDGES[max(first - 1, 0)] if args.low is None else args.low    # a bin down, to keep no fewer than asked for
    high = EDGES[last] if args.high is None else args.high

    below, by_page = 0, np.zeros(pages.max() + 1, np.int64)             # by_page: the pairs kept
    with tempfile.TemporaryFile(dir=args.data) as f:                    # second pass: the pairs
        for i, j, sims in similarities(cls, pages, chosen, "pass 2 of 2"):
            kept = (sims >= low) & (sims <= high)                       # the filter ([S] 5)
            np.rec.fromarrays([np.stack([i, j], 1)[kept], sims[kept]], ROW).tofile(f)
            np.add.at(by_page, pages[i[kept]], 1)
            below += (sims < low).sum()
        if not by_page.any():
            common.die(f"none of {total} pairs of one page is between {low:.4f} and {high:.4f}, {below} are below")
        rows, rng = np.asarray(np.memmap(f, ROW, "r")), np.random.default_rng(args.seed)
        wanted = np.minimum(by_page, args.per_page or total)
        start, done, final = 0, 0, int(wanted.sum())
        with (common.writing_array(args.data / "pairs.npy", (final, 2), np.int64) as pairs,
              common.writing_array(args.data / "sims.npy", (final,), np.float32) as sims):
            for n, m in zip(by_page, wanted):                           # of each page m of its n rows, in their order
                own = slice(start, start + n) if m == n else start + np.sort(rng.choice(n, m, False))
                pairs[done:done + m], sims[done:done + m] = rows["pair"][own], rows["sim"][own]
                start, done = start + n, done + m
    above = total - below - by_page.sum()
    print(f"{total:,} pairs of one page: {below:,} below {low:.4f} ({below / total:.1%}), {above:,} above {high:.4f}")
    print(f"kept {final:,} ({final / total:.1%}) on {(by_page > 0).sum():,} of {len(np.unique(pages[chosen])):,} pages")
    print(f"wrote {args.data}/pairs.npy, sims.npy; next: python 04_train_pairs.py --data {args.data}")


if __name__ == "__main__" and os.environ.get("RANK", "0") == "0":       # under torchrun the first process works alone
    main()
