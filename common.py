"""common.py: the papers' network and diffusion, which the numbered scripts share, and what goes beyond the papers in sampling.

In reading order: presets, noise schedule, loss, guidance, samplers, U-ViT. The training loop is training.py; files, command lines
and processes are system.py.

The papers, as cited in the comments:
  [S]   Semantica: Conditional Diffusion on Web-Scale Image Pairs leads to Diverse Image Variations, arXiv 2405.14857
  [SD]  simple diffusion: End-to-end diffusion for high resolution images, arXiv 2301.11093
  [PD]  Progressive Distillation for Fast Sampling (v-prediction), arXiv 2202.00512
  [VDM] Variational Diffusion Models (log-SNR as time), arXiv 2107.00630
  [CFG] Classifier-Free Diffusion Guidance, arXiv 2207.12598
  [DDIM] Denoising Diffusion Implicit Models, arXiv 2010.02502
  [DPM++] DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models, arXiv 2211.01095
  [GI]  Applying Guidance in a Limited Interval Improves Sample and Distribution Quality in Diffusion Models, arXiv 2404.07724
  [CADS] Unleashing the Diversity of Diffusion Models through Condition-Annealed Sampling, arXiv 2310.17347
  [TCFG] Tangential Damping Classifier-free Guidance, arXiv 2503.18137
  [2SDM] Two-Stage Diffusion Models: Better Image Synthesis by Explicitly Modeling Semantics, openreview.net/forum?id=fH2wf2w2Ss
        (first as Visual Chain-of-Thought Diffusion Models, arXiv 2303.16187)

    python common.py        # the table of presets: parameters and GFLOPs an image (meta device, no memory)
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

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
    "fullset": dict(per_page=None, variations=1, with_conditions=True),  # against the conditions themselves too
}

# ----------------------------------------------------------------------------------------------------------------------
# Diffusion. Variance preserving: z = alpha x + sigma eps, with lambda = logsnr = log(alpha^2 / sigma^2).


def logsnr_schedule(t, size, noise_size):
    """Shifted cosine log-SNR at time t in [0, 1], shape of t ([SD] "adjusting noise schedules"; log-SNR as in [VDM]).

    logsnr(t) = -2 log tan(a + t (b - a)) + 2 log(noise_size / size), a and b such that the unshifted ends are +-15.
    """
    a, b = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
    return -2 * torch.log(torch.tan(a + t * (b - a))) + 2 * math.log(noise_size / size)


def time_of(logsnr, size, noise_size):
    """t in [0, 1] of a log-SNR, shape of logsnr: the inverse of logsnr_schedule."""
    a, b = math.atan(math.exp(-7.5)), math.atan(math.exp(7.5))
    return (torch.atan(torch.exp(math.log(noise_size / size) - logsnr / 2)) - a) / (b - a)


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


def guide(model, guidance, interval=None, damped=False, anneal=None, **condition):
    """A denoiser (z, logsnr) -> v under classifier-free guidance: (1 + w) v(cond) - w v(null) ([CFG] eq. 6, w as in [S]).

    w = 0 is the plain conditional model and w = -1 the unconditional one. Both branches run as one batch of 2B.
    At a given z, v is affine in x_hat and in eps_hat, and the weights sum to 1: guiding any of the three is the same.
    interval (low, high): guide where low <= logsnr < high and sample plainly elsewhere ([GI]; logsnr = -2 log of its sigma).
    damped: see damp(). anneal: a function (condition, logsnr) -> condition, such as cads().
    """
    def denoise(z, logsnr):
        now = anneal(condition, logsnr) if anneal else condition
        if guidance == 0 or interval and not interval[0] <= logsnr[0] < interval[1]:
            return model(z, logsnr, **now)
        twice = {k: torch.cat([c, c]) for k, c in now.items()}
        drop = torch.arange(2 * len(z), device=z.device) >= len(z)
        v_cond, v_null = model(torch.cat([z, z]), torch.cat([logsnr, logsnr]), drop=drop, **twice).chunk(2)
        if damped:
            v_null = damp(v_cond, v_null, z, logsnr)
        return (1 + guidance) * v_cond - guidance * v_null
    return denoise


def damp(v_cond, v_null, z, logsnr):
    """v_null with its eps_hat projected on the first right singular vector of the two eps_hat, a and b, of each image ([TCFG]).

    That vector is f = cos(u) a + sin(u) b with tan(2 u) = 2 a.b / (a.a - b.b), and a the eps_hat of v_null. a and b are nearly
    alike at high noise, so that (a.f / f.f) f - a cancels; as a = (f - sin(u) (b - a)) / (cos(u) + sin(u)), what the projection
    adds is written here as a share of the part of b - a orthogonal to f. The share is 1/2 where a and b are of equal length, and
    guidance w then nearly w / 2.
    """
    def dot(x, y):
        return (x * y).sum((1, 2, 3), keepdim=True)                    # [B, 1, 1, 1]

    alpha, sigma = alpha_sigma(logsnr)
    a, b = sigma * z + alpha * v_null, sigma * z + alpha * v_cond
    u = torch.atan2(2 * dot(a, b), dot(a, a) - dot(b, b)) / 2
    f, d = u.cos() * a + u.sin() * b, v_cond - v_null                  # b - a = alpha d
    return v_null + u.sin() / (u.cos() + u.sin()) * (d - dot(d, f) / dot(f, f) * f)


def cads(model, config, randn_like, scale, low=0.6, high=0.9):
    """(condition, logsnr) -> condition with noise that fades as t falls from `high` to `low` ([CADS] section 3).

    y <- sqrt(gamma) y + scale sqrt(1 - gamma) n of the standardised y, gamma = 1 below `low`, 0 above `high`, linear between;
    then brought back to the mean and s.d. of y (its mixing factor psi = 1). randn_like(y) -> n.
    """
    def anneal(condition, logsnr):
        t = time_of(logsnr[0], config["network"]["size"], config["noise_size"])
        gamma = float(((high - t) / (high - low)).clamp(0, 1))
        if gamma == 1:
            return condition
        noisy = {}
        for name in [name for name in ("cls", "tokens") if name in condition]:     # in this order: they share streams of noise
            norm = model.cls_norm if name == "cls" else model.token_norm
            y = norm(condition[name])
            n = math.sqrt(gamma) * y + scale * math.sqrt(1 - gamma) * randn_like(y)
            axes = tuple(range(1, y.ndim))
            again = (n - n.mean(axes, keepdim=True)) / n.std(axes, keepdim=True) * y.std(axes, keepdim=True)
            noisy[name] = norm.mean + norm.std * (again + y.mean(axes, keepdim=True))
        return condition | noisy
    return anneal


# A sampler's step from z at logsnr_t to z at logsnr_s, less noise, given x_hat at t; `before` is (x_hat, logsnr) of the step
# before this one, or None. A logsnr is a tensor of one number; noise() -> fresh unit noise like z.


def ddpm_step(z, x_hat, logsnr_t, logsnr_s, noise, before=None, interpolation=0.2):
    """Ancestral sampling ([VDM] appendix A), its variance interpolated in log space ([SD]).

    interpolation: weight of the larger posterior variance (0: sigma_s^2 (1-r), 1: sigma_t^2 (1-r)), r = SNR(t) / SNR(s).
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    r = torch.exp(logsnr_t - logsnr_s)
    one_minus_r = -torch.expm1(logsnr_t - logsnr_s)                    # exact when the two are close
    mean = r * (alpha_s / alpha_t) * z + one_minus_r * alpha_s * x_hat
    return mean + one_minus_r.sqrt() * sigma_t ** interpolation * sigma_s ** (1 - interpolation) * noise()


def ddim_step(z, x_hat, logsnr_t, logsnr_s, noise, before=None):
    """alpha_s x_hat + sigma_s eps_hat with eps_hat = (z - alpha_t x_hat) / sigma_t: no fresh noise ([DDIM] eq. 12, eta = 0)."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(logsnr_t), alpha_sigma(logsnr_s)
    return alpha_s * x_hat + sigma_s * (z - alpha_t * x_hat) / sigma_t


def dpm_solver_step(z, x_hat, logsnr_t, logsnr_s, noise, before=None):
    """DPM-Solver++(2M): DDIM with x_hat extrapolated along logsnr from the step before ([DPM++] algorithm 2).

    h = (logsnr_s - logsnr_t) / 2, r = h before / h; D = x_hat + (x_hat - x_hat before) / (2 r); z_s = sigma_s / sigma_t z -
    alpha_s expm1(-h) D. The first step, with nothing before it, is DDIM's.
    """
    if before is not None:
        x_before, logsnr_before = before
        x_hat = x_hat + (x_hat - x_before) / 2 * (logsnr_s - logsnr_t) / (logsnr_t - logsnr_before)
    return ddim_step(z, x_hat, logsnr_t, logsnr_s, noise)


SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step, "dpm++": dpm_solver_step}


@torch.no_grad()
def sampling_loop(denoise, z, noise, steps, logsnr_of_t, step=ddpm_step, clip=True):
    """From z at t = 1 to x_hat at t = 0: denoise(z [B, C, H, W], logsnr [B]) -> v, then a step of SAMPLERS.

    Returns x_hat of the last step; clip: every x_hat to [-1, 1].
    """
    logsnrs, before = logsnr_of_t(torch.linspace(1, 0, steps + 1, device=z.device)), None
    for i in range(steps):
        logsnr = logsnrs[i:i + 1]
        alpha, sigma = alpha_sigma(logsnr)
        x_hat = alpha * z - sigma * denoise(z, logsnr.expand(len(z)))
        if clip:
            x_hat = x_hat.clamp(-1, 1)
        if i == steps - 1:
            return x_hat
        z, before = step(z, x_hat, logsnr, logsnrs[i + 1:i + 2], noise, before), (x_hat, logsnr)


def generator(device, *key):
    """The random stream of a key such as (seed, step, image): noise depends on what it is for, not on when it is drawn.

    SeedSequence pads with zeros: a key that ends in 0 is the key without it.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(seed)


def randn(generators, shape):
    """[len(generators), *shape] of unit noise, row i from generators[i]: image i is the same in whatever batch it is drawn."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device) for g in generators])


def autocast(device, amp):
    """bfloat16 for matrix products and convolutions; weights, optimiser, sampler and loss stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16")


def to_uint8(x):
    """[B, 3, H, W] float in [-1, 1] -> [B, H, W, 3] uint8, numpy."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def sample(model, config, condition, guidance, noise, steps, amp, step=ddpm_step, **how):
    """uint8 images [B, S, S, 3] for embeddings `condition` of B rows; noise() -> fresh unit noise [B, 3, S, S] each time.

    step: one of SAMPLERS. how: interval, damped and anneal of guide().
    """
    z, condition = noise(), {name: c.float() for name, c in condition.items()}
    with autocast(z.device, amp):
        denoise = guide(model, guidance, **how, **condition)
        return to_uint8(sampling_loop(denoise, z, noise, steps, sampling_schedule(config), step))


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


def waves(x, n=128):
    """x [B] in about +-0.5 -> [B, 2 n]: sines and cosines of n frequencies from 1 to 1,000."""
    angles = x[:, None] * torch.exp(torch.linspace(0, math.log(1000), n, device=x.device))
    return torch.cat([angles.sin(), angles.cos()], -1)


class UViT(nn.Module):
    """v-prediction network: noisy z [B, 3, size, size], logsnr [B], condition -> v_pred [B, 3, size, size].

    cond: "tokens" cross-attends to the encoder's local tokens [B, T, C]; "film" adds the normalised global embedding
    [B, D], through a dense layer, to the noise-level embedding; "both"; "none". drop [B] bool: rows that get the null condition.
    dial: a similarity [B] in [-1, 1] is one more condition, embedded like the noise level; nan: none is given.
    """

    def __init__(self, size, patch, channels, blocks, cond, cls_dim=0, token_shape=(0, 0), dial=False):
        super().__init__()
        *conv_dims, dim = channels
        self.patch, self.cond = patch, cond
        emb_dim = min(dim, 1024)
        self.noise_mlp = nn.Sequential(nn.Linear(256, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        self.dial = nn.Sequential(nn.Linear(256, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim)) if dial else None
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

    def forward(self, z, logsnr, cls=None, tokens=None, drop=None, similarity=None):
        emb = self.noise_mlp(waves(logsnr / 30))                       # [B, E]; logsnr in about +-15
        keep = None if drop is None else ~drop[:, None]                # [B, 1]
        if self.dial is not None:
            given = ~similarity.isnan() if drop is None else ~similarity.isnan() & ~drop
            emb = emb + self.dial(waves(similarity.nan_to_num() / 2)) * given[:, None]
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


if __name__ == "__main__":
    print(f"{'preset':14}{'size':>5}{'patch':>6}  {'channels':30}{'blocks':20}{'Mparams':>9}{'GFLOPs/image':>14}")
    for name, p in PRESETS.items():
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model = UViT(p["size"], p["patch"], p["channels"], p["blocks"], "both", 1280, (49, 320))
            model(torch.empty(1, 3, p["size"], p["size"]), torch.empty(1), torch.empty(1, 1280), torch.empty(1, 49, 320))
        print(f"{name:14}{p['size']:5}{p['patch']:6}  {str(p['channels']):30}{str(p['blocks']):20}"
              f"{sum(w.numel() for w in model.parameters()) / 1e6:9.1f}{counter.get_total_flops() / 1e9:14.3f}")
