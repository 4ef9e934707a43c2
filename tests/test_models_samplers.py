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
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from models.generator import sample
from models.keys import sample_key
from models.loading import load_generator
from models.paths import Parametrisation, noised, velocity
from models.samplers import (
    SAMPLERS,
    SOLVERS,
    STOCHASTIC,
    Seen,
    calls,
    cps,
    dance,
    ddim,
    ddpm,
    dpm2m,
    gaussian_kl,
    keyed_noise,
    log_prob,
    ode,
    sde,
    walk,
)
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


def sanas(steps: int) -> list[float]:
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.tolist()


@pytest.mark.parametrize("steps", [4, 10, 40])
@pytest.mark.parametrize("times", [Parametrisation("flow", "eps").times, Parametrisation("flow", "score").times, sanas])
def test_a_first_step_from_a_little_below_one_is_as_noisy_as_one_from_one(times, steps):
    """Paths of eps and score start at 0.995, Sana's at 0.9997. The velocity is that to one datum."""
    t, s, *_ = times(steps) if times is sanas else times(steps, 1.0)
    assert 0.99 < t < 1
    x0, noise, fresh = (one[None] for one in torch.eye(3, dtype=torch.float64))
    found = sde(noised(x0, noise, t), noise - x0, t, s, 0.7, fresh)
    signal, old, new = found.x[0].tolist()
    assert signal == pytest.approx(1 - s)
    assert math.hypot(old, new) == pytest.approx(s, abs=0.15)
    assert 0.4 < new < 0.7


@pytest.mark.parametrize("eta", [-0.1, 1.3])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_eta_is_between_0_and_1(name, eta):
    with pytest.raises(ValueError, match=f"^eta: {eta} is not between 0 and 1"):
        walk(field, LATENTS, [1.0, 0.0], name, eta)


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


@pytest.fixture
def flow():
    random = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 3, 8, 8, generator=random) for _ in range(2))
    return x0, noise


def test_euler_steps_are_those_of_diffusers(flow):
    x, v = flow
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=[1.0, 0.6, 0.25])
    mine = x
    for i, t in enumerate(theirs.timesteps):
        s = float(theirs.sigmas[i + 1])
        mine = ode(mine, v, float(theirs.sigmas[i]), s).x
        x = theirs.step(v, t, x).prev_sample
    assert torch.allclose(mine, x, atol=1e-5)


@pytest.mark.parametrize("name", ["sde", "dance", "cps"])
@pytest.mark.parametrize("t", [1.0, 0.6])
def test_without_eta_every_sampler_is_the_ode(flow, name, t):
    x0, noise = flow
    x, v = noised(x0, noise, t), velocity(x0, noise)
    expected = ode(x, v, t, 0.4).x
    found = SAMPLERS[name](x, v, t, 0.4, 0.0, torch.randn_like(x))
    assert torch.allclose(found.x, expected, atol=1e-5)
    assert found.std == 0


def test_cps_keeps_the_marginal_exactly_and_the_sdes_in_the_limit():
    """With the true velocity of one datum, x_s must be (1 - s) x0 + s eps with eps standard normal."""
    x0 = torch.full((200_000, 1), 0.7)
    random = torch.Generator().manual_seed(0)
    noise, fresh = (torch.randn(x0.shape, generator=random) for _ in range(2))
    for sampler, t, s in ((cps, 0.9, 0.5), (sde, 0.52, 0.5), (dance, 0.52, 0.5)):
        x = noised(x0, noise, t)
        exact = (x - x0) / t
        x_s = sampler(x, exact, t, s, 0.7, fresh).x
        assert x_s.mean().item() == pytest.approx((1 - s) * 0.7, abs=5e-3)
        assert x_s.std().item() == pytest.approx(s, abs=8e-3)


def test_flow_grpo_step_against_its_formula_written_out(flow):
    x, v = flow
    t, s, eta = 0.8, 0.7, 0.5
    g2 = eta**2 * t / (1 - t)
    score = -(x - (1 - t) * (x - t * v)) / t**2
    drift = v - 0.5 * g2 * score
    found = sde(x, v, t, s, eta, None)
    assert torch.allclose(found.mean, x + drift * (s - t), atol=1e-5)
    assert found.std == pytest.approx(math.sqrt(g2 * (t - s)))


@pytest.mark.parametrize("t", [1.0, 0.8])
def test_dance_step_against_its_formula_written_out(flow, t):
    x, v = flow
    s, eta = 0.7, 0.5
    score = -(x - (1 - t) * (x - t * v)) / t**2
    found = dance(x, v, t, s, eta, None)
    assert torch.allclose(found.mean, x + (v - 0.5 * eta**2 * score) * (s - t), atol=1e-5)
    assert found.std == pytest.approx(eta * math.sqrt(t - s))


def test_log_prob_is_the_gaussian_of_torch_averaged(flow):
    x, mean = flow
    expected = torch.distributions.Normal(mean, 0.3).log_prob(x).flatten(1).mean(1)
    assert torch.allclose(log_prob(x, mean, 0.3), expected, atol=1e-5)
    normal = torch.distributions.Normal
    kl = torch.distributions.kl_divergence(normal(x, 0.3), normal(mean, 0.3)).flatten(1).mean(1)
    assert torch.allclose(gaussian_kl(x, mean, 0.3), kl, rtol=1e-5)


def test_noise_belongs_to_its_key():
    together = keyed_noise([1, 2, 3], (2, 4))
    assert torch.equal(together[1], keyed_noise([2], (2, 4))[0])
    assert sample_key(0, "a", 1) != sample_key(0, "a1")
