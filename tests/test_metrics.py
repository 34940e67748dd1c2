"""06_fewshot_metrics.py: FID, KID, precision and recall against independent formulas, the references, the command line."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import system
import numpy as np
import pytest
import scipy.linalg
import torch

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("fewshot_metrics", ROOT / "06_fewshot_metrics.py")
metrics = importlib.util.module_from_spec(spec)
spec.loader.exec_module(metrics)


def features(rng, n, d, scale=1.0, shift=0.0):
    """Correlated, skewed and not centred, as an encoder's features are: [n, d] float32."""
    mix = np.random.default_rng(d).normal(size=(8, d)) * np.linspace(3, 0.3, 8)[:, None]
    return np.maximum(rng.normal(size=(n, 8)) @ mix * scale + 0.3 * rng.normal(size=(n, d)) + 1 + shift, 0).astype(np.float32)


def fid(x, y):
    return metrics.frechet_distance(*(metrics.moments(torch.as_tensor(a)) for a in (x, y)))


def kid(x, y):
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    return metrics.kernel_mean(x) + metrics.kernel_mean(y) - 2 * metrics.kernel_mean(x, y)


def precision_recall(real, fake):
    real, fake = torch.as_tensor(real), torch.as_tensor(fake)
    return metrics.precision_recall(real, fake, metrics.squared_reach(real), metrics.squared_reach(fake))


def gaussian(rng, n, mean, variances, axes):
    """n samples whose mean and covariance axes diag(variances) axes^T are exact, of rank min(n - 1, d). Float64."""
    z = rng.normal(size=(n, np.count_nonzero(variances)))
    z = np.linalg.qr(z - z.mean(0))[0] * np.sqrt(n - 1)                         # mean 0, covariance 1
    return z * np.sqrt(variances[variances > 0]) @ axes[:, variances > 0].T + mean


@pytest.mark.parametrize("n, m, d", [(30, 45, 60), (60, 61, 60), (400, 300, 20), (15, 500, 40)])
def test_fid_is_the_eigenvalue_form(n, m, d):
    rng = np.random.default_rng(0)
    x, y = features(rng, n, d), features(rng, m, d, 1.3, 0.2)
    mean_x, mean_y, cov_x, cov_y = x.mean(0, float), y.mean(0, float), np.cov(x.T.astype(float)), np.cov(y.T.astype(float))
    roots = np.sqrt(scipy.linalg.eigvals(cov_x @ cov_y).astype(complex)).real.sum()
    expected = ((mean_x - mean_y) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * roots
    assert fid(x, y) == pytest.approx(expected, rel=1e-5)
    assert fid(y, x) == pytest.approx(fid(x, y), rel=1e-9)


@pytest.mark.parametrize("n, m, d", [(12, 20, 40), (50, 50, 40), (400, 300, 40), (41, 1000, 40)])
def test_fid_of_gaussians_with_common_axes_is_the_closed_form(n, m, d):
    rng = np.random.default_rng(1)
    axes, shift = np.linalg.qr(rng.normal(size=(d, d)))[0], rng.normal(size=d)
    var_x, var_y = rng.uniform(0.1, 4, d), rng.uniform(0.1, 4, d)
    var_x[n - 1:], var_y[:max(0, d - m + 1)] = 0, 0                              # as many as n - 1 and m - 1 points can span
    x, y = gaussian(rng, n, 0, var_x, axes), gaussian(rng, m, shift, var_y, axes)
    expected = (shift ** 2).sum() + ((np.sqrt(var_x) - np.sqrt(var_y)) ** 2).sum()
    assert fid(x, y) == pytest.approx(expected, rel=1e-9)


def test_fid_of_a_set_with_itself_or_shifted():
    x = features(np.random.default_rng(2), 70, 50).astype(float)
    assert abs(fid(x, x)) < 1e-9 * x.var(0).sum()
    assert fid(x, x[::-1].copy() + 2.0) == pytest.approx(4 * 50, rel=1e-9)


def test_moments_shorten_the_data_and_keep_the_covariance():
    x = features(np.random.default_rng(3), 333, 24)
    mean, root = metrics.moments(torch.as_tensor(x))
    assert root.shape == (24, 24) and root.dtype == torch.float64
    np.testing.assert_allclose(mean, x.mean(0, float), rtol=1e-12)
    np.testing.assert_allclose(root.T @ root, np.cov(x.T.astype(float)), atol=1e-12 * 333)


def test_kid_is_the_double_loop():
    rng = np.random.default_rng(4)
    x, y = features(rng, 23, 10), features(rng, 31, 10, 1.2, 0.3)
    k = lambda a, b: (float(a.astype(float) @ b) / 10 + 1) ** 3  # noqa: E731
    expected = (sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (23 * 22)
                + sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (31 * 30)
                - 2 * sum(k(a, b) for a in x for b in y) / (23 * 31))
    assert kid(x, y) == pytest.approx(expected, rel=1e-5)
    assert kid(x.astype(float), y.astype(float)) == pytest.approx(expected, rel=1e-12)


def test_kid_is_unbiased():
    """Two halves of one distribution: zero on average, and below zero about as often as above."""
    rng = np.random.default_rng(5)
    values = np.array([kid(*features(rng, 80, 6, 0.3).reshape(2, 40, 6)) for _ in range(300)])
    assert abs(values.mean()) < 4 * values.std() / np.sqrt(300)


def brute_precision_recall(real, fake, k):
    """Kynkaanniemi et al. 2019, equations 1 and 2, from full distance matrices of differences in float64."""
    distance = lambda a, b: np.linalg.norm(a[:, None].astype(float) - b[None], axis=2)  # noqa: E731
    within = lambda a, b: (distance(a, b) <= np.sort(distance(b, b), 1)[:, k]).any(1).mean()  # noqa: E731
    return within(fake, real), within(real, fake)


@pytest.mark.parametrize("n, m, d", [(60, 90, 5), (150, 40, 30), (4, 4, 3)])
def test_precision_recall_are_the_brute_force_ones(n, m, d):
    rng = np.random.default_rng(n)
    fake, real = features(rng, n, d), features(rng, m, d, 1.1, 0.1)
    found = precision_recall(real, fake)
    assert found == brute_precision_recall(real, fake, metrics.NEIGHBOURS)
    assert n == 4 or (0 < found[0] < 1 and 0 < found[1] < 1)


def test_a_cluster_in_a_cloud_is_precise_and_recalls_little():
    rng = np.random.default_rng(6)
    cloud, cluster = rng.normal(size=(400, 4)).astype(np.float32), 0.01 * rng.normal(size=(100, 4)).astype(np.float32)
    precision, recall = precision_recall(real=cloud, fake=cluster)
    assert precision == 1 and recall < 0.05
    precision, recall = precision_recall(real=cluster, fake=cloud)
    assert precision < 0.05 and recall == 1
    assert precision_recall(cloud, cloud) == (1, 1)
    assert precision_recall(cloud, cloud + 100) == (0, 0)


def test_on_the_edge_is_within():
    """Reach of the outer two of 0, 1, 2, 3 is 3 (k = 3): -3 and 6 lie on their edges, -4 and 7 beyond."""
    real, on_edge = torch.arange(4.0)[:, None], torch.tensor([[-3.0], [6], [-4], [7]])
    assert precision_recall(real, on_edge)[0] == 0.5


def test_far_from_the_origin_float32_is_enough():
    rng = np.random.default_rng(7)
    fake, real = rng.normal(size=(80, 6)) + 300, rng.normal(size=(120, 6)) * 1.2 + 300
    assert precision_recall(real.astype(np.float32), fake.astype(np.float32)) == precision_recall(real, fake)


def test_the_size_of_a_chunk_changes_nothing(monkeypatch):
    rng = np.random.default_rng(8)
    x, y = features(rng, 53, 12).astype(float), features(rng, 64, 12, 1.2).astype(float)
    whole = metrics.compare(metrics.statistics(y), metrics.statistics(x))
    assert list(whole)[:3] == ["n", "m", "d"] and [whole[key] for key in "nmd"] == [53, 64, 12]
    for chunk in (1, 7, 32, 53):
        monkeypatch.setattr(metrics, "CHUNK", chunk)
        parts = metrics.compare(metrics.statistics(y), metrics.statistics(x))
        assert parts == pytest.approx(whole, rel=1e-9)
        assert (parts["precision"], parts["recall"]) == (whole["precision"], whole["recall"])


def test_processes_share_the_chunks(monkeypatch):
    """The second of three processes computes chunks 1 and 4 of five, and has all five in order."""
    x, computed = torch.arange(46.0)[:, None], []
    chunks = x.split(10)

    def gather(shares, own):
        torch.testing.assert_close(own, [chunks[1], chunks[4]])
        shares[:] = [[chunks[0], chunks[3]], own, [chunks[2]]]

    for name, value in dict(is_initialized=True, get_rank=1, get_world_size=3).items():
        monkeypatch.setattr(metrics.dist, name, lambda value=value: value)
    monkeypatch.setattr(metrics.dist, "all_gather_object", gather)
    parts = metrics.over_chunks(lambda rows: computed.append(rows) or x[rows], x, 10)
    assert computed == [slice(10, 20), slice(40, 50)]
    torch.testing.assert_close(parts, list(chunks))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_same():
    rng = np.random.default_rng(11)
    x, y = features(rng, 1300, 40).astype(float), features(rng, 1500, 40, 1.2, 0.1).astype(float)
    cpu, gpu = (metrics.compare(metrics.statistics(y, device), metrics.statistics(x, device)) for device in ("cpu", "cuda"))
    assert gpu == pytest.approx(cpu, rel=1e-9)
    assert (gpu["precision"], gpu["recall"]) == (cpu["precision"], cpu["recall"])


def test_copy_score_is_of_the_own_condition():
    rng = np.random.default_rng(9)
    cls = rng.normal(size=(10, 6)).astype(np.float32)
    assert metrics.copy_score(cls, torch.tensor(cls[[7, 7, 7, 2, 2, 2]] * 2), np.array([7, 2])) == pytest.approx(1, abs=1e-6)
    own = rng.normal(size=(6, 6)).astype(np.float32)
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(own, cls[[7, 7, 7, 2, 2, 2]])]
    assert metrics.copy_score(cls, torch.tensor(own), np.array([7, 2])) == pytest.approx(np.mean(cosines), abs=1e-6)


def test_page_similarity_is_of_two_different_images_of_a_page():
    rng = np.random.default_rng(6)
    cls, pages = features(rng, 9, 5).astype(np.float32), np.array([0, 0, 1, 1, 0, 1, 2, 2, 3])
    conditions, others = np.array([0, 2, 3, 8]), np.array([1, 2, 4, 5, 6])
    cosine = lambda i, j: cls[i] @ cls[j] / np.linalg.norm(cls[i]) / np.linalg.norm(cls[j])  # noqa: E731
    cosines = [[cosine(i, j) for j in others if i != j and pages[i] == pages[j]] for i in conditions]
    assert list(map(len, cosines)) == [2, 1, 2, 0]                     # every condition counts alike
    assert metrics.page_similarity(cls, pages, conditions, others) == pytest.approx(np.mean([np.mean(c) for c in cosines[:3]]))
    assert metrics.page_similarity(cls, pages, np.array([8]), others) is None


def fake_data(pages, split, names=None):
    names = np.array(names or ["x"] * len(pages))
    return SimpleNamespace(folder="here", pages=np.array(pages), split=np.array(split), names=names)


def test_references():
    #                0  1  2  3  4  5  6  7  8  9
    names = ["stranger: x"] + 8 * ["x"] + ["near-duplicate: x"]
    data = fake_data([0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 1, 1, 0, 1, 1, 0, 0, 0], names)
    sets, train = metrics.references(data, np.array([2, 5]))
    assert {name: indices.tolist() for name, indices in sets.items()} == dict(unseen=[3, 6], seen=[1, 4])
    assert train.tolist() == [1, 4]
    data = fake_data([0, 0, 1, 1, 2, 2], [1, 1, 1, 1, 0, 0])                     # training images on pages of their own
    sets, train = metrics.references(data, np.array([0, 2]))
    assert sets["unseen"].tolist() == [1, 3] and not len(sets["seen"]) and train.tolist() == [4, 5]
    sets, train = metrics.references(fake_data([0, 0, 0, 1], [0, 0, 0, 0]), np.array([1]))
    assert sets["all"].tolist() == [0, 2, 3] and not len(train)


def write_folder(folder, per_page, k):
    """Eight pages of images, a third of each held out; three sample folders, k of each condition."""
    rng, n, d = np.random.default_rng(10), 8 * per_page, 12
    pages, first = np.repeat(np.arange(8), per_page), per_page * 2 // 3
    cls, split = features(rng, n, d) + rng.normal(size=(8, d))[pages], (np.arange(n) % per_page >= first)
    arrays = dict(cls=cls.astype(np.float32), pages=pages.astype(np.int32), split=split.astype(np.uint8),
                  names=np.array([f"image {i}" for i in range(n)]))
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    encoder = dict(name="test", px=8, size=2, dim=d, tokens=[1, 2])
    (folder / "data.json").write_text(json.dumps(dict(preset="digits16", images=n, encoder=encoder)))
    conditions = np.arange(first, n, per_page)                                   # the first held-out image of each page
    for name, model, guidance, spread in (("a", "recon", 1.0, 0.1), ("b", "pairs", 2.0, 0.5), ("c", "pairs", 0.0, 1.0)):
        made = folder / "samples" / name
        made.mkdir(parents=True)
        np.save(made / "conditions.npy", conditions)
        np.save(made / "cls.npy", (np.repeat(cls[conditions], k, 0) + spread * rng.normal(size=(8 * k, d))).astype(np.float32))
        (made / "data.json").write_text(json.dumps(dict(preset="digits16", encoder=dict(encoder, tokens=None))))
        how = dict(model=model, checkpoint="x.pt", step=5, guidance=guidance, protocol="fewshot", sample_steps=9, seed=0)
        (made / "samples.json").write_text(json.dumps(how))


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path, per_page=9, k=5)
    return tmp_path


def test_command_line(folder):
    done = subprocess.run([sys.executable, ROOT / "06_fewshot_metrics.py", "--data", folder, "--out", folder / "scores"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "scores" / "metrics.json").read_text())
    assert (folder / "scores" / "metrics.png").read_bytes()[1:4] == b"PNG" and not list(folder.rglob("*.tmp"))
    assert [(r["reference"], r["model"], r["guidance"]) for r in rows] == [
        ("unseen", "real (train)", None), ("unseen", "pairs", 0), ("unseen", "pairs", 2), ("unseen", "recon", 1),
        ("seen", "pairs", 0), ("seen", "pairs", 2), ("seen", "recon", 1)]
    assert {(r["n"], r["m"], r["d"], r["encoder"]) for r in rows if r["reference"] == "unseen"} == {(40, 16, 12, "test, 8 px")}
    assert {r["m"] for r in rows if r["reference"] == "seen"} == {48}
    cls, split = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("cls", "split"))
    samples = np.load(folder / "samples" / "b" / "cls.npy", allow_pickle=False)
    unseen = np.delete(cls, np.arange(6, 72, 9), 0)[np.delete(split, np.arange(6, 72, 9)) == 1]
    assert rows[2]["fid"] == pytest.approx(fid(samples, unseen)) and rows[2]["kid"] == pytest.approx(kid(samples, unseen))
    assert (rows[2]["precision"], rows[2]["recall"]) == brute_precision_recall(unseen, samples, 3)
    assert rows[3]["copy"] > rows[2]["copy"] > rows[1]["copy"] > rows[0]["copy"]           # real: two images of a page
    table = [line.split() for line in done.stdout.splitlines()]
    assert table[0] == "reference model guidance repeats n m fid kid precision recall copy".split()
    assert table[3][:6] == "unseen pairs 2 1 40 16".split()
    w = min((0, 2), key=lambda w: next(r["fid"] for r in rows if (r["model"], r["guidance"]) == ("pairs", w)))
    assert f"best fid: pairs at w = {w}, " in done.stdout


def test_repetitions_are_summed_up():
    """Mean and s.d. with n - 1 of what differs only in seed or draw; a number that a row lacks stays the first's."""
    made = dict(reference="unseen", model="pairs", guidance=1.0, sample_steps=9, n=40, m=16, copy=None)
    rows = [dict(made, seed=seed, draw=draw, fid=fid, kid=0.5, precision=0.1, recall=0.2)
            for seed, draw, fid in ((0, 0, 10.0), (1, 0, 14.0), (0, 1, 12.0))]
    (mean, spread), (other, alone) = metrics.repetitions([*rows, dict(made, guidance=2.0, seed=0, fid=11.0, kid=0.1)])
    assert (mean["fid"], spread["fid"], mean["repeats"], mean["n"], mean["copy"]) == (12, 2, 3, 40, None)
    assert (other["fid"], alone["fid"], other["repeats"], other["guidance"]) == (11, None, 1, 2)
    assert "37" in metrics.table([rows[0], dict(rows[1], n=34)], "")[1].split()      # other pages have no second image
    lines = metrics.table([*rows, dict(made, guidance=2.0, seed=0, fid=11.0, kid=0.1)], "caption")
    assert "12.00 +- 2.00" in lines[1] and lines[-2:] == ["best fid: pairs at w = 2", "caption"]


def test_protocols(folder, monkeypatch, capsys):
    """Fewer references on request; in the full set the conditions are references; samples of another protocol are refused."""
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["06_fewshot_metrics.py", "--data", str(folder), "--device", "cpu", *flags])
        metrics.main()

    run("--references", "10")
    assert {row["m"] for row in json.loads((folder / "metrics.json").read_text())} == {10}
    with pytest.raises(SystemExit) as stop:
        run("--protocol", "fullset", "--samples", str(folder / "samples" / "a"))
    assert stop.value.code == 2 and "fewshot" in capsys.readouterr().err
    (folder / "samples").rename(folder / "fullset")
    for how in folder.glob("fullset/*/samples.json"):
        how.write_text(how.read_text().replace("fewshot", "fullset"))
    run("--protocol", "fullset")
    rows = json.loads((folder / "fullset" / "metrics.json").read_text())
    assert [(r["reference"], r["m"]) for r in rows] == 4 * [("held out", 24)]
    data = system.Data(folder)
    held_out, samples = data.cls[data.split == 1], np.load(folder / "fullset" / "a" / "cls.npy", allow_pickle=False)
    assert rows[-1]["model"] == "recon" and rows[-1]["fid"] == pytest.approx(fid(samples, held_out))


def test_a_folder_that_holds_nothing_out_says_so(folder, monkeypatch, capsys):
    np.save(folder / "split.npy", np.zeros(72, np.uint8))
    monkeypatch.setattr(sys, "argv", ["06_fewshot_metrics.py", "--data", str(folder), "--device", "cpu"])
    metrics.main()
    assert "holds nothing out" in capsys.readouterr().out
    rows = json.loads((folder / "metrics.json").read_text())
    assert [(row["reference"], row["model"], row["m"]) for row in rows] == [
        ("all", "pairs", 64), ("all", "pairs", 64), ("all", "recon", 64)]


def test_two_processes_write_what_one_does(tmp_path, monkeypatch, capfd):
    """1,192 and 2,400 real images, 1,200 samples: two and three chunks of distances, more of the covariance. Bit for bit."""
    write_folder(tmp_path, per_page=450, k=150)
    command = [ROOT / "06_fewshot_metrics.py", "--data", tmp_path, "--device", "cpu", "--out"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, *command, tmp_path / "two"], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=120)
    two, threads = capfd.readouterr().out, torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [*map(str, command), str(tmp_path / "one")])
    torch.set_num_threads(1)
    metrics.main()
    torch.set_num_threads(threads)
    assert two.replace(f"{tmp_path}/two", f"{tmp_path}/one") == capfd.readouterr().out                 # once, not by each process
    assert sorted(file.name for file in (tmp_path / "two").iterdir()) == ["metrics.json", "metrics.png", "metrics.txt"]
    for name in ("metrics.json", "metrics.txt"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    rows = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert [(row["n"], row["m"]) for row in rows] == 4 * [(1200, 1192)] + 3 * [(1200, 2400)]
    assert len({row["precision"] for row in rows}) > 3 and len({row["recall"] for row in rows}) > 3


@pytest.mark.parametrize("flaw, words", [
    ("encoder", "embedded by"), ("no encoder", "names no encoder"), ("rows", "do not fit"), ("nan", "finite"),
    ("nan in the reference", "finite"), ("negative", "do not fit"), ("empty", "no folder")])
def test_errors_are_one_line(folder, monkeypatch, capsys, flaw, words):
    made = folder / "samples" / "b"
    samples = np.load(made / "cls.npy", allow_pickle=False)
    if flaw == "encoder":
        (made / "data.json").write_text((made / "data.json").read_text().replace('"px": 8', '"px": 16'))
    elif flaw == "no encoder":
        (made / "data.json").write_text("{}")
    elif flaw == "nan in the reference":
        cls = np.load(folder / "cls.npy", allow_pickle=False)
        np.save(folder / "cls.npy", np.where(cls == cls[np.load(folder / "split.npy", allow_pickle=False) == 1][-1], np.nan, cls))
    elif flaw == "negative":
        np.save(made / "conditions.npy", -1 - np.load(made / "conditions.npy", allow_pickle=False))
    elif flaw == "empty":
        (folder / "samples").rename(folder / "elsewhere")
    else:
        np.save(made / "cls.npy", samples[:-1] if flaw == "rows" else np.where(samples == samples.max(), np.nan, samples))
    monkeypatch.setattr(sys, "argv", ["06_fewshot_metrics.py", "--data", str(folder)])
    with pytest.raises(SystemExit) as stop:
        metrics.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert not (folder / "metrics.json").exists()
