"""The BLIP-2 judge: its margins are those of transformers' own model, whatever else is in the batch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Blip2ForConditionalGeneration

from judges import load_judge
from judges.base import Answer, Verdict
from judges.blip2 import Blip2Judge
from judges.qformer import IGNORED, sequences
from models.text import word_tokenizer

PROMPTS = ["a red ring above a blue cross", "two rings", "a black square"]


@pytest.fixture(scope="module")
def judge(judge_folder):
    return load_judge(judge_folder / "vqa")


@pytest.fixture
def images():
    return list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))


def test_margins_are_those_of_the_whole_model(judge: Blip2Judge, judge_folder: Path, images):
    model = Blip2ForConditionalGeneration.from_pretrained(judge_folder / "vqa").eval()
    tokenizer = judge.tokenizer
    question = "does this figure show two rings?"
    ids = tokenizer(judge.template.format(question)).input_ids
    queries = [model.config.image_token_index] * model.config.num_query_tokens
    pixels = judge.image_processor(images[:1], return_tensors="pt").pixel_values
    with torch.inference_mode():
        whole = torch.tensor([queries + ids])
        logits = model(pixel_values=pixels, input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0, -1]
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    expected = (logits[yes] - logits[no]).item()
    assert judge.ask(images[:1], [[question]])[0][0].margin == pytest.approx(expected, abs=1e-4)


def test_a_margin_does_not_depend_on_batch_mates(judge, images):
    together = judge.score(images, PROMPTS)
    for image, prompt, verdict in zip(images, PROMPTS, together, strict=True):
        assert judge.score([image], [prompt])[0].margin == pytest.approx(verdict.margin, abs=1e-4)
    assert together[0].margin != pytest.approx(together[1].margin, abs=1e-3)


def test_a_verdict_holds_the_whole_prompt_and_every_part_and_is_their_weakest(judge, images):
    verdict = judge.score(images[:1], PROMPTS[:1])[0]
    assert [answer.question for answer in verdict.evidence] == [
        "does this figure show a red ring above a blue cross?",
        "is there a red ring?",
        "is there a blue cross?",
        "is the red ring above the blue cross?",
        "are there exactly two objects?",
    ]
    assert verdict.margin == min(answer.margin for answer in verdict.evidence)
    assert verdict.value == pytest.approx(1 / (1 + math.exp(-verdict.margin)))


def test_a_judge_that_cannot_answer_says_so(judge, images, monkeypatch):
    monkeypatch.setattr(judge, "ask", lambda images, asked: [[Answer("?", math.nan)] for _ in images])
    verdict = judge.score(images[:1], PROMPTS[:1])[0]
    assert not verdict.valid
    assert math.isnan(verdict.value)


def test_without_settings_a_checkpoint_is_asked_about_the_whole_prompt_only(judge_folder, images, tmp_path):
    for path in (judge_folder / "vqa").iterdir():
        if path.name != "judge.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    verdict = load_judge(tmp_path).score(images[:1], ["an oil painting of a dog"])[0]
    assert [a.question for a in verdict.evidence] == ['Does this figure show "an oil painting of a dog"?']


def test_extreme_margins_have_finite_probabilities():
    assert Answer("?", 1e4).probability == pytest.approx(1.0)
    assert Verdict(-1e4, (), "j", "t").value == pytest.approx(0.0)


def test_targets_follow_the_given_words():
    tokenizer = word_tokenizer(["a", "b", "yes"])
    ids, target = sequences(tokenizer, [("a b", "yes")], 6)
    a, b, yes = tokenizer.convert_tokens_to_ids(["a", "b", "yes"])
    assert ids[0].tolist() == [a, b, yes, tokenizer.eos_token_id]
    assert target[0].tolist() == [IGNORED, yes, tokenizer.eos_token_id, IGNORED]
    with pytest.raises(ValueError, match="do not fit"):
        sequences(tokenizer, [("a b", "yes")], 3)
