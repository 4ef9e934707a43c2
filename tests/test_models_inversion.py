"""Inversion leads back to the noise that a picture was painted from."""

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMInverseScheduler

from models.inversion import Inversion, bdia, bdia_paint, easyinv, invert, noise_of
from models.loading import load_generator
from models.paths import noised, schedule
from models.samplers import ode, walk
from tests import vp
from tests.gaussian import Gaussian

TIMES = schedule(6, 1.5)


def painted(predict, noise):
    x = noise
    for t, s in pairwise(TIMES):
        x = ode(x, predict(x, t), t, s).x
    return x


@torch.no_grad()
def test_noise_is_found_again_the_nearer_the_more_iterations(generator_folder):
    generator = load_generator(generator_folder)
    cond = generator.encode(["a red ring", "a blue cross"])
    noise = torch.randn(2, *generator.latent_shape, generator=torch.Generator().manual_seed(0))

    def predict(x, t):
        return generator.predict(x, t, cond)

    latents = painted(predict, noise)
    away = [float((invert(predict, latents, TIMES, count) - noise).abs().max()) for count in (1, 3, 20)]
    assert away[0] > 2 * away[1] > 4 * away[2]
    assert away[2] < 1e-4
    again = painted(predict, invert(predict, latents, TIMES, 20))
    torch.testing.assert_close(again, latents, atol=1e-4, rtol=1e-4)


def test_one_iteration_is_ddim_inversion_in_closed_form():
    """On two steps of a Gaussian, whose velocity is linear."""
    x0 = torch.tensor([[0.3], [1.1]])
    half = x0 + 0.5 * Gaussian.velocity(x0, 0.5, 1.0)
    expected = half + 0.5 * Gaussian.velocity(half, 1.0, 1.0)
    found = invert(lambda x, t: Gaussian.velocity(x, t, 1.0), x0, schedule(2), iterations=1)
    assert found.flatten().tolist() == pytest.approx(expected.flatten().tolist())


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
STEPS = 10


def inverse() -> tuple[DDIMInverseScheduler, list[float]]:
    """In double precision, and the flow's times of its timesteps from the noise to the data."""
    scheduler = DDIMInverseScheduler(**BETAS)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(STEPS)
    rising = [vp.flow_time(float(scheduler.alphas_cumprod[t])) for t in scheduler.timesteps]
    return scheduler, [*reversed(rising), 0.0]


def test_ddim_inversion_is_that_of_diffusers_on_a_model_of_eps():
    scheduler, times = inverse()
    x_vp = vp.LATENTS
    for number, timestep in enumerate(scheduler.timesteps):
        t = times[-2 - number]
        x_vp = scheduler.step(vp.eps(x_vp, t / (1 - t)), timestep, x_vp).prev_sample
        mine = invert(vp.predict, vp.LATENTS, times[-2 - number :], 1, vp=True)
        torch.testing.assert_close(mine * vp.size(t), x_vp, atol=1e-9, rtol=1e-9)


def field(x: torch.Tensor, t: float) -> torch.Tensor:
    """A made-up velocity of a flow."""
    return torch.sin(x + t) - 0.3 * x.flip(-1)


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_noise_of_a_model_of_eps_is_the_eps_that_it_predicts(iterations):
    """Where eps is the same everywhere, so that each path is straight; the first time is one of training, below 1."""
    known, (_, times) = vp.LATENTS.flip(0), inverse()

    def predict(x_t, t):
        return (known - x_t) / (1 - t)

    assert times[0] < 0.95
    torch.testing.assert_close(noise_of(predict, vp.LATENTS, times, iterations, vp=True), known)


@pytest.mark.parametrize("case", ["flow", "vp"])
def test_pictures_are_painted_from_their_noise(case):
    predict, times, on_vp = CASES[case]
    noise = noise_of(predict, vp.LATENTS, times, 40, on_vp)
    torch.testing.assert_close(
        walk(predict, noised(vp.LATENTS, noise, times[0]), times), vp.LATENTS, atol=1e-6, rtol=1e-6
    )


CASES = {"flow": (field, TIMES, False), "vp": (vp.predict, inverse()[1], True)}


@pytest.mark.parametrize("case", CASES)
def test_a_fixed_point_reconstructs_better_than_ddim_inversion_and_bdia_exactly(case):
    predict, times, on_vp = CASES[case]
    away = []
    for method in (Inversion("ddim"), Inversion("fixed-point", iterations=4), Inversion("bdia", gamma=0.9)):
        found = method.invert(predict, vp.LATENTS, times, on_vp)
        away.append(float((method.paint(predict, found, times, on_vp) - vp.LATENTS).abs().max()))
    assert away[1] < away[0] / 3
    assert away[2] < 1e-5
    many = invert(predict, vp.LATENTS, times, 200, on_vp)
    torch.testing.assert_close(walk(predict, many, times), vp.LATENTS, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gamma", [0.7, 1.0])
def test_bdia_paints_and_inverts_without_loss(case, gamma):
    predict, times, on_vp = CASES[case]
    pair = bdia(predict, vp.LATENTS, times, gamma, on_vp)
    assert (bdia_paint(predict, *pair, times, gamma, on_vp) - vp.LATENTS).abs().max() < 1e-5
    again = bdia(predict, bdia_paint(predict, *pair, times, gamma, on_vp), times, gamma, on_vp)
    for mine, first in zip(again, pair, strict=True):
        torch.testing.assert_close(mine, first, atol=1e-5, rtol=1e-5)


def test_a_step_of_bdia_is_the_papers_on_a_variance_preserving_path():
    """z_next = z_before - (1 - gamma) (z_before - z) - gamma (ddim(z, back) - z) + (ddim(z, on) - z)."""
    times, gamma = [0.7, 0.5, 0.2], 0.8
    z_before, z = vp.LATENTS, vp.LATENTS.flip(0)
    t = times[1]
    signal, noise = (1 - t) * vp.size(t), t * vp.size(t)
    e = vp.eps(z, t / (1 - t))

    def ddim(to):
        return (1 - to) * vp.size(to) * (z - noise * e) / signal + to * vp.size(to) * e

    back, on = ddim(times[0]) - z, ddim(times[2]) - z
    expected = z_before - (1 - gamma) * (z_before - z) - gamma * back + on
    found = bdia_paint(vp.predict, z_before / vp.size(times[0]), z / vp.size(t), times, gamma, vp=True)
    torch.testing.assert_close(found * vp.size(times[2]), expected)


@pytest.mark.parametrize("case", CASES)
def test_easyinv_mixes_latents_with_those_before_them(case):
    predict, times, on_vp = CASES[case]
    plain = invert(predict, vp.LATENTS, times, 1, on_vp)
    torch.testing.assert_close(easyinv(predict, vp.LATENTS, times, keep=1.0, length=1.0, vp=on_vp), plain)
    torch.testing.assert_close(easyinv(predict, vp.LATENTS, times, start=1.0, vp=on_vp), plain)
    last = len(times) - 2  # the number of the step that is mixed
    before = invert(predict, vp.LATENTS, times[1:], 1, on_vp)
    found = easyinv(predict, vp.LATENTS, times, 0.4, (last - 0.5) / (last + 1), 1.0, on_vp)
    larger = vp.size(times[1]) / vp.size(times[0]) if on_vp else 1.0
    torch.testing.assert_close(found, 0.4 * plain + 0.6 * larger * before)


@pytest.mark.parametrize(("method", "calls"), [("ddim", 6), ("fixed-point", 18), ("easyinv", 6), ("bdia", 6)])
def test_the_network_is_asked_as_often_as_is_told(method, calls):
    asked = []

    def predict(x, t):
        asked.append(t)
        return field(x, t)

    Inversion(method, iterations=3).invert(predict, vp.LATENTS, TIMES)
    assert len(asked) == calls
    assert min(asked) > 0


def test_bdia_takes_two_steps():
    with pytest.raises(ValueError, match=r"^steps: bdia takes two or more"):
        Inversion("bdia").invert(field, vp.LATENTS, [1.0, 0.0])


@pytest.mark.parametrize(
    ("field_name", "value"),
    [("method", "none"), ("iterations", 0), ("keep", 0.0), ("gamma", 1.1), ("start", -0.1), ("length", 2.0)],
)
def test_what_is_out_of_range_is_told_by_name(field_name, value):
    with pytest.raises(ValueError, match=f"^{field_name}: "):
        Inversion(**{field_name: value})
