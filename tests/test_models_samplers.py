"""Samplers are those of diffusers step for step, keep the marginals of a mixture, and come to the ODE's solution."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from models.generator import sample
from models.keys import sample_key
from models.loading import load_generator
from models.paths import noised, schedule
from models.samplers import (
    SAMPLERS,
    SOLVERS,
    STOCHASTIC,
    Seen,
    calls,
    ddim,
    ddpm,
    dpm2m,
    keyed_noise,
    log_prob,
    ode,
    walk,
)
from pipeline.rl.rollout import Plan, rollout
from tests.gaussian import SPREAD, Gaussian
from tests.vp import LATENTS, eps, flow_time, predict, size

STEPS = 10
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def noise_of(step: int) -> torch.Tensor:
    return torch.randn(LATENTS.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def flow_times(scheduler) -> list[float]:
    """Of the scheduler's timesteps, and of the data."""
    return [*(flow_time(float(scheduler.alphas_cumprod[t])) for t in scheduler.timesteps), 0.0]


def exact(scheduler):
    """In double precision, over its timesteps."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.set_timesteps(STEPS)
    return scheduler


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_that_of_diffusers_on_a_model_of_eps(eta):
    scheduler = exact(DDIMScheduler(**BETAS))
    times = flow_times(scheduler)
    x_vp, x = LATENTS, LATENTS / size(times[0])
    for step, (timestep, (t, s)) in enumerate(zip(scheduler.timesteps, pairwise(times), strict=True)):
        known = {"variance_noise": noise_of(step)} if eta else {}
        x_vp = scheduler.step(eps(x_vp, t / (1 - t)), timestep, x_vp, eta=eta, **known).prev_sample
        x = ddim(x, predict(x, t), t, s, eta, noise_of(step)).x
        torch.testing.assert_close(x * size(s), x_vp, atol=1e-9, rtol=1e-9)
        if not eta:
            torch.testing.assert_close(walk(predict, LATENTS / size(times[0]), times[: step + 2]), x)


def test_ddpm_is_that_of_diffusers():
    scheduler = exact(DDPMScheduler(**BETAS))
    scheduler.one = scheduler.one.double()
    times = flow_times(scheduler)
    x_vp, x = LATENTS, LATENTS / size(times[0])
    for step, (timestep, (t, s)) in enumerate(zip(scheduler.timesteps, pairwise(times), strict=True)):
        random = torch.Generator().manual_seed(step)
        x_vp = scheduler.step(eps(x_vp, t / (1 - t)), timestep, x_vp, generator=random).prev_sample
        x = ddpm(x, predict(x, t), t, s, 0.0, noise_of(step)).x
        torch.testing.assert_close(x * size(s), x_vp, atol=1e-9, rtol=1e-9)


def test_dpm_solver_is_that_of_diffusers_on_a_model_of_eps():
    settings = {name: value for name, value in BETAS.items() if name != "clip_sample"}
    scheduler = DPMSolverMultistepScheduler(**settings)
    scheduler.set_timesteps(STEPS)
    times = [float(ratio / (1 + ratio)) for ratio in scheduler.sigmas]
    x_vp, x, seen = LATENTS.float(), LATENTS.float() / size(times[0]), None
    for timestep, (t, s) in zip(scheduler.timesteps, pairwise(times), strict=True):
        x_vp = scheduler.step(eps(x_vp, t / (1 - t)), timestep, x_vp).prev_sample
        v, seen = dpm2m(predict, x, t, s, seen)
        x = ode(x, v, t, s).x
        torch.testing.assert_close(x * size(s), x_vp, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(walk(predict, LATENTS.float() / size(times[0]), times, "dpm2m"), x)


def test_dpm_solver_is_that_of_diffusers_on_a_flow():
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0)
    scheduler.set_timesteps(STEPS)
    times = scheduler.sigmas.tolist()
    theirs, mine, seen = LATENTS.float(), LATENTS.float(), None
    for timestep, (t, s) in zip(scheduler.timesteps, pairwise(times), strict=True):
        theirs = scheduler.step(field(theirs, t), timestep, theirs).prev_sample
        v, seen = dpm2m(field, mine, t, s, seen)
        mine = ode(mine, v, t, s).x
        torch.testing.assert_close(mine, theirs, atol=2e-4, rtol=2e-4)


def field(x: torch.Tensor, t: float) -> torch.Tensor:
    """A made-up velocity of a flow."""
    return torch.sin(2 * x + t) - 0.3 * x.flip(-1)


def test_heun_is_that_of_diffusers():
    scheduler = FlowMatchHeunDiscreteScheduler(shift=2.0)
    scheduler.set_timesteps(STEPS)
    times = [*scheduler.timesteps.unique().flip(0).div(1000).tolist(), 0.0]
    theirs = LATENTS.float()
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(field(theirs, float(timestep) / 1000), timestep, theirs).prev_sample
    asked = []

    def counted(x, t):
        asked.append(t)
        return field(x, t)

    torch.testing.assert_close(walk(counted, LATENTS.float(), times, "heun"), theirs, atol=1e-5, rtol=1e-5)
    assert len(asked) == len(scheduler.timesteps) == calls("heun", STEPS)
    assert min(asked) > 0


@pytest.mark.parametrize(("name", "order"), [("ode", 1), ("heun", 2), ("dpm2m", 2)])
def test_errors_of_the_ode_shrink_with_the_order_of_the_method(name, order):
    """On a Gaussian, all of whose latents keep their place in it: the solution is linear in the first."""
    x, mean, (first, last) = torch.linspace(-2, 2, 9, dtype=torch.float64)[None], 1.0, (0.9, 0.1)

    def spread(t):
        return math.hypot((1 - t) * SPREAD, t)

    solution = (1 - last) * mean + (x - (1 - first) * mean) * spread(last) / spread(first)

    def away(steps):
        times = np.linspace(first, last, steps + 1).tolist()
        found = walk(lambda x, t: Gaussian.velocity(x, t, mean), x, times, name)
        return float((found - solution).abs().max())

    assert away(160) < 2e-2
    assert math.log2(away(80) / away(160)) == pytest.approx(order, abs=0.25)


WEIGHTS, MEANS, SPREADS = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 0.8]), torch.tensor([0.2, 0.4])


def mixture_velocity(x: torch.Tensor, t: float) -> torch.Tensor:
    """The mean velocity at `x` (N, 1), `t` of data from two Gaussians: each has its mean x0 given x, and its odds."""
    spread = ((1 - t) * SPREADS).square() + t * t
    away = x - (1 - t) * MEANS
    odds = (WEIGHTS.log() - 0.5 * away.square() / spread - 0.5 * spread.log()).softmax(-1)
    x0 = (odds * (MEANS + (1 - t) * SPREADS.square() / spread * away)).sum(-1, keepdim=True)
    return (x - x0) / t


@pytest.mark.parametrize("name", ["ddpm", "ddim", "sde", "dance"])
def test_stochastic_steps_keep_the_marginals_of_a_mixture_the_better_the_shorter(name):
    """Mean and variance at time 0.2 of what starts from noise."""
    random, count, last = torch.Generator().manual_seed(0), 100_000, 0.2
    start = torch.randn(count, 1, generator=random)
    centre = float((WEIGHTS * MEANS).sum())
    mean = (1 - last) * centre
    variance = (1 - last) ** 2 * float((WEIGHTS * (SPREADS**2 + MEANS**2)).sum() - centre**2) + last**2

    def away(steps):
        times = np.linspace(1.0, last, steps + 1).tolist()

        def noise(step):
            return torch.randn(count, 1, generator=torch.Generator().manual_seed(100 * steps + step))

        found = walk(mixture_velocity, start, times, name, 0.7, noise)
        return abs(found.mean().item() - mean), abs(found.var().item() - variance)

    coarse, fine = away(4), away(100)
    noise_of_mean, noise_of_variance = math.sqrt(variance / count), variance * math.sqrt(2 / count)
    assert fine[0] < 4 * noise_of_mean + 0.01
    assert fine[1] < 4 * noise_of_variance + 0.02
    assert sum(coarse) > 3 * sum(fine)


@pytest.mark.parametrize("name", ["cps", "ddim", "ddpm"])
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.6), (0.9, 0.2), (0.5, 0.1)])
def test_steps_that_preserve_coefficients_do_so_exactly(name, t, s):
    """With the velocity to one datum: the shares of the datum, and of old and new noise, are those of time s."""
    x0, noise, fresh = (one[None] for one in torch.eye(3, dtype=torch.float64))
    found = STOCHASTIC[name](noised(x0, noise, t), noise - x0, t, s, 0.7, fresh)
    signal, old, new = found.x[0].tolist()
    assert signal == pytest.approx(1 - s)
    assert math.hypot(old, new) == pytest.approx(s)
    assert new == pytest.approx(found.std)
    assert new > 0


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_step_is_drawn_from_its_own_gaussian(name):
    x, v = noised(LATENTS, LATENTS.flip(0), 0.7), LATENTS.flip(0) - LATENTS
    found = STOCHASTIC[name](x, v, 0.7, 0.5, 0.7, noise_of(0))
    torch.testing.assert_close((found.x - found.mean) / found.std, noise_of(0))
    normal = torch.distributions.Normal(found.mean, found.std)
    torch.testing.assert_close(
        log_prob(found.x, found.mean, found.std), normal.log_prob(found.x).flatten(1).mean(1), atol=1e-9, rtol=1e-9
    )
    assert torch.equal(STOCHASTIC[name](x, v, 0.7, 0.5, 0.7, None).x, found.mean)


@pytest.mark.parametrize("t", [1.0, 0.6])
def test_without_eta_ddim_is_the_ode_and_with_one_it_is_ddpm(t):
    x, v = noised(LATENTS, LATENTS.flip(0), t), LATENTS.flip(0) - LATENTS
    torch.testing.assert_close(ddim(x, v, t, 0.4, 0.0, noise_of(0)).x, ode(x, v, t, 0.4).x)
    ancestral = ddpm(x, v, t, 0.4, 0.3, noise_of(0))
    torch.testing.assert_close(ddim(x, v, t, 0.4, 1.0, noise_of(0)).x, ancestral.x)
    assert ddim(x, v, t, 0.0, 1.0, noise_of(0)).std == 0


def test_after_a_first_step_from_pure_noise_dpm_solver_has_nothing_to_extrapolate_from():
    v, seen = dpm2m(field, LATENTS, 0.8, 0.6, Seen(1.0, LATENTS.flip(0)))
    torch.testing.assert_close(v, field(LATENTS, 0.8))
    assert seen.t == 0.8


def test_an_unknown_sampler_is_told_with_those_known():
    with pytest.raises(ValueError, match=r"^sampler: unknown euler; known here: ode, .*dpm2m"):
        walk(field, LATENTS, [1.0, 0.0], "euler")


@pytest.mark.parametrize("name", [*SAMPLERS, *SOLVERS])
def test_pictures_belong_to_their_keys_whatever_the_sampler(generator_folder, name):
    generator = load_generator(generator_folder)
    prompts, keys = ["a red ring", "a blue cross", "a ring"], [3, 1, 2]
    whole = list(sample(generator, prompts, keys, 4, batch=3, sampler=name, eta=0.7))
    parts = list(sample(generator, prompts, keys, 4, batch=2, sampler=name, eta=0.7))
    for image, part in zip(whole, parts, strict=True):
        assert np.abs(image.astype(int) - part).max() <= 1  # sums of another batch round otherwise
    if name != "ode":
        plain = list(sample(generator, prompts, keys, 4))
        assert any(not np.array_equal(image, other) for image, other in zip(whole, plain, strict=True))


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
