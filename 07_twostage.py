"""07: 2SDM, two-stage diffusion models. First sample an embedding y, then draw an image x given y ([2SDM] section 4).

    p(x | a) = E_y p(x | y, a),  y ~ p(y | a)                                 a: a label, with --label page
    prior (here)        minimise over phi    E | y_phi(alpha y + sigma eps, logsnr, a) - y |^2      y standardised
    image models (03)   minimise over theta  E | v_theta(alpha x + sigma eps, logsnr, y, a) - v |^2

This script trains the prior and writes arrays. 03 trains the image models on them, 05 draws from them.

told    writes DATA/kmeansK.npy [N, K] float32, the one-hot cluster of each image's embedding (a discrete label), and
        DATA/pcaK.npy [N, K] float32, its first K principal coordinates. --told says which.
        With --label page their names end in _page.npy and their rows in the one-hot page. Two more files are
        DATA/none_page.npy, the page alone, and DATA/film_page.npy, embedding and page.
prior   trains DATA/prior.pt {model, ema, optimizer, step, config}. prior.jsonl is its log: at every save, the averaged
        weights' loss on training and on held-out embeddings, squared error over variance (1: knows nothing)
y       writes for each of --rows DATA/twostage/ROW/y.npy [n, C] float32, what to draw n images from, and y.json
            unconditional   C = 0                           kmeansK, pcaK   rows of that array of `told`
            oracle          embeddings of training images   2sdm            samples of the prior
        The rows belong to the same n training images, drawn at random, so clusters come by their size.
With --label page: DATA/prior_page.pt and DATA/twostage_page/. A page should be a class then, not a web page.

The chain, for DATA = D = runs/digits16:
    python 07_twostage.py told
    python 07_twostage.py prior                                                           # about a minute on two cores
    python 07_twostage.py y
    python 03_train_recon.py --cond none --cond-drop 0 --out D/none.pt                    # for the row unconditional
    python 03_train_recon.py --cond film --cond-drop 0 --out D/film.pt                    # for oracle and 2sdm
    python 03_train_recon.py --cond film --cond-drop 0 --cls D/kmeans16.npy --out D/kmeans16.pt
    python 05_sample.py --checkpoint D/film.pt --y D/twostage/2sdm/y.npy --out D/twostage/2sdm          # every row
    python 01_embed.py --data D --images D/twostage/2sdm/samples.npy --out D/twostage/2sdm --cls-only   # every row
    python 06_fewshot_metrics.py --help                                                   # then scores the folders
2SDM with fewer steps ([2SDM] table 5) is the row 2sdm with fewer --sample-steps of 05, into another folder. With
--label page the image models are those of --cls none_page.npy (unconditional), film_page.npy and kmeans16_page.npy.

As in [2SDM]: six layers, 512 wide in the papers' presets, x-prediction; tokens are the noise level, a, the parameters
of an augmentation (--views, made by examples/augment.py), the noisy y and a learned query. Not as in [2SDM]: this
project's cosine schedule and DDPM replace EDM's of the image model; the prior's are not in the text, but for 40 steps.
The recipe is not the preset's.
    torchrun --nproc-per-node=8 07_twostage.py prior --data runs/web --steps 200000 --batch 1024 --lr 2e-4 --warmup 5000
"""
import copy
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.cluster.vq import kmeans2, vq
from torch import nn
from tqdm import tqdm

import common

prior_schedule = partial(common.logsnr_schedule, size=1, noise_size=1)   # the cosine, not shifted

# ----------------------------------------------------------------------------------------------------------------------
# What an image model is told of y: a cluster or some coordinates ([2SDM] section 3).


def clusters(cls, train, k):
    """[N, k] one-hot: the cluster of each embedding [N, D], of k that k-means finds among the training images."""
    centroids = kmeans2(cls[train], k, iter=20, minit="points", rng=0)[0]                # [k, D]
    return np.eye(k, dtype=np.float32)[vq(cls, centroids)[0]]


def principal_components(cls, train, k):
    """[N, k]: coordinates of each embedding along the k directions in which those of training images vary most."""
    some = cls[train[::1 + len(train) // 5000]]
    directions = np.linalg.svd(some - some.mean(0), full_matrices=False)[2][:k]          # [k, D]
    return (cls - some.mean(0)) @ directions.T


# ----------------------------------------------------------------------------------------------------------------------
# The prior: network, loss, batches, training loop.


class Prior(nn.Module):
    """x-prediction of a standardised embedding: z [B, D, 1, 1], logsnr [B], given -> x_hat like z.

    A transformer over a few tokens; the output at the learned query is x_hat.
    given: the one-hot label [B, L] and the parameters of an augmentation [B, P], a token each. If L or P is 0, there is
    no such token. A plain image has zeros as parameters: the prior learns from augmented images and samples plain ones.
    """

    def __init__(self, dim, width, given, layers=6):
        super().__init__()
        self.norm = common.Standardise(dim)
        self.noise_in = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.given, self.given_in = given, nn.ModuleList(nn.Linear(n, width) if n else None for n in given)
        self.y_in, self.query = nn.Linear(dim, width), nn.Parameter(torch.randn(1, width))
        block = partial(nn.TransformerEncoderLayer, width, max(1, width // 64), 4 * width, 0, nn.functional.gelu)
        self.layers = nn.Sequential(*(block(batch_first=True, norm_first=True) for _ in range(layers)))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim))

    def forward(self, z, logsnr, given):
        tokens = [layer(c) for layer, c in zip(self.given_in, given) if layer]           # [B, width] each
        level = self.noise_in(common.sinusoids(logsnr / 30, 32))
        tokens += [level, self.y_in(z.flatten(1)), self.query.expand(len(z), -1)]
        h = self.layers(torch.stack(tokens, 1))                          # [B, 3 to 5, width]
        return self.out(h[:, -1])[..., None, None]                       # [B, D, 1, 1]


def prior_loss(net, norm, y, eps, t, given):
    """Squared error of x_hat over the training set's variance, [b], for y and eps [b, D], t [b] ([2SDM] eq. 4)."""
    x, logsnr = norm(y)[..., None, None], prior_schedule(t)
    alpha, sigma = common.alpha_sigma(logsnr)
    return (net(alpha * x + sigma * eps[..., None, None], logsnr, given) - x).square().mean((1, 2, 3))


def batch_of(seed, step, size, rows, embeddings, page, parameters, device, rank=0, world=1):
    """This process's share b of a batch of `rows`, a function of (seed, step): y, eps, t, given of prior_loss.

    embeddings: 1 + A arrays [N, D], plain and augmented; page [N, L]; parameters [A, N, P].
    On average (A + 1) / (2 A + 1) of the rows are plain.
    """
    rng, augmented = np.random.default_rng([seed, step, 0, 3]), len(embeddings) - 1
    row = rows[rng.integers(len(rows), size=size)][rank::world]
    view = np.maximum(rng.integers(-augmented, augmented + 1, size), 0)[rank::world]
    t = ((rng.random() + np.arange(size)) / size)[rank::world]           # one in each of B strata of [0, 1], ascending
    y = np.stack([embeddings[v][r] for v, r in zip(view, row)])          # [b, D]
    given = page[row], parameters[view - 1, row] * (view > 0)[:, None]   # [b, L], [b, P]: zeros are a plain image
    generators = [common.generator("cpu", seed, step, i, 3) for i in range(rank, size, world)]
    y, t, *given = (torch.from_numpy(a.astype(np.float32)).to(device) for a in (y, t, *given))
    return y, common.randn(generators, y.shape[1:]).to(device), t, given


def train_prior(out, args, network, encoder, sets, arrays, device, rank, world):
    """Train on the rows sets["training"] of arrays = (embeddings, page, parameters), as 03 trains on images."""
    if args.batch % world:
        common.die(f"--batch {args.batch} does not divide into {world} processes")
    config = {name: getattr(args, name) for name in ("steps", "batch", "lr", "warmup", "ema", "seed")}
    checks = [common.checksum(array) for array in (sets["training"], *arrays[0], *arrays[1:])]
    config |= dict(network=network, encoder=encoder, data=checks)
    torch.manual_seed(args.seed)
    model = Prior(**network).to(device)
    model.norm.fit(arrays[0][0], sets["training"])
    ema = copy.deepcopy(model).requires_grad_(False)
    net = common.distribute(model, ema)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), eps=1e-12, weight_decay=0.01)
    first = common.resume(out, model, ema, optimizer, config)
    for step in tqdm(range(first, args.steps), out.stem, args.steps, initial=first, disable=rank > 0 or None):
        batch = batch_of(args.seed, step, args.batch, sets["training"], *arrays, device, rank, world)
        prior_loss(net, model.norm, *batch).mean().backward()
        decay = 0.5 + 0.5 * math.cos(math.pi * step / args.steps)
        optimizer.param_groups[0]["lr"] = args.lr * min(1, (step + 1) / args.warmup) * decay
        optimizer.step()
        optimizer.zero_grad()
        for average, weight in zip(ema.parameters(), model.parameters()):
            average.lerp_(weight.detach(), 1 - min(args.ema, (1 + step) / (10 + step)))   # forgets its start, as in 03
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            log = dict(step=step + 1)
            for name, rows in sets.items():                              # 1,000 plain embeddings, always the same
                batch = batch_of(args.seed, 0, 1000, rows, arrays[0][:1], *arrays[1:], device)
                log[name] = prior_loss(ema, ema.norm, *batch).mean().item()
            common.save(f"{out}.partial", model, ema, optimizer, step + 1, config)
            if rank == 0:
                with open(out.with_suffix(".jsonl"), "w" if first == 0 and step < args.save_every else "a") as f:
                    print(json.dumps(log), file=f)
                print(json.dumps(log))
    if rank == 0:
        Path(f"{out}.partial").replace(out)
        print(f"wrote {out}; next: python 07_twostage.py y --data {args.data}")


# ----------------------------------------------------------------------------------------------------------------------
# y for 05_sample.py.


def load_prior(path, device):
    """The prior of a checkpoint with its averaged weights, and the checkpoint."""
    checkpoint = common.load(path, "07_twostage.py prior")
    prior = Prior(**checkpoint["config"]["network"])
    prior.load_state_dict(checkpoint["ema"])
    return prior.to(device).eval(), checkpoint


@torch.no_grad()
def sample_y(prior, noise, label, steps):
    """Sample the prior by DDPM: [B, D + L], embedding and label, for label [B, L] and noise() -> [B, D, 1, 1]."""
    plain = label.new_zeros(len(label), prior.given[1])                  # no augmentation

    def denoise(z, logsnr):
        alpha, sigma = common.alpha_sigma(logsnr)
        return (alpha * z - prior(z, logsnr, (label, plain))) / sigma    # v of x_hat = alpha z - sigma v
    logsnrs = prior_schedule(torch.linspace(1, 0, steps + 1, device=label.device))
    y = common.ddpm(denoise, noise, logsnrs, clip=False).flatten(1)      # standardised
    return torch.cat([y * prior.norm.std + prior.norm.mean, label], 1).cpu().numpy()


# ----------------------------------------------------------------------------------------------------------------------


def write(path, what):
    """Write an array as .npy, or a dictionary as .json."""
    with common.writing(path) as f:
        np.save(f, what) if path.suffix == ".npy" else f.write(json.dumps(what, indent=1).encode())
    print(f"wrote {path}")


def main():
    p = common.parser(__doc__)
    p.add_argument("what", choices=["told", "prior", "y"])
    p.add_argument("--label", choices=["page"], help="both stages are also given the page of the image")
    p.add_argument("--told", nargs="+", default=["kmeans16"], help="told: kmeansK, pcaK (%(default)s)")
    p.add_argument("--prior", type=Path, help="checkpoint that prior writes and y reads (default DATA/prior.pt)")
    p.add_argument("--views", type=Path, help="prior: folder of examples/augment.py")
    p.add_argument("--width", type=common.count, help="prior: features of a token, a multiple of 64 or less than 64")
    p.add_argument("--steps", type=common.count, default=1000, help="prior: optimiser steps in all (%(default)s)")
    p.add_argument("--batch", type=common.count, default=64, help="prior: embeddings a step (%(default)s)")
    p.add_argument("--lr", type=common.positive, default=2e-3, help="prior: peak learning rate (%(default)s)")
    p.add_argument("--warmup", type=common.count, default=100, help="prior: steps (%(default)s); then a cosine to zero")
    p.add_argument("--ema", type=common.share, default=0.998, help="prior: decay of the averaged weights (%(default)s)")
    p.add_argument("--save-every", type=common.count, default=500, help="prior: steps; checkpoint and log")
    p.add_argument("--rows", nargs="+", default=["unconditional", "kmeans16", "oracle", "2sdm"], help="y: which")
    p.add_argument("--samples", type=common.count, default=1000, help="y: n, images to draw in each row (%(default)s)")
    args = p.parse_args()                                                # not common.parse(): the recipe is no preset's
    device, rank, world = common.start(args.device)
    meta = common.load(args.data / "data.json")
    preset = common.PRESETS[args.preset or meta["preset"]]
    cls, split, pages = (common.load(args.data / f"{name}.npy") for name in ("cls", "split", "pages"))
    sets = {name: np.flatnonzero(split == i) for i, name in enumerate(["training", "held_out"]) if i in split}
    train = sets["training"]
    page = (pages[:, None] == np.unique(pages[train if args.label else []])).astype(np.float32)  # [N, L]; else L = 0
    suffix = "_page" if args.label else ""
    path = args.prior or args.data / f"prior{suffix}.pt"

    if args.what == "told" and rank == 0:
        told = dict(none=page[:, :0], film=cls) if args.label else {}
        for name in args.told:
            kind = clusters if name.startswith("kmeans") else principal_components
            told[name] = kind(cls, train, int(name.removeprefix("kmeans").removeprefix("pca")))
        for name, array in told.items():
            write(args.data / f"{name}{suffix}.npy", np.concatenate([array, page], 1))

    if args.what == "prior":
        encoder = common.load((args.views or args.data) / "data.json")["encoder"]        # y compares it with DATA's
        embeddings, parameters = [cls], np.zeros((1, len(cls), 0), np.float32)
        if args.views:
            parameters = common.load(args.views / "parameters.npy")
            embeddings += list(common.load(args.views / "cls.npy").reshape(-1, *cls.shape))
        width = args.width or (512 if preset["transformers"] == 2 else 128)
        network = dict(dim=cls.shape[1], width=width, given=[page.shape[1], parameters.shape[2]])
        train_prior(path, args, network, encoder, sets, (embeddings, page, parameters), device, rank, world)

    if args.what == "y" and rank == 0:
        n, folder = args.samples, args.data / f"twostage{suffix}"
        drawn = np.random.default_rng(args.seed).choice(train, n, replace=n > len(train))
        told = dict(unconditional=page[drawn], oracle=np.concatenate([cls[drawn], page[drawn]], 1))
        for row in args.rows:
            about = dict(encoder=meta["encoder"], prior=None, step=None, seed=args.seed, ms_row=0)
            if row == "2sdm":
                prior, state = load_prior(path, device)
                if (state["config"]["encoder"], prior.given[0]) != (meta["encoder"], page.shape[1]):
                    common.die(f"{path} has another encoder or other labels than {args.data}; train it again")
                generators = [common.generator(device, args.seed, i, 0, 4) for i in range(n)]
                noise = partial(common.randn, generators, (cls.shape[1], 1, 1))
                clock = time.perf_counter()
                told[row] = sample_y(prior, noise, torch.from_numpy(page[drawn]).to(device), preset["sample_steps"])
                about |= dict(prior=path.name, step=state["step"], ms_row=1e3 * (time.perf_counter() - clock) / n)
            y = told[row] if row in told else common.load(args.data / f"{row}{suffix}.npy", "07_twostage.py")[drawn]
            write(folder / row / "y.npy", y)
            write(folder / row / "y.json", about)


if __name__ == "__main__":
    main()
