"""07: 2SDM, two-stage diffusion models. First sample what to draw, an embedding y; then draw it, an image x given y.

Reads   DATA of 01: images.npy, cls.npy, split.npy, pages.npy; cls_aug.npy [A, N, D] float32 if it is there: embeddings of A
        augmented views of each image, for the prior
Writes  into --out: none.pt, film.pt, kmeansK.pt (image models), prior.pt, interpolation.png, and a folder a row of the table:
        samples.npy [n, 1, S, S, 3] uint8   y.npy [n, C] float32, what they were given   samples.json, how, and how long it took
        `figures`, after 01 --cls-only on every row: neighbours.png, distances.png

    p(x) = E_y p(x | y),  y ~ p(y)      prior:  min over phi    E | y_phi(alpha y + sigma eps, logsnr) - y |^2    (x-prediction)
                                        image:  min over theta  E | v_theta(alpha x + sigma eps, logsnr, y) - v |^2   (as in 03)

Rows: unconditional      the baseline, no y                    kmeans   y is the centroid of one of K clusters, drawn by its size
      2sdm               y from the prior                      oracle   y of training images: what a perfect prior would give
      2sdm_fewer_steps   as 2sdm, in less time than the baseline
One network and one recipe for all; only y differs, and image i has the same noise in every row. With --label page both stages
are also given the page a of the image: p(y | a) p(x | y, a). Repeat the command to resume; what is finished is not made again.

    python 07_twostage.py                       # digits at 16 px on a CPU; `make twostage` also runs 01 and 06 on every row
    python 07_twostage.py figures
    torchrun --nproc-per-node=8 03_train_recon.py --data runs/emoji64 --cond film --out runs/emoji64/twostage/film.pt
    python 07_twostage.py --data runs/emoji64 --prior-width 512 --prior-steps 10000         # one GPU; finds that film.pt
"""
import argparse
import copy
import json
import os
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import kmeans2, vq
from torch import nn

import common


class Prior(nn.Module):
    """x-prediction of a standardised embedding: z [B, D, 1, 1], logsnr [B], label [B], view [B] -> x_hat like z.

    A transformer over the noise level, the label if there are any, the noisy embedding, and a learned query that becomes x_hat.
    View 0 is the plain image, the only one at sampling: so the model may learn from augmented ones, and still draws plain ones.
    """

    def __init__(self, dim, width, labels, views, layers=6):
        super().__init__()
        self.norm = common.Standardise(dim)
        self.noise_in = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.view, self.label = nn.Embedding(views, width), nn.Embedding(labels, width) if labels else None
        self.y_in, self.query = nn.Linear(dim, width), nn.Parameter(torch.randn(1, width))
        block = partial(nn.TransformerEncoderLayer, nhead=max(1, width // 64), dim_feedforward=4 * width, dropout=0,
                        activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.Sequential(*(block(width) for _ in range(layers)))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, z, logsnr, label, view):
        angles = logsnr[:, None] / 30 * torch.logspace(0, 3, 32, device=z.device)       # [B, 32]; logsnr in +-15
        noise_level = self.noise_in(torch.cat([angles.sin(), angles.cos()], -1))
        tokens = [noise_level + self.view(view), self.y_in(z.flatten(1)), self.query.expand(len(z), -1)]
        if self.label is not None:
            tokens.insert(1, self.label(label))
        h = self.layers(torch.stack(tokens, 1))                          # [B, 3 or 4, width]
        return self.out(h[:, -1])[..., None, None]                       # [B, D, 1, 1]

    def to_y(self, x_hat):
        """Standardised [B, D, 1, 1] -> y [B, D] as the encoder gives it: the inverse of norm."""
        return x_hat.flatten(1) * self.norm.std + self.norm.mean


def sample_y(prior, noise, label, steps):
    """y [B, D] from the prior by DDPM; noise() -> [B, D, 1, 1], label [B]."""
    def denoise(z, logsnr):                                              # x_hat = alpha z - sigma v, solved for v
        alpha, sigma = common.alpha_sigma(logsnr)
        return (alpha * z - prior(z, logsnr, label, torch.zeros_like(label))) / sigma
    schedule = partial(common.logsnr_schedule, size=1, noise_size=1)
    return prior.to_y(common.ddpm_sample(denoise, noise(), noise, steps, schedule, clip=False))


def train_prior(args, data, label, labels, device):
    """The prior of the training images' cls, with averaged weights; label [N] int64 is ignored if there are no `labels`.

    Made by common.train()'s rules: a step is a function of (seed, step), prior.pt.partial is resumed, prior.pt is taken as it is.
    """
    args, path = copy.copy(args), args.out / "prior.pt"
    args.steps, args.lr, unfinished = args.prior_steps, args.prior_lr, Path(f"{path}.partial")
    views, augmented = [data.cls], data.folder / "cls_aug.npy"
    if augmented.exists():
        views += list(common.read_array(augmented, np.float32, 3))
    network = dict(dim=data.cls.shape[1], width=args.prior_width, labels=labels, views=len(views))
    recipe = ("steps", "lr", "prior_batch", "weight_decay", "warmup", "decay", "ema", "seed")
    config = dict(network=network, encoder=data.meta["encoder"], **{key: getattr(args, key) for key in recipe})
    train, held_out = np.flatnonzero(data.split == 0), np.flatnonzero(data.split == 1)[:1000]
    torch.manual_seed(args.seed)
    model, first = Prior(**network), 0
    model.norm.fit(data.cls[train])
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=args.weight_decay)
    for found in filter(Path.exists, (path, unfinished)):
        state = common.read_checkpoint(found)
        if state["config"] != config:
            common.die(f"{found} was trained with other settings; give another --out or delete it")
        ema.load_state_dict(state["ema"])
        if found == path:
            return ema
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    def loss_of(net, rng, rows, augmentations):
        """Squared error of x_hat in units of the training set's variance, images `rows` at stratified noise levels: a scalar."""
        n = len(rows)
        view = np.maximum(rng.integers(-augmentations, augmentations + 1, n), 0)         # about half of them plain
        y = torch.from_numpy(np.stack([views[v][i] for v, i in zip(view, rows)])).to(device)             # [n, D]
        t = torch.from_numpy((rng.random() + np.arange(n)) / n).float().to(device)
        eps = torch.from_numpy(rng.standard_normal((*y.shape, 1, 1), np.float32)).to(device)
        x, logsnr = net.norm(y)[..., None, None], common.logsnr_schedule(t, 1, 1)
        alpha, sigma = common.alpha_sigma(logsnr)
        return (net(alpha * x + sigma * eps, logsnr, label[rows], torch.from_numpy(view).to(device)) - x).square().mean()

    losses = []
    for step in (bar := common.progress(range(first, args.steps), initial=first, total=args.steps, unit="step", desc="prior")):
        rng = np.random.default_rng([args.seed, step])
        loss = loss_of(model, rng, train[rng.integers(len(train), size=args.prior_batch)], len(views) - 1)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad()
        common.update_ema(ema, model, step, args.ema)
        losses.append(loss.detach())
        if (step + 1) % args.save_every and step + 1 < args.steps:
            continue
        loss = torch.stack(losses).mean().item()
        if not np.isfinite(loss):
            common.die(f"the prior's loss is {loss} before step {step + 1}; lower --prior-lr, or look for nan in cls.npy")
        unseen = loss_of(ema, np.random.default_rng(0), held_out, 0).item() if len(held_out) else np.nan
        bar.write(f"prior, step {step + 1}: loss {loss:.3f}, on held-out embeddings {unseen:.3f}: it overfits where this rises")
        with common.writing(unfinished) as f:
            torch.save(dict(model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step + 1,
                            config=config), f)
        losses = []
    os.replace(unfinished, path)
    return ema


def image_model(args, data, name, condition, device):
    """The U-ViT and its config that draws image i given row i of condition [N, C]; C = 0 is nothing. Trained if missing."""
    args, data, train = copy.copy(args), copy.copy(data), np.flatnonzero(data.split == 0)
    args.out, args.cond = args.out / f"{name}.pt", "film" if condition.shape[1] else "none"
    data.cls = condition if condition.shape[1] else data.cls
    common.train(args, data, np.stack([train, train], axis=1))           # as in 03: an image and its own condition
    checkpoint = common.read_checkpoint(args.out)
    model = common.UViT(**checkpoint["config"]["network"]).to(device).eval()
    model.load_state_dict(checkpoint["ema"])
    return model, checkpoint["config"] | dict(name=name)


@torch.inference_mode()
def sample_row(args, name, image, given, steps, prior=None, label=None):
    """Fill the folder of a row with n images; returns its samples.json, with ms_image, their cost, and the prior's share of it.

    given [n, C]: the condition of each, or what goes behind the y that the prior draws for label [n].
    """
    n, size, folder, device = len(given), args.size, args.out / name, next(image[0].parameters()).device
    about = dict(model=name, seed=args.seed, n=n, sample_steps=steps, image_model=image[1]["name"], trained=image[1]["steps"],
                 parameters=sum(w.numel() for net in (image[0], prior) if net is not None for w in net.parameters()))
    if (folder / "samples.json").exists():
        old = common.read_json(folder / "samples.json")
        if any(old.get(key) != about[key] for key in about):
            common.die(f"{folder} was sampled with other settings; give another --out or delete it")
        return old
    ys, seconds = [], []                                                 # seconds of prior and image model, an image, each batch
    with common.writing_array(folder / "samples.npy", (n, 1, size, size, 3), np.uint8, 0) as samples:
        for first in common.progress(range(0, n, args.batch_images), desc=name, unit="batch"):
            rows = range(first, min(n, first + args.batch_images))
            noise = [partial(common.randn, [common.generator(device, args.seed, i, stage, 7) for i in rows])
                     for stage in range(2)]                              # 7: streams that no other script draws from
            start, y = time.perf_counter(), torch.from_numpy(given[rows]).to(device)
            if prior is not None:
                sampled = sample_y(prior, partial(noise[0], (len(prior.norm.mean), 1, 1)), label[rows], args.sample_steps)
                y = torch.cat([sampled, y], 1)
            ys.append(y.cpu().numpy())                                   # waits for the device, so that the clock is right
            middle = time.perf_counter()
            samples[rows, 0] = common.sample(*image, dict(cls=y), 0, partial(noise[1], (3, size, size)), steps, args.amp)
            seconds.append(np.diff([start, middle, time.perf_counter()]) / len(rows))
    with common.writing(folder / "y.npy") as f:
        np.save(f, np.concatenate(ys))
    in_prior, in_image = np.median(seconds, axis=0)
    about |= dict(ms_image=1e3 * (in_prior + in_image), prior_share=in_prior / (in_prior + in_image))
    with common.writing(folder / "samples.json") as f:                   # last: the row is whole
        f.write(json.dumps(about, indent=1).encode())
    return about


def fewer_steps(two, baseline):
    """Image steps with which 2SDM takes 95% of the baseline's time, 1 if none do; both arguments as sample_row() returns them."""
    a_step = two["ms_image"] * (1 - two["prior_share"]) / two["sample_steps"]
    left = 0.95 * baseline["ms_image"] - two["ms_image"] * two["prior_share"]
    return int(np.clip(left / a_step, 1, max(1, two["sample_steps"] - 1)))


def draw_conditions(split, n, seed):
    """[n] indices of training images: these lend the samples their page, their cluster and, to the oracle, their y."""
    train = np.flatnonzero(split == 0)
    return np.random.default_rng(seed).choice(train, n, replace=n > len(train))


def clusters(cls, split, k):
    """[N, D]: the centroid of each image's cluster, of k that k-means finds among the training images."""
    centroids = kmeans2(cls[split == 0], min(k, np.count_nonzero(split == 0)), iter=20, minit="points", rng=0)[0]
    return centroids[vq(cls, centroids)[0]]


def slerp(a, b, fractions):
    """Points [F, *shape] on the great circle from a to b [*shape]: between two noises, with the norm of noise."""
    f, angle = fractions.view(-1, *[1] * a.dim()), torch.arccos(torch.cosine_similarity(a.flatten(), b.flatten(), 0).clamp(-1, 1))
    return (torch.sin((1 - f) * angle) * a + torch.sin(f * angle) * b) / torch.sin(angle)


@torch.inference_mode()
def interpolate(args, path, prior, image, given, label, side=8):
    """A sheet: down, slerp in all the noise of the prior; across, in all that of the image model. given [1, L], label [1]."""
    fractions = torch.linspace(0, 1, side, device=label.device)

    def between(stage, *shape):
        ends = [common.generator(label.device, args.seed, end, stage, 7) for end in (0, 1)]
        return lambda: slerp(*(torch.randn(shape, generator=g, device=g.device) for g in ends), fractions)
    y = sample_y(prior, between(2, len(prior.norm.mean), 1, 1), label.expand(side), args.sample_steps)   # [side, D]
    y = torch.cat([y, torch.from_numpy(given).to(y.device).expand(side, -1)], 1).repeat_interleave(side, 0)
    across = between(3, 3, args.size, args.size)
    x = common.sample(*image, dict(cls=y), 0, lambda: across().repeat(side, 1, 1, 1), args.sample_steps, args.amp)
    common.contact_sheet(path, list(x.reshape(side, side, *x.shape[1:])))


def figures(args, data):
    """neighbours.png: 2SDM samples | the nearest training images in pixels | in embedding. distances.png: how near."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    train, held_out = np.flatnonzero(data.split == 0), np.flatnonzero(data.split == 1)
    sets = {"held out": (data.images[held_out], data.cls[held_out])} if len(held_out) else {}
    for name in ("unconditional", "2sdm", "oracle"):
        samples = common.read_array(args.out / name / "samples.npy", made_by="07_twostage.py")[:, 0]
        sets[name] = samples, common.read_array(args.out / name / "cls.npy", rows=len(samples))
    sheet = [[image] for image in sets["2sdm"][0][:16]]
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, what, real, *others in zip(panels, ("pixels", "embedding"), (data.images[train], data.cls[train]), *sets.values()):
        real, *others = (torch.from_numpy(np.array(a, np.float32)).flatten(1) for a in (real, *others))          # [n, d] each
        found = {name: [torch.cdist(part, real).topk(6, largest=False) for part in x.split(500)] for name, x in zip(sets, others)}
        axes.hist([torch.cat([f.values[:, 0] for f in parts]).numpy() for parts in found.values()], 50, density=True,
                  histtype="step", label=list(found))
        axes.set(xlabel=f"distance to the nearest training image, {what}", yticks=[])
        axes.legend(frameon=False)
        for line, indices in zip(sheet, found["2sdm"][0].indices):
            line += [None, *data.images[train[indices]]]
    common.contact_sheet(args.out / "neighbours.png", sheet)
    with common.writing(args.out / "distances.png") as f:
        figure.savefig(f, dpi=120, format="png")
    print(f"wrote {args.out}/neighbours.png and distances.png")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                parents=[common.training_parser("")], conflict_handler="resolve")
    p.add_argument("what", nargs="?", default="sample", choices=["sample", "figures"])
    p.add_argument("--out", type=Path, help="folder to write (default DATA/twostage, with --label DATA/twostage_page)")
    p.add_argument("--cond", help=argparse.SUPPRESS)
    p.add_argument("--label", choices=["page"], help="give both stages the page of the image")
    p.add_argument("--samples", type=int, default=1000, help="n, images a row")
    p.add_argument("--batch-images", type=int, default=100, help="images a forward pass of the sampler")
    p.add_argument("--clusters", type=int, default=16, help="K of the row kmeans")
    p.add_argument("--prior-steps", type=int, default=1000, help="optimiser steps of the prior")
    p.add_argument("--prior-batch", type=int, default=128, help="embeddings a step")
    p.add_argument("--prior-lr", type=float, default=1e-3, help="peak learning rate of the prior")
    p.add_argument("--prior-width", type=int, default=192, help="features of the prior's tokens")
    p.add_argument("--weight-decay", type=float, default=0.01, help="of the prior")
    args = common.parse(p)
    args.out = args.out or args.data / ("twostage_page" if args.label else "twostage")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        common.die("07 is one process; train none.pt and film.pt with torchrun and 03_train_recon.py, then run 07 without it")
    data, (device, _, _) = common.Data(args.data), common.start(args.device)
    if args.what == "figures":
        return figures(args, data)

    pages = np.unique(data.pages[data.split == 0]) if args.label else np.zeros(0, np.int32)
    label = torch.from_numpy(np.searchsorted(pages, data.pages).clip(0, max(0, len(pages) - 1))).to(device)      # [N]
    one_hot = (data.pages[:, None] == pages).astype(np.float32)          # [N, L]; rows of held-out pages may be 0
    drawn = draw_conditions(data.split, args.samples, args.seed)
    centroids = clusters(data.cls, data.split, args.clusters)
    given = {"none": data.cls[:, :0], "film": data.cls, f"kmeans{args.clusters}": centroids}
    given = {name: np.concatenate([y, one_hot], 1) for name, y in given.items()}                         # [N, C] each
    images = {name: image_model(args, data, name, condition, device) for name, condition in given.items()}
    prior = train_prior(args, data, label, len(pages), device)

    rows = [sample_row(args, row, images[name], given[name][drawn], args.sample_steps)
            for row, name in zip(("unconditional", "oracle", "kmeans"), given)]
    for row in ("2sdm", "2sdm_fewer_steps"):
        steps = args.sample_steps if row == "2sdm" else fewer_steps(rows[-1], rows[0])
        rows.append(sample_row(args, row, images["film"], one_hot[drawn], steps, prior, label[drawn]))
    for row in rows:
        print("{model:17}{sample_steps:4} steps{ms_image:8.2f} ms an image,{prior_share:4.0%} of it in the prior".format_map(row))
    interpolate(args, args.out / "interpolation.png", prior, images["film"], one_hot[drawn[:1]], label[drawn[:1]])
    print(f"wrote {args.out}; next 01_embed.py --cls-only on every row, 06, 07_twostage.py figures: `make twostage` runs all")


if __name__ == "__main__":
    main()
