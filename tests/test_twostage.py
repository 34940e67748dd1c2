"""07_twostage.py, examples/augment.py: the prior on a known distribution, labels, views, told, the rows."""
import json
from functools import partial

import numpy as np
import pytest
import torch

import common
from conftest import done, module, run, write_data

twostage = module("07_twostage.py")
CPU = torch.device("cpu")
WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[3, 0, 0, 10], [-3, 2, 0, 10], [0, -3, 1, 10]], np.float32)         # far from 0 and unlike scales
SMALL = ("--device", "cpu", "--width", 16, "--batch", 4, "--samples", 9)


def step(data, what, *flags, **options):
    return done("07_twostage.py", what, "--data", data, *SMALL, *flags, **options)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A folder with a Gaussian mixture as embeddings, its component as page; a tenth, held out, lies elsewhere."""
    folder, rng, n = tmp_path_factory.mktemp("mixture"), np.random.default_rng(0), 2000
    pages = rng.choice(3, n, p=WEIGHTS).astype(np.int32)
    split = (np.arange(n) >= 1800).astype(np.uint8)
    cls = (MEANS[pages] + 0.3 * rng.normal(size=(n, 4)) + 100 * split[:, None]).astype(np.float32)
    return write_data(folder, dict(name="none"), cls=cls, pages=pages, split=split)


def trained(folder, name, *flags):
    """Prior trained through the command line on the mixture."""
    recipe = ("--width", 64, "--batch", 64, "--steps", 150, "--lr", 3e-3, "--warmup", 20, "--ema", 0.98)
    step(folder, "prior", *recipe, *flags, "--prior", folder / name)
    return twostage.load_prior(folder / name, CPU)[0]


def draw(prior, label):
    generators = [common.generator(CPU, 0, i, 0, 4) for i in range(len(label))]
    noise = partial(common.randn, generators, (len(MEANS[0]), 1, 1))
    return twostage.sample_y(prior, noise, torch.from_numpy(label), 20)


def test_prior_recovers_a_gaussian_mixture(mixture):
    y = draw(trained(mixture, "plain.pt"), np.zeros((1000, 0), np.float32))
    nearest = np.linalg.norm(y[:, None] - MEANS, axis=2).argmin(1)
    np.testing.assert_allclose(np.bincount(nearest, minlength=3) / 1000, WEIGHTS, atol=0.08)
    np.testing.assert_allclose([y[nearest == k].mean(0) for k in range(3)], MEANS, atol=0.3)
    log = [json.loads(row) for row in (mixture / "plain.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [150] and log[0]["training"] < 0.5 < log[0]["held_out"]


def test_labels_choose_and_augmented_embeddings_stay_out_of_the_samples(mixture):
    cls, parameters = common.load(mixture / "cls.npy"), np.array([[[1]], [[-1]]], np.float32)
    views = write_data(mixture / "views", dict(name="none"), cls=np.concatenate([cls + 4, cls - 4]),
                       parameters=parameters.repeat(len(cls), 1))
    asked = np.arange(300) % 3
    y = draw(trained(mixture, "labelled.pt", "--label", "page", "--views", views), np.eye(3)[asked].astype("f"))
    assert (np.linalg.norm(y[:, None, :4] - MEANS, axis=2).argmin(1) == asked).mean() > 0.97
    np.testing.assert_array_equal(y[:, 4:], np.eye(3)[asked])
    np.testing.assert_allclose([y[asked == k, :4].mean(0) for k in range(3)], MEANS, atol=0.6)


def test_batches_are_a_function_of_seed_and_step():
    rng = np.random.default_rng(0)
    cls, page = rng.normal(size=(30, 4)).astype(np.float32), np.eye(30, dtype=np.float32)
    arrays, rows = ([cls, cls + 10, cls + 20], page, rng.normal(size=(2, 30, 3)).astype(np.float32)), np.arange(20)
    y, eps, t, (label, view) = twostage.batch_of(1, 5, 400, rows, *arrays, CPU)
    assert not torch.equal(eps, twostage.batch_of(1, 6, 400, rows, *arrays, CPU)[1])
    source = label.numpy().argmax(1)
    number = np.round((y.numpy() - cls[source]).mean(1) / 10).astype(int)                # which view each row is
    np.testing.assert_allclose(y, cls[source] + 10 * number[:, None], atol=1e-5)
    plain = np.concatenate([np.zeros((1, 30, 3), np.float32), arrays[2]])
    np.testing.assert_array_equal(view, plain[number, source])
    assert 0.4 < (number == 0).mean() < 0.8 and set(number) == {0, 1, 2} and set(source) == set(range(20))
    np.testing.assert_array_equal(np.floor(t.numpy() * 400), np.arange(400))             # one in each stratum
    share = twostage.batch_of(1, 5, 400, rows, *arrays, CPU, 1, 2)                   # the second of two processes
    assert torch.equal(share[0], y[1::2]) and torch.equal(share[1], eps[1::2])


def test_clusters_are_one_hot_and_survive_standardising():
    rng = np.random.default_rng(0)
    cls = (rng.normal(size=(100, 3)) + 50 * (np.arange(100)[:, None] >= 30)).astype(np.float32)
    train = np.arange(0, 100, 2)
    one_hot = twostage.clusters(cls, train, 2)
    assert set(one_hot.ravel()) == {0, 1} and (one_hot.sum(1) == 1).all()
    assert sorted(one_hot.sum(0)) == [30, 70] and len(set(one_hot[:30].argmax(1))) == 1  # held-out rows too
    norm = common.Standardise(3)
    norm.fit(np.pad(one_hot, ((0, 0), (0, 1))), train)                                   # a column that never varies
    assert norm(torch.tensor([0., 0, 1]))[2] == 1 and norm.std[:2].min() > 0.2


def test_principal_components_against_eigenvectors():
    rng = np.random.default_rng(0)
    cls, train = (rng.normal(size=(50, 6)) * [9, 5, 3, 1, 1, 1] + 7).astype(np.float32), np.arange(40)
    found = twostage.principal_components(cls, train, 3)
    vectors = np.linalg.eigh(np.cov(cls[train].T.astype(np.float64)))[1][:, ::-1][:, :3]  # the largest first
    expected = (cls - cls[train].mean(0)) @ vectors
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-3)               # a direction has no sign


@pytest.mark.parametrize("label", [False, True])
def test_the_three_stages(tiny_data, label):
    """told, prior (two processes) and y; all rows belong to the same training images."""
    flags, end = (("--label", "page"), "_page") if label else ((), "")
    step(tiny_data, "told", "--told", "kmeans3", "pca2", *flags)
    step(tiny_data, "prior", "--steps", 2, *flags, processes=2)
    rows = dict(unconditional=0, kmeans3=3, pca2=2, oracle=6) | {"2sdm": 6}
    step(tiny_data, "y", "--rows", *rows, *flags)
    cls, split, pages = (common.load(tiny_data / f"{name}.npy") for name in ("cls", "split", "pages"))
    out = tiny_data / f"twostage{end}"
    source = (common.load(out / "oracle" / "y.npy")[:, None, :6] == cls).all(2).argmax(1)    # the image of each row
    assert len(source) == 9 and (split[source] == 0).all() and len(set(source)) == 9
    page = np.eye(4)[pages[source]] if label else np.zeros((9, 0))
    files = dict(kmeans3="kmeans3", pca2="pca2") | (dict(unconditional="none", oracle="film") if label else {})
    for row, dim in rows.items():
        y, about = common.load(out / row / "y.npy"), json.loads((out / row / "y.json").read_text())
        assert y.dtype == np.float32 and y.shape == (9, dim + page.shape[1]) and about["encoder"]["name"] == "tiny"
        np.testing.assert_array_equal(y[:, dim:], page)
        if row in files:                                                                 # what the image model saw
            np.testing.assert_array_equal(y, common.load(tiny_data / f"{files[row]}{end}.npy")[source])
        assert (about["ms_row"] > 0, about["prior"]) == ((True, f"prior{end}.pt") if row == "2sdm" else (False, None))
    wrong = ("--prior", tiny_data / f"prior{end}.pt", *(() if label else ("--label", "page")))
    assert "other labels" in run("07_twostage.py", "y", "--data", tiny_data, "--rows", "2sdm", *wrong).stderr


def test_augmented_views(tiny_data):
    done("-m examples.augment", "--data", tiny_data, "--views", 2, "--flip", "--out", tiny_data / "views")
    views, parameters = (common.load(tiny_data / f"views/{name}.npy") for name in ("views", "parameters"))
    assert views.shape == (2, 20, 16, 16, 3) and views.dtype == np.uint8 and parameters.shape == (2, 20, 7)
    assert set(parameters[..., 6].ravel()) == {0, 1} and np.abs(parameters).max() <= 1
    images, augment = np.array(common.load(tiny_data / "images.npy")), module("examples/augment.py").augment
    np.testing.assert_array_equal(augment(images, np.zeros((20, 7), np.float32)), images)
    np.testing.assert_array_equal(augment(images, np.eye(7, dtype=np.float32)[[6] * 20]), images[:, :, ::-1])
    sharper, mean = augment(images, np.eye(7, dtype=np.float32)[[4] * 20]), images.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(sharper, (mean + 1.2 * (images - mean)).clip(0, 255), atol=1)
