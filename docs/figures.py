"""figures: every plot of the project, drawn from the files of a run. What the files do not allow is named and left out.

Reads   RUN, the folder of 01_embed.py with what 02 to 07 wrote into it; FIGURES, below, says which files
Writes  RUN/figures/NAME.png, a file for each name of FIGURES

filter also prints how well the filter of 02 drops what examples/digits.py planted. sweep reads models named as in
pca16_1000: 07's array pca16, trained for 1,000 steps (kmeans16_1000, film_1000: the embedding itself, none_1000).
quiz prints its key. gain prints its curves as a table too; it also reads what is still training (recon.pt.partial).

    python -m docs.figures runs/digits16                            # all, two minutes
    python -m docs.figures runs/digits16 --only idea --out docs     # the picture in the README
    make figures                                                    # those of a lecture (docs/course.md)
"""
import argparse
import importlib
import json
import re
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.ticker import LogLocator
from PIL import Image

import common

twostage = importlib.import_module("07_twostage")
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


def load_network(path, device):
    """The network of a checkpoint of 03 or 04, with its averaged weights, and its config."""
    checkpoint = common.load(path, "03_train_recon.py or 04_train_pairs.py")
    model = common.UViT(**checkpoint["config"]["network"])
    model.load_state_dict(checkpoint["ema"])
    return model.to(device).eval(), checkpoint["config"]


def times(config, device):
    """The log-SNRs [steps + 1] of the sampler, as in common.sample_images."""
    u = torch.linspace(1, 0, config["sample_steps"] + 1, device=device)
    return common.logsnr_schedule(u ** config["time_power"], config["size"], config["noise_size"])


def pictures(x):
    """Images [B, 3, S, S] in [-1, 1], or beyond it -> [B, S, S, 3] uint8."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


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
    """The loss over steps: some noise levels still improve when the mean over all of them looks flat.

    Grey: three seeds of our `make demo` (docs/reference), if this run has its learning rates.
    """
    figure, panels = plt.subplots(1, 3, figsize=(15, 5), layout="constrained", sharey=True)
    for name, axes in zip(("recon", "pairs"), panels[1:]):
        log = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
        steps = [row["step"] for row in log]
        panels[0].plot(steps, [row["loss"] for row in log], label=name)
        reference = (Path(__file__).parent / f"reference/{name}.jsonl").read_text().splitlines()
        seeds = {}                                                     # (step, learning rate) -> loss of each seed
        for row in map(json.loads, reference):
            seeds.setdefault((row["step"], round(row["lr"], 8)), []).append(row["loss"])
        known = [(step, seeds.get((step, round(row["lr"], 8)))) for step, row in zip(steps, log)]
        if all(losses for _, losses in known):
            panels[0].fill_between(steps, *(zip(*((min(a), max(a)) for _, a in known))), color="0.8", zorder=0)
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
    (model, config), side = load_network(run / "film.pt", device), 8
    prior, _ = twostage.load_prior(run / "prior.pt", device)

    def between(first, last, shape):
        """Noise [side, *shape] on the way from one to the other, at every step of a sampler, not at the first only."""
        return slerp(*common.randn([first, last], shape), torch.linspace(0, 1, side, device=device))

    ends = [common.generator(device, 0, i, 0, 4) for i in (0, 999)]    # those of the first and the last y of 07
    noise = partial(between, *ends, (config["encoder"]["dim"], 1, 1))
    y = twostage.sample_y(prior, noise, torch.zeros(side, 0, device=device), config["sample_steps"])         # [side, D]
    condition = {"cls": torch.from_numpy(y).to(device).repeat_interleave(side, 0)}
    ends = [common.generator(device, 0, i, 0, 5) for i in (0, 1)]
    shape = (3, config["size"], config["size"])
    x = common.ddpm(common.guide(model, 0, condition), lambda: between(*ends, shape).repeat(side, 1, 1, 1),
                    times(config, device))
    figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    draw_images(axes, np.split(pictures(x), side))
    axes.set(xlabel="the image's noise, from one to another \u2192", ylabel="\u2190 the embedding, from one to another")
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# For a lecture: what to see in each is the first line of its docstring


def schedule(run):
    """A larger image shows more at the same noise, so its curve lies lower: log-SNR falls by 2 log(32 / size)."""
    t = torch.linspace(0.001, 0.999, 500)
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for size, style in ((32, "k-"), (64, "C0-"), (256, "C1-")):
        label = f"{size} px, " + ("not shifted" if size == 32 else f"shifted by 2 log(32 / {size})")
        axes.plot(t, common.logsnr_schedule(t, size, 32), style, label=label)
    axes.axhline(0, color="0.8", zorder=0)
    axes.text(0.7, 0.3, "as much noise as image", color="0.5")
    axes.set(xlabel="time t", ylabel="log-SNR", xlim=(0, 1))
    axes.legend(title="cosine schedule, noise_size 32")
    return figure


def noised(run):
    """With the plain schedule a digit of 64 px stays visible for longer. The shifted one hides it as early as 16 px."""
    images, split = read(run, "images", "split")
    digit = images[np.flatnonzero(split == split.max())[0]]
    t = torch.linspace(0, 1, 11)
    rows = []
    for size, shown_as in ((16, 16), (64, 64), (64, 16)):              # size of the image, noise_size of the schedule
        x = np.array(Image.fromarray(digit).resize((size, size), Image.BICUBIC))
        x = torch.from_numpy(x).permute(2, 0, 1) / 127.5 - 1
        alpha, sigma = common.alpha_sigma(common.logsnr_schedule(t, size, shown_as))
        eps = torch.randn(x.shape, generator=common.generator("cpu", 0, size, 0, 5))
        large = pictures((alpha * x + sigma * eps) / (alpha + sigma))
        rows.append([np.array(Image.fromarray(i).resize((64, 64), Image.NEAREST)) for i in large])
    figure, axes = plt.subplots(figsize=(13, 4), layout="constrained")
    draw_images(axes, rows, ["16 px", "64 px, plain", "64 px, shifted"])
    axes.set_xticks((np.arange(len(t)) + 0.5) * 66, [f"t = {i:.1f}" for i in t])
    return figure


def told_of(run, config, rows, device):
    """What a network with this config is told of the images `rows` of a run."""
    return common.take(common.condition_arrays(run, config["cond"]), rows, device)


@torch.no_grad()
def denoising(run):
    """The first steps decide which digit it is, the last ones draw its edges."""
    device, _, _ = common.start()
    images, conditions = read(run, "images", "samples/pairs_w1/conditions")
    figure, axes = plt.subplots(figsize=(14, 5), layout="constrained")
    sheet, names, chosen = [], [], conditions[len(conditions) // 2 - 1]
    for name in ("recon", "pairs"):
        model, config = load_network(run / f"{name}.pt", device)
        logsnrs, seen = times(config | dict(sample_steps=12, time_power=2), device), []
        guided = common.guide(model, 1, told_of(run, config, [chosen] * 2, device))

        def denoise(z, logsnr):
            v = guided(z, logsnr)
            alpha, sigma = common.alpha_sigma(logsnr)
            seen.append(pictures(alpha * z - sigma * v))               # x_hat, [2, S, S, 3]
            return v
        noise = [common.generator(device, 0, i, 0, 5) for i in range(2)]
        common.ddpm(denoise, lambda: common.randn(noise, (3, config["size"], config["size"])), logsnrs, 0)
        for i in range(2):
            sheet.append([images[chosen], None, *(x[i] for x in seen)])
            names.append(f"{name}, noise {i + 1}")
    draw_images(axes, sheet, names)
    side, gap = images.shape[1] + 2, images.shape[1] // 2
    ticks = [side / 2] + [side * (i + 1.5) + gap for i in range(12)]
    axes.set_xticks(ticks, ["told", *(f"{round(value):+d}" for value in logsnrs[:-1].tolist())])
    axes.set_xlabel("x_hat, the image that the network expects, at each step; numbers: log-SNR of the noisy image")
    return figure


@torch.no_grad()
def attention(run):
    """All patches look at the same few tokens of the condition, the empty corners most of all.

    So they read what the image is, not what is at their own place. Weights are means over blocks and heads.
    """
    device, _, _ = common.start()
    images, conditions = read(run, "images", "samples/pairs_w1/conditions")
    chosen = conditions[len(conditions) // 2 - 1]
    model, config = load_network(run / "pairs.pt", device)
    maps = []

    def look(layer, inputs, output):
        x, context = inputs                                            # [1, N, D], [1, T, D]
        q, k = layer.q(x), layer.kv(context).chunk(2, -1)[0]
        q, k = (a.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for a in (q, k))
        maps.append((q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean((0, 1)))          # [N, T]
    for block in model.middle.blocks:
        block.cross.register_forward_hook(look)
    told = told_of(run, config, [chosen], device)
    x = torch.from_numpy(np.array(images[[chosen]])).to(device).permute(0, 3, 1, 2) / 127.5 - 1
    eps = common.randn([common.generator(device, 0, 0, 0, 5)], x.shape[1:])
    grid, size = round(model.middle.pos.shape[0] ** 0.5), config["size"]
    patches = [grid * (grid // 2 - 1) + grid // 2 - 1, grid * (grid // 2) + grid // 2, grid * (grid - 1) + grid // 2]
    figure, panels = plt.subplots(3, 1 + len(patches), figsize=(9, 7.5), layout="constrained")
    for row, logsnr in zip(panels, (-6, -2, 3)):
        maps.clear()
        logsnr = torch.tensor([float(logsnr)], device=device)
        alpha, sigma = common.alpha_sigma(logsnr)
        model(alpha * x + sigma * eps, logsnr, **told)
        mean = torch.stack(maps).mean(0)                               # [N, T], over blocks and heads
        row[0].imshow(pictures(alpha * x + sigma * eps)[0])
        row[0].set_ylabel(f"log-SNR {logsnr.item():+.0f}")
        for number, (axes, patch) in enumerate(zip(row[1:], patches), 1):
            side, top = size / grid, divmod(patch, grid)
            row[0].text((top[1] + 0.5) * side, (top[0] + 0.5) * side, number, color="C1", weight="bold", ha="center")
            tokens = mean[patch].view(1, 1, round(mean.shape[1] ** 0.5), -1)
            axes.imshow(images[chosen])
            whole = (-0.5, size - 0.5, size - 0.5, -0.5)
            heat = axes.imshow(tokens[0, 0].cpu(), cmap="inferno", alpha=0.75, extent=whole)
            heat.set_clim(0, 4 / mean.shape[1])                        # 4 times what even attention would give
            axes.set_title(f"patch {number} looks at")
    for axes in panels.flat:
        axes.set(xticks=[], yticks=[])
    panels[0, 0].set_title("noisy image")
    figure.colorbar(heat, ax=panels, shrink=0.5, label="share of the attention")
    return figure


TOLD = ("itself", "another image of its page", "nothing", "an image of another page")


@torch.no_grad()
def condition_gain(path, run, levels, device, n=100):
    """Loss in v of n held-out images, [4, len(levels)], at these log-SNRs, told what TOLD says; always the same noise.

    A copier gains from the image itself only; a model that varies gains nearly as much from another image of the page.
    """
    model, config = load_network(path, device)
    images, pages, split = read(run, "images", "pages", "split")
    rng, held_out = np.random.default_rng(0), np.flatnonzero(split == split.max())
    trios = []
    for i in rng.permutation(held_out)[:n]:
        page = np.setdiff1d(np.flatnonzero(pages == pages[i]), i)
        mates = page[split[page] == split[i]]
        others = held_out[pages[held_out] != pages[i]]
        trios.append((i, rng.choice(mates if len(mates) else page), rng.choice(others)))
    itself, mate, other = np.array(trios).T
    x = torch.from_numpy(images[itself]).to(device).permute(0, 3, 1, 2) / 127.5 - 1
    eps = common.randn([common.generator(device, 0, i, 0, 5) for i in range(len(x))], x.shape[1:])
    drop = torch.ones(len(x), dtype=torch.bool, device=device)
    found = []
    for rows, dropped in ((itself, None), (mate, None), (itself, drop), (other, None)):
        told = told_of(run, config, rows, device)
        for level in levels:
            logsnr = torch.full((len(x),), level, device=device)
            alpha, sigma = common.alpha_sigma(logsnr)
            v_pred = model(alpha * x + sigma * eps, logsnr, drop=dropped, **told)
            found.append(common.diffusion_loss(v_pred, x, eps, logsnr, "v").mean().item())
    return np.array(found).reshape(4, -1)


def told_curves(curves, xlabel, ylabel):
    """A panel for each model of curves {name: (x [n], losses [4, n])}, and in it a curve for each entry of TOLD."""
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
    for axes, (name, (x, losses)) in zip(panels, curves.items()):
        for label, style, row in zip(TOLD, ("k.-", "C2.-", "C0.--", "C3.-"), losses):
            axes.plot(x, row, style, label=label)
        axes.set(title=name, xlabel=xlabel)
    panels[0].set_ylabel(ylabel)
    log_scale(panels[0])
    panels[1].legend(title="told")
    return figure


def gain(run):
    """Another image of its page is worse than nothing for the copier, for pairs nearly as good as the image itself."""
    device, _, _ = common.start()
    levels, curves = [-9.0, -7.0, -5.0, -4.0, -3.0, -2.0, -1.0, 1.0, 3.0, 5.0], {}
    for name in ("recon", "pairs"):
        path = run / f"{name}.pt"
        losses = condition_gain(path if path.exists() else f"{path}.partial", run, levels, device)
        numbers = [f"{loss:.3f} told {what}" for loss, what in zip(losses[:, levels.index(-3)], TOLD)]
        print(f"gain: {name}, loss in v at log-SNR -3: {', '.join(numbers)}")
        curves[name] = levels, losses
    xlabel = "log-SNR: mostly noise on the left, mostly image on the right"
    return told_curves(curves, xlabel, "loss of held-out images")


def gain_training(run):
    """Told another image of the page, the copier gets worse in training, and the pair model better.

    The checkpoints were copied during the training, as in cp RUN/recon.pt.partial RUN/snapshots/recon_4000.pt.
    """
    device, _, _ = common.start()
    curves = {}
    for name in ("recon", "pairs"):
        paths = [*(run / "snapshots").glob(f"{name}_*.pt"), *run.glob(f"{name}.pt")]
        losses = {common.load(path)["step"]: condition_gain(path, run, [-3.0], device)[:, 0] for path in paths}
        steps = sorted(losses)
        curves[name] = steps, np.transpose([losses[step] for step in steps])
    return told_curves(curves, "step", "loss of held-out images at log-SNR -3")


def guidance_rows(run):
    """The copier draws its condition at every w. The pair model's samples differ, and get bolder with more guidance."""
    device, _, _ = common.start()
    images, conditions = read(run, "images", "samples/pairs_w1/conditions")
    chosen, weights, how = conditions[len(conditions) // 2 - 1], (0, 0.5, 1, 2, 4), dict(sample_steps=12, time_power=2)
    sheet = [[images[chosen], None] for _ in weights]
    for name in ("recon", "pairs"):
        model, config = load_network(run / f"{name}.pt", device)
        told = told_of(run, config, [chosen] * 8, device)
        for row, w in zip(sheet, weights):
            generators = [common.generator(device, 0, i, 0, 5) for i in range(8)]
            row += [None, *common.sample_images(model, told, generators, w, config | how, 0)]
    figure, axes = plt.subplots(figsize=(14, 4.5), layout="constrained")
    draw_images(axes, sheet, [f"w = {w:g}" for w in weights])
    side, gap = images.shape[1] + 2, images.shape[1] // 2
    axes.set_xticks([side / 2, 5 * side + 2 * gap, 13 * side + 3 * gap], ["told", "reconstruction", "pairs"])
    return figure


def band_pairs(run):
    """Below the band a pair shows two digits or very different ones; above it, nearly the same picture twice."""
    images, cls, pages, split, kept = read(run, "images", "cls", "pages", "split", "sims")
    low, high = kept.min(), kept.max()
    i, j, sims = same_page_pairs(cls, pages, np.flatnonzero(split == 0))
    order, rng = np.argsort(sims), np.random.default_rng(0)
    first, last = np.searchsorted(sims[order], [low - 1e-6, high + 1e-6])
    tenth = (last - first) // 10
    parts = {f"dropped, below {low:.2f}": (0, first), f"kept, near {low:.2f}": (first, first + tenth),
             f"kept, near {high:.2f}": (last - tenth, last), f"dropped, above {high:.2f}": (last, len(order))}
    sheet = []
    for start, end in parts.values():
        row = []
        for pair in order[rng.choice(np.arange(start, max(end, start + 1)), 7)]:
            row += [images[i[pair]], images[j[pair]], None]
        sheet.append(row[:-1])
    figure, axes = plt.subplots(figsize=(14, 3.8), layout="constrained")
    draw_images(axes, sheet, list(parts))
    return figure


def recall(run):
    """A real point counts for recall if it lies in a ball of a sample. Few points lie in those of a copier.

    After the short training of make demo the copier is not one yet; docs/course.md draws it with pretrained/.
    """
    cls, pages, split, conditions = read(run, "cls", "pages", "split", "samples/pairs_w1/conditions")
    row = len(conditions) // 2 - 1
    sets = {"real": cls[(pages == pages[conditions[row]]) & (split == split.max())]}
    for name in ("recon", "pairs"):
        features, = read(run, f"samples/{name}_w1/cls")
        sets[name] = features.reshape(len(conditions), -1, features.shape[1])[row]       # [k, D]
    everything = np.concatenate(list(sets.values()))
    centre = everything.mean(0)
    plane = np.linalg.svd(everything - centre, full_matrices=False)[2][:2].T              # [D, 2]
    real, *both = (torch.from_numpy((x - centre) @ plane) for x in sets.values())
    figure, panels = plt.subplots(1, 2, figsize=(13, 6.5), layout="constrained", sharex=True, sharey=True)
    for axes, name, fake in zip(panels, ("recon", "pairs"), both):
        radii = torch.cdist(fake, fake).kthvalue(4).values             # to the third neighbour; the first is itself
        covered = (torch.cdist(real, fake) <= radii).any(1)
        for point, radius in zip(fake, radii):
            axes.add_patch(plt.Circle(point, radius, color="C1", alpha=0.08, linewidth=0))
        axes.plot(*fake.T, "C1.", label="samples, and their balls")
        axes.plot(*real[covered].T, "C0o", label="real, covered")
        axes.plot(*real[~covered].T, "o", color="0.6", fillstyle="none", label="real, not covered")
        axes.plot(*((cls[conditions[row]] - centre) @ plane), "k*", markersize=14, label="the condition")
        axes.set(title=f"{name}: recall {covered.float().mean():.2f} in this plane", xlabel="first principal component")
        axes.set_aspect("equal")
    panels[0].set_ylabel("second principal component")
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def quiz(run, shown):
    """Which row is of which page? Left: a row of samples of one condition. Right: training images of the pages.

    shown "conditions": the condition alone in place of its samples, to see how hard the question is. Pages that differ
    in a number only, as FACE-0 and FACE-1, 000-digit0 and 001-digit0, are one; of 26 pages at most. Both pictures have
    one key. It is printed, and how often the nearest training image, in the features of RUN, is of the right page.
    """
    images, cls, split, names = read(run, "images", "cls", "split", "names")
    samples, features, conditions = read(run / "samples/pairs_w1", "samples", "cls", "conditions")
    pages = np.array([re.sub(r"^\d+-|-\d+$", "", Path(name).parent.name) for name in names])
    rng, train = np.random.default_rng(0), split == 0
    asked, rows = np.unique(pages[conditions], return_index=True)      # of a page with several conditions, the first
    asked, rows = asked[:26], rows[:26]
    left = [samples[row][:8] if shown == "samples" else images[conditions[[row]]] for row in rows]
    right = [images[rng.permutation(np.flatnonzero(train & (pages == page)))[:8]] for page in asked]
    order = rng.permutation(len(asked))
    letters = [chr(ord("A") + i) for i in range(len(asked))]
    white = np.full_like(images[0], 255)
    figure, panels = plt.subplots(1, 2, figsize=(12, 0.6 * len(asked) + 1), layout="constrained")
    for axes, sheet, labels in zip(panels, ([left[i] for i in order], right), (range(1, len(asked) + 1), letters)):
        draw_images(axes, [[*row, *[white] * (8 - len(row))] for row in sheet], list(labels))
    print(f"quiz: {', '.join(f'{n} {letters[i]} {asked[i]}' for n, i in enumerate(order, 1))}")
    unit = cls[train] / np.linalg.norm(cls[train], axis=1, keepdims=True)
    told = np.repeat(pages[conditions], len(features) // len(conditions))
    for what, x, page in (("held-out images", cls[~train], pages[~train]),
                          ("conditions", cls[conditions], pages[conditions]), ("samples", features, told)):
        right_page = pages[train][(x @ unit.T).argmax(1)] == page
        print(f"quiz: {what}, nearest training image of the right page: {right_page.mean():.0%}")
    return figure


FIGURES = {                                                            # the function, and the files it needs
    "filter": (filter_pairs, ["cls.npy", "pages.npy", "split.npy", "names.npy", "sims.npy"]),
    "precision_recall": (precision_recall, ["metrics.json"]),
    "training": (training, ["recon.jsonl", "pairs.jsonl"]),
    "rows": (table_rows, [f"twostage/{row}/samples.npy" for row in COMPARED]),
    "neighbours": (neighbours, ["images.npy", "cls.npy", "twostage/2sdm/cls.npy"]),
    "distances": (distances, ["images.npy", "cls.npy", *(f"twostage/{row}/cls.npy" for row in COMPARED)]),
    "sweep": (sweep, ["twostage/sweep/metrics.json"]),
    "interpolation": (interpolation, ["film.pt", "prior.pt"]),
    "idea": (idea, ["images.npy", "samples/recon_w1/samples.npy", "samples/pairs_w1/samples.npy"]),
    "schedule": (schedule, []),
    "noised": (noised, ["images.npy"]),
    "denoising": (denoising, ["recon.pt", "pairs.pt", "samples/pairs_w1/conditions.npy"]),
    "attention": (attention, ["pairs.pt", "samples/pairs_w1/conditions.npy"]),
    "gain": (gain, ["images.npy"]),
    "gain_training": (gain_training, ["images.npy", "snapshots"]),
    "guidance_rows": (guidance_rows, ["recon.pt", "pairs.pt", "samples/pairs_w1/conditions.npy"]),
    "filter_pairs": (band_pairs, ["images.npy", "cls.npy", "sims.npy"]),
    "recall": (recall, ["samples/recon_w1/cls.npy", "samples/pairs_w1/cls.npy"]),
    "quiz": (partial(quiz, shown="samples"), ["names.npy", "samples/pairs_w1/cls.npy"]),
    "quiz_conditions": (partial(quiz, shown="conditions"), ["names.npy", "samples/pairs_w1/cls.npy"]),
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
