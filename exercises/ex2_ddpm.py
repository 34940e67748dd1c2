"""Exercise 2: the DDPM step from its two moments. About 45 minutes.

Noise at time t turns an image x into z_t = alpha_t x + sigma_t eps. DDPM goes from z_t to a less noisy z_s, s < t. It
draws from q(z_s | z_t, x), which is Gaussian, so its mean and its variance are all one needs. Bayes' rule gives them:

    q(z_s | z_t, x)  ~  q(z_t | z_s)  q(z_s | x)

    q(z_s | x)   = N(alpha_s x, sigma_s^2)             what is known before z_t is seen
    q(z_t | z_s) = N(a z_s, v)                         more noise on top of z_s

a and v follow from one condition: adding noise up to s, and then from s to t, must be the same as adding noise up to t.
For two Gaussians in the same z_s, precisions (1 / variance) add, and the mean is weighted by precision.

To do     transition(), posterior() and step(), two to four lines each, all from these equations
Check     pytest -x exercises/test_ex2_ddpm.py
To see    python -m exercises.ex2_ddpm: how noise becomes two clusters
Hints     - alpha_sigma(logsnr) below gives alpha and sigma. logsnr_s > logsnr_t: s is less noisy.
          - As a function of z_s, N(z_t; a z_s, v) has the mean z_t / a and the variance v / a^2.
          - step() has x_hat where the posterior has x. Its noise is scaled by a standard deviation, not by a variance.
Question  step() could also draw z_s = alpha_s x_hat + sigma_s noise, from q(z_s | x_hat), and forget z_t. With
          x_hat = x this has the right distribution at every s. Why are its samples wrong with a network's x_hat?
"""
import torch

import common


def alpha_sigma(logsnr):
    """alpha and sigma of a log-SNR, a tensor of any shape."""
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


def transition(logsnr_t, logsnr_s):
    """a and v of q(z_t | z_s) = N(a z_s, v). Returns the pair (a, v); v is a variance."""
    raise NotImplementedError("transition() of exercise 2 is a gap: write it, then run the grader again")


def posterior(z_t, x, logsnr_t, logsnr_s):
    """Mean and variance of q(z_s | z_t, x). Returns the pair (mean, variance)."""
    raise NotImplementedError("posterior() of exercise 2 is a gap: write it, then run the grader again")


def step(z_t, x_hat, logsnr_t, logsnr_s, noise):
    """From z_t to z_s, given the network's x_hat and unit noise of the shape of z_t."""
    raise NotImplementedError("step() of exercise 2 is a gap: write it, then run the grader again")


# ----------------------------------------------------------------------------------------------------------------------
# Given.


def best_x_hat(z, logsnr, means, std):
    """E[x | z] for data of equal clusters N(m, std^2), m in means: what a perfect network predicts."""
    alpha, sigma = alpha_sigma(logsnr)
    spread = alpha ** 2 * std ** 2 + sigma ** 2                         # variance of z within a cluster
    off = z[:, None] - alpha * means                                    # [n, clusters]
    weights = torch.softmax(-off ** 2 / (2 * spread), 1)                # which cluster z is of
    return (weights * (means + alpha * std ** 2 / spread * off)).sum(1)


def sample(step, means, std, n=4000, steps=64, watch=lambda z: None):
    """n numbers of the clusters N(m, std^2), from noise, by your step()."""
    g = torch.Generator().manual_seed(0)
    logsnrs = common.logsnr_schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64), 16, 16)
    z = torch.randn(n, generator=g, dtype=torch.float64)
    for logsnr_t, logsnr_s in zip(logsnrs[:-1], logsnrs[1:]):
        watch(z)
        x_hat = best_x_hat(z, logsnr_t, means, std)
        z = step(z, x_hat, logsnr_t, logsnr_s, torch.randn(n, generator=g, dtype=torch.float64))
    watch(z)
    return z


def show(step):
    """Print the density of z between -3 and 3 at every eighth step, from noise (top) to data."""
    seen = []
    sample(step, torch.tensor([-1.5, 1.0], dtype=torch.float64), 0.15, watch=seen.append)
    for z in seen[::8]:
        density = torch.histc(z, 72, -3, 3) / len(z)
        print("".join(" .:-=+*#%@"[min(9, int(120 * share))] for share in density))


if __name__ == "__main__":
    show(step)
