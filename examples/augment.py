"""Augmented views of images, for the prior of 07: [2SDM] section 4 uses them against overfitting.

Reads   DATA of 01: images.npy [N, S, S, 3]
Writes  OUT/views.npy [A, N, S, S, 3] uint8, and OUT/parameters.npy [A, N, 7] float32, what was done to each: zoom,
        angle, two shifts, contrast and brightness in [-1, 1], flip 0 or 1. Zeros would be the image itself.

    python -m examples.augment --data runs/classes --views 4 --out runs/classes/views
    python 01_embed.py --data runs/classes --images runs/classes/views/views.npy --out runs/classes/views --cls-only
    python 07_twostage.py prior --data runs/classes --views runs/classes/views
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import common


def draw_parameters(view, rows, flip):
    """[B, 7] float32, a function of (view, row) alone."""
    draws = np.stack([np.random.default_rng([view, row]).uniform(-1, 1, 7) for row in rows]).astype(np.float32)
    draws[:, 6] = flip & (draws[:, 6] > 0)
    return draws


def augment(images, parameters):
    """Images [B, S, S, 3] uint8, changed by parameters [B, 7].

    Zoomed by 0.9 to 1.1, turned by up to 10 degrees, moved by up to a tenth of the side, edges mirrored. Contrast 0.8
    to 1.2 times, brightness plus up to a twentieth of the range. Mirrored if flip is 1.
    """
    zoom, angle, right, down, contrast, light, flip = torch.from_numpy(parameters.T)[..., None, None, None]
    zoom, angle, mirror = 1 + 0.1 * zoom, angle * torch.pi / 18, 1 - 2 * flip            # [B, 1, 1, 1] each
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    affine = torch.stack([mirror * cos, -sin, 0.2 * right, mirror * sin, cos, 0.2 * down], 1).view(-1, 2, 3)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float()             # [B, 3, S, S]
    grid = F.affine_grid(affine, x.shape, align_corners=False)           # in units of half a side
    x = F.grid_sample(x, grid, "bicubic", "reflection", align_corners=False)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (1 + 0.2 * contrast) * (x - mean) + 0.05 * 255 * light
    return x.clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()


if __name__ == "__main__":
    p = common.parser(__doc__)
    p.add_argument("--views", type=common.count, default=4, help="A, views of each image (%(default)s)")
    p.add_argument("--flip", action="store_true", help="mirror half of them (not digits: a mirrored digit is no digit)")
    p.add_argument("--out", type=Path, help="folder to write (default DATA/views)")
    args = p.parse_args()
    images = common.load(args.data / "images.npy")
    out = args.out or args.data / "views"
    n, parts = len(images), np.array_split(np.arange(len(images)), -(-len(images) // 500))
    with (common.writing_array(out / "parameters.npy", (args.views, n, 7), np.float32) as parameters,
          common.writing_array(out / "views.npy", (args.views, *images.shape), np.uint8) as views):
        for view in tqdm(range(args.views), "views", disable=None):
            for rows in parts:
                parameters[view, rows] = draw_parameters(view, rows, args.flip)
                views[view, rows] = augment(images[rows], parameters[view, rows])
    print(f"wrote {out}; next: python 01_embed.py --data {args.data} --images {out}/views.npy --out {out} --cls-only")
