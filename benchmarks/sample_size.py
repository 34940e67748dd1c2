"""What the number of images does to FID, KID, precision and recall: real images against real images, by 06's functions.

n random training images stand for samples of a perfect model. They are compared with all held-out images, as 06 does,
and with n random ones of them. Mean +- standard deviation over ten random subsets. A perfect metric would be
the same in every row. Reads a folder of 01_embed.py.

    python -m benchmarks.sample_size --data runs/digits16
"""
from pathlib import Path

import numpy as np
import torch

import common
from benchmarks import report
from benchmarks.claims import summary

METRICS, SUBSETS = ("fid", "kid", "precision", "recall"), 10


def main():
    p = report.parser(__doc__)
    p.add_argument("--data", type=Path, default=Path("runs/digits16"), help="folder of 01_embed.py")
    p.add_argument("--images", type=int, nargs="+", default=[50, 100, 200, 400, 600, 990, 2000, 4000], metavar="N")
    args = p.parse_args()
    metrics = report.script("06_fewshot_metrics")
    cls, split = common.load(args.data / "cls.npy"), common.load(args.data / "split.npy")
    train, real = np.flatnonzero(split == 0), np.flatnonzero(split == 1)
    rng, everything, rows = np.random.default_rng(0), metrics.statistics(cls[real]), []
    for n in (n for n in args.images if n <= len(train)):
        for m in [len(real)] + [n] * (n < len(real)):
            found = []
            for _ in range(1 if n == len(train) and m == len(real) else SUBSETS):
                chosen = rng.choice(real, m, replace=False)
                reference = everything if m == len(real) else metrics.statistics(cls[chosen])
                fake = metrics.statistics(cls[rng.choice(train, n, replace=False)])
                found.append(metrics.compare(reference, fake))
            rows.append(dict(n=n, m=m, subsets=len(found), **{key: [row[key] for row in found] for key in METRICS}))
    rows.sort(key=lambda row: row["m"] != len(real))
    lines = [[row["n"], row["m"], row["subsets"], *(summary(row[key], key) for key in METRICS)] for row in rows]
    about = f"torch {torch.__version__}. {common.load(args.data / 'data.json')['encoder']['name']}, d = {cls.shape[1]}."
    report.finish(args, "sample_size", about, [report.table(["n", "m", "subsets", *METRICS], lines)], rows)


if __name__ == "__main__":
    main()
