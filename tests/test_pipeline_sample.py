"""What the siblings of a prompt are painted from, and how."""

from collections import Counter

import numpy as np
import pytest

from judges.geneval import decompose
from models import load_generator, sample
from pipeline.config import Config
from pipeline.prompts import GenEvalPrompts, PromptRow, ShapesPrompts
from pipeline.settings import SettingsError, load
from pipeline.stages.evaluate import EvaluateConfig
from pipeline.stages.sample import SampleConfig, paintings

PROMPTS = [PromptRow(text, "") for text in ("a red ring", "a red ring and a cross", "four squares", "a blue ring")]


def test_foreign_siblings_are_painted_from_other_prompts_and_come_last():
    for prompt, texts in zip(PROMPTS, paintings(PROMPTS, 5, 2, 0), strict=True):
        assert texts[:3] == [prompt.text] * 3
        assert len(texts) == 5
        assert prompt.text not in texts[3:]


def test_the_most_similar_prompts_are_chosen():
    many = [*PROMPTS, *(PromptRow(f"a red ring and {i} more", "") for i in range(10))]
    near = {text for texts in paintings(many, 30, 29, 0)[:1] for text in texts[1:]}
    assert "four squares" not in near
    assert len(near) > 3


def test_paintings_belong_to_the_prompt_and_the_seed():
    assert paintings(PROMPTS, 4, 3, 0) == paintings(PROMPTS, 4, 3, 0)
    assert paintings(PROMPTS, 4, 3, 0) != paintings(PROMPTS, 4, 3, 1)


def test_a_stage_paints_by_the_sampler_of_its_settings(generator_folder):
    generator, prompts, keys = load_generator(generator_folder), ["a red ring", "a blue cross"], [1, 2]
    for settings in (SampleConfig(steps=4, sampler="heun"), EvaluateConfig(steps=4, sampler="ddim", eta=1.0)):
        found = list(settings.paint(generator, prompts, keys))
        expected = sample(generator, prompts, keys, 4, sampler=settings.sampler, eta=settings.eta)
        for image, other in zip(found, expected, strict=True):
            assert np.array_equal(image, other)
        plain = list(SampleConfig(steps=4).paint(generator, prompts, keys))
        assert not np.array_equal(found[0], plain[0])
    assert SampleConfig(steps=4, sampler="heun").calls == 7
    assert SampleConfig(steps=4, sampler="dpm2m").calls == 4


def test_prompts_of_genevals_grammar_are_even_over_skills_and_some_are_held_out():
    source = GenEvalPrompts(type="geneval")
    learned, held = source.draw(1, 120), source.held_out(2, 120)
    assert learned == source.draw(1, 120)
    assert len({prompt.id for prompt in learned}) == 120
    assert not {prompt.id for prompt in learned} & {prompt.id for prompt in held}
    for prompts in (learned, held):
        assert min(Counter(prompt.skill for prompt in prompts).values()) >= 12
        assert all(decompose(prompt.text) for prompt in prompts)


@pytest.mark.parametrize("source", [GenEvalPrompts(type="geneval"), ShapesPrompts(type="shapes")])
def test_weights_say_how_often_a_skill_is_learned_and_not_how_it_is_measured(source):
    weights = {"position": 7, "counting": 5, "color_attribution": 3, "colors": 1}
    weighed = source.model_copy(update={"weights": weights})
    drawn = Counter(prompt.skill for prompt in weighed.draw(3, 160))
    assert drawn.keys() == weights.keys()
    for skill, weight in weights.items():
        assert abs(drawn[skill] - 10 * weight) < 10  # what was drawn before does not count
    assert {prompt.skill for prompt in weighed.draw(3, 4)} > {"position"}  # few are spread too
    assert weighed.held_out(3, 30) == source.held_out(3, 30)
    assert weighed.depends() != source.depends() == {"type": source.type}


def test_weights_of_no_skill_or_of_nothing_are_one_line(config_at):
    for weights, line in (
        ({"positions": 1}, r"prompts\.weights: positions is no skill; they are single_object, "),
        ({"position": 0}, r"prompts\.weights: nothing would be drawn; "),
    ):
        with pytest.raises(SettingsError, match=line):
            load(Config, config_at("weighed", prompts={"type": "shapes", "weights": weights}))
