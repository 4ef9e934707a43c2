"""Objectives weigh one and the same error; times have the densities of their papers."""

import math

import pytest
import torch

from models.generator import NativeGenerator, sample
from models.objectives import Objective
from models.paths import PATHS, Parametrisation, ends_on_path, on_path, predicted
from models.pretrain import new_generator

TIMES = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=torch.float64)
KINDS = ("velocity", "eps", "v", "x0", "score")


def density(objective: Objective, t: torch.Tensor) -> torch.Tensor:
    """Of times near `t`, by how many quantiles lie there."""
    found = objective.at((torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6)
    return torch.stack([((found - each).abs() < 5e-3).double().mean() / 1e-2 for each in t])


def test_times_have_the_densities_of_their_papers():
    t = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    normal = torch.distributions.Normal(0.5, 0.8).log_prob((t / (1 - t)).log()).exp() / (t * (1 - t))
    cosmap = 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t * t)
    for objective, expected in (
        (Objective(mean=0.5, std=0.8), normal),
        (Objective("cosmap"), cosmap),
        (Objective("uniform"), torch.ones_like(t)),
        (Objective("mode", heavy=0.0), torch.ones_like(t)),
    ):
        torch.testing.assert_close(density(objective, t), expected, rtol=0.02, atol=0)
    early, middle, late = density(Objective("mode"), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    assert middle > 2 * early
    assert early == pytest.approx(late, rel=0.05)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_makes_the_errors_of_all_predictions_one(name, kind):
    random = torch.Generator().manual_seed(0)
    x0, noise, wrong = (torch.randn(4, 5, generator=random, dtype=torch.float64) for _ in range(3))
    t = TIMES.clone().requires_grad_()
    point = PATHS[name].at(t)
    snr = (point.alpha / point.sigma) ** 2
    (slope,) = torch.autograd.grad(snr.sum(), t, retain_graph=True)
    x, right = on_path(x0, noise, point), predicted(kind, x0, noise, point)
    away = (right - wrong).square().mean(1)
    told_x0, told_noise = ends_on_path(kind, wrong, x, point)
    of_x0, of_eps = (told_x0 - x0).square().mean(1), (told_noise - noise).square().mean(1)
    for weight, expected in (
        ("plain", away),
        ("simple", of_eps),
        ("min-snr", snr.clamp(max=2.0) * of_x0),
        ("likelihood", -slope * of_x0),
    ):
        found = Objective(weight=weight, gamma=2.0).weights(kind, point) * away
        torch.testing.assert_close(found, expected)


def tiny(path: str, prediction: str) -> NativeGenerator:
    return new_generator(["a", "ring"], 32, 32, 1, 1, 4, 0, Parametrisation(path, prediction))


@pytest.mark.parametrize(
    ("path", "prediction", "objective"),
    [
        ("vp", "eps", Objective("uniform")),
        ("cosine", "v", Objective("uniform", weight="min-snr")),
        ("vp", "score", Objective("uniform", weight="simple")),
        ("flow", "x0", Objective("mode")),
    ],
)
def test_a_generator_learns_by_every_paradigm_and_keeps_its_own(path, prediction, objective, tmp_path):
    generator = tiny(path, prediction)
    latents = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)).expand(16, -1, -1, -1)
    optimizer = torch.optim.Adam(generator.transformer.parameters(), 5e-3)
    losses = []
    for step in range(40):
        optimizer.zero_grad()
        loss = objective.loss(generator, latents, ["a ring"] * 16, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(generator.transformer.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])

    generator.save_pretrained(tmp_path)
    again = NativeGenerator.from_pretrained(tmp_path)
    assert again.parametrisation == Parametrisation(path, prediction)
    assert again.vp == (path != "flow")
    (image,) = sample(again, ["a ring"], [0], steps=3)
    assert image.std() > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("times", "none"), ("weight", "none"), ("std", 0.0), ("gamma", -1.0), ("heavy", 2.0)],
)
def test_what_is_out_of_range_is_told_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: "):
        Objective(**{field: value})
