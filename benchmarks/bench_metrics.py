"""Time and peak memory of FID, precision and recall: 06_fewshot_metrics.py, prdc and torch-fidelity side by side.

Two sets of n features of d numbers, float32, low-rank and skewed. Every row is of a process of its own, one after the
other. seconds, CPU s: the best of up to three runs within ten seconds, on the clock and of processor time (on a busy
machine, compare these). peak: the most memory the process ever held. added: how much of that came after imports and
features.

    OMP_NUM_THREADS=1 python -m benchmarks.bench_metrics                   # 100, 1,000 and 10,000 images
    python -m benchmarks.bench_metrics --images 50000 --features 2048 --packages 06 --out bench.json
    pip install -r requirements-dev.txt                                    # the others; rows without them say so
"""
import argparse
import itertools
import json
import resource
import time

from benchmarks import report

METRICS = {"fid": ("06", "torch-fidelity"), "precision+recall": ("06", "prdc", "torch-fidelity")}
PACKAGES = METRICS["precision+recall"]


def peak():
    """The most memory this process ever held, MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10


def of_06(x, y):
    """{metric: () -> value} of samples x against real images y, arrays [n, d], by 06's functions in float64."""
    import torch
    m = report.script("06_fewshot_metrics")
    fake, real = (torch.tensor(a, dtype=torch.float64) for a in (x, y))
    return {"fid": lambda: m.frechet_distance(m.moments(fake), m.moments(real)),
            "precision+recall": lambda: m.precision_recall(real, fake, m.radius(real), m.radius(fake))}


def of_prdc(x, y):
    from prdc import compute_prdc
    return {"precision+recall": lambda: [compute_prdc(y, x, nearest_k=3)[key] for key in ("precision", "recall")]}


def of_torch_fidelity(x, y):
    import torch
    from torch_fidelity import metric_fid, metric_prc
    fake, real = torch.from_numpy(x), torch.from_numpy(y)

    def fid():
        moments = map(metric_fid.fid_features_to_statistics, (fake, real))
        return metric_fid.fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]

    def precision_recall():
        found = metric_prc.prc_features_to_metric(fake, real, prc_neighborhood=3, verbose=False)
        return found["precision"], found["recall"]
    return {"fid": fid, "precision+recall": precision_recall}


def measure(package, metric, n, d):
    """In a process of its own: one row."""
    import numpy as np
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(64, d)).astype(np.float32) / 4
    x, y = (np.maximum(scale * rng.standard_normal((n, 64), np.float32) @ basis
                       + rng.standard_normal((n, d), np.float32) / 2 + 1, 0) for scale in (1.1, 1))
    make = {"06": of_06, "prdc": of_prdc, "torch-fidelity": of_torch_fidelity}[package]
    try:
        call = make(x, y)[metric]
    except (ImportError, RuntimeError) as e:                           # RuntimeError: torchvision of another torch
        return dict(error=f"not installed ({type(e).__name__}: {str(e).splitlines()[0]})")
    before, clock, cpu = peak(), [], []
    while not clock or len(clock) < 3 and sum(clock) < 10:
        start, cpu_start = time.perf_counter(), time.process_time()
        value = call()
        clock.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    return dict(seconds=min(clock), cpu_seconds=min(cpu), peak_mib=peak(), added_mib=peak() - before,
                value=np.atleast_1d(value).tolist())


def main():
    p = report.parser(__doc__)
    p.add_argument("--images", type=int, nargs="+", default=[100, 1000, 10000], metavar="N", help="in each set")
    p.add_argument("--features", type=int, nargs="+", default=[1280, 2048], metavar="D")
    p.add_argument("--packages", nargs="+", choices=PACKAGES, default=PACKAGES)
    p.add_argument("--measure", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.measure:
        return print("\n" + json.dumps(measure(*json.loads(args.measure))))
    rows, ratios, lines = [], [], []
    for n, d, metric in itertools.product(args.images, args.features, METRICS):
        ours = None
        for package in (package for package in METRICS[metric] if package in args.packages):
            what = json.dumps([package, metric, n, d])
            row = json.loads(report.run("-m", "benchmarks.bench_metrics", "--measure", what))
            rows.append(dict(n=n, d=d, metric=metric, package=package, **row))
            cells = [row.get("error")]
            if "error" not in row:
                cells = [f"{row['seconds']:.3f}", f"{row['cpu_seconds']:.3f}", f"{row['peak_mib']:.0f}",
                         f"{row['added_mib']:.0f}", ", ".join(f"{v:.6g}" for v in row["value"])]
                if package == "06":
                    ours = row
                elif ours:
                    ratio = row["cpu_seconds"] / ours["cpu_seconds"]
                    ratios.append([f"{metric}, {n:,} images, d = {d}, 06 : {package}", f"{ratio:.3g}x"])
            lines.append([f"{n:,}", d, metric, package, *cells])
            print(*lines[-1], sep="   ", flush=True)
    header = ["n", "d", "metric", "package", "seconds", "CPU s", "peak MiB", "added MiB", "value"]
    tables = [report.table(["speed in CPU time", "ratio"], ratios), report.table(header, lines)]
    report.finish(args, "bench_metrics", "float32 features.", tables, rows)


if __name__ == "__main__":
    main()
