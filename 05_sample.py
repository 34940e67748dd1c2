"""05: a checkpoint + embeddings -> k variations of each conditioning image, and a contact sheet a person looks at.

Reads   the checkpoint of 03 or 04, and a folder of 01 (--data): cls.npy, tokens.npy, images.npy (only for the sheet)
Writes  into --out:  samples.npy [n, k, S, S, 3] uint8   conditions.npy [n] int64
                     samples.json, how they were made and what an image cost   sheet.png

The conditions are the first held-out image of each page; all images of a folder that holds none out (your own photo). For
other numbers see --protocol (common.PROTOCOLS); for a repetition with other conditioning images, --draw.
DDPM ancestral sampling under classifier-free guidance, (1 + w) cond - w uncond (common.ddpm_step, common.guide). Image (i, j)
depends on (seed, i, j) alone, not on the batch size or the number of processes.

Beyond the papers: --sampler ddim and dpm++ for few steps; --guidance-interval, --cads and --tcfg, which change guidance;
--similarity for a model of 04 --dial (of several values variation j takes the j-th, over and over: sheet.png shows the dial).

    python 05_sample.py --checkpoint runs/digits16/pairs.pt --guidance 1
    python 05_sample.py --data runs/imagenet --checkpoint runs/web/pairs.pt --protocol imagenet-oneshot    # 1,000 x 10
    torchrun --nproc-per-node=8 05_sample.py --checkpoint runs/emoji64/pairs.pt --batch-images 256
"""
import json
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import common
import system


def main():
    p = system.parser(__doc__)
    p.add_argument("--checkpoint", type=Path, help="what 03 or 04 wrote (default DATA/pairs.pt)")
    p.add_argument("--out", type=Path, help="folder to write (default DATA/samples or DATA/PROTOCOL, /CHECKPOINT_wGUIDANCE...)")
    p.add_argument("--guidance", type=float, default=1.0, help="w; 0 is plain conditional sampling")
    p.add_argument("--protocol", choices=common.PROTOCOLS, default="fewshot", help="how many conditions, how many variations")
    p.add_argument("--per-page", type=int, help="conditioning images of each page")
    p.add_argument("--variations", type=int, help="k, samples of each condition")
    p.add_argument("--draw", type=int, default=0, help="0: the first held-out images of a page; 1, 2, ...: the next ones")
    p.add_argument("--sampler", choices=common.SAMPLERS, default="ddpm")
    p.add_argument("--sample-steps", type=int, help="steps of the sampler")
    p.add_argument("--time-power", dest="power", type=float, metavar="P", help="their times: u^P, u even (default: the preset's)")
    p.add_argument("--interpolation", type=float, help="of ddpm: weight of the larger posterior variance (default 0.2)")
    p.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide only at logsnr in between")
    p.add_argument("--cads", type=float, default=0, metavar="SCALE", help="noise on the condition while t is above 0.6")
    p.add_argument("--tcfg", action="store_true", help="tangential damping of the unconditional prediction")
    p.add_argument("--similarity", type=float, nargs="+", help="to the condition, from 1 (copy) down; of a model with a dial")
    p.add_argument("--batch-images", type=int, default=100, help="images a forward pass")
    p.add_argument("--beside", type=Path, help="an earlier --out: show its samples on the sheet too, left of these")
    p.add_argument("--amp", choices=["none", "bf16"], help="bf16: autocast")
    args = system.parse(p)
    args.checkpoint = args.checkpoint or args.data / "pairs.pt"
    folder = args.data / ("samples" if args.protocol == "fewshot" else args.protocol)
    low, high = args.guidance_interval or (-math.inf, math.inf)
    variant = [word for word, wanted in ((args.sampler, args.sampler != "ddpm"), (f"{low:g}to{high:g}", args.guidance_interval),
                                         (f"cads{args.cads:g}", args.cads), ("tcfg", args.tcfg)) if wanted]
    words = [f"{args.checkpoint.stem}_w{args.guidance:g}", *variant, *(f"s{s:g}" for s in args.similarity or [])]
    usual = common.PRESETS[args.preset or "digits16"] | common.PROTOCOLS[args.protocol]
    words += [f"{name}{value:g}" if isinstance(value, float) else f"{name}{value}" for name, value, default in (
        ("draw", args.draw, 0), ("seed", args.seed, 0), ("steps", args.sample_steps, usual["sample_steps"]),
        ("k", args.variations, usual["variations"]), ("perpage", args.per_page, usual.get("per_page")),
        ("power", args.power, None), ("interpolation", args.interpolation, None)) if value != default]
    args.out = args.out or folder / "_".join(words)
    if not math.isfinite(args.guidance) or not 0 <= args.cads < math.inf or not low < high or args.draw < 0:
        system.die("expected a finite --guidance, --cads from 0, --guidance-interval with LOW < HIGH, --draw from 0")
    if args.power is not None and not 0 < args.power < math.inf:
        system.die(f"--time-power {args.power}: expected a number above 0")
    if not all(abs(s) <= 1 for s in args.similarity or []):
        system.die(f"--similarity {args.similarity}: expected cosines, from -1 to 1")
    if args.interpolation is not None and (args.sampler != "ddpm" or not 0 <= args.interpolation <= 1):
        system.die("--interpolation is of --sampler ddpm, and from 0 to 1")
    step = common.SAMPLERS[args.sampler]
    if args.interpolation is not None:
        step = partial(step, interpolation=args.interpolation)
    system.at_least_one(args, "variations", "sample_steps", "batch_images", *["per_page"] * (args.per_page is not None))
    if (args.out / "images.npy").exists():
        system.die(f"{args.out} holds images of 01_embed.py, not samples; choose another --out")
    device, rank, world = system.start(args.device)

    checkpoint, data = system.read_checkpoint(args.checkpoint), system.Data(args.data)
    config = dict(checkpoint["config"])
    if args.power is not None:
        config["time_power"] = args.power
    if config.get("encoder") != data.meta["encoder"]:
        system.die(f"{args.checkpoint} was trained with the encoder {config.get('encoder')}, but {args.data} was embedded with "
                   f"{data.meta['encoder']}; run 01_embed.py --data and the folder it was trained on")
    try:
        model = common.UViT(**config["network"])
        model.load_state_dict(checkpoint["ema"])
    except (KeyError, TypeError, RuntimeError):
        system.die(f"{args.checkpoint} holds another network, or another version of it; give what 03 or 04 wrote, or train again")
    model = model.to(device).eval()
    if args.similarity and not model.dial:
        system.die(f"{args.checkpoint} has no dial for --similarity; train one with 04_train_pairs.py --dial")
    reads, found = [config["network"]["cls_dim"], *config["network"]["token_shape"]], [data.cls.shape[1], *data.tokens.shape[1:]]
    if reads != found:                                                                  # such as 07 trains with --label page
        system.die(f"{args.checkpoint} reads embeddings of D, T, C = {reads}, {args.data} has {found}; give another of the two")

    pictures = data.images                                                              # for the sheet; if missing, die now
    conditions, k, size = data.conditions(args.per_page, args.draw), args.variations, config["network"]["size"]
    if args.draw and (args.per_page is None or not (data.split == 1).any()):
        system.die(f"--draw {args.draw}: every image is a condition already, there is no other draw")
    if len(conditions) == 0:
        system.die(f"--draw {args.draw}: no page of {args.data} holds out more than {args.draw * args.per_page} images")
    beside = []
    if args.beside:
        beside = [system.read_array(args.beside / "samples.npy", np.uint8, 5, len(conditions), "05_sample.py")]
        if beside[0].shape[2:] != (size, size, 3):
            system.die(f"{args.beside}/samples.npy holds images of {beside[0].shape[2:]}, expected {(size, size, 3)}")
    jobs = np.stack(np.divmod(np.arange(len(conditions) * k), k), axis=1)               # [n k, 2]: condition i, variation j
    batches, seconds = range(0, len(jobs), args.batch_images), []                       # an image, for each batch
    with system.writing_array(args.out / "samples.npy", (len(conditions), k, size, size, 3), np.uint8, rank) as samples:
        for first in system.progress(batches[rank::world], rank, unit="batch"):         # each rank takes whole batches
            start, batch = time.perf_counter(), jobs[first:first + args.batch_images]
            condition = data.embeddings(conditions[batch[:, 0]], model.cond, device)
            streams = [common.generator(device, args.seed, i, j) for i, j in batch.tolist()]
            noise = partial(common.randn, streams, (3, size, size))
            if model.dial:
                dial = torch.tensor(args.similarity or [math.nan], device=device)
                condition["similarity"] = dial[batch[:, 1] % len(dial)]
            how = dict(interval=args.guidance_interval, damped=args.tcfg)
            if args.cads:
                others = [common.generator(device, args.seed, i, j, 1) for i, j in batch.tolist()]
                how["anneal"] = common.cads(model, config, lambda y: common.randn(others, y.shape[1:]), args.cads)
            images = common.sample(model, config, condition, args.guidance, noise, args.sample_steps, args.amp, step, **how)
            samples[batch[:, 0], batch[:, 1]] = images
            seconds.append((time.perf_counter() - start) / len(batch))
        samples.flush()
        system.wait()
        if rank == 0:                                                                   # samples.npy comes last, beside its own
            for stale in ("samples.npy", "cls.npy", "data.json"):                       # of the samples that were here before
                (args.out / stale).unlink(missing_ok=True)
            with system.writing(args.out / "conditions.npy") as f:
                np.save(f, conditions)
            about = dict(model=args.checkpoint.stem, checkpoint=str(args.checkpoint), step=checkpoint["step"],
                         variant=" ".join(variant), protocol=args.protocol, per_page=args.per_page, variations=k,
                         draw=args.draw, guidance=args.guidance,
                         similarity=args.similarity, sample_steps=args.sample_steps, time_power=args.power,
                         interpolation=args.interpolation, seed=args.seed, ms_image=1e3 * float(np.median(seconds)))
            with system.writing(args.out / "samples.json") as f:
                f.write(json.dumps(about, indent=1).encode())
            shown = np.linspace(0, len(conditions) - 1, min(len(conditions), 16)).astype(int)           # up to 16, from all over
            rows = [[pictures[conditions[i]]] + [image for s in (*beside, samples) for image in (None, *s[i, :8])]
                    for i in shown]
            system.contact_sheet(args.out / "sheet.png", rows)
    if rank == 0:
        print(f"wrote {args.out}/samples.npy and sheet.png; next: python 01_embed.py --data {args.data} "
              f"--images {args.out}/samples.npy --out {args.out} --cls-only")


if __name__ == "__main__":
    main()
