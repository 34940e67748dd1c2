"""Identities of the diffusion code in common.py: schedule, loss, sampler, guidance, seeding."""
import math
from functools import partial

import common
import numpy as np
import pytest
import torch


def test_alpha_sigma_and_schedule_ends():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    logsnr = common.logsnr_schedule(t, 64, 64)
    alpha, sigma = (a.flatten() for a in common.alpha_sigma(logsnr))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    torch.testing.assert_close(2 * torch.log(alpha / sigma), logsnr)
    assert logsnr[0].item() == pytest.approx(15, abs=1e-6) and logsnr[-1].item() == pytest.approx(-15, abs=1e-6)
    assert (logsnr.diff() < 0).all()
    assert abs(logsnr[50].item()) < 1e-9                               # alpha = sigma in the middle of the plain cosine


def test_schedule_shift_is_exact():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shift = common.logsnr_schedule(t, 256, 32) - common.logsnr_schedule(t, 256, 256)
    torch.testing.assert_close(shift, torch.full_like(t, 2 * math.log(32 / 256)))


def test_eps_loss_is_alpha_squared_times_v_loss():
    torch.manual_seed(0)
    x, eps, v_pred = torch.randn(3, 7, 3, 8, 8, dtype=torch.float64)
    logsnr = torch.linspace(-8, 8, 7, dtype=torch.float64)
    v_loss = common.diffusion_loss(v_pred, x, eps, logsnr, "v")
    eps_loss = common.diffusion_loss(v_pred, x, eps, logsnr, "eps")
    torch.testing.assert_close(eps_loss, torch.sigmoid(logsnr) * v_loss)
    alpha, sigma = common.alpha_sigma(logsnr)
    assert common.diffusion_loss(alpha * eps - sigma * x, x, eps, logsnr, "eps").max() < 1e-20   # the true v has no loss


def test_time_power_bends_the_time_and_keeps_its_ends():
    config = dict(network=dict(size=64), noise_size=32)
    u = torch.linspace(0, 1, 5, dtype=torch.float64)
    plain, bent = (common.sampling_schedule(dict(config, time_power=p))(u) for p in (1, 1.5))
    assert torch.equal(plain, common.logsnr_schedule(u, 64, 32)) and torch.equal(plain[[0, -1]], bent[[0, -1]])
    assert (bent[1:-1] > plain[1:-1]).all()                            # less noise at the same step


def schedule(t):
    return common.logsnr_schedule(t.double(), 32, 32)


def test_sampler_with_an_oracle_recovers_the_image():
    """With x_hat = x and the exact posterior variance every z on the way is alpha x + sigma eps, and the last x_hat is x."""
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64, dtype=torch.float64) * 2 - 1

    def oracle(z, logsnr):                                             # x_hat = alpha z - sigma v = x
        alpha, sigma = common.alpha_sigma(logsnr)
        eps = (z - alpha * x) / sigma
        assert abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.03
        return (alpha * z - x) / sigma

    z = torch.randn_like(x)
    recovered = common.sampling_loop(oracle, z, lambda: torch.randn_like(z), 10, schedule,
                                     partial(common.ddpm_step, interpolation=0))
    torch.testing.assert_close(recovered, x)


def test_sampler_on_a_gaussian():
    """Pixels from N(m, s^2): the posterior mean is linear in z, so the samples' mean and variance follow a recursion."""
    torch.manual_seed(0)
    m, s, steps = 0.3, 0.5, 200

    def denoise(z, logsnr):
        alpha, sigma = common.alpha_sigma(logsnr)
        x_hat = m + alpha * s**2 / (alpha**2 * s**2 + sigma**2) * (z - alpha * m)
        return (alpha * z - x_hat) / sigma

    z = torch.randn(64, 3, 32, 32, dtype=torch.float64)
    x = common.sampling_loop(denoise, z, lambda: torch.randn_like(z), steps, schedule, clip=False)

    mean, var = 0.0, 1.0                                               # a second computation, scalar by scalar
    logsnrs = schedule(torch.linspace(1, 0, steps + 1)).tolist()
    for i, (lt, ls) in enumerate(zip(logsnrs, logsnrs[1:])):
        at2, as2 = 1 / (1 + math.exp(-lt)), 1 / (1 + math.exp(-ls))
        gain = math.sqrt(at2) * s**2 / (at2 * s**2 + 1 - at2)
        if i == steps - 1:
            mean, var = m + gain * (mean - math.sqrt(at2) * m), gain**2 * var
            break
        r = math.exp(lt - ls)
        a = r * math.sqrt(as2 / at2) + (1 - r) * math.sqrt(as2) * gain
        b = (1 - r) * math.sqrt(as2) * (m - gain * math.sqrt(at2) * m)
        noise = (1 - r) * (1 - at2) ** 0.2 * (1 - as2) ** 0.8
        mean, var = a * mean + b, a**2 * var + noise
    n = x.numel()
    assert x.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(var / n))
    assert x.var().item() == pytest.approx(var, rel=5 * math.sqrt(2 / n))
    assert mean == pytest.approx(m, abs=0.01) and var == pytest.approx(s**2, rel=0.05)   # and that is the data's


@pytest.mark.parametrize("interpolation", [0.0, 1.0])
def test_interpolation_gives_the_two_posterior_variances(interpolation):
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    still = lambda z, logsnr: torch.zeros_like(z)  # noqa: E731        # v = 0, so the last x_hat is alpha_s z_s
    step = partial(common.ddpm_step, interpolation=interpolation)
    run = [common.sampling_loop(still, one, lambda k=k: k * one, 2, schedule, step, clip=False).item() for k in (0, 1)]
    logsnr_t, logsnr_s = schedule(torch.tensor([1.0, 0.5])).tolist()
    alpha_s2, sigma_s2, sigma_t2 = 1 / (1 + math.exp(-logsnr_s)), 1 / (1 + math.exp(logsnr_s)), 1 / (1 + math.exp(logsnr_t))
    variance = ((run[1] - run[0]) ** 2) / alpha_s2
    assert variance == pytest.approx((sigma_t2 if interpolation else sigma_s2) * (1 - math.exp(logsnr_t - logsnr_s)))


def gaussian(mean, std):
    """The exact denoiser (z, logsnr) -> v of pixels from N(mean, std^2), and where the noise-free path from z at t = 1 goes."""
    def denoise(z, logsnr):
        alpha, sigma = common.alpha_sigma(logsnr)
        x_hat = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z - alpha * mean)
        return (alpha * z - x_hat) / sigma

    def path(z, start, logsnr):                                        # (z - alpha m) / sqrt(alpha^2 s^2 + sigma^2) stays
        (alpha, sigma), (a, b) = common.alpha_sigma(logsnr), common.alpha_sigma(start)
        return alpha * mean + (z - a * mean) * ((alpha**2 * std**2 + sigma**2) / (a**2 * std**2 + b**2)).sqrt()
    return denoise, path


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm++", 2)])
def test_samplers_without_noise_follow_the_closed_form_path(sampler, order):
    """Of a Gaussian: the error falls like 1 / steps^order."""
    denoise, path = gaussian(0.3, 0.5)
    z, ends = torch.tensor([-1.5, 0.2, 2.0], dtype=torch.float64)[:, None, None, None], lambda t: 6 - 12 * t.double()

    def error(steps):
        seen = []

        def record(z, logsnr):
            seen.append((z, logsnr[:1]))
            return denoise(z, logsnr)
        common.sampling_loop(record, z, None, steps, ends, common.SAMPLERS[sampler], clip=False)
        return max((z_t - path(z, seen[0][1], logsnr)).abs().max().item() for z_t, logsnr in seen)

    coarse, fine = error(64), error(128)
    assert fine < 0.02 and coarse / fine == pytest.approx(2**order, rel=0.15)


def test_dpm_solver_extrapolates_to_the_middle_of_the_step():
    """Begins with DDIM; then, of an x_hat linear in logsnr, it is DDIM with x_hat halfway, however long the step before was."""
    z, last, now, then = torch.randn(2, 3, 4, 4), torch.tensor([-4.0]), torch.tensor([-1.0]), torch.tensor([1.0])
    step, x_hat = (now, then, None), lambda logsnr: 0.1 * logsnr * z + 0.2  # noqa: E731
    torch.testing.assert_close(common.dpm_solver_step(z, x_hat(now), *step), common.ddim_step(z, x_hat(now), *step))
    found = common.dpm_solver_step(z, x_hat(now), *step, before=(x_hat(last), last))
    torch.testing.assert_close(found, common.ddim_step(z, x_hat((now + then) / 2), *step))


@pytest.mark.parametrize("sampler", ["ddim", "dpm++"])
def test_samplers_equal_those_of_diffusers(sampler):
    diffusers, n = pytest.importorskip("diffusers", reason="requirements-dev.txt is not installed"), 12
    grid = schedule(torch.linspace(0.03, 0.97, n + 1))                 # logsnr of diffusers' time steps 0, 1, ..., n
    kept = torch.sigmoid(grid)                                         # alpha^2
    betas = 1 - kept / torch.cat([torch.ones(1, dtype=kept.dtype), kept[:-1]])
    common_flags = dict(num_train_timesteps=n + 1, trained_betas=betas.numpy(), prediction_type="v_prediction")
    if sampler == "ddim":
        theirs = diffusers.DDIMScheduler(**common_flags, clip_sample=False, timestep_spacing="linspace", set_alpha_to_one=True)
        theirs.set_timesteps(n + 1)
        grid = torch.cat([grid[:1] + 1, grid])                         # it steps from 0 too; where to, x_hat does not care
    else:
        theirs = diffusers.DPMSolverMultistepScheduler(**common_flags, lower_order_final=False)
        theirs.set_timesteps(n)
    net = lambda z, logsnr: torch.sin(3 * z + logsnr[:, None, None, None])  # noqa: E731
    torch.manual_seed(0)
    z = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    steps = len(grid) - 1
    ours = common.sampling_loop(net, z, None, steps, lambda t: grid[(t * steps).round().long()], common.SAMPLERS[sampler], False)
    for t in theirs.timesteps:
        logsnr = grid[t + (sampler == "ddim")].expand(2)
        z = theirs.step(net(z, logsnr), t, z).prev_sample
    torch.testing.assert_close(ours, z, atol=1e-4, rtol=1e-4)          # they keep their schedule in float32


def test_time_is_the_inverse_of_the_schedule():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(common.time_of(common.logsnr_schedule(t, 64, 32), 64, 32), t)


def test_guidance_in_an_interval():
    model = random_unet("both")
    z, logsnr, condition = inputs()
    plain, guided = (common.guide(model, w, **condition)(z, logsnr) for w in (0, 2))
    level = logsnr[0].item()
    for interval, expected in (((level, level + 1), guided), ((level - 1, level), plain), ((level + 0.1, level + 1), plain)):
        assert torch.equal(common.guide(model, 2, interval=interval, **condition)(z, logsnr), expected)


def test_damping_keeps_the_shared_direction():
    """eps of the null on the first singular vector; equal predictions are left as they are."""
    torch.manual_seed(0)
    z, v_cond, v_null = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    logsnr = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    alpha, sigma = common.alpha_sigma(logsnr)
    found = (sigma * z + alpha * common.damp(v_cond, v_null, z, logsnr)).flatten(1)
    for cond, null, damped in zip((sigma * z + alpha * v_cond).flatten(1), (sigma * z + alpha * v_null).flatten(1), found):
        first = torch.linalg.svd(torch.stack([null, cond]), full_matrices=False).Vh[0]
        torch.testing.assert_close(damped, (null @ first) * first)
    torch.testing.assert_close(common.damp(v_cond, v_cond, z, logsnr), v_cond)


def test_condition_annealing():
    """Nothing below `low`; above it noisy values, brought back to the mean and s.d. of each row."""
    model, (z, _, condition) = random_unet("both"), inputs()
    model.cls_norm.fit(np.random.default_rng(0).normal(2, 3, (50, 5)))
    config = dict(network=dict(size=64), noise_size=32)
    at = lambda t: common.logsnr_schedule(torch.tensor([t]), 64, 32)  # noqa: E731
    drawn = []

    def noise(y):
        drawn.append(y.ndim)
        return torch.sin(torch.arange(y.numel()).float()).view_as(y)

    anneal = partial(common.cads, model, config, noise)
    assert anneal(1.0)(condition, at(0.5)) is condition
    given = dict(similarity=torch.ones(len(z)), tokens=condition["tokens"], cls=condition["cls"])
    noisy = anneal(0.5)(given, at(0.8))
    assert noisy["similarity"] is given["similarity"] and not torch.allclose(noisy["tokens"], given["tokens"].float())
    assert drawn == [2, 3]                                             # cls before tokens, whatever the order of the names
    y, gamma = model.cls_norm(condition["cls"]), 1 / 3                 # (0.9 - 0.8) / (0.9 - 0.6)
    n = math.sqrt(gamma) * y + 0.5 * math.sqrt(1 - gamma) * noise(y)
    expected = torch.stack([(row - row.mean()) / row.std() * own.std() + own.mean() for row, own in zip(n, y)])
    torch.testing.assert_close(model.cls_norm(noisy["cls"]), expected, atol=1e-4, rtol=1e-4)


def test_the_dial_is_one_more_condition():
    """nan is no similarity, a dropped row has none either, and another similarity is another prediction."""
    torch.manual_seed(0)
    model = common.UViT(8, 1, (16, 32), (1, 2), "film", cls_dim=5, dial=True).eval().requires_grad_(False)
    for p in model.parameters():
        if not p.any():
            p.normal_(0, 0.1)
    z, logsnr, condition = inputs()
    none, some, more = (model(z, logsnr, condition["cls"], similarity=torch.full((3,), s)) for s in (math.nan, 0.2, 0.9))
    assert not torch.allclose(none, some) and not torch.allclose(some, more)
    drop = torch.tensor([True, False, False])
    dropped = [model(z, logsnr, condition["cls"], drop=drop, similarity=torch.full((3,), s)) for s in (math.nan, 0.9)]
    torch.testing.assert_close(dropped[0][0], dropped[1][0])
    torch.testing.assert_close(dropped[1][1:], more[1:])


def test_guidance_zero_is_conditional_and_minus_one_unconditional():
    model = random_unet("both")
    z, logsnr, condition = inputs()
    v = {w: common.guide(model, w, **condition)(z, logsnr) for w in (-1, 0, 1)}
    drop = torch.ones(len(z), dtype=torch.bool)
    torch.testing.assert_close(v[0], model(z, logsnr, **condition))
    torch.testing.assert_close(v[-1], model(z, logsnr, drop=drop, **condition))
    torch.testing.assert_close(v[1], 2 * v[0] - v[-1], atol=1e-5, rtol=1e-4)


def test_a_sample_is_the_papers_by_default():
    """sample() without further words: the ancestral loop, written out, of (1 + w) cond - w null with x_hat clipped."""
    model, (_, _, condition), steps, w = random_unet("both"), inputs(), 6, 1.5
    config = dict(network=dict(size=8), noise_size=8, time_power=1)
    draws = [torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(steps)]
    found = common.sample(model, config, condition, w, iter(draws).__next__, steps, "none")
    z, null = draws[0], torch.ones(3, dtype=torch.bool)
    logsnr = common.logsnr_schedule(torch.linspace(1, 0, steps + 1), 8, 8)
    for i in range(steps):
        (alpha, sigma), here = common.alpha_sigma(logsnr[i:i + 1]), logsnr[i].expand(3)
        v = (1 + w) * model(z, here, **condition) - w * model(z, here, drop=null, **condition)
        x_hat = (alpha * z - sigma * v).clamp(-1, 1)
        if i < steps - 1:
            (alpha_s, sigma_s), r = common.alpha_sigma(logsnr[i + 1:i + 2]), (logsnr[i] - logsnr[i + 1]).exp()
            std = (1 - r).sqrt() * sigma ** 0.2 * sigma_s ** 0.8
            z = r * alpha_s / alpha * z + (1 - r) * alpha_s * x_hat + std * draws[i + 1]
    assert abs(found.astype(int) - common.to_uint8(x_hat).astype(int)).max() <= 1 and found.std() > 10


def random_unet(cond):
    """A tiny U-ViT whose zero-initialised layers are random too, so that everything reaches the output."""
    torch.manual_seed(0)
    model = common.UViT(8, 1, (16, 32), (1, 2), cond, cls_dim=5, token_shape=(4, 6)).eval().requires_grad_(False)
    for p in model.parameters():
        if not p.any():
            p.normal_(0, 0.1)
    return model


def inputs(n=3):
    torch.manual_seed(1)
    return torch.randn(n, 3, 8, 8), torch.linspace(-5, 5, n), dict(cls=torch.randn(n, 5), tokens=torch.randn(n, 4, 6).half())


@pytest.mark.parametrize("cond,read", [("tokens", {"tokens"}), ("film", {"cls"}), ("both", {"cls", "tokens"}), ("none", set())])
def test_the_condition_reaches_the_output(cond, read):
    model = random_unet(cond)
    z, logsnr, condition = inputs()
    before = model(z, logsnr, **condition)
    for name in ("cls", "tokens"):
        changed = model(z, logsnr, **{**condition, name: condition[name] + 1})
        assert (not torch.equal(before, changed)) == (name in read)
    nothing = torch.ones(len(z), dtype=torch.bool)
    null = model(z, logsnr, drop=nothing, **condition)
    assert torch.equal(null, model(z, logsnr, drop=nothing, **{k: c + 1 for k, c in condition.items()}))   # dropped = null
    assert torch.equal(null, before) == (cond == "none")


@pytest.mark.parametrize("preset", common.PRESETS)
def test_preset_shapes_on_the_meta_device(preset):
    p = common.PRESETS[preset]
    with torch.device("meta"):
        model = common.UViT(p["size"], p["patch"], p["channels"], p["blocks"], "both", 1280, (49, 320))
        v = model(torch.empty(2, 3, p["size"], p["size"]), torch.empty(2), torch.empty(2, 1280), torch.empty(2, 49, 320))
    assert v.shape == (2, 3, p["size"], p["size"]) and v.dtype == torch.float32


def test_an_image_does_not_depend_on_its_batch():
    model = random_unet("both")
    _, _, condition = inputs(6)
    condition = {k: c[:1].expand(6, *c.shape[1:]).contiguous() for k, c in condition.items()}

    def sample(rows):
        streams = [common.generator("cpu", 0, 5, j) for j in rows]
        noise = lambda: common.randn(streams, (3, 8, 8))  # noqa: E731
        own = {k: c[:len(rows)] for k, c in condition.items()}
        return common.sampling_loop(common.guide(model, 1, **own), noise(), noise, 5, lambda t: schedule(t).float())

    whole = sample(range(6))
    torch.testing.assert_close(torch.cat([sample([0, 1, 2, 3]), sample([4, 5])]), whole, atol=1e-5, rtol=0)
    assert not torch.equal(whole[0], whole[1])


def test_a_generator_depends_on_all_of_its_key():
    draws = {key: torch.randn(4, generator=common.generator("cpu", *key)) for key in [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1)]}
    assert len({tuple(d.tolist()) for d in draws.values()}) == 4
    assert torch.equal(draws[0, 1, 2], torch.randn(4, generator=common.generator("cpu", 0, 1, 2)))


def test_standardise():
    x = torch.from_numpy(np.random.default_rng(0).normal(3, [1, 2, 5], (1000, 3)).astype(np.float32))
    layer = common.Standardise(3)
    layer.fit(x)
    y = layer(x)
    assert y.mean(0).abs().max() < 1e-4 and (y.std(0) - 1).abs().max() < 2e-3
