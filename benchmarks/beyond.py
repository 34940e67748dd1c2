"""Beyond the papers, measured: the similarity dial, guidance that keeps diversity, few steps. Fills docs/beyond.md.

Runs the numbered scripts on the digits and models of claims.py (benchmarks/claims.py run --models recon pairs, first), below the
same folder: SEED/dial.pt, SEED/GROUP/SET. A repeated command goes on where it stopped.

    python benchmarks/beyond.py run                        # seeds 0 1 2, an hour a seed on two cores
    python benchmarks/beyond.py run --seeds 0 --groups steps
    python benchmarks/beyond.py write                      # docs/beyond.md from what is there
"""
import json
import sys
from concurrent.futures import ThreadPoolExecutor

import claims
import numpy as np
from scipy.stats import spearmanr

DIAL = (1, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6)
VARIANTS = {"plain": "", "tcfg": "--tcfg", "cads": "--cads 0.25", "interval": "--guidance-interval -2 4"}
STEPS = (4, 8, 16, 32, 64, 128)
# group: {folder: (model, flags of 05_sample.py)}
GROUPS = {
    "dial": {f"dial_w1_s{s}": ("dial", f"--similarity {s}") for s in DIAL},
    "guidance": {f"pairs_w{w}_{name}": ("pairs", f"--guidance {w} {flags}")
                 for name, flags in VARIANTS.items() for w in ((0.5,) if name == "plain" else (1, 2, 4))},
    "steps": {f"pairs_w1_{sampler}_{n}": ("pairs", f"--sampler {sampler} --sample-steps {n}")
              for n in STEPS for sampler in ("ddpm", "ddim", "dpm++")},
}
BESIDE = {"dial": ("recon_w0", "recon_w1", "recon_w2", "pairs_w0", "pairs_w1", "pairs_w2"),     # of claims.py, in the same table
          "guidance": ("pairs_w0", "pairs_w1", "pairs_w2", "pairs_w4"), "steps": ()}


def train_dial(runs, seed):
    """SEED/dial.pt, at the budget of the models of claims.py."""
    if not (runs / str(seed) / "dial.pt").exists():
        claims.script(f"04_train_pairs.py --dial --data {runs / 'digits'} --out {runs / str(seed) / 'dial.pt'} --seed {seed} "
                      f"--batch {claims.BATCH} --steps {claims.STEPS}")


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
    """06 on all that is there of a group and what stands beside it: (rows, the lines of its table)."""
    wanted = [f"{group}/{name}" for name in GROUPS[group]] + [f"digits/{name}" for name in BESIDE[group]]
    folders = [path.parent for name in wanted for path in sorted(runs.glob(f"[0-9]*/{name}/data.json"))]
    scores = runs / "scores" / group
    claims.script(f"06_fewshot_metrics.py --data {runs / 'digits'} --out {scores} --samples {' '.join(map(str, folders))}")
    return json.loads((scores / "metrics.json").read_text()), (scores / "metrics.txt").read_text()


def over_seeds(rows, key):
    """{setting: [values of `key` over seeds]} of rows, setting: (variant, similarity or steps)."""
    found = {}
    for row in rows:
        point = row["similarity"][0] if row.get("similarity") else row.get("sample_steps")
        found.setdefault((row.get("variant") or "ddpm", point), []).append(row[key])
    return found


def plots(rows, folder):
    """beyond_dial.png: achieved against requested similarity; beyond_steps.png: FID against steps."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    for group, key, what in (("dial", "copy", ("requested similarity", "achieved: mean cosine to the condition")),
                             ("steps", "fid", ("steps", "FID"))):
        own = [row for row in rows.get(group, []) if row.get("similarity") or group == "steps" and "folder" in row]
        if not own:
            continue
        figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
        found = over_seeds(own, key)
        for variant in dict.fromkeys(variant for variant, _ in found):
            points = sorted(point for v, point in found if v == variant)
            values = [found[variant, point] for point in points]
            bars = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
            axes.errorbar(points, [np.mean(v) for v in values], bars, fmt="o-", label=variant)
        axes.set(xlabel=what[0], ylabel=what[1])
        if group == "steps":
            axes.set_xscale("log", base=2)
            axes.legend(frameon=False)
        else:
            axes.plot([min(DIAL), 1], [min(DIAL), 1], ":k", linewidth=0.8)
        figure.savefig(folder / f"beyond_{group}.png", dpi=120)
        plt.close(figure)


def write(runs, page):
    """Score, plot, and replace the tables between the marks of the page."""
    rows, text = {}, page.read_text()
    for group in GROUPS:
        if not list(runs.glob(f"[0-9]*/{group}/*/data.json")):
            continue
        rows[group], table = score(runs, group)
        before, start, rest = text.partition(f"<!-- {group} -->\n")
        if not start or "<!-- end -->" not in rest:
            sys.exit(f"{page} has no place for {group}; mark it by lines <!-- {group} --> and <!-- end -->")
        if group == "dial":
            asked, got = zip(*((row["similarity"][0], row["copy"]) for row in rows[group] if row.get("similarity")))
            rank = spearmanr(asked, got).statistic
            table += f"\nSpearman of requested and achieved similarity: {rank:.3f} over {len(got)} sets\n"
        text = f"{before}{start}```\n{table}```\n{rest[rest.index('<!-- end -->'):]}"
    page.write_text(text)
    plots(rows, page.parent)
    for group in rows.keys() & {"dial", "guidance"}:
        (page.parent / f"beyond_{group}_precision_recall.png").write_bytes((runs / "scores" / group / "metrics.png").read_bytes())
    print(f"wrote {page}")


def main():
    p = claims.parser(__doc__)
    p.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    p.add_argument("--steps", type=int, default=128, help="most steps in the group `steps`")
    args = p.parse_args()
    if args.action == "write":
        return write(args.runs, claims.ROOT / "docs" / "beyond.md")
    wanted = [(seed, group, name) for seed in args.seeds for group in args.groups for name in GROUPS[group]
              if group != "steps" or int(name.rsplit("_", 1)[1]) <= args.steps]
    with ThreadPoolExecutor(args.jobs) as pool:
        for ready in (False, True):                                    # the dials, and what needs none; then what does
            tasks = [pool.submit(train_dial, args.runs, seed) for seed in args.seeds if "dial" in args.groups and not ready]
            for task in tasks + [pool.submit(sample, args.runs, *what) for what in wanted if (what[1] == "dial") == ready]:
                task.result()


if __name__ == "__main__":
    main()
