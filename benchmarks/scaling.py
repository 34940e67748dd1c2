"""What the presets cost at scale: FLOPs, memory, hours, storage. Prints the tables of docs/scaling.md.

Parameters, FLOPs and activations are counted: a training step of the model itself runs on the meta device (shapes and
types, no numbers), forward and backward, with and without --recompute. The speed of a GPU and of its links are
assumptions, and flags. Weights, gradients, moments and average are in float32, as common.py keeps them.

    python -m benchmarks.scaling                                   # prints, in seconds, no GPU
    python -m benchmarks.scaling --write docs/scaling.md           # replaces what stands between the page's markers
    python -m benchmarks.scaling --mfu 0.3 --memory 40             # other assumptions
"""
import argparse
import contextlib
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import common
from benchmarks import report

PRESETS = ("emoji64", "semantica64", "semantica256")
GiB, NODE = 2 ** 30, 8                                                 # GPUs a node
TOKENS, CLS = (256, 1024), 1024                                        # of DINOv2-L/14 at 224 px
BLOCKS = common.ResBlock, common.TransformerBlock                      # what --fsdp gathers and --recompute repeats
ENGINES = [(fsdp, recompute) for fsdp in (False, True) for recompute in (False, True)]
WEIGHT, GRADIENT, ADAM, EMA = 4, 4, 8, 4                               # bytes a parameter

# ----------------------------------------------------------------------------------------------------------------------
# Counting.


class Autocast(TorchFunctionMode):
    """What torch.autocast("cuda", torch.bfloat16) does to the functions of this network, for the meta device.

    Matrix products, convolutions and attention in bfloat16, norms and upsampling in float32 (ATen/autocast_mode.h), the
    rest in the types it is given. Attention is the flash kernel that CUDA picks: it keeps q, k, v, its output and a
    number a row. copies: {address: storage} of the bfloat16 weights, which live until the end of the forward pass.
    """

    def __init__(self):
        super().__init__()
        self.copies = {}

    def cast(self, a, dtype):
        if not isinstance(a, torch.Tensor) or a.dtype == dtype:
            return a
        b = a.to(dtype)
        if isinstance(a, torch.nn.Parameter):
            self.copies[b.untyped_storage()._cdata] = b.untyped_storage()
        return b

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, dtype = kwargs or {}, None
        if function in (F.linear, F.conv2d, F.scaled_dot_product_attention):
            dtype = torch.bfloat16
        elif function in (F.layer_norm, F.group_norm, F.interpolate):
            dtype = torch.float32
        if dtype:
            args, kwargs = tree_map(partial(self.cast, dtype=dtype), (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention(*args)[0]
        return function(*args, **kwargs)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """What autograd keeps for the backward pass: bytes() counts each storage once, and no weight nor copy of one."""

    def __init__(self, model, copies):
        self.own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self.copies, self.storages = copies, {}
        super().__init__(self.pack, lambda t: t)

    def pack(self, t):
        storage = t.untyped_storage()
        if storage._cdata not in self.own and storage._cdata not in self.copies:
            self.storages[storage._cdata] = storage                    # held, so that its address stays taken
        return t

    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def run(model, loss_of, recompute=False):
    """One step on the meta device. {forward, step: FLOPs; kept, largest, copies: bytes}, largest of one block's own."""
    autocast, grown, blocks = Autocast(), [0], [m for m in model.modules() if isinstance(m, BLOCKS)]
    kept = Kept(model, autocast.copies)

    def watch(forward, *args):
        before = kept.bytes()
        out = forward(*args)
        grown.append(kept.bytes() - before)
        return out

    for block in blocks:
        if recompute:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False,
                                    context_fn=lambda: (contextlib.nullcontext(), Autocast()))
        block.forward = partial(watch, block.forward)
    with autocast, FlopCounterMode(display=False) as counter:
        with kept:
            loss = loss_of(model)
        forward = counter.get_total_flops()
        copies = sum(storage.nbytes() for storage in autocast.copies.values())
        loss.backward()
    for block in blocks:
        del block.forward                                              # back to the class's own
    return dict(forward=forward, step=counter.get_total_flops(), kept=kept.bytes(), largest=max(grown), copies=copies)


def untrained(preset):
    """(model, what it is told): a preset's network, its condition that of DINOv2-L."""
    told = {"tokens": TOKENS} if preset["cond"] == "tokens" else {"tokens": TOKENS, "cls": (CLS,)}
    return common.UViT(*(preset[key] for key in ("size", "patch", "channels", "blocks", "transformers")), told), told


def count(preset):
    """What one image takes. parameters, in all; block, those of the largest; root, those in none; forward, FLOPs;

    step, FLOPs, and image, bytes kept, each [plain, with --recompute]; copies, bytes of the bfloat16 weights.
    """
    size = preset["size"]
    with torch.device("meta"):
        model, told = untrained(preset)
        x, logsnr = torch.empty(1, 3, size, size), torch.empty(1)
        condition = {name: torch.empty(1, *shape) for name, shape in told.items()}

    def loss_of(net):
        return common.diffusion_loss(net(x, logsnr, **condition), x, x, logsnr, preset["loss"]).mean()

    plain, again = run(model, loss_of), run(model, loss_of, recompute=True)
    blocks = [sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, BLOCKS)]
    parameters = sum(p.numel() for p in model.parameters())
    return dict(parameters=parameters, block=max(blocks), root=parameters - sum(blocks), forward=plain["forward"],
                step=[plain["step"], again["step"]], copies=plain["copies"],
                image=[plain["kept"], again["kept"] + plain["largest"]])         # a repeated block keeps its own again


# ----------------------------------------------------------------------------------------------------------------------
# What follows from the counts.


def state_bytes(c, gpus, fsdp):
    """Bytes a GPU holds whatever the micro-batch. DDP: everything on each GPU.

    FSDP2: slices; and, whole, weights and gradients outside the blocks and of two blocks (one runs, the next comes).
    """
    everything = (WEIGHT + GRADIENT + ADAM + EMA) * c["parameters"]
    return everything / gpus + (WEIGHT + GRADIENT) * (c["root"] + 2 * c["block"]) if fsdp else everything


def traffic(c, gpus, fsdp, accumulate):
    """Bytes a GPU sends in a step on a ring. DDP: one all-reduce; FSDP2: a part two all-gathers, a reduce-scatter."""
    return (accumulate * (2 * WEIGHT + GRADIENT) if fsdp else 2 * GRADIENT) * c["parameters"] * (gpus - 1) / gpus


def plan(args, c, batch, gpus, fsdp, recompute):
    """The largest micro-batch that fits and divides the batch, or None: micro, accumulate, bytes, and seconds a step.

    hidden: the shorter of arithmetic and traffic runs behind the longer. added: one after the other.
    """
    held = state_bytes(c, gpus, fsdp) + c["copies"]
    mine = batch // gpus if batch % gpus == 0 else 0
    for accumulate in (a for a in range(1, mine + 1) if mine % a == 0):
        used = held + mine // accumulate * c["image"][recompute]
        if used <= args.usable * args.memory * GiB:
            compute = batch * c["step"][recompute] / (gpus * args.mfu * args.peak)
            link = traffic(c, gpus, fsdp, accumulate) / (args.nvlink if gpus <= NODE else args.network)
            return dict(micro=mine // accumulate, accumulate=accumulate, bytes=used, compute=compute, link=link,
                        hidden=max(compute, link), added=compute + link)
    return None


def best(args, c, batch, gpus):
    """((fsdp, recompute), plan) with the fewest seconds a step, traffic added, or None where nothing fits."""
    found = [(engine, p) for engine in ENGINES if (p := plan(args, c, batch, gpus, *engine))]
    return min(found, key=lambda e: e[1]["added"], default=None)


# ----------------------------------------------------------------------------------------------------------------------
# Tables: each returns Markdown.


def gib(n):
    return f"{n / GiB:.1f}" if n < 100 * GiB else f"{n / GiB:.0f}"


def assumptions(args, counts):
    return (f"Condition: {TOKENS[0]} tokens of {TOKENS[1]} numbers. A GPU: {args.memory:g} GiB, of which the plans use "
            f"{args.usable:.0%}; {args.peak / 1e12:.0f} bf16 TFLOP/s, of which training reaches {args.mfu:.0%}. Links "
            f"(NCCL's bus bandwidth): {args.nvlink / 1e9:.0f} GB/s within a node of {NODE} GPUs, "
            f"{args.network / 1e9:.0f} GB/s between nodes.")


def network(args, counts):
    rows = []
    for name, c in counts.items():
        p = common.PRESETS[name]
        flops = p["steps"] * p["batch"] * c["step"][0]
        sample = 2 * p["sample_steps"] * c["forward"] / (args.mfu * args.peak)           # two branches
        rows.append([name, f"{c['parameters'] / 1e6:,.1f} M", f"{c['forward'] / 1e9:,.1f}",
                     *(f"{step / 1e9:,.1f} (x{step / c['forward']:.2f})" for step in c["step"]),
                     f"{p['steps']:,} x {p['batch']:,}", f"{flops:.2g}",
                     f"{flops / (args.mfu * args.peak) / 3600:,.1f}", f"{1e3 * sample:,.1f}"])
    return report.table(["preset", "parameters", "forward", "training", "with `--recompute`", "steps x batch",
                         "FLOPs in all", "hours of one GPU", "ms to sample an image"], rows)


def memory(args, counts):
    rows = []
    for name, c in counts.items():
        rows.append([name, gib(state_bytes(c, 1, False)), *(gib(state_bytes(c, n, True)) for n in args.gpus),
                     gib(c["copies"]), *(f"{b / 2 ** 20:,.0f}" for b in c["image"])])
    return report.table(["preset", "DDP", *(f"FSDP2, {n} GPUs" for n in args.gpus), "bf16 copies", "MiB an image",
                         "with `--recompute`"], rows)


def hours(args, counts):
    rows = []
    for name in PRESETS[1:]:
        preset, cells = common.PRESETS[name], []
        for n in args.gpus:
            found = best(args, counts[name], preset["batch"], n)
            if found is None:
                cells.append("-")
                continue
            engine, p = found
            low, high = (preset["steps"] * p[key] / 3600 for key in ("hidden", "added"))
            cells.append(f"{low:,.3g} to {high:,.3g} h; {p['micro']} x {p['accumulate']}, {gib(p['bytes'])} GiB; links "
                         f"{p['link'] / p['compute']:.0%}{' --fsdp' * engine[0]}{' --recompute' * engine[1]}")
        rows.append([name, *cells])
    return report.table(["preset", *(f"{n} GPUs" for n in args.gpus)], rows)


def storage(args, counts):
    rows = {"images.npy, 64 px": 64 * 64 * 3, "images.npy, 256 px": 256 * 256 * 3, "tokens.npy": math.prod(TOKENS) * 2,
            "cls.npy": 4 * CLS, "pages.npy and split.npy": 4 + 1, "names.npy, 40 characters": 4 * 40,
            "pairs.npy and sims.npy, a pair an image": 2 * 8 + 4}
    lines = [[name, f"{size:,}", f"{size * args.rows / 1e9:,.1f}"] for name, size in rows.items()]
    for name, c in counts.items():
        lines.append([f"a checkpoint of {name}", "", f"{(WEIGHT + EMA + ADAM) * c['parameters'] / 1e9:,.1f}"])
    return report.table(["file", "bytes a row", "GB"], lines)


TABLES = (assumptions, network, memory, hours, storage)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpus", type=common.count, nargs="+", default=(8, 64, 256, 512))
    p.add_argument("--memory", type=common.positive, default=80, help="GiB of a GPU")
    p.add_argument("--usable", type=common.share, default=0.9, help="share of it to plan with; the rest is for kernels")
    p.add_argument("--peak", type=common.positive, default=989e12, help="bf16 FLOP/s of a GPU (H100 SXM, dense)")
    p.add_argument("--mfu", type=common.positive, default=0.4, help="share of the peak that is reached")
    p.add_argument("--nvlink", type=common.positive, default=300e9, help="bus bandwidth within a node, bytes/s")
    p.add_argument("--network", type=common.positive, default=200e9, help="bus bandwidth between nodes, bytes/s")
    p.add_argument("--rows", type=common.positive, default=50e6, help="images, and pairs")
    p.add_argument("--write", type=Path, metavar="PAGE", help="replace the tables between the markers of this page")
    args = p.parse_args()
    counts = {name: count(common.PRESETS[name]) for name in PRESETS}
    tables = {make.__name__: make(args, counts) for make in TABLES}
    if args.write:
        report.write(args.write, report.fill(args.write.read_text(), tables))
    else:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in tables.items()))


if __name__ == "__main__":
    main()
