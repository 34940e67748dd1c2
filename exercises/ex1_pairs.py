"""Exercise 1: turn reconstruction into pairs. About 30 minutes.

03_train_recon.py draws a training image and tells the model the embedding of that same image. The model learns to copy:

    target = train[rng.integers(len(train), size=batch)]
    condition = target

Semantica tells it the embedding of *another* image of the page. Nothing else changes. Which pairs (i, j) it may use:

    page_i = page_j,   i != j,   both in the training set,   low <= cos(cls_i, cls_j) <= high,

    cos(a, b) = a.b / (|a| |b|)

The lower limit drops strangers on the page, the upper one near-duplicates, which would teach copying again. Training
draws a page first, then a pair of that page. So every page that has a pair counts the same, however large it is.

To do     make_pairs() and draw(), five to ten lines each
Check     pytest -x exercises/test_ex1_pairs.py
To see    python -m exercises.ex1_pairs: what the best linear model does with its condition, before and after
Hints     - A mask [N, N] and np.nonzero are enough for make_pairs(). Both (i, j) and (j, i) are pairs.
          - A page may have no pair left. np.unique(..., return_index=True, return_counts=True) helps in draw().
Question  The pages of show() are numbers: a page's mean has variance 1, its images scatter around the mean with
          variance 0.25. Why is the slope 1 / 1.25 when the condition is another image of the page? What would it be if
          all images of a page were near-duplicates, and what if all were strangers?
"""
import numpy as np


def make_pairs(cls, pages, split, low, high):
    """All pairs (condition, target) as an integer array [P, 2].

    cls [N, D] embeddings, pages [N] the page of each image, split [N] 0 in the training set and 1 if held out.
    """
    raise NotImplementedError("make_pairs() of exercise 1 is a gap: write it, then run the grader again")


def draw(pairs, pages, batch, rng):
    """(condition [batch], target [batch]), indices: each time a page at random, then one of its pairs at random.

    pairs [P, 2] as make_pairs() returns it, in any order; rng: np.random.default_rng(seed), the only randomness.
    """
    raise NotImplementedError("draw() of exercise 1 is a gap: write it, then run the grader again")


# ----------------------------------------------------------------------------------------------------------------------
# Given.


def slope(condition, target):
    """The a for which target = a * condition has the least squared error, and that error over the target's variance."""
    a = (condition * target).sum() / (condition ** 2).sum()
    return a, ((target - a * condition) ** 2).mean() / (target ** 2).mean()


def pages_of_numbers(n=400, images=10, dim=8):
    """Images that are `dim` numbers: the page's mean (variance 1) plus each image's own (variance 0.25)."""
    rng = np.random.default_rng(0)
    pages = np.arange(n).repeat(images)
    x = rng.normal(size=(n, dim))[pages] + 0.5 * rng.normal(size=(n * images, dim))
    return x, pages


def show(make_pairs, draw):
    """Print what the best linear model makes of its condition: told the image itself, told another of the page."""
    x, pages = pages_of_numbers()
    pairs = make_pairs(x, pages, np.zeros(len(x), int), -1, 0.99)
    condition, target = draw(pairs, pages, 20_000, np.random.default_rng(0))
    for told, c, t in (("the image itself", target, target), ("another of its page", condition, target)):
        a, error = slope(x[c], x[t])
        print(f"told {told:20} x_hat = {a:.2f} condition, unexplained {error:.2f}  {'#' * round(40 * error)}")


if __name__ == "__main__":
    show(make_pairs, draw)
