"""03 and 04: what they write, many processes, and that they are one program."""
import ast
import difflib
import json
import re

import common
import numpy as np
import pytest
import torch
from conftest import ROOT, run
from small import here

SCRIPTS = {"03_train_recon.py": "recon", "04_train_pairs.py": "pairs"}


def train(folder, *flags, script="04_train_pairs.py", name="pairs"):
    """The script in this process, with a small network; its variables and its checkpoint."""
    variables = here(script, "--data", folder, "--out", folder / f"{name}.pt", "--batch", 4, *flags)
    return variables, common.load(folder / f"{name}.pt")


def log_of(path):
    return [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]


def assert_close(a, b):
    """Equal up to rounding: Adam's averages of the gradients, and of their squares, of two checkpoints at one step.

    Not the weights: Adam turns a gradient that is zero up to rounding into a step of full length.
    """
    assert a["step"] == b["step"] and a["config"] == b["config"]
    a, b = (state["optimizer"]["state"] for state in (a, b))
    for moment in ("exp_avg", "exp_avg_sq"):
        x, y = (torch.cat([state[name][moment].flatten() for name in sorted(a)]) for state in (a, b))
        assert (x - y).norm() < 0.01 * x.norm()


@pytest.mark.parametrize("script", SCRIPTS)
def test_command_line(tiny_data, script):
    """With the preset's own network: the three files, and nothing but the log on the screen."""
    result = run(script, "--data", tiny_data, "--steps", 2, "--batch", 4)
    assert result.returncode == 0 and result.stderr == ""
    out = tiny_data / f"{SCRIPTS[script]}.pt"
    state = torch.load(out, weights_only=True)
    assert state.keys() == {"model", "ema", "optimizer", "step", "config"}
    assert state["step"] == 2 and state["model"].keys() == state["ema"].keys()
    assert state["config"]["network"]["told"] == {"cls": (6,), "tokens": (4, 5)}
    assert [row["step"] for row in log_of(out)] == [2]
    assert set(log_of(out)[0]) == {"step", "loss", "by_noise_level", "lr", "images_per_s"}
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG") and not list(tiny_data.glob("*.partial*"))


def test_the_two_scripts_are_one_program():
    texts = []
    for script in SCRIPTS:
        tree = ast.parse((ROOT / script).read_text())
        tree.body = tree.body[1:]                                       # without the docstring
        texts.append(ast.unparse(tree).splitlines())
    changed = [line for line in difflib.ndiff(*texts) if line[0] in "-+"]
    assert 0 < len(changed) <= 20
    strange = [line for line in changed if not re.search("out|pairs|page|condition|target|train", line)]
    assert not strange, strange


def test_the_first_step_by_hand(tiny_data):
    """A new network predicts v = 0; Adam's first step has length lr; the average takes 9 of 10 parts of it."""
    variables, state = train(tiny_data, "--steps", 1, "--lr", 1e-3, "--batch", 40, "--loss", "eps")
    batch = variables["batch_of"](0)
    t, x = batch["t"].double(), batch["x"].permute(0, 3, 1, 2).double() / 127.5 - 1
    a, b = (np.arctan(np.exp(s * 7.5)) for s in (-1, 1))
    alpha2 = torch.cos(a + t * (b - a)) ** 2                            # alpha = cos, sigma = sin of the angle
    v = alpha2.sqrt()[:, None, None, None] * batch["eps"] - (1 - alpha2).sqrt()[:, None, None, None] * x
    loss = alpha2 * v.square().mean((1, 2, 3))
    row = log_of(tiny_data / "pairs.pt")[0]
    assert row["loss"] == pytest.approx(loss.mean().item(), rel=1e-4)
    assert row["by_noise_level"] == pytest.approx(loss.view(5, 8).mean(1).tolist(), rel=1e-4)
    assert row["lr"] == pytest.approx(1e-3 / 5) and row["images_per_s"] == 40            # the clock of small.py
    torch.manual_seed(0)
    start = common.UViT(**state["config"]["network"]).state_dict()
    moved = state["model"]["conv_out.weight"] - start["conv_out.weight"]
    assert moved.abs().max().item() == pytest.approx(1e-3 / 5, rel=1e-3)
    torch.testing.assert_close(state["ema"]["conv_out.weight"] - start["conv_out.weight"], 0.9 * moved)


def test_batches(tiny_data):
    """04: another training image of the page, each page as often as the others; 03: the image itself."""
    pairs, pages, images, cls = (common.load(tiny_data / f"{name}.npy") for name in ("pairs", "pages", "images", "cls"))
    images, cls = torch.from_numpy(images.copy()).flatten(1), torch.from_numpy(cls.copy())
    few = np.concatenate([pairs[pages[pairs[:, 0]] == 0], pairs[pages[pairs[:, 0]] == 2][:1]])
    np.save(tiny_data / "pairs.npy", few)                               # 12 pairs on page 0, one on page 2
    for script, name in SCRIPTS.items():
        variables, _ = train(tiny_data, "--steps", 1, "--batch", 400, script=script, name=name)
        batch = variables["batch_of"](3)
        target = (batch["x"].flatten(1)[:, None] == images).all(2).int().argmax(1).numpy()
        condition = (batch["cls"][:, None] == cls).all(2).int().argmax(1).numpy()
        if name == "recon":
            assert (condition == target).all() and set(target) == set(np.flatnonzero(np.arange(20) % 5 != 4))
        else:
            assert set(zip(condition, target)) == set(map(tuple, few))
            assert 140 < (pages[target] == 2).sum() < 260               # 200 expected, 6 standard deviations
        assert (batch["t"] * 400).long().unique().numel() > 395         # one in each of 400 strata, up to rounding
        assert 10 <= batch["drop"].sum() < 80                           # 40 expected
        again = variables["batch_of"](3)
        assert all(torch.equal(batch[key], again[key]) for key in batch)
        assert not torch.equal(batch["eps"], variables["batch_of"](4)["eps"])


def test_one_image_is_learned_by_heart(tiny_data):
    np.save(tiny_data / "pairs.npy", np.array([[0, 1]]))
    train(tiny_data, "--steps", 100, "--lr", 5e-3, "--batch", 8, "--save-every", 20)
    rows = log_of(tiny_data / "pairs.pt")
    assert [row["step"] for row in rows] == [20, 40, 50, 60, 80, 100]
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]


@pytest.mark.parametrize("command", ["04_train_pairs.py", "07_twostage.py prior --width 16"])
def test_a_finished_training_says_so_and_ends_well(tiny_data, capsys, command):
    """test_survival.py interrupts trainings: repeated, they end like those that nothing interrupts."""
    command = (*command.split(), "--data", tiny_data, "--steps", 1, "--batch", 4)
    here(*command)
    with pytest.raises(SystemExit) as stop:
        here(*command)
    assert not stop.value.code and "is there already, 1 steps" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--accumulate", 2], ["--recompute"], ["--workers", 1]])
def test_flags_that_change_rounding_at_most(tiny_data, flags):
    _, plain = train(tiny_data, "--steps", 3, name="plain")
    _, other = train(tiny_data, "--steps", 3, *flags, name="other")
    assert_close(plain, other)
    rows = log_of(tiny_data / "plain.pt"), log_of(tiny_data / "other.pt")
    assert rows[0][0]["loss"] == pytest.approx(rows[1][0]["loss"], rel=1e-4)
    assert rows[0][0]["images_per_s"] == rows[1][0]["images_per_s"] == 12


def test_two_processes_equal_one(tiny_data):
    """DDP until step 2, FSDP until step 4, DDP until step 6, each killed at a save, equal one process; no warnings."""
    flags = ("--data", tiny_data, "--batch", 4, "--steps", 6, "--save-every", 2)
    out = tiny_data / "two.pt"
    for step, options in ((2, ["--accumulate", 2]), (4, ["--fsdp", "--recompute"])):
        killed = run("tests/small.py 3 03_train_recon.py", *flags, "--out", out, *options, processes=2)
        assert killed.returncode != 0
        assert common.load(f"{out}.partial")["step"] == step, killed.stderr[-2000:]
    result = run("tests/small.py 0 03_train_recon.py", *flags, "--out", out, processes=2)
    assert result.returncode == 0 and result.stderr == "", result.stderr[-2000:]
    here("03_train_recon.py", *flags, "--out", tiny_data / "one.pt")
    assert_close(common.load(tiny_data / "one.pt"), common.load(out))
    for one, two in zip(log_of(tiny_data / "one.pt"), log_of(out), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)      # the mean over processes
        assert one["by_noise_level"] == pytest.approx(two["by_noise_level"], rel=1e-3)
        assert (one["step"], one["images_per_s"]) == (two["step"], two["images_per_s"])


def test_another_array_tells_the_network(tiny_data):
    np.save(tiny_data / "three.npy", np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32))
    flags = ("--steps", 1, "--cls", tiny_data / "three.npy", "--cond")
    film, none = (train(tiny_data, *flags, cond, name=cond)[1]["config"] for cond in ("film", "none"))
    assert film["network"]["told"] == {"cls": (3,)} and film["cls"] == "three.npy" and none["network"]["told"] == {}


def test_init(tiny_data):
    """A film model that starts from one without a condition predicts the same, whatever it is told, and then learns."""
    _, none = train(tiny_data, "--cond", "none", "--steps", 3, name="none")
    init = ("--steps", 1, "--init", tiny_data / "none.pt", "--cond")
    _, film = train(tiny_data, *init, "film", "--lr", 1e-12, name="film")
    networks = []
    for state in (none, film):
        networks.append(common.UViT(**state["config"]["network"]).requires_grad_(False))
        networks[-1].load_state_dict(state["ema"])
    z, logsnr, cls = torch.randn(4, 3, 16, 16), torch.linspace(-5, 5, 4), torch.randn(4, 6)
    expected = networks[0](z, logsnr)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(networks[1](z, logsnr, cls=cls), expected)
    _, learning = train(tiny_data, *init, "film", "--lr", 1e-2, name="learning")
    assert learning["ema"]["cls_in.weight"].any()


def test_bf16_keeps_float32_weights(tiny_data):
    _, plain = train(tiny_data, "--steps", 2, name="plain")
    _, short = train(tiny_data, "--steps", 2, "--amp", "bf16", name="short")
    assert all(weight.dtype == torch.float32 for weight in short["model"].values())
    assert not torch.equal(short["model"]["conv_in.weight"], plain["model"]["conv_in.weight"])
