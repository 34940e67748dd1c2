"""beyond/: samplers and guidance against closed forms and numpy, and both scripts from the command line."""
import json
import math

import numpy as np
import pytest
import torch
from conftest import done, run
from small import nowhere_zero

import beyond
import common
from beyond import sample as other

LEVELS = torch.linspace(-6, 6, 129, dtype=torch.float64)


def tiny_unet(dial=0):
    """A tiny U-ViT whose zero-initialised layers are random too, so that everything reaches the output; and inputs."""
    torch.manual_seed(0)
    model = nowhere_zero(common.UViT(8, 1, (16, 32), (1, 2), 1, {"cls": [5 + dial], "tokens": [4, 5]}))
    z, logsnr = torch.randn(3, 3, 8, 8), torch.full((3,), 0.5)
    return model.eval().requires_grad_(False), z, logsnr, {"cls": torch.randn(3, 5), "tokens": torch.randn(3, 4, 5)}


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm++", 2)])
def test_samplers_without_noise_follow_the_closed_form_path(sampler, order):
    """Of pixels from N(0.3, 0.5^2): the denoiser is exact, and the error falls like 1 / steps^order."""
    z = torch.tensor([-1.5, 0.2, 2.0], dtype=torch.float64)[:, None, None, None]

    def error(steps):
        worst, logsnrs = 0, LEVELS[::128 // steps]
        spread = (0.25 * torch.sigmoid(logsnrs) + torch.sigmoid(-logsnrs)).sqrt()        # s.d. of z at each level

        def denoise(z_t, logsnr):
            nonlocal worst
            alpha, sigma = common.alpha_sigma(logsnr)
            now = (0.25 * alpha**2 + sigma**2).sqrt()
            begun = common.alpha_sigma(logsnrs[:1])[0]
            path = 0.3 * alpha + (z - 0.3 * begun) * now / spread[0]  # (z - alpha mean) / s.d. is constant along it
            worst = max(worst, (z_t - path).abs().max().item())
            x_hat = 0.3 + 0.25 * alpha / now**2 * (z_t - 0.3 * alpha)
            return (alpha * z_t - x_hat) / sigma

        other.sample(denoise, lambda: z, logsnrs, sampler, clip=False)
        return worst

    assert error(128) < 0.02 and error(64) / error(128) == pytest.approx(2**order, rel=0.15)


def test_an_interval_of_guidance():
    model, z, logsnr, condition = tiny_unet()
    plain, guided = (common.guide(model, w, condition)(z, logsnr) for w in (0, 2))
    for interval, expected in (((0.5, 1), guided), ((-9, 9), guided), ((-9, 0.5), plain), ((1, 9), plain)):
        assert torch.equal(other.guide(model, 2, condition, interval)(z, logsnr), expected)


def test_tangential_damping_against_numpy():
    """The eps_hat of the null on the first singular vector of both; equal predictions are left as they are."""
    torch.manual_seed(0)
    z, v_cond, v_null = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    logsnr = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    alpha, sigma = common.alpha_sigma(logsnr)
    eps_hat = [(sigma * z + alpha * v).flatten(1).numpy() for v in (v_null, v_cond)]
    found = (sigma * z + alpha * other.damp(v_cond, v_null, z, logsnr)).flatten(1).numpy()
    for null, cond, damped in zip(*eps_hat, found):
        first = np.linalg.svd(np.stack([null, cond]), full_matrices=False)[2][0]
        np.testing.assert_allclose(damped, null @ first * first)
    torch.testing.assert_close(other.damp(v_cond, v_cond, z, logsnr), v_cond)


def test_condition_annealing_keeps_mean_and_standard_deviation():
    """Of the standardised condition, row by row. Below t = 0.6 there is no noise, above 0.9 nothing else."""
    model, _, _, condition = tiny_unet(beyond.DIAL)
    model.norm["cls"].mean[:5], model.norm["cls"].std[:5] = 2, 3
    condition["similarity"] = torch.ones(3)
    levels = common.logsnr_schedule(torch.tensor([0.59, 0.75, 0.91]), 64, 32)
    torch.testing.assert_close(other.time_of(levels, 64, 32), torch.tensor([0.59, 0.75, 0.91]))
    generators = [common.generator("cpu", i) for i in range(3)]
    anneal = other.cads(model.norm, dict(size=64, noise_size=32), generators, 0.5)
    assert anneal(condition, levels[:1]) is condition
    noisy = anneal(condition, levels[1:2])
    assert noisy["similarity"] is condition["similarity"]
    for name, standardise in (("cls", lambda y: (y - 2) / 3), ("tokens", lambda y: y)):
        before, after = (standardise(c[name]).flatten(1) for c in (condition, noisy))
        torch.testing.assert_close(torch.std_mean(after, 1), torch.std_mean(before, 1))
        assert (torch.cosine_similarity(before - before.mean(1, True), after - after.mean(1, True)) < 0.999).all()
    for generator in generators:
        generator.manual_seed(0)
    noise = anneal(condition, levels[2:])["tokens"].flatten(1)
    assert torch.corrcoef(noise)[0, 1] > 0.99                          # two conditions, one noise: nothing else is left


def test_the_dial_reaches_the_network_and_without_it_the_network_is_plain():
    model, z, logsnr, condition = tiny_unet(beyond.DIAL)
    network = other.with_dial(model)
    none, some, more = (network(z, logsnr, similarity=torch.full((3,), s), **condition) for s in (math.nan, 0.2, 0.9))
    assert not torch.allclose(none, some) and not torch.allclose(some, more)
    plain, *_ = tiny_unet()
    weights = {name: w[:, :5] if name == "cls_in.weight" else w[:5] if name.startswith("norm.cls") else w
               for name, w in model.state_dict().items()}
    plain.load_state_dict(weights)
    torch.testing.assert_close(none, plain(z, logsnr, **condition))
    null = [network(z, logsnr, similarity=torch.full((3,), s), drop=logsnr > 0, **condition) for s in (math.nan, 0.9)]
    torch.testing.assert_close(*null)                                  # the null condition has no similarity


def test_the_scripts(tiny_data):
    """beyond.sample draws the bits of 05 without further flags. beyond.dial trains a model that --similarity steers."""
    common_flags = ("--data", tiny_data, "--sample-steps", 4, "--variations", 2, "--device", "cpu")
    done("04_train_pairs.py", "--data", tiny_data, "--steps", 4, "--batch", 4, "--device", "cpu")
    done("-m beyond.dial", "--data", tiny_data, "--steps", 4, "--batch", 4, "--device", "cpu")

    def draw(script, out, *flags):
        done(script, *common_flags, "--out", tiny_data / out, *flags)
        return np.load(tiny_data / out / "samples.npy", allow_pickle=False)

    papers = draw("05_sample.py", "papers")
    assert np.array_equal(draw("-m beyond.sample", "same"), papers)
    flags = "--sampler dpm++ --guidance-interval -9 9 --cads 0.25 --tcfg"
    assert not np.array_equal(draw("-m beyond.sample", "other", *flags.split()), papers)
    assert json.loads((tiny_data / "other/samples.json").read_text())["variant"] == "dpm++ -9to9 cads0.25 tcfg"

    dial = ("--checkpoint", tiny_data / "dial.pt")
    free = draw("-m beyond.sample", "free", *dial)
    asked = draw("-m beyond.sample", "asked", *dial, "--similarity", 1, 0.2)
    assert not np.array_equal(asked[:, 0], free[:, 0]) and not np.array_equal(asked[:, 1], free[:, 1])
    weights = common.load(tiny_data / "dial.pt")["model"]
    cls = common.load(tiny_data / "cls.npy")[common.load(tiny_data / "split.npy") == 0]
    np.testing.assert_allclose(weights["norm.cls.mean"][:6], cls.mean(0), atol=1e-6)
    assert not weights["norm.cls.mean"][6:].any() and (weights["norm.cls.std"][6:] == 1).all()

    refused = run("-m beyond.sample", *common_flags, "--out", tiny_data / "no", "--similarity", 1)
    assert refused.returncode == 2 and "no dial" in refused.stderr
