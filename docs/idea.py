"""Draws docs/idea.png, what the two papers do, from the images of `make demo`:  python docs/idea.py runs/digits16"""
import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits16")
images = np.load(run / "images.npy", mmap_mode="r", allow_pickle=False)
samples = {m: np.load(run / f"samples/{m}_w1/samples.npy", mmap_mode="r", allow_pickle=False) for m in ("recon", "pairs")}
condition = int(np.load(run / "samples/pairs_w1/conditions.npy", allow_pickle=False)[3])   # the 3
page = np.arange(3 * 12, 3 * 12 + 8)                                                       # a training page of threes
figure, axes = plt.subplots(figsize=(11, 5.2))
axes.set(xlim=(0, 11), ylim=(0, 5.2))
axes.axis("off")


def picture(x, y, image, side=0.8):
    axes.imshow(image, extent=(x, x + side, y, y + side), interpolation="nearest", zorder=2)


def box(x, y, text, color, width=1.6):
    axes.text(x + width / 2, y + 0.4, text, ha="center", va="center", fontsize=10, zorder=2,
              bbox=dict(boxstyle="round,pad=0.5", facecolor=color, edgecolor="none"))


def arrow(x0, x1, y):
    axes.annotate("", (x1, y + 0.4), (x0, y + 0.4), arrowprops=dict(arrowstyle="->", color="0.3"))


noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
for y, title, source, target, model, kind in (
        (4.0, "reconstruction (03): the condition is the target", page[0], page[0], "recon", "it copies"),
        (2.2, "Semantica (04): condition and target are two images of one page", page[0], page[5], "pairs", "it varies")):
    axes.text(0.1, y + 1.0, title, fontsize=11, weight="bold")
    picture(0.1, y, images[source])
    arrow(1.0, 1.5, y)
    box(1.5, y, "frozen\nencoder", "#dde6f0")
    arrow(3.0, 3.5, y)
    box(3.5, y, "U-ViT\ndenoises", "#f3dfc8")
    arrow(5.0, 5.5, y)
    picture(5.5, y, images[target])
    axes.text(6.5, y + 0.4, "then,\ngiven", fontsize=9, va="center")
    picture(7.1, y, images[condition])
    axes.text(8.0, y + 0.4, f"{kind}:", fontsize=9, va="center")
    for k in range(2):
        picture(8.95 + 0.9 * k, y, samples[model][3, k + 1])
y = 0.4
axes.text(0.1, y + 1.0, "2SDM (07): sample the embedding first, then the image given it", fontsize=11, weight="bold")
picture(0.1, y, noise)
arrow(1.0, 1.5, y)
box(1.5, y, "prior\ny ~ p(y)", "#dde6f0")
arrow(3.0, 3.5, y)
box(3.5, y, "U-ViT\nx ~ p(x | y)", "#f3dfc8")
arrow(5.0, 5.5, y)
axes.text(5.6, y + 0.4, "an image, unconditionally", fontsize=10, va="center")
figure.savefig(Path(__file__).with_name("idea.png"), dpi=100, bbox_inches="tight")
