"""The scripts live one folder up, their benchmarks beside this one, and neither is a package."""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "benchmarks")]

import json  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402

import system  # noqa: E402
import training  # noqa: E402


@pytest.fixture
def tiny_data(tmp_path):
    """A folder like those of 01_embed.py: 4 pages of 5 random 16 px images, the last of each page held out; and its pairs.npy."""
    rng, folder, n = np.random.default_rng(0), tmp_path / "data", 20
    folder.mkdir()
    pages = np.repeat(np.arange(4, dtype=np.int32), 5)
    split = (np.arange(n) % 5 == 4).astype(np.uint8)
    i, j = np.nonzero((pages[:, None] == pages) & ~np.eye(n, dtype=bool) & (split == 0) & (split[:, None] == 0))
    arrays = dict(images=rng.integers(0, 256, (n, 16, 16, 3), np.uint8), pages=pages, split=split,
                  names=np.array([f"image {k}" for k in range(n)]), cls=rng.normal(size=(n, 6)).astype(np.float32),
                  tokens=rng.normal(size=(n, 4, 5)).astype(np.float16), pairs=np.stack([i, j], 1))
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    encoder = dict(name="random", px=16, size=16, dim=6, tokens=[4, 5])
    (folder / "data.json").write_text(json.dumps(dict(preset="digits16", images=n, encoder=encoder)))
    return folder


@pytest.fixture
def train_args(tiny_data):
    """train_args("--steps", "6", ...): the arguments of a training script run on tiny_data with a small network."""
    def make(*flags):
        p = training.training_parser("")
        args = system.parse(p, ["--data", str(tiny_data), "--device", "cpu", "--batch", "4", *flags])
        args.channels, args.blocks, args.sample_steps = (16, 32), (1, 1), 2
        args.out = args.out or tiny_data / "model.pt"
        return args
    return make
