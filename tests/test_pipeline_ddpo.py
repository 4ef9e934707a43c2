"""Algorithms on models that were trained on diffusion: DDPO's step is the published one, and the others go along."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from models.adapters.options import Options
from models.guidance import Guidance
from models.loading import load_generator
from models.samplers import keyed_noise
from pipeline.prompts import PromptRow
from pipeline.rl import AlgorithmConfig, algorithm_of
from pipeline.rl.ddpo import DDPOConfig
from pipeline.rl.nft import NFTConfig
from pipeline.rl.ppo import PPOConfig
from pipeline.rl.settings import TrainerSettings
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state
from pipeline.settings import UserError
from pipeline.stages.sample import SampleConfig
from tests.geometries import brightness
from tests.tiny_pipelines import FAMILIES

PROMPTS = [PromptRow("a red circle above a blue square", "position"), PromptRow("a green square", "colors")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained pipelines."""
    return {name: FAMILIES[name].saved(tmp_path_factory) for name in ("sd15", "dit")}


def trainer_of(folder: Path, name: str, algorithm: AlgorithmConfig, **others) -> Trainer:
    process_state()
    generator = load_generator(folder, options=Options(resolution=FAMILIES[name].size, guidance=Guidance(2.0)))
    settings = TrainerSettings(**{"groups": 2, "group_size": 3, "steps": 4, "learning_rate": 1e-2, **others})
    return Trainer(generator, brightness, algorithm_of(algorithm), settings, 0, Accelerator(), measured=True)


@pytest.mark.parametrize(
    ("name", "config"),
    [("sd15", DDPOConfig(sampler="ddim", eta=1.0, least=2)), ("dit", DDPOConfig(sampler="cps", least=2))],
    ids=["sd15 ddim", "dit cps"],
)
def test_ddpo_learns_on_a_model_that_predicts_eps(folders, name, config):
    trainer, again = (trainer_of(folders[name], name, config) for _ in range(2))
    before = asked_at_first(trainer)
    for _ in range(2):
        told, repeated = trainer.iterate(PROMPTS), again.iterate(PROMPTS)
        assert told.ratio_error < 1e-4  # each iteration has one update, which is on-policy
        assert told.grad_norm > 0
        assert told.groups_dropped == 0
        assert (told.loss, told.grad_norm) == (repeated.loss, repeated.grad_norm)
    assert (asked_at_first(trainer) - before).abs().max() > 1e-4
    with trainer.reference():
        assert torch.allclose(asked_at_first(trainer), before, atol=1e-5)


@torch.no_grad()
def asked_at_first(trainer: Trainer) -> torch.Tensor:
    """The velocity at some latents, at the first time."""
    generator = trainer.generator
    cond = generator.encode([prompt.text for prompt in PROMPTS])
    return generator.predict(keyed_noise([0, 1], generator.latent_shape), trainer.times[0], cond)


def test_a_critic_reads_a_model_that_predicts_eps(folders):
    trainer = trainer_of(folders["sd15"], "sd15", PPOConfig(window=2, last_start=1))
    assert trainer.iterate(PROMPTS).grad_norm > 0


def test_pictures_are_noised_no_further_than_where_painting_starts(folders, monkeypatch):
    trainer, seen = trainer_of(folders["sd15"], "sd15", NFTConfig(draws=4)), []
    asked = trainer.generator._unguided

    def recorded(network, x_t, t, cond):
        seen.append(torch.as_tensor(t).max())
        return asked(network, x_t, t, cond)

    monkeypatch.setattr(trainer.generator, "_unguided", recorded)
    assert trainer.iterate(PROMPTS).grad_norm > 0
    assert max(seen) == pytest.approx(trainer.times[0])
    assert trainer.times[0] < 0.9


def test_a_prompt_that_is_no_label_and_too_many_steps_are_one_line(folders):
    trainer = trainer_of(folders["dit"], "dit", DDPOConfig())
    with pytest.raises(UserError, match=r"^finetune[.]prompts: 'a cat' is no label of this model"):
        trainer.iterate([PromptRow("a cat", ""), *PROMPTS[1:]])
    with pytest.raises(UserError, match=r"^finetune[.]steps: 1001 is not between 1 and the 900 timesteps"):
        trainer_of(folders["dit"], "dit", DDPOConfig(), steps=1001)
    painting = SampleConfig()
    painting.check("sample", trainer.generator, [prompt.text for prompt in PROMPTS])
    with pytest.raises(UserError, match=r"^sample[.]prompts: 'a cat' is no label"):
        painting.check("sample", trainer.generator, ["a green square", "a cat"])
    with pytest.raises(UserError, match=r"^sample[.]steps: 1001 is not between"):
        painting.model_copy(update={"steps": 1001}).check("sample", trainer.generator, [])
