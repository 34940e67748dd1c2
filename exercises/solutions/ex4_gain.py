"""Exercise 4, solved.

Question: why nothing at logsnr = 5, and where to look first?
With little noise z shows the image, and the condition has nothing to add. At high noise z says little, so the
model must choose what to draw, and the condition decides. Measured for pairs.pt, "nothing" minus "itself": 0.000 at
logsnr 5, 0.005 at -1, 0.038 at -2.9, 0.054 at -6. Look at high noise first; the mean over all noise hides the gain.

The verdict: a copier believes that the target is the image that it is told. For a page-mate that is wrong, and
worse than knowing nothing, so "mate" is above "nothing". A varier was trained on page-mates: "mate" is below.
"""
import numpy as np
import torch

import common
from exercises.ex4_gain import show


def mates(pages):
    found = np.empty(len(pages), int)
    for page in np.unique(pages):
        rows = np.flatnonzero(pages == page)
        found[rows] = np.roll(rows, 1)
    return found


def strangers(pages):
    return np.array([np.flatnonzero(pages != page)[i % (pages != page).sum()] for i, page in enumerate(pages)])


def gain(model, x, told, pages, logsnr, eps):
    alpha, sigma = common.alpha_sigma(logsnr)
    itself = np.arange(len(x))
    losses = {}
    for name, rows in dict(itself=itself, mate=mates(pages), nothing=itself, stranger=strangers(pages)).items():
        condition = {key: array[rows] for key, array in told.items()}
        drop = torch.full((len(x),), name == "nothing")
        v_pred = model(alpha * x + sigma * eps, logsnr, **condition, drop=drop)
        losses[name] = common.diffusion_loss(v_pred, x, eps, logsnr, "v").mean().item()
    return losses


def copies(losses):
    return losses["mate"] > losses["nothing"]


if __name__ == "__main__":
    show(gain, copies)
