"""Base and tuned generator side by side: what they share, when prompts are encoded, and what the result depends on."""

import pytest
import torch

from models import lora
from models.adapters.sd3 import SD3Generator
from models.samplers import keyed_noise
from pipeline.config import Config
from pipeline.runner import Context
from pipeline.settings import load
from pipeline.stages.evaluate import EVALUATE, _generators
from pipeline.store import Artifact
from tests.tiny_pipelines import FAMILIES

PROMPTS = ["a red circle", "a blue square", "a red circle"]


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    return {"checkpoint": str(FAMILIES["sd3"].saved(tmp_path_factory)), "resolution": 16, "max_tokens": 12}


def context(config, folder):
    """With an adapter that changes pictures for what finetune left."""
    base = config.generator.build("cpu")
    lora.attach(base.transformer, base.lora_targets, 2, 4.0, seed=0)
    random = torch.Generator().manual_seed(0)
    for weight in base.transformer.parameters():
        if weight.requires_grad:
            weight.data += 0.2 * torch.randn(weight.shape, generator=random)
    tuned = Artifact(folder / "finetune")
    lora.save(base.transformer, tuned.folder / config.finetune.kept_folder, base.lora_prefix)
    return Context(config, Artifact(folder / "evaluate"), {"finetune": tuned})


@pytest.mark.parametrize("kind", ["a pipeline", "ours"])
def test_base_and_tuned_differ_in_the_transformer_alone(kind, config_at, sd3, tmp_path):
    config = load(Config, config_at("shared", **({"generator": sd3} if kind == "a pipeline" else {})))
    asked = context(config, tmp_path)
    generators, _ = _generators(asked, PROMPTS)
    base, tuned = generators["base"], generators["tuned"]
    assert all(one is other for one, other in zip(base.frozen, tuned.frozen, strict=True))
    expected = {
        "base": config.generator.build("cpu"),
        "tuned": config.generator.build("cpu", tmp_path / "finetune" / config.finetune.kept_folder),
    }
    x = keyed_noise([1, 2], base.latent_shape)
    with torch.no_grad():
        cond = base.encode(PROMPTS[:2])
        found = {name: each.predict(x, 0.5, cond) for name, each in generators.items()}
        for name, each in expected.items():
            assert torch.equal(found[name], each.predict(x, 0.5, cond))
    assert not torch.allclose(found["base"], found["tuned"], atol=1e-3)


def test_a_prompt_is_encoded_once_before_judge_and_reward_come(config_at, sd3, tmp_path, monkeypatch):
    told = {**sd3, "guidance": 2.0, "negative": "grey", "cached_prompts": 1}
    config = load(Config, config_at("encoded", generator=told))
    asked, seen, encoded = context(config, tmp_path), [], SD3Generator.encoded

    def watched(generator, prompts):
        seen.extend(prompts)
        return encoded(generator, prompts)

    monkeypatch.setattr(SD3Generator, "encoded", watched)
    generators, waiting = _generators(asked, PROMPTS)
    assert seen == ["a red circle", "a blue square", "grey"]
    assert waiting == "cpu"
    for generator in generators.values():
        list(config.evaluate.paint(generator, PROMPTS, [1, 2, 3]))
    assert len(seen) == 3


@pytest.mark.parametrize("change", ["seed=1", "generator.resolution=48", "prompts.type=geneval"])
def test_it_depends_on_what_it_paints_whatever_came_before(change, config_at):
    path = config_at("depends")
    assert EVALUATE.depends(load(Config, path)) != EVALUATE.depends(load(Config, path, [change]))
