"""figures: every plot of the project, drawn from the files of a run. What the files do not allow is named and left out.

Reads   RUN, the folder of 01_embed.py with what 02 to 07 wrote into it; FIGURES, below, says which files
Writes  RUN/figures/NAME.png, a file for each name of FIGURES

filter also prints how well the filter of 02 drops what examples/digits.py planted. sweep reads models named as in
pca16_1000: 07's array pca16, trained for 1,000 steps (kmeans16_1000, film_1000: the embedding itself, none_1000).

    python -m docs.figures runs/digits16                            # all, 15 s
    python -m docs.figures runs/digits16 --only idea --out docs     # the picture in the README
"""
import argparse
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator

import common

plt.switch_backend("Agg")
plt.rcParams |= {"font.size": 13, "lines.markersize": 8, "legend.frameon": False,
                 "axes.spines.top": False, "axes.spines.right": False}
ROWS = ("unconditional", "kmeans*", "oracle", "2sdm", "2sdm_fewer_steps")    # folders of RUN/twostage, from 07 and 05
COMPARED = ("unconditional", "2sdm", "oracle")                         # those without which there are no figures


def read(run, *names):
    """The arrays run/NAME.npy."""
    return [common.load(run / f"{name}.npy") for name in names]


def log_scale(axes):
    """A logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def draw_images(axes, rows, names=()):
    """Rows of uint8 [S, S, 3] images as one picture, with a name left of each row; None leaves a gap."""
    size = len(rows[0][0])
    gap = np.full((size + 2, size // 2, 3), 255, np.uint8)
    frame = ((1, 1), (1, 1), (0, 0))
    rows = [[gap if i is None else np.pad(i, frame, constant_values=255) for i in row] for row in rows]
    axes.imshow(np.concatenate([np.concatenate(row, 1) for row in rows]), interpolation="nearest")
    axes.set(xticks=[], yticks=(np.arange(len(names)) + 0.5) * (size + 2), yticklabels=names)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


# ----------------------------------------------------------------------------------------------------------------------
# Semantica


def same_page_pairs(cls, pages, chosen):
    """All ordered pairs of two of the images `chosen` [n] on one page: i [p], j [p] and their cosines [p].

    Of a page with more than 1,000 images, of the first 1,000: more would fill the memory and look the same.
    """
    chosen = chosen[np.argsort(pages[chosen], kind="stable")]
    found = []
    for members in np.split(chosen, np.flatnonzero(np.diff(pages[chosen])) + 1):
        members = members[:1000]
        unit = cls[members] / np.linalg.norm(cls[members], axis=1, keepdims=True)
        a, b = np.nonzero(~np.eye(len(members), dtype=bool))
        found.append((members[a], members[b], (unit @ unit.T)[a, b]))
    return [np.concatenate(part) for part in zip(*found)]


def planted_pairs(names, i, j):
    """What examples/digits.py planted: [p] pairs with a stranger, [p] pairs of a near-duplicate and its original.

    The file names: 00-digit0-71.png, 10-stranger-digit6-3183.png, 11-near-duplicate-digit0-71.png.
    """
    files = np.array([Path(name).stem for name in names])
    stranger = np.char.find(files, "stranger") >= 0
    double = np.char.find(files, "near-duplicate") >= 0
    digit = np.array([file.rpartition("digit")[2] for file in files])
    return stranger[i] | stranger[j], (double[i] | double[j]) & (digit[i] == digit[j])


def filter_pairs(run):
    """Cosines of two images of one page: below the kept band they are mostly unrelated, above it nearly the same."""
    cls, pages, split, names, kept = read(run, "cls", "pages", "split", "names", "sims")
    low, high = kept.min(), kept.max()
    i, j, sims = same_page_pairs(cls, pages, np.flatnonzero(split == 0))
    below, above = sims < low - 1e-6, sims > high + 1e-6               # 02 rounds the same cosines differently
    stranger, double = planted_pairs(names, i, j)
    kinds = {"other pairs of one page": ~stranger & ~double}
    for name, planted, side, dropped in (("with a planted stranger", stranger, "below", below),
                                         ("a planted near-duplicate and its original", double, "above", above)):
        if planted.any():
            hits = np.count_nonzero(planted & dropped)
            precision, recall = hits / max(1, np.count_nonzero(dropped)), hits / np.count_nonzero(planted)
            label = f"{name}; dropped {side} the band: precision {precision:.2f}, recall {recall:.2f}"
            print(f"filter: {label}")
            kinds[label] = planted
    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    axes.axvspan(low, high, color="0.92", zorder=0, label=f"kept: {low:.3f} to {high:.3f}")
    for name, pairs in kinds.items():
        share, edges = np.histogram(sims[pairs], 80, (sims.min(), 1))
        axes.stairs(100 * share / len(sims), edges, fill=True, alpha=0.6, label=name)
    axes.set(xlim=(sims.min(), 1), xlabel="cosine of the two embeddings", ylabel="% of the pairs of one page")
    figure.legend(loc="outside upper left")
    return figure


def precision_recall(run):
    """Precision (are samples realistic?) against recall (do they cover the data?); the best is top right."""
    rows, groups = common.load(run / "metrics.json"), {}
    several = len({row.get("sample_steps", 0) for row in rows if row["guidance"] is not None}) > 1
    for row in rows:
        name = f"{row['model']}, {row['sample_steps']} steps" if several and "sample_steps" in row else row["model"]
        groups.setdefault(name, {}).setdefault(row["guidance"], []).append([row["recall"], row["precision"]])
    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    for model, points in groups.items():
        guidance = sorted(points, key=lambda w: w or 0)
        mean = np.array([np.mean(points[w], 0) for w in guidance])     # [W, 2]: over seeds and draws
        spread = np.array([np.std(points[w], 0, ddof=min(1, len(points[w]) - 1)) for w in guidance])
        axes.errorbar(*mean.T, *spread.T[::-1], fmt="k*" if model.startswith("real") else "o-", label=model)
        for w, point in zip(guidance, mean):
            axes.annotate("" if w is None else f"{w:g}", point, xytext=(6, 6), textcoords="offset points")
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall: share of real images near a sample",
             ylabel="precision: share of samples near a real image", title="at the points: guidance w")
    axes.legend()
    return figure


def training(run):
    """The loss over steps: some noise levels still improve when the mean over all of them looks flat."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 5), layout="constrained", sharey=True)
    for name, axes in zip(("recon", "pairs"), panels[1:]):
        log = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in log]
        panels[0].plot(steps, [row["loss"] for row in log], label=name)
        for level, losses in enumerate(zip(*(row["by_noise_level"] for row in log))):
            label = f"t from {level / 5:g} to {(level + 1) / 5:g}"
            axes.plot(steps, losses, color=plt.cm.plasma(level / 5), label=label)
        axes.set(xlabel="step", title=f"{name}, by noise level t")
    panels[0].set(xlabel="step", ylabel="loss", title="mean over noise levels")
    panels[0].legend()
    panels[1].legend(title="0: no noise, 1: only noise")
    log_scale(panels[0])
    return figure


def idea(run):
    """What the two papers do. Drawn for the digits, where training page k and condition k show the digit k."""
    images, pages, split, conditions = read(run, "images", "pages", "split", "samples/pairs_w1/conditions")
    k = len(conditions) // 2 - 1                                       # the four
    page = np.flatnonzero((pages == k) & (split == 0))
    figure, axes = plt.subplots(figsize=(11, 5.2), layout="constrained")
    axes.set(xlim=(0, 11), ylim=(0.3, 5.4))
    axes.axis("off")

    def picture(x, y, image):
        axes.imshow(image, extent=(x, x + 0.8, y, y + 0.8), interpolation="nearest", zorder=2)

    def flow(y, title, source, first, second):
        """A title, a picture, two stages, and the arrows in between."""
        axes.text(0.1, y + 1.0, title, fontsize=14, weight="bold")
        picture(0.1, y, source)
        for x, text, color in ((2.25, first, "#dde6f0"), (4.25, second, "#f3dfc8")):
            box = dict(boxstyle="round,pad=0.5", facecolor=color, edgecolor="none")
            axes.text(x, y + 0.4, text, ha="center", va="center", bbox=box)
        for x in (1.0, 3.0, 5.0):
            axes.annotate("", (x + 0.5, y + 0.4), (x, y + 0.4), arrowprops=dict(arrowstyle="->", color="0.3"))

    copies = "reconstruction (03): the condition is the target"
    varies = "Semantica (04): condition and target are two images of one page"
    for y, title, target, model, verb in ((4.0, copies, page[0], "recon", "it copies:"),
                                          (2.2, varies, page[len(page) // 2], "pairs", "it varies:")):
        flow(y, title, images[page[0]], "frozen\nencoder", "U-ViT\ndenoises")
        picture(5.6, y, images[target])
        axes.text(6.55, y + 0.4, "then,\ngiven", va="center")
        picture(7.25, y, images[conditions[k]])
        axes.text(8.15, y + 0.4, verb, va="center")
        samples, = read(run, f"samples/{model}_w1/samples")
        picture(9.2, y, samples[k, 1])
        picture(10.1, y, samples[k, 2])
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    title = "2SDM (07): sample the embedding first, then the image given it"
    flow(0.4, title, noise, "prior\ny ~ p(y)", "U-ViT\nx ~ p(x | y)")
    axes.text(5.65, 0.8, "an image, unconditionally", va="center")
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# 2SDM


def table_rows(run):
    """The first 16 samples of each row of the table. A column shares its image noise, only the embedding differs."""
    folders = [folder for row in ROWS for folder in sorted((run / "twostage").glob(row))]
    samples = [common.load(folder / "samples.npy")[:16, 0] for folder in folders]        # [16, S, S, 3] each
    figure, axes = plt.subplots(figsize=(13.5, 0.75 * len(folders)), layout="constrained")
    draw_images(axes, [list(images) for images in samples], [folder.name for folder in folders])
    return figure


def nearest(x, real, k):
    """The k rows of real [m, ...] nearest to each row of x [n, ...]: distances [n, k], indices [n, k]."""
    x, real = (torch.from_numpy(np.array(a, np.float32)).flatten(1) for a in (x, real))
    found = [torch.cdist(part, real).topk(k, largest=False) for part in x.split(500)]
    return [torch.cat(parts).numpy() for parts in zip(*found)]


def neighbours(run):
    """2SDM samples beside the nearest training images: a sample that equals one of them was memorised."""
    images, cls, split = read(run, "images", "cls", "split")
    samples, features = read(run / "twostage/2sdm", "samples", "cls")
    train = np.flatnonzero(split == 0)
    _, by_pixels = nearest(samples[:10, 0], images[train], 6)
    _, by_embedding = nearest(features[:10], cls[train], 6)
    figure, axes = plt.subplots(figsize=(7.5, 6), layout="constrained")
    sheet = [[sample, None, *images[train[a]], None, *images[train[b]]]
             for sample, a, b in zip(samples[:10, 0], by_pixels, by_embedding)]
    draw_images(axes, sheet)
    gap, side = images.shape[1] // 2, images.shape[1] + 2              # of the columns: 1 | gap | 6 | gap | 6
    axes.text(0.5 * side, -3, "2SDM", ha="center")
    axes.text(4 * side + gap, -3, "nearest training images in pixels", ha="center")
    axes.text(10 * side + 2 * gap, -3, "in embedding", ha="center")
    return figure


def distances(run):
    """How near the nearest training image is. A curve well left of the held-out images is of a model that memorises."""
    images, cls, split = read(run, "images", "cls", "split")
    train, held_out = np.flatnonzero(split == 0), np.flatnonzero(split == 1)
    sets = {"held-out images": (images[held_out], cls[held_out])} if len(held_out) else {}
    for row in COMPARED:
        samples, features = read(run / "twostage" / row, "samples", "cls")
        sets[row] = samples[:, 0], features
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for k, (axes, space, real) in enumerate(zip(panels, ("pixels", "embedding"), (images[train], cls[train]))):
        found = {name: nearest(x[k], real, 1)[0][:, 0] for name, x in sets.items()}
        edges = np.linspace(0, max(map(np.max, found.values())), 50)
        for name, near in found.items():
            axes.stairs(np.histogram(near, edges)[0] / len(near) * 100, edges, linewidth=2, label=name)
        axes.set(xlabel=f"distance to the nearest training image, {space}", ylabel="% of the images")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def sweep(run):
    """FID over how much of the embedding the image model is told, a colour a budget. Models are named WHAT_STEPS."""
    fid = {}
    for row in common.load(run / "twostage/sweep/metrics.json"):
        if name := re.fullmatch(r"(none|film|pca|kmeans)(\d*)_(\d+)", row["model"]):
            what, size, steps = name.groups()
            fid.setdefault(int(steps), {}).setdefault(what, {})[int(size or 0)] = row["fid"]
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    for axes, kind, told in zip(panels, ("pca", "kmeans"), ("principal components", "k-means clusters")):
        for colour, (steps, by_what) in enumerate(sorted(fid.items())):
            points = dict(sorted(by_what.get(kind, {}).items()))
            axes.plot(list(points), list(points.values()), "o-", color=f"C{colour}", label=f"{steps} steps")
            for what, style, label in (("none", "--", "told nothing"), ("film", ":", "told all of y")):
                for value in by_what.get(what, {}).values():
                    axes.axhline(value, color=f"C{colour}", linestyle=style, label=f"{steps} steps, {label}")
        sizes = sorted({size for by_what in fid.values() for size in by_what.get(kind, {})})
        axes.set(xscale="log", xlabel=f"{told} of y that the image model is told")
        axes.set_xticks(sizes, sizes)
        log_scale(axes)
    panels[0].set_ylabel("FID")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(fid))
    return figure


def slerp(a, b, fractions):
    """Points [F, *shape] on the great circle from a to b [*shape]: between two noises, with the norm of noise."""
    f = fractions.view(-1, *[1] * a.dim())
    angle = torch.arccos(torch.cosine_similarity(a.flatten(), b.flatten(), 0))
    return (torch.sin((1 - f) * angle) * a + torch.sin(f * angle) * b) / torch.sin(angle)


@torch.no_grad()
def interpolation(run):
    """Down, the embedding moves and the content changes; across, the image's noise moves and details change."""
    device, _, _ = common.start()
    y = torch.from_numpy(np.array(common.load(run / "twostage/y_grid.npy"))).to(device)  # [8, D]: 07 interpolated it
    checkpoint = common.load(run / "film.pt")
    config, side = checkpoint["config"], len(y)
    model = common.UViT(**config["network"]).to(device).eval()
    model.load_state_dict(checkpoint["ema"])
    ends = [common.generator(device, 0, end, 0, 5) for end in (0, 1)]

    def noise():                                                       # the noise of every step, not of the first only
        a, b = common.randn(ends, (3, config["size"], config["size"]))
        return slerp(a, b, torch.linspace(0, 1, side, device=device)).repeat(side, 1, 1, 1)   # [8 * 8, 3, S, S]

    u = torch.linspace(1, 0, config["sample_steps"] + 1, device=device)              # as in common.sample_images
    logsnrs = common.logsnr_schedule(u ** config["time_power"], config["size"], config["noise_size"])
    x = common.ddpm(common.guide(model, 0, {"cls": y.repeat_interleave(side, 0)}), noise, logsnrs)
    x = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).unflatten(0, (side, side)).cpu().numpy()
    figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    draw_images(axes, list(x))
    axes.set(xlabel="the image's noise, from one to another \u2192", ylabel="\u2190 the embedding, from one to another")
    return figure


FIGURES = {                                                            # the function, and the files it needs
    "filter": (filter_pairs, ["cls.npy", "pages.npy", "split.npy", "names.npy", "sims.npy"]),
    "precision_recall": (precision_recall, ["metrics.json"]),
    "training": (training, ["recon.jsonl", "pairs.jsonl"]),
    "rows": (table_rows, [f"twostage/{row}/samples.npy" for row in COMPARED]),
    "neighbours": (neighbours, ["images.npy", "cls.npy", "twostage/2sdm/cls.npy"]),
    "distances": (distances, ["images.npy", "cls.npy", *(f"twostage/{row}/cls.npy" for row in COMPARED)]),
    "sweep": (sweep, ["twostage/sweep/metrics.json"]),
    "interpolation": (interpolation, ["film.pt", "twostage/y_grid.npy"]),
    "idea": (idea, ["images.npy", "samples/recon_w1/samples.npy", "samples/pairs_w1/samples.npy"]),
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="folder of a run, as runs/digits16")
    p.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), help="these figures")
    p.add_argument("--out", type=Path, help="folder to write (default RUN/figures)")
    args = p.parse_args()
    out = args.out or args.run / "figures"
    for name in args.only:
        draw, files = FIGURES[name]
        missing = [file for file in files if not (args.run / file).exists()]
        if missing:
            print(f"{name}: not drawn, {args.run} has no {', '.join(missing)}")
            continue
        figure = draw(args.run)
        with common.writing(out / f"{name}.png") as f:
            figure.savefig(f, dpi=120, format="png", bbox_inches="tight")
        print(f"wrote {out}/{name}.png")


if __name__ == "__main__":
    main()
