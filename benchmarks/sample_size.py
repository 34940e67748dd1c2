"""What the number of images does to FID, KID, precision and recall: real images against real images, over n, by 06's functions.

n random training images stand for samples of a perfect model. They are compared with all unseen images, as 06 does, and with n
random ones of them. Mean +- standard deviation over random subsets; a set that is all there is has no deviation. A perfect metric
would be the same in every row. Reads a folder of 01_embed.py.

    python benchmarks/sample_size.py --data runs/digits16
"""
import importlib
import sys
from pathlib import Path

import numpy as np
import torch

import report

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import system  # noqa: E402

metrics = importlib.import_module("06_fewshot_metrics")
METRICS = {"fid": ".1f", "kid": ".4f", "precision": ".3f", "recall": ".3f"}


def show(values, spec):
    """Mean +- standard deviation; the mean alone of one value."""
    spread = f" ± {np.std(values, ddof=1):{spec}}" if len(values) > 1 else ""
    return f"{np.mean(values):{spec}}{spread}"


def main():
    p = report.parser(__doc__)
    p.add_argument("--data", type=Path, default=Path("runs/digits16"), help="folder of 01_embed.py")
    p.add_argument("--images", type=int, nargs="+", default=[50, 100, 200, 400, 600, 990, 2000, 4000], metavar="N")
    p.add_argument("--repeats", type=int, default=10, help="random subsets")
    p.add_argument("--seed", type=int, default=0)
    args = report.parse(p, "sample_size")
    if min(args.images) <= metrics.NEIGHBOURS or args.repeats < 1:
        p.error(f"--images above {metrics.NEIGHBOURS}, --repeats above 0")
    data = system.Data(args.data)
    sets, train = metrics.references(data, data.conditions())
    if "unseen" not in sets or min(len(train), len(sets["unseen"])) < max(min(args.images), metrics.NEIGHBOURS + 1):
        system.die(f"{args.data} holds out too few images to compare its training images with")
    rng, real = np.random.default_rng(args.seed), sets["unseen"]
    everything, rows = metrics.statistics(data.cls[real]), []
    for n in (n for n in args.images if n <= len(train)):
        for m in [len(real)] + [n] * (n < len(real)):
            found = []
            for _ in range(args.repeats if min(n / len(train), m / len(real)) < 1 else 1):
                reference = everything if m == len(real) else metrics.statistics(data.cls[rng.choice(real, m, replace=False)])
                fake = metrics.statistics(data.cls[rng.choice(train, n, replace=False)])
                found.append(metrics.compare(reference, fake))
            rows.append(dict(n=n, m=m, **{key: [row[key] for row in found] for key in METRICS}))
            print(n, m, *(show(rows[-1][key], spec) for key, spec in METRICS.items()), sep="   ", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: row["m"] != len(real))
    lines = [[row["n"], row["m"], len(row["fid"]), *(show(row[key], spec) for key, spec in METRICS.items())] for row in rows]
    about = report.machine(torch=torch.__version__, threads=torch.get_num_threads())
    about += f". {metrics.encoder(args.data).get('name')}, d = {data.cls.shape[1]}."
    header = ["n", "m", "subsets", "FID", "KID", "precision", "recall"]
    report.finish(args, "sample_size", about, [report.table(header, lines)], rows)


if __name__ == "__main__":
    main()
