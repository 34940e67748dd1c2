"""What the tests share: a tiny folder of data, and how to run a script as a user would."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def run(script, *flags, processes=1, cwd=ROOT, **env):
    """`python SCRIPT FLAGS` in the repository (SCRIPT may be "-m beyond.dial"), or under torchrun, on the CPU."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    settings = os.environ | dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT)) | env
    command = [*launch, *script.split(), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=settings, text=True, capture_output=True)


def done(script, *flags, **options):
    """run(), which must succeed; returns what it printed."""
    result = run(script, *flags, **options)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


def module(name):
    """A numbered script as a module, without running its main()."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def write_data(folder, encoder, **arrays):
    """Write arrays as FOLDER/NAME.npy, and a data.json like that of 01; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    about = dict(preset="digits16", images=len(next(iter(arrays.values()))), source="test", encoder=encoder)
    (folder / "data.json").write_text(json.dumps(about))
    return folder


@pytest.fixture
def tiny_data(tmp_path):
    """A folder like those of 01: 4 pages of 5 random 16 px images, the last of each page held out; pairs.npy of 02."""
    rng, n = np.random.default_rng(0), 20
    pages = np.repeat(np.arange(4, dtype=np.int32), 5)
    split = (np.arange(n) % 5 == 4).astype(np.uint8)
    train = split == 0
    i, j = np.nonzero((pages[:, None] == pages) & ~np.eye(n, dtype=bool) & train & train[:, None])
    arrays = dict(images=rng.integers(0, 256, (n, 16, 16, 3), np.uint8), pages=pages, split=split,
                  names=np.array([f"{page}/{k}.png" for k, page in enumerate(pages)]),
                  cls=rng.normal(size=(n, 6)).astype(np.float32), tokens=rng.normal(size=(n, 4, 5)).astype(np.float16),
                  pairs=np.stack([i, j], 1), sims=rng.uniform(size=len(i)).astype(np.float32))
    return write_data(tmp_path / "data", dict(name="tiny", px=16, size=16, dim=6, tokens=[4, 5]), **arrays)
