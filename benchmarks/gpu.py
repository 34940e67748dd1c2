"""What one CUDA GPU does: checks that its results are right, then the speed and memory of the parts that run on it.

Each result is written to --out at once, so a run that is cut off keeps what it had. A repeated command measures what is
missing; with --limit 0 it only writes the tables. What fails is named with its error and stops nothing else.
--device cpu tries every part with a tiny network; its numbers mean nothing.

  same     the network's output against float32 on the CPU, in float32 (TF32 products) and in bf16: the relative error
  resume   03 for 4 steps on made-up images. It is killed (SIGKILL) after step 2 and resumed, once with DDP and then
           FSDP2 under torchrun. The largest difference between its averaged weights and those of a run without a kill;
           "the same again" is what two such runs differ by
  matmul   the card's own peak: square matrix products
  train    the step of 03 without data loading, batches doubling until the memory is full. FLOPs are counted as in
           scaling.py. MFU is their share of the bf16 peak above, and peak memory is that of torch's allocator
  sample   common.sample_images with w = 1 at 05's batch, in 8 steps; images_per_s is for the preset's number of steps
  embed    01's encoder with DINOv2-L's architecture and random weights, at 01's batch
  compile  train with torch.compile, at the batch that was fastest without it

    bash benchmarks/gpu.sh                       # all of it on a GPU, and the section of docs/benchmarks.md
    python -m benchmarks.gpu --only train        # a part of it
    bash benchmarks/gpu.sh --device cpu          # a try without a GPU
"""
import gc
import itertools
import json
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

import common
from benchmarks import bench_train, report, scaling

KINDS = ("same", "resume", "matmul", "train", "sample", "embed", "compile")
# name: preset, first batch. semantica256 is cut in its lowest stage, which holds most of its weights
PRESETS = common.PRESETS | {
    "semantica256, 2 of 12 blocks": common.PRESETS["semantica256"] | dict(blocks=(2, 3, 3, 3, 2)),
    "tiny": common.PRESETS["digits16"] | dict(channels=(16, 32), blocks=(1, 1), sample_steps=2)}
CASES = {"cuda": {"emoji64": 64, "semantica64": 32, "semantica256, 2 of 12 blocks": 8}, "cpu": {"tiny": 2}}
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node=1"
# name: how 03 is started, one start after the other, (before the script, behind it); all but the last are killed
TRAININGS = {"without a kill": [("", "")], "the same again": [("", "")], "killed, resumed": [("", ""), ("", "")],
             "DDP, killed, resumed with FSDP2": [(TORCHRUN, ""), (TORCHRUN, "--fsdp")]}

# ----------------------------------------------------------------------------------------------------------------------
# Helpers.


def seconds_a_call(call, device, calls=10):
    """The mean of some calls, after two to warm up."""
    for n in (2, calls):
        start = time.perf_counter()
        for _ in range(n):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def too_late(*_):
    raise TimeoutError("stopped at the time limit")


def attempt(call, end):
    """The dict that call() returns, or dict(error=...) if it fails or is not done at the time `end`."""
    left = int(end - time.monotonic())
    if left < 1:
        return dict(error="skipped, no time left")
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(left)
    try:
        return call()
    except (Exception, SystemExit) as e:                               # SystemExit: common.die()
        return dict(error=f"{type(e).__name__}: {e}"[-2000:])
    finally:
        signal.alarm(0)
        gc.collect()                                                   # what the failed one held
        torch.cuda.empty_cache()


def network(name, batch, device):
    """A preset's network and made-up embeddings for it, {"tokens": [B, T, C], ...}."""
    with torch.device(device):
        model, told = scaling.untrained(PRESETS[name])
        return model, {key: torch.randn(batch, *shape) for key, shape in told.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Measurements. Each returns a dict, a row of its table.


def same(name, amp, device):
    torch.manual_seed(0)
    model, condition = network(name, 4, "cpu")
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)                           # some layers begin at zero
    size = PRESETS[name]["size"]
    inputs = dict(z=torch.randn(4, 3, size, size), logsnr=torch.linspace(-5, 5, 4), **condition)
    with torch.no_grad():
        right = model(**inputs)
        with common.autocast(device, amp):
            found = model.to(device)(**{key: value.to(device) for key, value in inputs.items()})
    return dict(relative_error=((found.cpu() - right).norm() / right.norm()).item())


def made_up(folder, preset, n=40):
    """Write a folder like those of 01, of random images and embeddings."""
    rng, size = np.random.default_rng(0), common.PRESETS[preset]["size"]
    arrays = dict(images=rng.integers(0, 256, (n, size, size, 3), np.uint8), split=np.zeros(n, np.uint8))
    arrays |= {name: rng.random((n, *shape), np.float32) for name, shape in bench_train.TOLD.items()}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "data.json").write_text(json.dumps(dict(preset=preset, encoder=dict(name="made up", size=size))))


def training(folder, name, starts, device):
    """One of TRAININGS; small.py kills it when its 3rd file is about to get its name, after the first save."""
    out, steps = folder / f"{name}.pt", []
    for n, (launch, flags) in enumerate(starts, 1):
        kill = 3 if n < len(starts) else 0
        command = [*launch.split(), "tests/small.py", kill, "03_train_recon.py", "--data", folder, "--out", out,
                   "--device", device, "--batch", 16, "--steps", 4, "--save-every", 2, *flags.split()]
        try:
            report.run(*command, PYTHONPATH=str(report.ROOT))
        except RuntimeError:
            if not kill:
                raise
            steps.append(common.load(f"{out}.partial")["step"])
    ours, whole = (common.load(path)["ema"] for path in (out, folder / "without a kill.pt"))
    return dict(killed_after=steps, largest_difference=max((ours[k] - whole[k]).abs().max().item() for k in whole))


def matmul(dtype, side, device):
    a = torch.randn(side, side, device=device).to(dtype)
    return dict(TFLOP_per_s=2 * side ** 3 / seconds_a_call(lambda: a @ a, device) / 1e12)


def train(name, batch, compiled, peak, device):
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model, condition = network(name, batch, device)
    condition["tokens"] = condition["tokens"].half()                   # as in the file
    condition["drop"] = torch.rand(batch, device=device) < 0.1
    step = bench_train.training(model, lambda net, *z, **c: net(*z, **c), PRESETS[name], condition, compiled)
    speed = batch / seconds_a_call(step, device)
    tflops = speed * scaling.count(PRESETS[name])["step"][0] / 1e12
    memory = torch.cuda.max_memory_allocated() / scaling.GiB or None   # 0 without a GPU
    return dict(images_per_s=speed, TFLOP_per_s=tflops, MFU=tflops / peak if peak else None, peak_GiB=memory)


def sample(name, n, device, steps=8):
    model, condition = network(name, n, device)
    generators = [common.generator(device, 0, i, 0, 1) for i in range(n)]
    call = partial(common.sample_images, model, condition, generators, 1, PRESETS[name] | dict(sample_steps=steps))
    ms = 1e3 * seconds_a_call(call, device, 3) / n / steps
    return dict(batch=n, ms_per_image_and_step=ms, images_per_s=1e3 / ms / PRESETS[name]["sample_steps"])


@torch.inference_mode()
def embed(width, layers, batch, device):
    import transformers
    with tempfile.TemporaryDirectory() as folder:
        config = transformers.Dinov2Config(width, layers, num_attention_heads=width // 64, patch_size=14)
        transformers.Dinov2Model(config).save_pretrained(folder)
        transformers.BitImageProcessor().save_pretrained(folder)
        encode, px, _ = report.script("01_embed").transformer(folder, None, device)
    images = torch.randint(256, (batch, px, px, 3), dtype=torch.uint8)
    seconds = seconds_a_call(lambda: [x.cpu() for x in encode(images.to(device))], device)
    return dict(px=px, batch=batch, images_per_s=batch / seconds)


# ----------------------------------------------------------------------------------------------------------------------
# The script.


def plan(found, folder, device):
    """(kind, name, call) of each measurement, correctness first. Later ones depend on what was `found` before."""
    cases, real = CASES[device.type], device.type == "cuda"
    for amp in ("none", "bf16"):
        yield "same", f"amp {amp}", partial(same, next(iter(cases)), amp, device)
    made_up(folder, "emoji64" if real else "digits16")
    for name, starts in TRAININGS.items():
        yield "resume", name, partial(training, folder, name, starts, device)
    for dtype, side in itertools.product((torch.bfloat16, torch.float32), (4096, 8192, 16384) if real else (256,)):
        yield "matmul", f"{dtype}, {side}".removeprefix("torch."), partial(matmul, dtype, side, device)
    peak = max((row.get("TFLOP_per_s", 0) for name, row in found["matmul"].items() if "bf" in name), default=0)
    fastest = {}                                                       # name: (images_per_s, batch)
    for name, batch in cases.items():
        fastest[name] = 0, batch
        while batch <= (8192 if real else 4):
            yield "train", f"{name}, batch {batch}", partial(train, name, batch, False, peak, device)
            row = found["train"].get(f"{name}, batch {batch}", dict(error="not in --only"))
            if "error" in row:                                         # such as out of memory
                break
            fastest[name] = max(fastest[name], (row["images_per_s"], batch))
            batch *= 2
        yield "sample", name, partial(sample, name, 100 if real else 4, device)
    yield "embed", "DINOv2-L", partial(embed, *((1024, 24, 256) if real else (64, 2, 4)), device)
    for name, (_, batch) in fastest.items():
        yield "compile", f"{name}, batch {batch}", partial(train, name, batch, True, peak, device)


def cell(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)


def table(kind, rows):
    """Markdown; the row of what failed holds the error's first words."""
    keys = next((list(row) for row in rows.values() if "error" not in row), ["result"])
    lines = [[name, row["error"].splitlines()[0][:100]] if "error" in row else [name, *map(cell, row.values())]
             for name, row in rows.items()]
    return report.table([kind, *(key.replace("_", " ") for key in keys)], lines)


def main():
    p = report.parser(__doc__)
    p.add_argument("--device", default="cuda", choices=CASES)
    p.add_argument("--limit", type=common.natural, default=510, help="seconds in all (%(default)s)")
    p.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    args = p.parse_args()
    end = time.monotonic() + args.limit
    device, _, _ = common.start(args.device)
    card = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU, tiny sizes"
    args.out = args.out or Path(f"runs/gpu/{card.replace(' ', '_')}.json")
    found = common.load(args.out)["rows"] if args.out.exists() else {kind: {} for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for kind, name, call in plan(found, Path(folder), device):
            if kind in args.only and "error" in found[kind].get(name, {"error"}):
                found[kind][name] = attempt(call, end)
                print(f"{kind}, {name}: {found[kind][name]}", flush=True)
                with common.writing(args.out) as f:
                    f.write(json.dumps(dict(machine=card, rows=found), indent=1).encode())
    about = f"torch {torch.__version__}, {card}."
    report.finish(args, "gpu", about, [table(kind, rows) for kind, rows in found.items() if rows], found)


if __name__ == "__main__":
    main()
