"""BLIP-2 and InstructBLIP answer as transformers' own models do, whatever else is in the batch."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
    T5Config,
)

from judges.base import Answer, Question
from judges.blip2 import TEMPLATE, Blip2VQA, InstructBlipVQA, load_blip2
from judges.loading import load_judge
from judges.qformer import IGNORED, sequences
from models.text import word_tokenizer

QUERIES = 4
WORDS = "is there a red blue ring cross how many rings two three square what shape colour yes no question answer : ?"
QUESTIONS = [
    Question("is there a red ring?"),
    Question("is there a ring?", expected="no"),
    Question("what shape is a red cross?", ("red ring", "cross", "blue square ring"), "cross"),
    Question("how many rings?", ("two", "three"), "three"),
]


def _tiny(kind: str, tokenizer) -> torch.nn.Module:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 8, "initializer_range": 0.1}
    reader = {**small, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "encoder_hidden_size": 32}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    opt = OPTConfig(
        **ids, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, dropout=0.0, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    t5 = T5Config(
        **ids, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    shared = {
        "vision_config": vision,
        "qformer_config": reader,
        "text_config": (t5 if kind == "t5" else opt).to_dict(),
        "num_query_tokens": QUERIES,
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "instructblip":
            model = InstructBlipForConditionalGeneration(InstructBlipConfig(**shared))
        else:
            model = Blip2ForConditionalGeneration(Blip2Config(**shared))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture(scope="module", params=["opt", "t5", "instructblip"])
def folder(request, tmp_path_factory) -> Path:
    """An untrained model as its publishers would save it."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = word_tokenizer(WORDS.split(), extra=["<image>"])
    _tiny(request.param, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tokenizer.save_pretrained(folder / "qformer_tokenizer")
    BlipImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vqa(folder: Path) -> Blip2VQA:
    return load_blip2(folder)


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8))


def _log_p(vqa: Blip2VQA, image: np.ndarray, question: str, said: list[int]) -> float:
    """log P(said) after the question, by a plain loop over whole forward passes."""
    model, tokenizer = vqa.model, vqa.tokenizer
    given = tokenizer(TEMPLATE.format(question)).input_ids
    seen = [model.config.image_token_index] * QUERIES
    inputs = {"pixel_values": vqa.image_processor([image], return_tensors="pt").pixel_values}
    if isinstance(model, InstructBlipForConditionalGeneration):
        inputs["qformer_input_ids"] = torch.tensor([given])
        inputs["qformer_attention_mask"] = torch.ones(1, len(given), dtype=torch.long)
    total = 0.0
    for at, token in enumerate(said):
        if vqa.seq2seq:
            ids = torch.tensor([seen + given])
            inputs["decoder_input_ids"] = torch.tensor([[tokenizer.pad_token_id, *said[:at]]])
        else:
            ids = torch.tensor([seen + given + said[:at]])
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0, -1]
        total += logits.log_softmax(-1)[token].item()
    return total


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_margins_are_those_of_a_plain_loop(vqa, images, batch):
    vqa.batch = batch
    answers = vqa.ask(images, [QUESTIONS] * len(images))
    for image, found in list(zip(images, answers, strict=True))[:: 1 if batch == 64 else 4]:
        for question, answer in zip(QUESTIONS, found, strict=True):
            logs = {
                c: _log_p(vqa, image, question.text, vqa.tokenizer(c, add_special_tokens=False).input_ids)
                for c in question.choices
            }
            others = np.logaddexp.reduce([value for choice, value in logs.items() if choice != question.expected])
            assert answer.margin == pytest.approx(logs[question.expected] - others, abs=1e-5)
            assert answer.text == max(logs, key=logs.get)
            assert answer.certainty > 0


def test_an_answer_does_not_depend_on_what_else_is_asked(vqa, images):
    vqa.batch = 64
    together = vqa.ask(images[:3], [QUESTIONS, QUESTIONS[:1], QUESTIONS[2:]])
    alone = vqa.ask(images[:1], [QUESTIONS[:1]])[0][0]
    assert together[0][0].margin == pytest.approx(alone.margin, abs=1e-5)
    assert together[1][0].margin != pytest.approx(alone.margin, abs=1e-3)
    assert [len(found) for found in together] == [4, 1, 2]
    assert vqa.ask(images[:2], [[], []]) == [[], []]


def test_many_questions_about_a_picture_are_answered_as_each_alone(vqa, images):
    vqa.batch = 64
    words = WORDS.split()
    asked = [Question(f"is there a {' '.join(words[: 1 + number % 7])} {words[number % 17]}?") for number in range(40)]
    together = vqa.ask(images[:2], [asked, asked[:3]])
    for number in (0, 15, 16, 39):
        alone = vqa.ask(images[:1], [asked[number : number + 1]])[0][0]
        assert together[0][number].margin == pytest.approx(alone.margin, abs=1e-5)
        assert together[0][number].certainty == pytest.approx(alone.certainty, abs=1e-5)
    assert np.std([answer.margin for answer in together[0]]) > 1e-2


def test_an_open_question_is_answered_in_words(vqa, images):
    question = Question("what colour?", (), "red")
    answer = vqa.ask(images[:1], [[question]])[0][0]
    log_p = _log_p(vqa, images[0], question.text, vqa.tokenizer("red", add_special_tokens=False).input_ids)
    assert answer.margin == pytest.approx(log_p - math.log1p(-math.exp(log_p)), abs=1e-4)
    assert answer.valid
    assert answer.text == vqa.ask(images[:2], [[question], [question]])[0][0].text


def test_a_question_that_is_too_long_is_not_cut(vqa, images):
    long = Question("is there " + "a red ring " * 30 + "?")
    found, other = vqa.ask(images[:1], [[long, QUESTIONS[0]]])[0]
    assert other.valid
    if vqa.seq2seq:  # relative positions: there is no longest text
        spelled = (vqa.tokenizer(choice, add_special_tokens=False).input_ids for choice in long.choices)
        yes, no = (_log_p(vqa, images[0], long.text, ids) for ids in spelled)
        assert found.margin == pytest.approx(yes - no, abs=1e-5)
    else:
        assert "more than" in found.error
        assert math.isnan(found.probability)


def test_a_question_that_only_the_q_former_cannot_read_is_refused(images):
    tokenizer = word_tokenizer(WORDS.split(), extra=["<image>"])
    model = _tiny("instructblip", tokenizer)
    model.config.qformer_config.max_position_embeddings = 12
    pictures = BlipImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    vqa = InstructBlipVQA(model, tokenizer, pictures, qformer_tokenizer=tokenizer)
    fits, long = vqa.ask(images[:1], [[Question("is there a red ring?"), Question("is there a red ring " * 3)]])[0]
    assert fits.valid
    assert "tokens long" in long.error


def test_several_images_of_a_sample_are_refused(vqa, images):
    with pytest.raises(ValueError, match="one image at a time"):
        vqa.ask([images[:2]], [QUESTIONS[:1]])


def test_a_model_that_cannot_speak_is_refused(itm_folder):
    with pytest.raises(ValueError, match="no language model"):
        load_blip2(itm_folder)


def test_without_settings_a_checkpoint_is_asked_about_the_whole_prompt_only(judge_folder, images, tmp_path):
    for path in (judge_folder / "vqa").iterdir():
        if path.name != "judge.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    verdict = load_judge(tmp_path).score(images[:1], ["an oil painting of a dog"])[0]
    assert [a.question for a in verdict.evidence] == ['Does this figure show "an oil painting of a dog"?']


def test_extreme_margins_have_finite_probabilities():
    assert Answer("?", 1e4).probability == pytest.approx(1.0)
    assert math.isnan(Answer("?", math.nan).probability)


def test_targets_follow_the_given_words():
    tokenizer = word_tokenizer(["a", "b", "yes"])
    ids, target = sequences(tokenizer, [("a b", "yes")], 6)
    a, b, yes = tokenizer.convert_tokens_to_ids(["a", "b", "yes"])
    assert ids[0].tolist() == [a, b, yes, tokenizer.eos_token_id]
    assert target[0].tolist() == [IGNORED, yes, tokenizer.eos_token_id, IGNORED]
    with pytest.raises(ValueError, match="do not fit"):
        sequences(tokenizer, [("a b", "yes")], 3)
