"""Kill every stage at random moments, repeat its command, and compare all files with those of a run that nobody killed.

Every stage runs through its own command line, on 60 small images in 3 folders. It is killed (SIGKILL) again and again in one
folder, as an unlucky user would see it, at moments spread over the time it takes once its imports are done; whatever has its
final name must then be whole. At last it runs to its end: the files must be those of the uninterrupted run, with no *.tmp left.
tests/test_survival.py is the short version: it kills before every single change of a file, with a tiny network.

    python benchmarks/stress.py                              # 20 kills of every stage, about 25 minutes on two cores
    python benchmarks/stress.py --stages 01 05 --kills 5
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
TRAIN = "--data data --batch 4 --steps 6 --save-every 2 --sample-steps 2 --device cpu"
SAMPLES = "data/samples/pairs_w1"
STAGES = {                                                             # in the order in which they need each other
    "01": "01_embed.py --images images --out data --preset digits16 --encoder-px 32 --device cpu",
    "02": "02_filter_pairs.py --data data",
    "03": f"03_train_recon.py {TRAIN}",
    "04": f"04_train_pairs.py {TRAIN}",
    "05": f"05_sample.py --data data --out {SAMPLES} --variations 4 --sample-steps 2 --device cpu",
    "01-samples": f"01_embed.py --data data --images {SAMPLES}/samples.npy --out {SAMPLES} --cls-only --device cpu",
    "06": "06_fewshot_metrics.py --data data",
    "07": f"07_twostage.py {TRAIN} --samples 8 --clusters 3 --prior-steps 6 --prior-batch 4 --prior-width 16",
}
TIMES = {"images_per_s", "ms_image", "prior_share"}                    # measured, so never the same twice


def plain(value):
    """A value of a .json or .pt file without its TIMES, comparable with ==."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items() if key not in TIMES}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return (str(value.dtype), tuple(value.shape), value.numpy().tobytes()) if isinstance(value, torch.Tensor) else value


def meaning(path):
    """What a file holds, without its TIMES. Raises if the file is not whole."""
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False).tobytes()
    if path.suffix in (".pt", ".partial"):
        return plain(torch.load(path, weights_only=True))
    if path.suffix == ".jsonl":
        return [plain(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        return plain(json.loads(path.read_text()))
    if path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
    return path.read_bytes()


def contents(folder):
    """{name: bytes} of the files below a folder, but for *.tmp."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.suffix != ".tmp"}


def torn(folder, *good):
    """The files of a folder that are not whole; what is as in one of the `good` contents() need not be read."""
    found = []
    for name, data in contents(folder).items():
        try:
            if all(data != known.get(name) for known in good):
                meaning(folder / name)
        except Exception as e:  # whatever a reader raises
            found.append(f"{name} ({type(e).__name__}: {e})")
    return found


def different(folder, other):
    """The names of the files that two folders do not share, or whose meaning() differs; and every *.tmp in the first."""
    a, b = contents(folder), contents(other)
    changed = [name for name in a.keys() & b.keys() if a[name] != b[name] and meaning(folder / name) != meaning(other / name)]
    return sorted([*changed, *(a.keys() ^ b.keys()), *(str(path.relative_to(folder)) for path in folder.rglob("*.tmp"))])


def fresh(start, folder):
    """A new copy of the folder `start`."""
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(start, folder)


def launch(command, folder):
    script, *flags = command.split()
    return subprocess.Popen([sys.executable, ROOT / script, *flags], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def complete(command, folder):
    """Run a command to its end: the seconds it took. Exits if it fails."""
    start, process = time.perf_counter(), launch(command, folder)
    output = process.communicate()[1].decode(errors="replace")
    if process.returncode:
        sys.exit(f"{command}: exit code {process.returncode}\n{output}")
    return time.perf_counter() - start


def stress(command, start, work, whole, kills, rng):
    """Kill a command `kills` times: (seconds of the uninterrupted run, runs that were quicker than their kill, what is wrong)."""
    imports = complete(f"{command.split()[0]} --help", start)
    seconds, ended, wrong = complete(command, fresh(start, whole)), 0, []
    quickest = seconds
    before, after = contents(start), contents(whole)
    fresh(start, work)
    while kills:
        begin, process = time.perf_counter(), launch(command, work)
        try:
            process.communicate(timeout=rng.uniform(0.9 * min(imports, quickest), quickest))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills -= 1
            wrong += [f"torn: {name}" for name in torn(work, before, after) if ".jsonl" not in name]     # a log grows in place
            continue
        ended, quickest = ended + 1, min(quickest, time.perf_counter() - begin)
        wrong += different(work, whole)                                # it ended before its kill: start again
        fresh(start, work)
    complete(command, work)
    return seconds, ended, wrong + different(work, whole)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    p.add_argument("--kills", type=int, default=20, help="of each stage")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    args = p.parse_args()
    rng, failed = random.Random(args.seed), False
    with tempfile.TemporaryDirectory() as folder:
        start, work, whole = (Path(folder) / name for name in ("start", "work", "whole"))
        pixels = np.random.default_rng(0).integers(0, 256, (60, 20, 24, 3), np.uint8)
        for i, image in enumerate(pixels):
            page = start / "images" / f"page{i // 20}"
            page.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(page / f"{i:02d}.png")
        print(f"{'stage':12}{'seconds':>8}{'kills':>7}{'too late':>10}  identical")
        for stage, command in STAGES.items():
            if stage in args.stages:
                seconds, ended, wrong = stress(command, start, work, whole, args.kills, rng)
                verdict = f"NO: {sorted(set(wrong))}" if wrong else "yes"
                print(f"{stage:12}{seconds:8.1f}{args.kills:7}{ended:10}  {verdict}", flush=True)
                failed |= bool(wrong)
                fresh(whole, start)
            elif stage != "07":                                        # needed by the stages behind it
                complete(command, start)
    sys.exit(failed)


if __name__ == "__main__":
    main()
