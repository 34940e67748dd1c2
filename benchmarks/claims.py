"""The papers' claims, measured again: runs the numbered scripts over seeds, then writes docs/claims.md.

Everything goes through the scripts' command lines and files, below runs/claims: data folders, SEED/MODEL.pt, SEED/SET/MODEL_wW.
A repeated command goes on where it stopped. Two chains of commands run side by side, one thread each; a seed takes about two
hours on two cores.

    python benchmarks/claims.py run                                  # all models, seeds 0 1 2
    python benchmarks/claims.py run --seeds 0 --models recon pairs   # some of it
    python benchmarks/claims.py write                                # docs/claims.md from what is there
"""
import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
STEPS = 800
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
}
# name: what to sample from it, (data folder, guidance, further flags). Every other model: SETS[None].
SETS = {None: [("digits", 1, "")],
        **dict.fromkeys(("recon", "pairs"), [("digits", w, "") for w in (1, 0, 2, 4)] + [("digits", 1, "--protocol fullset")]),
        **dict.fromkeys(("web", "classes"), [("digits", 1, ""), ("emoji", 1, "")])}


def script(line):
    """Run a numbered script on one thread; its last words and a stop if it fails."""
    done = subprocess.run([sys.executable, *line.split()], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"python {line}\n{done.stderr[-2000:]}")


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
    elif name in ("web", "classes"):
        prepare(runs, "emoji")
        if not (folder / "data.json").exists():
            drawings = runs / f"{name}_images"
            save_pages(drawings, digits, by_class=name == "classes")
            if name == "web":
                save_pages(drawings, runs / "emoji")
            script(f"01_embed.py --images {drawings} --preset digits16 --out {folder}")
        script(f"02_filter_pairs.py --data {folder}")
    elif name in ("lite2", "random"):                                  # another encoder, the same pairs
        script(f"01_embed.py --out {folder} --encoder-px 128 --encoder " + dict(lite2="efficientnet_lite2").get(name, name))
        link(digits, folder, ["pairs.npy", "sims.npy"])


def save_pages(target, source, by_class=False):
    """The training images of a data folder as target/PAGE/*.png; by_class: a digit is a page, without what 01 planted."""
    images, pages, split, names = (np.load(source / name, allow_pickle=False) for name in ARRAYS[:4])
    for i in np.flatnonzero(split == 0):
        if by_class and not names[i].startswith("digit "):
            continue
        page = target / (names[i].split()[1] if by_class else f"{source.name}{pages[i]:05d}")
        page.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(page / f"{i:05d}.png")


def chain(runs, seed, name):
    """Train a model, sample from it, embed the samples: one command after another, each only if its file is not there."""
    data, trainer, flags = MODELS[name]
    checkpoint = runs / str(seed) / f"{name}.pt"
    if not checkpoint.exists():
        steps = "" if "--steps" in flags else f"--steps {STEPS}"
        script(f"{trainer} --data {runs / data} --out {checkpoint} --seed {seed} {steps} {flags}")
    for shown, w, more in SETS.get(name, SETS[None]):
        conditions = data if data in ("lite2", "random") else shown    # the same images, in the model's own embedding
        samples = runs / str(seed) / (more.split()[-1] if more else shown) / f"{name}_w{w}"
        if not (samples / "samples.npy").exists():
            script(f"05_sample.py --data {runs / conditions} --checkpoint {checkpoint} --guidance {w} --seed {seed} {more} "
                   f"--out {samples}")
        if not (samples / "data.json").exists():
            script(f"01_embed.py --data {runs / 'digits'} --images {samples}/samples.npy --out {samples} --cls-only")
    print(f"seed {seed}: {name} is done", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("action", choices=["run", "write"])
    p.add_argument("--runs", type=Path, default=Path("runs/claims"))
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    p.add_argument("--jobs", type=int, default=2, help="chains side by side")
    args = p.parse_args()
    for name in dict.fromkeys(MODELS[name][0] for name in args.models):
        prepare(args.runs, name)
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in [pool.submit(chain, args.runs, seed, name) for seed in args.seeds for name in args.models]:
            done.result()


if __name__ == "__main__":
    main()
