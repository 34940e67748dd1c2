"""Training speed: our U-ViT, lucidrains' simple diffusion U-ViT and diffusers' UNet2DConditionModel, equally large.

A step is the same for all: v loss of the same batch, backward, Adam, average of the weights. The networks take turns;
images/s and ratios are medians over the rounds. FLOPs are counted: products and convolutions, forward and backward.

lucidrains' network takes no condition; diffusers' cross-attends to the encoder's tokens. Each stands beside ours with
the same condition. Both have our stages and widths but for one number, which brings them within 5% of our parameters:
the transformer blocks of lucidrains', the width of the last stage of diffusers'. Its layout is its default (two layers
a stage, attention in all stages but the last). "cut" is the same network in our layout.

    python -m benchmarks.bench_train                             # digits16 on a CPU
    python -m benchmarks.bench_train --data runs/digits16        # and 03 on this folder, at the speed that it logs
    pip install -r requirements-dev.txt                          # the others; rows without them say so
"""
import copy
import json
import statistics
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import common
from benchmarks import report
from common import UViT                                                # before variants.py puts another in its place

NETWORKS = ("ours, no condition", "lucidrains, no condition", "ours, tokens", "diffusers, tokens",
            "diffusers cut, tokens", "ours, tokens and global")
TOLD = {"tokens": (16, 320), "cls": (1280,)}                           # of EfficientNet-Lite0 at 128 px


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def ours(preset, *names):
    """Our network, told of the arrays `names`."""
    keys = ("size", "patch", "channels", "blocks", "transformers")
    return UViT(*(preset[key] for key in keys), {name: TOLD[name] for name in names})


def lucidrains(preset, blocks):
    """Its U-ViT at our widths: two residual blocks and linear attention a stage, then transformer blocks."""
    from denoising_diffusion_pytorch.simple_diffusion import UViT
    first, *rest = preset["channels"]
    return UViT(dim=first, init_dim=first, dim_mults=tuple(c // first for c in rest), patch_size=preset["patch"],
                vit_depth=blocks, vit_dropout=0, attn_dim_head=64, attn_heads=max(1, rest[-1] // 64))


def diffusers(preset, sixteens, cut):
    """Its U-Net at our widths but for the last, 16 sixteens; eight heads (its default) attend to the tokens."""
    from diffusers import UNet2DConditionModel
    *widths, _ = preset["channels"]
    attends = [not cut] * len(widths) + [cut]
    return UNet2DConditionModel(
        preset["size"], in_channels=3, out_channels=3,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        block_out_channels=(*widths, 16 * sixteens), layers_per_block=max(preset["blocks"][:-1]) if cut else 2,
        cross_attention_dim=TOLD["tokens"][1], norm_num_groups=16)


def like_ours(build, goal, most):
    """build(n) with the n below `most` that brings it nearest to `goal` parameters."""
    with torch.device("meta"):
        best = min(range(1, most), key=lambda n: abs(parameters(build(n)) - goal))
    return build(best)


def make(name, preset):
    """A network and predict(net, z, logsnr, tokens, cls) -> v. Raises ImportError if its package is not there."""
    torch.manual_seed(0)
    if name == "lucidrains, no condition":
        most = 2 * preset["blocks"][-1]
        net = like_ours(lambda n: lucidrains(preset, n), parameters(ours(preset)), most)
        return net, lambda net, z, logsnr, tokens, cls: net(z, logsnr)
    if name.startswith("diffusers"):
        most = preset["channels"][-1] // 8
        net = like_ours(lambda n: diffusers(preset, n, "cut" in name), parameters(ours(preset, "tokens")), most)
        return net, lambda net, z, logsnr, tokens, cls: net(z, logsnr, encoder_hidden_states=tokens).sample
    if name == "ours, no condition":
        return ours(preset), lambda net, z, logsnr, tokens, cls: net(z, logsnr)
    if name == "ours, tokens":
        return ours(preset, "tokens"), lambda net, z, logsnr, tokens, cls: net(z, logsnr, tokens=tokens)
    return ours(preset, *TOLD), lambda net, z, logsnr, tokens, cls: net(z, logsnr, tokens=tokens, cls=cls)


def training(net, predict, preset, condition, compiled=False):
    """step(): one optimiser step of a network, as in 03. condition: what it is told, [B, ...] each, on its device."""
    batch, device = len(condition["tokens"]), condition["tokens"].device
    ema = copy.deepcopy(net).requires_grad_(False)
    called = torch.compile(net) if compiled else net
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, betas=(0.9, 0.99), eps=1e-12, fused=True)
    x = torch.rand(batch, 3, preset["size"], preset["size"], device=device) * 2 - 1
    t = (torch.arange(batch, device=device) + 0.5) / batch
    logsnr = common.logsnr_schedule(t, preset["size"], preset["noise_size"])
    alpha, sigma = common.alpha_sigma(logsnr)

    def step():
        eps = torch.randn_like(x)
        with common.autocast(device, preset["amp"]):
            v = predict(called, alpha * x + sigma * eps, logsnr, **condition)
        common.diffusion_loss(v, x, eps, logsnr, preset["loss"]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for average, weight in zip(ema.parameters(), net.parameters()):
            average.lerp_(weight.detach(), 1 - preset["ema"])
    return step


def loop_speed(data, preset, batch):
    """images/s that 03_train_recon.py logs every 50 steps: the median of three, after a first one to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        report.run("03_train_recon.py", "--data", data.resolve(), "--preset", preset, "--out", f"{folder}/recon.pt",
                   "--device", "cpu", "--batch", batch, "--steps", 200, "--save-every", 200)
        lines = Path(folder, "recon.jsonl").read_text().splitlines()
    return statistics.median([json.loads(line)["images_per_s"] for line in lines][1:])


def main():
    p = report.parser(__doc__)
    p.add_argument("--preset", default="digits16", choices=common.PRESETS)
    p.add_argument("--data", type=Path, help="folder of 01_embed.py, of this preset, for 03")
    p.add_argument("--batch", type=common.count, default=32)
    p.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    p.add_argument("--rounds", type=common.count, default=20)
    args = p.parse_args()
    preset, steps, rows = common.PRESETS[args.preset], {}, {name: dict(network=name) for name in args.networks}
    condition = {name: torch.randn(args.batch, *shape) for name, shape in TOLD.items()}
    for name, row in rows.items():
        try:
            net, predict = make(name, preset)
        except ImportError:
            continue
        steps[name] = training(net, predict, preset, condition)
        with FlopCounterMode(display=False) as counter:
            steps[name]()
        row |= dict(parameters=parameters(net), flops_image=counter.get_total_flops() / args.batch)
    times = report.take_turns(steps, args.rounds)
    lines = []
    for name, row in rows.items():
        cells = ["not installed"]
        if name in times:
            row["images_s"] = args.batch / statistics.median(times[name])
            gflops = row["flops_image"] / 1e9
            cells = [f"{row['parameters'] / 1e6:.2f} M", f"{gflops:.3f}", f"{row['images_s']:.0f}",
                     f"{gflops * row['images_s']:.0f}"]
        lines.append([name, *cells])
    ratios = [[f"{one} : {other}", report.faster(times, one, other)] for one, other in
              (NETWORKS[:2], NETWORKS[2:4], (NETWORKS[2], NETWORKS[4]))]
    if args.data:
        speed = loop_speed(args.data, args.preset, args.batch) * statistics.median(times[NETWORKS[-1]]) / args.batch
        ratios.append(["03_train_recon.py : its bare step", f"{speed:.2f}x"])
    tables = [report.table(["images/s", "ratio"], ratios),
              report.table(["network", "parameters", "GFLOPs an image", "images/s", "GFLOP/s"], lines)]
    about = f"torch {torch.__version__}, threads {torch.get_num_threads()}. {args.preset}, batch {args.batch}."
    report.finish(args, "bench_train", about, tables, list(rows.values()))


if __name__ == "__main__":
    main()
