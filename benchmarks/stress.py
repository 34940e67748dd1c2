"""Kill every stage at random moments, repeat its command, and compare all files with those of a run that nobody killed.

Every stage runs through its own command line, on 60 small images in 3 folders. It is killed (SIGKILL) again and again
in one folder, at moments spread over the time it takes once its imports are done. Whatever has its final name must then
be whole. At last it runs to its end: the files must hold what those of the uninterrupted run hold, with no *.tmp left.

    python -m benchmarks.stress                              # 20 kills of every stage, about 25 minutes on two cores
    python -m benchmarks.stress --stages 01 05 --kills 5
"""
import argparse
import json
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

from benchmarks import report

TRAIN = "--data data --batch 4 --steps 6 --save-every 2 --device cpu"
SAMPLES = "data/samples/pairs_w1"
STAGES = {                                                             # in the order in which they need each other
    "01": "01_embed.py --images images --out data --preset digits16 --encoder-px 32 --device cpu",
    "02": "02_filter_pairs.py --data data",
    "03": f"03_train_recon.py {TRAIN}",
    "04": f"04_train_pairs.py {TRAIN}",
    "05": f"05_sample.py --data data --out {SAMPLES} --variations 4 --sample-steps 2 --device cpu",
    "01-samples": f"01_embed.py --data data --images {SAMPLES}/samples.npy --out {SAMPLES} --cls-only --device cpu",
    "06": "06_fewshot_metrics.py --data data --device cpu",
    "07-told": "07_twostage.py told --data data --told kmeans3",
    "07-prior": f"07_twostage.py prior {TRAIN} --width 16",
    "07-y": "07_twostage.py y --data data --samples 8 --rows kmeans3 oracle 2sdm --device cpu",
}
TIMES = {"images_per_s", "ms_image", "ms_row"}                         # measured, so never the same twice


def meaning(value):
    """Values of a .json or .pt file without TIMES, comparable with ==."""
    if isinstance(value, dict):
        return {key: meaning(v) for key, v in value.items() if key not in TIMES}
    if isinstance(value, (list, tuple)):
        return [meaning(v) for v in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def contents(folder):
    """{name: what the file holds} of all files below a folder. Fails on one that is not whole; a *.tmp may be that."""
    found = {}
    for path in (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".tmp"):
        if path.suffix in (".pt", ".partial"):
            value = meaning(torch.load(path, weights_only=True))
        elif path.suffix in (".json", ".jsonl"):
            lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
            value = [meaning(json.loads(line)) for line in lines]
        else:
            value = path.read_bytes()
        if path.suffix == ".npy":
            np.load(path, allow_pickle=False)
        found[str(path.relative_to(folder))] = value
    return found


def different(found, whole):
    """The names of the files of two contents() that are not the same."""
    return [name for name in found.keys() | whole.keys() if name not in found or found[name] != whole.get(name)]


def fresh(start, folder):
    """A new copy of the folder `start`."""
    shutil.rmtree(folder, ignore_errors=True)
    return shutil.copytree(start, folder)


def run(command, folder, limit=None):
    """Run a command for at most `limit` seconds, then kill it: whether it ended, and the seconds."""
    start, words = time.perf_counter(), command.split()
    process = subprocess.Popen([sys.executable, report.ROOT / words[0], *words[1:]], cwd=folder,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        error = process.communicate(timeout=limit)[1].decode(errors="replace")
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return False, time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{command}: exit code {process.returncode}\n{error}")
    return True, time.perf_counter() - start


def stress(command, start, work, kills, rng):
    """Kill a command `kills` times: the names of what is wrong in the end. Leaves the result in `work`."""
    _, imports = run(f"{command.split()[0]} --help", start)
    _, seconds = run(command, fresh(start, work))
    whole, wrong = contents(work), []
    fresh(start, work)
    for _ in range(kills):
        ended, _ = run(command, work, rng.uniform(0.9 * min(imports, seconds), seconds))
        found = contents(work)
        if ended:                                                      # before its kill: compare, and start again
            wrong += different(found, whole)
            fresh(start, work)
    run(command, work)
    return wrong + different(contents(work), whole) + [path.name for path in work.rglob("*.tmp")]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    p.add_argument("--kills", type=int, default=20, help="of each stage")
    p.add_argument("--seed", type=int, default=0, help="of the moments")
    args = p.parse_args()
    rng, failed = random.Random(args.seed), False
    with tempfile.TemporaryDirectory() as folder:
        start, work = Path(folder, "start"), Path(folder, "work")
        for i, image in enumerate(np.random.default_rng(0).integers(0, 256, (60, 20, 24, 3), np.uint8)):
            page = start / "images" / f"page{i // 20}"
            page.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(page / f"{i:02d}.png")
        for stage, command in STAGES.items():
            if stage in args.stages:
                wrong = stress(command, start, work, args.kills, rng)
                print(f"{stage:12}{args.kills:4} kills  {f'DIFFERENT: {wrong}' if wrong else 'identical'}", flush=True)
                failed |= bool(wrong)
                fresh(work, start)
            else:                                                      # needed by the stages behind it
                run(command, start)
    sys.exit(failed)


if __name__ == "__main__":
    main()
