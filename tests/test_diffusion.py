"""common.py, part 1: identities of its formulas and of the network, and second implementations."""
import ast
import itertools
import math
import re
from functools import partial
from pathlib import Path

import common
import numpy as np
import pytest
import torch
from small import nowhere_zero

DOUBLE = dict(dtype=torch.float64)


def at(*logsnrs):
    return torch.tensor(logsnrs, **DOUBLE)


def test_schedule():
    t = torch.linspace(0, 1, 101, **DOUBLE)
    logsnr = common.logsnr_schedule(t, 64, 64)
    alpha, sigma = (a.flatten() for a in common.alpha_sigma(logsnr))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
    torch.testing.assert_close(2 * torch.log(alpha / sigma), logsnr)
    assert logsnr[[0, 50, 100]].tolist() == pytest.approx([15, 0, -15], abs=1e-6)
    assert (logsnr.diff() < 0).all()
    shift = common.logsnr_schedule(t, 256, 32) - logsnr
    torch.testing.assert_close(shift, torch.full_like(t, -2 * math.log(8)))


def test_eps_loss_is_alpha_squared_times_v_loss():
    """And the loss in eps is that of the eps_hat which v_pred stands for."""
    torch.manual_seed(0)
    x, eps, v_pred = torch.randn(3, 7, 3, 8, 8, **DOUBLE)
    logsnr = torch.linspace(-8, 8, 7, **DOUBLE)
    alpha, sigma = common.alpha_sigma(logsnr)
    in_eps = common.diffusion_loss(v_pred, x, eps, logsnr, "eps")
    torch.testing.assert_close(in_eps, torch.sigmoid(logsnr) * common.diffusion_loss(v_pred, x, eps, logsnr, "v"))
    eps_hat = sigma * (alpha * x + sigma * eps) + alpha * v_pred
    torch.testing.assert_close(in_eps, ((eps_hat - eps) ** 2).flatten(1).mean(1))
    assert common.diffusion_loss(alpha * eps - sigma * x, x, eps, logsnr, "v").max() < 1e-20


def test_ddpm_step_is_the_posterior_of_two_gaussians():
    """z_s ~ N(alpha_s x, sigma_s^2) and z_t = a z_s + N(0, beta): Bayes' rule gives z_s for z_t and x."""
    torch.manual_seed(0)
    x, z = torch.randn(2, 1, 3, 4, 4, **DOUBLE)
    logsnr_t, logsnr_s = at(-1.0), at(0.5)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = common.alpha_sigma(logsnr_t), common.alpha_sigma(logsnr_s)
    a = alpha_t / alpha_s
    beta = sigma_t**2 - a**2 * sigma_s**2
    variance = 1 / (1 / sigma_s**2 + a**2 / beta)
    mean = variance * (alpha_s * x / sigma_s**2 + a * z / beta)

    def step(noise, interpolation):
        return common.ddpm_step(z, x, logsnr_t, logsnr_s, torch.full_like(z, noise), interpolation)
    torch.testing.assert_close(step(0.0, 0), mean)
    torch.testing.assert_close(step(1.0, 0) - mean, variance.sqrt().expand_as(z))
    torch.testing.assert_close(step(1.0, 1) - mean, beta.sqrt().expand_as(z))            # the forward variance
    between = (variance.log() * 0.8 + beta.log() * 0.2).exp()
    torch.testing.assert_close(step(1.0, 0.2) - mean, between.sqrt().expand_as(z))


@pytest.mark.parametrize("interpolation, variance", [(0, "fixed_small"), (1, "fixed_large")])
def test_ddpm_step_equals_that_of_diffusers(interpolation, variance):
    diffusers = pytest.importorskip("diffusers", reason="requirements-dev.txt is not installed")
    logsnrs = common.logsnr_schedule(torch.linspace(0.05, 0.95, 10, **DOUBLE), 32, 32)   # of diffusers' times 0, ..., 9
    kept = torch.sigmoid(logsnrs)                                       # alpha^2
    betas = 1 - kept / torch.cat([torch.ones(1, **DOUBLE), kept[:-1]])
    theirs = diffusers.DDPMScheduler(10, trained_betas=betas.numpy(), prediction_type="v_prediction",
                                     variance_type=variance, clip_sample=False)
    z, v, noise = torch.randn(3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0), **DOUBLE)
    for t in (1, 5, 9):
        alpha, sigma = common.alpha_sigma(logsnrs[t:t + 1])
        ours = common.ddpm_step(z, alpha * z - sigma * v, logsnrs[t:t + 1], logsnrs[t - 1:t], noise, interpolation)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", lambda *shape, **options: noise)
            found = theirs.step(v, t, z).prev_sample
        torch.testing.assert_close(ours, found, atol=1e-4, rtol=1e-4)   # they keep their schedule in float32


def ideal_denoiser(mean, std):
    """The exact (z, logsnr) -> v for pixels of N(mean, std^2)."""
    def denoise(z, logsnr):
        alpha, sigma = common.alpha_sigma(logsnr)
        x_hat = mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z - alpha * mean)
        return (alpha * z - x_hat) / sigma
    return denoise


@pytest.mark.parametrize("interpolation", [0, 0.2])
def test_ddpm_recovers_a_gaussian(interpolation):
    torch.manual_seed(0)
    logsnrs = common.logsnr_schedule(torch.linspace(1, 0, 201, **DOUBLE), 32, 32)
    noise = partial(torch.randn, 64, 3, 16, 16, **DOUBLE)
    x = common.ddpm(ideal_denoiser(0.3, 0.5), noise, logsnrs, interpolation, clip=False)
    assert x.mean().item() == pytest.approx(0.3, abs=0.02)              # 49,152 pixels: 0.002 of sampling error
    assert x.std().item() == pytest.approx(0.5, rel=0.03)


def test_the_last_step_is_x_hat_and_clipping_holds():
    x = torch.linspace(-2, 2, 48, **DOUBLE).view(1, 3, 4, 4)
    for clip in (False, True):
        found = common.ddpm(ideal_denoiser(x, 0), lambda: torch.randn_like(x), at(-9.0, 0.0, 9.0), clip=clip)
        torch.testing.assert_close(found, x.clamp(-1, 1) if clip else x)


TOLD = {"both": {"cls": [5], "tokens": [4, 6]}, "film": {"cls": [5]}, "tokens": {"tokens": [4, 6]}, "none": {}}


def unet(cond, transformers=1):
    """A tiny U-ViT whose zeros are random too, so that everything reaches the output."""
    torch.manual_seed(0)
    return nowhere_zero(common.UViT(8, 1, (16, 32), (1, 2), transformers, TOLD[cond])).eval().requires_grad_(False)


def inputs(cond, n=3):
    torch.manual_seed(1)
    condition = {name: torch.randn(n, *shape) for name, shape in TOLD[cond].items()}
    return torch.randn(n, 3, 8, 8), torch.linspace(-5, 5, n), condition


def test_guidance():
    """w = 0 is conditional, -1 unconditional, and the prediction is affine in w."""
    model, (z, logsnr, condition) = unet("both"), inputs("both")
    v = {w: common.guide(model, w, condition)(z, logsnr) for w in (-1, 0, 2.5)}
    null = model(z, logsnr, drop=torch.ones(3, dtype=torch.bool), **condition)
    torch.testing.assert_close(v[0], model(z, logsnr, **condition))
    torch.testing.assert_close(v[-1], null)
    torch.testing.assert_close(v[2.5], v[0] + 2.5 * (v[0] - null), atol=1e-4, rtol=1e-4)
    assert (v[0] - null).abs().max() > 1e-2


def test_sample_images():
    """The times are u^P; an image comes back as the bytes that training would read."""
    images, seen = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8), []
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1

    def knows_x(z, logsnr, cls):
        seen.append(logsnr[0].item())
        return ideal_denoiser(x, 0)(z, logsnr)
    config = dict(size=8, noise_size=4, sample_steps=5, time_power=2, amp="none")
    generators = [common.generator("cpu", 0, i, 0, 1) for i in range(3)]
    assert np.array_equal(common.sample_images(knows_x, dict(cls=None), generators, 0, config), images)
    times = torch.tensor([1, 0.8, 0.6, 0.4, 0.2]) ** 2
    assert seen == pytest.approx(common.logsnr_schedule(times, 8, 4).tolist(), abs=1e-3)


@pytest.mark.parametrize("column, preset", [(1, "semantica64"), (2, "semantica256"), (3, "digits16"), (4, "full16")])
def test_presets_are_those_of_the_page(column, preset):
    """docs/differences.md names the source of every constant."""
    page = (Path(common.__file__).parent / "docs" / "differences.md").read_text()
    rows = re.findall(r"(?m)^\| `(\w+)` \| `(.+?)` \| `(.+?)` \| `(.+?)` \| `(.+?)` \|", page)
    assert {row[0]: ast.literal_eval(row[column]) for row in rows} == common.PRESETS[preset]


@pytest.mark.parametrize("preset", common.PRESETS)
def test_presets_on_the_meta_device(preset):
    """Shapes at full size without their memory, and as many blocks of each kind as the preset says."""
    p = common.PRESETS[preset]
    told = {"cls": [1280], "tokens": [49, 320]}
    with torch.device("meta"):
        model = common.UViT(p["size"], p["patch"], p["channels"], p["blocks"], p["transformers"], told)
        z, condition = torch.empty(2, 3, p["size"], p["size"]), {k: torch.empty(2, *shape) for k, shape in told.items()}
        v = model(z, torch.empty(2), **condition)
    assert v.shape == (2, 3, p["size"], p["size"])
    both_ways, lowest = p["blocks"][:-1], p["blocks"][-1]
    crossing = [m.cross is not None for m in model.modules() if isinstance(m, common.TransformerBlock)]
    assert sum(crossing) == lowest and len(crossing) == lowest + (p["transformers"] == 2) * 2 * both_ways[-1]
    assert sum(isinstance(m, common.ResBlock) for m in model.modules()) == 2 * sum(both_ways) + lowest - len(crossing)


def test_a_new_network_predicts_zero_and_its_convolutions_are_the_identity():
    torch.manual_seed(0)
    model = common.UViT(8, 2, (16, 32), (1, 1), 1, TOLD["both"])
    z, logsnr, condition = inputs("both")
    assert not model(z, logsnr, **condition).any()
    x = torch.randn(2, 16, 4, 4)
    assert torch.equal(model.down[0].blocks[0](x, torch.randn(2, 32)), x)


@pytest.mark.parametrize("cond", TOLD)
def test_the_condition_and_its_absence(cond):
    """Each part of the condition matters, a row does not see another row's, and dropped rows see the null condition."""
    model, (z, logsnr, condition) = unet(cond), inputs(cond)
    before, first = model(z, logsnr, **condition), torch.tensor([True, False, False])
    for name, value in condition.items():
        changed = condition | {name: torch.cat([value[:1] + 1, value[1:]])}
        difference = (model(z, logsnr, **changed) - before).abs().amax((1, 2, 3))
        assert difference[0] > 1e-3 and difference[1:].max() < 1e-5
        dropped = model(z, logsnr, drop=first, **condition)
        torch.testing.assert_close(model(z, logsnr, drop=first, **changed), dropped)
        torch.testing.assert_close(dropped[1:], before[1:])
        assert (dropped[0] - before[0]).abs().max() > 1e-3


def test_tokens_are_attended_with_their_positions():
    """Attention itself does not see the order of tokens; the positions that are added to them make it matter."""
    model, (z, logsnr, condition) = unet("tokens"), inputs("tokens")
    turned = dict(tokens=condition["tokens"].flip(1))
    before = model(z, logsnr, **condition)
    assert (model(z, logsnr, **turned) - before).abs().max() > 1e-4
    model.token_pos.copy_(model.token_pos.flip(0))
    torch.testing.assert_close(model(z, logsnr, **turned), before, atol=1e-5, rtol=1e-5)


def test_two_transformer_stages():
    """The upper one attends to itself only: distant pixels reach each other there, tokens do not."""
    model = unet("tokens", transformers=2)
    upper, emb = model.down[0], torch.zeros(1, 32)
    x = torch.randn(1, 16, 8, 8)
    before = upper(x, emb)
    x[:, :8, 0, 0] += 1
    assert (upper(x, emb) - before)[..., 7, 7].abs().max() > 1e-6
    torch.testing.assert_close(upper(x, emb, torch.randn(1, 4, 32)), upper(x, emb))


def test_standardise():
    x = np.random.default_rng(0).normal(3, [1, 2, 5, 0], (1000, 4)).astype(np.float32)
    layer = common.Standardise(4)
    layer.fit(x, np.arange(500))                                        # the first half is the training set
    y = layer(torch.from_numpy(x[:500]))
    assert y.mean(0).abs().max() < 1e-4 and (y.std(0)[:3] - 1).abs().max() < 2e-3
    assert layer.std[3] == 1                                            # a constant column keeps its scale
    assert layer(torch.tensor([[1e3, -1e3, 2, 0]])).tolist()[0][:2] == [10, -10]         # an odd image stays in range


def test_outputs_are_float32_under_autocast():
    model, (z, logsnr, condition) = unet("both"), inputs("both")
    plain = model(z, logsnr, **condition)
    with common.autocast(torch.device("cpu"), "bf16"):
        found = model(z, logsnr, **condition)
    assert found.dtype == torch.float32
    assert 0 < (found - plain).abs().max() < 0.1 * plain.abs().max()    # bfloat16 has three digits


def test_streams():
    """Every key has its own: training, (seed, step, image), never meets sampling, (seed, i, j, 1), or the prior."""
    keys = [*itertools.product(range(3), repeat=3)]
    keys += [(*key, purpose) for key in keys for purpose in (1, 2, 3, 4, 5)]
    assert len({common.generator("cpu", *key).initial_seed() for key in keys}) == len(keys)
    one, again = (torch.randn(4, generator=common.generator("cpu", 0, 1, 2)) for _ in range(2))
    assert torch.equal(one, again)
