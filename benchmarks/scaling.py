"""What the presets cost at scale: FLOPs, memory, hours, traffic, storage. Prints the tables of docs/scaling.md.

Parameters, FLOPs and activations are counted: a training step of the model itself runs on the meta device (shapes and types, no
numbers), forward and backward, with and without --recompute. The speed of a GPU, of its links and how well both are used are
assumptions, and flags. States and traffic follow from training.py: weights, gradients, moments and average in float32.

    python benchmarks/scaling.py                                   # prints, in seconds, no GPU
    python benchmarks/scaling.py --write docs/scaling.md           # replaces what stands between the page's markers
    python benchmarks/scaling.py --mfu 0.3 --tokens 64 1024        # other assumptions
"""
import argparse
import contextlib
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: E402
import report  # noqa: E402

PRESETS, PAPERS = ["emoji64", "semantica64", "semantica256"], ["semantica64", "semantica256"]
GiB = 2 ** 30
NODE = 8                                                               # GPUs a node
BLOCKS = common.ResBlock, common.TransformerBlock                      # what --fsdp gathers, and --recompute repeats, one by one
ENGINES = [(fsdp, recompute) for fsdp in (False, True) for recompute in (False, True)]
DINOV2 = {"dinov2_vits14": (384, 12), "dinov2_vitb14": (768, 12), "dinov2_vitl14": (1024, 24)}         # width, blocks
WEIGHT, GRADIENT, ADAM, EMA = 4, 4, 8, 4                               # bytes a parameter, all float32

# ----------------------------------------------------------------------------------------------------------------------
# Counting.


class Autocast(TorchFunctionMode):
    """What torch.autocast("cuda", torch.bfloat16) does to the functions this network calls, for the meta device, which has none.

    Matrix products, convolutions and attention in bfloat16, norms and upsampling in float32 (ATen/autocast_mode.h), the rest in
    the types it is given. Attention is the flash kernel that CUDA picks: it keeps q, k, v, its output and a number a row.
    copies: {address: storage} of the bfloat16 weights, which autocast's cache holds to the end of the forward pass.
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
            self.storages[storage._cdata] = storage                    # holding it keeps its address from being used again
        return t

    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


def run(model, loss_of, recompute=False):
    """One step of a model on the meta device. {forward, step: FLOPs; kept, largest, copies: bytes}, largest of a block's own."""
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
        forward, copies = counter.get_total_flops(), sum(storage.nbytes() for storage in autocast.copies.values())
        loss.backward()
    for block in blocks:
        del block.forward                                              # back to the class's own
    return dict(forward=forward, step=counter.get_total_flops(), kept=kept.bytes(), largest=max(grown), copies=copies)


def count(preset, token_shape, cls_dim):
    """What one image takes in a preset with --cond both. parameters, in all; block, those of the largest; root, those in none;
    forward, FLOPs; step, FLOPs, and image, bytes kept, each [plain, with --recompute]; copies, bytes of the bfloat16 weights."""
    with torch.device("meta"):
        model = common.UViT(*(preset[key] for key in ("size", "patch", "channels", "blocks")), "both", cls_dim, token_shape)
        x, row = torch.empty(1, 3, preset["size"], preset["size"]), torch.empty(1)
        condition = dict(cls=torch.empty(1, cls_dim), tokens=torch.empty(1, *token_shape, dtype=torch.float16),
                         drop=torch.empty(1, dtype=torch.bool))

    def loss_of(net):
        alpha, sigma = common.alpha_sigma(row)
        return common.diffusion_loss(net(alpha * x + sigma * x, row, **condition), x, x, row, preset["loss"]).mean()

    plain, again = run(model, loss_of), run(model, loss_of, recompute=True)
    blocks = [sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, BLOCKS)]
    parameters = sum(p.numel() for p in model.parameters())
    return dict(parameters=parameters, block=max(blocks), root=parameters - sum(blocks), forward=plain["forward"],
                step=[plain["step"], again["step"]], copies=plain["copies"],
                image=[plain["kept"], again["kept"] + plain["largest"]])   # while a block is repeated, what it keeps is back


def embedding_flops(width, blocks, px=224, patch=14):
    """Forward FLOPs of DINOv2 for one image: in each block 4 + 8 products of width^2 a token and the attention; the patches."""
    patches = (px // patch) ** 2
    tokens = patches + 1
    return blocks * (24 * width ** 2 * tokens + 4 * width * tokens ** 2) + 2 * 3 * patch ** 2 * width * patches


# ----------------------------------------------------------------------------------------------------------------------
# What follows from the counts.


def state_bytes(c, gpus, fsdp):
    """Bytes a GPU holds whatever the micro-batch: weights, gradients, moments and average, as training.py lays them out.

    DDP: all of it on each. FSDP2: slices; and, whole, weights and gradients of what is outside the blocks and of two blocks
    (one runs, the next is fetched).
    """
    everything = (WEIGHT + GRADIENT + ADAM + EMA) * c["parameters"]
    return everything / gpus + (WEIGHT + GRADIENT) * (c["root"] + 2 * c["block"]) if fsdp else everything


def traffic(c, gpus, fsdp, accumulate):
    """Bytes a GPU sends in a step on a ring: DDP one all-reduce; FSDP2 two all-gathers and a reduce-scatter a backward pass."""
    return (accumulate * (2 * WEIGHT + GRADIENT) if fsdp else 2 * GRADIENT) * c["parameters"] * (gpus - 1) / gpus


def plan(args, c, batch, gpus, fsdp, recompute):
    """The largest micro-batch that fits and divides the batch, or None. A dict: micro, accumulate, bytes in use, and room, the
    micro-batch that would fit; seconds a step: compute, link, and both, the shorter hidden behind the longer or added to it."""
    mine = batch // gpus if batch % gpus == 0 else 0
    for accumulate in (a for a in range(1, mine + 1) if mine % a == 0):
        micro, free = mine // accumulate, args.usable * args.memory * GiB - state_bytes(c, gpus, fsdp) - c["copies"]
        if micro * c["image"][recompute] <= free:
            compute = batch * c["step"][recompute] / (gpus * args.mfu * args.peak)
            link = traffic(c, gpus, fsdp, accumulate) / (args.nvlink if gpus <= NODE else args.network)
            return dict(micro=micro, accumulate=accumulate, room=int(free / c["image"][recompute]), compute=compute, link=link,
                        bytes=args.usable * args.memory * GiB - free + micro * c["image"][recompute],
                        hidden=max(compute, link), added=compute + link)
    return None


def best(args, c, batch, gpus):
    """((fsdp, recompute), plan) with the fewest seconds a step, traffic added, or None where nothing fits."""
    found = [(engine, p) for engine in ENGINES if (p := plan(args, c, batch, gpus, *engine))]
    return min(found, key=lambda e: e[1]["added"]) if found else None


def flags(fsdp, recompute, accumulate=1):
    """The flags of 03 and 04 for an engine."""
    return " --fsdp" * fsdp + " --recompute" * recompute + f" --accumulate {accumulate}" * (accumulate > 1)


# ----------------------------------------------------------------------------------------------------------------------
# Tables: each returns Markdown.


def table(header, rows):
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (header, ["---"] * len(header), *rows))


def gib(n):
    return f"{n / GiB:.1f}" if n < 100 * GiB else f"{n / GiB:.0f}"


def assumptions(args, counts):
    return (f"Condition `both`: {args.tokens[0]} tokens of {args.tokens[1]}, a global embedding of {args.cls}. Assumed of a GPU: "
            f"{args.memory:g} GiB, {args.usable:.0%} of it planned with; {args.peak / 1e12:.0f} bf16 TFLOP/s, {args.mfu:.0%} "
            f"of it reached. Assumed of its links (NCCL's bus bandwidth): {args.nvlink / 1e9:.0f} GB/s within a node of {NODE} "
            f"GPUs, {args.network / 1e9:.0f} GB/s between nodes.")


def network(args, counts):
    rows = []
    for name, c in counts.items():
        p = common.PRESETS[name]
        flops, preview = p["steps"] * p["batch"] * c["step"][0], 64 * 2 * p["sample_steps"] * c["forward"]   # images x branches
        rows.append([name, f"{c['parameters'] / 1e6:,.1f} M", f"{c['forward'] / 1e9:,.1f}",
                     *(f"{step / 1e9:,.1f} (x{step / c['forward']:.2f})" for step in c["step"]),
                     f"{p['steps']:,} x {p['batch']:,}", f"{flops:.2g}", f"{flops / (args.mfu * args.peak) / 3600:,.2f}",
                     f"{preview / (args.mfu * args.peak):.2g}"])
    return table(["preset", "parameters", "forward", "training", "with `--recompute`", "steps x batch", "FLOPs in all",
                  "hours of one GPU", "a preview, s"], rows)


def state(args, counts):
    rows = []
    for name, c in counts.items():
        rows.append([name, *(gib(b * c["parameters"]) for b in (WEIGHT, GRADIENT, ADAM, EMA)), gib(state_bytes(c, 1, False)),
                     *(gib(state_bytes(c, n, True)) for n in args.gpus)])
    header = ["preset", "weights", "gradients", "Adam", "EMA", "sum: DDP"]
    return table(header + [f"FSDP2, {n} GPUs" for n in args.gpus], rows)


def activations(args, counts):
    return table(["preset", "MiB an image", "MiB an image, `--recompute`", "bf16 copies of the weights, GiB, once"],
                 [[name, *(f"{b / 2 ** 20:,.0f}" for b in c["image"]), gib(c["copies"])] for name, c in counts.items()])


def micro_batches(args, counts):
    def cell(p):
        return f"{p['micro']} x {p['accumulate']} ({gib(p['bytes'])}; {p['room']:,} fit)" if p else "-"

    rows = []
    for name in PAPERS:
        for fsdp, recompute in ENGINES:
            plans = (plan(args, counts[name], common.PRESETS[name]["batch"], n, fsdp, recompute) for n in args.gpus)
            rows.append([name, f"{'FSDP2' if fsdp else 'DDP'}{flags(False, recompute)}", *map(cell, plans)])
    return table(["preset", "engine", *(f"{n} GPUs" for n in args.gpus)], rows)


def each(args, counts, cell):
    """A table of cell(preset, counts, GPUs, engine, plan): the fastest plan of each paper's preset on each number of GPUs."""
    rows = []
    for name in PAPERS:
        preset, c = common.PRESETS[name], counts[name]
        found = [best(args, c, preset["batch"], n) for n in args.gpus]
        rows.append([name, *(cell(preset, c, n, *f) if f else "-" for n, f in zip(args.gpus, found))])
    return table(["preset", *(f"{n} GPUs" for n in args.gpus)], rows)


def hours(args, counts):
    def cell(preset, c, n, engine, p):
        hidden, added = (preset["steps"] * p[key] / 3600 for key in ("hidden", "added"))
        return f"{hidden:,.3g} to {added:,.3g} ({p['compute']:.2g} s){flags(*engine, p['accumulate'])}"
    return each(args, counts, cell)


def communication(args, counts):
    def cell(preset, c, n, engine, p):
        return f"{traffic(c, n, engine[0], p['accumulate']) / 1e9:,.1f} GB, {p['link']:.2g} s, {p['link'] / p['compute']:.0%}"
    return each(args, counts, cell)


def embedding(args, counts):
    rows = []
    for name, (width, blocks) in DINOV2.items():
        flops = args.rows * embedding_flops(width, blocks)
        rows.append([name, f"{flops / args.rows / 1e9:,.1f}", f"{flops:.2g}", f"{flops / (args.mfu * args.peak / 2) / 3600:,.1f}",
                     *(f"{side * side * width * 2:,}" for side in (16, 8))])
    return table(["encoder", "GFLOPs an image", "FLOPs in all", "hours of one GPU", "bytes of tokens a row",
                  "with `--pool 2`"], rows)


def row_bytes(args):
    """Bytes of a row of each file of 01 and 02."""
    tokens = math.prod(args.tokens) * 2
    return {"images.npy, 64 px": 64 * 64 * 3, "images.npy, 256 px": 256 * 256 * 3, "tokens.npy": tokens,
            "tokens.npy, pooled 2 x 2": tokens // 4, "cls.npy": 4 * args.cls, "pages.npy and split.npy": 4 + 1,
            "names.npy, 40 characters": 4 * 40, "pairs.npy": 2 * 8, "sims.npy": 4}


def storage(args, counts):
    nvme = "each node's NVMe"
    where = dict(images=nvme, tokens=f"{nvme} if it fits, else shared", cls=nvme, pages=nvme, names="shared: for 02 and 06",
                 pairs=nvme, sims="shared: to look at")
    rows = [[name, f"{size:,}", f"{args.rows:,.0f}", f"{size * args.rows / 1e9:,.1f}", where[name.split(".")[0]]]
            for name, size in row_bytes(args).items()]
    for name, c in counts.items():
        size = (WEIGHT + EMA + ADAM) * c["parameters"]
        rows.append([f"a checkpoint of {name}", f"{size:,}", 1, f"{size / 1e9:,.1f}", "shared"])
    return table(["file", "bytes a row", "rows", "GB", "where"], rows)


def reading(args, counts):
    size = row_bytes(args)
    other = size["cls.npy"] + size["pairs.npy"]

    def cell(preset, c, n, engine, p):
        image, speed = other + preset["size"] ** 2 * 3, preset["batch"] / p["hidden"]
        whole, pooled = ((image + size[tokens]) * speed / 1e9 for tokens in ("tokens.npy", "tokens.npy, pooled 2 x 2"))
        return f"{speed:,.0f} images/s, {whole:.2g} GB/s ({pooled:.2g})"
    return each(args, counts, cell)


def commands(args, counts):
    """torchrun lines of one node and of many; the flags are those of the plan."""
    def training(preset, n):
        found = best(args, counts[preset], common.PRESETS[preset]["batch"], n)
        if found is None:
            return f"# does not fit into {args.memory:g} GiB"
        engine, made = found
        return f"--workers 8 --save-every 2500{' --compile' * (not engine[0])}{flags(*engine, made['accumulate'])}"

    nodes = 8
    one = f"torchrun --standalone --nproc-per-node={NODE}"
    many = f"torchrun --nnodes={nodes} --nproc-per-node={NODE} --rdzv-id=$JOB --rdzv-backend=c10d --rdzv-endpoint=$HEAD:29500"
    patient = "--max-restarts=3 --shutdown-timeout=120"
    return f"""```
# on every node, once: python -m pip install -r requirements.txt -r requirements-encoders.txt
# on every node: without it processes that --max-restarts starts again find the addresses of the dead ones (PyTorch issue 135712)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# one node, semantica64
{one} 01_embed.py --images photos/ --out runs/web --preset semantica64 \\
    --encoder dinov2_vitl14
python 02_filter_pairs.py --data runs/web
{one} {patient} 03_train_recon.py --data runs/web \\
    {training('semantica64', NODE)}
{one} {patient} 04_train_pairs.py --data runs/web \\
    {training('semantica64', NODE)}
{one} 05_sample.py --data runs/web --guidance 1 --batch-images 256
{one} 01_embed.py --data runs/web --cls-only \\
    --images runs/web/samples/pairs_w1/samples.npy --out runs/web/samples/pairs_w1
python 06_fewshot_metrics.py --data runs/web

# {nodes} nodes, semantica256: torchrun on every node at once; HEAD: one of them; JOB: the same on all, another for each command
{many} \\
    01_embed.py --images photos/ --out runs/web256 --preset semantica256 --encoder dinov2_vitl14
python 02_filter_pairs.py --data runs/web256                       # on one node
{many} \\
    {patient} 03_train_recon.py --data runs/web256 {training('semantica256', NODE * nodes)}
{many} \\
    {patient} 04_train_pairs.py --data runs/web256 {training('semantica256', NODE * nodes)}
{many} \\
    05_sample.py --data runs/web256 --guidance 1 --batch-images 64
{many} \\
    01_embed.py --data runs/web256 --cls-only --images runs/web256/samples/pairs_w1/samples.npy --out runs/web256/samples/pairs_w1
python 06_fewshot_metrics.py --data runs/web256                    # on one node

# semantica256 on one node; semantica64 on {nodes}
{one} {patient} 04_train_pairs.py --data runs/web256 \\
    {training('semantica256', NODE)}
{many} \\
    {patient} 04_train_pairs.py --data runs/web {training('semantica64', NODE * nodes)}
```"""


TABLES = dict(assumptions=assumptions, network=network, state=state, activations=activations, micro_batches=micro_batches,
              hours=hours, communication=communication, embedding=embedding, storage=storage, reading=reading, commands=commands)


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, nargs=2, default=(256, 1024), metavar=("T", "C"), help="of DINOv2-L/14 at 224 px")
    p.add_argument("--cls", type=int, default=1024, help="size of its global embedding")
    p.add_argument("--gpus", type=int, nargs="+", default=(8, 64, 256, 512))
    p.add_argument("--memory", type=float, default=80, help="GiB of a GPU")
    p.add_argument("--usable", type=float, default=0.9, help="share of it to plan with; the rest is for kernels and fragments")
    p.add_argument("--peak", type=float, default=989e12, help="bf16 FLOP/s of a GPU (H100 SXM, dense)")
    p.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached, recomputing included")
    p.add_argument("--nvlink", type=float, default=300e9, help="bus bandwidth within a node, bytes/s")
    p.add_argument("--network", type=float, default=200e9, help="bus bandwidth between nodes, bytes/s")
    p.add_argument("--rows", type=float, default=50e6, help="images, and pairs")
    p.add_argument("--write", type=Path, metavar="PAGE", help="replace the tables between the markers of this page")
    args = p.parse_args(argv)
    sizes, speeds = (*args.tokens, args.cls, *args.gpus, args.memory, args.rows), (args.peak, args.nvlink, args.network)
    if min(*sizes, *speeds, args.usable, args.mfu) <= 0:
        p.error("every number must be above 0")
    if args.write and not args.write.is_file():
        p.error(f"{args.write} is not a page; give docs/scaling.md")
    return args


def make_tables(args):
    """{name: Markdown} of every table."""
    counts = {name: count(common.PRESETS[name], tuple(args.tokens), args.cls) for name in PRESETS}
    return {name: make(args, counts) for name, make in TABLES.items()}


def main():
    args = parse()
    tables = make_tables(args)
    if args.write:
        report.write(args.write, report.fill(args.write.read_text(), tables))
    else:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in tables.items()))


if __name__ == "__main__":
    main()
