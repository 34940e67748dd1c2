"""training.py: the one training loop, of the U-ViT in 03, 04 and 07 and of the prior in 07.

One process, or many under torchrun: DistributedDataParallel, or with --fsdp every parameter, gradient, moment and average in
slices over the processes (FSDP2). A step is a function of (seed, step) alone, so a repeated command resumes an interrupted run
and ends with the same bits (on a CPU; a GPU's kernels are not that strict); with another number of processes or another engine
it ends with the same up to rounding. Papers are cited as in common.py.

Writes  OUT {model, ema, optimizer, step, config}, by a rename, when it is done     OUT with .jsonl, the log     OUT with .png
        OUT.partial, the same as OUT, while it trains; with --fsdp OUT.sharded/STEP/, to which each process writes its slices

    python training.py runs/mine/pairs.pt.sharded/00010000 early.pt        # slices -> one plain file, for 05
"""
import argparse
import contextlib
import copy
import json
import math
import os
import shutil
import signal
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_model_state_dict, set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import common
import system


def training_parser(doc, out="checkpoint to write (default in DATA); repeat the command to resume", cond=True, dial=False):
    """system.parser() with the flags of the training scripts; unset ones take the preset's value."""
    p = system.parser(doc)
    p.add_argument("--out", type=Path, help=out)
    if cond:
        p.add_argument("--cond", default="both", choices=["tokens", "film", "both", "none"], help="how the condition enters")
        p.add_argument("--channels", type=int, nargs="+", help="of each stage of the U-ViT; the last is the transformer")
        p.add_argument("--blocks", type=int, nargs="+", help="of each stage")
    if dial:
        p.add_argument("--dial", action="store_true", help="all pairs of a page, their similarity one more condition")
    p.add_argument("--loss", choices=["v", "eps"], help="what the squared error is of")
    p.add_argument("--steps", type=int, help="optimiser steps in all")
    p.add_argument("--batch", type=int, help="images a step, over all processes")
    p.add_argument("--accumulate", type=int, default=1, help="backward passes a step")
    p.add_argument("--lr", type=float, help="peak learning rate")
    p.add_argument("--ema", type=float, help="decay of the averaged weights (warmed up)")
    p.add_argument("--amp", choices=["none", "bf16"], help="bf16: autocast; weights, optimiser and loss stay in float32")
    p.add_argument("--compile", action="store_true", help="torch.compile the network")
    p.add_argument("--fsdp", action="store_true", help="under torchrun: share out the weights too (FSDP2)")
    p.add_argument("--recompute", action="store_true", help="run blocks again in the backward pass: less memory, more time")
    p.add_argument("--workers", type=int, default=0, help="processes that load batches ahead")
    p.add_argument("--log-every", type=int, default=50, help="steps")
    p.add_argument("--save-every", type=int, default=500, help="steps; checkpoint and preview sheet")
    p.add_argument("--sample-steps", type=int, help="steps of the sampler")
    return p


# ----------------------------------------------------------------------------------------------------------------------
# What 03, 04 and the image models of 07 train.


class AllPairs:
    """All (i, j) of one page among the training images, i = j too, numbered page by page: [n] numbers -> [n, 2]."""

    def __init__(self, data):
        train = np.flatnonzero(data.split == 0)
        self.chosen = train[np.argsort(data.pages[train], kind="stable")]
        _, self.first, self.count = np.unique(data.pages[self.chosen], return_index=True, return_counts=True)
        self.ends = np.cumsum(self.count ** 2)                         # of each page's numbers

    def __len__(self):
        return int(self.count @ self.count)

    def __getitem__(self, numbers):
        page = np.searchsorted(self.ends, numbers, side="right")
        within = numbers - self.ends[page] + self.count[page] ** 2
        return self.chosen[self.first[page][:, None] + np.stack(np.divmod(within, self.count[page]), 1)]


COPIES = 0.5                                                           # share of images paired with themselves, with a dial


class PairBatches(torch.utils.data.Dataset):
    """Item `step` is this rank's share of batch `step`, a function of (seed, step) alone: resuming needs no generator state.

    x [b, S, S, 3] uint8, eps [b, 3, S, S] unit noise, t [b] in [0, 1], drop [b] bool, and cls [b, D], tokens [b, T, C] by cond;
    of AllPairs also similarity [b], the cosine of a pair's global embeddings, nan where it is dropped; half of the pairs are of
    an image with itself.
    """

    def __init__(self, args, data, pairs, rank, world):
        self.args, self.data, self.pairs, self.mine = args, data, pairs, range(rank, args.batch, world)
        self.dial = isinstance(pairs, AllPairs)

    def __getitem__(self, step):
        rng, n = np.random.default_rng([self.args.seed, step]), self.args.batch
        pairs = self.pairs[rng.integers(len(self.pairs), size=n)]
        t = (rng.random() + np.arange(n)) / n                          # stratified over the whole batch ([VDM] appendix I)
        drop = rng.random(n) < self.args.cond_drop                     # these rows train the null condition ([CFG])
        if self.dial:
            same = rng.random(n) < COPIES
            pairs[same, 1] = pairs[same, 0]
        condition, target = pairs[self.mine].T
        eps = common.randn([common.generator("cpu", self.args.seed, step, i) for i in self.mine], (3, *[self.args.size] * 2))
        batch = dict(x=torch.from_numpy(np.asarray(self.data.images[target])), eps=eps, t=torch.from_numpy(t[self.mine]).float(),
                     drop=torch.from_numpy(drop[self.mine]), **self.data.embeddings(condition, self.args.cond, "cpu"))
        if self.dial:
            a, b = (torch.from_numpy(np.asarray(self.data.cls[i])) for i in (condition, target))
            dropped = torch.from_numpy((rng.random(n) < self.args.cond_drop)[self.mine])         # besides where `drop` is
            batch["similarity"] = torch.cosine_similarity(a, b).masked_fill(dropped, math.nan)
        return batch


def some_of(rows):
    """Up to 5,000 of the rows, from all over: enough to tell mean and standard deviation, and other data from these."""
    return rows[::1 + len(rows) // 5000]


def train_images(args, data, pairs, sheet=True):
    """Train a U-ViT on pairs [P, 2] of (condition, target) indices: train(), and a sheet of samples beside args.out.

    AllPairs train one with a dial: the similarity of a pair is one more condition.
    """
    _, rank, world = system.start(args.device)
    if data.images.shape[1] != args.size:
        system.die(f"{data.folder} has images of {data.images.shape[1]} px, preset {args.preset} wants {args.size}")
    channels, blocks, halved = args.channels, args.blocks, args.patch * 2 ** (len(args.channels) - 1)
    if len(blocks) != len(channels) or min(*channels, *blocks) < 1 or any(c % 16 for c in channels) \
            or channels[-1] > 64 and channels[-1] % 64 or args.size % halved:
        system.die(f"--channels {channels} --blocks {blocks}: expected one of each a stage, channels in multiples of 16, of 64 "
                   f"in a last stage above 64, and {args.size} px to be halved {len(channels) - 1} times")
    rows = some_of(np.flatnonzero(data.split == 0))
    if len(pairs) == 0 or len(rows) < 2:
        system.die(f"{data.folder} has no pairs to train on: fewer than 2 training images, or 02_filter_pairs.py kept none")
    dial = isinstance(pairs, AllPairs)
    paired, used = np.zeros(len(data.split), bool), np.ascontiguousarray(pairs.chosen if dial else pairs)
    if used.min() >= 0 and used.max() < len(paired):
        paired[used.reshape(-1)] = True
    if not paired.any() or data.split[paired].any():
        system.die(f"the pairs are not of training images of {data.folder}; run 02_filter_pairs.py again")
    network = dict(size=args.size, patch=args.patch, channels=list(args.channels), blocks=list(args.blocks), cond=args.cond,
                   cls_dim=data.cls.shape[1], token_shape=list(data.tokens.shape[1:]), **dict(dial=True) if dial else {})
    recipe = ("preset", "loss", "noise_size", "cond_drop", "batch", "steps", "lr", "warmup", "decay", "ema", "seed", "time_power")
    config = dict(network=network, encoder=data.meta["encoder"], pairs=zlib.crc32(pairs.ends if dial else b"", zlib.crc32(used)),
                  data=zlib.crc32(np.ascontiguousarray(data.cls[rows])), **{key: getattr(args, key) for key in recipe})

    torch.manual_seed(args.seed)
    model = common.UViT(**network)
    if args.cond in ("film", "both"):
        model.cls_norm.fit(data.cls[rows])
    if args.cond in ("tokens", "both"):
        model.token_norm.fit(data.tokens[rows[::1 + len(rows) * data.tokens.shape[1] // 2 ** 17]])     # 131,072 at most

    def loss_of(net, x, eps, t, **condition):
        x = x.permute(0, 3, 1, 2) / 127.5 - 1                          # [b, 3, S, S] in [-1, 1]
        logsnr = common.logsnr_schedule(t, args.size, args.noise_size)
        alpha, sigma = common.alpha_sigma(logsnr)
        return common.diffusion_loss(net(alpha * x + sigma * eps, logsnr, **condition), x, eps, logsnr, args.loss)

    show = [partial(preview, args, config, data, data.conditions())] if sheet else []
    train(args, config, model, PairBatches(args, data, pairs, rank, world), loss_of, *show)


def preview(args, config, data, chosen, model, device, rank):
    """Eight samples (w = 1) for each of up to eight of the images `chosen`, with the same noise every time: OUT with .png.

    Of a model with a dial they are for similarities from 1 to 0.5.
    """
    k = 8
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(len(chosen), 8)).astype(int)]            # from all over
    condition = {name: c.repeat_interleave(k, 0) for name, c in data.embeddings(chosen, args.cond, device).items()}
    if config["network"].get("dial"):
        condition["similarity"] = torch.linspace(1, 0.5, k, device=device).repeat(len(chosen))
    streams = [common.generator(device, args.seed, i, j) for i in range(len(chosen)) for j in range(k)]
    noise = partial(common.randn, streams, (3, args.size, args.size))
    images = common.sample(model, config, condition, 0 if args.cond == "none" else 1, noise, args.sample_steps, args.amp)
    images = images.reshape(len(chosen), k, *images.shape[1:])
    if rank == 0:
        system.contact_sheet(args.out.with_suffix(".png"), [[data.images[c], None, *row] for c, row in zip(chosen, images)])


# ----------------------------------------------------------------------------------------------------------------------
# The loop.


def learning_rate(step, args):
    """Linear warm-up, then constant (the papers) or a cosine to zero (the small presets: sharper in few steps)."""
    decay = 0.5 + 0.5 * math.cos(math.pi * step / args.steps) if args.decay == "cosine" else 1
    return args.lr * min(1, (step + 1) / args.warmup) * decay


def local(model):
    """The parameters as this process holds them: whole, or its slices of them."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema <- d ema + (1 - d) model, with d warmed up from 0.1 to `decay`: ours, so that a short training forgets its start."""
    torch._foreach_lerp_(local(ema), local(model), 1 - min(decay, (1 + step) / (10 + step)))


def blocks(model):
    """The modules that --fsdp gathers, and --recompute runs again, one at a time."""
    return [m for m in model.modules() if isinstance(m, (common.ResBlock, common.TransformerBlock, nn.TransformerEncoderLayer))]


def compiled(model, loss_of, batch, args, device):
    """torch.compile(model), or the model itself and a message if a forward and backward pass of it fails."""
    net, rows = torch.compile(model), {key: value[::args.accumulate].to(device) for key, value in batch.items()}
    try:
        with common.autocast(device, args.amp):
            loss = loss_of(net, **rows)
        loss.mean().backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # the compiler's own, and those of every tool it calls
        print(f"--compile: {type(e).__name__}, {str(e).splitlines()[0]}; going on without it", file=sys.stderr)
        net = model
    model.zero_grad()
    return net


def ignore_sigterm(worker):
    """torchrun sends SIGTERM to the loaders' workers too, which must live until the training has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def train(args, config, model, batches, loss_of, show=lambda ema, device, rank: None):
    """Train `model` for args.steps steps and write {model, ema, optimizer, step, config} to args.out.

    batches[step]: this rank's rows of the batch, a dict of tensors [args.batch / world, ...], among them times t in [0, 1].
    loss_of(net, **rows) -> the loss of each row, [b]. show(ema, device, rank), on all ranks: after saving, look at the weights.
    Adam with betas (0.9, 0.99) and eps 1e-12, and an average of the weights ([SD], appendix). SIGTERM saves and exits with 143.
    """
    device, rank, world = system.start(args.device)
    system.at_least_one(args, "batch", "accumulate", "steps", "log_every", "save_every", "sample_steps")
    system.above_zero(args, "lr")
    if args.workers < 0 or not 0 <= args.ema < 1:
        system.die(f"--workers {args.workers} --ema {args.ema}: expected a number from 0, and one from 0 to below 1")
    if args.batch % (world * args.accumulate):
        system.die(f"--batch {args.batch} does not divide into {world} processes x {args.accumulate} backward passes")
    if args.fsdp and not dist.is_initialized():
        system.die("--fsdp shares the network out over processes; start it with torchrun --nproc-per-node=N")
    if args.fsdp and args.compile:
        system.die("--compile and --fsdp together are not supported; give one of them")
    if args.out.exists():
        step = check(args.out, system.read_checkpoint(args.out), config)
        if step < args.steps:
            system.die(f"{args.out} holds step {step} of {args.steps}; move it away to train the rest")
        print(f"{args.out} is there already, {step} steps")
        return
    model.to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    if args.recompute:
        for block in blocks(model):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if args.fsdp:
        mesh = init_device_mesh(device.type, (world,))
        for net in (model, ema):
            for block in (*blocks(net), net):
                fully_shard(block, mesh=mesh, reshard_after_forward=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), eps=1e-12, weight_decay=args.weight_decay,
                                  fused=device.type != "mps")          # with no weight decay it is Adam
    first = resume(args.out, config, model, ema, optimizer)
    log = args.out.with_suffix(".jsonl")
    if rank == 0:
        with system.writing(log) as f:                                 # keep the lines up to the step we resume from
            lines = log.read_text().splitlines(keepends=True) if first and log.exists() else []
            f.write("".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= first).encode())

    net = compiled(model, loss_of, batches[first], args, device) if args.compile and first < args.steps else model
    if world > 1 and not args.fsdp:
        net = DistributedDataParallel(net, gradient_as_bucket_view=True, broadcast_buffers=False)
    loader = torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(first, args.steps), num_workers=args.workers,
                                         worker_init_fn=ignore_sigterm, pin_memory=device.type == "cuda",
                                         multiprocessing_context="fork" if args.workers else None)
    stop, losses, bins, clock = [], [], torch.zeros(2, 5, device=device), time.perf_counter()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    bar = system.progress(loader, rank, initial=first, total=args.steps, unit="step", desc=args.out.stem)
    for step, batch in enumerate(bar, first):
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        for part in range(args.accumulate):
            b, last = {key: value[part::args.accumulate] for key, value in batch.items()}, part == args.accumulate - 1
            waits = world > 1 and not args.fsdp and not last           # DDP sums over ranks once a step, at the end; FSDP2 each
            with net.no_sync() if waits else contextlib.nullcontext():  # time, so that no rank keeps a whole network's gradients
                with common.autocast(device, args.amp):
                    loss = loss_of(net, **b)                           # [b]
                (loss.mean() / args.accumulate).backward()
            bins.index_add_(1, (b["t"] * 5).long().clamp(max=4), torch.stack([loss.detach(), torch.ones_like(loss)]))
            losses.append(loss.detach().mean())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad()
        update_ema(ema, model, step, args.ema)

        done, stopping = step + 1, False
        if world == 1:
            stopping = bool(stop)
        elif done % 10 == 0:                                           # ranks hear of it at different steps: agree on one
            asked = torch.tensor(float(bool(stop)), device=device)
            dist.all_reduce(asked)
            stopping = asked.item() > 0
        stopping = stopping and done < args.steps
        saving = done % args.save_every == 0 or done == args.steps or stopping
        if done % args.log_every and not saving:
            continue
        values = torch.stack(losses).view(-1, args.accumulate).sum(1)  # read back here only: no wait for the device in a step
        if saving:                                                     # a step from a finite loss can still break the weights
            values = torch.cat([values, torch.stack(torch._foreach_norm(local(model))).sum()[None]])
        if world > 1:
            dist.all_reduce(bins)
            dist.all_reduce(values)                                    # nan on one rank is nan on all, and all stop
        if not values.isfinite().all():
            bad = done + 1 - len(values) + saving + int(values.isfinite().logical_not().nonzero()[0])
            system.die(f"{args.out}: loss or weights are not finite at step {min(bad, done)}; the last good checkpoint is as it "
                       "was. Lower --lr, or use --amp none; if it happens at once, look for nan in cls.npy and tokens.npy")
        speed = len(losses) // args.accumulate * args.batch / (time.perf_counter() - clock)
        mean, by_noise_level = (bins[0].sum() / bins[1].sum()).item(), (bins[0] / bins[1].clamp(min=1)).tolist()
        row = dict(step=done, loss=mean, by_noise_level=by_noise_level, lr=learning_rate(step, args), images_per_s=speed)
        levels = " ".join(f"{value:.3f}" for value in by_noise_level)
        bar.set_postfix_str(f"{speed:.0f} images/s, loss {mean:.4f}, by noise level {levels}")
        if rank == 0:
            try:
                with open(log, "a") as f:
                    f.write(json.dumps(row) + "\n")
            except OSError as e:
                system.die(f"cannot write {log}: {e.strerror or e}; free some space and repeat the command")
        if saving:
            save(args.out, done, config, model, ema, optimizer, args.fsdp)
            if done < args.steps and not stopping:
                show(ema, device, rank)
        if stopping:
            if rank == 0:
                print(f"SIGTERM: saved step {done} of {args.out}; repeat the command to go on", file=sys.stderr)
            sys.exit(143)
        losses, clock = [], time.perf_counter()
        bins.zero_()
    signal.signal(signal.SIGTERM, before)
    show(ema, device, rank)
    if rank == 0:
        if slices := newest_slices(args.out):
            export(slices, args.out)
            remove(slices)
            shutil.rmtree(slices.parent, ignore_errors=True)
        else:
            os.replace(f"{args.out}.partial", args.out)
        print(f"wrote {args.out} and {log.name}")
    system.wait()                                                      # OUT is there for all ranks
    if stop:                                                           # too late to save anything more
        sys.exit(143)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints. Names and values are those of the plain model whatever engine trained it, so any engine resumes any of them.


def state_of(model, ema, optimizer):
    """{model, ema, optimizer}: whole tensors, or under --fsdp each rank's slices of them."""
    weights, moments = get_state_dict(model, optimizer)
    return dict(model=weights, ema=get_model_state_dict(ema), optimizer=moments)


def save(out, step, config, model, ema, optimizer, fsdp):
    """Write OUT.partial, or with fsdp OUT.sharded/STEP/ with the slices of each rank; then remove what it replaces."""
    rank, partial_file, slices = dist.get_rank() if dist.is_initialized() else 0, Path(f"{out}.partial"), Path(f"{out}.sharded")
    state = state_of(model, ema, optimizer)
    if not fsdp:
        if rank == 0:
            with system.writing(partial_file) as f:
                torch.save(state | dict(step=step, config=config), f)
            for older in slices.glob("*"):
                remove(older)
            shutil.rmtree(slices, ignore_errors=True)
        return
    whole, unfinished = slices / f"{step:08d}", slices / f"{step:08d}.tmp"
    if rank == 0:
        remove(unfinished)
        remove(whole)
    system.wait()
    try:
        dcp.save(state, checkpoint_id=unfinished)
    except (OSError, dcp.api.CheckpointException) as e:
        system.die(f"cannot write {unfinished}: {str(e).strip().splitlines()[-1]}")    # torch's has a traceback in its text
    if rank == 0:
        with system.writing(unfinished / "step.json") as f:
            f.write(json.dumps(dict(step=step, config=config)).encode())
        os.rename(unfinished, whole)
        for other in (found for found in slices.iterdir() if found != whole):
            remove(other)
        partial_file.unlink(missing_ok=True)
    system.wait()


def remove(slices):
    """Delete a folder of slices, first the file without which it does not count."""
    (slices / "step.json").unlink(missing_ok=True)
    shutil.rmtree(slices, ignore_errors=True)


def newest_slices(out):
    """The folder OUT.sharded/STEP that is whole and furthest, or None."""
    found = [path.parent for path in Path(f"{out}.sharded").glob("*/step.json") if path.parent.name.isdigit()]
    return max(found, default=None)


def check(path, state, config):
    """The step of a checkpoint; exits with one line if it was not trained with this config."""
    other = [key for key in config if config[key] != state["config"].get(key)]
    if other:
        system.die(f"{path} was trained with another {', '.join(other)}; give another --out or delete it")
    return state["step"]


def resume(out, config, model, ema, optimizer):
    """Load what is there of an unfinished training; returns the steps done, 0 at the start."""
    slices, unfinished = newest_slices(out), Path(f"{out}.partial")
    found = next((path for path in (slices, unfinished) if path and path.exists()), None)
    if found is None:
        return 0
    state = system.read_json(slices / "step.json", "training.py") if found == slices else system.read_checkpoint(found)
    check(found, state, config)
    if found == slices:
        state |= state_of(model, ema, optimizer)
        dcp.load({key: state[key] for key in ("model", "ema", "optimizer")}, checkpoint_id=slices)
    options = StateDictOptions(full_state_dict=found == unfinished)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=options)
    set_model_state_dict(ema, state["ema"], options=options)
    return state["step"]


def export(slices, out):
    """OUT.sharded/STEP, as save() wrote it with any number of processes -> one plain .pt as without --fsdp."""
    about, merged = system.read_json(slices / "step.json", "training.py --fsdp"), slices / "merged.tmp"
    with system.writing(out) as f:
        dcp_to_torch_save(slices, merged)
        torch.save(torch.load(merged, mmap=True, weights_only=True) | about, f)
    merged.unlink()


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("slices", type=Path, help="OUT.sharded/STEP")
    p.add_argument("out", type=Path, help=".pt to write")
    export(**vars(p.parse_args()))
