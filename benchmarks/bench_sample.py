"""Sampling speed: common.sample_images beside the bare calls of its network, which is all that sampling has to do.

One batch of images of digits16 (05's batch of 100; untrained, which costs the same), with tokens and global
embedding as the condition. bare: as many network calls at the same batch size. common.sample_images: from a generator
an image to uint8 images. The two take turns; ratios are medians over the rounds.

    python -m benchmarks.bench_sample                            # digits16 on a CPU
"""
import statistics
from functools import partial

import torch

import common
from benchmarks import report
from benchmarks.bench_train import TOLD, ours


def main():
    p = report.parser(__doc__)
    p.add_argument("--batch", type=common.count, default=100)
    p.add_argument("--sample-steps", type=common.count, default=10)
    p.add_argument("--guidance", type=float, nargs="+", default=[0, 1])
    p.add_argument("--rounds", type=common.count, default=5)
    args = p.parse_args()
    preset = common.PRESETS["digits16"] | dict(sample_steps=args.sample_steps)
    torch.manual_seed(0)
    model = ours(preset, *TOLD).eval()
    condition = {name: torch.randn(args.batch, *shape) for name, shape in TOLD.items()}

    @torch.no_grad()
    def bare(guidance):
        copies = 1 if guidance == 0 else 2
        z = torch.randn(copies * args.batch, 3, preset["size"], preset["size"])
        logsnr = torch.zeros(len(z))
        given = {name: torch.cat([c] * copies) for name, c in condition.items()}
        for _ in range(args.sample_steps):
            model(z, logsnr, **given)

    def sample_images(guidance):
        generators = [common.generator("cpu", 0, i, 0, 1) for i in range(args.batch)]
        common.sample_images(model, condition, generators, guidance, preset)

    calls = {(w, way.__name__): partial(way, w) for w in args.guidance for way in (bare, sample_images)}
    times = report.take_turns(calls, args.rounds)
    ratios = [[f"w = {w:g}, sample_images : bare", report.faster(times, (w, "sample_images"), (w, "bare"))]
              for w in args.guidance]
    rows = [dict(guidance=w, way=way, ms_image_step=1e3 * statistics.median(found) / args.batch / args.sample_steps)
            for (w, way), found in times.items()]
    lines = [[f"{row['guidance']:g}", row["way"], f"{row['ms_image_step']:.3f}"] for row in rows]
    threads = torch.get_num_threads()
    about = f"torch {torch.__version__}, threads {threads}. digits16, batch {args.batch}, {args.sample_steps} steps."
    tables = [report.table(["speed", "ratio"], ratios), report.table(["w", "what", "ms an image and step"], lines)]
    report.finish(args, "bench_sample", about, tables, rows)


if __name__ == "__main__":
    main()
