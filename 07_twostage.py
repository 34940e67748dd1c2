"""07: 2SDM, two-stage diffusion models. First sample what to draw, an embedding y; then draw it, an image x given y ([2SDM]).

Reads   DATA of 01: images.npy, cls.npy, split.npy, pages.npy, tokens.npy (its shape); cls_aug.npy [A, N, D] float32 if it is
        there (01 --augment A): embeddings of A augmented views of each image, for the prior
Writes  into --out: {none,film,kmeansK,pcaK}_STEPS.pt (image models), prior.pt, interpolation.png, and a folder a row:
        samples.npy [n, 1, S, S, 3] uint8   y.npy [n, C] float32, what they were given   samples.json, how, and how long it took
        `sweep`: rows sweep/NAME_STEPS of image models that are told more or less of y, at two budgets
        `figures`, after 01 --cls-only on every row and 06 on all: rows.png, neighbours.png, distances.png, sweep.png

    p(x) = E_y p(x | y),  y ~ p(y)      prior:  min over phi    E | y_phi(alpha y + sigma eps, logsnr) - y |^2    (x-prediction,
                                                                of y standardised by the training images' mean and deviation)
                                        image:  min over theta  E | v_theta(alpha x + sigma eps, logsnr, y) - v |^2   (as in 03)

Rows: unconditional      the baseline, no y                    kmeans   y is the centroid of one of K clusters, drawn by its size
      2sdm               y from the prior                      oracle   y of training images: what a perfect prior would give
      2sdm_fewer_steps   as 2sdm, with less arithmetic in all than the baseline
The image models have one network and one recipe, only y differs, and image i has the same noise in every row; the prior and its
training come on top. With --label page both stages are also given the page a of the image: p(y | a) p(x | y, a), and so is the
baseline. Repeat the command to resume; what is finished is not made again.

    python 07_twostage.py                       # digits at 16 px on a CPU; `make twostage` also runs 01 and 06 on every row
    python 07_twostage.py sweep                 # `make sweep` also scores and plots it
    torchrun --nproc-per-node=8 07_twostage.py --data runs/emoji64 --prior-width 512 --prior-steps 10000
"""
import argparse
import copy
import json
import math
import time
import zlib
from functools import partial

import numpy as np
import torch
from scipy.cluster.vq import kmeans2, vq
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import common
import system
import training

ROWS = ("unconditional", "kmeans", "oracle", "2sdm", "2sdm_fewer_steps")
SWEEP = ("pca1", "pca4", "pca16", "pca64", "film", "kmeans4", "kmeans16", "kmeans64", "kmeans256", "none")
prior_schedule = partial(common.logsnr_schedule, size=1, noise_size=1)   # the plain cosine


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
        noise_level = self.noise_in(common.waves(logsnr / 30, 32))       # logsnr in +-15
        tokens = [noise_level + self.view(view), self.y_in(z.flatten(1)), self.query.expand(len(z), -1)]
        if self.label is not None:
            tokens.insert(1, self.label(label))
        h = self.layers(torch.stack(tokens, 1))                          # [B, 3 or 4, width]
        return self.out(h[:, -1])[..., None, None]                       # [B, D, 1, 1]

    def to_y(self, x_hat):
        """Standardised [B, D, 1, 1] -> y [B, D] as the encoder gives it: the inverse of norm."""
        return x_hat.flatten(1) * self.norm.std + self.norm.mean


def sample_y(prior, noise, label, steps):
    """y [B, D] from the prior by DDPM; noise() -> [B, D, 1, 1], label [B]. x_hat becomes v = (alpha z - x_hat) / sigma."""
    def denoise(z, logsnr):
        alpha, sigma = common.alpha_sigma(logsnr)
        return (alpha * z - prior(z, logsnr, label, torch.zeros_like(label))) / sigma
    return prior.to_y(common.sampling_loop(denoise, noise(), noise, steps, prior_schedule, clip=False))


class PriorBatches(torch.utils.data.Dataset):
    """Item `step` is this rank's share of a batch of embeddings, each of a random view: like training.PairBatches.

    y [b, D] as the encoder gives it, eps [b, D] unit noise, t [b] in [0, 1], label and view [b] int64; view 0: the image itself.
    """

    def __init__(self, args, views, label, chosen, rank=0, world=1):
        self.args, self.views, self.label, self.chosen, self.mine = args, views, label, chosen, slice(rank, None, world)

    def __getitem__(self, step):
        rng, n, augmented = np.random.default_rng([self.args.seed, step]), self.args.batch, len(self.views) - 1
        rows = self.chosen[rng.integers(len(self.chosen), size=n)]
        view = np.maximum(rng.integers(-augmented, augmented + 1, n), 0)                 # about half of them plain
        t = ((rng.random() + np.arange(n)) / n).astype(np.float32)                       # stratified
        eps = rng.standard_normal((n, self.views[0].shape[1]), np.float32)
        y = np.stack([self.views[v][row] for v, row in zip(view, rows)])
        batch = dict(y=y, eps=eps, t=t, label=self.label[rows], view=view)
        return {key: torch.from_numpy(value[self.mine]) for key, value in batch.items()}


def train_prior(args, data, label, labels):
    """The prior of the training images' cls, with averaged weights, and its config; label [N] int64, -1 for none of `labels`."""
    device, rank, world = system.start(args.device)
    args = argparse.Namespace(**vars(args) | dict(out=args.out / "prior.pt", steps=args.prior_steps, batch=args.prior_batch,
                                                  lr=args.prior_lr, weight_decay=args.prior_weight_decay))
    views, augmented = [data.cls], data.folder / "cls_aug.npy"
    if augmented.exists():
        views += list(system.read_array(augmented, np.float32, 3))
        if views[1].shape != data.cls.shape:
            system.die(f"{augmented} holds embeddings of shape {views[1].shape}, cls.npy {data.cls.shape}; run 01_embed.py again")
    network = dict(dim=data.cls.shape[1], width=args.prior_width, labels=labels, views=len(views))
    recipe = ("steps", "lr", "batch", "weight_decay", "warmup", "decay", "ema", "seed")
    train, held_out = np.flatnonzero(data.split == 0), np.flatnonzero((data.split == 1) & (label >= 0))
    known = np.ascontiguousarray(data.cls[training.some_of(train)])
    config = dict(network=network, encoder=data.meta["encoder"], data=zlib.crc32(known), labels=zlib.crc32(label),
                  **{key: getattr(args, key) for key in recipe})
    torch.manual_seed(args.seed)
    model = Prior(**network)
    model.norm.fit(known)

    def loss_of(net, y, eps, t, label, view):
        """Squared error of x_hat, in units of the training set's variance: [b]."""
        x, logsnr = model.norm(y)[..., None, None], prior_schedule(t)
        alpha, sigma = common.alpha_sigma(logsnr)
        return (net(alpha * x + sigma * eps[..., None, None], logsnr, label, view) - x).square().mean((1, 2, 3))

    @torch.no_grad()
    def show(ema, device, rank):
        for name, chosen in (("training", train), ("held-out", held_out)) if len(held_out) else ():
            batch = PriorBatches(args, views[:1], label, chosen)[0]                      # the same noise each time
            loss = loss_of(ema, **{key: value.to(device) for key, value in batch.items()}).mean().item()
            if rank == 0:
                print(f"prior, averaged weights: loss {loss:.3f} on {name} embeddings")

    training.train(args, config, model, PriorBatches(args, views, label, train, rank, world), loss_of, show)
    prior = Prior(**network)
    prior.load_state_dict(system.read_checkpoint(args.out)["ema"])
    return prior.to(device).eval(), config


def image_model(args, data, name, condition, steps):
    """The U-ViT and its config that draws image i given row i of condition [N, C]; C = 0 is nothing. Trained if missing."""
    train, data, known = np.flatnonzero(data.split == 0), copy.copy(data), condition.shape[1] > 0
    args = argparse.Namespace(**vars(args) | dict(out=args.out / f"{name}_{steps}.pt", steps=steps,
                                                  cond="film" if known else "none"))
    data.cls = condition if known else data.cls
    training.train_images(args, data, np.stack([train, train], axis=1), sheet=False)     # as in 03: image and its own condition
    checkpoint = system.read_checkpoint(args.out)
    model = common.UViT(**checkpoint["config"]["network"]).to(system.start(args.device)[0]).eval()
    model.load_state_dict(checkpoint["ema"])
    return model, checkpoint["config"] | dict(name=name)


# ----------------------------------------------------------------------------------------------------------------------
# What the image models are told of y.


def clusters(cls, split, k):
    """[N, D]: the centroid of each image's cluster, of k that k-means finds among the training images."""
    centroids = kmeans2(cls[split == 0], min(k, np.count_nonzero(split == 0)), iter=20, minit="points", rng=0)[0]
    return centroids[vq(cls, centroids)[0]]


def principal_components(cls, split, k):
    """[N, k]: the coordinates of each embedding along the k directions in which those of the training images vary most."""
    train = cls[training.some_of(np.flatnonzero(split == 0))]
    mean = train.mean(0)
    directions = np.linalg.svd(train - mean, full_matrices=False)[2][:k]                 # [k, D]
    largest = np.abs(directions).argmax(1)
    directions *= np.sign(directions[np.arange(len(directions)), largest])[:, None]      # a direction has no sign of its own
    return (cls - mean) @ directions.T


def told(cls, split, name):
    """What the image model `name` is told of the embeddings cls [N, D]: [N, C] float32, C = 0 for "none"."""
    if name == "none":
        return cls[:, :0]
    if name.startswith("kmeans"):
        return clusters(cls, split, int(name.removeprefix("kmeans")))
    return principal_components(cls, split, int(name.removeprefix("pca"))) if name.startswith("pca") else np.asarray(cls)


# ----------------------------------------------------------------------------------------------------------------------
# The rows of the table.


def gflops(net, *inputs):
    """Arithmetic of one forward pass, in GFLOPs."""
    with FlopCounterMode(display=False) as counter:                      # with gradients: the fused inference path is not counted
        net(*inputs)
    return counter.get_total_flops() / 1e9


def fewer_steps(prior, image, baseline, x, y, y_baseline, steps):
    """Image steps with which 2SDM takes at most 9/10 of the baseline's arithmetic, if 1 is not too many; x, y: of one image."""
    logsnr, label, dim = x.new_zeros(1), x.new_zeros(1, dtype=torch.long), len(prior.norm.mean)
    of_prior, of_image = gflops(prior, y[:, :dim, None, None], logsnr, label, label), gflops(image, x, logsnr, y)
    return max(1, int(steps * (0.9 * gflops(baseline, x, logsnr, y_baseline) - of_prior) / of_image))


def draw_conditions(split, n, seed):
    """[n] indices of training images: these lend the samples their page, their cluster and, to the oracle, their y."""
    train = np.flatnonzero(split == 0)
    return np.random.default_rng(seed).choice(train, n, replace=n > len(train))


@torch.inference_mode()
def sample_row(args, folder, image, given, steps, prior=None, label=None):
    """Fill a row's folder with n images, each rank whole batches; returns its samples.json, with ms_image, their cost.

    image, prior: model and config. given [n, C]: the condition of each, or what goes behind the y that prior draws for label [n].
    """
    (net, config), (device, rank, world), n = image, system.start(args.device), len(given)
    prior, prior_config = prior or (None, None)
    trained_with = json.dumps([config, prior_config], sort_keys=True).encode()
    about = dict(model=folder.name, seed=args.seed, n=n, sample_steps=steps, image_model=config["name"], trained=config["steps"],
                 parameters=sum(w.numel() for part in (net, prior) if part is not None for w in part.parameters()),
                 config=zlib.crc32(trained_with))
    if (folder / "samples.json").exists():
        old = system.read_json(folder / "samples.json")
        if any(old.get(key) != about[key] for key in about):
            system.die(f"{folder} was sampled with other settings; give another --out or delete it")
        return old
    dim = 0 if prior is None else len(prior.norm.mean)
    seconds = []                                                         # of prior and image model, an image, for each batch
    with (system.writing_array(folder / "samples.npy", (n, 1, args.size, args.size, 3), np.uint8, rank) as samples,
          system.writing_array(folder / "y.npy", (n, dim + given.shape[1]), np.float32, rank) as ys):
        batches = range(0, n, args.batch_images)
        for first in system.progress(batches[rank::world], rank, desc=folder.name, unit="batch"):
            rows = range(first, min(n, first + args.batch_images))
            noise = [partial(common.randn, [common.generator(device, args.seed, i, stage, 7) for i in rows])
                     for stage in range(2)]                              # 7: streams that no other script draws from
            start, y = time.perf_counter(), torch.from_numpy(given[rows]).to(device)
            if prior is not None:
                a = torch.from_numpy(label[rows]).to(device)
                y = torch.cat([sample_y(prior, partial(noise[0], (dim, 1, 1)), a, args.sample_steps), y], 1)
            ys[rows] = y.cpu().numpy()                                   # waits for the device, so that the clock is right
            middle = time.perf_counter()
            samples[rows, 0] = common.sample(net, config, dict(cls=y), 0, partial(noise[1], (3, args.size, args.size)), steps,
                                             args.amp)
            seconds.append(np.diff([start, middle, time.perf_counter()]) / len(rows))
    if rank == 0:
        in_prior, in_image = np.median(seconds, axis=0)
        about |= dict(ms_image=1e3 * (in_prior + in_image), prior_share=in_prior / (in_prior + in_image))
        for stale in ("cls.npy", "data.json"):                           # of samples that were here before
            (folder / stale).unlink(missing_ok=True)
        with system.writing(folder / "samples.json") as f:               # last: the row is whole
            f.write(json.dumps(about, indent=1).encode())
        print("{model:17}{sample_steps:4} steps,{ms_image:8.2f} ms an image, {prior_share:.0%} in the prior".format_map(about))
    return about


def table(args, data):
    """Train what is missing and fill every row; the interpolation grid."""
    device, rank, world = system.start(args.device)
    if args.prior_batch % (world * args.accumulate):
        system.die(f"--prior-batch {args.prior_batch} does not divide into {world} processes x {args.accumulate} backward passes")
    pages = np.unique(data.pages[data.split == 0]) if args.label else np.zeros(0, np.int32)
    one_hot = (data.pages[:, None] == pages).astype(np.float32)          # [N, L]; 0 for pages without a training image
    label = np.where(one_hot.any(1), one_hot.argmax(1), -1) if args.label else np.zeros(len(data.pages), np.int64)       # [N]
    drawn = draw_conditions(data.split, args.samples, args.seed)
    names = {"unconditional": "none", "oracle": "film", "kmeans": f"kmeans{args.clusters}"}
    given = {row: np.concatenate([told(data.cls, data.split, name), one_hot], 1) for row, name in names.items()}   # [N, C] each
    images = {row: image_model(args, data, name, given[row], args.steps) for row, name in names.items()}
    prior = train_prior(args, data, label, len(pages))
    for row in names:
        sample_row(args, args.out / row, images[row], given[row][drawn], args.sample_steps)
    x = torch.zeros(1, 3, args.size, args.size, device=device)
    y, y_baseline = (torch.from_numpy(given[row][:1]).to(device) for row in ("oracle", "unconditional"))
    fewer = fewer_steps(prior[0], images["oracle"][0], images["unconditional"][0], x, y, y_baseline, args.sample_steps)
    for row, steps in (("2sdm", args.sample_steps), ("2sdm_fewer_steps", fewer)):
        sample_row(args, args.out / row, images["oracle"], one_hot[drawn], steps, prior, label[drawn])
    if rank == 0:
        a = torch.from_numpy(label[drawn[:1]]).to(device)
        interpolate(args, args.out / "interpolation.png", prior[0], images["oracle"], one_hot[drawn[:1]], a)
        print(f"wrote {args.out}; next 01_embed.py --cls-only on every row, 06, 07_twostage.py figures: `make twostage` does it")


def sweep(args, data):
    """Image models that are told more and more of y, at every budget; as for the oracle, y is of training images."""
    if args.label:
        system.die("the sweep is of unconditional generation; leave --label out")
    drawn = draw_conditions(data.split, args.samples, args.seed)
    for name in SWEEP:
        condition = told(data.cls, data.split, name)                                     # [N, C]
        for steps in args.sweep_steps:
            image = image_model(args, data, name, condition, steps)
            sample_row(args, args.out / "sweep" / f"{name}_{steps}", image, condition[drawn], args.sample_steps)


# ----------------------------------------------------------------------------------------------------------------------
# Pictures.


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
    system.contact_sheet(path, list(x.reshape(side, side, *x.shape[1:])))


def figures(args, data):
    """rows.png: the first samples of every row, which share their noise. neighbours.png: 2SDM samples | the nearest training
    images in pixels | in embedding. distances.png: how near."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    train, held_out = np.flatnonzero(data.split == 0), np.flatnonzero(data.split == 1)
    sets = {"held out": (data.images[held_out], data.cls[held_out])} if len(held_out) else {}
    for name in ("unconditional", "2sdm", "oracle"):
        samples = system.read_array(args.out / name / "samples.npy", made_by="07_twostage.py")[:, 0]
        sets[name] = samples, system.read_array(args.out / name / "cls.npy", rows=len(samples))
    shown = [system.read_array(args.out / row / "samples.npy", made_by="07_twostage.py")[:16, 0] for row in ROWS]
    system.contact_sheet(args.out / "rows.png", [list(images) for images in shown])
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
    system.contact_sheet(args.out / "neighbours.png", sheet)
    with system.writing(args.out / "distances.png") as f:
        figure.savefig(f, dpi=120, format="png")
    scores = args.out / "sweep" / "metrics.json"
    if scores.exists():
        plot_sweep(args.out / "sweep.png", json.loads(scores.read_text()))
    print(f"wrote {args.out}/rows.png ({', '.join(ROWS)}), neighbours.png and distances.png")


def plot_sweep(path, rows):
    """FID over what the image model is told of y, a curve a budget: PCA coordinates on the left, k-means on the right."""
    import matplotlib.pyplot as plt
    rows = [row for row in rows if "trained" in row and row["reference"] == rows[0]["reference"]]
    fid = {row["model"]: row["fid"] for row in rows}
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axes, kind, what in zip(panels, ("pca", "kmeans"), ("principal components of y", "clusters of y")):
        for colour, steps in enumerate(sorted({row["trained"] for row in rows})):
            names = [name for name in SWEEP if name.startswith(kind) and f"{name}_{steps}" in fid]        # those scored so far
            axes.plot([int(name.removeprefix(kind)) for name in names], [fid[f"{name}_{steps}"] for name in names], "o-",
                      color=f"C{colour}", label=f"{steps} steps")
            for name, style, what_told in (("none", "--", "nothing"), ("film", ":", "all of y")):
                if f"{name}_{steps}" in fid:
                    axes.axhline(fid[f"{name}_{steps}"], color=f"C{colour}", linestyle=style,
                                 label=f"{steps} steps, told {what_told}")
        axes.set(xscale="log", xlabel=f"{what} that the image model is told", ylabel="FID")
        axes.legend(frameon=False)
    with system.writing(path) as f:
        figure.savefig(f, dpi=120, format="png")


def main():
    p = training.training_parser(__doc__, out="folder to write (default DATA/twostage, or DATA/twostage_page)", cond=False)
    p.add_argument("what", nargs="?", default="table", choices=["table", "sweep", "figures"])
    p.add_argument("--label", choices=["page"], help="give both stages the page of the image")
    p.add_argument("--samples", type=int, default=1000, help="n, images a row")
    p.add_argument("--batch-images", type=int, default=100, help="images a forward pass of the sampler")
    p.add_argument("--clusters", type=int, default=16, help="K of the row kmeans")
    p.add_argument("--sweep-steps", type=int, nargs="+", default=[500, 1000], help="budgets of the sweep, optimiser steps")
    p.add_argument("--prior-steps", type=int, default=1000, help="optimiser steps of the prior")
    p.add_argument("--prior-batch", type=int, default=64, help="embeddings a step")
    p.add_argument("--prior-lr", type=float, default=2e-3, help="peak learning rate of the prior")
    p.add_argument("--prior-width", type=int, default=128, help="features of the prior's tokens")
    p.add_argument("--prior-weight-decay", type=float, default=0.01)
    args = system.parse(p)
    system.at_least_one(args, "samples", "batch_images", "clusters", "prior_steps", "prior_batch", "prior_width")
    system.above_zero(args, "lr", "prior_lr")                          # now, not after the image models
    if args.prior_width > 64 and args.prior_width % (args.prior_width // 64) or not 0 <= args.prior_weight_decay < math.inf:
        system.die(f"--prior-width {args.prior_width} --prior-weight-decay {args.prior_weight_decay}: expected a multiple of "
                   "64, or less than 64, and a number from 0")
    args.out = args.out or args.data / ("twostage_page" if args.label else "twostage")
    data = system.Data(args.data)
    if (data.split == 0).sum() < 2:
        system.die(f"{args.data} holds out all images but one, or all; there are none to train on")
    if args.what == "figures" and system.start(args.device)[1] > 0:    # one process is enough
        return
    dict(table=table, sweep=sweep, figures=figures)[args.what](args, data)


if __name__ == "__main__":
    main()
