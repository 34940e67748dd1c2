"""Killed before a file gets its name, then repeated, a command ends with the bits of an undisturbed run."""
import json
import shutil
import signal
from pathlib import Path

import common
import numpy as np
import pytest
from conftest import run
from small import checkpoint, here, same, samples

TRAIN = "--data DATA --batch 4 --steps 4 --save-every 2"
IMAGES = "--images DATA/images.npy --encoder efficientnet_lite0 --encoder-px 32"
SAMPLES = "DATA/samples/both_w1/samples.npy"
COMMANDS = [                                                            # command, file at which it is killed, last file
    (f"01_embed.py {IMAGES} --out DATA/new", 2, "DATA/new/data.json"),  # some arrays have their names
    ("02_filter_pairs.py --data DATA --low -1 --high 1", 2, "DATA/pairs.npy"),           # sims.npy has its name
    (f"03_train_recon.py {TRAIN}", 2, "DATA/recon.pt"),                 # log written, checkpoint not
    (f"04_train_pairs.py {TRAIN}", 5, "DATA/pairs.pt"),                 # the second time
    (f"04_train_pairs.py {TRAIN}", 7, "DATA/pairs.pt"),                 # all but the final name
    (f"07_twostage.py prior {TRAIN} --width 16", 2, "DATA/prior.pt"),   # its second checkpoint
    ("05_sample.py --data DATA --checkpoint DATA/both.pt --variations 2", 2, SAMPLES),   # conditions.npy written
    ("05_sample.py --data DATA --checkpoint DATA/both.pt --variations 2", 3, SAMPLES),   # samples.npy not
    ("06_fewshot_metrics.py --data DATA", 1, "DATA/metrics.json")]


def finished(folder):
    """{name: content} of the files in a folder that have their final names; each can be read."""
    found = {}
    for path in folder.rglob("*.*"):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            found[name] = [json.loads(line) for line in path.read_text().splitlines()]
        elif path.suffix in (".npy", ".pt", ".json"):
            found[name] = common.load(path)
        elif path.suffix in (".png", ".txt"):
            found[name] = path.read_bytes()
    return found


@pytest.fixture
def folder(tiny_data):
    """Data, a checkpoint to sample, and a folder of samples to score."""
    checkpoint(tiny_data / "both.pt", "both")
    np.save(tiny_data / "split.npy", np.zeros(20, np.uint8))            # so that 06 has enough references
    (tiny_data / "sims.npy").unlink()                                   # 02 is to write it
    samples(tiny_data)
    return tiny_data


@pytest.mark.parametrize("command, number, last", COMMANDS)
def test_killed_and_repeated(folder, tmp_path, command, number, last):
    (folder / Path(last).name).unlink(missing_ok=True)                  # 04's input is 02's result
    before, untouched = finished(folder), shutil.copytree(folder, tmp_path / "untouched")
    script, *flags = command.replace("DATA", str(folder)).split()
    here(script, *flags)
    expected = finished(folder.rename(tmp_path / "expected"))
    untouched.rename(folder)
    killed = run(f"tests/small.py {number} {script}", *flags)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    torn = finished(folder)                                             # raises if a file with its final name is half
    assert last.replace("DATA", str(folder)) not in map(str, folder.rglob("*"))
    assert all(same(torn[name], content) for name, content in before.items())
    here(script, *flags)
    result = finished(folder)
    assert result.keys() == expected.keys() > before.keys()
    assert [name for name in result if not same(result[name], expected[name])] == []
    assert not [path for path in folder.rglob("*") if path.suffix in (".tmp", ".partial")]
