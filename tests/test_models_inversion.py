"""Inversion leads back to the noise that a picture was painted from."""

from itertools import pairwise

import pytest
import torch

from models.generator import load_generator
from models.inversion import invert
from models.paths import schedule
from models.samplers import ode
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
