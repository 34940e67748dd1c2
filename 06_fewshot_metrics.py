"""06: embeddings of real images and of samples -> FID, KID, precision, recall, copy score, memorisation.

Reads   DATA: cls.npy, pages.npy, split.npy, data.json
        each sample folder S: samples.json and conditions.npy of 05, cls.npy and data.json of 01 --cls-only
Writes  DATA/metrics.json, an object for each sample folder
        DATA/metrics.txt, the table: mean +- s.d. over rows that differ only in seed, draw or checkpoint

With x the features of n samples and y those of m real images, d numbers each, as the encoder gives them:
  FID           |mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^1/2, S the covariances (Heusel et al., 1706.08500)
  KID           mean k(x, x') + mean k(y, y') - 2 mean k(x, y), k(a, b) = (a.b / d + 1)^3 (Binkowski et al., 1801.01401)
  precision     share of the samples within reach of a real image: no farther than its 3rd nearest real neighbour
  recall        share of the real images within reach of a sample (both: Kynkaanniemi et al., 1904.06991)
  copy          mean cosine of a sample and its own condition; 1 is a copy
  memorisation  median distance of the samples to the nearest training image, over that of the references;
                well below 1: the model repeats training images

The references are the held-out images without the conditions of any folder, so copying a condition earns nothing. (If
nothing is held out: all images but the conditions.) The row "real (train)" scores training images as if they were
samples: what a perfect model would reach. Its copy score is that of the conditions and the references on their pages.

--judge NAME compares in the features of another encoder: DATA/NAME/cls.npy and S/NAME/cls.npy, computed from images.npy
and samples.npy. A model should not be judged by the encoder that conditions it; in the papers' presets it cannot be,
as DATA's embeddings are those of the source images. Only Inception's FIDs compare with the literature.

    S=runs/digits16/samples/pairs_w1
    python 01_embed.py --data runs/digits16 --images $S/samples.npy --out $S --cls-only
    python 06_fewshot_metrics.py                                       # all of runs/digits16/samples, 2 s a folder

    D=runs/mine                                                        # S: one of its sample folders
    python 01_embed.py --data $D --images $D/images.npy --encoder siglip_b --out $D/judge --cls-only
    python 01_embed.py --data $D/judge --images $S/samples.npy --out $S/judge --cls-only
    python 06_fewshot_metrics.py --data $D --judge judge --references-per-page 10
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common

CHUNK, K = 512, 3                                                       # rows at a time; neighbours
METRICS = dict(n="g", m="g", fid=".2f", kid=".4f", precision=".3f", recall=".3f", copy=".3f", memorisation=".3f")
REPEATS = ("folder", "checkpoint", "seed", "draw", "ms_image")          # rows that differ only in these are repetitions


def moments(x):
    """Mean [d] of features [n, d], and a root R [min(n, d), d] of their covariance: R^T R = S."""
    root = (x - x.mean(0)) / math.sqrt(len(x) - 1)
    return x.mean(0), root if len(x) <= x.shape[1] else torch.linalg.qr(root, mode="r").R


def frechet_distance(x, y):
    """FID of two sets, given their moments().

    With S_x = A^T A and S_y = B^T B, S_x S_y has the nonzero eigenvalues of (A B^T) (A B^T)^T. So tr (S_x S_y)^1/2 is
    the sum of the singular values of A B^T: no square root of a matrix, and n may be less than d.
    """
    (mean_x, a), (mean_y, b) = x, y
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return ((mean_x - mean_y).square().sum() + a.square().sum() + b.square().sum() - 2 * cross).item()


def kernel_mean(x, y=None):
    """Mean of k(a, b) = (a.b / d + 1)^3 over x [n, d] and y [m, d]. Without y: over different rows of x."""
    d, other = x.shape[1], x if y is None else y
    total = sum((part @ other.T / d + 1).pow(3).sum() for part in x.split(CHUNK))
    if y is None:
        total = total - (x.square().sum(1) / d + 1).pow(3).sum()        # a row with itself
    return total.item() / (len(x) * (len(x) - 1 if y is None else len(y)))


def radius(x):
    """Distance of each row of x [n, d] to its K-th nearest other row, [n]. The nearest of all is the row itself."""
    return torch.cat([torch.cdist(part, x).kthvalue(K + 1).values for part in x.split(CHUNK)])


def precision_recall(real, fake, radius_real, radius_fake):
    """Precision and recall of fake [n, d] against real [m, d], given the radius() of each."""
    within, covered = torch.zeros_like(radius_fake, dtype=torch.bool), []
    for part, own in zip(real.split(CHUNK), radius_real.split(CHUNK)):
        distance = torch.cdist(part, fake)                              # [c, n]
        within |= (distance <= own[:, None]).any(0)
        covered.append((distance <= radius_fake).any(1))
    return within.double().mean().item(), torch.cat(covered).double().mean().item()


def statistics(features, device="cpu"):
    """What a set [n, d] brings to every comparison. In float64: FID and KID are differences of large numbers."""
    x = torch.tensor(features, dtype=torch.float64, device=device)
    return dict(x=x, moments=moments(x), kernel=kernel_mean(x), radius=radius(x))


def compare(real, fake):
    """The metrics of one set against another, from the statistics() of both."""
    precision, recall = precision_recall(real["x"], fake["x"], real["radius"], fake["radius"])
    kid = fake["kernel"] + real["kernel"] - 2 * kernel_mean(fake["x"], real["x"])
    return dict(n=len(fake["x"]), m=len(real["x"]), d=real["x"].shape[1],
                fid=frechet_distance(fake["moments"], real["moments"]), kid=kid, precision=precision, recall=recall)


def nearest(x, cls, train):
    """Median over x [n, d] of the distance to the nearest of cls[train], which is read a chunk at a time."""
    best = torch.full_like(x[:, 0], torch.inf)
    for start in range(0, len(train), CHUNK):
        part = torch.tensor(cls[train[start:start + CHUNK]]).to(x)
        best = torch.minimum(best, torch.cdist(x, part).amin(1))
    return best.median().item()


def cosines(a, b):
    """Cosines of rows of numpy arrays [n, d] and [n, d] or [1, d]: [n]."""
    return torch.cosine_similarity(torch.tensor(a).double(), torch.tensor(b).double())


def page_similarity(cls, pages, conditions, others):
    """Mean cosine of the images `conditions` and those of `others` on their pages; every condition counts alike."""
    means = []
    for c in conditions:
        same = others[(pages[others] == pages[c]) & (others != c)]
        if len(same):
            means.append(cosines(cls[same], cls[[c]]).mean().item())
    return float(np.mean(means)) if means else None


def at_most(n, indices, pages, rng):
    """At most n of the images `indices` on each page, at random."""
    mixed = rng.permutation(indices)
    mixed = mixed[np.argsort(pages[mixed], kind="stable")]              # by page, in random order within
    start = np.searchsorted(pages[mixed], pages[mixed])                 # where the page of each begins
    return mixed[np.arange(len(mixed)) - start < n]


def references(pages, split, conditions, with_conditions=False):
    """Indices of the images to compare with, and of the training images to score as if they were samples."""
    train, reference = split == 0, split == 1
    if not reference.any():
        reference = train                                               # nothing is held out
    if not with_conditions:
        reference = reference & ~np.isin(np.arange(len(split)), conditions)
    same_page = train & np.isin(pages, pages[conditions])
    return np.flatnonzero(reference), np.flatnonzero(same_page if same_page.any() else train)


def setting(row):
    """What a row is of, as text: alike in repetitions."""
    return json.dumps({key: row[key] for key in sorted(row) if key not in METRICS and key not in REPEATS})


def table(rows):
    """Lines of text: the head, and one for each setting, mean +- s.d. (n - 1) of its repetitions."""
    samples = [row for row in rows if "folder" in row]
    keys = dict.fromkeys(key for row in samples for key in row if key not in METRICS and key not in REPEATS)
    differ = [key for key in keys if len({json.dumps(row.get(key)) for row in samples}) > 1]
    about = list(dict.fromkeys(["model", "guidance", *differ]))         # columns that tell the rows apart
    groups, lines = {}, [[*about, "repeats", *METRICS]]
    for row in rows:
        groups.setdefault(setting(row), []).append(row)
    for group in groups.values():
        line = ["-" if group[0].get(key) is None else str(group[0][key]) for key in about] + [str(len(group))]
        for key, form in METRICS.items():
            values = [row[key] for row in group]
            cell = "-" if None in values else format(np.mean(values), form)
            spread = 0 if None in values or len(group) == 1 else np.std(values, ddof=1)
            line.append(f"{cell} +- {spread:{form}}" if spread else cell)
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [line[0].ljust(widths[0]) + "".join(map("  {:>{}}".format, line[1:], widths[1:])) for line in lines]


def encoder(folder):
    """What data.json says of the encoder, without the tokens: no metric reads them."""
    return {key: value for key, value in common.load(folder / "data.json")["encoder"].items() if key != "tokens"}


def read_samples(folder, judge, judging_encoder):
    """Features [n k, d], conditions [n] (none for samples of --y), and what samples.json says, of one sample folder."""
    features, conditions, made = common.load(folder / judge / "cls.npy"), np.zeros(0, np.int64), dict(model=folder.name)
    if encoder(folder / judge) != judging_encoder:
        common.die(f"{folder / judge} was embedded by {encoder(folder / judge)}, the real images by {judging_encoder}; "
                   "run 01_embed.py alike on both, or give --judge")
    if (folder / "conditions.npy").exists():
        conditions = common.load(folder / "conditions.npy")
        if len(features) % len(conditions):
            common.die(f"{folder / judge}: {len(features)} features for {len(conditions)} conditions; run 01_embed.py")
    if (folder / "samples.json").exists():                              # samples of others may come without
        made = common.load(folder / "samples.json")
        if made.pop("y", None):
            made["model"] = folder.name                                 # a row of 2SDM's table: its model may have more
    return features, conditions, dict(guidance=None) | made | dict(folder=str(folder))


def main():
    p = common.parser(__doc__)
    p.add_argument("--samples", type=Path, nargs="+", metavar="S", help="sample folders (default DATA/samples/*)")
    p.add_argument("--judge", default=".", metavar="NAME", help="use the features in DATA/NAME and S/NAME")
    p.add_argument("--references", type=common.count, help="compare with at most so many images, at random by --seed")
    p.add_argument("--references-per-page", type=common.count, help="with at most so many of each page")
    p.add_argument("--with-conditions", action="store_true", help="the conditions are references too (full-set FID)")
    p.add_argument("--out", type=Path, help="folder for metrics.json and metrics.txt (default DATA)")
    args = common.parse(p)
    device, rank, _ = common.start(args.device)
    if rank > 0:                                                        # under torchrun the first process works alone
        return
    device = "cpu" if device.type == "mps" else device                  # MPS has no float64
    judge, out = args.data / args.judge, args.out or args.data
    cls, pages, split = (common.load(f) for f in (judge / "cls.npy", args.data / "pages.npy", args.data / "split.npy"))
    if len(cls) != len(split):
        common.die(f"{judge}/cls.npy has {len(cls)} rows for {len(split)} images; embed images.npy with 01_embed.py")
    folders = args.samples or [f for f in sorted(args.data.glob("samples/*")) if (f / args.judge / "cls.npy").exists()]
    if not folders:
        common.die(f"no folder in {args.data}/samples has {args.judge}/cls.npy; run 05_sample.py, then 01 --cls-only")
    samples = [read_samples(folder, args.judge, encoder(judge)) for folder in folders]
    samples.sort(key=lambda found: (found[2]["model"], found[2]["guidance"] or 0))

    conditions = np.unique(np.concatenate([own for _, own, _ in samples]))
    chosen, alike = references(pages, split, conditions, args.with_conditions)
    rng = np.random.default_rng(args.seed)
    if args.references_per_page:
        chosen = at_most(args.references_per_page, chosen, pages, rng)
    chosen = np.sort(rng.permutation(chosen)[:args.references])
    real, train = statistics(cls[chosen], device), np.flatnonzero(split == 0)
    rows, held_out = [], len(train) > 0 and split.any()                 # else references are training images
    if held_out:
        distance = nearest(real["x"], cls, train)
        alike = np.sort(rng.permutation(alike)[:max(len(features) for features, _, _ in samples)])
        rows.append(dict(model="real (train)", guidance=None, **compare(real, statistics(cls[alike], device)),
                         copy=page_similarity(cls, pages, conditions, chosen), memorisation=None))
    for features, own, made in tqdm(samples, unit="folder", disable=None):
        fake = statistics(features, device)
        copy = cosines(features, cls[np.repeat(own, len(features) // len(own))]).mean().item() if len(own) else None
        memorisation = nearest(fake["x"], cls, train) / distance if held_out else None
        rows.append(made | compare(real, fake) | dict(copy=copy, memorisation=memorisation))

    rows = [row | dict(encoder=encoder(judge)) for row in rows]
    lines = table(rows)
    lines.append(f"fid, kid: features of {encoder(judge)['name']}, d = {cls.shape[1]}; precision and recall: k = {K}")
    with common.writing(out / "metrics.txt") as f:
        f.write("\n".join([*lines, ""]).encode())
    with common.writing(out / "metrics.json") as f:
        f.write(json.dumps(rows, indent=1).encode())
    print("\n".join(lines))
    print(f"wrote {out}/metrics.json and metrics.txt")


if __name__ == "__main__":
    main()
