"""Training speed: our U-ViT, lucidrains' simple diffusion U-ViT and diffusers' UNet2DConditionModel, equally large, in one run.

A step is the same for all: v loss of the same batch of images, backward, AdamW, average of the weights. Steps are timed in
short rounds, network after network, and large matrix products in each round, so that a busy machine slows all alike. images/s
and ratios are medians over the rounds; the share of the peak is the fastest round's, of the fastest product in the step's own
precision. FLOPs are counted: products and convolutions, forward and backward (PyTorch counts no attention on a CPU: 1% more).

Like is compared with like: lucidrains' network knows no condition, diffusers' cross-attends to the encoder's tokens. Both have
our stages and widths but for one number, which brings them within 5% of our parameters: the transformer blocks of lucidrains',
the width of the last stage of diffusers'. Its layout is its default (two layers a stage, attention in the middle and in all
stages but the last); "cut" is the same network in our layout (our layers a stage, attention in the middle and the last stage).

Peak memory is of a process each: all it ever held, and how much of that came after imports and network (on a GPU: what torch
allocated at most). With --data also 03_train_recon.py itself, at the speed that it logs.

    python benchmarks/bench_train.py                                              # digits16 on a CPU, random images
    python benchmarks/bench_train.py --data runs/digits16                         # its images, and the loop of 03
    python benchmarks/bench_train.py --preset semantica64 --device cuda --amp bf16 --batch 128
    pip install -r requirements-dev.txt                                           # the others; rows without them say so
"""
import argparse
import copy
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import report

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
NETWORKS = {"none": "ours, no condition", "lucidrains": "lucidrains, no condition", "tokens": "ours, tokens",
            "diffusers": "diffusers, tokens", "diffusers-cut": "diffusers cut, tokens", "both": "ours, tokens and global"}
RATIOS = [("none", "lucidrains", 2.5), ("tokens", "diffusers", 3), ("tokens", "diffusers-cut", 3)]     # ours, other, target


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def ours(preset, cond):
    import common
    return common.UViT(*(preset[key] for key in ("size", "patch", "channels", "blocks")), cond, preset["cls_dim"],
                       preset["token_shape"])


def lucidrains(preset, blocks):
    """Its U-ViT at our widths: two residual blocks and linear attention a stage, then transformer blocks."""
    from denoising_diffusion_pytorch.simple_diffusion import UViT
    first, *rest = preset["channels"]
    return UViT(dim=first, init_dim=first, dim_mults=tuple(c // first for c in rest), patch_size=preset["patch"],
                vit_depth=blocks, vit_dropout=0, attn_dim_head=64, attn_heads=max(1, rest[-1] // 64))


def diffusers(preset, sixteens, cut=False):
    """Its U-Net at our widths but for the last, 16 sixteens; eight heads (its default) attend to the tokens. No patches."""
    from diffusers import UNet2DConditionModel
    *widths, _ = preset["channels"]
    attends = [not cut] * len(widths) + [cut]
    return UNet2DConditionModel(
        preset["size"], in_channels=3, out_channels=3,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        block_out_channels=(*widths, 16 * sixteens), layers_per_block=max(preset["blocks"][:-1]) if cut else 2,
        cross_attention_dim=preset["token_shape"][1], norm_num_groups=16)


def make(name, preset):
    """A network and predict(net, z, logsnr, cls=, tokens=) -> v. Raises ImportError if its package is not there."""
    import torch
    torch.manual_seed(0)
    if name in ("none", "tokens", "both"):
        wanted = dict(none=[], tokens=["tokens"], both=["cls", "tokens"])[name]
        return ours(preset, name), lambda net, z, logsnr, **c: net(z, logsnr, **{key: c[key] for key in wanted})
    build = lucidrains if name == "lucidrains" else lambda *given: diffusers(*given, cut=name == "diffusers-cut")
    most = 2 * (preset["blocks"][-1] if name == "lucidrains" else preset["channels"][-1] // 16)
    with torch.device("meta"):
        goal = parameters(ours(preset, "none" if name == "lucidrains" else "tokens"))
        best = min(range(1, most), key=lambda n: abs(parameters(build(preset, n)) - goal))
    if name == "lucidrains":
        return build(preset, best), lambda net, z, logsnr, **c: net(z, logsnr)
    return build(preset, best), lambda net, z, logsnr, **c: net(z, logsnr, encoder_hidden_states=c["tokens"]).sample


def shapes(args):
    """The preset, and of the embeddings of --data (else of EfficientNet-Lite0 at 128 px) cls_dim and token_shape."""
    import common
    import system
    if args.preset not in common.PRESETS:
        system.die(f"--preset {args.preset} is not one of {', '.join(common.PRESETS)}")
    preset = common.PRESETS[args.preset]
    if not args.data:
        return dict(preset, cls_dim=1280, token_shape=(16, 320))
    data = system.Data(args.data)
    if data.images.shape[1] != preset["size"]:
        system.die(f"{args.data} has images of {data.images.shape[1]} px, preset {args.preset} wants {preset['size']}")
    return dict(preset, cls_dim=data.cls.shape[1], token_shape=data.tokens.shape[1:])


def batch_of(args, preset):
    """x [B, 3, S, S] in [-1, 1], cls [B, D], tokens [B, T, C]: rows of --data, or random."""
    import numpy as np
    import torch

    import system
    rng = np.random.default_rng(0)
    if args.data:
        data = system.Data(args.data)
        rows = rng.integers(len(data.images), size=args.batch)
        x, cls, tokens = data.images[rows], data.cls[rows], data.tokens[rows]
    else:
        x = rng.integers(0, 256, (args.batch, preset["size"], preset["size"], 3))
        cls, tokens = (rng.normal(size=(args.batch, *shape)) for shape in ([preset["cls_dim"]], preset["token_shape"]))
    x, cls, tokens = (torch.from_numpy(a).float().to(args.device) for a in (x, cls, tokens))
    return x.permute(0, 3, 1, 2) / 127.5 - 1, dict(cls=cls, tokens=tokens)


def training(name, args, preset):
    """(step, network): step() is one optimiser step of it."""
    import torch

    import common
    import training as loop
    net, predict = make(name, preset)
    net = net.to(args.device).train()
    ema = copy.deepcopy(net).requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.9, 0.99), eps=1e-12, weight_decay=0, fused=True)
    x, condition = batch_of(args, preset)
    logsnr = common.logsnr_schedule((torch.arange(args.batch, device=x.device) + 0.5) / args.batch, preset["size"],
                                    preset["noise_size"])
    alpha, sigma = common.alpha_sigma(logsnr)

    def step():
        eps = torch.randn_like(x)
        with common.autocast(x.device, args.amp):
            v = predict(net, alpha * x + sigma * eps, logsnr, **condition)
            loss = common.diffusion_loss(v, x, eps, logsnr, "v").mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loop.update_ema(ema, net, 10 ** 6, preset["ema"])
    return step, net


def seconds(device, run, repeats):
    """Wall seconds of one of `repeats` calls of run()."""
    import torch
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait()
    return (time.perf_counter() - start) / repeats


def products(args):
    """[(run, FLOPs)]: square matrix products in the precision of the step."""
    import torch

    def product(n):
        a, b, out = (torch.randn(n, n, device=args.device).to(torch.bfloat16 if args.amp == "bf16" else torch.float32)
                     for _ in range(3))
        return lambda: torch.mm(a, b, out=out), 2 * n ** 3
    return [product(n) for n in ((4096, 8192) if args.device.startswith("cuda") else (512, 1024, 1536))]


def peak():
    """The most memory this process ever held, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def memory(name, args):
    """In a process of its own: {peak_mib, added_mib} of three steps, or {} if the package is not there."""
    import torch

    import system
    system.start(args.device)
    preset = shapes(args)
    try:
        make(name, preset)
    except ImportError:
        return {}
    before = peak()
    step, _ = training(name, args, preset)
    for _ in range(3):
        step()
    if args.device.startswith("cuda"):
        return dict(peak_mib=torch.cuda.max_memory_allocated() / 2 ** 20, added_mib=torch.cuda.max_memory_allocated() / 2 ** 20)
    return dict(peak_mib=peak(), added_mib=peak() - before)


def loop_speed(args):
    """images/s that 03_train_recon.py logs every 20 steps: the median, without its first line."""
    with tempfile.TemporaryDirectory() as folder:
        report.run(ROOT / "03_train_recon.py", "--data", args.data, "--preset", args.preset, "--out", Path(folder, "recon.pt"),
                   "--device", args.device, "--amp", args.amp, "--batch", args.batch, "--steps", args.loop_steps,
                   "--log-every", 20, "--save-every", 10 ** 9, "--sample-steps", 1)
        lines = Path(folder, "recon.jsonl").read_text().splitlines()
    return statistics.median([json.loads(line)["images_per_s"] for line in lines][1:])


def main():
    p = report.parser(__doc__)
    p.add_argument("--preset", default="digits16")
    p.add_argument("--data", type=Path, help="folder of 01_embed.py, of this preset (default: random images, no loop)")
    p.add_argument("--device", default="cpu")
    p.add_argument("--amp", default="none", choices=["none", "bf16"])
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--repeats", type=int, default=2, help="steps of a network in a round")
    p.add_argument("--loop-steps", type=int, default=140, help="steps of 03, at least 40")
    p.add_argument("--compile", action="store_true", help="torch.compile every network")
    p.add_argument("--measure", help=argparse.SUPPRESS)
    args = report.parse(p, "bench_train")
    if min(args.batch, args.rounds, args.repeats) < 1 or args.loop_steps < 40:
        p.error("--batch, --rounds and --repeats above 0, --loop-steps at least 40")
    if args.measure:
        return print(json.dumps(memory(args.measure, args)))

    # This process stays small so far: on Linux the peak of a child is never below what its parent held when it was started.
    held = {name: json.loads(report.run(__file__, *sys.argv[1:], "--measure", name)) for name in args.networks}
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import system
    system.start(args.device)
    preset, steps, rows = shapes(args), {}, {}
    for name in args.networks:
        rows[name] = dict(network=NETWORKS[name], **held[name])
        if held[name]:
            steps[name], net = training(name, args, preset)
            with FlopCounterMode(display=False) as counter:
                steps[name]()
            rows[name] |= dict(parameters=parameters(net), flops_image=counter.get_total_flops() / args.batch)
            if args.compile:
                net.compile()
            seconds(args.device, steps[name], 2)                       # warms up, and compiles
    squares = products(args)
    times, product_times = {name: [] for name in steps}, [[] for _ in squares]
    for i in range(args.rounds):
        for name, step in steps.items():
            times[name].append(seconds(args.device, step, args.repeats))
        for found, (run, _) in zip(product_times, squares):
            found.append(seconds(args.device, run, 3))
        if args.data and i == (args.rounds - 1) // 2:                    # in the middle: as busy a machine as for the others
            loop = loop_speed(args)
    top = max(flops / min(found) for found, (_, flops) in zip(product_times, squares))
    for name, found in times.items():
        rows[name] |= dict(images_s=args.batch / statistics.median(found), best_images_s=args.batch / min(found))
        rows[name]["share"] = rows[name]["best_images_s"] * rows[name]["flops_image"] / top

    def ratio(one, other):
        found = [b / a for a, b in zip(times.get(one, []), times.get(other, []))]                # round by round
        return statistics.median(found) if found else None

    ratios = [(f"images/s, {NETWORKS[one]} : {NETWORKS[other]}", ratio(one, other), target, "x") for one, other, target in RATIOS]
    ratios.append((f"share of the peak of matrix products, {NETWORKS['both']}", rows.get("both", {}).get("share"),
                   0.45 if args.device.startswith("cuda") else 0.75, "%"))
    if args.data and "both" in times:
        ratios.append(("images/s, 03_train_recon.py : its bare step", loop / rows["both"]["images_s"], None, "%"))
    lines = []
    for name, row in rows.items():
        lines.append([row["network"], "not installed"] if name not in times else [
            row["network"], f"{row['parameters'] / 1e6:.2f} M", f"{row['flops_image'] / 1e9:.3f}", f"{row['images_s']:.0f}",
            f"{row['best_images_s']:.0f}", f"{row['share']:.0%}", f"{row['peak_mib']:.0f}", f"{row['added_mib']:.0f}"])
    header = ["network", "parameters", "GFLOPs an image", "images/s", "fastest round", "of the peak", "peak MiB", "added MiB"]
    about = report.machine(torch=torch.__version__, threads=torch.get_num_threads())
    about += f". {args.preset}, batch {args.batch}, {args.device}, amp {args.amp}{', compiled' * args.compile}. "
    about += f"Peak of matrix products: {top / 1e9:.0f} GFLOP/s." + (f" 03 logs {loop:.0f} images/s." if args.data else "")
    report.finish(args, "bench_train", about, [report.targets(ratios), report.table(header, lines)], list(rows.values()))


if __name__ == "__main__":
    main()
