"""06: real embeddings + sample embeddings -> FID, KID, precision, recall, copy score: a table, a JSON file and a plot.

Reads   DATA: cls.npy, pages.npy, split.npy, names.npy, data.json
        each sample folder: conditions.npy and samples.json of 05, cls.npy and data.json of 01 --cls-only
Writes  into --out: metrics.json, an object for each set of samples and each reference
        metrics.txt, a row for each model and guidance, mean +- s.d. over seeds and draws; the guidance of the best FID
        metrics.png, precision against recall over guidance

With x the features of n samples and y those of m real images, all of d numbers, as the encoder gives them:
  FID        |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^1/2, S the covariances   (Heusel et al., arXiv 1706.08500)
  KID        mean k(x, x') + mean k(y, y') - 2 mean k(x, y), k(a, b) = (a.b / d + 1)^3, x' != x   (Binkowski et al., 1801.01401)
  precision  share of the samples within reach of a real image, whose reach is its 3rd nearest neighbour's distance
  recall     share of the real images within reach of a sample   (both: Kynkaanniemi et al., arXiv 1904.06991)
  copy       mean cosine of a sample and its own conditioning image: 1 for an encoder-perfect copy. In the row of real images:
             of the conditioning images and the other references of their pages, which a model that varies has no need to exceed
FID and KID are in the features of DATA's encoder: unless that is inception:FILE, compare them within a table, not with papers.

References never contain a conditioning image, so a copier earns nothing by them:
  unseen     the other held-out images
  seen       the training images on the pages of the conditions, if there are any (none for the digits): memorising helps here
"real (train)" scores training images as if they were samples: what a perfect model would reach.
--protocol says how many references at most (common.PROTOCOLS; chosen at random, once for all). In "fullset", for comparison, the
conditions are references too, so that a copy earns something.

Work goes by chunks of rows, which the processes of torchrun share; the metrics do not depend on how many they are.

    python 01_embed.py --data runs/digits16 --images S/samples.npy --out S --cls-only    # S = runs/digits16/samples/pairs_w1
    python 06_fewshot_metrics.py                                       # all of runs/digits16/samples, about 1 s a folder
    python 06_fewshot_metrics.py --data runs/emoji64 --samples runs/emoji64/samples/pairs_w*      # on a GPU if there is one
    python 06_fewshot_metrics.py --data runs/imagenet --protocol imagenet-oneshot       # runs/imagenet/imagenet-oneshot/*
    torchrun --nproc-per-node=8 06_fewshot_metrics.py --data runs/imagenet
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

import common
import system

CHUNK, NEIGHBOURS = 1024, 3   # rows at a time; k of precision and recall
# Rows that are alike in these are repetitions.
SETTINGS = ("reference", "model", "variant", "guidance", "similarity", "sample_steps", "time_power", "interpolation", "per_page",
            "variations")
REAL = "real (train)"                                                   # the row of training images scored as samples


def over_chunks(f, x, size):
    """The tensors f(rows) for all slices of `size` rows of x, a list. A process of torchrun computes its share and gets all."""
    chunks = [slice(start, start + size) for start in range(0, len(x), size)]
    if not dist.is_initialized():
        return [f(rows) for rows in chunks]
    rank, world = dist.get_rank(), dist.get_world_size()
    shares = [None] * world
    dist.all_gather_object(shares, [f(rows).cpu() for rows in chunks[rank::world]])
    return [shares[i % world][i // world].to(x.device) for i in range(len(chunks))]


def moments(x):
    """Mean [d] and a root R [min(n, d), d] of the covariance of features [n, d], R^T R = S, in float64.

    The centred rows over sqrt(n - 1) are such a root. QR keeps X^T X and leaves d rows: of each part, then of the parts (TSQR).
    """
    def shorten(rows):
        return torch.linalg.qr(rows, mode="r").R if len(rows) > x.shape[1] else rows

    mean = sum(part.double().sum(0) for part in x.split(CHUNK)) / len(x)
    parts = over_chunks(lambda rows: shorten(x[rows].double() - mean), x, 4 * x.shape[1])
    return mean, shorten(torch.cat(parts)) / math.sqrt(len(x) - 1)


def frechet_distance(x, y):
    """FID of two sets, given their moments(). With S_x = A^T A and S_y = B^T B the last trace is the nuclear norm of A B^T:

    S_x S_y = A^T (A B^T B) has the nonzero eigenvalues of A B^T (A B^T)^T, the squared singular values of A B^T. One form
    for n < d and n >= d, and no square root of a matrix.
    """
    (mean_x, a), (mean_y, b) = x, y
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return float((mean_x - mean_y).square().sum() + a.square().sum() + b.square().sum() - 2 * cross)


def kernel_mean(x, y=None):
    """Mean of k(a, b) = (a.b / d + 1)^3 over a in x [n, d], b in y [m, d]; without y, over all a != b in x. Sums in float64."""
    def chunk_sum(rows):
        k = (x[rows] @ (x[rows.start:] if y is None else y).T / x.shape[1] + 1).pow_(3)     # [c, m]; without y [c, n - start]
        total = k.sum(dtype=torch.float64)
        if y is None:                                                  # k is symmetric: all of it twice, but the square on the
            square = k[:, :len(k)]                                     # diagonal once, and the diagonal not at all
            total = 2 * total - square.sum(dtype=torch.float64) - square.diagonal().sum(dtype=torch.float64)
        return total

    pairs = len(x) * (len(x) - 1 if y is None else len(y))
    return float(sum(over_chunks(chunk_sum, x, CHUNK))) / pairs


def squared_distances(x, y):
    """|a - b|^2 = |a|^2 + |b|^2 - 2 a.b of rows of x [n, d] and y [m, d]: [n, m]. Centre them: it loses digits far from 0."""
    return torch.addmm(x.square().sum(1)[:, None] + y.square().sum(1), x, y.T, alpha=-2)


def squared_reach(x):
    """Squared distance of each row of x [n, d] to its k-th nearest other row, [n]: the k + 1 smallest include its own, 0."""
    x = x - x.mean(0)

    def smallest(d2):                                                  # [c, m] -> [c, k + 1], infinite where m is less
        found = d2.topk(min(NEIGHBOURS + 1, d2.shape[1]), largest=False).values
        return F.pad(found, (0, NEIGHBOURS + 1 - found.shape[1]), value=torch.inf)

    def near(rows):                                                    # to these rows and to those after them, [n - start, k + 1]
        d2 = squared_distances(x[rows], x[rows.start:])                # [c, n - start]; the rest is symmetric
        return torch.cat([smallest(d2), smallest(d2[:, len(d2):].T)])

    nearest = x.new_full((len(x), NEIGHBOURS + 1), torch.inf)
    for found in over_chunks(near, x, CHUNK):
        nearest[-len(found):] = smallest(torch.cat([nearest[-len(found):], found], 1))
    return nearest[:, -1]


def precision_recall(real, fake, reach_real, reach_fake):
    """Precision and recall in [0, 1] of fake [n, d] against real [m, d]; reach: squared_reach() of each. <= as in the paper."""
    real, fake = real - real.mean(0), fake - real.mean(0)

    def reached(rows):                                                 # the samples by these rows [n], and these by samples [c]
        d2 = squared_distances(real[rows], fake)                       # [c, n]
        return torch.cat([(d2 <= reach_real[rows, None]).any(0), (d2 <= reach_fake).any(1)])

    parts = over_chunks(reached, real, CHUNK)
    within, covered = torch.stack([part[:len(fake)] for part in parts]).any(0), torch.cat([part[len(fake):] for part in parts])
    return int(within.sum()) / len(fake), int(covered.sum()) / len(real)


def statistics(features, device="cpu"):
    """What a set [n, d] brings to every comparison, computed once: features, moments, mean kernel, reach."""
    x = torch.from_numpy(np.array(features)).to(device)
    return dict(x=x, moments=moments(x), kernel=kernel_mean(x), reach=squared_reach(x))


def compare(real, fake):
    """The metrics of one set against another, from the statistics() of both: m, n, d, fid, kid, precision, recall."""
    precision, recall = precision_recall(real["x"], fake["x"], real["reach"], fake["reach"])
    return dict(n=len(fake["x"]), m=len(real["x"]), d=real["x"].shape[1], fid=frechet_distance(fake["moments"], real["moments"]),
                kid=fake["kernel"] + real["kernel"] - 2 * kernel_mean(fake["x"], real["x"]), precision=precision, recall=recall)


def copy_score(cls, features, conditions):
    """Mean cosine of features [n k, d] to those of their own conditioning images, cls[conditions], conditions [n]."""
    own = torch.from_numpy(cls[np.repeat(conditions, len(features) // len(conditions))]).to(features.device)
    return float(torch.cosine_similarity(features, own).double().mean())


def page_similarity(cls, pages, conditions, others):
    """Mean cosine of the images `conditions` [n] and those of `others` [m] that share their page, indices into cls [N, d] and
    pages [N]; every condition counts alike. None if no page has another."""
    means = []
    for c in conditions:
        same = others[(pages[others] == pages[c]) & (others != c)]
        if len(same):
            means.append(torch.cosine_similarity(torch.from_numpy(cls[same]), torch.from_numpy(cls[[c]])).double().mean())
    return float(sum(means) / len(means)) if means else None


def references(data, conditions, with_conditions=False):
    """({name: indices} of the images to compare with, indices of training images that stand for a perfect model's samples).

    No set holds one of `conditions`, unless they are wanted, nor an image that 01 planted.
    """
    real = ~(np.char.startswith(data.names, "stranger: ") | np.char.startswith(data.names, "near-duplicate: "))
    if with_conditions:
        return {"held out": np.flatnonzero(real & (data.split == 1))}, np.flatnonzero(real & (data.split == 0))
    real[conditions] = False
    if not (data.split == 1).any():
        return dict(all=np.flatnonzero(real)), np.zeros(0, np.int64)
    train, on_page = real & (data.split == 0), np.isin(data.pages, data.pages[conditions])
    sets = dict(unseen=np.flatnonzero(real & (data.split == 1)), seen=np.flatnonzero(train & on_page))
    return sets, sets["seen"] if len(sets["seen"]) else np.flatnonzero(train)


def name(row):
    """The model of a row, and how it was sampled if not as in the paper."""
    return f"{row['model']} {row.get('variant') or ''}".strip()


def repetitions(rows):
    """[{key: mean}, {key: s.d.}] of each group of rows that differ only in seed, draw, checkpoint or folder, in order.

    Numbers that a row lacks stay None; the s.d. (n - 1) of one row is None; "repeats" is how many there are.
    """
    groups, found = {}, []
    for row in rows:
        groups.setdefault(str([row.get(key) for key in SETTINGS]), []).append(row)
    for group in groups.values():
        mean, spread = dict(group[0], repeats=len(group)), {}
        for key, value in group[0].items():
            if key not in SETTINGS and type(value) in (int, float) and all(row.get(key) is not None for row in group):
                values = np.array([row[key] for row in group], float)
                mean[key] = value if len(group) == 1 or (values == value).all() else float(values.mean())
                spread[key] = float(values.std(ddof=1)) if len(group) > 1 else None
        found.append((mean, spread))
    return found


def picture(path, rows):
    """Save precision against recall: a panel a reference, a curve a model, points labelled w or similarity, bars of one s.d."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sets = list(dict.fromkeys(row["reference"] for row in rows))
    figure, panels = plt.subplots(1, len(sets), figsize=(5.5 * len(sets), 5), layout="constrained", squeeze=False)
    for axes, reference in zip(panels[0], sets):
        curves = {}
        for row, spread in repetitions(rows):
            if row["reference"] == reference:
                curves.setdefault(name(row), []).append((row, spread))
        for model, curve in curves.items():
            recall, precision = ([row[key] for row, _ in curve] for key in ("recall", "precision"))
            bars = [[spread[key] or 0 for _, spread in curve] for key in ("recall", "precision")]
            axes.errorbar(recall, precision, bars[1], bars[0], "*k" if model == REAL else "o-", elinewidth=0.8, label=model)
            for row, _ in curve:
                point = row["guidance"] if row.get("similarity") is None else row["similarity"][0]
                label = "" if point is None else f"{point:g}"
                axes.annotate(label, (row["recall"], row["precision"]), xytext=(4, 4), textcoords="offset points")
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision")
        axes.set_title(f"against {reference} images; w (similarity) at the points")
        axes.legend(frameon=False)
    with system.writing(path) as f:
        figure.savefig(f, dpi=120, format="png")


def table(rows, caption):
    """The lines of metrics.txt: a line a setting, mean +- s.d. of its repetitions; the best FID of each model; a caption."""
    columns = dict(reference="", model="", guidance="g", repeats="d", n="g", m="g", fid=".2f", kid=".4f",
                   precision=".3f", recall=".3f", copy=".3f")
    differ = [key for key in ("sample_steps", "time_power", "interpolation")
              if len({row.get(key) for row in rows if row["model"] != REAL}) > 1]
    columns |= {key: "g" for key in differ} | ({"ms_image": ".1f"} if differ else {})                  # what an image costs
    if any("prior_share" in row for row in rows):
        columns["prior_share"] = ".0%"
    if any(row.get("similarity") for row in rows):
        columns["similarity"] = ""
    groups, cells = repetitions(rows), []
    for mean, spread in groups:
        mean = mean | dict(model=name(mean), similarity=" ".join(f"{s:g}" for s in mean.get("similarity") or []))
        line = ["-" if mean.get(key) is None else format(mean[key], spec) for key, spec in columns.items()]
        cells.append([f"{cell} +- {spread[key]:{spec}}" if spread.get(key) and cell != "-" else cell
                      for cell, (key, spec) in zip(line, columns.items())])
    widths = [max(map(len, column)) for column in zip(columns, *cells)]
    lines = ["  ".join(f"{cell:<{w}}" if i < 2 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(line, widths)))
             for line in (columns, *cells)]
    curves = {}
    for mean, _ in groups:
        if mean["guidance"] is not None:
            curves.setdefault((mean["reference"], name(mean)), []).append((mean["fid"], mean["guidance"]))
    best = [f"{model} at w = {min(curve)[1]:g}" + f" ({reference})" * (reference != rows[0]["reference"])
            for (reference, model), curve in curves.items() if len({w for _, w in curve}) > 1]
    return lines + [f"best fid: {', '.join(best)}"] * bool(best) + [caption]


def encoder(folder):
    """The encoder in a folder's data.json, less what does not touch cls.npy."""
    about = system.read_json(folder / "data.json").get("encoder")
    if not isinstance(about, dict):
        system.die(f"{folder}/data.json names no encoder; run 01_embed.py on it again")
    return {key: value for key, value in about.items() if key not in ("tokens", "pool")}


def read_samples(folder, data):
    """A sample folder: features [n k, d], conditions [n], what samples.json says. Exits with one line if it is not of `data`."""
    if encoder(folder) != encoder(data.folder):
        system.die(f"{folder} was embedded by {encoder(folder)}, {data.folder} by {encoder(data.folder)}; run 01 alike on both")
    conditions = np.zeros(0, np.int64)                                 # samples of 07 have none
    if (folder / "conditions.npy").exists():
        conditions = np.array(system.read_array(folder / "conditions.npy", np.int64, 1, made_by="05_sample.py"))
    features = system.read_array(folder / "cls.npy", np.float32, 2)
    ragged = len(features) % max(1, len(conditions))
    if features.shape[1] != data.cls.shape[1] or ragged or not np.isin(conditions, np.arange(len(data.cls))).all():
        system.die(f"{folder}: {features.shape} features do not fit {len(conditions)} conditions of {data.folder}; run 01 again")
    if len(features) <= NEIGHBOURS or not np.isfinite(features).all():
        system.die(f"{folder}/cls.npy has fewer than {NEIGHBOURS + 1} rows, or values that are not finite; run 05 and 01 again")
    made = system.read_json(folder / "samples.json") if (folder / "samples.json").exists() else dict(model=folder.name)
    similarity = made.get("similarity") or []
    if not (isinstance(made.get("model"), str) and isinstance(similarity, list) and all(
            isinstance(x, (int, float, type(None))) for x in (made.get("guidance"), made.get("sample_steps"), *similarity))):
        system.die(f"{folder}/samples.json does not say how the samples were made; draw them again with 05_sample.py")
    return features, conditions, dict(guidance=None, seed=None) | made


def main():
    p = system.parser(__doc__, seed=False)
    p.add_argument("--samples", type=Path, nargs="+", dest="folders", metavar="DIR",
                   help="sample folders (default: DATA/samples/*, or DATA/PROTOCOL/*)")
    p.add_argument("--protocol", choices=common.PROTOCOLS, default="fewshot", help="how the samples were made, by 05")
    p.add_argument("--references", type=int, help="compare with at most so many images (0: all)")
    p.add_argument("--out", type=Path, help="folder for metrics.json and metrics.png (default DATA, or DATA/PROTOCOL)")
    args = system.parse(p)
    made_in = args.data / ("samples" if args.protocol == "fewshot" else args.protocol)
    with_conditions = common.PROTOCOLS[args.protocol].get("with_conditions", False)
    device, rank, _ = system.start(args.device)
    device = torch.device("cpu") if device.type == "mps" else device   # MPS has no float64
    torch.set_float32_matmul_precision("highest")                      # not TF32, as start() allows: distances are differences
    data, out = system.Data(args.data), args.out or (args.data if args.protocol == "fewshot" else made_in)
    folders = args.folders or sorted(found.parent for found in made_in.glob("*/cls.npy"))
    if (args.references or 0) < 0:
        system.die(f"--references {args.references}: expected a number of images, or 0 for all")
    if not folders:
        system.die(f"no folder in {made_in} has a cls.npy; run 05_sample.py, then 01_embed.py --cls-only")
    samples = [(folder, *read_samples(folder, data)) for folder in folders]
    for folder, *_, made in samples:
        if made.get("protocol", args.protocol) != args.protocol:
            system.die(f"{folder} was made for --protocol {made['protocol']}, not {args.protocol}; score the two apart")

    conditions = np.unique(np.concatenate([own for _, _, own, _ in samples]))
    if len(conditions) and (data.split == 1).any():                    # with none at all, every held-out image is a reference
        conditions = np.union1d(conditions, data.conditions())
    sets, train = references(data, conditions, with_conditions)
    if rank == 0 and "all" in sets:
        print(f"{data.folder} holds nothing out: the reference is all of it but the conditioning images, trained on or not")
    if not all(np.isfinite(data.cls[indices]).all() for indices in (*sets.values(), train)):
        system.die(f"{data.folder}/cls.npy has values that are not finite; run 01_embed.py again")
    if args.references:
        sets = {name: np.random.default_rng(0).permutation(indices)[:args.references] for name, indices in sets.items()}
    real = {name: statistics(data.cls[np.sort(indices)], device) for name, indices in sets.items() if len(indices) > NEIGHBOURS}
    if not real:
        system.die(f"{data.folder} has too few images besides its {len(conditions)} conditioning ones to compare with")

    rows, features_of = [], "{name}, {px} px".format_map({"px": "?", **encoder(args.data)})
    train = np.random.default_rng(0).permutation(train)[:max(len(features) for _, features, *_ in samples)]
    first = next(iter(real))                                           # the unseen images, or all held out
    if first != "all" and len(train) > NEIGHBOURS:
        copy = page_similarity(data.cls, data.pages, conditions, sets[first])
        rows.append(dict(reference=first, model=REAL, guidance=None, seed=None, encoder=features_of, copy=copy,
                         **compare(real[first], statistics(data.cls[np.sort(train)], device))))
    for folder, features, own, made in system.progress(samples, rank, unit="set"):
        fake = statistics(features, device)
        copy = copy_score(data.cls, fake["x"], own) if len(own) else None
        about = dict(made, encoder=features_of, folder=str(folder), copy=copy)
        rows += [dict(about, reference=reference, **compare(real[reference], fake)) for reference in real]
    if rank > 0:
        return
    rows.sort(key=lambda row: (list(real).index(row["reference"]), "folder" in row, name(row), row["guidance"] or 0,
                             row.get("similarity") or [], row.get("sample_steps") or 0))

    with system.writing(out / "metrics.json") as f:
        f.write(json.dumps(rows, indent=1).encode())
    picture(out / "metrics.png", rows)
    other = "" if features_of.startswith("inception:") else ", not Inception's"
    lines = table(rows, f"fid, kid: in the features of {features_of} (d = {data.cls.shape[1]}){other}; "
                        f"precision, recall: k = {NEIGHBOURS}")
    with system.writing(out / "metrics.txt") as f:
        f.write(("\n".join(lines) + "\n").encode())
    print("\n".join(lines))
    print(f"wrote {out}/metrics.json, metrics.txt and metrics.png")


if __name__ == "__main__":
    main()
