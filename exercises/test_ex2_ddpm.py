"""Grader of exercise 2: two noisings make one, Bayes' rule summed on a grid, and samples of a known distribution."""
import pytest
import torch

import common
from exercises.ex2_ddpm import alpha_sigma, sample

TIMES = [(-4.0, -3.5), (-1.0, 0.5), (2.0, 2.3), (-6.0, 3.0)]            # logsnr at t and at s
DOUBLE = torch.float64


def at(logsnr):
    return torch.tensor(logsnr, dtype=DOUBLE)


def near(a, b):
    return bool(torch.isclose(torch.as_tensor(a, dtype=DOUBLE), torch.as_tensor(b, dtype=DOUBLE), rtol=1e-3, atol=1e-5))


@pytest.mark.parametrize("t, s", TIMES)
def test_noise_to_s_and_then_to_t_is_noise_to_t(ex, t, s):
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(at(t)), alpha_sigma(at(s))
    a, v = ex.transition(at(t), at(s))
    assert near(a * alpha_s, alpha_t), f"a alpha_s is {a * alpha_s:.4f}, it must be alpha_t = {alpha_t:.4f}"
    total = a ** 2 * sigma_s ** 2 + v
    hint = " v is a variance, and this is its root." if near(a ** 2 * sigma_s ** 2 + v ** 2, sigma_t ** 2) else ""
    assert near(total, sigma_t ** 2), f"the noise of both parts is {total:.4f}, it must be {sigma_t ** 2:.4f}.{hint}"


def bayes(z, x, t, s):
    """Mean and variance of z_s given z_t = z and x, by summing over 40,001 values of z_s."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(at(t)), alpha_sigma(at(s))
    a = alpha_t / alpha_s
    z_s = torch.linspace(-12, 12, 40_001, dtype=DOUBLE)
    likelihood = -(z - a * z_s) ** 2 / (2 * (sigma_t ** 2 - (a * sigma_s) ** 2))
    prior = -(z_s - alpha_s * x) ** 2 / (2 * sigma_s ** 2)
    weights = torch.softmax(likelihood + prior, 0)
    mean = (weights * z_s).sum()
    return mean, (weights * (z_s - mean) ** 2).sum()


@pytest.mark.parametrize("t, s", TIMES)
def test_posterior_is_bayes_rule(ex, t, s):
    mean, variance = ex.posterior(at(0.7), at(-0.4), at(t), at(s))
    true_mean, true_variance = bayes(0.7, -0.4, t, s)
    v, sigma2_s = ex.transition(at(t), at(s))[1], alpha_sigma(at(s))[1] ** 2
    known = {v: "This is v, the noise of z_t given z_s", sigma2_s: "This is sigma_s^2, which forgets z_t",
             true_variance.sqrt(): "This is the standard deviation", 1 / true_variance: "This is the precision"}
    hint = next((said for value, said in known.items() if near(value, variance)), "Precisions add")
    said = f"the variance is {variance:.4f}, Bayes' rule gives {true_variance:.4f}"
    assert near(variance, true_variance), f"{said}. {hint}"
    hint = "Weights are precisions; z_t is about a z_s, not about z_s"
    assert near(mean, true_mean), f"the mean is {mean:.4f}, Bayes' rule gives {true_mean:.4f}. {hint}"


def test_step_scales_its_noise(ex):
    for t, s in TIMES:
        z, x = torch.tensor([0.7, -2.0], dtype=DOUBLE), torch.tensor([-0.4, 0.1], dtype=DOUBLE)
        still, moved = (ex.step(z, x, at(t), at(s), torch.full((2,), n, dtype=DOUBLE)) for n in (0.0, 1.0))
        mean, variance = ex.posterior(z, x, at(t), at(s))
        assert all(map(near, still, mean)), "with noise 0, step() must give the posterior's mean for x_hat"
        hint = " You scaled the noise by the variance." if near((moved - still)[0], variance) else ""
        assert near((moved - still)[0] ** 2, variance), f"step()'s noise has the wrong size.{hint}"
        image = [value[:, None, None, None] for value in (z, x, torch.ones(2, dtype=DOUBLE))]
        project = common.ddpm_step(image[0], image[1], at([t]), at([s]), image[2], 0)
        assert all(map(near, moved, project.flatten())), "step() differs from common.ddpm_step() at interpolation 0"


def test_samples_have_the_spread_of_the_data(ex):
    x = sample(ex.step, torch.tensor([0.3], dtype=DOUBLE), 0.2, steps=100)
    assert abs(x.mean() - 0.3) < 0.02, f"samples of N(0.3, 0.2^2) have the mean {x.mean():.3f}"
    assert abs(x.std() - 0.2) < 0.02, f"samples of N(0.3, 0.2^2) have the spread {x.std():.3f}"
    x = sample(ex.step, torch.tensor([-1.5, 1.0], dtype=DOUBLE), 0.15)
    left = (x < 0).double().mean()
    assert abs(left - 0.5) < 0.05, f"of two equal clusters, {left:.0%} of the samples lie in the left one"
    assert abs(x[x < 0].std() - 0.15) < 0.03, f"a cluster's spread is {x[x < 0].std():.3f}, it should be 0.15"
