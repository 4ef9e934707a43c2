"""Chat models in process answer as a plain loop over transformers does, whatever else is in the batch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import expit, logsumexp
from transformers import AutoConfig, LlavaModel

from judges.base import Answer, Question
from judges.chat import Asking, ChatVQA
from judges.pairwise import PairwiseJudge
from judges.replies import LETTERED, MOST_LISTED, ONE_OF, OPEN, THINK, spelling_ids
from tests import tiny_chat

YES_NO = ONE_OF.format("yes or no")
CHOICES = LETTERED.format("A. red ring\nB. blue cross\nC. blue")
SPELLINGS = {"yes": ("yes", "Yes", "Ġyes"), "no": ("no", "No"), "1": ("1", "Ġ1"), "2": ("2",)}
QUESTIONS = [
    Question("is there a red ring ?"),
    Question("is there a ring or a cross ?", expected="no"),
    Question("which ring is red ?", ("red ring", "blue cross", "blue"), "blue"),
]
TOLD = [
    (QUESTIONS[0], YES_NO, [SPELLINGS["yes"], SPELLINGS["no"]]),
    (QUESTIONS[1], YES_NO, [SPELLINGS["no"], SPELLINGS["yes"]]),
    (QUESTIONS[2], CHOICES, [("C",), ("A", "B")]),
]


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def model(request):
    return getattr(tiny_chat, request.param)()


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Of several sizes, which the Qwen2-VL reads as several numbers of tokens."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (16, width, 3), dtype=np.uint8) for width in (16, 24, 32, 16, 8, 40, 16, 24)]


def user(processor, text: str, pictures: int = 1) -> str:
    """A user's turn, written by hand."""
    picture = {"<image>": "<image>", "<|image_pad|>": "<|vision_start|><|image_pad|><|vision_end|>"}
    shown = picture[processor.image_token]
    if pictures > 1:
        shown = "".join(f" Image {n + 1}: {shown}" for n in range(pictures))
    return f"user : {shown} {text} "


def logits(model, processor, text: str, images) -> torch.Tensor:
    """Of the token that comes next (V,)."""
    inputs = processor(text=text, images=[*images], return_tensors="pt")
    with torch.inference_mode():
        return model(**inputs).logits[0, -1]


def log_p(model, processor, text: str, images) -> torch.Tensor:
    return logits(model, processor, text, images).log_softmax(-1)


def margin(log_p: torch.Tensor, processor, wanted, others) -> float:
    ids = processor.tokenizer.convert_tokens_to_ids
    return float(logsumexp(log_p[ids(list(wanted))]) - logsumexp(log_p[ids(list(others))]))


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_answers_are_those_of_a_plain_loop(model, images, batch):
    samples = [*images, images[:2], images[5:8]]
    answers = ChatVQA(*model, batch=batch).ask(samples, [QUESTIONS] * len(samples))
    for sample, found in list(zip(samples, answers, strict=True))[:: 1 if batch == 8 else 4]:
        shown = [sample] if isinstance(sample, np.ndarray) else sample
        for (question, how, spellings), answer in zip(TOLD, found, strict=True):
            prompt = user(model[1], f"{question.text} {how}", len(shown)) + "assistant : "
            expected = log_p(*model, prompt, shown)
            assert answer.margin == pytest.approx(margin(expected, model[1], *spellings), abs=1e-5)
            assert answer.certainty == pytest.approx(-math.log(len(expected)) - expected.mean().item(), abs=1e-5)
            assert answer.text in question.choices
            assert answer.valid


def test_an_answer_does_not_depend_on_what_else_is_asked(model, images):
    vqa = ChatVQA(*model)
    together = vqa.ask(images[:3], [QUESTIONS, QUESTIONS[:1], []])
    alone = vqa.ask(images[:1], [QUESTIONS[:1]])[0][0]
    assert together[0][0].margin == pytest.approx(alone.margin, abs=1e-4)
    assert together[1][0].margin != pytest.approx(alone.margin, abs=1e-3)
    assert [len(found) for found in together] == [3, 1, 0]
    with pytest.raises(ValueError, match="lists for 1 samples, not for 2"):
        vqa.ask(images[:2], [QUESTIONS])


def test_a_second_picture_counts_and_so_does_their_order(model, images):
    a, b, c = images[0], images[3], images[6]
    found = [found[0].margin for found in ChatVQA(*model).ask([[a], [a, b], [b, a], [a, c]], [QUESTIONS[:1]] * 4)]
    assert np.abs(np.subtract.outer(found, found) + np.eye(4)).min() > 1e-3


def test_it_compares_pictures_in_both_orders(model, images):
    judge = PairwiseJudge(ChatVQA(*model))
    verdict = judge.compare(images[:1], images[3:4], ["a red ring"])[0]
    asked = f'Which image shows "a red ring" better, image 1 or image 2? {ONE_OF.format("1 or 2")}'
    prompt = user(model[1], asked, 2) + "assistant : "
    orders = (images[0], images[3]), (images[3], images[0])
    one, two = (margin(log_p(*model, prompt, shown), model[1], SPELLINGS["1"], SPELLINGS["2"]) for shown in orders)
    assert verdict.value == pytest.approx((expit(one) + 1 - expit(two)) / 2, abs=1e-5)


def written(model, processor, prompt: str, images, length: int) -> tuple[list[int], list[torch.Tensor]]:
    """What the model writes greedily, one whole pass a token, and the log-probabilities at each place."""
    inputs = processor(text=prompt, images=[*images], return_tensors="pt")
    ids, steps = [], []
    for _ in range(length):
        said = torch.tensor([ids], dtype=torch.long)
        longer = {
            "input_ids": torch.cat([inputs["input_ids"], said], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(said)], 1),
        }
        if "mm_token_type_ids" in inputs:
            longer["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(said)], 1)
        with torch.inference_mode():
            steps.append(model(**{**inputs, **longer}).logits[0, -1].log_softmax(-1))
        ids.append(int(steps[-1].argmax()))
    return ids, steps


@pytest.fixture(scope="module")
def stopping(model, images):
    """A picture and an open question; the tokens of the answer and their log-probabilities. The model stops there."""
    kind, processor = model
    question = Question("what colour is a ring ?", (), "red")
    prompt = user(processor, f"{question.text} {OPEN}") + "assistant : "
    for image in images:
        ids, steps = written(kind, processor, prompt, [image], 12)
        if end := next((n for n in range(2, 12) if ids[n] not in ids[:n]), 0):
            break
    kind.generation_config.eos_token_id = ids[end]
    kind.generation_config.repetition_penalty = 5.0
    yield image, question, ids[:end], steps[:end]
    kind.generation_config.eos_token_id = processor.tokenizer.eos_token_id


def test_an_open_answer_is_written_greedily_and_as_sure_as_its_tokens(model, images, stopping):
    image, question, ids, steps = stopping
    answer = ChatVQA(*model).ask([images[2], image, images[5]], [[question]] * 3)[1][0]
    assert answer.text == model[1].tokenizer.decode(ids, skip_special_tokens=True)
    sure = math.exp(np.mean([step.max().item() for step in steps]))
    assert answer.probability == pytest.approx((1 - sure) / 2, abs=1e-4)
    size = len(steps[0])
    assert answer.certainty == pytest.approx(np.mean([-math.log(size) - s.mean().item() for s in steps]), abs=1e-4)
    right = replace(question, expected=answer.text)
    assert ChatVQA(*model).ask([image], [[right]])[0][0].probability == pytest.approx((1 + sure) / 2, abs=1e-4)


def test_an_open_answer_that_is_cut_is_none(model, stopping):
    image, question, ids, _ = stopping
    answer = ChatVQA(*model, answer_tokens=len(ids)).ask([image], [[question]])[0][0]
    assert not answer.valid
    assert "cut at answer_tokens" in answer.error


def test_a_model_may_think_first_and_is_clamped_afterwards(model, images):
    kind, processor = model
    first = user(processor, f"{QUESTIONS[0].text} {YES_NO} {THINK}") + "assistant : "
    ids, _ = written(kind, processor, first, images[:1], 5)
    thought = processor.tokenizer.decode(ids, skip_special_tokens=True)
    then = (
        f"{user(processor, f'{QUESTIONS[0].text} {YES_NO} {THINK}')}assistant : {thought} user : {YES_NO} assistant : "
    )
    expected = margin(log_p(kind, processor, then, images[:1]), processor, *TOLD[0][2])
    free, tight = (
        ChatVQA(*model, reasoning=5, clamp=clamp).ask(images[:2], [QUESTIONS[:2]] * 2)[0][0]
        for clamp in (None, (0.5 - 1e-4, 0.5 + 1e-4))
    )
    assert free.margin == pytest.approx(expected, abs=1e-5)
    assert abs(free.margin) > 1e-2
    assert tight.margin == pytest.approx(math.copysign(4e-4, expected), rel=1e-3)
    assert tight.certainty == free.certainty


def test_a_question_that_is_too_long_is_not_cut(model, images):
    long = Question("is there " + "a red ring " * 50 + "?")
    prompt = user(model[1], f"{long.text} {YES_NO}") + "assistant : "
    length = model[1](text=prompt, images=[images[0]], return_tensors="pt")["input_ids"].shape[1] + 1
    vqa = ChatVQA(*model)
    failed, fine = vqa.ask(images[:1], [[long, QUESTIONS[0]]])[0]
    assert f"{length - tiny_chat.LIMIT} more than" in failed.error
    assert not failed.valid
    assert fine.margin == pytest.approx(vqa.ask(images[:1], [QUESTIONS[:1]])[0][0].margin, abs=1e-5)
    assert not vqa.ask(images[:1], [[long]])[0][0].valid


def refused(model, question: Question, sample, **settings) -> Answer:
    """The answer to a question that has none, asked beside one that has."""
    first, second = ChatVQA(*model, **settings).ask([sample], [[question, QUESTIONS[0]]])[0]
    assert not first.valid
    assert math.isnan(first.margin)
    assert second.valid or settings
    return first


def test_what_cannot_be_asked_says_why(model, images):
    command = Question(f"is there a {model[1].image_token} ?")
    assert "command to the model" in refused(model, command, images[0]).error
    unspeakable = Question("which ?", ("a", "Z"), "a")
    assert "no single token of the model says 'Z'" in refused(model, unspeakable, images[0]).error
    assert "has 3 pictures, most_images is 2" in refused(model, QUESTIONS[0], images[:3], most_images=2).error
    assert "holds no {how}" in refused(model, QUESTIONS[2], images[0], template="{question}").error
    grey = images[0][..., 0]
    assert "(16, 16), not uint8" in ChatVQA(*model).ask([grey], [QUESTIONS[:1]])[0][0].error


def test_labels_share_the_tokens_that_may_be_listed():
    around = [f"{' ' * n}{label}" for label in ("A", "B") for n in range(90, -1, -1)]
    vocabulary = {token: number for number, token in enumerate([*around, "a", "AB", "yes"])}
    ids = spelling_ids(vocabulary, ("A", "B"))
    tokens = [around[token] for token in ids]
    assert len(ids) == MOST_LISTED
    assert tokens[0] == "A"
    assert max(len(token) for token in tokens) == MOST_LISTED // 2
    assert spelling_ids(vocabulary, ("Yes",)) == (vocabulary["yes"],)


def test_numbers_that_are_none_are_no_answer(images):
    model, processor = tiny_chat.llava()
    model.lm_head.weight.data.fill_(math.nan)
    answer = ChatVQA(model, processor).ask(images[:1], [QUESTIONS[:1]])[0][0]
    assert not answer.valid
    assert "another dtype" in answer.error


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"reasoning": -1}, "reasoning: -1"),
        ({"most_images": 0}, "most_images: 0"),
        ({"answer_tokens": 0}, "answer_tokens: 0"),
        ({"clamp": (0.4, 0.6)}, "clamp: .* needs reasoning"),
        ({"reasoning": 9, "clamp": (0.6, 0.4)}, "clamp"),
        ({"template": "{question} {what}"}, "template"),
        ({"reasoning": 9, "template": "{question}"}, "template: .* for reasoning"),
    ],
)
def test_settings_out_of_range_are_refused(settings, reason):
    with pytest.raises(ValueError, match=reason):
        Asking(**settings)


def test_another_way_of_asking_has_another_id(model):
    ids = {ChatVQA(*model, **s).id for s in ({}, {"reasoning": 5}, {"template": "{question} {how}"}, {"id": "other"})}
    assert len(ids) == 4
    assert ChatVQA(*model, batch=3).id == ChatVQA(*model).id


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(*tiny_chat.llava(), tmp_path_factory.mktemp("llava"))


def test_a_checkpoint_answers_as_the_model_that_was_saved(folder, images):
    vqa = ChatVQA.from_pretrained(folder, batch=4)
    assert str(folder) in vqa.id
    same = ChatVQA(*tiny_chat.llava()).ask(images[:2], [QUESTIONS] * 2)
    for found, expected in zip(vqa.ask(images[:2], [QUESTIONS] * 2), same, strict=True):
        assert [a.text for a in found] == [a.text for a in expected]
        assert [a.margin for a in found] == pytest.approx([a.margin for a in expected], abs=1e-5)
    half = ChatVQA.from_pretrained(folder, dtype="bfloat16").ask(images[:1], [QUESTIONS])[0]
    assert [a.margin for a in half] == pytest.approx([a.margin for a in same[0]], abs=0.1)


def test_a_checkpoint_that_cannot_answer_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="clip_vision_model model, which does not answer in words"):
        ChatVQA.from_pretrained(_vision(folder, tmp_path / "vision"))
    model, processor = tiny_chat.llava()
    headless = LlavaModel(model.config)
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight .* LlavaForConditionalGeneration"):
        ChatVQA.from_pretrained(tiny_chat.save(headless, processor, tmp_path / "headless"))
    processor.chat_template = None
    with pytest.raises(ValueError, match="no chat template; save one"):
        ChatVQA.from_pretrained(tiny_chat.save(model, processor, tmp_path / "speechless"))


def _vision(folder, target):
    AutoConfig.from_pretrained(folder).vision_config.save_pretrained(target)
    return target
