"""Grader of exercise 6: the same noise in another proportion, and data for which the path of DDIM is known."""
import torch

import common

MEAN, STD = 0.2, 0.3                                                    # of the pixels of the made-up data


def at(logsnr):
    return torch.tensor([logsnr], dtype=torch.float64)


def images(seed, n=50):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def schedule(steps):
    return common.logsnr_schedule(torch.linspace(1, 0, steps + 1, dtype=torch.float64), 16, 16)


def spread(logsnr):
    """alpha, and the standard deviation of z, for data N(MEAN, STD^2)."""
    alpha, sigma = common.alpha_sigma(logsnr)
    return alpha, (alpha ** 2 * STD ** 2 + sigma ** 2).sqrt()


def perfect(z, logsnr):
    """The v of a perfect network for data N(MEAN, STD^2)."""
    alpha, sigma = common.alpha_sigma(logsnr)
    x_hat = MEAN + alpha * STD ** 2 / (alpha ** 2 * STD ** 2 + sigma ** 2) * (z - alpha * MEAN)
    return (alpha * z - x_hat) / sigma


def test_the_step_keeps_the_noise(ex):
    x, eps = images(0), images(1)
    for t, s in ((-6.0, -4.0), (-1.0, 0.5), (3.0, 8.0), (2.0, -2.0)):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = common.alpha_sigma(at(t)), common.alpha_sigma(at(s))
        z = alpha_t * x + sigma_t * eps
        found = ex.ddim_step(z, x, at(t), at(s))
        assert found.shape == x.shape, f"ddim_step() returns a z of the shape of z, not {tuple(found.shape)}"
        assert torch.equal(found, ex.ddim_step(z, x, at(t), at(s))), "two equal calls differ: DDIM draws no fresh noise"
        hint = ""
        if torch.allclose(found, alpha_s * x + sigma_t * eps):
            hint = "You mixed with sigma_t: z_s has less noise, sigma_s"
        if torch.allclose(found, alpha_s * x + sigma_s * (z - x) / sigma_t):
            hint = "eps_hat must take alpha_t x_hat from z, not x_hat"
        if torch.allclose(found, alpha_s * x + sigma_s * (z - alpha_t * x)):
            hint = "What is left of z without x is sigma_t eps: divide by sigma_t"
        right = torch.allclose(found, alpha_s * x + sigma_s * eps, atol=1e-6)
        assert right, f"z_s must be alpha_s x + sigma_s eps, with the eps that is in z_t. {hint}"


def test_the_loop_follows_the_known_path(ex):
    start = images(2)
    alpha, width = spread(schedule(1)[:1])
    end = MEAN + STD * (start - alpha * MEAN) / width                   # every z keeps its place in the distribution
    errors = []
    for steps in (20, 400):
        calls = []
        x = ex.ddim(lambda z, logsnr: calls.append(logsnr) or perfect(z, logsnr), start, schedule(steps), clip=False)
        assert len(calls) == steps, f"{steps} steps called the network {len(calls)} times"
        assert all(logsnr.shape == (50,) for logsnr in calls), "denoise() wants a logsnr for each image, [B]"
        errors.append((x - end).abs().max().item())
    rows = f"The error is {errors[0]:.3f} with 20 steps and {errors[1]:.3f} with 400"
    assert errors[1] < 0.02, f"samples do not end where their start leads. {rows}"
    assert errors[1] < errors[0] / 4, f"more steps should be more exact. {rows}"


def test_the_loop_clips_and_ends_with_x_hat(ex):
    start = images(3)
    seen = []

    def jumps(z, logsnr):
        """A network that says 3 in each pixel: clipped, x_hat is 1."""
        alpha, sigma = common.alpha_sigma(logsnr)
        seen.append(z)
        return (alpha * z - 3) / sigma
    x = ex.ddim(jumps, start, schedule(10))
    assert (x < 2).all(), "the network's x_hat is 3 here: clip=True must clip it to 1, in the last step as well"
    right = torch.allclose(x, torch.ones_like(x))
    assert right, "ddim() returns the last x_hat, which is 1 here, not the last z"
    alpha_0, sigma_0 = common.alpha_sigma(schedule(10)[:1])
    alpha_5, sigma_5 = common.alpha_sigma(schedule(10)[5:6])
    wanted = alpha_5 + sigma_5 * (start - alpha_0) / sigma_0
    right = torch.allclose(seen[5], wanted, atol=1e-4)
    assert right, "x_hat is 1 in every step, so eps_hat must stay the same: compute it from the clipped x_hat"


def test_encode_runs_backwards(ex):
    x = MEAN + STD * images(4)
    noise = ex.encode(perfect, x, schedule(400))
    assert noise.shape == x.shape
    alpha, width = spread(schedule(1)[:1])
    wanted = alpha * MEAN + width * (x - MEAN) / STD
    error = (noise - wanted).abs().max().item()
    hint = " Start with z = x at logsnrs[-1] and step towards logsnrs[0]; do not clip and do not rescale x."
    assert error < 0.1, f"encode() gives noise of spread {noise.std():.2f}, off by {error:.2f} from the known.{hint}"
    back = ex.ddim(perfect, noise, schedule(400), clip=False)
    assert (back - x).abs().max() < 0.05, "ddim() of an image's noise should give the image again"
