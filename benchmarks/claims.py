"""The papers' claims, measured again: runs the numbered scripts over seeds, then fills in docs/claims.md.

Everything goes through the scripts' command lines and files, below runs/claims: data folders, SEED/MODEL.pt,
SEED/SET/MODEL_wW. A repeated command goes on where it stopped. A seed takes 40 to 90 minutes on two cores.

The page itself says what is compared. A row of its tables names a set of samples, a metric, and two folders of samples
(or one and a number, or `real`, the row of real images of 06). `write` fills in values, verdicts and commands. It keeps
the scores in docs/reference/claims.json, so models can be measured one by one. A row never measured stays as it is.

    pip install -r requirements-dev.txt                              # Lite2's weights, scikit-image's photographs
    python -m benchmarks.claims run                                  # all models, seeds 0 1 2
    python -m benchmarks.claims run --seeds 0 --models recon pairs   # some of it
    python -m benchmarks.claims write                                # docs/claims.md from what is there
"""
import argparse
import json
import os
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
from benchmarks import report

BUDGET = "--steps 1600 --batch 16"                                     # of most models; less than `make demo`
DEMO = "--time-power 2 --interpolation 0"                              # the sampler of `make demo`, with 12 steps
ARRAYS = ["images.npy", "pages.npy", "split.npy", "names.npy", "cls.npy", "tokens.npy", "data.json"]
PAIRS, RECON = "04_train_pairs.py", "03_train_recon.py"
# name: (data folder, script, further flags). The other flags are the preset's, the same for all.
MODELS = {
    "recon": ("digits", RECON, BUDGET),
    "pairs": ("digits", PAIRS, BUDGET),
    "recon_full": ("digits", RECON, ""),                               # trained and sampled as in `make demo`
    "pairs_full": ("digits", PAIRS, ""),
    "film": ("digits", PAIRS, f"{BUDGET} --cond film"),
    "tokens": ("digits", PAIRS, f"{BUDGET} --cond tokens"),
    "film_full": ("digits", PAIRS, "--cond film"),
    "tokens_full": ("digits", PAIRS, "--cond tokens"),
    "unfiltered": ("unfiltered", PAIRS, BUDGET),
    "low_only": ("low_only", PAIRS, BUDGET),
    "small": ("digits", f"-m benchmarks.variants channels=16,32,64 {PAIRS}", BUDGET),
    "lite2": ("lite2", PAIRS, BUDGET),
    "random": ("random", PAIRS, BUDGET),
    "pages": ("pages", PAIRS, BUDGET),
    "web": ("web", PAIRS, BUDGET),
    "classes": ("classes", PAIRS, BUDGET),
    "photos": ("photos", PAIRS, BUDGET),
    "photos_recon": ("photos", RECON, BUDGET),
    "photos_random": ("photos_random", PAIRS, BUDGET),
    "twostage": ("digits", RECON, "--cond-drop 0 --steps 1000"),       # three image models and a prior, see twostage()
}
# Sets of samples: data folder of the conditions (of the model, if its encoder is another), flags of 05, flags of 06.
SETS = {
    "digits": ("digits", "--draw {seed} --variations 60", ""),
    "hundred": ("digits", "--draw {seed} --per-page 10 --variations 6", ""),
    "fullset": ("digits", "--per-page 100 --variations 1", "--with-conditions"),
    "photos": ("photos", "--draw {seed} --variations 30", ""),
    "twostage": ("digits", "", ""),
}
# name: (set, guidance) of all that is sampled from it. Every other model: the digits, w = 1.
FULL = [*(("digits", w) for w in (1, 0, 2, 4)), ("fullset", 1), ("hundred", 1)]
SAMPLED = {
    "recon": [("digits", 1), ("fullset", 1)],
    "pairs": [("digits", 1), ("fullset", 1), ("hundred", 1)],
    **dict.fromkeys(("unfiltered", "low_only"), [("digits", 1), ("hundred", 1)]),
    "recon_full": FULL,
    "pairs_full": FULL + [("digits", w) for w in (0.1, 0.3, 0.5, 0.7)],    # and 1: the weights of [S], appendices E, F
    **dict.fromkeys(("pages", "web", "classes"), [("digits", 1), ("photos", 1)]),
    **dict.fromkeys(("photos_recon", "photos_random"), [("photos", 1)]),
    "photos": [("photos", w) for w in (1, 0, 2, 4)],
}
# Rows of 2SDM: image model, row of 07, flags of 05. With 20 of 25 steps 2SDM takes less arithmetic than the baseline.
ROWS = {
    "unconditional": ("none", "unconditional", ""),
    "kmeans": ("kmeans16", "kmeans16", ""),
    "oracle": ("film", "oracle", ""),
    "2sdm": ("film", "2sdm", ""),
    "2sdm_fewer_steps": ("film", "2sdm", "--sample-steps 20"),
}
# Data folders with another encoder, and the folder whose images and pairs they have.
ENCODERS = {"lite2": ("lite2", "digits"), "random": ("random", "digits"), "photos_random": ("random", "photos")}
KEPT = report.ROOT / "docs" / "reference" / "claims.json"
METRICS = ("fid", "kid", "precision", "recall", "copy", "local", "ms_image", "prior_share")
PHOTOS = ("astronaut", "brick", "camera", "cat", "cell", "clock", "coffee", "coins", "grass", "gravel",
          "hubble_deep_field", "immunohistochemistry", "moon", "page", "retina", "rocket", "stereo_motorcycle", "text")

# ----------------------------------------------------------------------------------------------------------------------
# Running. Every step is left out if the file that it writes last is there.


def script(line):
    """`python LINE` in the repository, on one thread; stops with its last words if it fails."""
    report.run(*line.split(), OMP_NUM_THREADS="1")


def make(path, line):
    """Run a line of script() unless `path`, what it writes last, is there."""
    if not path.exists():
        script(line)


def link(source, target, names):
    """A data folder of hard links to files of another."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (target / name).exists():
            os.link(source / name, target / name)


def prepare(runs, name):
    """The data folder runs/NAME, if it is not there."""
    folder, images, digits = runs / name, runs / f"{name}_images", runs / "digits"
    if (folder / "pairs.npy").exists():
        return
    thresholds = {"digits": "", "low_only": "--high 1"}.get(name, "--low -1 --high 1")
    if name == "digits":
        make(images, f"-m examples.digits --out {images}")
    elif name == "classes":
        make(images, f"-m examples.digits --by-class --out {images}")
        images = images / "train"                                      # a fifth of which 01 holds out, as of `pages`
    elif name == "photos":
        save_tiles(images)
    elif name in ("pages", "web"):
        prepare(runs, "digits")
        if name == "web":
            make(images / "openmoji", f"-m examples.openmoji --size 16 --out {images / 'openmoji'}")
        save_pages(images, runs / "digits_images" / "train")
    else:
        prepare(runs, ENCODERS.get(name, ("", "digits"))[1])
    if name in ("unfiltered", "low_only"):
        link(digits, folder, ARRAYS)
    elif name in ENCODERS:
        encoder, source = ENCODERS[name]
        make(folder / "data.json", f"-m benchmarks.variants encoders 01_embed.py --encoder {encoder} --encoder-px 128 "
             f"--images {runs / source}_images --preset digits16 --out {folder}")
        return link(runs / source, folder, ["pairs.npy", "sims.npy"])  # the same pairs
    make(folder / "data.json", f"01_embed.py --images {images} --preset digits16 --out {folder}")
    script(f"02_filter_pairs.py --data {folder} {thresholds}")


def save_pages(target, source):
    """Links to the digits on the training pages, without what examples/digits.py planted."""
    for path in sorted(source.glob("*/*.png")):
        if "stranger" not in path.name and "near-duplicate" not in path.name:
            link(path.parent, target / path.parent.name, [path.name])


def save_tiles(target, across=8, size=64):
    """scikit-image's photographs, cut into disjoint squares, as target/PHOTO/*.png: a page each.

    across: squares along the shorter side.
    """
    from skimage import data
    for name in PHOTOS:
        photo = getattr(data, name)()
        if isinstance(photo, tuple):                                   # the left picture of a stereo pair
            photo = photo[0]
        photo = Image.fromarray(photo).convert("RGB")
        side = min(photo.size) // across
        (target / name).mkdir(parents=True, exist_ok=True)
        for y in range(0, photo.height - side + 1, side):
            for x in range(0, photo.width - side + 1, side):
                tile = photo.resize((size, size), Image.LANCZOS, (x, y, x + side, y + side))
                tile.save(target / name / f"{y:04d}_{x:04d}.png")


def sample(data, folder, line, tokens=False):
    """Samples in `folder` by a line that starts 05, and their embeddings; with tokens, these too."""
    make(folder / "samples.npy", f"{line} --out {folder}")
    embed = f"01_embed.py --data {data} --images {folder}/samples.npy --out"
    make(folder / "data.json", f"{embed} {folder} --cls-only")
    if tokens:
        make(folder / "local" / "data.json", f"{embed} {folder}/local")


def twostage(runs, seed):
    """The rows of 2SDM: image models of 03, prior and y of 07, samples of 05. Its arrays lie in SEED/twostage_data."""
    own, out = runs / str(seed) / "twostage_data", runs / str(seed) / "twostage"
    _, trainer, flags = MODELS["twostage"]
    link(runs / "digits", own, ARRAYS)
    make(own / "kmeans16.npy", f"07_twostage.py told --data {own}")
    for name, cond in (("none", "none"), ("film", "film"), ("kmeans16", f"film --cls {own}/kmeans16.npy")):
        make(own / f"{name}.pt", f"{trainer} --data {own} --seed {seed} {flags} --cond {cond} --out {own}/{name}.pt")
    make(own / "prior.pt", f"07_twostage.py prior --data {own} --seed {seed}")
    make(own / "twostage" / "2sdm" / "y.json", f"07_twostage.py y --data {own} --seed {seed}")
    for row, (model, y, further) in ROWS.items():
        line = f"--data {own} --checkpoint {own}/{model}.pt --y {own}/twostage/{y}/y.npy --seed {seed} {further}"
        sample(own, out / row, f"05_sample.py {line}")
    print(f"seed {seed}: twostage is done", flush=True)


def chain(runs, seed, name):
    """Train a model, sample from it, embed the samples."""
    if name == "twostage":
        return twostage(runs, seed)
    data, trainer, flags = MODELS[name]
    checkpoint = runs / str(seed) / f"{name}.pt"
    make(checkpoint, f"{trainer} --data {runs / data} --out {checkpoint} --seed {seed} {flags}")
    sampler = f"--sample-steps 12 {DEMO}" if name.endswith("_full") else ""
    for shown, w in SAMPLED.get(name, [("digits", 1)]):
        own, conditions, _ = SETS[shown]
        told = data if data in ENCODERS else own                       # the same images, in the model's own embedding
        line = f"--data {runs / told} --checkpoint {checkpoint} --guidance {w} --seed {seed} {sampler} "
        line += conditions.format(seed=seed)
        sample(runs / own, runs / str(seed) / shown / f"{name}_w{w}", f"05_sample.py {line}", shown == "fullset")
    print(f"seed {seed}: {name} is done", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Scoring, and the page.


def local_similarity(data, samples):
    """Mean cosine of local tokens [n k, T, C] of samples and of their conditions, place by place."""
    ours, tokens = common.load(samples / "local" / "tokens.npy"), common.load(data / "tokens.npy")
    conditions = common.load(samples / "conditions.npy")
    theirs = tokens[np.repeat(conditions, len(ours) // len(conditions))]
    return torch.cosine_similarity(torch.tensor(ours).float(), torch.tensor(theirs).float(), dim=2).mean().item()


def score(runs):
    """{(set, samples, seed): row of 06} of all samples there are; the row of real images is (set, "real", None)."""
    found = {}
    for shown, (data, _, flags) in SETS.items():
        folders = sorted(path.parent for path in runs.glob(f"[0-9]*/{shown}/*/data.json"))
        if not folders:
            continue
        out = runs / "scores" / shown
        samples = " ".join(map(str, folders))
        script(f"06_fewshot_metrics.py --data {runs / data} --out {out} {flags} --samples {samples}")
        for row in json.loads((out / "metrics.json").read_text()):
            if "folder" not in row:
                found[shown, "real", None] = row
                continue
            folder = Path(row["folder"])
            if (folder / "local" / "data.json").exists():
                row["local"] = local_similarity(runs / data, folder)
            y = common.load(folder / "samples.json").get("y")
            if y:                                                      # the time of 2SDM is that of both stages
                prior = common.load(Path(y).with_suffix(".json"))["ms_row"]
                row["ms_image"] += prior
                row["prior_share"] = prior / row["ms_image"]
            found[shown, folder.name, int(folder.parts[-3])] = row
    return found


def remember(rows):
    """The scores in KEPT, these in the place of older ones; KEPT is written again, a line for each set of samples."""
    found = {(row["set"], row["samples"], row["seed"]): row for row in json.loads(KEPT.read_text())}
    for key, row in rows.items():
        numbers = {name: round(row[name], 5) for name in METRICS if row.get(name) is not None}
        found[key] = dict(zip(("set", "samples", "seed"), key)) | numbers
    found = dict(sorted(found.items(), key=str))
    report.write(KEPT, "[\n" + ",\n".join(map(json.dumps, found.values())) + "\n]\n")
    return found


def figures(rows, shown, samples, metric):
    """{seed: value} of a metric of a set's samples; of a number or "real", the same for every seed."""
    seeds = {seed for *_, seed in rows} - {None}
    if samples.replace(".", "").isdigit():
        return dict.fromkeys(seeds, float(samples))
    if samples == "real":
        return dict.fromkeys(seeds, rows[shown, "real", None][metric]) if (shown, "real", None) in rows else {}
    return {seed: row[metric] for (*where, seed), row in rows.items() if where == [shown, samples] and metric in row}


def summary(values, metric):
    """Mean +- s.d. (n - 1) as the page prints it."""
    if not values:
        return "-"
    digits = dict(fid=1, ms_image=1, seconds=0, kid=4).get(metric, 3)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def verdict(outcomes):
    """One word for a claim, from whether each comparison holds in each seed, a list of lists (empty: not measured)."""
    if not all(outcomes):
        return "measured in part" if any(outcomes) else "not measured"
    few = min(map(len, outcomes))
    less = f" ({few} seed{'s' * (few > 1)} only)" * (few < 3)
    if all(map(all, outcomes)):
        return "reproduced" + less
    if not any(map(any, outcomes)):
        return "opposite" + less
    return ("in part" if 2 * sum(map(all, outcomes)) >= len(outcomes) else "not at this scale") + less


def fill_section(section, rows):
    """A claim's section with its values filled in: (text, the line of the summary table)."""
    lines, outcomes, wanted = section.split("\n"), [], set()
    for i, line in enumerate(lines):
        found = re.match(r"\| (also )?(\w+) \| (\w+) \| `(.+)` ([<>]) `(.+)` \|", line)
        if found:
            also, shown, metric, one, sign, other = found.groups()
            first, second = (figures(rows, shown, samples, metric) for samples in (one, other))
            seeds = sorted(first.keys() & second.keys())
            holds = [first[s] < second[s] if sign == "<" else first[s] > second[s] for s in seeds]
            before = re.search(r"(\d+) of (\d+)", line)
            if holds or not before:
                means = " | ".join(summary([values[s] for s in seeds], metric) for values in (first, second))
                lines[i] = f"{found[0]} {means} | {sum(holds)} of {len(seeds)} |"
            else:                                                      # not measured again: what the page says
                holds = [n < int(before[1]) for n in range(int(before[2]))]
            if not also:
                outcomes.append(holds)
            wanted |= {"twostage"} if shown == "twostage" else {samples.rsplit("_w", 1)[0] for samples in (one, other)}
        if re.match(r"`python .*claims.* run --models", line):
            models = " ".join(name for name in MODELS if name in wanted)
            lines[i] = f"`python -m benchmarks.claims run --models {models}`"
    number, title = re.match(r"## (\d+)\. (.*): [^:]+$", lines[0]).groups()
    said = verdict(outcomes)
    lines[0] = f"## {number}. {title}: {said}"
    measured = [holds for holds in outcomes if holds]
    always, ever = sum(map(all, measured)), sum(map(any, measured))
    return "\n".join(lines), f"| {number} | {title} | {said} | {always}, {ever - always}, {len(measured) - ever} |"


def fill(page, rows):
    """The page with every value, verdict and command filled in; a section without a table stays as it is."""
    introduction, *sections = re.split(r"(?m)^(?=## \d+\. )", page)
    filled = [fill_section(s, rows) if "| set |" in s else (s, None) for s in sections]
    before, head, after = introduction.partition("| | claim |")
    table = [head + after.split("\n")[0], after.split("\n")[1], *(line for _, line in filled if line)]
    return before + "\n".join([*table, "", ""]) + "".join(text for text, _ in filled)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", choices=["run", "write"])
    p.add_argument("--runs", type=Path, default=report.ROOT / "runs" / "claims")
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--jobs", type=int, default=2, help="chains of commands side by side")
    args = p.parse_args()
    runs = args.runs.resolve()                                         # scripts run in the repository
    if args.action == "write":
        page = report.ROOT / "docs" / "claims.md"
        return report.write(page, fill(page.read_text(), remember(score(runs))))
    shown = [SETS[shown][0] for name in args.models for shown, _ in SAMPLED.get(name, [])]
    for folder in dict.fromkeys([MODELS[name][0] for name in args.models] + shown):
        prepare(runs, folder)
    with ThreadPoolExecutor(args.jobs) as pool:                        # the first error stops what has not begun
        calls = [(runs, seed, name) for seed in args.seeds for name in args.models]
        list(pool.map(lambda call: chain(*call), calls))


if __name__ == "__main__":
    main()
