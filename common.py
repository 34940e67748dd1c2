"""common.py: what the numbered scripts share.

Part 1 is the papers, in reading order: presets, noise schedule, loss, guidance, DDPM sampler, U-ViT.
Part 2 is small: files, command lines, processes, checkpoints.

  [S]   Semantica, arXiv 2405.14857                    [2SDM] Two-Stage Diffusion Models, arXiv 2303.16187
  [SD]  simple diffusion, arXiv 2301.11093             [VDM]  Variational Diffusion Models, arXiv 2107.00630
  [PD]  Progressive Distillation, arXiv 2202.00512     [CFG]  Classifier-Free Guidance, arXiv 2207.12598
"""
import argparse
import atexit
import contextlib
import json
import math
import os
import sys
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.distributed.checkpoint import state_dict as sharding
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

# ======================================================================================================================
# Part 1: the papers
# ----------------------------------------------------------------------------------------------------------------------
# Presets: everything that differs between a laptop and a cluster; flags override what users change most.
# channels and blocks: one entry a stage, each at half the resolution of the one before. The last `transformers` stages
# are transformers, the others convolutions; only the last one sees the condition's tokens ([S] 3.4).

SMALL = dict(size=16, patch=1, channels=(32, 64, 128), blocks=(1, 1, 4), transformers=1, cond_drop=0.1, loss="v",
             noise_size=16, warmup=100, decay="cosine", ema=0.998, amp="none", sample_steps=25, time_power=1.5)

# From the text of [S] (6.1): channels, blocks of the first three stages and of the last, two transformer stages, batch,
# loss in epsilon, noise_size, DDPM with interpolation 0.2, 300,000 steps of the ablations.
# Named there, but unreadable in our copy. From [SD], by memory: lr, Adam's betas and epsilon (in 03), ema. Guessed:
# size, patch, sample_steps.
# Not named there. From [SD], by memory: warmup, constant rate. Our choice: three blocks in the stage of 512 channels,
# cond_drop, as many steps at 256 px.
# No dropout and no clipping of gradients.
PAPER = dict(transformers=2, cond="tokens", cond_drop=0.1, loss="eps", noise_size=32, batch=2048, lr=1e-4, ema=0.9999,
             warmup=10_000, decay="constant", steps=300_000, amp="auto", sample_steps=128, time_power=1, encoder_px=224)

PRESETS = {
    "digits16": SMALL | dict(cond="both", batch=32, lr=2e-3, steps=2500, encoder_px=128),
    "full16": SMALL | dict(cond="tokens", batch=8, lr=7e-4, steps=30_000, encoder_px=128),
    "emoji16": SMALL | dict(cond="tokens", batch=8, lr=7e-4, steps=20_000, encoder_px=224),
    "emoji64": SMALL | dict(size=64, channels=(64, 128, 256, 512), blocks=(2, 2, 2, 8), cond="both", noise_size=32,
                            batch=256, lr=5e-4, steps=20_000, amp="auto", sample_steps=64, encoder_px=224),
    "semantica64": PAPER | dict(size=64, patch=1, channels=(128, 128, 256, 512, 1024), blocks=(3, 3, 3, 3, 16)),
    "semantica256": PAPER | dict(size=256, patch=2, channels=(128, 256, 1024, 2048, 4096), blocks=(2, 3, 3, 3, 12)),
}

# ----------------------------------------------------------------------------------------------------------------------
# Diffusion. Variance preserving: z = alpha x + sigma eps, with logsnr = log(alpha^2 / sigma^2).


def logsnr_schedule(t, size, noise_size):
    """Shifted cosine log-SNR at time t in [0, 1], shape of t ([SD] "adjusting noise schedules").

    logsnr(t) = -2 log tan(a + t (b - a)) + 2 log(noise_size / size), a and b such that the unshifted ends are +-15.
    """
    a, b = math.atan(math.exp(-15 / 2)), math.atan(math.exp(15 / 2))
    return -2 * torch.log(torch.tan(a + t * (b - a))) + 2 * math.log(noise_size / size)


def alpha_sigma(logsnr):
    """alpha = sqrt(sigmoid(logsnr)), sigma = sqrt(sigmoid(-logsnr)), [B, 1, 1, 1] each, to scale images ([VDM] 3)."""
    logsnr = logsnr[:, None, None, None]
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def diffusion_loss(v_pred, x, eps, logsnr, kind):
    """Mean squared error of each image, [B], in v ([PD] appendix D) or in eps ([S] eq. 1).

    v = alpha eps - sigma x. With eps_hat = sigma z + alpha v_pred, eps_hat - eps = alpha (v_pred - v).
    """
    alpha, sigma = alpha_sigma(logsnr)
    error = v_pred - (alpha * eps - sigma * x)
    if kind == "eps":
        error = alpha * error
    return error.square().mean(dim=(1, 2, 3))


def guide(model, guidance, condition):
    """A denoiser (z, logsnr) -> v under classifier-free guidance, (1 + w) v(cond) - w v(null) ([CFG] eq. 6).

    condition: {"cls": [B, D], "tokens": [B, T, C]}, what the model reads. w = 0 is plain conditional sampling.
    Both branches run as one batch of 2B. At a given z, v is affine in x_hat and in eps_hat, and the weights sum to 1:
    guiding any of the three is the same.
    """
    def denoise(z, logsnr):
        if guidance == 0:
            return model(z, logsnr, **condition)
        twice = {name: torch.cat([c.float(), c.float()]) for name, c in condition.items()}
        drop = torch.arange(2 * len(z), device=z.device) >= len(z)
        v_cond, v_null = model(torch.cat([z, z]), torch.cat([logsnr, logsnr]), drop=drop, **twice).chunk(2)
        return (1 + guidance) * v_cond - guidance * v_null
    return denoise


def ddpm_step(z, x_hat, logsnr_t, logsnr_s, noise, interpolation):
    """From z at t to z at s < t: ancestral sampling ([VDM] appendix A), its variance interpolated in log space ([SD]).

    mean = r (alpha_s / alpha_t) z + (1 - r) alpha_s x_hat, with r = SNR(t) / SNR(s).
    variance between sigma_s^2 (1 - r) at interpolation 0, the posterior's, and sigma_t^2 (1 - r) at 1. [SD], [S]: 0.2.
    """
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    r = torch.exp(logsnr_t - logsnr_s)
    one_minus_r = -torch.expm1(logsnr_t - logsnr_s)                    # exact when the two are close
    mean = r * (alpha_s / alpha_t) * z + one_minus_r * alpha_s * x_hat
    return mean + one_minus_r.sqrt() * sigma_t ** interpolation * sigma_s ** (1 - interpolation) * noise


@torch.no_grad()
def ddpm(denoise, noise, logsnrs, interpolation=0.2, clip=True):
    """Sample along logsnrs [steps + 1], from noise at the first to x_hat for the last.

    denoise(z [B, C, H, W], logsnr [B]) -> v; noise() -> unit noise like z; clip: every x_hat to [-1, 1].
    """
    z = noise()
    for i in range(len(logsnrs) - 1):
        logsnr_t, logsnr_s = logsnrs[i:i + 1], logsnrs[i + 1:i + 2]
        alpha, sigma = alpha_sigma(logsnr_t)
        x_hat = alpha * z - sigma * denoise(z, logsnr_t.expand(len(z)))
        if clip:
            x_hat = x_hat.clamp(-1, 1)
        if i + 2 < len(logsnrs):                                       # the last step gives x_hat itself
            z = ddpm_step(z, x_hat, logsnr_t, logsnr_s, noise(), interpolation)
    return x_hat


def sample_images(model, condition, generators, guidance, config, interpolation=0.2):
    """Images [B, S, S, 3] uint8 for the embeddings `condition` of B rows; row i takes its noise from generators[i].

    config: size, noise_size, sample_steps, amp and time_power. Times are u^time_power for even u: above 1, more of a
    few steps fall on low noise.
    """
    u = torch.linspace(1, 0, config["sample_steps"] + 1, device=generators[0].device)
    logsnrs = logsnr_schedule(u ** config["time_power"], config["size"], config["noise_size"])
    noise = partial(randn, generators, (3, config["size"], config["size"]))
    with autocast(u.device, config["amp"]):
        x = ddpm(guide(model, guidance, condition), noise, logsnrs, interpolation)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def generator(device, *key):
    """The random stream of a key such as (seed, step, image): noise depends on what it is for, not on when it is drawn.

    Keys of training have three entries, those of other uses four, the last one above 0 (the key is padded with zeros).
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def randn(generators, shape):
    """[len(generators), *shape] of unit noise, row i from generators[i]: no image depends on its batch."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


# ----------------------------------------------------------------------------------------------------------------------
# The U-ViT of [SD] (not the flat U-ViT of Bao et al.): convolutional stages with skips, transformers where it is small.


def zero(layer):
    """Zero a layer's weights: a residual branch that starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Standardise(nn.Module):
    """(x - mean) / std of each feature over the training set, at most +-10: fitted once, kept in the checkpoint.

    Without the limit, one feature that hardly varies in training can be at 100 for a new image, and ruin its samples.
    """

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, array, rows):
        """To these rows of array [N, ..., dim], or some of them. A feature that never varies there keeps its scale."""
        rows = rows[::1 + len(rows) * array[0].size // 2 ** 27]        # half a gigabyte at most
        x = torch.from_numpy(array[rows].astype(np.float32)).flatten(0, -2)
        self.mean.copy_(x.mean(0))
        self.std.copy_(torch.where(x.std(0) > 0, x.std(0) + 1e-3, 1))

    def forward(self, x):
        return ((x.float() - self.mean) / self.std).clamp(-10, 10)


def group_norm(dim):
    """GroupNorm, 16 channels a group. One channel a group would erase each channel's mean, and the picture's tint."""
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
        q, k, v = (a.unflatten(-1, (self.heads, -1)).transpose(1, 2) for a in (self.q(x), k, v))
        h = F.scaled_dot_product_attention(q, k, v)                   # [B, heads, N, D / heads]
        return self.out(h.transpose(1, 2).flatten(2))                 # [B, N, D]


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the condition's tokens (after every self-attention, [S] 3.4), MLP.

    FiLM by the embedding. x [B, N, D] -> same, context [B, T, D].
    """

    def __init__(self, dim, emb_dim, cross):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim)
        self.norm2, self.cross = (nn.LayerNorm(dim), Attention(dim)) if cross else (None, None)
        self.norm3 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.film = nn.Linear(emb_dim, 4 * dim)

    def forward(self, x, emb, context=None):
        scale1, shift1, scale2, shift2 = self.film(emb)[:, None].chunk(4, -1)            # [B, 1, D] each
        h = self.norm1(x) * (1 + scale1) + shift1
        x = x + self.attention(h, h)
        if self.cross is not None:
            x = x + self.cross(self.norm2(x), context)
        return x + self.mlp(self.norm3(x) * (1 + scale2) + shift2)


class Stage(nn.Module):
    """n blocks at one resolution: convolutions, or transformers with positions on a grid of `grid` by `grid`."""

    def __init__(self, dim, emb_dim, n, grid=None, cross=False):
        super().__init__()
        self.pos = nn.Parameter(torch.randn(grid * grid, dim) * 0.02) if grid else None
        block = partial(TransformerBlock, cross=cross) if grid else ResBlock
        self.blocks = nn.ModuleList(block(dim, emb_dim) for _ in range(n))

    def forward(self, h, emb, *context):
        if self.pos is None:
            for block in self.blocks:
                h = block(h, emb)                                      # [B, C, H, W]
            return h
        x = h.flatten(2).transpose(1, 2) + self.pos                    # [B, N, C], N = H W
        for block in self.blocks:
            x = block(x, emb, *context)
        return x.transpose(1, 2).reshape(h.shape)


def sinusoids(x, n=128):
    """x [B] in about +-0.5 -> [B, 2 n]: sines and cosines of n frequencies from 1 to 1,000."""
    angles = x[:, None] * torch.exp(torch.linspace(0, math.log(1000), n, device=x.device))
    return torch.cat([angles.sin(), angles.cos()], -1)


class UViT(nn.Module):
    """v-prediction network: noisy z [B, 3, size, size], logsnr [B], condition -> v_pred [B, 3, size, size].

    told: what the condition is, {"cls": [D], "tokens": [T, C]}, both, one or none ({}).
    cls [B, D]: the standardised global embedding, through a dense layer, is added to the embedding of the noise level.
    tokens [B, T, C]: the lowest stage cross-attends to the encoder's local embeddings.
    drop [B] bool: rows that get the null condition.
    """

    def __init__(self, size, patch, channels, blocks, transformers, told):
        super().__init__()
        dim = channels[-1]
        emb_dim = min(dim, 1024)
        self.patch = patch
        self.noise_mlp = nn.Sequential(nn.Linear(256, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.norm = nn.ModuleDict({name: Standardise(shape[-1]) for name, shape in told.items()})
        if "cls" in told:
            self.cls_in = nn.Linear(told["cls"][0], emb_dim)
            self.cls_null = nn.Parameter(torch.zeros(emb_dim))
        if "tokens" in told:
            self.token_in = nn.Linear(told["tokens"][1], dim)
            self.token_pos = nn.Parameter(torch.randn(told["tokens"][0], dim) * 0.02)
            self.token_null = nn.Parameter(torch.randn(dim) * 0.02)
        self.conv_in = nn.Conv2d(3, channels[0], patch, patch) if patch > 1 else nn.Conv2d(3, channels[0], 3, padding=1)
        self.down, self.down_conv, self.up_conv, self.up = (nn.ModuleList() for _ in range(4))
        grids = [size // patch // 2 ** i for i in range(len(channels))]
        for i, c in enumerate(channels[:-1]):
            grid = grids[i] if i >= len(channels) - transformers else None
            self.down.append(Stage(c, emb_dim, blocks[i], grid))
            self.down_conv.append(nn.Conv2d(c, channels[i + 1], 1))    # after average pooling
            self.up_conv.append(nn.Conv2d(channels[i + 1], c, 1))      # before nearest-neighbour upsampling
            self.up.append(Stage(c, emb_dim, blocks[i], grid))
        self.middle = Stage(dim, emb_dim, blocks[-1], grids[-1], cross="tokens" in told)
        self.norm_out = group_norm(channels[0])
        self.conv_out = zero(nn.Conv2d(channels[0], 3 * patch * patch, 3, padding=1))

    def forward(self, z, logsnr, cls=None, tokens=None, drop=None):
        drop = torch.zeros_like(logsnr, dtype=torch.bool) if drop is None else drop
        emb = self.noise_mlp(sinusoids(logsnr / 30))                   # [B, E]; logsnr in about +-15
        if cls is not None:
            emb = emb + torch.where(drop[:, None], self.cls_null, self.cls_in(self.norm["cls"](cls)))
        emb, context = F.silu(emb), None
        if tokens is not None:
            context = self.token_in(self.norm["tokens"](tokens)) + self.token_pos            # [B, T, D]
            context = torch.where(drop[:, None, None], self.token_null, context)

        h, skips = self.conv_in(z), []                                 # [B, C0, S, S], S = size / patch
        for stage, down_conv in zip(self.down, self.down_conv):
            h = stage(h, emb)
            skips.append(h)
            h = down_conv(F.avg_pool2d(h, 2))                          # half the resolution, the next stage's channels
        h = self.middle(h, emb, context)                               # [B, D, H, W]
        for stage, up_conv in zip(reversed(self.up), reversed(self.up_conv)):
            h = (F.interpolate(up_conv(h), scale_factor=2) + skips.pop()) / math.sqrt(2)
            h = stage(h, emb)
        h = self.conv_out(F.silu(self.norm_out(h)))                    # [B, 3 patch^2, S, S]
        return F.pixel_shuffle(h, self.patch).float()                  # [B, 3, size, size]


# ======================================================================================================================
# Part 2: files, command lines, processes, checkpoints
# ----------------------------------------------------------------------------------------------------------------------
# Files. A file has its final name only when it is whole.


def die(message):
    """One line on standard error and exit code 2: bad arguments or bad input."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def load(path, writer="01_embed.py"):
    """An array (.npy, memory-mapped), a .json or a checkpoint (.pt). Exits with one line if it cannot be read."""
    try:
        if Path(path).suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if Path(path).suffix == ".json":
            return json.loads(Path(path).read_text())
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:                                             # a damaged file raises many types
        reason = "is missing" if isinstance(e, FileNotFoundError) else f"cannot be read ({type(e).__name__})"
        die(f"{path} {reason}; {writer} writes it")


@contextlib.contextmanager
def writing(path):
    """`with writing(path) as f`: f is PATH.tmp, opened for bytes; it becomes PATH at the end, or nothing does."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    with open(temporary, "wb") as f:
        yield f
        f.flush()
        os.fsync(f.fileno())                                           # on the disk before its name: power may fail
    os.replace(temporary, path)


@contextlib.contextmanager
def writing_array(path, shape, dtype):
    """`with writing_array(...) as a`: one .npy that all processes fill, each its own rows, then PATH."""
    with writing(path) if rank() == 0 else contextlib.nullcontext() as f:
        if rank() == 0:
            np.lib.format.open_memmap(f.name, "w+", dtype, shape)
        barrier()
        array = np.lib.format.open_memmap(f"{path}.tmp", "r+")
        yield array
        array.flush()
        barrier()


def contact_sheet(path, rows):
    """Save rows of uint8 [S, S, 3] images as one PNG with white frames, magnified to about 48 pixels an image."""
    rows = [np.concatenate([np.pad(i, ((1, 1), (1, 1), (0, 0)), constant_values=255) for i in row], 1) for row in rows]
    sheet = Image.fromarray(np.concatenate(rows))
    zoom = max(1, round(48 * len(rows) / sheet.height))
    with writing(path) as f:
        sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.NEAREST).save(f, format="PNG")


def condition_arrays(folder, cond, cls=None):
    """What a network with this `cond` is told of each image: {"cls": [N, D], "tokens": [N, T, C]}, memory-mapped.

    cls: an array of 07 in the place of cls.npy.
    """
    names = {"film": ["cls"], "tokens": ["tokens"], "both": ["cls", "tokens"], "none": []}[cond]
    files = {"cls": cls or folder / "cls.npy", "tokens": folder / "tokens.npy"}
    return {name: load(files[name]) for name in names}


def take(arrays, indices, device="cpu"):
    """Rows of condition_arrays() as tensors, with a first axis of len(indices)."""
    return {name: torch.from_numpy(np.asarray(array[indices])).to(device) for name, array in arrays.items()}


def checksum(array):
    """A number that tells this array from others: of all its bytes if it is small, else of 5,000 rows from all over."""
    return zlib.crc32(np.ascontiguousarray(array[::1 + len(array) // 5000]))


# ----------------------------------------------------------------------------------------------------------------------
# Command lines and processes. `torchrun --nproc-per-node=N script.py ...` and `python script.py ...` do the same.


def number(kind, low, high=math.inf):
    """An argparse type: a finite number in [low, high]."""
    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g}]")
        return value
    return parse


count = number(int, 1)
natural = number(int, 0)
positive = number(float, 1e-12)
share = number(float, 0, 1)


def parser(doc):
    """An ArgumentParser with the flags that all scripts share; finish with parse()."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: die(f"{message}; see --help")
    p.add_argument("--data", type=Path, default=Path("runs/digits16"), help="folder of 01_embed.py (%(default)s)")
    p.add_argument("--preset", choices=PRESETS, help="size, network and recipe (default: what DATA was made with)")
    p.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    p.add_argument("--seed", type=natural, default=0)
    return p


def parse(p):
    """Parse. What the command line leaves open takes the preset's value, and the preset is that of --data."""
    known, _ = p.parse_known_args()
    made = load(known.data / "data.json")
    preset = known.preset or made["preset"]
    if PRESETS[preset]["size"] != made["encoder"]["size"]:
        die(f"{known.data} has images of {made['encoder']['size']} px, {preset} needs {PRESETS[preset]['size']} px")
    p.set_defaults(preset=preset, **PRESETS[preset])
    return p.parse_args()


def rank():
    """The number of this process among those of torchrun, 0 without it."""
    return dist.get_rank() if dist.is_initialized() else 0


def barrier():
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def start(device=None):
    """Pick the device, and join torchrun's process group if there is one. Returns (device, rank, world)."""
    try:
        device = torch.device(device or torch.accelerator.current_accelerator(True) or "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:                        # not in this build, or not in this machine
        die(f"--device {device}: {str(e).splitlines()[0]}")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")                     # TF32 for what stays in float32
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)                    # its threads must end before the interpreter
    return device, rank(), dist.get_world_size() if dist.is_initialized() else 1


def autocast(device, amp):
    """bfloat16 for matrix products and convolutions; weights, optimiser, sampler and loss stay in float32.

    amp: "bf16", "none", or "auto": bf16 where a GPU has it natively.
    """
    native = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16" or (amp == "auto" and native))


# ----------------------------------------------------------------------------------------------------------------------
# Training on one process or many. A checkpoint is one plain .pt {model, ema, optimizer, step, config}.


def distribute(model, ema, fsdp=False, recompute=False, compiled=False):
    """The network to call in training: the model, replicated (DDP) or sharded (FSDP2) over the processes.

    recompute: blocks run again in the backward pass, so that their activations need no memory in between.
    """
    blocks = [m for m in (*ema.modules(), *model.modules()) if isinstance(m, (ResBlock, TransformerBlock))]
    for block in blocks if recompute else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for module in (*blocks, ema, model) if fsdp else ():
        fully_shard(module, reshard_after_forward=True)
    net = torch.compile(model) if compiled else model
    return DistributedDataParallel(net, forward_sync_buffers=False) if dist.is_initialized() and not fsdp else net


WHOLE = sharding.StateDictOptions(full_state_dict=True, cpu_offload=True)                # gathered to the first process


def save(path, model, ema, optimizer, step, config):
    """Write {model, ema, optimizer, step, config} to `path`, from all processes. Never weights that are not finite."""
    weights, moments = sharding.get_state_dict(model, optimizer, options=WHOLE)
    average = sharding.get_model_state_dict(ema, options=WHOLE)
    if rank() == 0:
        if not all(w.isfinite().all() for w in average.values()):
            die(f"{path}: the weights are not finite at step {step}; the last good checkpoint is as it was. Lower --lr")
        with writing(path) as f:
            torch.save(dict(model=weights, ema=average, optimizer=moments, step=step, config=config), f)


def resume(out, model, ema, optimizer, config):
    """Load what there is of this training from OUT.partial; returns the steps done. Ends the script if OUT is there.

    Exits with one line if what is there was trained with another config.
    """
    found = out if out.exists() else Path(f"{out}.partial")
    if not found.exists():
        return 0
    state = load(found)
    other = [key for key in {**state["config"], **config} if config.get(key) != state["config"].get(key)]
    if other:
        die(f"{found} was trained with other {', '.join(other)}; give another --out or move it away")
    if found == out:
        print(f"{out} is there already, {state['step']} steps")
        sys.exit()
    sharding.set_model_state_dict(model, state["model"], options=WHOLE)
    sharding.set_model_state_dict(ema, state["ema"], options=WHOLE)
    sharding.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=WHOLE)
    return state["step"]
