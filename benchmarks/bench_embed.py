"""Speed of 01_embed.py: against bare calls of its encoder, and on large JPEGs, where decoding decides.

Both cases run the real command line twice, on a few images and on many: the difference is the time of the images between, without
start, imports and weights. The bare side is measured in turns with it, at the same batch size and number of threads.
  small    16 x 16 images in an .npy file (the digits' size; EfficientNet-Lite0 at 128 px): bare encoder calls of ready tensors
  jpegs    textured 3000 x 2000 JPEGs in a folder: the same calls, and bare Pillow in one thread: open, draft, decode, shrink

    python benchmarks/bench_embed.py
"""
import importlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import report
from bench_train import seconds

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import system  # noqa: E402

PRESET, ENCODER, BATCH = "digits16", "efficientnet_lite0", 16
TARGET = 0.9


def texture(width, height, rng):
    """[height, width, 3] uint8 with detail at every scale, as photographs have: compresses to about 3 bits a pixel."""
    image = Image.new("RGB", (width, height), (128, 128, 128))
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(10):
        cells = rng.integers(0, 256, (max(1, height >> octave), max(1, width >> octave), 3), np.uint8)
        total += 2 ** (octave / 2) * (np.asarray(Image.fromarray(cells).resize(image.size, Image.BICUBIC), np.float32) - 128)
    return (128 + 40 * total / total.std()).clip(0, 255).astype(np.uint8)


def shrink(path, size):
    """Bare Pillow: a JPEG decoded at the scale that 01 asks for, and shrunk."""
    with Image.open(path) as image:
        image.draft(None, (2 * size, 2 * size))
        return image.resize((size, size), Image.LANCZOS)


def embed(images, out, args):
    """Seconds of 01_embed.py on `images`."""
    start = time.perf_counter()
    report.run(ROOT / "01_embed.py", "--images", images, "--preset", PRESET, "--encoder", ENCODER, "--batch", BATCH,
               "--device", args.device, "--overwrite", "--out", out)
    return time.perf_counter() - start


def main():
    p = report.parser(__doc__)
    p.add_argument("--device", default="cpu")
    p.add_argument("--small", type=int, nargs=2, default=(160, 2160), metavar=("FEW", "MANY"), help="small images")
    p.add_argument("--jpegs", type=int, nargs=2, default=(16, 112), metavar=("FEW", "MANY"), help="large JPEGs")
    p.add_argument("--jpeg-size", type=int, nargs=2, default=(3000, 2000), metavar=("W", "H"))
    p.add_argument("--rounds", type=int, default=3)
    args = report.parse(p, "bench_embed")
    if args.small[0] >= args.small[1] or args.jpegs[0] >= args.jpegs[1]:
        p.error("few must be fewer than many")
    device, _, _ = system.start(args.device)
    preset, rng = common.PRESETS[PRESET], np.random.default_rng(0)
    size = preset["size"]
    encode = importlib.import_module("01_embed").ENCODERS[ENCODER](preset["encoder_px"], device)
    x = torch.from_numpy(rng.integers(0, 256, (BATCH, size, size, 3), np.uint8)).to(device)

    @torch.inference_mode()
    def bare():
        encode(x)

    found = {name: [] for name in ("encode", "decode", "small", "jpegs")}                        # ms an image, a round each
    with tempfile.TemporaryDirectory() as folder:
        sets = {"small": [Path(folder, f"{n}.npy") for n in args.small], "jpegs": [Path(folder, str(n)) for n in args.jpegs]}
        for n, path in zip(args.small, sets["small"]):
            np.save(path, rng.integers(0, 256, (n, size, size, 3), np.uint8))
        drawn = [Path(folder, f"drawn{i}.jpg") for i in range(min(8, args.jpegs[0]))]            # and links to them
        for path in drawn:
            Image.fromarray(texture(*args.jpeg_size, rng)).save(path, quality=90)
        for n, path in zip(args.jpegs, sets["jpegs"]):
            path.mkdir()
            for i in range(n):
                os.link(drawn[i % len(drawn)], path / f"{i:05d}.jpg")
        megabytes = statistics.mean(path.stat().st_size for path in drawn) / 1e6
        bare()
        for _ in range(args.rounds):
            found["encode"].append(1e3 * seconds(args.device, bare, (args.small[1] - args.small[0]) // BATCH + 1) / BATCH)
            found["decode"].append(1e3 * seconds("cpu", lambda: [shrink(path, size) for path in drawn], 1) / len(drawn))
            for name, (few, many) in (("small", args.small), ("jpegs", args.jpegs)):
                once, more = (embed(path, Path(folder, "out"), args) for path in sets[name])
                found[name].append(1e3 * (more - once) / (many - few))

    ms = {name: statistics.median(values) for name, values in found.items()}
    ratios = [("small images: speed of 01_embed.py, of bare encoder calls", ms["encode"] / ms["small"], TARGET, "%"),
              ("JPEGs: speed of 01_embed.py, of bare encoder calls", ms["encode"] / ms["jpegs"], None, "%"),
              ("JPEGs: speed of 01_embed.py, of Pillow in one thread and then the encoder",
               (ms["encode"] + ms["decode"]) / ms["jpegs"], TARGET, "%")]
    lines = [[what, f"{ms[name]:.2f}", f"{min(found[name]):.2f} to {max(found[name]):.2f}"] for name, what in (
        ("encode", "bare encoder calls"), ("small", f"01_embed.py, {size} x {size} images of an .npy"),
        ("decode", f"Pillow, {'{} x {}'.format(*args.jpeg_size)} JPEGs of {megabytes:.1f} MB, one thread"),
        ("jpegs", "01_embed.py, the JPEGs"))]
    about = report.machine(torch=torch.__version__, threads=torch.get_num_threads())
    about += f". {ENCODER} at {preset['encoder_px']} px, batch {BATCH}, {args.device}; 01 decodes in {os.cpu_count()} threads."
    parts = [report.targets(ratios), report.table(["what", "ms an image", "over the rounds"], lines)]
    report.finish(args, "bench_embed", about, parts, [dict(what=name, ms_image=values) for name, values in found.items()])


if __name__ == "__main__":
    main()
