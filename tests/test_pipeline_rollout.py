"""Rollouts by samplers that have no noise of their own."""

import pytest
import torch

from models.keys import sample_key
from models.loading import load_generator
from models.paths import schedule
from models.samplers import SOLVERS, keyed_noise, walk
from pipeline.rl.rollout import Plan, rollout


@pytest.mark.parametrize("name", SOLVERS)
def test_a_rollout_without_noise_is_painted_by_its_solver(generator_folder, name):
    generator = load_generator(generator_folder)
    cond = generator.encode(["a red ring", "a blue cross"])
    plan = Plan.ode(tuple(schedule(4)), siblings=2, solver=name)
    found = rollout(generator, generator.predict, cond, ["p", "q"], (0,), plan, batch=3).latents
    keys = [sample_key(0, prompt, sibling, "start") for prompt in ("p", "q") for sibling in range(2)]
    twice = cond.repeated(2)
    with torch.no_grad():
        expected = walk(
            lambda x, t: generator.predict(x, t, twice), keyed_noise(keys, generator.latent_shape), schedule(4), name
        )
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
