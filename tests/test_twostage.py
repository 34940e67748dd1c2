"""07_twostage.py: the prior on a known distribution, resuming, what each row may see, slerp, the command line."""
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import common
import system
import numpy as np
import pytest
import torch
import training

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("twostage", ROOT / "07_twostage.py")
twostage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(twostage)
ROWS = ["unconditional", "kmeans", "oracle", "2sdm", "2sdm_fewer_steps"]
CPU = torch.device("cpu")
WEIGHTS = np.array([0.5, 0.3, 0.2])
MEANS = np.array([[3, 0, 0, 10], [-3, 2, 0, 10], [0, -3, 1, 10]], np.float32)         # far from 0 and unlike scales


@pytest.fixture
def mixture(tmp_path):
    """(args, data, label [N]): a Gaussian mixture in 4 dimensions as embeddings; the last tenth, held out, lies elsewhere."""
    rng, n = np.random.default_rng(0), 2000
    label = rng.choice(3, n, p=WEIGHTS)
    cls = (MEANS[label] + 0.3 * rng.normal(size=(n, 4))).astype(np.float32)
    split = (np.arange(n) >= 1800).astype(np.uint8)
    cls[split == 1] += 100
    args = system.parse(training.training_parser("", cond=False), ["--device", "cpu", "--out", str(tmp_path), "--ema", "0.98"])
    vars(args).update(prior_width=64, prior_steps=200, prior_lr=3e-3, prior_batch=96, prior_weight_decay=0.0, warmup=20)
    return args, SimpleNamespace(cls=cls, split=split, folder=tmp_path, meta=dict(encoder="none")), label


def draw(prior, label, steps=20):
    streams = [common.generator(CPU, 0, i) for i in range(len(label))]
    with torch.inference_mode():
        return twostage.sample_y(prior, partial(common.randn, streams, (4, 1, 1)), label, steps).numpy()


def test_prior_recovers_a_gaussian_mixture(mixture):
    args, data, label = mixture
    prior, _ = twostage.train_prior(args, data, label, 0)
    y = draw(prior, torch.zeros(1000, dtype=torch.long))
    nearest = np.linalg.norm(y[:, None] - MEANS, axis=2).argmin(1)
    np.testing.assert_allclose(np.bincount(nearest, minlength=3) / 1000, WEIGHTS, atol=0.07)
    for k in range(3):
        np.testing.assert_allclose(y[nearest == k].mean(0), MEANS[k], atol=0.25)
        assert (y[nearest == k].std(0) < 0.6).all()


def test_labels_choose_and_augmented_views_stay_out_of_the_samples(mixture):
    args, data, label = mixture
    args.out = args.out / "labelled"
    np.save(data.folder / "cls_aug.npy", np.stack([data.cls + 4, data.cls - 4]))
    prior, _ = twostage.train_prior(args, data, label, 3)
    assert prior.view.num_embeddings == 3 and prior.label.num_embeddings == 3
    asked = torch.arange(300) % 3
    y = draw(prior, asked)
    assert (np.linalg.norm(y[:, None] - MEANS, axis=2).argmin(1) == asked.numpy()).mean() > 0.97
    for k in range(3):
        np.testing.assert_allclose(y[asked == k].mean(0), MEANS[k], atol=0.6)


def test_resume_equals_the_uninterrupted_run(mixture, monkeypatch, capsys):
    args, data, label = mixture
    args.prior_steps, args.prior_width, args.save_every = 7, 16, 3
    whole = twostage.train_prior(SimpleNamespace(**{**vars(args), "out": args.out / "whole"}), data, label, 3)[0]
    true_rate = training.learning_rate
    with monkeypatch.context() as patch:
        def crash(step, args):
            if step == 5:
                raise KeyboardInterrupt
            return true_rate(step, args)
        patch.setattr(training, "learning_rate", crash)
        with pytest.raises(KeyboardInterrupt):
            twostage.train_prior(args, data, label, 3)
    assert system.read_checkpoint(args.out / "prior.pt.partial")["step"] == 3 and not (args.out / "prior.pt").exists()
    resumed, _ = twostage.train_prior(args, data, label, 3)
    again, _ = twostage.train_prior(args, data, label, 3)                              # from prior.pt
    for a, b, c in zip(*(net.state_dict().values() for net in (whole, resumed, again))):
        assert torch.equal(a, b) and torch.equal(a, c)
    args.prior_lr = 1.0
    with pytest.raises(SystemExit) as stop:
        twostage.train_prior(args, data, label, 3)
    assert stop.value.code == 2 and "another lr" in capsys.readouterr().err


def test_standardisation_round_trips(mixture):
    _, data, _ = mixture
    prior = twostage.Prior(dim=4, width=16, labels=0, views=1)
    prior.norm.fit(data.cls[data.split == 0])
    y = torch.from_numpy(data.cls[:100])
    x = prior.norm(y)
    torch.testing.assert_close(prior.to_y(x[..., None, None]), y)
    torch.testing.assert_close(prior.norm(prior.to_y(x[..., None, None])), x)
    assert x.mean(0).abs().max() < 0.5 and (x.std(0) - 1).abs().max() < 0.3              # held-out rows, 100 away, did not count


@pytest.mark.parametrize("labels", [0, 5])
def test_the_prior_reads_its_label_if_there_is_one(labels):
    torch.manual_seed(0)
    prior, z, logsnr = twostage.Prior(6, 16, labels, views=1), torch.randn(3, 6, 1, 1), torch.zeros(3)
    a, b = (prior(z, logsnr, torch.full((3,), k), torch.zeros(3, dtype=torch.long)) for k in (0, 4))
    assert a.shape == z.shape and torch.equal(a, b) == (labels == 0)


def test_slerp_end_points_and_norm():
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    b *= a.norm() / b.norm()
    points = twostage.slerp(a, b, torch.linspace(0, 1, 9, dtype=torch.float64))
    assert points.shape == (9, 3, 40, 40)
    torch.testing.assert_close(points[0], a)
    torch.testing.assert_close(points[-1], b)
    torch.testing.assert_close(points.flatten(1).norm(dim=1), a.norm().expand(9))
    steps = points.diff(dim=0).flatten(1).norm(dim=1)
    torch.testing.assert_close(steps, steps[:1].expand(8))                               # equal steps along the arc


def test_conditions_and_clusters_come_from_training_images_only():
    rng = np.random.default_rng(0)
    split, cls = (np.arange(90) % 3 == 1).astype(np.uint8), rng.normal(size=(90, 5)).astype(np.float32)
    for n in (40, 200):                                                                  # fewer and more than there are
        drawn = twostage.draw_conditions(split, n, seed=0)
        assert len(drawn) == n and (split[drawn] == 0).all() and (n > 60 or len(np.unique(drawn)) == n)
    moved = cls + 100 * split[:, None].astype(np.float32)
    a, b = (twostage.clusters(x, split, 4) for x in (cls, moved))
    assert a.dtype == np.float32 and a.shape == cls.shape and len(np.unique(a[split == 0], axis=0)) == 4
    np.testing.assert_array_equal(a[split == 0], b[split == 0])


def test_fewer_steps_are_less_arithmetic_than_the_baseline():
    x, y, label = torch.zeros(1, 3, 8, 8), torch.zeros(1, 6), torch.zeros(1, dtype=torch.long)
    image, baseline = (common.UViT(8, 1, [32, 64], [2, 2], cond, 6) for cond in ("film", "none"))
    for width in (16, 32):
        prior = twostage.Prior(6, width, 0, 1)
        of_prior = twostage.gflops(prior, y[..., None, None], torch.zeros(1), label, label)
        blocks = 6 * (4 * width * width * 3 + 8 * width * width * 3 + 2 * 3 * 3 * width)   # projections, MLP, attention
        ends = 64 * width + width * width + 6 * width + width * 6                        # noise level, y in, x_hat out
        assert of_prior * 1e9 == pytest.approx(2 * (blocks + ends), rel=0.05)                # a CPU's attention is not counted
        steps = twostage.fewer_steps(prior, image, baseline, x, y, y, 25)
        of_image, budget = twostage.gflops(image, x, torch.zeros(1), y), 0.9 * 25 * twostage.gflops(baseline, x, torch.zeros(1))
        assert 1 <= steps < 25
        assert 25 * of_prior + steps * of_image <= budget < 25 * of_prior + (steps + 1) * of_image
    assert twostage.fewer_steps(twostage.Prior(6, 512, 0, 1), image, baseline, x, y, y, 25) == 1          # too dear a prior


def test_what_the_image_models_are_told():
    rng = np.random.default_rng(0)
    split = (np.arange(50) % 5 == 4).astype(np.uint8)
    cls = (rng.normal(size=(50, 6)) * [9, 5, 1, 1, 1, 1] + 7).astype(np.float32)
    assert twostage.told(cls, split, "none").shape == (50, 0) and twostage.told(cls, split, "film") is cls
    full = twostage.told(cls, split, "pca6")
    distances = [np.linalg.norm(points[:, None] - points, axis=2) for points in (full, cls)]
    np.testing.assert_allclose(*distances, atol=1e-3)                                    # a rotation and a shift
    variances = np.linalg.eigvalsh(np.cov(cls[split == 0].T))[::-1]
    np.testing.assert_allclose(full[split == 0].var(0, ddof=1), variances, rtol=1e-3)    # the largest first
    np.testing.assert_allclose(twostage.told(cls, split, "pca2"), full[:, :2], atol=1e-4)
    moved = cls + 100 * split[:, None]
    np.testing.assert_allclose(twostage.told(moved, split, "pca2")[split == 0], full[split == 0, :2], atol=1e-4)


def test_a_sample_is_the_same_in_any_batch_and_has_its_own_condition(tmp_path):
    torch.manual_seed(0)
    network = dict(size=8, patch=1, channels=[16, 32], blocks=[1, 1], cond="film", cls_dim=6)
    model = common.UViT(**network).eval()
    torch.nn.init.normal_(model.conv_out.weight)                                         # it starts at zero
    image = model, dict(network=network, noise_size=8, time_power=1, steps=1, name="film")
    prior = twostage.Prior(4, 16, 0, 1).eval()
    given, made = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32), []
    for batch in (2, 5):
        args = SimpleNamespace(seed=0, size=8, device="cpu", batch_images=batch, sample_steps=2, amp="none")
        row = tmp_path / str(batch)
        about = twostage.sample_row(args, row, image, given, 2, (prior, {}), np.zeros(5, np.int64))
        assert about["ms_image"] > 0 and 0 < about["prior_share"] < 1 and about["n"] == 5
        made.append([np.load(row / f"{name}.npy", allow_pickle=False) for name in ("samples", "y")])
    (x2, y2), (x5, y5) = made
    assert np.abs(x2.astype(int) - x5).max() <= 1 and len(np.unique(x5.reshape(5, -1), axis=0)) == 5
    np.testing.assert_allclose(y2, y5, atol=1e-4)
    np.testing.assert_array_equal(y5[:, 4:], given)                                      # y of the prior, then what was given
    args.seed = 1
    with pytest.raises(SystemExit):
        twostage.sample_row(args, row, image, given, 2, (prior, {}), np.zeros(5, np.int64))


FLAGS = ["--device", "cpu", "--steps", "2", "--batch", "2", "--sample-steps", "2", "--samples", "9", "--batch-images", "4",
         "--clusters", "3", "--prior-steps", "2", "--prior-batch", "4", "--prior-width", "16"]


def test_command_line(tiny_data, monkeypatch):
    """The whole stage: every row, the oracle's y, nothing made twice, the pictures."""
    env, out = {**os.environ, "OMP_NUM_THREADS": "1"}, tiny_data / "twostage"
    command = [sys.executable, ROOT / "07_twostage.py", "--data", tiny_data, *FLAGS]
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    data = system.Data(tiny_data)
    for row in ROWS:
        samples = system.read_array(out / row / "samples.npy", np.uint8, 5, 9)
        assert samples.shape == (9, 1, 16, 16, 3) and not (out / row / "conditions.npy").exists()
        about = json.loads((out / row / "samples.json").read_text())
        assert about["model"] == row and about["seed"] == 0 and about["ms_image"] > 0 and 0 <= about["prior_share"] < 1
        assert (about["prior_share"] > 0.01) == row.startswith("2sdm") and about["sample_steps"] <= 2
        y = np.load(out / row / "y.npy", allow_pickle=False)
        assert y.shape == (9, 0 if row == "unconditional" else 6)
        if row == "oracle":
            source = (y[:, None] == data.cls).all(2)                                     # [9, N]
            assert source[:, data.split == 0].sum() == 9 and source[:, data.split == 1].sum() == 0
    own = np.repeat(np.flatnonzero(data.split == 0), 2)                # (i, i) for every training image, and no other
    assert system.read_checkpoint(out / "film_2.pt")["config"]["pairs"] == zlib.crc32(own)
    assert {path.name for path in out.glob("*.pt")} == {"none_2.pt", "film_2.pt", "kmeans3_2.pt", "prior.pt"}
    assert not list(out.rglob("*.tmp")) and not list(out.glob("*.partial"))

    before = {path: path.stat().st_mtime_ns for path in (*out.rglob("samples.*"), *out.glob("*.pt"))}
    (out / "interpolation.png").unlink()
    monkeypatch.setattr(sys, "argv", [*map(str, command[1:])])
    twostage.main()
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()) and (out / "interpolation.png").exists()

    again = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29521", *command[1:]]
    one = {row: [np.load(out / row / f"{name}.npy", allow_pickle=False) for name in ("samples", "y")] for row in ROWS}
    for row in ROWS:
        shutil.rmtree(out / row)
    subprocess.run(again, cwd=ROOT, env=env, check=True)                                 # two processes share a row's batches
    for row, arrays in one.items():
        assert all(np.array_equal(a, np.load(out / row / f"{name}.npy", allow_pickle=False))
                   for a, name in zip(arrays, ("samples", "y")))

    for row in ROWS:                                                                     # as 01 --cls-only writes them
        np.save(out / row / "cls.npy", np.random.default_rng(1).normal(size=(9, 6)).astype(np.float32))
    for split in (data.split, np.zeros_like(data.split)):                                # also a folder that holds nothing out
        data.split = split
        twostage.figures(SimpleNamespace(out=out), data)
        assert all((out / name).stat().st_size > 1000 for name in ("rows.png", "neighbours.png", "distances.png"))
        (out / "neighbours.png").unlink()


def test_fsdp_trains_and_draws(tiny_data):
    """Two processes that share the weights out too: the prior comes back whole to draw from."""
    script = tiny_data / "small.py"
    script.write_text("import common, runpy, sys\ncommon.PRESETS['digits16'] |= dict(channels=(16, 32), blocks=(1, 1))\n"
                      "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, ROOT / "07_twostage.py",
               "--data", tiny_data, *FLAGS, "--fsdp"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=env, check=True)
    assert {path.parent.name for path in (tiny_data / "twostage").glob("*/samples.json")} == set(ROWS)
    assert not list((tiny_data / "twostage").glob("*.sharded"))


def test_command_line_with_labels(tiny_data, monkeypatch, capsys):
    monkeypatch.setitem(common.PRESETS, "digits16", dict(common.PRESETS["digits16"], channels=(16, 32), blocks=(1, 1)))
    monkeypatch.setattr(sys, "argv", ["07", "--data", str(tiny_data), *FLAGS, "--label", "page"])
    twostage.main()
    data, out = system.Data(tiny_data), tiny_data / "twostage_page"
    drawn = twostage.draw_conditions(data.split, 9, 0)
    for row, d in zip(ROWS, (0, 6, 6, 6, 6)):
        y = np.load(out / row / "y.npy", allow_pickle=False)
        np.testing.assert_array_equal(y[:, d:], np.eye(4, dtype=np.float32)[data.pages[drawn]])              # the page, one-hot
    assert system.read_checkpoint(out / "prior.pt")["config"]["network"]["labels"] == 4
    assert system.read_checkpoint(out / "none_2.pt")["config"]["network"]["cond"] == "film"



def test_sweep_shares_models_with_the_table_and_is_plotted(tiny_data, monkeypatch):
    monkeypatch.setitem(common.PRESETS, "digits16", dict(common.PRESETS["digits16"], channels=(16, 32), blocks=(1, 1)))
    monkeypatch.setattr(twostage, "SWEEP", ("pca1", "pca4", "film", "kmeans4", "none"))
    command, out = ["07", "--data", str(tiny_data), *FLAGS], tiny_data / "twostage"
    monkeypatch.setattr(sys, "argv", command)
    twostage.main()
    film = (out / "film_2.pt").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", [*command, "sweep", "--sweep-steps", "1", "2"])
    twostage.main()
    assert (out / "film_2.pt").stat().st_mtime_ns == film                                # trained once
    rows = [f"{name}_{steps}" for name in twostage.SWEEP for steps in (1, 2)]
    assert {path.name for path in (out / "sweep").iterdir()} == set(rows)
    assert np.load(out / "sweep" / "pca4_1" / "y.npy", allow_pickle=False).shape == (9, 4)
    np.testing.assert_array_equal(*(np.load(out / row / "samples.npy", allow_pickle=False) for row in ("oracle", "sweep/film_2")))
    metrics = [dict(model=row, reference="unseen", trained=int(row[-1]), fid=float(i)) for i, row in enumerate(rows)]
    metrics.append(dict(model="real (train)", reference="unseen", fid=1.0))
    (out / "sweep" / "metrics.json").write_text(json.dumps(metrics))
    for row in ROWS:
        np.save(out / row / "cls.npy", np.random.default_rng(1).normal(size=(9, 6)).astype(np.float32))
    monkeypatch.setattr(sys, "argv", [*command, "figures"])
    twostage.main()
    assert (out / "sweep.png").stat().st_size > 1000


@pytest.mark.parametrize("flags", ["--prior-width 200", "--prior-lr -1", "--prior-weight-decay -1", "--lr 0", "--prior-batch 0"])
def test_numbers_out_of_range_are_one_line_before_any_training(tiny_data, monkeypatch, capsys, flags):
    monkeypatch.setattr(sys, "argv", ["07_twostage.py", "--data", str(tiny_data), *FLAGS, *flags.split()])
    with pytest.raises(SystemExit) as stop:
        twostage.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and flags.split()[0] in error and error.count("\n") == 1
    assert not (tiny_data / "twostage").exists()
