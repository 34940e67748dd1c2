"""06_fewshot_metrics.py against other people's code, which is optional (requirements-dev.txt).

Where the definitions agree, and where not:
  precision, recall  All count the k-th nearest *other* point. "Within reach" is <= in the paper, in torch-fidelity and
                     here, < in prdc. They differ at exact ties only, and the features here have none.
  FID                The same formula. torch-fidelity takes eigenvalues of S_x S_y, with about 6 digits left if n < d.
  KID                torch-fidelity averages over random subsets of one size. One subset of all n = m is the same.
"""
import importlib

import numpy as np
import pytest
import torch

from conftest import module

metrics = module("06_fewshot_metrics.py")


def peer(name):
    """The module, or a skipped test. RuntimeError: a torchvision that was built for another torch."""
    pytest.importorskip(name.split(".")[0], reason="in requirements-dev.txt", exc_type=(ImportError, RuntimeError))
    return importlib.import_module(name)


def low_rank():
    """Two sets [300, 40], [360, 40] near 6-dimensional planes, apart from each other."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(6, 40))
    return [scale * rng.normal(size=(n, 6)) @ basis + 0.1 * rng.normal(size=(n, 40)) + shift
            for n, scale, shift in ((300, 1.2, 0.3), (360, 1, 0))]


def heavy_tailed():
    """Two sets [300, 20], [300, 20] with a few points very far out (Student's t with 2 degrees of freedom)."""
    rng = np.random.default_rng(1)
    return rng.standard_t(2, (300, 20)) + 0.5, rng.standard_t(2, (300, 20))


def few():
    """Fewer images than features, [50, 120], [70, 120], skewed, not centred: covariances without an inverse."""
    rng = np.random.default_rng(2)
    return rng.gamma(1.0, 1.2, (50, 120)), rng.gamma(0.8, 1, (70, 120))


@pytest.fixture(scope="module", params=[low_rank, heavy_tailed, few], ids=lambda make: make.__name__)
def sets(request):
    """(samples [n, d], real images [m, d]), float64."""
    return request.param()


def compare(fake, real):
    return metrics.compare(metrics.statistics(real), metrics.statistics(fake))


def test_precision_and_recall_are_those_of_prdc(sets):
    fake, real = sets
    ours, theirs = compare(fake, real), peer("prdc").compute_prdc(real, fake, nearest_k=metrics.K)
    assert 0 < ours["precision"] < 1 and 0 < ours["recall"] < 1
    assert (ours["precision"], ours["recall"]) == (theirs["precision"], theirs["recall"])


def torch_fidelity_precision_recall(fake, real):
    found = peer("torch_fidelity.metric_prc").prc_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), prc_neighborhood=metrics.K, verbose=False)
    return pytest.approx((found["precision"], found["recall"]), abs=1e-6)                # shares in float32


def test_precision_and_recall_are_those_of_torch_fidelity(sets):
    ours = compare(*sets)
    assert (ours["precision"], ours["recall"]) == torch_fidelity_precision_recall(*sets)


def test_fid_is_that_of_torch_fidelity(sets):
    fid = peer("torch_fidelity.metric_fid")
    moments = [fid.fid_features_to_statistics(torch.from_numpy(x)) for x in sets]
    theirs = fid.fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    assert compare(*sets)["fid"] == pytest.approx(theirs, rel=1e-4)


def test_kid_is_that_of_torch_fidelity(sets):
    n = min(map(len, sets))
    fake, real = (x[:n] for x in sets)
    kid = peer("torch_fidelity.metric_kid").kid_features_to_metric(
        torch.from_numpy(fake), torch.from_numpy(real), kid_subsets=1, kid_subset_size=n, verbose=False)
    assert compare(fake, real)["kid"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-9)
