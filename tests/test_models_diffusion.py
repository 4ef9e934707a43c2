"""Diffusion's path on the flow's: timesteps, predictions, and the steps of diffusers' schedulers."""

import json
import math
import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from models.adapters.diffusion import Timesteps, preserving
from models.adapters.options import Options
from models.loading import load_generator
from models.paths import endpoints, ends_on_path, like, noised, velocity
from models.samplers import cps, ddim, ode
from tests.tiny_pipelines import FAMILIES

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
ENDLESS = {**BETAS, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scheduled(**told) -> DDIMScheduler:
    return DDIMScheduler(**{**BETAS, "clip_sample": False, **told})


def network(x: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
    """Some function of latents (B, ...) and timesteps that nothing but their exact values gives."""
    return torch.tanh(x.roll(1, -1)) * like(torch.cos(torch.as_tensor(timestep) / 3), x) + 0.3 * x


def asked(timesteps: Timesteps, x_t: torch.Tensor, t: float) -> torch.Tensor:
    """The velocity at `x_t`, of what `network` predicts there."""
    times = torch.full((len(x_t),), t)
    point = preserving(times).like(x_t)
    x = x_t * (point.alpha + point.sigma)
    return velocity(*ends_on_path(timesteps.prediction, network(x, timesteps.at(times)), x, point))


@pytest.mark.parametrize(
    "scheduler",
    [
        scheduled(),
        scheduled(**ENDLESS),
        PNDMScheduler(**BETAS),
        EulerDiscreteScheduler(**BETAS),
        UniPCMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_every_timestep_has_its_place_on_the_flow(scheduler):
    found, count = Timesteps.of(scheduler), scheduler.config.num_train_timesteps
    assert torch.equal(found.at(found.times), torch.arange(count, dtype=torch.float32))
    between = (found.times[:-1] + found.times[1:]) / 2
    assert torch.allclose(found.at(between), torch.arange(count - 1) + 0.5, atol=1e-2)
    assert found.at(torch.tensor([0.0, 1.0])).tolist() == [0, count - 1]
    x0, noise = normal(count, 8), normal(count, 8, seed=1)
    signal = scheduler.alphas_cumprod[:, None]
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    expected = (alpha * x0 + sigma * noise) / (alpha + sigma)
    assert torch.allclose(noised(x0, noise, found.times), expected, atol=1e-5)
    point = preserving(found.times)
    assert torch.allclose(point.alpha, alpha[:, 0], atol=1e-6)
    assert torch.allclose(point.sigma, sigma[:, 0], atol=1e-6)


WALKS = {
    "leading eps": (scheduled(steps_offset=1), 7),
    "leading v": (scheduled(prediction_type="v_prediction"), 7),
    "leading x0": (scheduled(prediction_type="sample"), 7),
    "trailing eps": (scheduled(timestep_spacing="trailing"), 8),
    "trailing v from noise alone": (scheduled(**ENDLESS, timestep_spacing="trailing"), 8),
    "linear betas": (DDIMScheduler(clip_sample=False), 10),
    # Its first order is DDIM, and unlike diffusers' DDIM it steps between the timesteps that it lists.
    "linspace eps": (DPMSolverMultistepScheduler(**BETAS, solver_order=1), 7),
    "linspace v": (DPMSolverMultistepScheduler(**BETAS, solver_order=1, prediction_type="v_prediction"), 7),
}


@pytest.mark.parametrize("name", WALKS)
def test_the_ode_is_ddim_step_for_step(name):
    scheduler, steps = WALKS[name]
    timesteps = Timesteps.of(scheduler)
    times = timesteps.path(steps, 1.0)
    scheduler.set_timesteps(steps)
    assert timesteps.spaced(steps).tolist() == scheduler.timesteps.tolist()
    theirs = normal(3, 4, 8)
    mine = theirs * math.hypot(1 - times[0], times[0])
    for k, (t, s) in zip(scheduler.timesteps, pairwise(times), strict=True):
        mine = ode(mine, asked(timesteps, mine, t), t, s).x
        theirs = scheduler.step(network(theirs, k), k, theirs).prev_sample
        apart = (mine / math.hypot(1 - s, s) - theirs).norm() / theirs.norm()
        assert apart < 1e-5
    assert times[-1] == 0


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noisy_steps_are_those_of_ddim(eta, prediction):
    scheduler = scheduled(prediction_type=prediction, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    timesteps = Timesteps.of(scheduler)
    times = timesteps.path(5, 1.0)
    for k, (t, s) in zip(scheduler.timesteps.tolist()[:-1], pairwise(times[:-1]), strict=True):
        x, noise = normal(2, 4, 8), normal(2, 4, 8, seed=1)
        std = eta * float(scheduler._get_variance(k, k - 200).sqrt())
        sigma = float((1 - scheduler.alphas_cumprod[k - 200]).sqrt())
        theirs = scheduler.step(network(x, k), k, x, eta=eta, variance_noise=noise).prev_sample
        x_t, r = x * math.hypot(1 - t, t), math.hypot(1 - s, s)
        v = asked(timesteps, x_t, t)
        for sampler, amount in ((ddim, eta), (cps, 2 / math.pi * math.asin(std / sigma))):
            found = sampler(x_t, v, t, s, amount, noise)
            assert torch.allclose(found.x / r, theirs, rtol=1e-4, atol=1e-5)
            assert found.std / r == pytest.approx(std, abs=1e-6)


def test_the_limits_of_a_cps_step():
    """Without noise it is DDIM's; with as much as there is, nothing of the old noise is left; at the data none is."""
    timesteps = Timesteps.of(scheduled(timestep_spacing="trailing"))
    (t, s), last = timesteps.path(4, 1.0)[:2], timesteps.path(4, 1.0)[3]
    x_t, noise = normal(2, 4, 8), normal(2, 4, 8, seed=1)
    v = asked(timesteps, x_t, t)
    x0, _ = endpoints(x_t, v, t)
    near = cps(x_t, v, t, s, 1e-6, noise)
    assert near.std == pytest.approx(0, abs=1e-5)
    assert torch.allclose(near.x, ode(x_t, v, t, s).x, atol=1e-4)
    whole = cps(x_t, v, t, s, 1.0, noise)
    assert whole.std == pytest.approx(s)
    assert torch.allclose(whole.x, noised(x0, noise, s), atol=1e-4)
    assert cps(x_t, v, last, 0.0, 0.7, noise).std == 0


def test_a_shift_spends_more_steps_near_the_noise_and_stays_within_training():
    timesteps = Timesteps.of(scheduled(steps_offset=1))
    even, shifted = timesteps.path(6, 1.0), timesteps.path(6, 3.0)
    assert all(after > before for before, after in zip(even[:-1], shifted[:-1], strict=True))
    assert all(s < t for t, s in pairwise(shifted))
    assert shifted[0] <= float(timesteps.times[-1])
    assert shifted[-1] == 0


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler is not one of a diffusion"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "flow_prediction is none of epsilon"),
        (DDIMScheduler(), "clip_sample would clip latents"),
        (scheduled(thresholding=True), "thresholding would clip latents"),
        (scheduled(rescale_betas_zero_snr=True), "wants prediction_type v_prediction"),
        (EulerDiscreteScheduler(**BETAS, use_karras_sigmas=True), "use_karras_sigmas spaces noise levels"),
        (DPMSolverMultistepScheduler(**BETAS, use_karras_sigmas=True), "use_karras_sigmas spaces noise levels"),
        (DPMSolverMultistepScheduler(**BETAS, use_exponential_sigmas=True), "use_exponential_sigmas spaces noise"),
        (DPMSolverMultistepScheduler(**BETAS, use_lu_lambdas=True), "use_lu_lambdas spaces noise levels"),
    ],
)
def test_a_scheduler_that_cannot_be_brought_to_the_flow_is_refused(scheduler, said):
    with pytest.raises(ValueError, match=f"^scheduler: .*{said}"):
        Timesteps.of(scheduler)


@pytest.mark.parametrize("steps", [0, 1001])
def test_steps_are_as_many_as_there_are_timesteps_at_most(steps):
    with pytest.raises(ValueError, match=f"^steps: {steps} is not between 1 and the 1000 timesteps"):
        Timesteps.of(scheduled()).spaced(steps)


@pytest.mark.parametrize(("told", "steps"), [({"steps_offset": 1}, 1000), ({"timestep_spacing": "linspace"}, 1000)])
def test_two_steps_at_one_timestep_are_refused(told, steps):
    timesteps = Timesteps.of(scheduled(**told))
    with pytest.raises(ValueError, match=f"^steps: {steps} with this spacing are at 999 timesteps; take fewer"):
        timesteps.path(steps, 1.0)
    assert all(s < t for t, s in pairwise(timesteps.path(500, 1.0)))
    with pytest.raises(ValueError, match=r"^steps: 500 with this spacing"):
        Timesteps.of(scheduled()).path(500, 0.1)


def test_labels_are_prompts(tmp_path_factory, tmp_path):
    folder = FAMILIES["dit"].saved(tmp_path_factory)
    generator = load_generator(folder)
    cond = generator.encode(["a square", " A Green Square", "a red circle above a blue square", ""])
    assert cond.tokens.tolist() == [3, 3, 7, 1000]
    with pytest.raises(ValueError, match=r"^prompts: 'a grean square' is no label .* nearest are a green square"):
        generator.encode(["a grean square"])
    generator.pipe.save_pretrained(tmp_path)
    assert DiTPipeline.from_pretrained(tmp_path).labels == generator.pipe.labels
    index = tmp_path / "model_index.json"
    told = json.loads(index.read_text())
    del told["id2label"]
    index.write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"^checkpoint: model_index.json has no id2label"):
        load_generator(tmp_path)
    with pytest.raises(ValueError, match=r"^resolution: 24 x 16, but a DiT paints squares"):
        load_generator(folder, options=Options(resolution=(16, 24)))


def test_a_name_of_several_classes_is_refused_and_their_numbers_are_taken(tmp_path_factory, tmp_path):
    shutil.copytree(FAMILIES["dit"].saved(tmp_path_factory), tmp_path, dirs_exist_ok=True)
    index = tmp_path / "model_index.json"
    labels = {"134": "crane", "517": "Crane", "2": "shark, white shark"}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": labels}))
    generator = load_generator(tmp_path)
    assert generator.encode(["134", "517", "White shark"]).tokens.tolist() == [134, 517, 2]
    generator.check(["shark", "", "134"])
    with pytest.raises(ValueError, match=r"^prompts: 'crane' is a label of the classes 134, 517; give one"):
        generator.check(["shark", "crane"])
    generator.pipe.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["id2label"] == labels
