"""Time and peak memory of FID, KID, and precision and recall: 06_fewshot_metrics.py, prdc and torch-fidelity side by side.

Two sets of n features of d numbers, float32, low-rank and skewed. Every figure is of a process of its own, one after the other.
seconds, cpu s: the best of up to three runs within ten seconds, on the clock and of processor time (on a busy machine, compare
these). peak: the most memory the process ever held. added: how much of that came after imports and features. torch-fidelity's
KID gets one subset of all n, so that all compute the same value.

    OMP_NUM_THREADS=1 python benchmarks/bench_metrics.py                           # 100, 1,000 and 10,000 images
    python benchmarks/bench_metrics.py --images 50000 --features 2048 --packages 06 --out bench.json
    pip install -r requirements-dev.txt                                            # the other packages; rows without them say so
"""
import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parents[1]
METRICS = {"fid": ("06", "torch-fidelity"), "kid": ("06", "torch-fidelity"), "precision+recall": ("06", "prdc", "torch-fidelity")}
PACKAGES = METRICS["precision+recall"]


def peak():
    """The most memory this process ever held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def function(package, metric, x, y):
    """() -> a metric of samples x against real images y, arrays [n, d]. Raises ImportError if the package is not there."""
    import torch
    fake, real = torch.from_numpy(x), torch.from_numpy(y)
    if package == "06":
        import importlib
        sys.path.insert(0, str(ROOT))
        m = importlib.import_module("06_fewshot_metrics")
        return {"fid": lambda: m.frechet_distance(m.moments(fake), m.moments(real)),
                "kid": lambda: m.kernel_mean(fake) + m.kernel_mean(real) - 2 * m.kernel_mean(fake, real),
                "precision+recall": lambda: m.precision_recall(real, fake, m.squared_reach(real), m.squared_reach(fake))}[metric]
    if package == "prdc":
        from prdc import compute_prdc
        return lambda: tuple(compute_prdc(y, x, nearest_k=3)[key] for key in ("precision", "recall"))
    from torch_fidelity import metric_fid, metric_kid, metric_prc

    def precision_recall():
        found = metric_prc.prc_features_to_metric(fake, real, prc_neighborhood=3, verbose=False)
        return found["precision"], found["recall"]

    def fid():
        moments = map(metric_fid.fid_features_to_statistics, (fake, real))
        return metric_fid.fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]

    def kid():
        found = metric_kid.kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=len(fake), verbose=False)
        return found["kernel_inception_distance_mean"]
    return {"fid": fid, "kid": kid, "precision+recall": precision_recall}[metric]


def measure(package, metric, n, d):
    """In its own process: one row as JSON on the last line of standard output."""
    import numpy as np
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(64, d)).astype(np.float32) / 4
    x, y = (np.maximum(scale * rng.standard_normal((n, 64), np.float32) @ basis
                       + rng.standard_normal((n, d), np.float32) / 2 + 1, 0) for scale in (1.1, 1))
    try:
        run = function(package, metric, x, y)
    except (ImportError, RuntimeError) as e:                           # RuntimeError: torchvision of another torch
        print(json.dumps(dict(error=f"not installed ({type(e).__name__}: {str(e).splitlines()[0]})")))
        return
    before, seconds, cpu_seconds = peak(), [], []
    while not seconds or len(seconds) < 3 and sum(seconds) < 10:
        start, cpu_start = time.perf_counter(), time.process_time()
        value = run()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    import torch
    print("\n" + json.dumps(dict(seconds=min(seconds), cpu_seconds=min(cpu_seconds), peak_mib=peak(), added_mib=peak() - before,
                                 threads=torch.get_num_threads(), value=np.atleast_1d(value).tolist())))


def main():
    p = report.parser(__doc__)
    p.add_argument("--images", type=int, nargs="+", default=[100, 1000, 10000], metavar="N", help="in each of the two sets")
    p.add_argument("--features", type=int, nargs="+", default=[1280, 2048], metavar="D")
    p.add_argument("--metrics", nargs="+", choices=METRICS, default=list(METRICS))
    p.add_argument("--packages", nargs="+", choices=PACKAGES, default=PACKAGES)
    p.add_argument("--timeout", type=float, default=1800, help="seconds for a process")
    p.add_argument("--measure", help=argparse.SUPPRESS)
    args = report.parse(p, "bench_metrics")
    if args.measure:
        return measure(*json.loads(args.measure))
    rows, lines = [], []
    for n, d, metric in itertools.product(args.images, args.features, args.metrics):
        ours = None
        for package in (package for package in METRICS[metric] if package in args.packages):
            # This process stays small: on Linux the peak of a child is never below what its parent held when it was started.
            command = [sys.executable, __file__, "--measure", json.dumps([package, metric, n, d])]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
                output = (done.stderr if done.returncode else done.stdout).splitlines() or [f"exit code {done.returncode}"]
                found = dict(error=output[-1]) if done.returncode else json.loads(output[-1])
            except subprocess.TimeoutExpired:
                found = dict(error=f"took more than {args.timeout:g} s")
            rows.append(dict(n=n, d=d, metric=metric, package=package, **found))
            if "error" in found:
                cells = [found["error"]]
            else:
                ours = found if package == "06" else ours
                cells = [f"{found[key]:.3f}" + (f" ({found[key] / ours[key]:.1f}x)" if ours and package != "06" else "")
                         for key in ("seconds", "cpu_seconds")]
                value = ", ".join(f"{v:.6g}" for v in found["value"])
                cells += [f"{found['peak_mib']:.0f}", f"{found['added_mib']:.0f}", value]
            lines.append([f"{n:,}", d, metric, package, *cells])
            print(*lines[-1], sep="   ", file=sys.stderr, flush=True)

    by = {(row["n"], row["d"], row["metric"], row["package"]): row for row in rows if "error" not in row}

    def ratio(metric, other, n, d):
        ours, theirs = by.get((n, d, metric, "06")), by.get((n, d, metric, other))
        return theirs["cpu_seconds"] / ours["cpu_seconds"] if ours and theirs else None

    ratios = []
    for n, d in itertools.product(args.images, args.features):
        if "fid" in args.metrics and n < d:
            what = f"FID, {n:,} images, d = {d}: CPU time, torch-fidelity : 06"
            ratios.append((what, ratio("fid", "torch-fidelity", n, d), 20, "x"))
        if "precision+recall" in args.metrics and n == 10_000:
            what, ours = f"precision and recall, {n:,} images, d = {d}: ", by.get((n, d, "precision+recall", "06"))
            ratios.append((what + "CPU time, prdc : 06", ratio("precision+recall", "prdc", n, d), 5, "x"))
            ratios.append((what + "1 GiB : peak memory of 06", ours and 1024 / ours["peak_mib"], 1, "x"))
    threads = {row["threads"] for row in rows if "threads" in row}
    header = ["n", "d", "metric", "package", "seconds (of 06)", "CPU s (of 06)", "peak MiB", "added MiB", "value"]
    about = report.machine(threads=" and ".join(map(str, threads))) + "."
    report.finish(args, "bench_metrics", about, [report.targets(ratios)] * bool(ratios) + [report.table(header, lines)], rows)


if __name__ == "__main__":
    main()
