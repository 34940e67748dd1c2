"""The papers' claims, measured again: runs the numbered scripts over seeds, then writes docs/claims.md.

Everything goes through the scripts' command lines and files, below runs/claims: data folders, SEED/MODEL.pt, SEED/samples/SET.
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

ROOT = Path(__file__).resolve().parents[1]
STEPS = 800
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
GUIDED = {"recon": (1, 0, 2, 4), "pairs": (1, 0, 2, 4)}               # every other model at w = 1 only


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


ARRAYS = ["images.npy", "pages.npy", "split.npy", "names.npy", "cls.npy", "tokens.npy", "data.json"]


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
    elif name in ("lite2", "random"):                                  # another encoder, the same pairs
        script(f"01_embed.py --out {folder} --encoder {dict(lite2='efficientnet_lite2').get(name, name)}")
        link(digits, folder, ["pairs.npy", "sims.npy"])


def chain(runs, seed, name):
    """Train a model, sample from it, embed the samples: one command after another, each only if its file is not there."""
    data, trainer, flags = MODELS[name]
    checkpoint = runs / str(seed) / f"{name}.pt"
    if not checkpoint.exists():
        steps = "" if "--steps" in flags else f"--steps {STEPS}"
        script(f"{trainer} --data {runs / data} --out {checkpoint} --seed {seed} {steps} {flags}")
    for w in GUIDED.get(name, (1,)):
        samples = runs / str(seed) / "samples" / f"{name}_w{w}"
        if not (samples / "samples.npy").exists():
            script(f"05_sample.py --data {runs / data} --checkpoint {checkpoint} --guidance {w} --seed {seed} --out {samples}")
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
