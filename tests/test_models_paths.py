"""Paths are where they say, predictions convert into one another, and any network is brought to the flow."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from models.paths import (
    PATHS,
    Parametrisation,
    endpoints,
    ends_on_path,
    like,
    noised,
    on_path,
    predicted,
    schedule,
    velocity,
)
from tests.gaussian import SPREAD, Gaussian

TIMES = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98], dtype=torch.float64)
KINDS = ("velocity", "eps", "v", "x0", "score")


@pytest.fixture
def both():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(len(TIMES), 2, 3, generator=random, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_leads_back_to_both_ends(both, name, kind):
    point = PATHS[name].at(TIMES)
    found = ends_on_path(kind, predicted(kind, *both, point), on_path(*both, point), point)
    for mine, end in zip(found, both, strict=True):
        torch.testing.assert_close(mine, end, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", PATHS)
def test_the_velocity_is_the_derivative_of_the_path(both, name):
    path, step = PATHS[name], 1e-6
    ahead, behind = (on_path(*both, path.at(TIMES + way * step)) for way in (1, -1))
    found = predicted("velocity", *both, path.at(TIMES))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), atol=1e-6, rtol=1e-6)


def test_v_is_the_velocity_in_the_angle_of_a_variance_preserving_path(both):
    for name, angles_a_time in (("cosine", math.pi / 2), ("vp", None)):
        point = PATHS[name].at(TIMES)
        rate = angles_a_time or like(point.sigma_rate / point.alpha, both[0])  # d sin(angle) = cos(angle) d angle
        torch.testing.assert_close(predicted("velocity", *both, point), rate * predicted("v", *both, point))
        torch.testing.assert_close(point.alpha**2 + point.sigma**2, torch.ones_like(TIMES))


@pytest.mark.parametrize("name", PATHS)
def test_the_score_is_the_gradient_of_the_log_density(both, name):
    x0, point = both[0], PATHS[name].at(TIMES)
    x = on_path(*both, point).requires_grad_()
    density = torch.distributions.Normal(like(point.alpha, x0) * x0, like(point.sigma, x0))
    (gradient,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    torch.testing.assert_close(predicted("score", *both, point), gradient)


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_the_flow_in_another_size_and_at_another_time(both, name):
    path = PATHS[name]
    point = path.at(TIMES)
    on_flow = on_path(*both, point) / like(point.alpha + point.sigma, both[0])
    torch.testing.assert_close(on_flow, noised(*both, point.flow_time))
    torch.testing.assert_close(path.time(point.flow_time), TIMES)


def test_the_vp_path_is_that_of_ddpm():
    alphas = DDPMScheduler(beta_schedule="linear").alphas_cumprod.sqrt()
    times = torch.arange(1, 1001) / 1000
    torch.testing.assert_close(PATHS["vp"].at(times).alpha, alphas, atol=3e-3, rtol=0)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_parametrisation_of_a_perfect_network_has_the_same_velocity(name, kind):
    """On data from N(0.4, SPREAD^2), where the mean x0 of a latent is known."""
    own, mean = Parametrisation(name, kind), 0.4

    def network(x, time):
        point = PATHS[name].at(time)
        p = point.like(x)
        x0 = mean + p.alpha * SPREAD**2 / ((p.alpha * SPREAD) ** 2 + p.sigma**2) * (x - p.alpha * mean)
        return predicted(kind, x0, (x - p.alpha * x0) / p.sigma, point)

    x_t = torch.linspace(-2, 2, 20, dtype=torch.float64).reshape(5, 4)
    torch.testing.assert_close(own.velocity(network, x_t, TIMES), Gaussian.velocity(x_t, TIMES, mean))


def test_times_fall_from_where_the_path_starts_to_the_data():
    for name in PATHS:
        for kind in KINDS:
            own = Parametrisation(name, kind)
            times = own.times(5, 1.0)
            assert times == sorted(times, reverse=True)
            assert times[-1] == 0
            assert 0.98 < times[0] <= 1
            # Beyond its first time, where eps tells nothing, a network is asked as at the first.
            found = own.velocity(lambda x, time: torch.zeros_like(x), torch.ones(2, 3), torch.tensor([0.5, 1.0]))
            assert found.isfinite().all()
    assert Parametrisation().times(4, 1.0) == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert Parametrisation("cosine", "v").times(2, 1.0) == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("field", ["path", "prediction"])
def test_an_unknown_name_is_told_with_those_known(field):
    with pytest.raises(ValueError, match=f"^{field}: unknown none; known here: .*v"):
        Parametrisation(**{field: "none"})


@pytest.fixture
def flow():
    random = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(4, 3, 8, 8, generator=random) for _ in range(2))
    return x0, noise


def test_the_path_inverts(flow):
    x0, noise = flow
    t = torch.tensor([0.0, 0.3, 0.9, 1.0])
    found_x0, found_noise = endpoints(noised(x0, noise, t), velocity(x0, noise), t)
    assert torch.allclose(found_x0, x0, atol=1e-6)
    assert torch.allclose(found_noise, noise, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_schedule_is_the_one_of_diffusers(shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(sigmas=[1 - i / 7 for i in range(7)])
    assert np.allclose(schedule(7, shift), theirs.sigmas.numpy(), atol=1e-6)


def test_schedule_without_steps_is_an_error():
    with pytest.raises(ValueError, match="steps"):
        schedule(0)
