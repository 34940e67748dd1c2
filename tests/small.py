"""Scripts with a small network and a few sampling steps, so that a run takes a second.

here() runs one in this process. `python tests/small.py N SCRIPT FLAGS` is killed, as by kill -9, when its N-th file is
about to get its final name (0: never); processes with another rank than 0 write none.
"""
import itertools
import json
import os
import runpy
import signal
import sys
import time

import common
import numpy as np
import torch
from conftest import ROOT, write_data

SMALL = dict(channels=(16, 32), blocks=(1, 1), sample_steps=2, warmup=5)
torch.set_num_threads(1)


def here(script, *flags):
    """What `python SCRIPT FLAGS` does, in this process, on the CPU; returns the script's variables.

    time.perf_counter ticks once a call, so images_per_s in a log is the number of images since the row before.
    """
    before = dict(common.PRESETS["digits16"]), sys.argv, time.perf_counter
    try:
        common.PRESETS["digits16"].update(SMALL)
        sys.argv = [script, "--device", "cpu", *map(str, flags)]
        time.perf_counter = itertools.count().__next__
        return runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        common.PRESETS["digits16"], sys.argv, time.perf_counter = before


def nowhere_zero(model):
    """Make the parameters random that begin at zero: then everything reaches the output."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model


def checkpoint(path, cond, **settings):
    """Write a checkpoint like those of 03 for the fixture tiny_data, with random weights that are nowhere zero."""
    told = dict(both={"cls": (6,), "tokens": (4, 5)}, film={"cls": (6,)}, none={})[cond]
    network = dict(size=16, patch=1, channels=(16, 32), blocks=(1, 1), transformers=1, told=told)
    encoder = dict(name="tiny", px=16, size=16, dim=6, tokens=[4, 5])
    torch.manual_seed(0)
    model = nowhere_zero(common.UViT(**network))
    config = common.PRESETS["digits16"] | dict(network=network, encoder=encoder, cond=cond, cls=None) | settings
    torch.save(dict(model=model.state_dict(), ema=model.state_dict(), step=7, config=config), path)
    return path


def samples(data):
    """Write DATA/samples/old as 05 and 01 --cls-only would: ten random embeddings for each of four conditions."""
    folder, encoder = data / "samples" / "old", common.load(data / "data.json")["encoder"]
    cls = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    write_data(folder, encoder, cls=cls, conditions=np.array([4, 9, 14, 19]))
    about = dict(model="both", step=7, guidance=1.0, draw=0, seed=0, per_page=1, variations=10, sample_steps=2, y=None)
    (folder / "samples.json").write_text(json.dumps(about))


def same(a, b):
    """Whether two results are equal, bit for bit, but for the times that runs took."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a.keys() - {"images_per_s", "ms_image"})
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b) if hasattr(a, "shape") else a == b


def kill_before_rename(number):
    """End this process, as kill -9 would, before it renames its file `number`."""
    seen = itertools.count(1)

    def hook(event, arguments):
        if event == "os.rename" and next(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)


if __name__ == "__main__":
    if int(sys.argv[1]) > 0:
        kill_before_rename(int(sys.argv[1]))
    here(*sys.argv[2:])
