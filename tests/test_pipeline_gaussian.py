"""On a Gaussian with a quadratic reward the tuned mean goes to the optimum, which is known in closed form."""

import math

import numpy as np
import pytest

from models.paths import schedule
from pipeline.rl.awm import AWM, AWMConfig
from pipeline.rl.grpo import GRPO, GRPOConfig
from pipeline.rl.nft import NFT, NFTConfig
from tests.gaussian import BASE, GOAL, SPREAD, Gaussian, course, push, tuned

TIMES = np.linspace(0.02, 0.98, 2001)
PUSHES = np.array([push(float(t)) for t in TIMES])


@pytest.mark.parametrize(
    "settings",
    [
        {"sampler": "cps"},
        {"sampler": "sde"},
        {"sampler": "dance", "eta": 0.5},
        {"sampler": "ddim"},
        {"sampler": "cps", "fans": [8, 32]},
    ],
    ids=str,
)
def test_grpo_goes_to_the_optimum_of_reward_minus_kl(settings):
    """Where reward's gradient along the noisy steps is that of beta times the KL of the path."""
    beta, strength = 0.2, 1.0
    config = {"window": None, "fans": (), "kl": beta, "advantage_scale": "none", "advantage_limit": 1e6}
    settings = {key: tuple(value) if key == "fans" else value for key, value in settings.items()}
    algorithm = GRPO(GRPOConfig(**{**config, **settings}))
    offset, slope, noisy, growth = course(algorithm.rollout_plan(0, 0, tuple(schedule(5)), 256))
    curvature = strength * noisy * slope + beta * growth
    optimum = (strength * noisy * (GOAL - offset) + beta * growth * BASE) / curvature
    found = tuned(algorithm, Gaussian(2).painted, strength, curvature, 30, (5, 256))
    assert 0.2 < optimum < 0.8
    assert found == pytest.approx(optimum, abs=0.03)


def matched(weights: np.ndarray, strength: float, limit: float, kl: float) -> tuple[float, float]:
    """The optimum where the loss's reward term has `weights` at `TIMES`, and the curvature of one draw."""
    reward = float((weights * PUSHES**2).mean()) * SPREAD**2 * strength / limit
    anchor = kl * float((PUSHES**2).mean())
    return (reward * GOAL + anchor * BASE) / (reward + anchor), 2 * (reward + anchor)


def test_awm_goes_to_the_optimum_of_reward_minus_kl():
    """With weights 1 in place of t it would be E[reward] - kl KL / limit; t weighs the two sides differently."""
    strength, limit, kl = 1.0, 50.0, 0.003
    config = AWMConfig(huber=1.0, kl=kl, kl_average=0.0, advantage_scale="none", advantage_limit=limit)
    optimum, curvature = matched(TIMES, strength, limit, kl)
    found = tuned(AWM(config), Gaussian(4).drawn, strength, config.draws * curvature, 30, (5, 256))
    assert 0.2 < optimum < 0.8
    assert found == pytest.approx(optimum, abs=0.03)


def test_nft_goes_to_the_optimum_of_reward_minus_kl():
    """An error is divided by its mean size, which is t times a half-normal's mean when there are many dimensions."""
    strength, limit, kl = 0.05, 50.0, 2e-4
    config = NFTConfig(kl=kl, advantage_scale="none", advantage_limit=limit)
    size = SPREAD / np.sqrt((1 - TIMES) ** 2 * SPREAD**2 + TIMES**2) * math.sqrt(2 / math.pi)
    optimum, curvature = matched(TIMES / size, strength, limit, kl)
    found = tuned(NFT(config), Gaussian(64).drawn, strength, config.draws * curvature, 30, (5, 256))
    assert 0.2 < optimum < 0.8
    assert found == pytest.approx(optimum, abs=0.03)
