"""05: which images are the conditions, and that image (i, j) depends on (seed, i, j) and its own condition only."""
import json

import common
import numpy as np
import pytest
from conftest import ROOT, done, module
from PIL import Image
from small import checkpoint, here

TWO = "tests/small.py 0 05_sample.py"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small networks with random weights: {cond: path of a checkpoint}."""
    folder = tmp_path_factory.mktemp("models")
    return {cond: checkpoint(folder / f"{cond}.pt", cond) for cond in ("both", "film")}


def sample(folder, model, out, *flags):
    here("05_sample.py", "--data", folder, "--checkpoint", model, "--sample-steps", 2, "--out", folder / out, *flags)
    return np.load(folder / out / "samples.npy", allow_pickle=False).astype(int)


def test_command_line(tiny_data, models):
    flags = ("--variations", 3, "--draw", 2, "--sample-steps", 2)
    done("05_sample.py", "--data", tiny_data, "--checkpoint", models["both"], *flags)
    made = tiny_data / "samples" / "both_w1"
    names = {path.name for path in made.iterdir()}
    assert names == {"conditions.npy", "samples.json", "samples.npy", "sheet.png"}
    samples, conditions = (np.load(made / f"{name}.npy", allow_pickle=False) for name in ("samples", "conditions"))
    assert samples.shape == (4, 3, 16, 16, 3) and samples.dtype == np.uint8 and conditions.tolist() == [4, 9, 14, 19]
    about = json.loads((made / "samples.json").read_text())
    assert about.pop("ms_image") > 0
    assert about == dict(model="both", step=7, guidance=1, draw=2, seed=0, per_page=1, variations=3, interpolation=0.2,
                         y=None, sample_steps=2, time_power=1.5, amp="none")
    assert Image.open(made / "sheet.png").width > Image.open(made / "sheet.png").height


def test_an_image_depends_on_its_own_place_alone(tiny_data, models):
    whole = sample(tiny_data, models["both"], "whole", "--variations", 3)
    small = sample(tiny_data, models["both"], "small", "--variations", 3, "--batch-images", 5)
    assert np.abs(whole - small).max() <= 1                             # other rounding
    fewer = sample(tiny_data, models["both"], "fewer", "--variations", 2)
    assert np.abs(whole[:, :2] - fewer).max() <= 1
    assert len(np.unique(whole.reshape(12, -1), axis=0)) == 12
    other = sample(tiny_data, models["both"], "other", "--variations", 3, "--seed", 1)
    assert (whole != other).any((2, 3, 4)).all()
    cls = np.load(tiny_data / "cls.npy", allow_pickle=False)
    cls[4] += 3                                                         # the first condition
    np.save(tiny_data / "cls.npy", cls)
    changed = sample(tiny_data, models["both"], "changed", "--variations", 3)
    assert np.abs(whole[1:] - changed[1:]).max() <= 1 < np.abs(whole[0] - changed[0]).max()


def test_two_processes_draw_what_one_draws(tiny_data, models):
    flags = ("--data", tiny_data, "--checkpoint", models["both"], "--variations", 2, "--batch-images", 3)
    done(TWO, *flags, "--out", tiny_data / "two", processes=2)          # three batches, the last one of two images
    here("05_sample.py", *flags, "--out", tiny_data / "one")
    for name in ("samples.npy", "conditions.npy", "sheet.png"):
        assert (tiny_data / "one" / name).read_bytes() == (tiny_data / "two" / name).read_bytes()


def test_conditions():
    """Held-out images, so many of each page, another choice for another draw; all images if none is held out."""
    choose = module("05_sample.py").conditioning_images
    pages, split = np.arange(60) % 3, (np.arange(60) % 2).astype(np.uint8)
    draws = [choose(pages, split, 4, draw).tolist() for draw in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]
    assert all(split[draw].all() and len(set(draw)) == 12 for draw in draws)
    assert all((np.bincount(pages[draw]) == 4).all() for draw in draws)
    assert sorted(choose(pages, split, 99, 0)) == np.flatnonzero(split).tolist()
    assert choose(pages, 0 * split, 4, 0).tolist() == list(range(60))


def test_guidance_and_the_sheet(tiny_data, models):
    plain = sample(tiny_data, models["film"], "plain", "--guidance", 0)
    guided = sample(tiny_data, models["film"], "guided", "--guidance", 3, "--beside", tiny_data / "plain")
    assert plain.shape[1] == 10 and (plain != guided).any((2, 3, 4)).all()
    assert Image.open(tiny_data / "guided" / "sheet.png").width > Image.open(tiny_data / "plain" / "sheet.png").width
    cls = np.load(tiny_data / "cls.npy", allow_pickle=False)[[4, 9, 9]]
    np.save(tiny_data / "y.npy", cls)                                   # two of the embeddings as rows of an array
    drawn = sample(tiny_data, models["film"], "y", "--y", tiny_data / "y.npy")
    assert np.abs(drawn[:2] - plain[:2, :1]).max() <= 1                 # --y means guidance 0, and one sample a row
    assert (drawn[2] != drawn[1]).any()                                 # rows share their noise by place
    assert not (tiny_data / "y" / "conditions.npy").exists()


@pytest.mark.parametrize("name", ["recon", "pairs"])
def test_checkpoints_in_the_repository_read_and_draw(name):
    checkpoint = common.load(ROOT / "pretrained" / f"{name}.pt")
    model = common.UViT(**checkpoint["config"]["network"])
    model.load_state_dict(checkpoint["ema"])
    shapes = checkpoint["config"]["network"]["told"]
    condition = {name: norm.mean.expand(1, *shapes[name]) for name, norm in model.norm.items()}
    x = common.sample_images(model, condition, [common.generator("cpu", 0, 0, 0, 1)], 1, checkpoint["config"])
    assert x.shape == (1, 16, 16, 3) and x.max() > 150 and np.median(x) < 30             # strokes on black
