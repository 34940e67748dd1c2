"""beyond/sample.py: 05 with other samplers, other kinds of guidance, and the similarity of a model of beyond/dial.py.

A changed copy of 05, without --y, --cls, --beside and --amp. It reads and writes what 05 does, and without one of these
further flags it draws the same bits:

  --sampler ddim, dpm++                samplers without fresh noise, for few steps: ddim_step, extrapolate
  --guidance-interval LOW HIGH         guide only where the log-SNR lies in between: guide
  --cads SCALE                         noise on the condition, which fades as the noise of the image does: cads
  --tcfg                               tangential damping of the unconditional prediction: damp
  --similarity S [S ...]               to the condition. Of several, sample j takes the j-th, over and over

  [DDIM]  Denoising Diffusion Implicit Models, arXiv 2010.02502
  [DPM++] DPM-Solver++, arXiv 2211.01095
  [GI]    Applying Guidance in a Limited Interval, arXiv 2404.07724
  [CADS]  Condition-Annealed Sampling, arXiv 2310.17347
  [TCFG]  Tangential Damping Classifier-free Guidance, arXiv 2503.18137

    python -m beyond.sample --sampler ddim --sample-steps 8
    python -m beyond.sample --guidance 2 --guidance-interval -2 4
    python -m beyond.sample --checkpoint runs/digits16/dial.pt --similarity 1 0.9 0.8 0.7 0.6 0.5 --variations 6
"""
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import beyond
import common

# ----------------------------------------------------------------------------------------------------------------------
# Guidance


def guide(model, guidance, condition, interval=None, damped=False, anneal=None):
    """common.guide, and besides: a denoiser (z, logsnr) -> v under classifier-free guidance.

    interval (low, high): guide where low <= logsnr < high, and sample plainly elsewhere ([GI] eq. 6; its noise level is
    exp(-logsnr / 2)). damped: see damp(). anneal: a function (condition, logsnr) -> condition, as cads() makes.
    """
    def denoise(z, logsnr):
        now = anneal(condition, logsnr) if anneal else condition
        outside = interval is not None and not interval[0] <= logsnr[0] < interval[1]
        if guidance == 0 or outside:
            return model(z, logsnr, **now)
        twice = {name: torch.cat([c.float(), c.float()]) for name, c in now.items()}
        drop = torch.arange(2 * len(z), device=z.device) >= len(z)
        v_cond, v_null = model(torch.cat([z, z]), torch.cat([logsnr, logsnr]), drop=drop, **twice).chunk(2)
        if damped:
            v_null = damp(v_cond, v_null, z, logsnr)
        return (1 + guidance) * v_cond - guidance * v_null
    return denoise


def damp(v_cond, v_null, z, logsnr):
    """v_null, its eps_hat projected on the first right singular vector of the two eps_hat of each image ([TCFG] 3.3).

    With a the eps_hat of v_null and b that of v_cond, this vector is along f = cos(u) a + sin(u) b, where
    tan(2 u) = 2 a.b / (a.a - b.b). At high noise a and b are nearly alike, and (a.f / f.f) f - a cancels. But
    a = (f - sin(u) (b - a)) / (cos(u) + sin(u)), so the projection adds a share sin(u) / (cos(u) + sin(u)) of the part
    of b - a orthogonal to f. If a and b are of equal length the share is 1/2: guidance w is then nearly w / 2.
    """
    def dot(x, y):
        return (x * y).sum((1, 2, 3), keepdim=True)                    # [B, 1, 1, 1]

    alpha, sigma = common.alpha_sigma(logsnr)
    a = sigma * z + alpha * v_null
    b = sigma * z + alpha * v_cond
    u = torch.atan2(2 * dot(a, b), dot(a, a) - dot(b, b)) / 2
    f = u.cos() * a + u.sin() * b
    d = v_cond - v_null                                                # b - a = alpha d
    return v_null + u.sin() / (u.cos() + u.sin()) * (d - dot(d, f) / dot(f, f) * f)


def time_of(logsnr, size, noise_size):
    """t in [0, 1] of a log-SNR: the inverse of common.logsnr_schedule."""
    a = math.atan(math.exp(-15 / 2))
    b = math.atan(math.exp(15 / 2))
    return (torch.atan(torch.exp(math.log(noise_size / size) - logsnr / 2)) - a) / (b - a)


def cads(norms, config, generators, scale, low=0.6, high=0.9):
    """(condition, logsnr) -> condition with noise, which fades as t falls from `high` to `low` ([CADS] section 3).

    y <- sqrt(gamma) y + scale sqrt(1 - gamma) n, with y the standardised condition and n unit noise. gamma is 1 below
    `low`, 0 above `high`, linear between. Then y is brought back to its mean and s.d. (mixing factor psi = 1).
    norms: the network's {"cls": Standardise, "tokens": Standardise}. A similarity gets no noise.
    """
    def anneal(condition, logsnr):
        t = time_of(logsnr[0], config["size"], config["noise_size"])
        gamma = ((high - t) / (high - low)).clamp(0, 1).item()
        if gamma == 1:
            return condition
        noisy = {}
        for name, norm in norms.items():
            c = condition[name].float()                                # [B, D] or [B, T, C]
            mean, std = norm.mean[:c.shape[-1]], norm.std[:c.shape[-1]]                  # without the dial's columns
            y = (c - mean) / std
            n = math.sqrt(gamma) * y + scale * math.sqrt(1 - gamma) * common.randn(generators, y.shape[1:])
            axes = tuple(range(1, y.ndim))
            n = (n - n.mean(axes, keepdim=True)) / n.std(axes, keepdim=True)
            noisy[name] = mean + std * (n * y.std(axes, keepdim=True) + y.mean(axes, keepdim=True))
        return condition | noisy
    return anneal


def with_dial(model):
    """The network of beyond/dial.py, told {"cls": [B, D], "similarity": [B], ...}; nan is no similarity."""
    def network(z, logsnr, cls, similarity, **rest):
        return model(z, logsnr, torch.cat([cls, beyond.embed(similarity)], 1), **rest)
    return network


# ----------------------------------------------------------------------------------------------------------------------
# Samplers


def ddim_step(z, x_hat, logsnr_t, logsnr_s):
    """From z at t to z at s < t, without fresh noise ([DDIM] eq. 12, eta = 0).

    alpha_s x_hat + sigma_s eps_hat, with eps_hat = (z - alpha_t x_hat) / sigma_t.
    """
    alpha_t, sigma_t = common.alpha_sigma(logsnr_t)
    alpha_s, sigma_s = common.alpha_sigma(logsnr_s)
    return alpha_s * x_hat + sigma_s * (z - alpha_t * x_hat) / sigma_t


def extrapolate(x_hat, x_before, logsnr_before, logsnr_t, logsnr_s):
    """x_hat as DPM-Solver++(2M) gives it to a step of DDIM: along logsnr from the step before ([DPM++] algorithm 2).

    D = x_hat + (x_hat - x_before) / (2 r), where r is the length of the step before over that of this one.
    """
    r = (logsnr_t - logsnr_before) / (logsnr_s - logsnr_t)
    return x_hat + (x_hat - x_before) / (2 * r)


@torch.no_grad()
def sample(denoise, noise, logsnrs, sampler="ddpm", interpolation=0.2, clip=True):
    """common.ddpm with a choice of the step: "ddpm", "ddim" or "dpm++"."""
    z, before = noise(), None
    for i in range(len(logsnrs) - 1):
        logsnr_t, logsnr_s = logsnrs[i:i + 1], logsnrs[i + 1:i + 2]
        alpha, sigma = common.alpha_sigma(logsnr_t)
        x_hat = alpha * z - sigma * denoise(z, logsnr_t.expand(len(z)))
        if clip:
            x_hat = x_hat.clamp(-1, 1)
        if i + 2 == len(logsnrs):
            break
        if sampler == "ddpm":
            z = common.ddpm_step(z, x_hat, logsnr_t, logsnr_s, noise(), interpolation)
        elif sampler == "ddim" or before is None:
            z = ddim_step(z, x_hat, logsnr_t, logsnr_s)
        else:
            z = ddim_step(z, extrapolate(x_hat, *before, logsnr_t, logsnr_s), logsnr_t, logsnr_s)
        before = x_hat, logsnr_t
    return x_hat


def sample_images(denoise, generators, config, sampler, interpolation):
    """common.sample_images for a denoiser (z, logsnr) -> v: images [B, S, S, 3] uint8."""
    u = torch.linspace(1, 0, config["sample_steps"] + 1, device=generators[0].device)
    logsnrs = common.logsnr_schedule(u ** config["time_power"], config["size"], config["noise_size"])
    noise = partial(common.randn, generators, (3, config["size"], config["size"]))
    with common.autocast(u.device, config["amp"]):
        x = sample(denoise, noise, logsnrs, sampler, interpolation)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


# ----------------------------------------------------------------------------------------------------------------------
# From here on 05


def conditioning_images(pages, split, per_page, draw):
    """[n] indices: `per_page` held-out images of each page, at random by draw; all images if none is held out."""
    held_out = np.flatnonzero(split == 1)
    if len(held_out) == 0:
        return np.arange(len(split))
    shuffled = np.random.default_rng(draw).permutation(held_out)
    shuffled = shuffled[np.argsort(pages[shuffled], kind="stable")]
    _, first, page = np.unique(pages[shuffled], return_index=True, return_inverse=True)
    return shuffled[np.arange(len(shuffled)) - first[page] < per_page]


def load_model(path, device):
    """The network of a checkpoint with its averaged weights, and its config."""
    checkpoint = common.load(path, "04_train_pairs.py or beyond/dial.py")
    model = common.UViT(**checkpoint["config"]["network"])
    model.load_state_dict(checkpoint["ema"])
    return model.to(device).eval(), checkpoint["config"], checkpoint["step"]


def main():
    p = common.parser(__doc__)
    p.add_argument("--checkpoint", type=Path, help="what 03, 04 or dial.py wrote (default DATA/pairs.pt)")
    p.add_argument("--out", type=Path, help="folder to write (default DATA/samples/CHECKPOINT_wGUIDANCE...)")
    p.add_argument("--guidance", type=common.number(float, -1), help="w; 0 is plain conditional sampling (default 1)")
    p.add_argument("--per-page", type=common.count, default=1, help="conditions of each page")
    p.add_argument("--variations", type=common.count, default=10, help="k, samples of each condition (10)")
    p.add_argument("--draw", type=common.natural, default=0, help="which conditions: 0, 1, 2, ... are random choices")
    p.add_argument("--sampler", choices=["ddpm", "ddim", "dpm++"], default="ddpm")
    p.add_argument("--sample-steps", type=common.count, help="steps of the sampler")
    p.add_argument("--time-power", type=common.positive, help="the sampler's times are u^P for even u")
    p.add_argument("--interpolation", type=common.share, default=0.2, help="of ddpm's two log-variances (default 0.2)")
    level = dict(type=common.number(float, -100, 100), metavar=("LOW", "HIGH"))
    p.add_argument("--guidance-interval", nargs=2, **level, help="guide only at a log-SNR in between")
    p.add_argument("--cads", type=common.positive, metavar="SCALE", help="noise on the condition while t is above 0.6")
    p.add_argument("--tcfg", action="store_true", help="tangential damping of the unconditional prediction")
    p.add_argument("--similarity", type=common.number(float, -1, 1), nargs="+", metavar="S", help="1 is a copy")
    p.add_argument("--batch-images", type=common.count, default=100, help="images a forward pass")
    args = common.parse(p)
    device, rank, world = common.start(args.device)
    path = args.checkpoint or args.data / "pairs.pt"
    model, config, step = load_model(path, device)

    w = args.guidance if args.guidance is not None else float(config["cond_drop"] > 0)
    if w != 0 and (config["cond_drop"] == 0 or config["cond"] == "none"):
        common.die(f"{path} was trained without a null condition, so it samples at --guidance 0 only")
    dial = config.get("dial", False)
    if args.similarity and not dial:
        common.die(f"{path} has no dial for --similarity; train one with python -m beyond.dial")
    if args.guidance_interval and not args.guidance_interval[0] < args.guidance_interval[1]:
        common.die("--guidance-interval: LOW must be below HIGH")
    if config["encoder"] != common.load(args.data / "data.json")["encoder"]:
        common.die(f"{path} was trained with the encoder {config['encoder']}; run 01_embed.py with it on {args.data}")
    told = common.condition_arrays(args.data, config["cond"])
    shapes = {name: array.shape[1:] for name, array in told.items()}
    if dial:
        shapes["cls"] = (shapes["cls"][0] + beyond.DIAL,)
    if config["cls"] or shapes != config["network"]["told"]:
        common.die(f"{path} was trained with --cls or with arrays of shape {config['network']['told']}, not {shapes}")
    pages, split, k = common.load(args.data / "pages.npy"), common.load(args.data / "split.npy"), args.variations
    conditions = conditioning_images(pages, split, args.per_page, args.draw)
    variant = [args.sampler] if args.sampler != "ddpm" else []
    variant += ["{:g}to{:g}".format(*args.guidance_interval)] if args.guidance_interval else []
    variant += [f"cads{args.cads:g}"] if args.cads else []
    variant += ["tcfg"] if args.tcfg else []
    asked = [f"s{s:g}" for s in args.similarity or []]
    out = args.out or args.data / "samples" / "_".join([f"{path.stem}_w{w:g}", *variant, *asked])
    how = {name: getattr(args, name) for name in ("sample_steps", "time_power", "amp")}

    jobs = np.stack(np.divmod(np.arange(len(conditions) * k), k), 1)                     # [n k, 2]: condition, sample
    starts = range(rank * args.batch_images, len(jobs), world * args.batch_images)       # whole batches to each process
    shape, seconds = (len(conditions), k, config["size"], config["size"], 3), []
    with common.writing_array(out / "samples.npy", shape, np.uint8) as samples:
        for start in tqdm(starts, out.name, unit="batch", disable=True if rank else None):
            clock = time.perf_counter()
            i, j = jobs[start:start + args.batch_images].T
            generators = [common.generator(device, args.seed, *job, 1) for job in zip(i.tolist(), j.tolist())]
            condition = common.take(told, conditions[i], device)
            if dial:
                similarity = torch.tensor(args.similarity or [math.nan], device=device)
                condition["similarity"] = similarity[j % len(similarity)]
            others = [common.generator(device, args.seed, *job, 2) for job in zip(i.tolist(), j.tolist())]
            anneal = cads(model.norm, config, others, args.cads) if args.cads else None
            network = with_dial(model) if dial else model
            denoise = guide(network, w, condition, args.guidance_interval, args.tcfg, anneal)
            samples[i, j] = sample_images(denoise, generators, config | how, args.sampler, args.interpolation)
            seconds.append((time.perf_counter() - clock) / len(i))
        if rank == 0:                                                   # samples.npy comes last
            for stale in ("samples.npy", "cls.npy", "data.json", "conditions.npy"):
                (out / stale).unlink(missing_ok=True)
            with common.writing(out / "conditions.npy") as f:
                np.save(f, conditions)
            about = dict(model=path.stem, step=step, guidance=w, draw=args.draw, seed=args.seed, per_page=args.per_page,
                         variations=k, interpolation=args.interpolation, variant=" ".join(variant) or None,
                         similarity=args.similarity, **how)
            about["ms_image"] = 1e3 * float(np.median(seconds))
            with common.writing(out / "samples.json") as f:
                f.write(json.dumps(about, indent=1).encode())
    if rank > 0:
        return
    shown = np.linspace(0, len(conditions) - 1, min(len(conditions), 16)).astype(int)
    images = common.load(args.data / "images.npy")
    common.contact_sheet(out / "sheet.png", [[images[conditions[i]], *samples[i, :8]] for i in shown])
    print(f"wrote {out}/samples.npy and sheet.png; next: python 01_embed.py --data {args.data} "
          f"--images {out}/samples.npy --out {out} --cls-only")


if __name__ == "__main__":
    main()
