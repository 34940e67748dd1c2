"""common.py: what two or more of the numbered scripts need, and nothing else.

In reading order: presets, noise schedule, loss, sampler, U-ViT, files, processes. The training loop is training.py.

The papers, as cited in the comments:
  [S]   Semantica: Conditional Diffusion on Web-Scale Image Pairs leads to Diverse Image Variations, arXiv 2405.14857
  [SD]  simple diffusion: End-to-end diffusion for high resolution images, arXiv 2301.11093
  [PD]  Progressive Distillation for Fast Sampling (v-prediction), arXiv 2202.00512
  [VDM] Variational Diffusion Models (log-SNR as time), arXiv 2107.00630
  [CFG] Classifier-Free Diffusion Guidance, arXiv 2207.12598
  [2SDM] Two-Stage Diffusion Models: Better Image Synthesis by Explicitly Modeling Semantics, openreview.net/forum?id=fH2wf2w2Ss
        (first as Visual Chain-of-Thought Diffusion Models, arXiv 2303.16187)

    python common.py        # the table of presets: parameters and GFLOPs an image (meta device, no memory)
"""
import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# Presets: everything that differs between a laptop and a cluster is data in this table; flags override single values.
# channels and blocks have one entry a stage, each stage at half the resolution of the one before; the last is the transformer.

SMALL = dict(patch=1, loss="v", warmup=100, decay="cosine", ema=0.998, weight_decay=0, cond_drop=0.1, amp="none", sample_steps=25,
             time_power=1.5)
PAPER = dict(loss="eps", noise_size=32, warmup=10_000, decay="constant", ema=0.9999, weight_decay=0, cond_drop=0.1, amp="bf16",
             source=None, encoder_px=224, batch=2048, steps=300_000, lr=1e-4, sample_steps=128, time_power=1, variations=10)
PRESETS = {
    "digits16": dict(SMALL, source="digits", size=16, encoder_px=128, channels=(32, 64, 192), blocks=(1, 1, 4), noise_size=16,
                     batch=32, steps=1600, lr=2e-3, variations=60),
    "emoji16": dict(SMALL, source="openmoji", size=16, encoder_px=224, channels=(32, 64, 192), blocks=(1, 1, 4), noise_size=16,
                    batch=32, steps=4000, lr=2e-3, variations=10),
    "emoji64": dict(SMALL, source="openmoji", size=64, encoder_px=224, channels=(64, 128, 256, 512), blocks=(2, 2, 2, 8),
                    noise_size=32, batch=256, steps=20_000, lr=5e-4, amp="bf16", sample_steps=64, variations=10),
    "semantica64": dict(PAPER, size=64, patch=1, channels=(128, 128, 256, 512, 1024), blocks=(3, 3, 3, 3, 12)),
    "semantica256": dict(PAPER, size=256, patch=2, channels=(128, 256, 1024, 2048, 4096), blocks=(2, 3, 3, 3, 12)),
}

# Evaluation: conditioning images a page (None: all), variations of each (a preset's, if not here), most reference images.
PROTOCOLS = {
    "fewshot": dict(per_page=1),                                         # n pages x k, against all other held-out images
    "imagenet-oneshot": dict(per_page=1, variations=10, references=10_000),                      # 1,000 classes: 10,000
    "sun397-oneshot": dict(per_page=1, variations=25, references=10_000),                        # 397 classes: 9,925
    "fullset": dict(per_page=None, variations=1, with_conditions=True),  # against the conditions themselves: copying pays
}

# ----------------------------------------------------------------------------------------------------------------------
# Diffusion. Variance preserving: z = alpha x + sigma eps, with lambda = logsnr = log(alpha^2 / sigma^2).


def logsnr_schedule(t, size, noise_size):
    """Shifted cosine log-SNR at time t in [0, 1], shape of t ([SD] "adjusting noise schedules"; log-SNR as in [VDM]).

    logsnr(t) = -2 log tan(a + t (b - a)) + 2 log(noise_size / size), a and b such that the unshifted ends are +-15.
    """
    a, b = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
    return -2 * torch.log(torch.tan(a + t * (b - a))) + 2 * math.log(noise_size / size)


def sampling_schedule(config):
    """logsnr(u ** time_power) for the sampler: 1 is uniform ([SD]); above 1, more of the few steps fall on low noise."""
    return lambda u: logsnr_schedule(u ** config["time_power"], config["network"]["size"], config["noise_size"])


def alpha_sigma(logsnr):
    """alpha = sqrt(sigmoid(logsnr)), sigma = sqrt(sigmoid(-logsnr)), as [B, 1, 1, 1] to scale images ([VDM] section 3)."""
    logsnr = logsnr[:, None, None, None]
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def diffusion_loss(v_pred, x, eps, logsnr, kind):
    """Mean squared error of each image, [B], of v ([PD] appendix D) or of eps (what [S] trains).

    v = alpha eps - sigma x and eps_hat = sigma z + alpha v_pred, so eps_hat - eps = alpha (v_pred - v):
    the eps loss is alpha^2 times the v loss.
    """
    alpha, sigma = alpha_sigma(logsnr)
    if kind == "v":
        error = v_pred - (alpha * eps - sigma * x)
    else:
        z = alpha * x + sigma * eps
        error = (sigma * z + alpha * v_pred) - eps
    return error.square().mean(dim=(1, 2, 3))


def guide(model, guidance, **condition):
    """A denoiser (z, logsnr) -> v under classifier-free guidance: (1 + w) v(cond) - w v(null) ([CFG] eq. 6, w as in [S]).

    w = 0 is the plain conditional model and w = -1 the unconditional one. Both branches run as one batch of 2B.
    At a given z, v is affine in x_hat and in eps_hat, and the weights sum to 1: guiding any of the three is the same.
    """
    def denoise(z, logsnr):
        if guidance == 0:
            return model(z, logsnr, **condition)
        twice = {k: torch.cat([c, c]) for k, c in condition.items()}
        drop = torch.arange(2 * len(z), device=z.device) >= len(z)
        v_cond, v_null = model(torch.cat([z, z]), torch.cat([logsnr, logsnr]), drop=drop, **twice).chunk(2)
        return (1 + guidance) * v_cond - guidance * v_null
    return denoise


@torch.no_grad()
def ddpm_sample(denoise, z, noise, steps, logsnr_of_t, interpolation=0.2, clip=True):
    """DDPM ancestral sampling from z at t = 1 to x_hat at t = 0 ([VDM] appendix A; variance interpolated in log space, [SD]).

    denoise(z [B, C, H, W], logsnr [B]) -> v; noise() -> fresh unit noise like z; interpolation: weight of the larger
    posterior variance in log space (0: sigma_s^2 (1-r), 1: sigma_t^2 (1-r)). Returns x_hat of the last step; clip: to [-1, 1].
    """
    logsnrs = logsnr_of_t(torch.linspace(1, 0, steps + 1, device=z.device))
    for i in range(steps):
        logsnr_t, logsnr_s = logsnrs[i].expand(len(z)), logsnrs[i + 1].expand(len(z))  # from t down to s < t
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
        x_hat = alpha_t * z - sigma_t * denoise(z, logsnr_t)
        if clip:
            x_hat = x_hat.clamp(-1, 1)
        if i == steps - 1:
            return x_hat
        r = torch.exp(logsnrs[i] - logsnrs[i + 1])                    # SNR(t) / SNR(s)
        one_minus_r = -torch.expm1(logsnrs[i] - logsnrs[i + 1])       # exact when the two are close
        mean = r * (alpha_s / alpha_t) * z + one_minus_r * alpha_s * x_hat
        std = one_minus_r.sqrt() * sigma_t ** interpolation * sigma_s ** (1 - interpolation)
        z = mean + std * noise()


def generator(device, *key):
    """The random stream of a key such as (seed, step, image): noise depends on what it is for, not on when it is drawn."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def randn(generators, shape):
    """[len(generators), *shape] of unit noise, row i from generators[i]: image i is the same in whatever batch it is drawn."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def autocast(device, amp):
    """bfloat16 for matrix products and convolutions; weights, optimiser, sampler and loss stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def sample(model, config, condition, guidance, noise, steps, amp):
    """uint8 images [B, S, S, 3] for embeddings `condition` of B rows; noise() -> fresh unit noise [B, 3, S, S] each time."""
    z, condition = noise(), {name: c.float() for name, c in condition.items()}
    with autocast(z.device, amp):
        return to_uint8(ddpm_sample(guide(model, guidance, **condition), z, noise, steps, sampling_schedule(config)))


# ----------------------------------------------------------------------------------------------------------------------
# U-ViT of [SD] (not the flat U-ViT of Bao et al., nor diffusers' UVit2DModel): convolutional stages with skips,
# a plain transformer at the lowest resolution.


def zero(layer):
    """Zero a layer's weights: a residual branch that starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Standardise(nn.Module):
    """(x - mean) / std of each feature over the training set: fitted before training, kept in the checkpoint."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, x):
        """x [..., dim]: a sample of the training set."""
        x = torch.from_numpy(np.asarray(x, np.float32)).flatten(0, -2)
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0) + 1e-3)

    def forward(self, x):
        return (x.float() - self.mean) / self.std


def group_norm(dim):
    """GroupNorm with 16 channels a group. One channel a group would erase each channel's mean, and with it the picture's tint."""
    return nn.GroupNorm(max(1, dim // 16), dim)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with FiLM by the embedding in between. [B, C, H, W] -> same."""

    def __init__(self, dim, emb_dim):
        super().__init__()
        self.norm1, self.conv1 = group_norm(dim), nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2, self.conv2 = group_norm(dim), zero(nn.Conv2d(dim, dim, 3, padding=1))
        self.film = nn.Linear(emb_dim, 2 * dim)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))                         # [B, C, H, W]
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)   # [B, C, 1, 1] each
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Multi-head attention of x [B, N, D] over context [B, T, D] (x itself for self-attention), heads of 64."""

    def __init__(self, dim):
        super().__init__()
        self.heads = max(1, dim // 64)
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x, context):
        k, v = self.kv(context).chunk(2, -1)                          # [B, T, D] each
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (self.q(x), k, v))  # [B, heads, N|T, D/heads]
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))      # [B, N, D]


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the condition's tokens ([S]: after every self-attention), MLP."""

    def __init__(self, dim, emb_dim, cross):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim)
        self.norm2, self.cross = (nn.LayerNorm(dim), Attention(dim)) if cross else (None, None)
        self.norm3, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.film = nn.Linear(emb_dim, 4 * dim)

    def forward(self, x, emb, context):
        scale1, shift1, scale2, shift2 = self.film(emb)[:, None].chunk(4, -1)   # [B, 1, D] each
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + self.attention(h, h)
        if self.cross is not None:
            x = x + self.cross(self.norm2(x), context)
        return x + self.mlp(self.norm3(x) * (1 + scale2) + shift2)     # [B, N, D]


class UViT(nn.Module):
    """v-prediction network: noisy z [B, 3, size, size], logsnr [B], condition -> v_pred [B, 3, size, size].

    cond: "tokens" cross-attends to the encoder's local tokens [B, T, C]; "film" adds the normalised global embedding
    [B, D], through a dense layer, to the noise-level embedding; "both"; "none". drop [B] bool: rows that get the null condition.
    """

    def __init__(self, size, patch, channels, blocks, cond, cls_dim=0, token_shape=(0, 0)):
        super().__init__()
        *conv_dims, dim = channels
        self.patch, self.cond = patch, cond
        emb_dim = min(dim, 1024)
        self.noise_mlp = nn.Sequential(nn.Linear(256, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if cond in ("film", "both"):
            self.cls_norm, self.cls_in = Standardise(cls_dim), nn.Linear(cls_dim, emb_dim)
            self.cls_null = nn.Parameter(torch.zeros(emb_dim))
        if cond in ("tokens", "both"):
            count, token_dim = token_shape
            self.token_norm, self.token_in = Standardise(token_dim), nn.Linear(token_dim, dim)
            self.token_pos = nn.Parameter(torch.randn(count, dim) * 0.02)
            self.token_null = nn.Parameter(torch.randn(dim) * 0.02)
        self.conv_in = nn.Conv2d(3, channels[0], patch, patch) if patch > 1 else nn.Conv2d(3, channels[0], 3, padding=1)
        self.down, self.shrink, self.grow, self.up = (nn.ModuleList() for _ in range(4))
        for c, c_next, n in zip(channels, channels[1:], blocks):
            self.down.append(nn.ModuleList(ResBlock(c, emb_dim) for _ in range(n)))
            self.shrink.append(nn.Conv2d(c, c_next, 1))               # after average pooling
            self.grow.append(nn.Conv2d(c_next, c, 1))                 # before nearest-neighbour upsampling
            self.up.append(nn.ModuleList(ResBlock(c, emb_dim) for _ in range(n)))
        grid = size // patch // 2 ** len(conv_dims)
        self.pos = nn.Parameter(torch.randn(grid * grid, dim) * 0.02)
        self.trunk = nn.ModuleList(TransformerBlock(dim, emb_dim, cond in ("tokens", "both")) for _ in range(blocks[-1]))
        self.norm_out = group_norm(channels[0])
        self.conv_out = zero(nn.Conv2d(channels[0], 3 * patch * patch, 3, padding=1))

    def forward(self, z, logsnr, cls=None, tokens=None, drop=None):
        freqs = torch.exp(torch.linspace(0, math.log(1000), 128, device=z.device))
        angles = (logsnr / 30)[:, None] * freqs                        # [B, 128]; logsnr in about +-15
        emb = self.noise_mlp(torch.cat([angles.sin(), angles.cos()], -1))  # [B, E]
        keep = None if drop is None else ~drop[:, None]                # [B, 1]
        if self.cond in ("film", "both"):
            h = self.cls_in(self.cls_norm(cls))
            emb = emb + (h if keep is None else torch.where(keep, h, self.cls_null))
        emb, context = F.silu(emb), None
        if self.cond in ("tokens", "both"):
            context = self.token_in(self.token_norm(tokens)) + self.token_pos  # [B, T, dim]
            if keep is not None:
                context = torch.where(keep[..., None], context, self.token_null)
        h, skips = self.conv_in(z), []                                 # [B, c0, S, S], S = size / patch
        for blocks, shrink in zip(self.down, self.shrink):
            for block in blocks:
                h = block(h, emb)
            skips.append(h)
            h = shrink(F.avg_pool2d(h, 2))
        B, C, H, W = h.shape
        h = h.flatten(2).transpose(1, 2) + self.pos                    # [B, H W, dim]
        for block in self.trunk:
            h = block(h, emb, context)
        h = h.transpose(1, 2).reshape(B, C, H, W)
        for blocks, grow in zip(reversed(self.up), reversed(self.grow)):
            h = (F.interpolate(grow(h), scale_factor=2) + skips.pop()) / math.sqrt(2)
            for block in blocks:
                h = block(h, emb)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch).float()  # [B, 3, size, size]


# ----------------------------------------------------------------------------------------------------------------------
# Files. Every finished file appears by a rename, so whatever has its final name is whole.


def die(message):
    """One line on standard error and exit code 2: bad arguments or bad input."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextlib.contextmanager
def writing(path):
    """`with writing(path) as f`: f is PATH.tmp, opened for bytes; it becomes PATH at the end, or nothing does."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            yield f
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        while isinstance(e, Exception) and not isinstance(e, OSError):  # torch.save raises another error on top of it
            e = e.__context__
        if not isinstance(e, OSError):
            raise
        die(f"cannot write {path}: {e.strerror or e}; free some space or choose another folder")


def read_array(path, dtype=None, ndim=None, rows=None, made_by="01_embed.py"):
    """Memory-map an .npy file, checked against the given dtype, number of axes and rows; exits with one line if it differs."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if math.prod(getattr(array, "shape", ())) > max(1, os.path.getsize(path)):  # numpy's own product can overflow
            raise ValueError("its shape is larger than the file")
    except FileNotFoundError:
        die(f"{path} is missing; {made_by} writes it")
    except Exception as e:  # a damaged header raises many types
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        die(f"{path} is not a readable .npy array ({reason}); write it again with {made_by}")
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        die(f"{path} is not one array with rows; write it again with {made_by}")
    found, wanted = (array.dtype, array.ndim, len(array)), (dtype, ndim, rows)
    if any(w is not None and f != w for f, w in zip(found, wanted)):
        die(f"{path} holds (dtype, axes, rows) {found}, expected {wanted}; write it again with {made_by}")
    return array


def read_json(path, made_by="01_embed.py"):
    """The object in a .json file; exits with one line if there is none."""
    try:
        value = json.loads(Path(path).read_text())
    except (ValueError, OSError, RecursionError) as e:
        die(f"cannot read {path} ({e}); {made_by} writes it")
    if not isinstance(value, dict):
        die(f"{path} holds a {type(value).__name__}, expected an object; write it again with {made_by}")
    return value


def read_checkpoint(path):
    """{model, ema, optimizer, step, config} of a .pt file that train() wrote: tensors and plain values, no pickled objects."""
    parts = dict(model=dict, ema=dict, step=int, config=dict)
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)         # reads what is used of it
        if not all(isinstance(checkpoint[name], kind) for name, kind in parts.items()):
            raise TypeError
    except FileNotFoundError:
        die(f"{path} is missing; 03_train_recon.py and 04_train_pairs.py write checkpoints")
    except Exception as e:  # torch.load raises many types for a file that is something else
        die(f"{path} is not a checkpoint of this project ({type(e).__name__}); give one that 03, 04 or 07 wrote")
    return checkpoint


class Data:
    """A folder that 01_embed.py wrote, memory-mapped: images, pages, split, names, cls, tokens and the settings `meta`."""

    def __init__(self, folder):
        self.folder, self.meta = Path(folder), read_json(Path(folder) / "data.json")
        self.images = read_array(self.folder / "images.npy", np.uint8, 4)                       # [N, S, S, 3]
        n, side, *_ = self.images.shape
        if n == 0 or self.images.shape[1:] != (side, side, 3):
            die(f"{folder}/images.npy holds shape {self.images.shape}, expected [N, S, S, 3]; write it again with 01_embed.py")
        for name, dtype, ndim in (("pages", np.int32, 1), ("split", np.uint8, 1), ("names", None, 1),
                                  ("cls", np.float32, 2), ("tokens", np.float16, 3)):
            setattr(self, name, read_array(self.folder / f"{name}.npy", dtype, ndim, n))
        if self.names.dtype.kind != "U" or not isinstance(self.meta.get("encoder"), dict):
            die(f"{folder}: names.npy holds no text, or data.json names no encoder; write them again with 01_embed.py")

    def conditions(self, per_page=1, draw=0):
        """Indices of the conditioning images: the first held-out image of each page, or all images if none is held out.

        per_page: so many of each page (None: all); draw 1, 2, ...: the next so many, where a page has them.
        """
        held_out = np.flatnonzero(self.split == 1)
        if per_page is None or len(held_out) == 0:
            return held_out if len(held_out) else np.arange(len(self.split))
        held_out = held_out[np.argsort(self.pages[held_out], kind="stable")]
        _, first, page = np.unique(self.pages[held_out], return_index=True, return_inverse=True)
        return held_out[(np.arange(len(held_out)) - first[page]) // per_page == draw]

    def embeddings(self, indices, cond, device):
        """What a network of this `cond` reads of the images `indices`: cls [B, D] and / or tokens [B, T, C]."""
        wanted = {"tokens": ["tokens"], "film": ["cls"], "both": ["cls", "tokens"], "none": []}[cond]
        return {name: torch.from_numpy(np.asarray(getattr(self, name)[indices])).to(device) for name in wanted}


def to_uint8(x):
    """[B, 3, H, W] float in [-1, 1] -> [B, H, W, 3] uint8, numpy."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def contact_sheet(path, rows):
    """Save rows of uint8 [S, S, 3] images as one PNG, magnified to about 48 pixels an image; None leaves a gap."""
    size = rows[0][0].shape[0]
    gap = np.full((size + 2, 4, 3), 255, np.uint8)
    frame = ((1, 1), (1, 1), (0, 0))
    lines = [np.concatenate([gap if i is None else np.pad(i, frame, constant_values=255) for i in row], 1) for row in rows]
    sheet = Image.fromarray(np.concatenate(lines))
    zoom = max(1, round(48 / size))
    with writing(path) as f:
        sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.NEAREST).save(f, format="PNG")


# ----------------------------------------------------------------------------------------------------------------------
# Command line, devices, processes. `torchrun --nproc-per-node=N script.py ...` and `python script.py ...` do the same.


def parser(doc, data="folder that 01_embed.py wrote (default runs/PRESET)", device=True, seed=True):
    """An ArgumentParser with the flags that the scripts share; finish with parse()."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, help="size, network and recipe (default: what DATA was made with, else digits16)")
    p.add_argument("--data", type=Path, help=data)
    if device:
        p.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    if seed:
        p.add_argument("--seed", type=int, default=0)
    return p


def parse(p, argv=None):
    """Parse, then fill what the command line left open: preset from the data, data from the preset, the rest from the preset
    and the protocol."""
    args = p.parse_args(argv)
    args.data = args.data or Path("runs") / (args.preset or "digits16")
    if args.preset is None and (args.data / "data.json").exists():
        args.preset = read_json(args.data / "data.json").get("preset")
        if args.preset not in PRESETS:
            die(f"{args.data}/data.json names preset {args.preset}, not one of {', '.join(PRESETS)}; give --preset")
    for key, value in (PRESETS[args.preset or "digits16"] | PROTOCOLS.get(getattr(args, "protocol", None), {})).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    return args


@functools.cache
def start(device):
    """Pick the device and join torchrun's process group if there is one, once. Returns (device, rank, world)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):      # glibc: keep freed memory instead of faulting it in again,
        for option in (-1, -3):                                        # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: a tenth of a CPU step
            ctypes.CDLL(None).mallopt(option, 1 << 25)
    rank, world, local = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    alone = "RANK" not in os.environ                                   # gloo does not know MPS
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and alone else "cpu")
    if device.startswith("cuda:") and not alone:
        die(f"--device {device}: under torchrun every process has its own; give --device cuda")
    if device == "cuda":
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")                     # TF32 for what stays in float32
    if not alone:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=1))
    return torch.device(device), rank, world


def at_least_one(args, *flags):
    """Exit with one line if one of these numbers is less than 1."""
    for flag in flags:
        if getattr(args, flag) < 1:
            die(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")


def wait():
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def writing_array(path, shape, dtype, rank):
    """`with writing_array(...) as a`: one .npy that all ranks fill, each its own rows; it becomes PATH when all are done."""
    temporary = Path(f"{path}.tmp")
    try:
        if rank == 0:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            needed, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(temporary.parent).free
            if needed > free:                                          # a memory map of a full disk dies without a word
                die(f"cannot write {path}: it needs {needed:,} bytes, {free:,} are free")
            np.lib.format.open_memmap(temporary, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):                         # take the space now: nobody else can fill the disk
                with open(temporary, "r+b") as f:
                    os.posix_fallocate(f.fileno(), 0, os.path.getsize(temporary))
        wait()
        array = np.lib.format.open_memmap(temporary, "r+")
        yield array
        array.flush()
        wait()
        if rank == 0:
            os.replace(temporary, path)
    except OSError as e:
        die(f"cannot write {path}: {e.strerror or e}; choose another folder")
    finally:
        if rank == 0:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def progress(iterable, rank=0, **options):
    """tqdm on the first rank: every second on a terminal, every half minute in a log file."""
    return tqdm(iterable, disable=rank > 0, mininterval=1 if sys.stderr.isatty() else 30, **options)


if __name__ == "__main__":
    print(f"{'preset':14}{'size':>5}{'patch':>6}  {'channels':30}{'blocks':20}{'Mparams':>9}{'GFLOPs/image':>14}")
    for name, p in PRESETS.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = UViT(p["size"], p["patch"], p["channels"], p["blocks"], "both", 1280, (49, 320))
            model(torch.empty(1, 3, p["size"], p["size"]), torch.empty(1), torch.empty(1, 1280), torch.empty(1, 49, 320))
        print(f"{name:14}{p['size']:5}{p['patch']:6}  {str(p['channels']):30}{str(p['blocks']):20}"
              f"{sum(w.numel() for w in model.parameters()) / 1e6:9.1f}{counter.get_total_flops() / 1e9:14.3f}")
