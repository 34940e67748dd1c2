"""Grader of exercise 1: the pairs against a loop over all of them, the draws by counting."""
import numpy as np
import pytest

from exercises.ex1_pairs import pages_of_numbers, slope

LOW, HIGH = -0.2, 0.7
PAGES = np.array([7] * 12 + [3] * 5 + [5] * 2 + [9])                    # page 5 has two strangers, page 9 one image


@pytest.fixture
def data():
    """cls [20, 4] of lengths between 0.2 and 5, pages, split; two images of page 7 and one of page 3 are held out."""
    rng = np.random.default_rng(0)
    cls = rng.normal(size=(4, 4))[np.unique(PAGES, return_inverse=True)[1]] + rng.normal(size=(20, 4))
    cls = cls / np.linalg.norm(cls, axis=1, keepdims=True) * rng.uniform(0.2, 5, size=(20, 1))
    cls[18] = -3 * cls[17]
    split = np.isin(np.arange(20), [1, 5, 14]).astype(int)
    order = rng.permutation(20)                                         # pages lie mixed in the files
    return cls[order], PAGES[order], split[order]


def cosine(cls, i, j):
    return cls[i] @ cls[j] / np.sqrt(cls[i] @ cls[i] * (cls[j] @ cls[j]))


@pytest.mark.parametrize("low, high", [(LOW, HIGH), (-1.1, 1.1)])        # the second: no limit
def test_which_pairs(ex, data, low, high):
    cls, pages, split = data
    pairs = np.asarray(ex.make_pairs(cls, pages, split, low, high))
    assert pairs.ndim == 2 and pairs.shape[1] == 2, f"make_pairs() returns [P, 2], not an array of shape {pairs.shape}"
    found = [(int(i), int(j)) for i, j in pairs]
    for i, j in found:
        assert i != j, f"({i}, {j}) tells the model its own target: that is reconstruction again"
        assert pages[i] == pages[j], f"({i}, {j}) are of different pages, {pages[i]} and {pages[j]}"
        assert split[i] == split[j] == 0, f"({i}, {j}) uses a held-out image: {i if split[i] else j}"
        c = cosine(cls, i, j)
        assert low <= c <= high, f"({i}, {j}) has cosine {c:.3f}, not in {low} to {high}. Is it over both lengths?"
    for i, j in np.ndindex(20, 20):
        wanted = i != j and pages[i] == pages[j] and split[i] == split[j] == 0 and low <= cosine(cls, i, j) <= high
        hint = " You have the pair the other way round; both are pairs." if (j, i) in found else ""
        assert not wanted or (i, j) in found, f"({i}, {j}) is missing, with cosine {cosine(cls, i, j):.3f}.{hint}"
    assert len(found) == len(set(found)), "make_pairs() returns some pairs twice"


def test_draws_are_pairs(ex, data):
    cls, pages, split = data
    pairs = np.asarray(ex.make_pairs(cls, pages, split, LOW, HIGH))
    allowed = {(int(i), int(j)) for i, j in pairs}
    condition, target = ex.draw(pairs, pages, 4000, np.random.default_rng(0))
    assert len(condition) == len(target) == 4000, "draw() returns condition [batch] and target [batch]"
    drawn = {(int(i), int(j)) for i, j in zip(condition, target)}
    wrong = sorted(drawn - allowed)
    assert not wrong, f"draw() gave {wrong[0]}, which make_pairs() dropped: draw pairs, not two images of the page"
    assert drawn == allowed, f"the pair {sorted(allowed - drawn)[0]} never comes in 4,000 draws"
    again, _ = ex.draw(pairs, pages, 4000, np.random.default_rng(0))
    other, _ = ex.draw(pairs, pages, 4000, np.random.default_rng(1))
    assert np.array_equal(condition, again), "the same rng must give the same draws: use rng, not np.random"
    assert not np.array_equal(condition, other), "another seed must give other draws"


def test_pages_count_alike_and_so_do_the_pairs_of_a_page(ex, data):
    cls, pages, split = data
    pairs = np.asarray(ex.make_pairs(cls, pages, split, LOW, HIGH))
    condition, target = ex.draw(pairs, pages, 40_000, np.random.default_rng(0))
    for page in np.unique(pages[pairs[:, 0]]):
        own, wanted = pairs[pages[pairs[:, 0]] == page], 1 / len(np.unique(pages[pairs[:, 0]]))
        share = np.mean(pages[condition] == page)
        assert abs(share - wanted) < 0.02, (
            f"page {page} has {len(own)} of {len(pairs)} pairs and gets {share:.0%} of the draws, not {wanted:.0%}. "
            "Draw a page first, so that large pages do not count more")
        for i, j in own:
            share = np.mean((condition == i) & (target == j)) / wanted * len(own)
            assert abs(share - 1) < 0.4, f"on page {page}, pair ({i}, {j}) comes {share:.2f} times as often as wanted"


def test_the_model_no_longer_copies(ex):
    x, pages = pages_of_numbers()
    pairs = ex.make_pairs(x, pages, np.zeros(len(x), int), -1, 0.99)
    condition, target = ex.draw(pairs, pages, 20_000, np.random.default_rng(0))
    a, error = slope(x[condition], x[target])
    assert abs(a - 0.8) < 0.03 and abs(error - 0.36) < 0.03, f"the slope is {a:.2f}, it should be 1 / 1.25 (1: a copy)"
