"""03: the reconstruction baseline. The condition is the embedding of the target itself, and the model learns to copy.

    minimise over theta   E | v_theta(alpha x + sigma eps, logsnr, embed(x)) - v |^2,   v = alpha eps - sigma x

Reads   DATA of 01_embed.py: images.npy, split.npy, cls.npy, tokens.npy, data.json
Writes  DATA/recon.pt {model, ema, optimizer, step, config}; recon.pt.partial, the same, while it trains
        recon.jsonl, a row every 50 steps: loss, loss in five bins of t from low to high noise, lr, images_per_s
        recon.png, samples for eight held-out images at every save

`diff 03_train_recon.py 04_train_pairs.py` is the idea of Semantica. With --cls and --cond-drop 0 this script trains the
image models of 2SDM (see 07). A repeated command resumes, on a CPU to the same bits as if it had never stopped.

    python 03_train_recon.py                                                       # digits at 16 px, one core: 5 min
    python 03_train_recon.py --data runs/emoji64 --workers 4                       # 64 px on one GPU
    torchrun --nproc-per-node=8 03_train_recon.py --data runs/mine --accumulate 4  # eight GPUs
"""
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import common

# ----------------------------------------------------------------------------------------------------------------------
# Command line. What is not given takes the preset's value.

p = common.parser(__doc__)
p.add_argument("--out", type=Path, help="checkpoint to write (default DATA/recon.pt)")
p.add_argument("--cond", choices=["tokens", "film", "both", "none"], help="how the condition enters")
p.add_argument("--cls", type=Path, help="array [N, C] in the place of cls.npy, as 07 writes")
p.add_argument("--cond-drop", type=common.share, help="how often the condition is dropped")
p.add_argument("--init", type=Path, help="start a film model from this checkpoint without condition ([2SDM] 5)")
p.add_argument("--loss", choices=["v", "eps"], help="what the squared error is of")
p.add_argument("--steps", type=common.count, help="optimiser steps in all")
p.add_argument("--batch", type=common.count, help="images a step, over all processes")
p.add_argument("--accumulate", type=common.count, default=1, help="backward passes a step")
p.add_argument("--lr", type=common.positive, help="peak learning rate")
p.add_argument("--amp", choices=["auto", "none", "bf16"], help="bf16 autocast; auto: where a GPU has it natively")
p.add_argument("--compile", action="store_true", help="torch.compile the network")
p.add_argument("--fsdp", action="store_true", help="under torchrun: shard weights and optimiser too (FSDP2)")
p.add_argument("--recompute", action="store_true", help="less memory: run blocks again in the backward pass")
p.add_argument("--workers", type=common.natural, default=0, help="processes that make batches ahead")
p.add_argument("--save-every", type=common.count, default=500, help="steps; checkpoint and preview")
args = common.parse(p)
out = args.out or args.data / "recon.pt"
device, rank, world = common.start(args.device)
if args.batch % (world * args.accumulate):
    common.die(f"--batch {args.batch} does not divide into {world} processes x {args.accumulate} backward passes")

# ----------------------------------------------------------------------------------------------------------------------
# Data. A batch is a function of (seed, step) alone: resuming needs no generator state, N processes share one batch.

images = common.load(args.data / "images.npy")                          # [N, S, S, 3] uint8
split = common.load(args.data / "split.npy")                            # [N], 0 is the training set
told = common.condition_arrays(args.data, args.cond, args.cls)          # {"cls": [N, D], "tokens": [N, T, C]}
train = np.flatnonzero(split == 0)


def batch_of(step):
    """This process's b rows of a batch of B: {x [b, S, S, 3] uint8, eps, t, drop, and what the model is told}."""
    rng = np.random.default_rng([args.seed, step])
    target = train[rng.integers(len(train), size=args.batch)]
    condition = target                                                  # it is told the image it is to draw
    t = (rng.random() + np.arange(args.batch)) / args.batch             # one in each of B strata of [0, 1] ([VDM] I)
    drop = rng.random(args.batch) < args.cond_drop                      # these rows train the null condition ([CFG])
    mine = np.arange(rank, args.batch, world)
    eps = common.randn([common.generator("cpu", args.seed, step, i) for i in mine], (3, args.size, args.size))
    batch = common.take(dict(x=images), target[mine]) | common.take(told, condition[mine])
    return batch | dict(eps=eps, t=torch.from_numpy(t[mine]).float(), drop=torch.from_numpy(drop[mine]))


# ----------------------------------------------------------------------------------------------------------------------
# Network, averaged weights, optimiser: new, or as they were saved.

network = {name: getattr(args, name) for name in ("size", "patch", "channels", "blocks", "transformers")}
network["told"] = {name: array.shape[1:] for name, array in told.items()}
config = {name: getattr(args, name) for name in ("seed", *common.PRESETS[args.preset])}
config |= dict(network=network, encoder=common.load(args.data / "data.json")["encoder"], cls=args.cls and args.cls.name,
               data=[common.checksum(array) for array in (train, *told.values())])
torch.manual_seed(args.seed)
model = common.UViT(**network)
for name, array in told.items():
    model.norm[name].fit(array, train)
if args.init:
    found = model.load_state_dict(common.load(args.init)["ema"], strict=False)
    if found.unexpected_keys or {name.split(".")[0] for name in found.missing_keys} != {"norm", "cls_in", "cls_null"}:
        common.die(f"--init {args.init}: expected a checkpoint of the same network with --cond none, for --cond film")
    common.zero(model.cls_in)                                           # told nothing yet: it begins as what it was
    config["init"] = common.checksum(np.fromfile(args.init, np.uint8))
model.to(device)
ema = copy.deepcopy(model).requires_grad_(False)
net = common.distribute(model, ema, args.fsdp, args.recompute, args.compile)
optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), eps=1e-12, fused=device.type != "mps")
first = common.resume(out, model, ema, optimizer, config)


def preview():
    """Eight samples for each of eight held-out images (else training images), with the same noise every time.

    Guidance w = 1, or 0 if the network does not learn the null condition.
    """
    shown = np.random.default_rng(0).permutation(np.flatnonzero(split == split.max()))[:8]
    generators = [common.generator(device, args.seed, i, j, 1) for i in range(len(shown)) for j in range(8)]
    condition = common.take(told, shown.repeat(8), device)
    x = common.sample_images(ema, condition, generators, float(args.cond_drop > 0), config)
    if rank == 0:
        common.contact_sheet(out.with_suffix(".png"), [[images[i], *x[8 * n:8 * n + 8]] for n, i in enumerate(shown)])


# ----------------------------------------------------------------------------------------------------------------------
# The loop.

log = out.with_suffix(".jsonl")
history = [row for row in map(json.loads, log.read_text().splitlines()) if row["step"] <= first] if first else []
batches = torch.utils.data.DataLoader(range(first, args.steps), batch_size=None, collate_fn=batch_of,
                                      num_workers=args.workers, pin_memory=device.type == "cuda",
                                      multiprocessing_context="fork" if args.workers else None)
bar = tqdm(batches, out.stem, args.steps, initial=first, unit="step", disable=True if rank else None)
sums, clock = torch.zeros(2, 5, device=device), time.perf_counter()     # sum and number of losses, in fifths of t
for step, batch in enumerate(bar, first + 1):                           # step counts from 1: this is batch_of(step - 1)
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    for part in range(args.accumulate):
        rows = {name: value[part::args.accumulate] for name, value in batch.items()}
        x, eps, t = (rows.pop(name) for name in ("x", "eps", "t"))      # left: drop, cls, tokens
        x = x.permute(0, 3, 1, 2) / 127.5 - 1                           # [b, 3, S, S] in [-1, 1]
        logsnr = common.logsnr_schedule(t, args.size, args.noise_size)
        alpha, sigma = common.alpha_sigma(logsnr)
        net.require_backward_grad_sync = part == args.accumulate - 1    # DDP: averages gradients at the last
        with common.autocast(device, args.amp):
            v_pred = net(alpha * x + sigma * eps, logsnr, **rows)
        loss = common.diffusion_loss(v_pred, x, eps, logsnr, args.loss)                  # [b]
        (loss.mean() / args.accumulate).backward()
        sums.index_add_(1, (t * 5).long().clamp(max=4), torch.stack([loss.detach(), torch.ones_like(loss)]))
    decay = 0.5 + 0.5 * math.cos(math.pi * (step - 1) / args.steps) if args.decay == "cosine" else 1
    optimizer.param_groups[0]["lr"] = args.lr * min(1, step / args.warmup) * decay
    optimizer.step()
    optimizer.zero_grad()
    for average, weight in zip(ema.parameters(), model.parameters()):
        average.lerp_(weight.detach(), 1 - min(args.ema, step / (9 + step)))      # it forgets its start first

    saving = step % args.save_every == 0 or step == args.steps
    if saving or step % 50 == 0:
        if world > 1:
            dist.all_reduce(sums)
        mean, count = (sums[0].sum() / sums[1].sum()).item(), sums[1].sum().item()
        if not math.isfinite(mean):
            common.die(f"{out}: the loss is {mean} at step {step}; the last checkpoint is as it was. Lower --lr")
        history.append(dict(step=step, loss=mean, by_noise_level=(sums[0] / sums[1].clamp(min=1)).tolist(),
                            lr=optimizer.param_groups[0]["lr"], images_per_s=count / (time.perf_counter() - clock)))
        if rank == 0:
            with common.writing(log) as f:
                f.write("".join(f"{json.dumps(row)}\n" for row in history).encode())
            print(history[-1]) if bar.disable else bar.set_postfix(loss=mean)
        if saving:
            common.save(f"{out}.partial", model, ema, optimizer, step, config)
            preview()
        sums, clock = torch.zeros_like(sums), time.perf_counter()
if rank == 0:
    Path(f"{out}.partial").replace(out)
    print(f"wrote {out} and {log.name}; next: python 05_sample.py --data {args.data} --checkpoint {out}")
