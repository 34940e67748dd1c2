"""05: a checkpoint + embeddings -> samples, and a contact sheet to look at.

Reads   a checkpoint of 03 or 04, and DATA of 01: cls.npy, tokens.npy, images.npy (for the sheet), pages.npy, split.npy
        or --y, an array [n, C] that 07 wrote: a row is what one image is told
Writes  into --out: samples.npy [n, k, S, S, 3] uint8, k samples of each of n conditions (k = 1 with --y)
        conditions.npy [n] int64, which images the conditions are (not with --y); samples.json, how; sheet.png

The conditions are --per-page held-out images of each page, at random by --draw; all images if none is held out.
DDPM ancestral sampling (common.ddpm) under classifier-free guidance, (1 + w) cond - w uncond (common.guide).
Image (i, j) depends on (seed, i, j) only, not on batch size or processes, so rows of different --y share their noise.

    python 05_sample.py --checkpoint runs/digits16/pairs.pt --guidance 1
    python 05_sample.py --checkpoint runs/digits16/film.pt --y runs/digits16/twostage/2sdm/y.npy
    torchrun --nproc-per-node=8 05_sample.py --data runs/imagenet --checkpoint runs/web/pairs.pt --variations 10
"""
import json
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common


def conditioning_images(pages, split, per_page, draw):
    """[n] indices: `per_page` held-out images of each page, at random by draw; all images if none is held out."""
    held_out = np.flatnonzero(split == 1)
    if len(held_out) == 0:
        return np.arange(len(split))
    mixed = np.random.default_rng(draw).permutation(held_out)
    mixed = mixed[np.argsort(pages[mixed], kind="stable")]              # by page, in random order within
    start = np.searchsorted(pages[mixed], pages[mixed])                 # where the page of each begins
    return mixed[np.arange(len(mixed)) - start < per_page]


def load_model(path, device):
    """The network of a checkpoint with its averaged weights, and its config."""
    checkpoint = common.load(path, "03_train_recon.py or 04_train_pairs.py")
    model = common.UViT(**checkpoint["config"]["network"])
    model.load_state_dict(checkpoint["ema"])
    return model.to(device).eval(), checkpoint["config"], checkpoint["step"]


def main():
    p = common.parser(__doc__)
    p.add_argument("--checkpoint", type=Path, help="what 03 or 04 wrote (default DATA/pairs.pt)")
    p.add_argument("--out", type=Path, help="folder to write (default DATA/samples/CHECKPOINT_wGUIDANCE)")
    p.add_argument("--y", type=Path, help="draw an image for each row of this array, as 07 writes")
    p.add_argument("--cls", type=Path, help="array of 07 in the place of cls.npy, as the model was trained")
    p.add_argument("--guidance", type=common.number(float, -1), help="w; 0 is plain conditional sampling (default 1)")
    p.add_argument("--per-page", type=common.count, default=1, help="conditions of each page")
    p.add_argument("--variations", type=common.count, help="k, samples of each condition (default 10; with --y 1)")
    p.add_argument("--draw", type=common.natural, default=0, help="which conditions: 0, 1, 2, ... are random choices")
    p.add_argument("--sample-steps", type=common.count, help="steps of the sampler")
    p.add_argument("--time-power", type=common.positive, help="the sampler's times are u^P for even u")
    p.add_argument("--interpolation", type=common.share, default=0.2, help="of the two log-variances (default 0.2)")
    p.add_argument("--batch-images", type=common.count, default=100, help="images a forward pass")
    p.add_argument("--beside", type=Path, help="an earlier --out: show its samples on the sheet too, left of these")
    p.add_argument("--amp", choices=["auto", "none", "bf16"], help="bf16 autocast; auto: where a GPU has it natively")
    args = common.parse(p)
    device, rank, world = common.start(args.device)
    path = args.checkpoint or args.data / "pairs.pt"
    model, config, step = load_model(path, device)

    drops = config["cond_drop"] > 0 and config["cond"] != "none"
    w = args.guidance if args.guidance is not None else float(drops and not args.y)
    if w != 0 and not drops:
        common.die(f"{path} was trained without a null condition, so it samples at --guidance 0 only")
    if config["encoder"] != common.load(args.data / "data.json")["encoder"]:
        common.die(f"{path} was trained with the encoder {config['encoder']}; run 01_embed.py with it on {args.data}")
    if args.y:
        told, conditions = {"cls": common.load(args.y, "07_twostage.py")}, np.arange(len(common.load(args.y)))
        made = args.y.with_suffix(".json")
        if made.exists() and common.load(made)["encoder"] != config["encoder"]:
            common.die(f"{args.y} is of another encoder than {path}")
        if config["cond"] in ("tokens", "both"):
            common.die(f"{path} reads local tokens, which --y does not have; train one with --cond film or none")
    elif config["cls"] and not args.cls:
        common.die(f"{path} was trained with --cls {config['cls']}; give --cls or --y")
    else:
        told = common.condition_arrays(args.data, config["cond"], args.cls)
        pages, split = common.load(args.data / "pages.npy"), common.load(args.data / "split.npy")
        conditions = conditioning_images(pages, split, args.per_page, args.draw)
    told = {name: told[name] for name in config["network"]["told"]}
    shapes = {name: array.shape[1:] for name, array in told.items()}
    if shapes != config["network"]["told"]:
        common.die(f"{path} was trained with arrays of shape {config['network']['told']}, not {shapes}")
    k = args.variations or (1 if args.y else 10)
    out = args.out or args.data / "samples" / f"{path.stem}_w{w:g}"
    if (out / "images.npy").exists():
        common.die(f"--out {out} is a folder of 01_embed.py; give another")
    how = {name: getattr(args, name) for name in ("sample_steps", "time_power", "amp")}

    jobs = np.stack(np.divmod(np.arange(len(conditions) * k), k), 1)                     # [n k, 2]: condition, sample
    starts = range(rank * args.batch_images, len(jobs), world * args.batch_images)       # whole batches to each process
    shape, seconds = (len(conditions), k, config["size"], config["size"], 3), []
    with common.writing_array(out / "samples.npy", shape, np.uint8) as samples:
        for start in tqdm(starts, out.name, unit="batch", disable=True if rank else None):
            clock = time.perf_counter()
            i, j = jobs[start:start + args.batch_images].T
            generators = [common.generator(device, args.seed, *job, 1) for job in zip(i.tolist(), j.tolist())]
            condition = common.take(told, conditions[i], device)
            samples[i, j] = common.sample_images(model, condition, generators, w, config | how, args.interpolation)
            seconds.append((time.perf_counter() - clock) / len(i))
        if rank == 0:                                                   # samples.npy comes last
            judged = [f for f in out.glob("*/cls.npy") if not (f.parent / "samples.npy").exists()]
            for stale in judged + [out / name for name in ("samples.npy", "cls.npy", "data.json", "conditions.npy")]:
                stale.unlink(missing_ok=True)
            if not args.y:
                with common.writing(out / "conditions.npy") as f:
                    np.save(f, conditions)
            about = dict(model=path.stem, step=step, guidance=w, draw=args.draw, seed=args.seed, per_page=args.per_page,
                         variations=k, interpolation=args.interpolation, y=args.y and str(args.y), **how)
            about["ms_image"] = 1e3 * float(np.median(seconds))
            with common.writing(out / "samples.json") as f:
                f.write(json.dumps(about, indent=1).encode())
    if rank > 0:
        return
    shown = np.linspace(0, len(conditions) - 1, min(len(conditions), 16)).astype(int)
    if args.y:
        rows = [samples[shown, 0]]
    else:
        images = common.load(args.data / "images.npy")
        gap = np.full((config["size"], 4, 3), 255, np.uint8)
        sets = ([common.load(args.beside / "samples.npy")] if args.beside else []) + [samples]
        rows = [[images[conditions[i]]] + [x for s in sets for x in (gap, *s[i, :8])] for i in shown]
    common.contact_sheet(out / "sheet.png", rows)
    print(f"wrote {out}/samples.npy and sheet.png; next: python 01_embed.py --data {args.data} "
          f"--images {out}/samples.npy --out {out} --cls-only")


if __name__ == "__main__":
    main()
