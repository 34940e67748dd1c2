"""Grader of exercise 5: sets that can be drawn on paper, loops over all points, then digits."""
import math

import pytest
import torch

from exercises.ex5_recall import copier, digits, fid, varier


def line(*points):
    return torch.tensor(points, dtype=torch.float64)[:, None]


def test_radius(ex):
    found = [float(r) for r in ex.radius(line(0, 1, 3, 7, 15))]
    hint = "This counts the point itself as its nearest neighbour" if found[0] == 3 else "Sort the distances on paper"
    assert found == [7, 6, 4, 7, 14], f"the points 0, 1, 3, 7, 15 have radius 7, 6, 4, 7, 14, yours is {found}. {hint}"
    found = [float(r) for r in ex.radius(line(0, 1, 3, 7, 15), 1)]
    assert found == [1, 1, 2, 4, 8], f"for k = 1 their radius is 1, 1, 2, 4, 8, yours is {found}. Do you use k?"


def by_loops(real, fake, k):
    """Precision and recall, point by point."""
    def covered(points, centres, radii):
        inside = [any(math.dist(p, c) <= r for c, r in zip(centres, radii)) for p in points]
        return sum(inside) / len(inside)

    def radii(points):
        return [sorted(math.dist(p, q) for q in points)[k] for p in points]
    real, fake = real.tolist(), fake.tolist()
    return covered(fake, real, radii(real)), covered(real, fake, radii(fake))


def test_precision_and_recall(ex):
    g = torch.Generator().manual_seed(0)
    real = torch.randn(60, 2, generator=g, dtype=torch.float64)
    fake = torch.cat([0.1 * real[:20] + 0.5, 3 + torch.randn(10, 2, generator=g, dtype=torch.float64)])
    for k in (3, 1):
        precision, recall = by_loops(real, fake, k)
        found = ex.precision_recall(real, fake, k)
        assert len(found) == 2, "precision_recall() returns two numbers, precision and recall"
        p, r = map(float, found)
        swapped = " You have precision and recall swapped." if math.isclose(p, recall) else ""
        assert math.isclose(p, precision), f"k = {k}: the precision is {precision:.3f}, yours {p:.3f}.{swapped}"
        distance, own = torch.cdist(real, fake), ex.radius(real, k)
        coverage = (distance <= own[:, None]).any(1).double().mean().item()
        hint = "These are the balls of the real points; recall uses those of the samples" if r == coverage else ""
        assert math.isclose(r, recall), f"k = {k}: the recall is {recall:.3f}, yours {r:.3f}. {hint}"


def test_the_border_belongs_to_the_ball(ex):
    same = line(2, 2, 2, 2, 2)
    found = tuple(map(float, ex.precision_recall(same, same)))
    assert found == (1, 1), f"two equal sets have precision and recall 1, yours are {found}: use <="


@pytest.fixture(scope="module")
def sets():
    """References, a pool of other digits, and the varier's samples of 100 of them."""
    x, labels = digits()
    return x[:1000], x[1000:2000], varier(labels[1000:1100], 10, x[2000:], labels[2000:])


def test_a_copier_has_no_recall(ex, sets):
    real, pool, varied = sets
    (_, copied), (_, other) = (map(float, ex.precision_recall(real, fake)) for fake in (copier(pool[:100], 10), varied))
    assert copied < 0.05 < 0.9 < other, f"the copier's recall is {copied:.2f}, the varier's {other:.2f}"


def test_fid_is_fooled(ex, sets):
    real, pool, varied = sets
    fake = ex.fool(pool.clone())
    assert fake.shape == (1000, 16), f"fool() returns 1,000 points of 16 features, not {tuple(fake.shape)}"
    assert fake.isfinite().all(), "fool() returned numbers that are not finite"
    distance, limit = fid(fake.double(), real), fid(varied, real)
    hint = "Too few different images have another mean and covariance than all" if distance > limit else ""
    assert distance < limit, f"your FID is {distance:.2f}, the varier's {limit:.2f}. {hint}"
    _, recall = by_radius(real, fake.double())
    hint = "Points that differ have large balls. Only samples very close to each other have small ones"
    assert recall < 0.05, f"your FID of {distance:.2f} is good, but your recall is {recall:.2f}, not below 0.05. {hint}"


def by_radius(real, fake):
    """Precision and recall again, independent of what is graded."""
    distance, own = torch.cdist(real, fake), [torch.cdist(s, s).sort(1).values[:, 3] for s in (real, fake)]
    precision, recall = (distance <= own[0][:, None]).any(0), (distance <= own[1]).any(1)
    return precision.double().mean().item(), recall.double().mean().item()
