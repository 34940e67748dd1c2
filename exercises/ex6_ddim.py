"""Exercise 6: DDIM in three lines. About 40 minutes.

z_t = alpha_t x + sigma_t eps. The network gives x_hat, and with z_t this says which noise it must have been:

    eps_hat = (z_t - alpha_t x_hat) / sigma_t

DDPM replaces a part of this noise by fresh noise in every step. DDIM (arXiv 2010.02502) keeps all of it, and only mixes
it in another proportion:

    z_s = alpha_s x_hat + sigma_s eps_hat

Nothing is random after the first z. So a start gives one image, and the same steps run backwards turn an image into
its noise.

To do     ddim_step() in three lines, ddim(), the loop, and encode(), the loop backwards, each in about six
Check     pytest -x exercises/test_ex6_ddim.py
To see    python -m exercises.ex6_ddim writes runs/ex6_ddim.png: what pretrained/pairs.pt draws if it is told nothing,
          eight digits by DDPM (left) and eight by DDIM (right), in 2, 4, 8 and 16 steps (top to bottom)
Hints     - common.alpha_sigma(logsnr) of a logsnr [1] gives alpha and sigma of shape [1, 1, 1, 1], to scale images.
          - common.ddpm() is the loop with DDPM's step. Take slices logsnrs[i:i + 1], to keep the shape [1];
            denoise() wants one for each image: logsnr.expand(len(z)).
          - x_hat = alpha z - sigma v. The step's formula does not care whether s is less noisy than t, or more.
          - eps_hat must belong to the clipped x_hat, or alpha_t x_hat + sigma_t eps_hat is not z_t any more.
Question  Both halves of the picture start from the same noise. From 8 to 16 steps DDIM's digits hardly change, but some
          of DDPM's become other digits. Why? And when would you still use DDPM?
"""
from functools import partial

import numpy as np
import torch

import common


def ddim_step(z, x_hat, logsnr_t, logsnr_s):
    """From z [B, C, H, W] at logsnr_t [1] to z at logsnr_s [1], given x_hat."""
    raise NotImplementedError("ddim_step() of exercise 6 is a gap: write it, then run the grader again")


def ddim(denoise, z, logsnrs, clip=True):
    """From noise z at logsnrs[0] through all of logsnrs [steps + 1]. Returns the last x_hat, as common.ddpm() does.

    denoise(z [B, C, H, W], logsnr [B]) -> v, called once a step; clip: x_hat to [-1, 1] in each.
    """
    raise NotImplementedError("ddim() of exercise 6 is a gap: write it, then run the grader again")


def encode(denoise, x, logsnrs):
    """The noise of images x: DDIM's steps from logsnrs[-1] back to logsnrs[0]. Returns z at logsnrs[0]. No clipping.

    x counts as z at logsnrs[-1], where there is hardly any noise.
    """
    raise NotImplementedError("encode() of exercise 6 is a gap: write it, then run the grader again")


# ----------------------------------------------------------------------------------------------------------------------
# Given.


def show(ddim):
    """Write runs/ex6_ddim.png: DDPM beside your ddim(), from the same noise, in 2, 4, 8 and 16 steps."""
    checkpoint = common.load("pretrained/pairs.pt")
    config, rows, n = checkpoint["config"], [], 8
    gap = np.full((16, 4, 3), 255, np.uint8)
    model = common.UViT(**config["network"])
    model.load_state_dict(checkpoint["ema"])
    nothing = {name: norm.mean.expand(n, *config["network"]["told"][name]) for name, norm in model.norm.items()}

    @torch.no_grad()
    def denoise(z, logsnr):
        return model(z, logsnr, **nothing, drop=torch.ones(n, dtype=torch.bool))

    for steps in (2, 4, 8, 16):
        logsnrs = common.logsnr_schedule(torch.linspace(1, 0, steps + 1) ** 2, 16, 16)
        generators = [common.generator("cpu", 0, 0, j, 1) for j in range(n)]
        start = common.randn(generators, (3, 16, 16))
        again = [common.generator("cpu", 0, 0, j, 1) for j in range(n)]  # DDPM's first noise is the same start
        x = torch.cat([common.ddpm(denoise, partial(common.randn, again, (3, 16, 16)), logsnrs, 0),
                       ddim(denoise, start, logsnrs)])
        images = ((x.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
        rows.append([*images[:n], gap, *images[n:]])
    common.contact_sheet("runs/ex6_ddim.png", rows)
    print("wrote runs/ex6_ddim.png")


if __name__ == "__main__":
    show(ddim)
