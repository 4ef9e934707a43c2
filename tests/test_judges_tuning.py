"""A judge is taught by the answers it reads, where it may learn, to the same bytes, and is then a plain checkpoint."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from transformers import Blip2Config, Blip2ForConditionalGeneration, BlipImageProcessorPil, T5Config

from judges.base import Question, log_odds
from judges.blip2 import Blip2VQA, InstructBlipVQA
from judges.chat import ChatVQA
from judges.shapes.questions import decompose
from judges.tuning import (
    Lesson,
    Stopped,
    Tuning,
    answer_ids,
    answering_loss,
    blip2_inputs,
    chat_inputs,
    check,
    save_adapter,
    save_merged,
    taught,
    tune,
)
from models.text import word_tokenizer
from tests import tiny_chat

WORDS = "is there a red ring ? yes no Yes : Question Answer"
QUESTIONS = [Question("is there a red ring?"), Question("is there a ring?", expected="no")]
CHAT_QUESTIONS = [Question("is there a red ring ?"), Question("is there a ring or a cross ?", expected="no")]
SETTINGS = Tuning("sft", rank=4, epochs=6, batch=8, learning_rate=1e-2, beta=0.1, seed=0, save_steps=1000)


@pytest.fixture
def opt(judge_folder):
    return Blip2VQA.from_pretrained(judge_folder / "vqa")


@pytest.fixture
def t5():
    tokenizer = word_tokenizer(WORDS.split(), extra=["<image>"])
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    start = {"decoder_start_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    config = Blip2Config(
        vision_config={**small, "image_size": 32, "patch_size": 8, "initializer_range": 0.1},
        qformer_config={**small, "vocab_size": len(tokenizer), "encoder_hidden_size": 32},
        text_config=T5Config(**ids, **start, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2).to_dict(),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Blip2ForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    pictures = BlipImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return Blip2VQA(model, tokenizer, pictures)


@pytest.fixture
def llava():
    return ChatVQA(*tiny_chat.llava())


@pytest.fixture
def qwen2_vl():
    return ChatVQA(*tiny_chat.qwen2_vl())


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Dark and light ones in turn."""
    random = np.random.default_rng(0)
    return [random.integers(*((0, 96), (160, 256))[n % 2], (32, 32, 3), dtype=np.uint8) for n in range(16)]


def asked(vqa):
    return CHAT_QUESTIONS if isinstance(vqa, ChatVQA) else QUESTIONS


def lessons(vqa, images, target=lambda light: float(light)):
    """Who learns them says yes to light pictures."""
    return [
        Lesson(image.copy, q, target(n % 2) if q.expected == "yes" else 1 - target(n % 2))
        for n, image in enumerate(images)
        for q in asked(vqa)
    ]


def margins(vqa, images):
    return np.array([[a.margin for a in found] for found in vqa.ask(images, [asked(vqa)] * len(images))])


def reloaded(vqa, folder):
    return (ChatVQA if isinstance(vqa, ChatVQA) else Blip2VQA).from_pretrained(folder)


@pytest.mark.parametrize("name", ["opt", "t5", "llava", "qwen2_vl"])
def test_what_is_taught_is_what_is_read(name, images, request):
    vqa = request.getfixturevalue(name)
    questions = [question for _ in images for question in asked(vqa)]
    shown = [image for image in images for _ in asked(vqa)]
    feed = chat_inputs if isinstance(vqa, ChatVQA) else blip2_inputs
    with torch.no_grad():
        log_p = vqa.model(**feed(vqa, shown, questions)).logits[:, -1].log_softmax(-1)
    yes, no = (log_p[:, ids].logsumexp(-1) for ids in answer_ids(vqa))
    expected = (yes - no) * torch.tensor([1.0 if q.expected == "yes" else -1.0 for q in questions])
    np.testing.assert_allclose(expected, margins(vqa, images).flatten(), atol=1e-4)


def test_the_loss_is_that_of_a_language_model_on_its_answer():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    yes = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    expected = F.cross_entropy(logits, torch.where(yes > 0, 3, 7))
    torch.testing.assert_close(answering_loss(logits, yes, [3], [7]), expected)


def test_a_soft_verdict_is_learned_as_a_probability():
    logits = torch.zeros(1, 9, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(400):
        optimiser.zero_grad()
        answering_loss(logits, torch.tensor([0.8]), [3, 4], [7]).backward()
        optimiser.step()
    log_p = logits.detach().log_softmax(-1)[0]
    assert float(log_p[[3, 4]].logsumexp(-1) - log_p[7]) == pytest.approx(log_odds(0.8), abs=1e-2)


@pytest.mark.parametrize(("name", "method"), [("opt", "sft"), ("t5", "sft"), ("llava", "sft"), ("llava", "dpo")])
def test_a_judge_learns_a_taste_and_becomes_a_plain_checkpoint(name, method, images, request, tmp_path):
    vqa = request.getfixturevalue(name)
    vqa.model.save_pretrained(tmp_path / "untuned")
    before = {key: value.clone() for key, value in vqa.model.state_dict().items()}
    seen = []
    settings = replace(SETTINGS, method=method, epochs=6 if method == "sft" else 12)
    model = tune(vqa, lessons(vqa, images), settings, tmp_path / "resume", lambda *step: seen.append(step))
    save_adapter(model, tmp_path / "adapter")
    save_merged(vqa, model, tmp_path / "checkpoint")
    tuned = reloaded(vqa, tmp_path / "checkpoint")
    light = np.array([[1.0 if n % 2 else -1.0] * 2 for n in range(len(images))]) * [1, -1]
    assert (margins(tuned, images) * light > 0).all()
    assert [step for step, _, _ in seen] == list(range(1, seen[0][1] + 1))
    assert seen[-1][2] < seen[0][2]

    changed = {key for key, value in tuned.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert not [key for key in changed if "vision" in key or "intermediate" in key]
    assert all(
        any(part in key for part in ("query", "value", "projection", "q_proj", "v_proj", ".q.", ".v."))
        for key in changed
    )

    plain = type(tuned.model).from_pretrained(tmp_path / "untuned")
    adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    for key, value in adapted.state_dict().items():
        torch.testing.assert_close(value, tuned.model.state_dict()[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "method"), [("opt", "sft"), ("llava", "dpo")])
def test_stopped_and_resumed_it_ends_with_the_same_bytes(name, method, images, request, tmp_path, judge_folder):
    def fresh():
        return ChatVQA(*tiny_chat.llava()) if name == "llava" else Blip2VQA.from_pretrained(judge_folder / "vqa")

    def adapter(vqa, folder, **watch):
        settings = replace(SETTINGS, method=method, epochs=2)
        model = tune(vqa, lessons(vqa, images), settings, tmp_path / folder / "resume", **watch)
        save_adapter(model, tmp_path / folder)
        return {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir() if p.is_file()}

    torch.manual_seed(5)
    whole = adapter(fresh(), "whole")
    steps = []
    with pytest.raises(Stopped):
        adapter(fresh(), "cut", on_step=lambda step, *_: steps.append(step), should_stop=lambda: True)
    torch.manual_seed(6)
    assert adapter(fresh(), "cut", on_step=lambda step, *_: steps.append(step)) == whole
    assert steps == list(range(1, 9))
    other = load_file(tmp_path / "whole" / "adapter_model.safetensors")
    assert any(value.abs().max() > 0 for key, value in other.items() if "lora_B" in key)


def test_dropout_is_off(images, judge_folder, tmp_path):
    """As BLIP-2s of full size have it, in modules of the Q-Former and in functions of OPT."""

    def loss(dropout, folder):
        config = Blip2Config.from_pretrained(judge_folder / "vqa")
        config.text_config.dropout = config.text_config.attention_dropout = dropout
        config.qformer_config.hidden_dropout_prob = config.qformer_config.attention_probs_dropout_prob = dropout
        vqa = Blip2VQA.from_pretrained(judge_folder / "vqa")
        model = Blip2ForConditionalGeneration.from_pretrained(judge_folder / "vqa", config=config)
        vqa = Blip2VQA(model, vqa.tokenizer, vqa.image_processor)
        seen = []
        tune(vqa, lessons(vqa, images), replace(SETTINGS, epochs=1), tmp_path / folder, lambda *s: seen.append(s[2]))
        return seen

    assert loss(0.5, "some") == loss(0.0, "none")


def test_a_verdict_teaches_what_it_says():
    whole, exists, total = decompose("a ring")
    assert taught("a ring", [whole, exists, total], 1.0) == [(whole, 1.0), (exists, 1.0), (total, 1.0)]
    assert taught("a ring", [whole, exists, total], 0.0) == [(whole, 0.0)]  # "is there a ring?" holds the prompt too
    assert taught("a ring", [whole, exists, total], 0.4) == [(whole, 0.4)]
    assert taught("a ring", [whole, exists, total], 0.7) == [(whole, 0.7), (exists, 0.7), (total, 0.7)]
    templates = [Question('Is this "A ring"?'), Question('Does it show "A ring"?', ("Yes", "No"), "Yes")]
    assert taught("a ring.", templates, 0.0) == [(question, 0.0) for question in templates]
    parts = [Question("is there a dog?"), Question("is it red?", parents=(0,))]
    assert taught("a red dog", parts, 0.0) == []
    assert taught("a red dog", parts, 1.0) == [(part, 1.0) for part in parts]
    assert taught("a red dog", parts[:1], 0.0) == [(parts[0], 0.0)]
    colour = Question("what colour is a ring?", ("red", "blue"), "red")
    assert taught("a ring", [whole, colour], 1.0) == [(whole, 1.0)]


def test_what_cannot_be_tuned_says_why(opt, llava, images, tmp_path):
    with pytest.raises(ValueError, match="checkpoint: nobody knows how to tune object"):
        check(object())
    with pytest.raises(ValueError, match="checkpoint: nobody knows how to tune InstructBlipVQA"):
        check(InstructBlipVQA(opt.model, opt.tokenizer, opt.image_processor, qformer_tokenizer=opt.tokenizer))
    with pytest.raises(ValueError, match=r"reasoning: .* set it to 0"):
        check(ChatVQA(llava.model, llava.processor, reasoning=5))
    with pytest.raises(ValueError, match=r"method: .* by sft"):
        tune(opt, lessons(opt, images), replace(SETTINGS, method="dpo"), tmp_path)
    opt.tokenizer = Letters()
    with pytest.raises(ValueError, match="checkpoint: its tokenizer writes yes or no in several"):
        check(opt)


def test_a_loss_that_is_no_number_stops_it(llava, images, tmp_path):
    llava.model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        tune(llava, lessons(llava, images), SETTINGS, tmp_path)


class Letters:
    """A tokenizer that spells."""

    unk_token_id = None

    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=[ord(letter) for letter in text.strip()])
