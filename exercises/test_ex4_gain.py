"""Grader of exercise 4: two made-up networks whose four losses are known, then both checkpoints in pretrained/."""
import numpy as np
import pytest
import torch

import common
from exercises.ex4_gain import held_out_digits, load_model, noise_of

PAGES = np.array([2, 0, 1, 2, 0, 0, 1, 2, 1, 0])
KEYS = ["itself", "mate", "nothing", "stranger"]


def test_mates_and_strangers(ex):
    mates, strangers = np.asarray(ex.mates(PAGES)), np.asarray(ex.strangers(PAGES))
    assert mates.shape == strangers.shape == PAGES.shape, "both return an index for each image"
    assert (mates != np.arange(10)).all(), "an image is not its own page-mate: that would be the condition itself"
    assert (PAGES[mates] == PAGES).all(), "a page-mate lies on the same page; the pages are not sorted here"
    assert (PAGES[strangers] != PAGES).all(), "a stranger lies on another page; the pages are not sorted here"


class Known:
    """A network that believes its condition: cls holds an image. Its x_hat is cls, or 0 if it is told nothing."""

    def __init__(self):
        self.seen = []

    def __call__(self, z, logsnr, cls=None, tokens=None, drop=None):
        drop = torch.zeros(len(z), dtype=torch.bool) if drop is None else drop
        self.seen.append(z)
        assert torch.equal(cls[:, 0], tokens[:, 0, 0]), "cls and tokens are of different images"
        alpha, sigma = common.alpha_sigma(logsnr)
        x_hat = torch.where(drop[:, None], 0, cls).view(z.shape)
        return (alpha * z - x_hat) / sigma


def test_the_four_losses(ex):
    g = torch.Generator().manual_seed(0)
    own = torch.randn(10, 3, 4, 4, generator=g)
    x = own + 3 * torch.from_numpy(PAGES).float()[:, None, None, None]   # pages differ more than their images
    eps, logsnr = torch.randn(x.shape, generator=g), torch.linspace(-3, 1, 10)
    told, network = dict(cls=x.flatten(1), tokens=x.flatten(1)[:, None]), Known()
    losses = ex.gain(network, x, told, PAGES, logsnr, eps)
    assert sorted(losses) == KEYS, f"gain() returns a dictionary with {', '.join(KEYS)}, not {', '.join(losses)}"
    alpha, sigma = common.alpha_sigma(logsnr)
    for z in network.seen:
        for part in z.split(10):
            assert torch.allclose(part, alpha * x + sigma * eps, atol=1e-5), (
                "z must be alpha x + sigma eps with the given x and eps, the same for all four conditions")
    nothing = (x / sigma).square().mean().item()                        # v_pred - v = (x - x_hat) / sigma
    assert losses["itself"] < 1e-6, f"told the image itself, this network makes no error. Yours: {losses['itself']:.3f}"
    assert abs(losses["nothing"] / nothing - 1) < 1e-3, (
        f"told nothing the loss is {losses['nothing']:.3f}, it should be {nothing:.3f}: drop all rows, and only there")
    for name, same_page in (("mate", True), ("stranger", False)):
        rows = [[j for j in range(10) if j != i and (PAGES[i] == PAGES[j]) == same_page] for i in range(10)]
        errors = [[((x[i] - x[j]) / sigma[i]).square().mean().item() for j in rows[i]] for i in range(10)]
        low, high = np.mean([min(e) for e in errors]), np.mean([max(e) for e in errors])
        assert 0.99 * low < losses[name] < 1.01 * high, (
            f"told a {name} the loss is {losses[name]:.3f}, for any choice it lies between {low:.3f} and {high:.3f}")


def test_verdict(ex):
    copier, varier = (0.04, 0.33, 0.18, 0.48), (0.14, 0.14, 0.17, 0.23)  # what both checkpoints give
    early = (0.092, 0.197, 0.165, 0.277), (0.132, 0.135, 0.160, 0.187)  # after a short training
    for four, is_copier in ((copier, True), (varier, False), (early[0], True), (early[1], False)):
        said = "copies" if is_copier else "varies"
        assert bool(ex.copies(dict(zip(KEYS, four)))) == is_copier, f"a model with {KEYS} = {four} {said}"
    easy = {name: loss / 5 for name, loss in zip(KEYS, varier)}
    assert not ex.copies(easy), "all losses a fifth, a varier on easier images: compare losses, not with a constant"
    sure = dict(zip(KEYS, (0.05, 0.13, 0.16, 0.5)))
    hint = "'itself' is low for any model that uses its condition well, and a stranger misleads a varier too"
    assert not ex.copies(sure), f"{sure} is a varier: a page-mate helps it. {hint}"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return held_out_digits(tmp_path_factory.mktemp("digits"))


@pytest.mark.parametrize("name, low, high", [("recon", (0.02, 0.26, 0.14, 0.38), (0.06, 0.40, 0.22, 0.58)),
                                             ("pairs", (0.10, 0.10, 0.13, 0.17), (0.17, 0.17, 0.21, 0.28))])
def test_the_checkpoints(ex, digits, name, low, high):
    x, told, pages = digits
    losses = ex.gain(load_model(name), x, told, pages, *noise_of(x, -2.9))
    for key, least, most in zip(KEYS, low, high):
        assert least < losses[key] < most, f"{name}.pt told {key}: {losses[key]:.3f} is not in [{least}, {most}]"
    assert bool(ex.copies(losses)) == (name == "recon"), f"your verdict on pretrained/{name}.pt is wrong"
