"""Beyond the papers, measured: the similarity dial, guidance that keeps diversity, few steps. Fills docs/beyond.md.

Runs the numbered scripts on the digits and models of claims.py (benchmarks/claims.py run --models pairs recon_full pairs_full,
first), below the same folder: SEED/GROUP/SET. The dial is trained as in `make demo`, SEED/dial.pt. A repeated command goes on
where it stopped.

    python benchmarks/beyond.py run                        # seeds 0 1 2, 45 minutes a seed on two cores
    python benchmarks/beyond.py run --seeds 0 --groups steps
    python benchmarks/beyond.py write                      # docs/beyond.md from what is there
"""
import json
import shutil

import claims
import matplotlib
import numpy as np
import report
from scipy.stats import spearmanr

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DIAL = (1, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
VARIANTS = {"plain": "", "tcfg": "--tcfg", "cads": "--cads 0.25", "interval": "--guidance-interval -2 4"}
STEPS = (4, 8, 16, 32, 64, 128)
SAMPLERS = {"ddpm": "--sampler ddpm", "ddim": "--sampler ddim", "dpm++": "--sampler dpm++", "demo": claims.DEMO}
# group: {folder: (checkpoint below SEED, flags of 05_sample.py)}
GROUPS = {
    "dial": {f"dial_w1_s{s}": ("dial", f"{claims.DEMO} --sample-steps 12 --similarity {s}") for s in DIAL} | {
        f"{m}_w{w}": (f"{m}_full", f"{claims.DEMO} --sample-steps 12 --guidance {w}")
        for m in ("recon", "pairs") for w in (0, 1, 2)},
    "guidance": {f"pairs_w{w}_{name}": ("pairs", f"--guidance {w} {flags}")
                 for name, flags in VARIANTS.items() for w in ((0, 0.5, 1, 2, 4) if name == "plain" else (1, 2, 4))},
    "steps": {f"pairs_w1_{sampler}_{n}": ("pairs", f"{flags} --sample-steps {n}")
              for sampler, flags in SAMPLERS.items() for n in STEPS + (12,) * (sampler == "demo")},
}


def train(runs, seed):
    """SEED/dial.pt, at the preset's own budget, as in `make demo`."""
    checkpoint = runs / str(seed) / "dial.pt"
    if not checkpoint.exists():
        claims.script(f"04_train_pairs.py --dial --data {runs / 'digits'} --out {checkpoint} --seed {seed}")


def sample(runs, seed, group, name):
    """Samples of one setting, embedded."""
    model, flags = GROUPS[group][name]
    samples = runs / str(seed) / group / name
    if not (samples / "samples.npy").exists():
        claims.script(f"05_sample.py --data {runs / 'digits'} --checkpoint {runs / str(seed) / model}.pt --seed {seed} {flags} "
                      f"--out {samples}")
    if not (samples / "data.json").exists():
        claims.script(f"01_embed.py --data {runs / 'digits'} --images {samples}/samples.npy --out {samples} --cls-only")
    print(f"seed {seed}: {name} is done", flush=True)


def score(runs, group):
    """06 on all that is there of a group: (rows, the lines of its table)."""
    folders = [path.parent for name in GROUPS[group] for path in sorted(runs.glob(f"[0-9]*/{group}/{name}/data.json"))]
    scores = runs / "scores" / group
    claims.script(f"06_fewshot_metrics.py --data {runs / 'digits'} --out {scores} --samples {' '.join(map(str, folders))}")
    return json.loads((scores / "metrics.json").read_text()), (scores / "metrics.txt").read_text()


def curves(rows, of, *keys):
    """{curve: (points [n], mean [keys, n], s.d. [keys, n])} over the seeds of the sets in rows; of(row) -> (curve, point)."""
    found = {}
    for row in (row for row in rows if "folder" in row):               # not the real images
        curve, point = of(row)
        found.setdefault(curve, {}).setdefault(point, []).append([row[key] for key in keys])
    for curve, points in found.items():
        values = [np.array(points[point]) for point in sorted(points)]
        spread = [v.std(0, ddof=1) if len(v) > 1 else np.zeros(len(keys)) for v in values]
        found[curve] = np.array(sorted(points)), np.array([v.mean(0) for v in values]).T, np.array(spread).T
    return found


def plot_dial(rows, path):
    """Achieved against requested similarity."""
    figure, axes = plt.subplots(figsize=(5, 4.2), layout="constrained")
    rows = [row for row in rows if row.get("similarity")]
    (asked, mean, spread), = curves(rows, lambda row: (row["model"], row["similarity"][0]), "copy").values()
    axes.errorbar(asked, *mean, *spread, fmt="o-")
    axes.plot([min(asked), 1], [min(asked), 1], ":k", linewidth=0.8)
    axes.set(xlabel="requested similarity", ylabel="achieved: mean cosine to the condition")
    figure.savefig(path, dpi=120)


def plot_frontier(rows, path):
    """Precision against recall, a curve a model and kind of guidance, w or similarity at the points: 06's plot, from close by."""
    figure, axes = plt.subplots(figsize=(7.5, 5), layout="constrained")

    def of(row):
        return f"{row['model']} {row.get('variant') or ''}", (row.get("similarity") or [row["guidance"]])[0]

    found = curves(rows, of, "recall", "precision")
    for name, (points, mean, spread) in found.items():
        line = axes.errorbar(*mean, spread[1], spread[0], fmt="o-", elinewidth=0.4, label=name)[0]
        for point, *xy in zip(points, *mean):
            axes.annotate(f"{point:g}", xy, xytext=(4, 4), textcoords="offset points", fontsize=8, color=line.get_color())
    axes.set(xlabel="recall", ylabel="precision")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def plot_steps(rows, path):
    """FID against steps, and against the time of an image: steps times the fastest step, since other jobs run beside it."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained", sharey=True)

    def of(row):
        return "ddpm as in make demo" if row.get("time_power") else row.get("variant") or "ddpm", row["sample_steps"]

    for variant, (steps, (fid, time), (spread, _)) in curves(rows, of, "fid", "ms_image").items():
        for axes, x in zip(panels, (steps, steps * (time / steps).min())):
            axes.errorbar(x, fid, spread, fmt="o-", label=variant)
            axes.set_xscale("log", base=2)
    panels[0].set(xlabel="steps", ylabel="FID", xticks=STEPS, xticklabels=STEPS)
    panels[1].set(xlabel="ms an image, one core")
    panels[1].xaxis.set_major_formatter("{x:g}")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def write(runs, page):
    """Score, plot, and replace the tables between the marks of the page."""
    rows, tables, folder = {}, {}, page.parent
    for group in GROUPS:
        if not list(runs.glob(f"[0-9]*/{group}/*/data.json")):
            continue
        rows[group], table = score(runs, group)
        if group == "dial":
            asked, got = zip(*((row["similarity"][0], row["copy"]) for row in rows[group] if row.get("similarity")))
            rank = spearmanr(asked, got).statistic
            table += f"\nSpearman of requested and achieved similarity: {rank:.3f} over {len(got)} sets\n"
        tables[group] = f"```\n{table}```"
    report.write(page, report.fill(page.read_text(), tables))
    for group in rows.keys() & {"dial", "guidance"}:
        plot_frontier(rows[group], folder / f"beyond_{group}_precision_recall.png")
    if "dial" in rows:
        plot_dial(rows["dial"], folder / "beyond_dial.png")
        seed = min(runs.glob("[0-9]*/dial.pt")).parent
        sheet = seed / "dial_sheet"
        if not (sheet / "samples.npy").exists():
            claims.script(f"05_sample.py --data {runs / 'digits'} --checkpoint {seed}/dial.pt --out {sheet} "
                          f"--seed {seed.name} {claims.DEMO} --sample-steps 12 --variations {len(DIAL)} "
                          f"--similarity {' '.join(map(str, DIAL))}")
        shutil.copy(sheet / "sheet.png", folder / "beyond_dial_sheet.png")
    if "steps" in rows:
        plot_steps(rows["steps"], folder / "beyond_steps.png")


def main():
    p = claims.parser(__doc__)
    p.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    p.add_argument("--steps", type=int, default=128, help="the most in the group `steps`")
    args = p.parse_args()
    if args.action == "write":
        return write(args.runs, claims.ROOT / "docs" / "beyond.md")
    wanted = [(seed, group, name) for seed in args.seeds for group in args.groups for name in GROUPS[group]
              if group != "steps" or int(name.rsplit("_", 1)[1]) <= args.steps]
    trainings = [(train, args.runs, seed) for seed in args.seeds if "dial" in args.groups]
    for calls in (trainings + [(sample, args.runs, *what) for what in wanted if what[1] != "dial"],    # models of claims.py
                  [(sample, args.runs, *what) for what in wanted if what[1] == "dial"]):
        claims.side_by_side(args.jobs, calls)


if __name__ == "__main__":
    main()
