"""Grader of exercise 3: dropping by counting, guidance on a network that is a table, then two trained networks."""
import numpy as np
import pytest
import torch

from exercises.ex3_guidance import NULL, judge, train


def test_drop_replaces_single_rows(ex):
    labels = np.arange(3000) % 3
    told = np.asarray(ex.drop(labels, 0.2, np.random.default_rng(0)))
    assert np.array_equal(labels, np.arange(3000) % 3), "drop() changed the labels it was given; return a new array"
    assert told.shape == labels.shape, f"drop() returns [n] labels: NULL, not left out. Yours: {told.shape}"
    dropped = told == NULL
    assert np.array_equal(told[~dropped], labels[~dropped]), "a label that is not dropped must stay as it is"
    assert 0 < dropped.sum() < 3000, "one random number decided for the whole batch; every row needs its own"
    share = dropped.mean()
    assert abs(share - 0.2) < 0.03, f"p = 0.2 dropped {share:.0%} of the rows"
    assert (np.asarray(ex.drop(labels, 0, np.random.default_rng(0))) == labels).all(), "p = 0 must drop nothing"
    other = np.asarray(ex.drop(labels, 0.2, np.random.default_rng(1))) == NULL
    same = np.asarray(ex.drop(labels, 0.2, np.random.default_rng(0))) == NULL
    assert (other != dropped).any(), "other draws of rng must drop other rows"
    assert (same == dropped).all(), "the same rng must drop the same rows: use rng, not np.random"


def table(z, logsnr, labels):
    """A network whose v is z + 1, 2, 4 for the three labels and z + 7 for NULL."""
    return z + torch.tensor([1.0, 2.0, 4.0, 7.0])[labels][:, None, None, None]


@pytest.mark.parametrize("w", [2.5, 1, 0, -1])
def test_guided_goes_away_from_null(ex, w):
    labels, z = torch.tensor([0, 1, 2, 1]), torch.zeros(4, 2, 1, 1)
    found = ex.guided(table, z, torch.zeros(4), labels, w)[:, 0, 0, 0]
    own = torch.tensor([1.0, 2.0, 4.0, 2.0])
    wanted = (1 + w) * own - w * 7
    hint = "The weights are 1 + w and -w"
    if torch.allclose(found, 7 + w * (own - 7)):
        hint = "This is null + w (cond - null): there w = 1 is the plain prediction, here w = 0 is"
    if w and torch.allclose(found, (1 + w) * 7 - w * own):
        hint = "You took null and condition the other way round: this goes towards null"
    if w and torch.allclose(found, (1 - w) * own + w * 7):
        hint = "The sign of w is wrong: this goes towards null"
    assert torch.allclose(found, wanted), f"w = {w}: v is {found.tolist()}, it should be {wanted.tolist()}. {hint}"


def test_guidance_works_with_dropping(ex):
    model = train(ex.drop, 0.2)
    plain, strong = judge(ex.guided, model, 0), judge(ex.guided, model, 3)
    assert plain["read"] > 0.7, f"at w = 0 only {plain['read']:.0%} of the samples are of their label"
    assert strong["read"] > plain["read"] + 0.04, f"read at w = 3: {strong['read']:.0%}, w = 0: {plain['read']:.0%}"
    assert strong["spread"] < 0.8 * plain["spread"], "w = 3 should give less varied samples than w = 0"
    assert strong["far"] < 0.2, f"{strong['far']:.0%} of the samples at w = 3 lie far from all points: is NULL trained?"


def test_and_fails_without(ex):
    model = train(ex.drop, 0)
    plain, strong = judge(ex.guided, model, 0), judge(ex.guided, model, 3)
    assert plain["read"] > 0.7 and plain["far"] < 0.1, "without dropping, w = 0 should still be good"
    assert strong["far"] > 0.3, f"only {strong['far']:.0%} of the samples are off the data: did something train NULL?"
