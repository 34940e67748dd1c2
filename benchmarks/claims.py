"""The papers' claims, measured again: runs the numbered scripts over seeds, then writes docs/claims.md.

Everything goes through the scripts' command lines and files, below runs/claims: data folders, SEED/MODEL.pt, SEED/SET/MODEL_wW.
A repeated command goes on where it stopped. Two chains of commands run side by side, one thread each; a seed takes about an
hour and a half on two cores.

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
BUDGET = "--steps 1600 --batch 16"                                     # with 800 steps of 32 FID is 145 in place of 121 (pairs)
DEMO = "--time-power 2 --interpolation 0"                              # the sampler of `make demo`, with 12 steps
ARRAYS = ["images.npy", "pages.npy", "split.npy", "names.npy", "cls.npy", "tokens.npy", "data.json"]
# name: (data folder, script, further flags). The other flags are the preset's, the same for all.
MODELS = {
    "recon": ("digits", "03_train_recon.py", BUDGET),
    "pairs": ("digits", "04_train_pairs.py", BUDGET),
    "recon_full": ("digits", "03_train_recon.py", ""),                 # trained and sampled as in `make demo`
    "pairs_full": ("digits", "04_train_pairs.py", ""),
    "film": ("digits", "04_train_pairs.py", f"{BUDGET} --cond film"),
    "tokens": ("digits", "04_train_pairs.py", f"{BUDGET} --cond tokens"),
    "unfiltered": ("unfiltered", "04_train_pairs.py", BUDGET),
    "low_only": ("low_only", "04_train_pairs.py", BUDGET),
    "small": ("digits", "04_train_pairs.py", f"{BUDGET} --channels 16 32 64"),
    "lite2": ("lite2", "04_train_pairs.py", BUDGET),
    "random": ("random", "04_train_pairs.py", BUDGET),
    "pages": ("pages", "04_train_pairs.py", BUDGET),
    "web": ("web", "04_train_pairs.py", BUDGET),
    "classes": ("classes", "04_train_pairs.py", BUDGET),
    "photos": ("photos", "04_train_pairs.py", BUDGET),
    "photos_recon": ("photos", "03_train_recon.py", BUDGET),
    "photos_random": ("photos_random", "04_train_pairs.py", BUDGET),
    "twostage": ("digits", "07_twostage.py", "--steps 1000"),          # five rows in place of a checkpoint
}
ROWS = ("unconditional", "kmeans", "oracle", "2sdm", "2sdm_fewer_steps")
# Sets of samples: the data folder of the conditions (of the model itself, if its encoder is another), further flags of 05.
SETS = {"digits": ("digits", "--draw {seed}"), "hundred": ("digits", "--draw {seed} --per-page 10 --variations 6"),
        "fullset": ("digits", "--protocol fullset"), "photos": ("photos", "--draw {seed} --variations 30")}
# name: (set, guidance) of all that is sampled from it. Every other model: the digits, w = 1.
SAMPLED = {
    "recon": [("digits", 1), ("fullset", 1)],
    "pairs": [("digits", 1), ("fullset", 1), ("hundred", 1)],
    **dict.fromkeys(("unfiltered", "low_only"), [("digits", 1), ("hundred", 1)]),
    **dict.fromkeys(("recon_full", "pairs_full"), [*(("digits", w) for w in (1, 0, 2, 4)), ("fullset", 1), ("hundred", 1)]),
    **dict.fromkeys(("pages", "web", "classes"), [("digits", 1), ("photos", 1)]),
    **dict.fromkeys(("photos_recon", "photos_random"), [("photos", 1)]),
    "photos": [("photos", w) for w in (1, 0, 2, 4)],
}
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
    elif name in ("pages", "web", "classes", "photos"):
        if not (folder / "data.json").exists():
            images = runs / f"{name}_images"
            if name == "photos":
                save_tiles(images)
            else:
                save_pages(images, digits, by_class=name == "classes")
            if name == "web":
                prepare(runs, "emoji")
                save_pages(images, runs / "emoji")
            script(f"01_embed.py --images {images} --preset digits16 --out {folder}")
        script(f"02_filter_pairs.py --data {folder} --low -1 --high 1")          # nothing was planted here
    elif name in ENCODERS:
        encoder, source = ENCODERS[name]
        prepare(runs, source)
        images = "" if source == "digits" else f"--images {runs / source}_images --preset digits16"
        script(f"01_embed.py {images} --out {folder} --encoder-px 128 --encoder {encoder}")
        link(runs / source, folder, ["pairs.npy", "sims.npy"])         # the same pairs


def save_pages(target, source, by_class=False):
    """The training images of a data folder, without what 01 planted, as target/PAGE/*.png; by_class: a digit is a page."""
    images, pages, split, names = (np.load(source / name, allow_pickle=False) for name in ARRAYS[:4])
    planted = np.char.startswith(names, "stranger: ") | np.char.startswith(names, "near-duplicate: ")
    for i in np.flatnonzero((split == 0) & ~planted):
        page = target / (names[i].split()[1] if by_class else f"{source.name}{pages[i]:05d}")
        page.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(page / f"{i:05d}.png")


def save_tiles(target, across=8, size=64):
    """scikit-image's photographs, cut into squares, so many across the shorter side, as target/PHOTO/*.png: a page each.

    They do not overlap; resampling reads a pixel or two beyond the edge.
    """
    from skimage import data
    for name in PHOTOS:
        photo = getattr(data, name)()
        photo = Image.fromarray(photo[0] if isinstance(photo, tuple) else photo).convert("RGB")        # the left of a stereo pair
        side = min(photo.size) // across
        (target / name).mkdir(parents=True, exist_ok=True)
        for y in range(0, photo.height - side + 1, side):
            for x in range(0, photo.width - side + 1, side):
                photo.resize((size, size), Image.LANCZOS, (x, y, x + side, y + side)).save(target / name / f"{y:04d}_{x:04d}.png")


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
        script(f"{trainer} --data {runs / data} --out {checkpoint} --seed {seed} {flags}")
    sampler = f"--sample-steps 12 {DEMO}" if name.endswith("_full") else ""
    for shown, w in SAMPLED.get(name, [("digits", 1)]):
        own, flags = SETS[shown]
        conditions = data if data in ENCODERS else own                 # the same images, in the model's own embedding
        samples = runs / str(seed) / shown / f"{name}_w{w}"
        if not (samples / "samples.npy").exists():
            script(f"05_sample.py --data {runs / conditions} --checkpoint {checkpoint} --guidance {w} --seed {seed} {sampler} "
                   f"{flags.format(seed=seed)} --out {samples}")
        embed = f"01_embed.py --data {runs / own} --images {samples}/samples.npy --out"
        if not (samples / "data.json").exists():
            script(f"{embed} {samples} --cls-only")
        if shown == "fullset" and not (samples / "local" / "data.json").exists():
            script(f"{embed} {samples}/local")                         # tokens as well
    print(f"seed {seed}: {name} is done", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# The claims: a title, the paper's sentence in other words, the comparisons it stands on, what to know besides and what was tried.
# A comparison names the set of samples, the metric, and two sample folders (MODEL_wW, or a row of 07), or a folder and a number
# or "real", the row of real images of 06. "also": shown, but not part of the paper's sentence, and no part of the verdict.

CLAIMS = [
    ("Reconstruction training collapses to copies, early",
     """A network trained to reconstruct an image from its frozen embedding draws that image again with small changes, long before
     its training ends.""",
     ["digits copy recon_full_w1 > real", "digits copy recon_full_w1 > pairs_full_w1",
      "digits recall recon_full_w1 < pairs_full_w1", "digits copy recon_w1 > real", "digits copy recon_w1 > pairs_w1",
      "digits recall recon_w1 < pairs_w1",
      "photos copy photos_recon_w1 > real", "photos copy photos_recon_w1 > photos_w1", "also digits copy pairs_full_w1 > real"],
     """copy: mean cosine of a sample and its condition; `real`: of a condition and the other held-out images of its page. The
     short training stands for early.""",
     """twice the training (`_full`): then it copies. After the short one, and on the photographs, it is nearer to its condition
     than the pair model, but too rough to resemble it as another real image does: here it copies once it can draw."""),
    ("Pairs give variations: higher few-shot recall, lower few-shot FID",
     """Trained on two images of one web page, the same network draws diverse images of the same kind; few-shot FID and recall
     show it.""",
     ["digits recall pairs_full_w1 > recon_full_w1", "digits fid pairs_full_w1 < recon_full_w1",
      "digits recall pairs_w1 > recon_w1", "digits fid pairs_w1 < recon_w1",
      "photos recall photos_w1 > photos_recon_w1", "photos fid photos_w1 < photos_recon_w1",
      "also hundred recall pairs_full_w1 > recon_full_w1", "also hundred fid pairs_full_w1 < recon_full_w1"],
     "",
     """a hundred conditions in place of ten, so that less depends on which they are. With them the copier wins in every seed, in
     FID and in recall, as it does in the full set (9): copies of ten writings of a digit cover the digit. That few-shot metrics
     ask for variation rests on the conditions being few; one of each class is few. On the photographs the FIDs are equal, and
     both recalls are far from the .81 of real squares."""),
    ("Cross-attention on local tokens beats FiLM on the global embedding",
     """Attending to the encoder's local tokens gives a lower FID than modulating by its global embedding.""",
     ["digits fid tokens_w1 < film_w1", "also digits recall tokens_w1 > film_w1",
      "also digits precision tokens_w1 > film_w1", "also digits fid pairs_w1 < tokens_w1"],
     """`pairs`, the default, has both.""", ""),
    ("Similarity filtering helps",
     """Dropping pairs of low similarity (unrelated images) improves FID; dropping near-duplicates as well improves it again.""",
     ["digits fid low_only_w1 < unfiltered_w1", "digits fid pairs_w1 < low_only_w1", "also digits fid pairs_w1 < unfiltered_w1",
      "also hundred fid low_only_w1 < unfiltered_w1", "also hundred fid pairs_w1 < low_only_w1",
      "also hundred fid pairs_w1 < unfiltered_w1"],
     """A page is ten writings of a digit, a planted stranger and a planted near-duplicate. `pairs` is filtered at both ends.""",
     """a hundred conditions, since which ten they are moves FID by more than the filter does. There dropping strangers helps in
     every seed (134 to 123) and dropping near-duplicates, 1.5% of the pairs, in two of three (to 117)."""),
    ("A stronger encoder helps",
     """With the decoder fixed, better and larger frozen encoders give a lower FID.""",
     ["digits fid pairs_w1 < random_w1", "digits fid lite2_w1 < pairs_w1", "photos fid photos_w1 < photos_random_w1"],
     """`pairs` and `photos` see EfficientNet-Lite0, `lite2` Lite2, `random` Lite0 with random weights, all at 128 px; the pairs
     are the same, and so is the encoder that scores (Lite0).""",
     """photographs in place of digits, where the trained encoder is ahead of random weights in each seed. Our guess, not tested:
     digits of 16 px ask little of an encoder, and Lite2, trained at 260 px, loses by being fed 128."""),
    ("A larger decoder helps",
     """With the encoder fixed, FID falls as the U-ViT grows.""",
     ["digits fid pairs_w1 < small_w1"],
     """`small` has channels 16, 32, 64 in place of 32, 64, 192.""", ""),
    ("Guidance raises precision and lowers recall; FID has an optimum",
     """More guidance makes samples more typical and less diverse; the best FID lies at a moderate guidance.""",
     [what for shown, m in (("digits", "pairs_full"), ("digits", "recon_full"), ("photos", "photos")) for what in (
         f"{shown} precision {m}_w2 > {m}_w0", f"{shown} recall {m}_w2 < {m}_w0", f"{shown} fid {m}_w1 < {m}_w0",
         f"{shown} fid {m}_w1 < {m}_w4", f"also {shown} precision {m}_w1 > {m}_w0")],
     "",
     """half the training with 25 steps, and three forms of guidance made to keep diversity
     ([docs/beyond.md](beyond.md#guidance-that-keeps-diversity)): precision falls with w there too, from .448 at w = 0 to .329 at
     w = 2, and least where least is guided. What does show is the optimum of FID at w = 1, for models of pairs; the
     reconstruction model's lies at 0: its condition says all already."""),
    ("Label-grouped training wins on its own classes and loses on pages it never saw",
     """Grouping images by class label in place of web page gives a better FID on the classes of that data set and a worse one
     on other data sets.""",
     ["digits fid classes_w1 < pages_w1", "photos fid web_w1 < classes_w1", "also photos fid pages_w1 < classes_w1",
      "also digits fid classes_w1 < web_w1", "also photos recall web_w1 > classes_w1"],
     """`classes`: a digit is a page; `pages`: the same digits on pages of ten of a kind, so that only the number of
     partners differs; `web`: those pages and OpenMoji's, as the web has pages of all sorts. Nothing is planted or filtered in
     them, and the photographs are new to all three.""",
     """pages of the digits alone (`pages`), which tell grouping from a mixed training set: on the digits ten partners are as good
     as 400, and what `web` loses there it loses to OpenMoji's share of a short training. None of the three draws photographs:
     real squares have an FID of 163."""),
    ("Full-set FID and instance similarity reward the copier; the few-shot protocol does not",
     """Where references contain the conditions, and where a sample is compared with its condition, a copy scores best; few-shot
     metrics put the model that varies first.""",
     ["fullset fid recon_full_w1 < pairs_full_w1", "fullset copy recon_full_w1 > pairs_full_w1",
      "fullset local recon_full_w1 > pairs_full_w1", "digits fid recon_full_w1 > pairs_full_w1",
      "digits recall recon_full_w1 < pairs_full_w1", "fullset fid recon_w1 < pairs_w1",
      "fullset copy recon_w1 > pairs_w1", "fullset local recon_w1 > pairs_w1"],
     """`fullset`: each of the 1,000 held-out images is a condition once, against all of them (`--protocol fullset`). local: mean
     cosine of the local tokens of a sample and its condition, place by place (LPIPS with equal weights is 2 - 2 local).""",
     """twice the training (`_full`), with which full-set FID prefers the copier by far in every seed; after the short one a copy
     is too rough to earn anything. The other failure is one draw of ten conditions, see 2."""),
    ("2SDM beats the unconditional model at equal budget",
     """Sampling an embedding first improves FID by 25 to 50% (from the abstract).""",
     ["twostage fid 2sdm < unconditional", "twostage fid 2sdm_fewer_steps < unconditional",
      "also twostage recall 2sdm > unconditional", "also twostage precision 2sdm > unconditional"],
     """Equal: network, steps, images of the image models. The prior is 16% of an image model's training arithmetic on top;
     `2sdm_fewer_steps` pays for the prior's sampling time with image steps.""", ""),
    ("The oracle: embeddings of real images give the best images",
     """Given the embeddings of real images, which no sampler has, FID is lower still: the bound of a perfect prior.""",
     ["twostage fid oracle < unconditional", "twostage fid oracle < 2sdm"], "",
     """both models told the digit as well ([the README](../README.md#2sdm-first-what-then-how), one seed): oracle 100.9, 2SDM
     92.8. The prior's embeddings are tamer than real ones, which costs the images nothing: the image model is the limit."""),
    ("The more the image model is told, the better it draws",
     """FID falls with the information in the condition: nothing, a cluster, the whole embedding.""",
     ["twostage fid kmeans < unconditional", "twostage fid oracle < kmeans"],
     """More levels, one seed: [the README](../README.md#2sdm-first-what-then-how), `07_twostage.py sweep`.""", ""),
    ("The prior costs little, and fewer image steps pay for it",
     """The prior is a small share of the sampling time; with fewer image steps 2SDM takes no longer than the baseline and is
     still better.""",
     ["twostage prior_share 2sdm < 0.2", "twostage fid 2sdm_fewer_steps < unconditional",
      "also twostage ms_image 2sdm_fewer_steps < unconditional"],
     """prior_share: of the sampling time. `2sdm_fewer_steps` has less arithmetic than the baseline by construction, prior
     included. ms_image: milliseconds an image, disturbed here by what ran beside it; on an idle machine it takes less
     ([the README](../README.md#2sdm-first-what-then-how)).""", ""),
]
PICTURES = {
    2: "![A held-out square of a photograph, eight samples of photos_recon; again, eight of photos](claims_photos_sheet.png)",
    7: "![Precision against recall over guidance, digits](claims_guidance.png)"}
INTRODUCTION = """# The papers' claims, measured again

Written by `python benchmarks/claims.py write`, after `python benchmarks/claims.py run`. Mean ± s.d. over the seeds; a seed
decides the training, the sampling, and which held-out images are the conditions.

- The digits at 16 px: ten conditions with 60 samples each, against the 970 held-out digits that are a condition in no seed.
  1,600 steps of 16 images a model. `_full`: 1,600 steps of 32, sampled with 12 steps, as in `make demo`. `hundred`: a hundred
  conditions, ten of each digit, with 6 samples each, against 700. `fullset`: all 1,000 in every seed.
- The photographs at 16 px (`photos`): 18 of scikit-image's, each cut into a page of disjoint squares; a fifth of the squares is
  held out (some squares are nearly uniform, and alike). 18 conditions, 30 samples each, against the other held-out squares.
- 2SDM (10 to 13): 1,000 steps of 32, 1,000 samples a row against the 1,000 held-out digits, w = 0, as in `make twostage`.

`_wW` is guidance W. FID is in features of Lite0 at 128 px: directions can be compared with the papers, levels cannot. The papers'
tables were not at hand; where an abstract gives a figure it is quoted.

A claim is *reproduced* if each of its comparisons holds in every seed, *opposite* if none holds in any, *in part* if half of them
hold in every seed, else *not at this scale*. Lines with "also" are no part of the paper's sentence and decide nothing. A
comparison of two equal models would hold in all three seeds one time in eight.
"""
LEFT_OUT = """## 14. A jointly trained embedder overfits: left out

The paper reports that an encoder trained together with the diffusion model overfits. It would need gradients through 01's
encoder in the training loop of 03 and 04, whose point is that embeddings are frozen files.
"""


# ----------------------------------------------------------------------------------------------------------------------
# The page.


def local_similarity(data, samples):
    """Mean cosine of local tokens [n k, T, C] of samples, embedded in full, and of their conditions, place by place."""
    tokens, ours = (np.load(folder / "tokens.npy", mmap_mode="r", allow_pickle=False) for folder in (data, samples / "local"))
    conditions = np.load(samples / "conditions.npy", allow_pickle=False)
    theirs = tokens[np.repeat(conditions, len(ours) // len(conditions))].astype(np.float32)
    ours = ours.astype(np.float32)
    return float(((ours * theirs).sum(2) / np.linalg.norm(ours, axis=2) / np.linalg.norm(theirs, axis=2)).mean())


def score(runs):
    """{(set, samples, seed): row of 06} of everything that is there, scored by 06 (again if there are new samples).

    The row of real images is (set, "real", None).
    """
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
            if row["reference"] == "seen":
                continue
            if "folder" not in row:
                found[shown, "real", None] = row
                continue
            folder = Path(row["folder"])
            if (folder / "local" / "data.json").exists():
                row["local"] = local_similarity(runs / data, folder)
            found[shown, folder.name, int(folder.parts[-3])] = row
    return found


def figures(rows, shown, samples, metric):
    """{seed: value} of a metric of a set's samples; if `samples` is a number or "real", that for every seed."""
    if samples.replace(".", "").isdigit():
        return {seed: float(samples) for *_, seed in rows}
    if samples == "real":
        return {seed: rows[shown, "real", None][metric] for *_, seed in rows} if (shown, "real", None) in rows else {}
    return {seed: row[metric] for (where, name, seed), row in rows.items() if (where, name) == (shown, samples) and metric in row}


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
    return "in part" if 2 * sum(map(all, outcomes)) >= len(outcomes) else "not at this scale"


def claim(rows, comparisons):
    """The verdict on a claim, how many of its comparisons hold in every seed, in some, in none, and the lines of its table."""
    lines, outcomes = ["| set | metric | claimed | the first | the second | holds in seeds |", "| --- " * 6 + "|"], []
    for comparison in comparisons:
        *also, shown, metric, one, sign, other = comparison.split()
        first, second = figures(rows, shown, one, metric), figures(rows, shown, other, metric)
        seeds = sorted(first.keys() & second.keys() - {None})
        holds = [first[s] < second[s] if sign == "<" else first[s] > second[s] for s in seeds]
        means = [summary([values[s] for s in seeds], metric) if seeds else "-" for values in (first, second)]
        cells = " ".join([*also, shown]), metric, f"`{one}` {sign} `{other}`", *means, f"{sum(holds)} of {len(seeds)}"
        lines.append(f"| {' | '.join(cells)} |")
        if not also:
            outcomes.append(holds)
    measured = [holds for holds in outcomes if holds]
    always, never = sum(map(all, measured)), len(measured) - sum(map(any, measured))
    seeds = min(filter(None, map(len, outcomes)), default=3)
    said = verdict(outcomes) + (f" ({seeds} seed{'s' * (seeds > 1)} only)" if seeds < 3 else "")
    return said, (always, len(measured) - always - never, never), lines


def command(comparisons):
    """The command that makes what the comparisons need."""
    wanted = set()
    for comparison in comparisons:
        *_, shown, _, one, _, other = comparison.split()
        wanted |= {"twostage"} if shown == "twostage" else {samples.rsplit("_w", 1)[0] for samples in (one, other)}
    return f"python benchmarks/claims.py run --models {' '.join(name for name in MODELS if name in wanted)}"


def write(runs, page):
    """Score what is there and write the page and its pictures beside it."""
    rows = score(runs)
    titles, body = ["| | claim | verdict | comparisons that hold in every seed, in some, in none |", "| --- " * 4 + "|"], []
    for number, (title, paper, comparisons, remark, tried) in enumerate(CLAIMS, 1):
        said, holding, table = claim(rows, comparisons)
        titles.append(f"| {number} | {title} | {said} | {', '.join(map(str, holding))} |")
        body += [f"## {number}. {title}: {said}", ""]
        for text in (f"*The paper:* {paper} {remark}", f"*Tried:* {tried}" * bool(tried)):
            body += [*textwrap.wrap(" ".join(text.split()), 128, break_long_words=False, break_on_hyphens=False), ""] * bool(text)
        body += [PICTURES[number], ""] if number in PICTURES else []
        body += [*table, "", f"`{command(comparisons)}`", ""]
    page.write_text("\n".join([INTRODUCTION, *titles, "", *body, LEFT_OUT]))
    both = [str(path.parent) for m in ("recon", "pairs") for path in sorted(runs.glob(f"[0-9]*/digits/{m}_full_w*/data.json"))]
    if both:
        script(f"06_fewshot_metrics.py --data {runs / 'digits'} --out {runs / 'scores' / 'curves'} --samples {' '.join(both)}")
        shutil.copy(runs / "scores" / "curves" / "metrics.png", page.with_name("claims_guidance.png"))
    sheets = [runs / "0" / "photos" / f"{name}_w1" / "sheet.png" for name in ("photos_recon", "photos")]
    if all(sheet.exists() for sheet in sheets):
        beside = np.concatenate([np.asarray(Image.open(sheet)) for sheet in sheets], 1)
        Image.fromarray(beside).save(page.with_name("claims_photos_sheet.png"))
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
