"""What vLLM is asked for, and what is made of its outputs: those of a module of its shape, run by transformers."""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Blip2Config, Blip2ForConditionalGeneration, BlipImageProcessorPil, T5Config

from judges.base import Question
from judges.blip2 import Blip2VQA, load_blip2
from judges.chat import ChatVQA
from judges.pairwise import PairwiseJudge
from judges.qformer import small_config
from judges.vllm_engine import VllmBlip2VQA, VllmVQA, adds_special, load_vllm
from models.text import word_tokenizer
from tests import tiny_chat

QUESTIONS = [
    Question("is there a red ring ?"),
    Question("which ring is red ?", ("red ring", "blue cross", "blue"), "blue"),
    Question("is there a ring ?", expected="no"),
]
OPEN = Question("what colour is a ring ?", (), "red")


class VLLMValidationError(Exception):
    """Not a ValueError, as in vLLM."""


@dataclass
class SamplingParams:
    """The fields that judges may use, checked as vLLM does."""

    max_tokens: int = 16
    temperature: float = 1.0
    logprobs: int | None = None
    logprob_token_ids: list[int] | None = None

    def __post_init__(self):
        assert self.temperature == 0.0 or self.logprob_token_ids == [0]
        if self.logprob_token_ids is not None:
            assert 0 < len(self.logprob_token_ids) <= 128
            assert self.logprobs in (None, len(self.logprob_token_ids))


MODELS: dict[str, tuple] = {}
"""The model in each folder, and its processor or tokenizer."""


class LLM:
    """Runs a model of transformers, one whole pass a token, and answers in the shape of vLLM's outputs."""

    def __init__(self, model: str, *, limit_mm_per_prompt: dict[str, int], max_model_len: int = tiny_chat.LIMIT):
        self.model, self.processor = MODELS[model]
        self.most_images = limit_mm_per_prompt["image"]
        self.model_config = SimpleNamespace(
            dtype=torch.float32, max_model_len=max_model_len, hf_config=self.model.config
        )
        self.calls: list[int] = []

    def get_tokenizer(self):
        return getattr(self.processor, "tokenizer", self.processor)

    def chat(self, messages, sampling_params, *, use_tqdm, chat_template_kwargs, tokenization_kwargs):
        assert chat_template_kwargs == {}
        assert use_tqdm is False
        self.calls.append(len(messages))
        inputs = [self.rendered(talk, tokenization_kwargs["add_special_tokens"]) for talk in messages]
        return [self.output(i, params) for i, params in zip(self.checked(inputs), sampling_params, strict=True)]

    def generate(self, prompts, sampling_params, *, use_tqdm):
        assert use_tqdm is False
        self.calls.append(len(prompts))
        config = self.model.config
        pictures = BlipImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        inputs = []
        for prompt in prompts:
            assert set(prompt) == {"prompt_token_ids", "multi_modal_data"}
            assert isinstance(prompt["multi_modal_data"]["image"], Image.Image)
            seen = [config.image_token_index] * config.num_query_tokens
            pixels = pictures([prompt["multi_modal_data"]["image"]], return_tensors="pt").pixel_values
            inputs.append({"input_ids": torch.tensor([seen + prompt["prompt_token_ids"]]), "pixel_values": pixels})
        return [self.output(i, params) for i, params in zip(self.checked(inputs), sampling_params, strict=True)]

    def rendered(self, messages, add_special_tokens: bool) -> dict[str, torch.Tensor]:
        parts = [part for message in messages for part in message["content"]]
        pictures = [part["image_pil"] for part in parts if part["type"] == "image_pil"]
        assert len(pictures) <= self.most_images
        shown = [
            {**m, "content": [{"type": "image"} if p["type"] == "image_pil" else p for p in m["content"]]}
            for m in messages
        ]
        text = self.processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=False)
        told = {"images": pictures, "add_special_tokens": add_special_tokens, "return_tensors": "pt"}
        return dict(self.processor(text=text, **told))

    def checked(self, inputs):
        for found in inputs:
            if (length := found["input_ids"].shape[1]) >= self.model_config.max_model_len:
                raise VLLMValidationError(f"The decoder prompt (length {length}) is too long.")
        return inputs

    def output(self, inputs, params: SamplingParams):
        ids, listed, reason = [], [], "length"
        while len(ids) < params.max_tokens and reason == "length":
            said = torch.tensor([ids], dtype=torch.long)
            longer = torch.cat([inputs["input_ids"], said], 1)
            with torch.inference_mode():
                out = self.model(**{**inputs, "input_ids": longer, "attention_mask": torch.ones_like(longer)})
            log_p = out.logits[0, -1].log_softmax(-1)
            ids.append(int(log_p.argmax()))
            shown = [ids[-1], *(params.logprob_token_ids or [])]
            listed.append({token: SimpleNamespace(logprob=log_p[token].item()) for token in shown})
            if ids[-1] == self.model.generation_config.eos_token_id:
                reason = "stop"
        scored = params.logprobs is not None or params.logprob_token_ids is not None
        text = self.get_tokenizer().decode(ids[:-1] if reason == "stop" else ids, skip_special_tokens=True)
        reply = {"text": text, "token_ids": ids, "logprobs": listed if scored else None, "finish_reason": reason}
        return SimpleNamespace(outputs=[SimpleNamespace(**reply)])


@pytest.fixture
def vllm(monkeypatch) -> ModuleType:
    module, exceptions = ModuleType("vllm"), ModuleType("vllm.exceptions")
    module.LLM, module.SamplingParams, module.__version__ = LLM, SamplingParams, "0.32.0"
    exceptions.VLLMValidationError = VLLMValidationError
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.exceptions", exceptions)
    return module


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory) -> Path:
    model, processor = tiny_chat.llava()
    folder = tiny_chat.save(model, processor, tmp_path_factory.mktemp("llava"))
    MODELS[str(folder)] = model, processor
    return folder


@pytest.fixture(scope="module")
def blip2_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("blip2")
    words = "is there a red blue ring cross which what colour question answer : ? yes no"
    tokenizer = word_tokenizer(words.split(), extra=["<image>"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Blip2ForConditionalGeneration(
            small_config(tokenizer, size=32, patch=8, width=32, queries=4, with_text=False)
        )
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    BlipImageProcessorPil(do_resize=False, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder)
    MODELS[str(folder)] = model, AutoTokenizer.from_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))


def same(first, second) -> bool:
    """Whether the answers agree in all but certainty, which is not over the same tokens."""
    pairs = [pair for row in zip(first, second, strict=True) for pair in zip(*row, strict=True)]
    margins = np.array([(a.margin, b.margin) for a, b in pairs])
    told = [[(a.text, a.error) for a in pair] for pair in pairs]
    return np.allclose(*margins.T, rtol=0, atol=1e-5, equal_nan=True) and all(a == b for a, b in told)


@pytest.mark.parametrize("batch", [1, 4, 1024])
def test_a_chat_model_answers_as_with_transformers(vllm, chat_folder, images, batch):
    vqa = load_vllm(chat_folder, batch=batch, most_images=2)
    samples = [*images, images[:2], images[1::-1]]
    answers = vqa.ask(samples, [QUESTIONS] * len(samples))
    assert isinstance(vqa, VllmVQA)
    assert same(answers, ChatVQA.from_pretrained(chat_folder).ask(samples, [QUESTIONS] * len(samples)))
    assert sum(vqa.llm.calls) == len(samples) * len(QUESTIONS)
    assert max(vqa.llm.calls) <= batch
    a, b = answers[0][2], answers[0][0]
    assert a.certainty != b.certainty
    assert abs(answers[-1][0].margin - answers[-2][0].margin) > 1e-3


def test_reasoning_and_open_answers_are_those_of_transformers(vllm, chat_folder, images):
    settings = {"answer_tokens": 8, "reasoning": 4, "clamp": (0.4, 0.6)}
    asked = [[OPEN, QUESTIONS[0]]] * 4
    found = load_vllm(chat_folder, **settings).ask(images, asked)
    assert same(found, ChatVQA.from_pretrained(chat_folder, **settings).ask(images, asked))
    assert all("cut at answer_tokens" in opened.error for opened, _ in found)
    assert all(0.4 <= closed.probability <= 0.6 for _, closed in found)


def test_an_open_answer_ends_where_the_model_stops(vllm, chat_folder, images, monkeypatch):
    model, processor = tiny_chat.llava()
    monkeypatch.setitem(MODELS, str(chat_folder), (model, processor))
    cut = load_vllm(chat_folder, answer_tokens=8).ask(images[:1], [[OPEN]])[0][0]
    last = processor.tokenizer.convert_tokens_to_ids(cut.error.removesuffix("'").split()[-1])
    model.generation_config.eos_token_id = last
    found = load_vllm(chat_folder, answer_tokens=8).ask(images[:1], [[OPEN]])
    assert found[0][0].valid
    assert same(found, ChatVQA(model, processor, answer_tokens=8).ask(images[:1], [[OPEN]]))


def test_it_compares_pictures(vllm, chat_folder, images):
    served, local = (
        PairwiseJudge(vqa).compare(images[:2], images[2:], ["a red ring"] * 2)
        for vqa in (load_vllm(chat_folder), ChatVQA.from_pretrained(chat_folder))
    )
    assert [v.margin for v in served] == pytest.approx([v.margin for v in local], abs=1e-5)


def test_one_question_that_is_refused_fails_alone(vllm, chat_folder, images):
    long = Question("is there " + "a red ring " * 50 + "?")
    vqa = load_vllm(chat_folder)
    found = vqa.ask(images, [[QUESTIONS[0], long], QUESTIONS, [QUESTIONS[1]], []])
    assert found[0][1].error.startswith("is refused by vLLM: The decoder prompt (length ")
    assert same([found[0][:1], *found[1:]], vqa.ask(images, [QUESTIONS[:1], QUESTIONS, [QUESTIONS[1]], []]))
    assert "most_images is 2" in load_vllm(chat_folder, most_images=2).ask([images[:3]], [QUESTIONS[:1]])[0][0].error


@pytest.mark.parametrize(("template", "adds"), [("{{ bos_token }}", False), ("", True)])
def test_the_first_token_is_added_where_the_template_has_none(template, adds):
    _, processor = tiny_chat.llava()
    processor.chat_template = template + processor.chat_template
    assert adds_special(processor) is adds


@pytest.mark.parametrize("batch", [3, 1024])
def test_blip2_answers_as_with_transformers(vllm, blip2_folder, images, batch):
    vqa = load_vllm(blip2_folder, {"max_model_len": 64}, batch=batch)
    assert isinstance(vqa, VllmBlip2VQA)
    asked = [[*QUESTIONS, Question("is there ?", ("yes",)), OPEN]] * 2
    local = load_blip2(blip2_folder)
    assert isinstance(local, Blip2VQA)
    found = vqa.ask(images[:2], asked)
    assert same(found, local.ask(images[:2], asked))
    assert all(answer.valid for row in found for answer in row)
    assert vqa.ask([images[:1], images[1]], [QUESTIONS[:1], []])[1] == []
    with pytest.raises(ValueError, match="one image at a time"):
        vqa.ask([images[:2]], [QUESTIONS[:1]])


def test_what_is_too_long_for_blip2_is_not_cut(vllm, blip2_folder, images):
    vqa = load_vllm(blip2_folder, {"max_model_len": 64})
    long = Question("is there " + "a red ring " * 20 + "?")
    length = 4 + len(vqa.tokenizer(f"Question: {long.text} Answer:").input_ids) + 16
    failed, fine = vqa.ask(images[:1], [[long, QUESTIONS[0]]])[0]
    assert f"{length - 64} more than" in failed.error
    assert fine.valid
    assert vqa.ask([images[0][..., 0]], [QUESTIONS[:1]])[0][0].error


def test_without_vllm_there_is_a_remedy(chat_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match="not installed here; use the environment that `make vllm` builds"):
        load_vllm(chat_folder)


def test_what_vllm_cannot_run_is_refused(vllm, chat_folder, tmp_path, monkeypatch):
    config = Blip2Config(text_config=T5Config(num_layers=1).to_dict())
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a BLIP-2 with a T5"):
        load_vllm(tmp_path)
    monkeypatch.setattr(vllm, "SamplingParams", lambda max_tokens=16: None)
    with pytest.raises(ValueError, match=r"0\.32\.0 cannot list chosen tokens"):
        load_vllm(chat_folder)
