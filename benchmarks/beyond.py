"""beyond/, measured: the similarity dial, guidance that keeps diversity, few steps. Fills docs/beyond.md.

Trains the models that it needs and samples from them, below --runs: SEED/MODEL.pt, SEED/GROUP/SET. Models of
benchmarks/claims.py that are there already are used. DATA is the digits, with pairs (`make demo`). A repeated command
goes on where it stopped.

    python -m benchmarks.beyond run                    # seeds 0 1 2, about an hour a seed on two cores
    python -m benchmarks.beyond run --seeds 0 --groups steps
    python -m benchmarks.beyond write                  # tables and plots of docs/beyond.md, not its text
"""
import argparse
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import spearmanr

from benchmarks import report
from benchmarks.claims import DEMO, make, script

plt.switch_backend("Agg")
DIAL = (1, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
VARIANTS = {"plain": "", "tcfg": "--tcfg", "cads": "--cads 0.25", "interval": "--guidance-interval -2 4"}
STEPS = (4, 8, 16, 32, 64, 128)
SAMPLERS = {"ddpm": "--sampler ddpm", "ddim": "--sampler ddim", "dpm++": "--sampler dpm++", "demo": DEMO}
MODELS = {"dial": "-m beyond.dial", "recon_full": "03_train_recon.py", "pairs_full": "04_train_pairs.py",
          "pairs": "04_train_pairs.py --batch 16 --steps 1600"}        # as in claims.py
# group: {folder: (model, flags of beyond.sample)}
GROUPS = {"dial": {}, "guidance": {}, "steps": {}}
for s in DIAL:
    GROUPS["dial"][f"dial_w1_s{s}"] = "dial", f"{DEMO} --sample-steps 12 --similarity {s}"
for model in ("recon", "pairs"):
    for w in (0, 1, 2):
        GROUPS["dial"][f"{model}_w{w}"] = f"{model}_full", f"{DEMO} --sample-steps 12 --guidance {w}"
for name, flags in VARIANTS.items():
    for w in (0, 0.5, 1, 2, 4) if name == "plain" else (1, 2, 4):
        GROUPS["guidance"][f"pairs_w{w}_{name}"] = "pairs", f"--guidance {w} {flags}"
for name, flags in SAMPLERS.items():
    for n in (*STEPS, 12) if name == "demo" else STEPS:
        GROUPS["steps"][f"pairs_w1_{name}_{n}"] = "pairs", f"{flags} --sample-steps {n}"


def chain(data, runs, seed, model, groups):
    """Train a model, sample all its settings, embed the samples."""
    checkpoint = runs / str(seed) / f"{model}.pt"
    sets = [(runs / str(seed) / group / name, flags) for group in groups
            for name, (of, flags) in GROUPS[group].items() if of == model]
    if sets:
        make(checkpoint, f"{MODELS[model]} --data {data} --out {checkpoint} --seed {seed}")
    for out, flags in sets:
        how = f"--checkpoint {checkpoint} --variations 60 --seed {seed} {flags}"
        make(out / "samples.npy", f"-m beyond.sample --data {data} {how} --out {out}")
        make(out / "cls.npy", f"01_embed.py --data {data} --images {out}/samples.npy --out {out} --cls-only")
        print(f"{out} is done", flush=True)


def score(data, runs, group):
    """06 on all that is there of a group: (rows, the lines of its table)."""
    folders = [path.parent for name in GROUPS[group] for path in sorted(runs.glob(f"[0-9]*/{group}/{name}/cls.npy"))]
    scores = runs / "scores" / group
    script(f"06_fewshot_metrics.py --data {data} --out {scores} --samples {' '.join(map(str, folders))}")
    return json.loads((scores / "metrics.json").read_text()), (scores / "metrics.txt").read_text()


def curves(rows, of, *keys):
    """{curve: (points [n], mean [keys, n], s.d. [keys, n])} over the seeds; of(row) -> (curve, point)."""
    found = {}
    for row in (row for row in rows if "folder" in row):               # not the real images
        curve, point = of(row)
        found.setdefault(curve, {}).setdefault(point, []).append([row[key] for key in keys])
    for curve, points in found.items():
        values = [np.array(points[point]) for point in sorted(points)]
        spread = [v.std(0, ddof=1) if len(v) > 1 else np.zeros(len(keys)) for v in values]
        found[curve] = np.array(sorted(points)), np.array([v.mean(0) for v in values]).T, np.array(spread).T
    return found


def plot_dial(rows):
    """Achieved against requested similarity."""
    figure, axes = plt.subplots(figsize=(5, 4.2), layout="constrained")
    rows = [row for row in rows if row.get("similarity")]
    (asked, mean, spread), = curves(rows, lambda row: (row["model"], row["similarity"][0]), "copy").values()
    axes.errorbar(asked, *mean, *spread, fmt="o-")
    axes.plot([min(asked), 1], [min(asked), 1], ":k", linewidth=0.8)
    axes.set(xlabel="requested similarity", ylabel="achieved: mean cosine to the condition")
    return figure


def plot_frontier(rows):
    """Precision against recall, a curve a model and kind of guidance; at the points w, or the similarity."""
    def of(row):
        return f"{row['model']} {row.get('variant') or ''}", (row.get("similarity") or [row["guidance"]])[0]

    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")
    for name, (points, mean, spread) in curves(rows, of, "recall", "precision").items():
        line = axes.errorbar(*mean, spread[1], spread[0], fmt="o-", elinewidth=0.4, label=name)[0]
        for point, *xy in zip(points, *mean):
            axes.annotate(f"{point:g}", xy, xytext=(4, 4), textcoords="offset points", color=line.get_color())
    axes.set(xlabel="recall", ylabel="precision")
    axes.legend(frameon=False)
    return figure


def plot_steps(rows):
    """FID against steps, and against the time of an image: steps times the fastest step, as other jobs run beside."""
    def of(row):
        return "ddpm as in make demo" if row["time_power"] == 2 else row["variant"] or "ddpm", row["sample_steps"]

    figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)
    for variant, (steps, (fid, time), (spread, _)) in curves(rows, of, "fid", "ms_image").items():
        for axes, x in zip(panels, (steps, steps * (time / steps).min())):
            axes.errorbar(x, fid, spread, fmt="o-", label=variant)
            axes.set_xscale("log", base=2)
    panels[0].set(xlabel="steps", ylabel="FID", xticks=STEPS, xticklabels=STEPS)
    panels[1].set(xlabel="ms an image, one core")
    panels[1].xaxis.set_major_formatter("{x:g}")
    panels[0].legend(frameon=False)
    return figure


PLOTS = {"dial": {"dial": plot_dial, "dial_precision_recall": plot_frontier},
         "guidance": {"guidance_precision_recall": plot_frontier}, "steps": {"steps": plot_steps}}


def write(data, runs, page):
    """Score, plot, and replace the tables between the marks of the page."""
    tables = {}
    for group in (group for group in GROUPS if list(runs.glob(f"[0-9]*/{group}/*/cls.npy"))):
        rows, table = score(data, runs, group)
        if group == "dial":
            dial = [row for row in rows if row.get("similarity")]
            rank = spearmanr([row["similarity"][0] for row in dial], [row["copy"] for row in dial]).statistic
            table += f"\nSpearman of requested and achieved similarity: {rank:.3f} over {len(dial)} sets\n"
        tables[group] = f"```\n{table}```"
        for name, plot in PLOTS[group].items():
            plot(rows).savefig(page.with_name(f"beyond_{name}.png"), dpi=120)
    report.write(page, report.fill(page.read_text(), tables))
    if "dial" in tables:
        seed = min(runs.glob("[0-9]*/dial.pt")).parent
        how = f"{DEMO} --sample-steps 12 --variations {len(DIAL)} --similarity {' '.join(map(str, DIAL))}"
        where = f"--data {data} --checkpoint {seed}/dial.pt --seed {seed.name} --out {seed}/dial_sheet"
        script(f"-m beyond.sample {where} {how}")
        shutil.copy(seed / "dial_sheet" / "sheet.png", page.with_name("beyond_dial_sheet.png"))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", choices=["run", "write"])
    p.add_argument("--data", type=Path, default=Path("runs/digits16"))
    p.add_argument("--runs", type=Path, default=Path("runs/claims"))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    p.add_argument("--jobs", type=int, default=2, help="commands side by side")
    args = p.parse_args()
    data, runs = args.data.resolve(), args.runs.resolve()              # scripts run in the repository
    if args.action == "write":
        return write(data, runs, report.ROOT / "docs" / "beyond.md")
    with ThreadPoolExecutor(args.jobs) as pool:
        done = [pool.submit(chain, data, runs, seed, model, args.groups) for seed in args.seeds for model in MODELS]
        for future in done:
            future.result()


if __name__ == "__main__":
    main()
