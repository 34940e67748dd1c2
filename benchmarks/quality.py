"""What a recipe makes of the same seconds: pair models, scored by 06 and read by the judge of the digits.

Each recipe is one training of 04 on one core. The numbers of steps are such that all recipes took as long as the demo's
on the machine where they were chosen; the table has the seconds. Sixty conditions, six of each digit, 10 samples each,
w = 1, drawn anew with each seed, against the other held-out digits. A repeated command goes on where it stopped.

    python -m benchmarks.quality                                       # seeds 0 1 2; needs the digits of `make demo`
    python -m benchmarks.quality --seeds 0 --recipes demo FiLM
    pip install -r requirements-dev.txt                                # for diffusers
"""
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch

import common
from benchmarks import report
from benchmarks.claims import DEMO, make, sample, script, summary

RECIPES = {                                                            # variant of benchmarks/variants.py, flags of 04
    "demo": ("", ""),
    "FiLM": ("", "--cond film --steps 2950"),
    "more noise": ("noise_size=8", ""),
    "wide": ("channels=32,64,192", "--steps 1600"),
    "wide, batch 16": ("channels=32,64,192", "--batch 16 --lr 1e-3 --steps 2960"),
    "wide, FiLM": ("channels=32,64,192", "--cond film --steps 2220"),
    "wide, FiLM, batch 16": ("channels=32,64,192", "--cond film --batch 16 --lr 1e-3 --steps 3680"),
    "wide, more noise": ("channels=32,64,192;noise_size=8", "--steps 1600"),
    "diffusers": ("unet", "--cond tokens --steps 260"),
}
SAMPLER = f"{DEMO} --sample-steps 12 --per-page 6 --variations 10"
METRICS = ("seconds", "fid", "precision", "recall", "read", "spread")


def chain(data, runs, seed, name):
    """Train a recipe, sample from it, embed the samples, all in the folder that it returns."""
    (variant, flags), where = RECIPES[name], f"--data {data} --seed {seed}"
    start = f"-m benchmarks.variants {variant}" if variant else ""
    out = runs / str(seed) / name.replace(" ", "_")
    make(out / "pairs.pt", f"{start} 04_train_pairs.py {where} --out {out}/pairs.pt {flags}")
    sample(data, out, f"{start} 05_sample.py {where} --draw {seed} --checkpoint {out}/pairs.pt {SAMPLER}")
    return out


def seconds(out):
    """What the training of a folder took, from the speeds in its log."""
    batch = common.load(out / "pairs.pt")["config"]["batch"]
    total, before = 0, 0
    for row in map(json.loads, (out / "pairs.jsonl").read_text().splitlines()):
        total += (row["step"] - before) * batch / row["images_per_s"]
        before = row["step"]
    return total


def main():
    p = report.parser(__doc__)
    p.add_argument("--data", type=Path, default=report.ROOT / "runs" / "digits16", help="folder of 01_embed.py and 02")
    p.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = p.parse_args()
    data, calls = args.data.resolve(), list(product(args.seeds, args.recipes))
    runs = data.parent / "quality"
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda call: chain(data, runs, *call), calls))
    samples = " ".join(map(str, folders))
    script(f"-m examples.digits_judge --data {data} --samples {samples}")
    script(f"06_fewshot_metrics.py --data {data} --out {runs} --samples {samples}")
    scores = {row["folder"]: row for row in common.load(runs / "metrics.json") if "folder" in row}
    read = common.load(data / "judge" / "read.json")
    rows = [dict(recipe=name, seconds=seconds(out)) | scores[str(out)] | read[str(out)]
            for out, (_, name) in zip(folders, calls)]
    lines = []
    for name in args.recipes:
        values = [[row[key] for row in rows if row["recipe"] == name] for key in METRICS]
        lines.append([name, " ".join(RECIPES[name]).strip(), *map(summary, values, METRICS)])
    about = f"torch {torch.__version__}, two trainings at a time."
    report.finish(args, "quality", about, [report.table(["recipe", "change", *METRICS], lines)], rows)


if __name__ == "__main__":
    main()
