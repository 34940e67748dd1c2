"""system.py: what the scripts need besides the papers: checked files, command lines, devices, processes.

No network and no equation is here; those are in common.py.
"""
import argparse
import atexit
import contextlib
import ctypes
import functools
import json
import math
import os
import shutil
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import common

# ----------------------------------------------------------------------------------------------------------------------
# Files. Every finished file appears by a rename, so whatever has its final name is whole.


def die(message):
    """One line on standard error and exit code 2: bad arguments or bad input."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


@contextlib.contextmanager
def writing(path):
    """`with writing(path) as f`: f is PATH.tmp, opened for bytes; it becomes PATH at the end, or nothing does."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())                                       # on the disk before its name: power may fail
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        while isinstance(e, Exception) and not isinstance(e, OSError):  # torch.save raises another error on top of it
            e = e.__context__
        if not isinstance(e, OSError):
            raise
        die(f"cannot write {path}: {e.strerror or e}; free some space or choose another folder")


def read_array(path, dtype=None, ndim=None, rows=None, made_by="01_embed.py"):
    """Memory-map an .npy file, checked against the given dtype, number of axes and rows; exits with one line if it differs."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if math.prod(getattr(array, "shape", ())) > max(1, os.path.getsize(path)):  # numpy's own product can overflow
            raise ValueError("its shape is larger than the file")
    except FileNotFoundError:
        die(f"{path} is missing; {made_by} writes it")
    except Exception as e:  # a damaged header raises many types
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        die(f"{path} is not a readable .npy array ({reason}); write it again with {made_by}")
    if not isinstance(array, np.ndarray) or array.ndim == 0:
        die(f"{path} is not one array with rows; write it again with {made_by}")
    found, wanted = (array.dtype, array.ndim, len(array)), (dtype, ndim, rows)
    if any(w is not None and f != w for f, w in zip(found, wanted)):
        die(f"{path} holds (dtype, axes, rows) {found}, expected {wanted}; write it again with {made_by}")
    return array


def read_json(path, made_by="01_embed.py"):
    """The object in a .json file; exits with one line if there is none."""
    try:
        value = json.loads(Path(path).read_text())
    except (ValueError, OSError, RecursionError) as e:
        die(f"cannot read {path} ({e}); {made_by} writes it")
    if not isinstance(value, dict):
        die(f"{path} holds a {type(value).__name__}, expected an object; write it again with {made_by}")
    return value


def read_checkpoint(path):
    """{model, ema, optimizer, step, config} of a .pt file that train() wrote: tensors and plain values, no pickled objects."""
    parts = dict(model=dict, ema=dict, step=int, config=dict)
    try:
        checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)         # reads what is used of it
        if not all(isinstance(checkpoint[name], kind) for name, kind in parts.items()):
            raise TypeError
    except FileNotFoundError:
        die(f"{path} is missing; 03_train_recon.py and 04_train_pairs.py write checkpoints")
    except Exception as e:  # torch.load raises many types for a file that is something else
        die(f"{path} is not a checkpoint of this project ({type(e).__name__}); give one that 03, 04 or 07 wrote")
    return checkpoint


class Data:
    """A folder that 01_embed.py wrote: its settings `meta`, and images, pages, split, names, cls, tokens, memory-mapped.

    A file is opened when its array is first asked for: 06 needs no tokens, 03 and 04 no names.
    """
    ARRAYS = dict(images=(np.uint8, 4), pages=(np.int32, 1), split=(np.uint8, 1), names=(None, 1), cls=(np.float32, 2),
                  tokens=(np.float16, 3))                              # (dtype, axes)

    def __init__(self, folder):
        self.folder, self.meta = Path(folder), read_json(Path(folder) / "data.json")
        n = self.meta.get("images")
        if not (isinstance(n, int) and n > 0 and isinstance(self.meta.get("encoder"), dict)):
            die(f"{folder}/data.json names no encoder or no number of images; write it again with 01_embed.py")

    def __getattr__(self, name):                                       # called for what is not there yet
        if name not in self.ARRAYS:
            raise AttributeError(name)
        array = read_array(self.folder / f"{name}.npy", *self.ARRAYS[name], self.meta["images"])
        wrong = dict(images=array.shape[1:] != (*array.shape[1:2] * 2, 3), names=array.dtype.kind != "U")
        if wrong.get(name):
            die(f"{self.folder}/{name}.npy holds {array.dtype} of shape {array.shape}, expected square images of three channels "
                "and text as names; write it again with 01_embed.py")
        setattr(self, name, array)
        return array

    def conditions(self, per_page=1, draw=0):
        """Indices of the conditioning images: the first held-out image of each page, or all images if none is held out.

        per_page: so many of each page (None: all); draw 1, 2, ...: the next so many, where a page has them.
        """
        held_out = np.flatnonzero(self.split == 1)
        if per_page is None or len(held_out) == 0:
            return held_out if len(held_out) else np.arange(len(self.split))
        held_out = held_out[np.argsort(self.pages[held_out], kind="stable")]
        _, first, page = np.unique(self.pages[held_out], return_index=True, return_inverse=True)
        return held_out[(np.arange(len(held_out)) - first[page]) // per_page == draw]

    def embeddings(self, indices, cond, device):
        """What a network of this `cond` reads of the images `indices`: cls [B, D] and / or tokens [B, T, C]."""
        wanted = {"tokens": ["tokens"], "film": ["cls"], "both": ["cls", "tokens"], "none": []}[cond]
        return {name: torch.from_numpy(np.asarray(getattr(self, name)[indices])).to(device) for name in wanted}


def contact_sheet(path, rows):
    """Save rows of uint8 [S, S, 3] images as one PNG, magnified to about 48 pixels an image; None leaves a gap."""
    size = rows[0][0].shape[0]
    gap = np.full((size + 2, 4, 3), 255, np.uint8)
    frame = ((1, 1), (1, 1), (0, 0))
    lines = [np.concatenate([gap if i is None else np.pad(i, frame, constant_values=255) for i in row], 1) for row in rows]
    sheet = Image.fromarray(np.concatenate(lines))
    zoom = max(1, round(48 / size))
    with writing(path) as f:
        sheet.resize((sheet.width * zoom, sheet.height * zoom), Image.NEAREST).save(f, format="PNG")


# ----------------------------------------------------------------------------------------------------------------------
# Command line, devices, processes. `torchrun --nproc-per-node=N script.py ...` and `python script.py ...` do the same.


def parser(doc, data="folder that 01_embed.py wrote (default runs/PRESET)", device=True, seed=True):
    """An ArgumentParser with the flags that the scripts share; finish with parse()."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=common.PRESETS,
                   help="size, network and recipe (default: what DATA was made with, else digits16; of 01 --images: emoji16)")
    p.add_argument("--data", type=Path, help=data)
    if device:
        p.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    if seed:
        p.add_argument("--seed", type=int, default=0)
    return p


def parse(p, argv=None):
    """Parse, then fill what the command line left open: preset from the data, data from the preset, the rest from the preset
    and the protocol."""
    args = p.parse_args(argv)
    if getattr(args, "seed", 0) < 0:
        die(f"--seed {args.seed}: expected a number from 0")
    args.data = args.data or Path("runs") / (args.preset or "digits16")
    if args.preset is None and (args.data / "data.json").exists():
        args.preset = read_json(args.data / "data.json").get("preset")
        if args.preset not in common.PRESETS:
            die(f"{args.data}/data.json names preset {args.preset}, not one of {', '.join(common.PRESETS)}; give --preset")
    protocol = common.PROTOCOLS.get(getattr(args, "protocol", None), {})
    for key, value in (common.PRESETS[args.preset or "digits16"] | protocol).items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    return args


@functools.cache
def start(device):
    """Pick the device and join torchrun's process group if there is one, once. Returns (device, rank, world)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):      # glibc: keep freed memory instead of faulting it in again,
        for option in (-1, -3):                                        # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: a tenth of a CPU step
            ctypes.CDLL(None).mallopt(option, 1 << 25)
    rank, world, local = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    alone = "RANK" not in os.environ                                   # gloo does not know MPS
    device = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and alone else "cpu")
    if device.startswith("cuda:") and not alone:
        die(f"--device {device}: under torchrun every process has its own; give --device cuda")
    if device == "cuda":
        device = f"cuda:{local}"
        if local >= torch.cuda.device_count():
            die(f"process {local} has no GPU: this machine has {torch.cuda.device_count()}; start as many, or give --device cpu")
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")                     # TF32 for what stays in float32
    try:
        if device.partition(":")[0] not in ("cpu", "cuda", "mps"):
            raise RuntimeError("this project does not know it")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:                        # not in this build, or not in this machine
        die(f"--device {device}: {str(e).splitlines()[0]}; give cpu, cuda or mps")
    if not alone:
        backend = "nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=1))
        if backend == "gloo":                                          # its threads must end before the interpreter: otherwise
            atexit.register(dist.destroy_process_group)                # one run in 30 aborts when all is done
    return torch.device(device), rank, world


def at_least_one(args, *flags):
    """Exit with one line if one of these numbers is less than 1."""
    for flag in flags:
        if getattr(args, flag) < 1:
            die(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected at least 1")


def above_zero(args, *flags):
    """Exit with one line if one of these numbers is not above 0, or not finite."""
    for flag in flags:
        if not 0 < getattr(args, flag) < math.inf:
            die(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected a number above 0")


def wait():
    """Until all processes are here."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def writing_array(path, shape, dtype, rank):
    """`with writing_array(...) as a`: one .npy that all ranks fill, each its own rows; it becomes PATH when all are done."""
    temporary = Path(f"{path}.tmp")
    try:
        if rank == 0:
            temporary.parent.mkdir(parents=True, exist_ok=True)
            needed, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(temporary.parent).free
            if needed > free:                                          # a memory map of a full disk dies without a word
                die(f"cannot write {path}: it needs {needed:,} bytes, {free:,} are free")
            np.lib.format.open_memmap(temporary, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):                         # take the space now: nobody else can fill the disk
                with open(temporary, "r+b") as f:
                    os.posix_fallocate(f.fileno(), 0, os.path.getsize(temporary))
        wait()
        array = np.lib.format.open_memmap(temporary, "r+")
        yield array
        array.flush()
        wait()
        if rank == 0:
            os.replace(temporary, path)
    except OSError as e:
        die(f"cannot write {path}: {e.strerror or e}; choose another folder")
    finally:
        if rank == 0:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def progress(iterable, rank=0, **options):
    """tqdm on the first rank: every second on a terminal, every half minute in a log file."""
    return tqdm(iterable, disable=rank > 0, mininterval=1 if sys.stderr.isatty() else 30, **options)
