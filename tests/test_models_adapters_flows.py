"""What is particular to FLUX.2, Qwen-Image, Z-Image and Sana; what all families share is in test_models_adapters."""

from functools import partial

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from models import adapters
from models.adapters.flows import normalised, padded, ragged, restored, trimmed
from models.adapters.options import Options
from models.generator import Conditioning, Generator
from models.guidance import Guidance
from models.samplers import keyed_noise, walk
from tests.tiny_pipelines import FAMILIES

PROMPTS = ["a red circle above a blue square", "a green square"]


def built(name: str) -> DiffusionPipeline:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FAMILIES[name].build()


def generator_of(name: str, pipe: DiffusionPipeline, scale: float = 1.0, **options) -> Generator:
    asked = {"resolution": FAMILIES[name].size, "guidance": Guidance(scale), **FAMILIES[name].options, **options}
    return getattr(adapters, adapters.FAMILIES[type(pipe).__name__])(pipe, Options(**asked))


def test_texts_of_different_lengths_come_back():
    random = torch.Generator().manual_seed(0)
    rows = [torch.randn(length, 3, generator=random) for length in (4, 2)]
    cond = padded(rows, 7)
    assert cond.tokens.shape == (2, 7, 3)
    assert all(torch.equal(*pair) for pair in zip(ragged(cond), rows, strict=True))
    tokens, mask = trimmed(cond)
    assert tokens.shape == (2, 4, 3)
    assert mask.tolist() == [[True] * 4, [True, True, False, False]]
    alone, whole = trimmed(cond[1:])
    assert torch.equal(alone[0], rows[1])
    assert whole is None


@pytest.mark.parametrize("name", ["qwen_image", "z_image"])
def test_what_fills_up_a_text_is_not_heard(name):
    generator = generator_of(name, built(name))
    cond = generator.encode(PROMPTS)
    x, filled = keyed_noise([0, 1], generator.latent_shape), ~cond.more["mask"][..., None]
    other = Conditioning(cond.tokens + filled * 7.0, cond.more)
    assert filled.any()
    with torch.no_grad():
        assert torch.allclose(generator.predict(x, 0.5, cond), generator.predict(x, 0.5, other), atol=1e-6)


def test_a_guided_prediction_of_qwen_image_is_as_long_as_the_positive_one():
    plain, guided = (generator_of("qwen_image", built("qwen_image"), scale) for scale in (1.0, 4.0))
    x, cond = keyed_noise([0, 1], plain.latent_shape), plain.encode(PROMPTS)
    with torch.no_grad():
        expected, found = plain.predict(x, 0.5, cond), guided.predict(x, 0.5, cond)
    tokens = [v.unfold(2, 2, 2).unfold(3, 2, 2).square().sum((1, 4, 5)) for v in (expected, found)]
    assert torch.allclose(*tokens, rtol=1e-4)
    assert (expected - found).abs().max() > 1e-3


def test_times_that_are_stretched_to_a_last_one_are_two_or_more():
    generator = generator_of("qwen_image", built("qwen_image"))
    assert generator.times(4, 1.0)[-2] == pytest.approx(0.02, abs=1e-6)
    with pytest.raises(ValueError, match=r"^steps: 1 is too few"):
        generator.times(1, 1.0)


def test_larger_pictures_spend_more_steps_near_the_noise():
    for name in ("flux2", "qwen_image"):
        pipe = built(name)
        small, large = (generator_of(name, pipe, resolution=size).times(4, 1.0) for size in (16, 256))
        assert all(t < s for t, s in zip(small[1:-2], large[1:-2], strict=True)), name


def test_distilled_weights_of_klein_take_no_guidance():
    pipe = built("flux2_klein")
    assert generator_of("flux2_klein", pipe, guidance=None).guidance.scale == 4
    pipe.register_to_config(is_distilled=True)
    assert generator_of("flux2_klein", pipe, guidance=None).guidance.scale == 1
    with pytest.raises(ValueError, match=r"^guidance: "):
        generator_of("flux2_klein", pipe, 3.0)
    with pytest.raises(ValueError, match=r"^embedded_guidance: "):
        generator_of("flux2_klein", pipe, embedded_guidance=3.0)


def test_flux2_hears_the_scale_it_is_told():
    pipe = built("flux2")
    found = []
    for scale in (1.0, 6.0):
        generator = generator_of("flux2", pipe, embedded_guidance=scale)
        x, cond = keyed_noise([0], generator.latent_shape), generator.encode(PROMPTS[:1])
        with torch.no_grad():
            found.append(generator.predict(x, 0.5, cond))
    assert (found[0] - found[1]).abs().max() > 1e-4


def test_sanas_negative_prompt_comes_without_the_instruction():
    pipe = built("sana")
    told, plain = generator_of("sana", pipe), generator_of("sana", pipe, negative=PROMPTS[1])
    _, _, expected, mask = pipe.encode_prompt(
        PROMPTS[0], True, PROMPTS[1], max_sequence_length=16, device=torch.device("cpu")
    )
    found = plain.encode(PROMPTS[1:])
    assert torch.allclose(found.tokens, expected, atol=1e-6)
    assert torch.equal(found.more["mask"], mask.bool())
    assert not torch.allclose(told.encode(PROMPTS[1:]).tokens, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "sampler"),
    [
        (FlowMatchEulerDiscreteScheduler(shift=3.0), "ode"),
        (DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0), "dpm2m"),
    ],
    ids=["euler", "as published"],
)
def test_sana_with_other_schedulers(scheduler, sampler):
    pipe = built("sana")
    pipe.scheduler = scheduler
    generator = generator_of("sana", pipe, 3.0)
    times, noise = generator.times(4, 1.0), keyed_noise([0, 1], generator.latent_shape)
    expected = FAMILIES["sana"].paint(pipe, PROMPTS, noise, 4, 3.0, "latent")
    with torch.no_grad():
        found = walk(partial(generator.predict, cond=generator.encode(PROMPTS)), noise, times, sampler)
    assert torch.allclose(found, expected, atol=1e-5)


def test_sana_with_a_scheduler_of_another_path_is_one_line():
    pipe = built("sana")
    pipe.scheduler = DPMSolverMultistepScheduler()
    with pytest.raises(ValueError, match=r"^scheduler: "):
        generator_of("sana", pipe)


def test_sana_is_told_the_whole_steps_that_its_scheduler_counts():
    pipe = built("sana")
    pipe.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    generator = generator_of("sana", pipe)
    x, cond = keyed_noise([0], generator.latent_shape), generator.encode(PROMPTS[:1])
    for steps in (3, 7, 9):
        times = generator.times(steps, 1.0)
        pipe.scheduler.set_timesteps(steps)
        with torch.no_grad():
            heard = [generator.heard([generator.transformer.time_embed], x, t, cond) for t in times[:-1]]
        told = [float(given[0]) for [(given, _)] in heard]
        assert told == pipe.scheduler.timesteps.tolist()


def test_a_scale_of_zero_is_told():
    pipe = built("flux2")
    assert generator_of("flux2", pipe, embedded_guidance=0.0).embedded_scale == 0
    assert generator_of("flux2", pipe, embedded_guidance=None).embedded_scale == 4


def test_latents_are_normalised_and_restored_channel_by_channel():
    z, mean, std = torch.randn(2, 3, 4, 5), [0.5, -1.0, 2.0], torch.tensor([1.0, 2.0, 0.25])
    found = normalised(z, mean, std)
    assert torch.allclose(found[:, 1], (z[:, 1] + 1) / 2)
    assert torch.allclose(restored(found, mean, std), z, atol=1e-6)
