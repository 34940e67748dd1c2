"""Exercise 3: classifier-free guidance, and what happens without dropping. About 30 minutes.

In training, each row of a batch loses its condition with probability p. It gets the null condition in its place, so one
network learns both v(z | label) and v(z | null). In sampling, guidance goes past the conditional prediction, away from
what the network would draw if it were told nothing:

    v = (1 + w) v(z | label) - w v(z | null)

w = 0 is plain conditional sampling. The images here are points in the plane: three labels, three overlapping clusters.

To do     drop() and guided(), one to three lines each
Predict   Write down, before you run it: a network is trained with p = 0 and sampled with w = 3. What do its samples
          look like? What does the null condition mean to it?
Check     pytest -x exercises/test_ex3_guidance.py
To see    python -m exercises.ex3_guidance: a table of both networks, for w = 0, 1, 3; 5 seconds
Hints     - Every row is dropped or kept on its own.
          - drop() returns a new array. The caller still needs its labels.
          - The network takes labels [n], so the null condition is NULL for each of the n rows.
Question  With dropping, more w makes the samples easier to read and less varied; the table shows both. Why? And why
          does 05_sample.py refuse every w but 0 for a checkpoint that was trained without dropping?
"""
import math

import numpy as np
import torch
from torch import nn

import common

NULL = 3                                                                # the label that says nothing
CENTRES = 0.5 * torch.tensor([[math.sin(angle), math.cos(angle)] for angle in (0, 2 * math.pi / 3, 4 * math.pi / 3)])
SPREAD = 0.35


def drop(labels, p, rng):
    """labels [n] (an integer array), each replaced by NULL with probability p. rng: np.random.default_rng(seed)."""
    raise NotImplementedError("drop() of exercise 3 is a gap: write it, then run the grader again")


def guided(model, z, logsnr, labels, w):
    """The guided v [n, 2, 1, 1]. model(z [n, 2, 1, 1], logsnr [n], labels [n]) gives v; labels is a tensor."""
    raise NotImplementedError("guided() of exercise 3 is a gap: write it, then run the grader again")


# ----------------------------------------------------------------------------------------------------------------------
# Given.


class Network(nn.Module):
    """Predicts v of points z [n, 2, 1, 1]. Each label, and NULL, is a learned vector that starts at random."""

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(4, 16)
        self.layers = nn.Sequential(nn.Linear(19, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, z, logsnr, labels):
        h = torch.cat([z.flatten(1), self.label(labels), logsnr[:, None] / 10], 1)       # [n, 19]
        return self.layers(h)[:, :, None, None]


def points(n, rng):
    """n points [n, 2, 1, 1] and their labels, a numpy array [n]."""
    labels = rng.integers(3, size=n)
    noise = torch.from_numpy(rng.normal(size=(n, 2))).float()
    return (CENTRES[labels] + SPREAD * noise)[:, :, None, None], labels


def train(drop, p, steps=1000, batch=128, lr=3e-3):
    """A network trained on points whose labels went through your drop()."""
    torch.manual_seed(0)
    rng, dropping, model = np.random.default_rng(0), np.random.default_rng(1), Network()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for step in range(steps):
        x, labels = points(batch, rng)
        t = torch.from_numpy((rng.random() + np.arange(batch)) / batch).float()
        logsnr = common.logsnr_schedule(t, 16, 16)
        alpha, sigma = common.alpha_sigma(logsnr)
        eps = torch.from_numpy(rng.normal(size=x.shape)).float()
        told = torch.from_numpy(np.asarray(drop(labels, p, dropping)))
        loss = common.diffusion_loss(model(alpha * x + sigma * eps, logsnr, told), x, eps, logsnr, "v").mean()
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.requires_grad_(False)


def judge(guided, model, w, n=600):
    """Samples by your guided(), judged: {read rightly, far from every cluster (both shares), spread in a cluster}."""
    g, labels = torch.Generator().manual_seed(0), torch.arange(n) % 3
    logsnrs = common.logsnr_schedule(torch.linspace(1, 0, 41), 16, 16)
    x = common.ddpm(lambda z, logsnr: guided(model, z, logsnr, labels, w),
                    lambda: torch.randn(n, 2, 1, 1, generator=g), logsnrs, clip=False).flatten(1)
    distance = torch.cdist(x, CENTRES)
    spread = torch.stack([x[labels == label].std(0).mean() for label in range(3)]).mean()
    return dict(read=(distance.argmin(1) == labels).float().mean().item(),
                far=(distance.amin(1) > 3 * SPREAD).float().mean().item(), spread=spread.item())


def show(drop, guided):
    """Print the table: both networks, each with three w."""
    torch.set_num_threads(1)                                            # for such small tensors one thread is faster
    for p in (0.2, 0):
        model = train(drop, p)
        for w in (0, 1, 3):
            found = judge(guided, model, w)
            print(f"dropped {p:3}, w = {w}: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()))


if __name__ == "__main__":
    show(drop, guided)
