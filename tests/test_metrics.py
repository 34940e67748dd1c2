"""06_fewshot_metrics.py: FID, KID, precision, recall against independent formulas, the references, the command line."""
import json
import re

import numpy as np
import pytest
import torch

from conftest import done, module, write_data

metrics = module("06_fewshot_metrics.py")
SCRIPT = "06_fewshot_metrics.py"


def features(rng, n, d, scale=1.0, shift=0.0):
    """Correlated, skewed and not centred, as an encoder's features are: [n, d] float32."""
    mix = np.random.default_rng(d).normal(size=(8, d)) * np.linspace(3, 0.3, 8)[:, None]
    x = rng.normal(size=(n, 8)) @ mix * scale + 0.3 * rng.normal(size=(n, d))
    return np.maximum(x + 1 + shift, 0).astype(np.float32)


def compare(fake, real):
    return metrics.compare(metrics.statistics(real), metrics.statistics(fake))


def distances(a, b):
    return np.linalg.norm(a[:, None].astype(float) - b[None], axis=2)


def brute_precision_recall(fake, real, k=3):
    """Kynkaanniemi et al. 2019, equations 1 and 2, from full distance matrices of differences."""
    def within(a, b):
        return (distances(a, b) <= np.sort(distances(b, b), 1)[:, k]).any(1).mean()
    return within(fake, real), within(real, fake)


def brute_fid(x, y):
    """The formula as it is written, with tr (S_x S_y)^1/2 = tr (R S_y R)^1/2 for R = S_x^1/2."""
    def root(s):
        values, vectors = np.linalg.eigh(s)
        return vectors * values.clip(0) ** 0.5 @ vectors.T
    s_x, s_y = np.cov(x.T), np.cov(y.T)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s_x + s_y - 2 * root(root(s_x) @ s_y @ root(s_x)))


@pytest.mark.parametrize("n, m, d", [(60, 61, 30), (400, 300, 20), (12, 20, 40), (50, 50, 40), (41, 1000, 40)])
def test_fid_is_that_of_the_covariances(n, m, d):
    """Also where n < d."""
    rng = np.random.default_rng(0)
    x, y = features(rng, n, d).astype(float), features(rng, m, d, 1.3, 0.2).astype(float)
    assert compare(x, y)["fid"] == pytest.approx(brute_fid(x, y), rel=1e-6)
    assert compare(y, x)["fid"] == pytest.approx(compare(x, y)["fid"], rel=1e-9)


def test_a_set_with_itself_and_shifted():
    x = features(np.random.default_rng(2), 70, 50).astype(float)
    itself = compare(x, x)
    assert abs(itself["fid"]) < 1e-9 * x.var(0).sum() and itself["precision"] == itself["recall"] == 1
    assert compare(x[::-1] + 2.0, x)["fid"] == pytest.approx(4 * 50, rel=1e-9)


def test_kid_is_the_double_loop():
    rng = np.random.default_rng(4)
    x, y = features(rng, 23, 10), features(rng, 31, 10, 1.2, 0.3)

    def mean_kernel(a, b, same=False):
        return np.mean([(float(v.astype(float) @ w) / 10 + 1) ** 3
                        for i, v in enumerate(a) for j, w in enumerate(b) if not (same and i == j)])

    expected = mean_kernel(x, x, True) + mean_kernel(y, y, True) - 2 * mean_kernel(x, y)
    assert compare(x, y)["kid"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("n, m, d", [(60, 90, 5), (150, 40, 30), (4, 4, 3)])
def test_precision_and_recall_are_brute_force(n, m, d):
    rng = np.random.default_rng(n)
    fake, real = features(rng, n, d), features(rng, m, d, 1.1, 0.1)
    found = compare(fake, real)
    assert (found["precision"], found["recall"]) == brute_precision_recall(fake, real)
    assert n == 4 or (0 < found["precision"] < 1 and 0 < found["recall"] < 1)


@pytest.mark.parametrize("n, m, d", [(300, 360, 40), (50, 70, 120)])
def test_precision_and_recall_are_those_of_prdc(n, m, d):
    """Another implementation (requirements-dev.txt). It has < in the place of <=, which differs at ties only."""
    prdc = pytest.importorskip("prdc", reason="in requirements-dev.txt")
    fake, real = np.random.default_rng(1).standard_t(2, (n, d)) + 0.5, np.random.default_rng(2).standard_t(2, (m, d))
    ours, theirs = compare(fake, real), prdc.compute_prdc(real, fake, nearest_k=metrics.K)
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])


def test_on_the_edge_is_within():
    """Reach of the outer two of 0, 1, 2, 3 is 3 (k = 3): -3 and 6 lie on their edges, -4 and 7 beyond."""
    real, on_edge = np.arange(4.0)[:, None], np.array([[-3.0], [6], [-4], [7]])
    assert compare(on_edge, real)["precision"] == 0.5


def test_the_size_of_a_chunk_changes_nothing(monkeypatch):
    rng = np.random.default_rng(8)
    x, y = features(rng, 53, 12), features(rng, 64, 12, 1.2)
    whole = compare(x, y) | dict(nearest=metrics.nearest(torch.tensor(x).double(), y, np.arange(64)))
    assert (whole["n"], whole["m"], whole["d"]) == (53, 64, 12)
    assert whole["nearest"] == pytest.approx(np.sort(distances(x, y).min(1))[26], rel=1e-9)
    for chunk in (1, 7, 53):
        monkeypatch.setattr(metrics, "CHUNK", chunk)
        parts = compare(x, y) | dict(nearest=metrics.nearest(torch.tensor(x).double(), y, np.arange(64)))
        assert parts == pytest.approx(whole, rel=1e-9)
        assert (parts["precision"], parts["recall"]) == (whole["precision"], whole["recall"])


def test_page_similarity_is_of_two_different_images_of_a_page():
    rng = np.random.default_rng(6)
    cls, pages = features(rng, 9, 5), np.array([0, 0, 1, 1, 0, 1, 2, 2, 3])
    conditions, others = np.array([0, 2, 3, 8]), np.array([1, 2, 4, 5, 6])
    own = [[cls[i] @ cls[j] / np.linalg.norm(cls[i]) / np.linalg.norm(cls[j])
            for j in others if i != j and pages[i] == pages[j]] for i in conditions]
    assert list(map(len, own)) == [2, 1, 2, 0]                          # every condition counts alike
    expected = np.mean([np.mean(c) for c in own[:3]])
    assert metrics.page_similarity(cls, pages, conditions, others) == pytest.approx(expected, rel=1e-5)
    assert metrics.page_similarity(cls, pages, np.array([8]), others) is None


def test_references_hold_no_condition_unless_asked():
    pages, split = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2]), np.array([0, 0, 1, 1, 0, 1, 1, 0, 0, 0])

    def found(*arguments):
        return [indices.tolist() for indices in metrics.references(*arguments)]

    assert found(pages, split, np.array([2, 5])) == [[3, 6], [0, 1, 4]]
    assert found(pages, split, np.array([2, 5]), True) == [[2, 3, 5, 6], [0, 1, 4]]
    assert found(pages, split * (pages > 0), np.array([5])) == [[6], [4]]
    assert found(pages // 2, 1 - (pages < 2), np.array([9]))[1] == list(range(7))        # no training image on its page
    assert found(pages, 0 * split, np.array([1]))[0] == [0, *range(2, 10)]               # nothing is held out


def test_table_sums_up_repetitions():
    """Mean and s.d. (n - 1) of rows that differ in seed or draw. Another setting that differs gets a column."""
    made = dict(model="pairs", guidance=1.0, folder="a", n=40, m=16, kid=0.5, precision=0.1, recall=0.2, copy=None,
                memorisation=None)
    rows = [made | dict(seed=s, draw=d, fid=fid) for s, d, fid in ((0, 0, 10.0), (1, 0, 14.0), (0, 1, 12.0))]
    head, first, second = map(str.split, metrics.table([*rows, made | dict(sample_steps=9, seed=0, fid=11.0)]))
    assert head[:5] == ["model", "guidance", "sample_steps", "repeats", "n"]
    assert first[:9] == ["pairs", "1.0", "-", "3", "40", "16", "12.00", "+-", "2.00"]
    assert second[:7] == ["pairs", "1.0", "9", "1", "40", "16", "11.00"]


@pytest.fixture
def folder(tmp_path):
    """Eight pages of nine images, a third of each held out; three sample folders, five of each of eight conditions."""
    rng, n, d = np.random.default_rng(10), 72, 12
    pages, split = np.repeat(np.arange(8), 9).astype(np.int32), (np.arange(n) % 9 >= 6).astype(np.uint8)
    cls = (features(rng, n, d) + rng.normal(size=(8, d))[pages]).astype(np.float32)
    conditions, encoder = np.arange(6, n, 9), dict(name="test", px=8, size=16, dim=d, tokens=[1, 2])
    write_data(tmp_path, encoder, cls=cls, pages=pages, split=split)
    for name, model, guidance, spread in (("a", "recon", 1.0, 0.1), ("b", "pairs", 2.0, 0.5), ("c", "pairs", 0.0, 1.0)):
        near = np.repeat(cls[conditions], 5, 0) + spread * rng.normal(size=(40, d))
        made = write_data(tmp_path / "samples" / name, encoder, cls=near.astype(np.float32), conditions=conditions)
        (made / "samples.json").write_text(json.dumps(dict(model=model, guidance=guidance, seed=0)))
    return tmp_path


def scored(folder, *flags):
    done(SCRIPT, "--data", folder, "--device", "cpu", *flags)
    return json.loads((folder / "metrics.json").read_text())


def array(path):
    return np.load(path, allow_pickle=False)


def test_command_line(folder):
    rows = scored(folder)
    assert [(row["model"], row["guidance"]) for row in rows] == [
        ("real (train)", None), ("pairs", 0), ("pairs", 2), ("recon", 1)]
    assert {(row["n"], row["m"], row["d"], row["encoder"]["name"]) for row in rows} == {(40, 16, 12, "test")}
    cls, split, samples = (array(folder / name) for name in ("cls.npy", "split.npy", "samples/b/cls.npy"))
    unseen = np.delete(cls, np.arange(6, 72, 9), 0)[np.delete(split, np.arange(6, 72, 9)) == 1]
    assert rows[2]["fid"] == pytest.approx(brute_fid(samples.astype(float), unseen.astype(float)), rel=1e-4)
    assert (rows[2]["precision"], rows[2]["recall"]) == brute_precision_recall(samples, unseen)
    nearest = [np.sort(distances(x, cls[split == 0]).min(1)) for x in (samples, unseen)]
    assert rows[2]["memorisation"] == pytest.approx(nearest[0][19] / nearest[1][7], rel=1e-6)
    assert rows[3]["copy"] > rows[2]["copy"] > rows[1]["copy"] > rows[0]["copy"]         # real: two images of a page
    text = (folder / "metrics.txt").read_text().splitlines()
    assert text[0].split() == "model guidance repeats n m fid kid precision recall copy memorisation".split()
    assert text[3].split()[:5] == "pairs 2.0 1 40 16".split() and "test, d = 12" in text[-1]


def test_flags_choose_the_references(folder):
    assert {row["m"] for row in scored(folder, "--references", 10)} == {10}
    assert {row["m"] for row in scored(folder, "--references-per-page", 1)} == {8}
    row = scored(folder, "--with-conditions", "--samples", folder / "samples" / "a")[-1]
    held_out = array(folder / "cls.npy")[array(folder / "split.npy") == 1]
    expected = compare(array(folder / "samples" / "a" / "cls.npy"), held_out)
    assert row["m"] == 24 and row["fid"] == pytest.approx(expected["fid"])
    np.save(folder / "split.npy", np.zeros(72, np.uint8))               # nothing is held out
    assert [(row["model"], row["m"], row["memorisation"]) for row in scored(folder)] == [
        ("pairs", 64, None), ("pairs", 64, None), ("recon", 64, None)]


def test_a_judge_has_its_own_features(folder):
    """Other features of the same images; the folder's own are wide of the mark. Copy scores are the judge's as well."""
    plain, turn = scored(folder), np.linalg.qr(np.random.default_rng(0).normal(size=(12, 12)))[0].astype(np.float32)
    for made in (folder, *folder.glob("samples/*")):
        write_data(made / "judge", plain[0]["encoder"], cls=2 * array(made / "cls.npy") @ turn)
        np.save(made / "cls.npy", array(made / "cls.npy")[::-1])
    for row, judged in zip(plain, scored(folder, "--judge", "judge"), strict=True):
        assert judged["fid"] == pytest.approx(4 * row["fid"], rel=1e-4)
        assert judged["copy"] == pytest.approx(row["copy"], rel=1e-4)


def test_a_judge_of_digits(tiny_data):
    """Copies of real digits are read as those are; samples that are all alike have no spread."""
    split = (np.arange(20) % 5 > 2).astype(np.uint8)
    np.save(tiny_data / "split.npy", split)
    np.save(tiny_data / "names.npy", np.array([f"digit{i // 5}-{i}.png" for i in range(20)]))
    images, conditions = np.load(tiny_data / "images.npy", allow_pickle=False), np.flatnonzero(split)
    for name, samples in (("copies", images[conditions[:, None]].repeat(3, 1)),
                          ("pages", images[conditions.reshape(4, 2).repeat(2, 0)])):
        folder = write_data(tiny_data / "samples" / name, None, samples=samples, conditions=conditions)
    told_nothing = write_data(tiny_data / "samples" / "y", None, samples=images[:5, None])
    said = done("-m examples.digits_judge", "--data", tiny_data)
    real = float(re.search(r"reads ([\d.]+)%", said)[1])
    copies, pages = json.loads((tiny_data / "judge" / "read.json").read_text()).values()
    assert abs(100 * copies["read"] - real) < 0.1 and abs(100 * pages["read"] - real) < 0.1
    assert copies["spread"] < 1e-6 and abs(pages["spread"] - 1) < 1e-5
    assert np.load(folder / "judge" / "cls.npy", allow_pickle=False).shape == (16, 64)
    assert np.load(told_nothing / "judge" / "cls.npy", allow_pickle=False).shape == (5, 64)


def test_a_published_pipeline(tiny_data):
    """A tiny random one of diffusers' own class: other noise for every sample, in files that 06 reads."""
    hub, clip = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    unet = hub.UNet2DConditionModel(8, block_out_channels=[32] * 4, cross_attention_dim=8)
    encoder = clip.CLIPVisionModelWithProjection(clip.CLIPVisionConfig(8, 8, 8, 1, 2, image_size=28, patch_size=14))
    parts = hub.AutoencoderKL(), encoder, unet, hub.DDIMScheduler(), None, clip.CLIPImageProcessor(), False
    hub.StableDiffusionImageVariationPipeline(*parts).save_pretrained(tiny_data / "pipeline")
    np.save(tiny_data / "c.npy", [4, 4])
    made, data = tiny_data / "samples" / "sd", ["--data", tiny_data, "--conditions", tiny_data / "c.npy"]
    done("-m examples.external", *data, "--pipeline", tiny_data / "pipeline", "--variations", 3, "--out", made)
    samples = array(made / "samples.npy")
    assert (samples.shape, samples.dtype, *array(made / "conditions.npy")) == ((2, 3, 16, 16, 3), np.uint8, 4, 4)
    np.save(made / "cls.npy", samples[..., 0, :2, :].reshape(6, 6).astype(np.float32))
    (made / "data.json").write_text((tiny_data / "data.json").read_text())
    assert len(set(map(bytes, samples.reshape(6, -1)))) == 6                              # other noise for each
    assert scored(tiny_data, "--with-conditions")[-1]["guidance"] == 3
