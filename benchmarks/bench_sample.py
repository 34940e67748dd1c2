"""Sampling speed: common.sample against the bare calls of its network, and against diffusers' DDPMPipeline with the same network.

One batch of images of a preset's network (05_sample.py's batch of 100; untrained, which costs the same), with tokens and global
embedding as the condition. bare: as many network calls at the same batch size, and nothing else. ours: common.sample, from a
generator an image to uint8 images. diffusers: DDPMPipeline and DDPMScheduler (v-prediction, clipping) from one generator to NumPy
images, around the same guided network. The three take turns; ratios are medians over the rounds, round by round.

    python benchmarks/bench_sample.py                                  # digits16 on a CPU
    python benchmarks/bench_sample.py --preset emoji64 --device cuda --amp bf16 --batch 256
    pip install -r requirements-dev.txt                                # for diffusers; without it its rows say so
"""
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

import report
from bench_train import seconds

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common  # noqa: E402
import system  # noqa: E402

TARGET = 0.97


def pipeline(denoise, size, steps, device):
    """(batch) -> images by diffusers' DDPMPipeline around denoise(z, logsnr) -> v. Raises ImportError if it is not there."""
    from diffusers import ConfigMixin, DDPMPipeline, DDPMScheduler, ModelMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.models.unets.unet_2d import UNet2DOutput
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True)
    logsnrs = torch.logit(scheduler.alphas_cumprod.double()).float().to(device)                  # log alpha^2 / sigma^2

    class Network(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, sample_size=size, in_channels=3):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1, device=device))                      # says where and in what type

        def forward(self, sample, timestep):
            return UNet2DOutput(denoise(sample, logsnrs[timestep].expand(len(sample))))

    made = DDPMPipeline(Network(), scheduler)
    made.set_progress_bar_config(disable=True)
    return lambda batch: made(batch, torch.Generator(device).manual_seed(0), steps, output_type="np").images


def main():
    p = report.parser(__doc__)
    p.add_argument("--preset", default="digits16", choices=common.PRESETS)
    p.add_argument("--device", default="cpu")
    p.add_argument("--amp", default="none", choices=["none", "bf16"])
    p.add_argument("--batch", type=int, default=100)
    p.add_argument("--sample-steps", type=int, default=10)
    p.add_argument("--guidance", type=float, nargs="+", default=[0, 1])
    p.add_argument("--rounds", type=int, default=5)
    args = report.parse(p, "bench_sample")
    device, _, _ = system.start(args.device)
    preset, steps = common.PRESETS[args.preset], args.sample_steps
    network = dict(size=preset["size"], patch=preset["patch"], channels=preset["channels"], blocks=preset["blocks"], cond="both",
                   cls_dim=1280, token_shape=(16, 320))
    config = dict(network=network, noise_size=preset["noise_size"], time_power=preset["time_power"])
    torch.manual_seed(0)
    model = common.UViT(**network).to(device).eval()
    condition = dict(cls=torch.randn(args.batch, 1280, device=device), tokens=torch.randn(args.batch, 16, 320, device=device))

    @torch.no_grad()
    def bare(guidance):
        b = args.batch * (1 if guidance == 0 else 2)
        z, logsnr = torch.randn(b, 3, preset["size"], preset["size"], device=device), torch.zeros(b, device=device)
        given = {name: c.repeat(b // args.batch, *[1] * (c.ndim - 1)) for name, c in condition.items()}
        drop = None if guidance == 0 else torch.arange(b, device=device) >= args.batch
        with common.autocast(device, args.amp):
            for _ in range(steps):
                model(z, logsnr, drop=drop, **given)

    def ours(guidance):
        noise = partial(common.randn, [common.generator(device, 0, i) for i in range(args.batch)], (3, *[preset["size"]] * 2))
        common.sample(model, config, condition, guidance, noise, steps, args.amp)

    def theirs(guidance):
        with common.autocast(device, args.amp):
            sampler[guidance](args.batch)

    ways = {"bare network calls": bare, "common.sample": ours}
    try:
        sampler = {w: pipeline(common.guide(model, w, **condition), preset["size"], steps, device) for w in args.guidance}
        ways["diffusers DDPMPipeline"] = theirs
    except ImportError:
        pass
    times = {(w, way): [] for w in args.guidance for way in ways}
    for i in range(args.rounds + 1):
        for (w, way), found in times.items():
            found += [seconds(args.device, partial(ways[way], w), 1)][:i]                        # the first round warms up

    def ratio(w, way, other):
        if other not in ways:
            return None
        return statistics.median(b / a for a, b in zip(times[w, way], times[w, other]))

    ratios = [(f"speed at w = {w:g}, common.sample : {other}", ratio(w, "common.sample", other), target, unit)
              for w in args.guidance for other, target, unit in (("bare network calls", TARGET, "%"),
                                                                 ("diffusers DDPMPipeline", None, "x"))]
    rows = [dict(guidance=w, way=way, ms_image_step=1e3 * statistics.median(found) / args.batch / steps)
            for (w, way), found in times.items()]
    lines = [[f"{row['guidance']:g}", row["way"], f"{row['ms_image_step']:.3f}"] for row in rows]
    if "diffusers DDPMPipeline" not in ways:
        lines.append(["", "diffusers DDPMPipeline", "not installed"])
    about = report.machine(torch=torch.__version__, threads=torch.get_num_threads())
    about += f". {args.preset}, batch {args.batch}, {steps} steps, amp {args.amp}, {args.device}."
    parts = [report.targets(ratios), report.table(["w", "what", "ms an image and step"], lines)]
    report.finish(args, "bench_sample", about, parts, rows)


if __name__ == "__main__":
    main()
