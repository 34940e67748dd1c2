"""05_sample.py: shapes, files, seeds, guidance, and what does not fit together."""
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import system
import numpy as np
import pytest
import training
from PIL import Image

ROOT = Path(__file__).parents[1]
sampler = importlib.import_module("05_sample")


@pytest.fixture
def folder(tiny_data, train_args):
    """tiny_data with a pairs.pt of three steps; its learning rate is high so that the condition matters already."""
    args = train_args("--steps", "3", "--lr", "0.02", "--out", str(tiny_data / "pairs.pt"))
    args.warmup = 1
    training.train_images(args, system.Data(tiny_data), system.read_array(tiny_data / "pairs.npy"))
    return tiny_data


def sample(monkeypatch, folder, out, *flags):
    words = ["--data", folder, "--out", folder / out, "--device", "cpu", "--variations", "3", "--sample-steps", "3", *flags]
    monkeypatch.setattr(sys, "argv", ["05_sample.py", *map(str, words)])
    sampler.main()
    return np.load(folder / out / "samples.npy", allow_pickle=False)


def test_command_line_writes_samples_conditions_and_a_sheet(folder):
    subprocess.run([sys.executable, ROOT / "05_sample.py", "--data", folder, "--device", "cpu", "--variations", "2",
                    "--sample-steps", "2", "--guidance", "0.5"], check=True, cwd=ROOT)
    out = folder / "samples" / "pairs_w0.5_steps2_k2"                  # a name of what is not as usual
    samples = np.load(out / "samples.npy", allow_pickle=False)
    assert samples.shape == (4, 2, 16, 16, 3) and samples.dtype == np.uint8 and samples.std() > 0
    assert np.load(out / "conditions.npy", allow_pickle=False).tolist() == [4, 9, 14, 19]     # the held-out image of each page
    about = json.loads((out / "samples.json").read_text())
    assert (about["model"], about["guidance"], about["step"], about["seed"]) == ("pairs", 0.5, 3, 0)
    assert Image.open(out / "sheet.png").size[0] > 100 and not list(out.glob("*.tmp"))


def test_conditions_of_a_protocol(folder, monkeypatch, capsys):
    """per_page images of each page; a draw takes the next ones, of pages that have them; the full set takes all."""
    pages, split = np.array([0, 0, 0, 1, 1, 1, 2, 2], np.int32), np.array([1, 0, 1, 1, 1, 1, 0, 1], np.uint8)
    data = system.Data(folder)
    data.pages, data.split = pages, split                              # in place of the files
    assert data.conditions().tolist() == [0, 3, 7] and data.conditions(draw=1).tolist() == [2, 4]
    assert data.conditions(2).tolist() == [0, 2, 3, 4, 7] and data.conditions(2, 1).tolist() == [5]
    assert data.conditions(None).tolist() == [0, 2, 3, 4, 5, 7] and data.conditions(draw=3).size == 0
    data.split = 0 * split
    assert data.conditions().tolist() == list(range(8))
    with pytest.raises(SystemExit) as stop:
        sample(monkeypatch, folder, "none", "--draw", "1")
    assert stop.value.code == 2 and "holds out" in capsys.readouterr().err
    words = ["--data", folder, "--device", "cpu", "--sample-steps", "2", "--guidance", "0", "--protocol", "sun397-oneshot"]
    monkeypatch.setattr(sys, "argv", ["05_sample.py", *map(str, words)])
    sampler.main()
    made = folder / "sun397-oneshot" / "pairs_w0_steps2"
    assert np.load(made / "samples.npy", allow_pickle=False).shape[:2] == (4, 25)
    assert system.read_json(made / "samples.json")["protocol"] == "sun397-oneshot"


def test_an_image_depends_on_seed_and_place_alone(folder, monkeypatch):
    whole = sample(monkeypatch, folder, "whole").astype(int)
    small = sample(monkeypatch, folder, "small", "--batch-images", "5").astype(int)
    assert abs(whole - small).max() <= 1                               # another batch size: other rounding, the same image
    assert np.array_equal(whole, sample(monkeypatch, folder, "again"))
    other = sample(monkeypatch, folder, "other", "--seed", "1").astype(int)
    assert all((whole[i, j] != other[i, j]).any() for i in range(4) for j in range(3))
    assert all((whole[i, 0] != whole[i, 1]).any() for i in range(4))


def test_two_processes_draw_what_one_draws(folder):
    flags = [ROOT / "05_sample.py", "--data", folder, "--device", "cpu", "--variations", "2", "--sample-steps", "2",
             "--batch-images", "3", "--out"]                           # three batches, the last one of two images
    env, two = {**os.environ, "OMP_NUM_THREADS": "1"}, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for out, engine in (("one", []), ("two", two)):
        subprocess.run([sys.executable, *engine, *map(str, flags), str(folder / out)], check=True, cwd=ROOT, env=env)
    for name in ("samples.npy", "conditions.npy", "sheet.png"):
        assert (folder / "one" / name).read_bytes() == (folder / "two" / name).read_bytes()
    one, two = (settings(folder / out) for out in ("one", "two"))
    assert one.pop("ms_image") > 0 and two.pop("ms_image") > 0 and one == two


def test_guidance_changes_the_samples_and_beside_widens_the_sheet(folder, monkeypatch):
    plain = sample(monkeypatch, folder, "w0", "--guidance", "0")
    guided = sample(monkeypatch, folder, "w3", "--guidance", "3", "--beside", folder / "w0")
    assert not np.array_equal(plain, guided)
    assert Image.open(folder / "w3" / "sheet.png").size[0] > Image.open(folder / "w0" / "sheet.png").size[0]


def test_beyond_the_papers(folder, train_args, monkeypatch, capsys):
    """Each option changes the samples and is written down; a dial takes similarities in turn; a model without one says so."""
    plain = sample(monkeypatch, folder, "plain")
    for out, flags in (("ddim", ["--sampler", "ddim"]), ("dpm", ["--sampler", "dpm++"]), ("tcfg", ["--tcfg"]),
                       ("cads", ["--cads", "0.5"]), ("band", ["--guidance-interval", "-2", "2"]),
                       ("power", ["--time-power", "3"]), ("small", ["--interpolation", "0"])):
        assert not np.array_equal(plain, sample(monkeypatch, folder, out, *flags)), out
    assert settings(folder / "band")["variant"] == "-2to2" and settings(folder / "plain")["variant"] == ""
    assert (settings(folder / "power")["time_power"], settings(folder / "small")["interpolation"]) == (3, 0)
    assert np.array_equal(plain, sample(monkeypatch, folder, "same", "--time-power", "1.5", "--interpolation", "0.2"))
    with pytest.raises(SystemExit) as stop:
        sample(monkeypatch, folder, "none", "--sampler", "ddim", "--interpolation", "0")
    assert stop.value.code == 2 and "--interpolation" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        sample(monkeypatch, folder, "none", "--similarity", "0.5")
    assert stop.value.code == 2 and "dial" in capsys.readouterr().err
    flags = "--device cpu --dial --steps 2 --batch 4 --channels 16 32 --blocks 1 1 --lr 0.02 --sample-steps 2"
    subprocess.run([sys.executable, ROOT / "04_train_pairs.py", "--data", folder, *flags.split()], check=True)
    guided = sample(monkeypatch, folder, "guided", "--checkpoint", folder / "dial.pt", "--guidance", "2", "--similarity", "0.5")
    dial = ["--checkpoint", folder / "dial.pt", "--guidance", "0", "--similarity"]
    assert not np.array_equal(guided, sample(monkeypatch, folder, "unguided", *dial, "0.5"))
    both = sample(monkeypatch, folder, "both", *dial, "1", "0.5")
    one = sample(monkeypatch, folder, "one", *dial, "1")
    assert np.array_equal(both[:, ::2], one[:, ::2]) and not np.array_equal(both[:, 1], one[:, 1])
    assert settings(folder / "both")["similarity"] == [1, 0.5]


def settings(out):
    return system.read_json(out / "samples.json")


def test_embeddings_of_another_encoder_are_refused(folder, monkeypatch, capsys):
    meta = json.loads((folder / "data.json").read_text())
    meta["encoder"]["px"] = 32
    (folder / "data.json").write_text(json.dumps(meta))
    with pytest.raises(SystemExit) as stop:
        sample(monkeypatch, folder, "out")
    assert stop.value.code == 2 and "encoder" in capsys.readouterr().err and not (folder / "out").exists()
