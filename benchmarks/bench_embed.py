"""Speed of 01_embed.py beside bare calls of its encoder, and on large JPEGs, where decoding decides.

Both cases run the real command line on few images and on many: the difference is the time of the images between,
without start, imports and weights. The bare side is measured in turns with it, at the same batch size and threads.
  small    16 x 16 images in an .npy file (the digits' size; EfficientNet-Lite0 at 128 px)
  JPEGs    noisy 3000 x 2000 JPEGs in a folder

    python -m benchmarks.bench_embed
"""
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import common
from benchmarks import report

SIZE, PX, BATCH = 16, 128, 16                                          # of the preset; 01's batch on a CPU
JPEGS, CALLS = 8, 20                                                   # different JPEGs; encoder calls in a round


def embed(images):
    """01_embed.py on `images`."""
    with tempfile.TemporaryDirectory() as out:
        report.run("01_embed.py", "--images", images, "--preset", "digits16", "--device", "cpu", "--out", f"{out}/data")


def main():
    p = report.parser(__doc__)
    p.add_argument("--small", type=common.count, nargs=2, default=(160, 2160), metavar=("FEW", "MANY"))
    p.add_argument("--jpegs", type=common.count, nargs=2, default=(16, 112), metavar=("FEW", "MANY"))
    p.add_argument("--jpeg-size", type=common.count, nargs=2, default=(3000, 2000), metavar=("W", "H"))
    p.add_argument("--rounds", type=common.count, default=3)
    args = p.parse_args()
    rng, sets = np.random.default_rng(0), dict(small=args.small, JPEGs=args.jpegs)
    encode, _, _ = report.script("01_embed").efficientnet(PX, torch.device("cpu"))
    x = torch.from_numpy(rng.integers(0, 256, (BATCH, SIZE, SIZE, 3), np.uint8))

    @torch.inference_mode()
    def bare():
        for _ in range(CALLS):
            encode(x)

    with tempfile.TemporaryDirectory() as folder:
        drawn = [Path(folder, f"{i}.jpg") for i in range(JPEGS)]
        for path in drawn:
            noise = Image.effect_noise([side // 4 for side in args.jpeg_size], 80)       # about 1 MB as a JPEG
            noise.resize(args.jpeg_size).convert("RGB").save(path, quality=90)
        calls = {"bare": bare}
        for n in args.small:
            np.save(Path(folder, f"{n}.npy"), rng.integers(0, 256, (n, SIZE, SIZE, 3), np.uint8))
            calls["small", n] = partial(embed, Path(folder, f"{n}.npy"))
        for n in args.jpegs:
            Path(folder, str(n)).mkdir()
            for i in range(n):
                os.link(drawn[i % JPEGS], Path(folder, str(n), f"{i:05d}.jpg"))
            calls["JPEGs", n] = partial(embed, Path(folder, str(n)))
        megabytes = drawn[0].stat().st_size / 1e6
        times = report.take_turns(calls, args.rounds)

    ms = {"bare": 1e3 * statistics.median(times["bare"]) / CALLS / BATCH}
    for name, (few, many) in sets.items():
        ms[name] = 1e3 * statistics.median(b - a for a, b in zip(times[name, few], times[name, many])) / (many - few)
    ratios = [["small images, 01_embed.py : bare encoder calls", f"{ms['bare'] / ms['small']:.2f}x"],
              ["JPEGs, 01_embed.py : bare encoder calls", f"{ms['bare'] / ms['JPEGs']:.2f}x"]]
    lines = [[name, f"{value:.2f}"] for name, value in ms.items()]
    width, height = args.jpeg_size
    about = f"torch {torch.__version__}, threads {torch.get_num_threads()}. efficientnet_lite0 at {PX} px, "
    about += f"batch {BATCH}; JPEGs of {width} x {height} and {megabytes:.1f} MB."
    tables = [report.table(["speed", "ratio"], ratios), report.table(["what", "ms an image"], lines)]
    report.finish(args, "bench_embed", about, tables, [dict(what=name, ms_image=value) for name, value in ms.items()])


if __name__ == "__main__":
    main()
