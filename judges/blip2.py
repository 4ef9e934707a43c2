"""A BLIP-2 judge: visual question answering on transformers (2301.12597), read as logit margins.

Image features and query outputs are computed once for each picture, then any number of questions about it are
batched over them. Questions are padded on the right and the language model is causal, so a margin does not
depend on its batch-mates. Images are resized and normalised by the checkpoint's own image processor.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, PreTrainedTokenizerBase
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from judges.base import Answer, Verdict

TEMPLATE = "Question: {} Answer:"

T = TypeVar("T")


class Blip2Judge:
    """Asks about the whole prompt and about each part that `decompose` gives.

    A verdict's margin is the smallest of all answers': the picture shows the prompt only if nothing speaks
    against it. A margin that is not finite makes the verdict invalid.
    """

    def __init__(
        self,
        model: Blip2ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BlipImageProcessorPil,
        whole: Callable[[str], str],
        decompose: Callable[[str], Sequence[str]] = lambda prompt: (),
        template: str = TEMPLATE,
        id: str = "blip2",
        batch: int = 256,
    ):
        self.model, self.tokenizer, self.image_processor = (
            model.eval().requires_grad_(False),
            tokenizer,
            image_processor,
        )
        self.whole, self.decompose = whole, decompose
        self.template, self.id, self.batch = template, id, batch
        self._tokens: dict[str, list[int]] = {}
        yes, no = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in (" yes", " no"))
        self._yes_no = torch.tensor([yes, no])

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu", **settings) -> "Blip2Judge":
        """Load from a local folder or a hub id; `settings` are those of the constructor."""
        return cls(
            Blip2ForConditionalGeneration.from_pretrained(folder).to(device),
            AutoTokenizer.from_pretrained(folder),
            BlipImageProcessorPil.from_pretrained(folder),
            **settings,
        )

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Verdict]:
        asked = [[self.whole(prompt), *self.decompose(prompt)] for prompt in prompts]
        answers = self.ask(images, asked)
        return [self._verdict(found) for found in answers]

    def _verdict(self, answers: Sequence[Answer]) -> Verdict:
        margin = min(answer.margin for answer in answers)
        valid = bool(np.isfinite([answer.margin for answer in answers]).all())
        return Verdict(margin if valid else float("nan"), tuple(answers), self.id, self.template, valid)

    @torch.inference_mode()
    def ask(self, images: Sequence[np.ndarray], questions: Sequence[Sequence[str]]) -> list[list[Answer]]:
        """The answers to the questions about each picture, in order."""
        prefixes = torch.cat([self._prefix(chunk) for chunk in _chunks(images, self.batch)])  # (B, Q, W)
        flat = [(index, question) for index, asked in enumerate(questions) for question in asked]
        answers: list[list[Answer]] = [[] for _ in images]
        for chunk in _chunks(flat, self.batch):
            index = torch.tensor([i for i, _ in chunk])
            margins = self._margins(prefixes[index], [question for _, question in chunk])
            for (i, question), margin in zip(chunk, margins.tolist(), strict=True):
                answers[i].append(Answer(question, margin))
        return answers

    def _prefix(self, images: Sequence[np.ndarray]) -> Tensor:
        """What the language model is shown of each picture: (B, Q, W)."""
        pixels = self.image_processor(list(images), return_tensors="pt").pixel_values
        return self.model.get_image_features(pixels.to(self.model.device), return_dict=True).pooler_output

    def _margins(self, prefixes: Tensor, questions: Sequence[str]) -> Tensor:
        """logit P(yes) - logit P(no) after each question: (B,)."""
        tokens = [self._tokenise(question) for question in questions]
        lengths = torch.tensor([len(ids) for ids in tokens])
        ids = torch.full((len(tokens), int(lengths.max())), self.tokenizer.pad_token_id)
        for row, found in zip(ids, tokens, strict=True):
            row[: len(found)] = torch.tensor(found)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        logits = language_logits(self.model, prefixes, ids.to(prefixes.device), mask.to(prefixes.device))
        last = logits[torch.arange(len(tokens)), prefixes.shape[1] + lengths - 1][:, self._yes_no]
        return (last[:, 0] - last[:, 1]).float().cpu()

    def _tokenise(self, question: str) -> list[int]:
        if question not in self._tokens:
            self._tokens[question] = self.tokenizer(self.template.format(question)).input_ids
        return self._tokens[question]


def language_logits(model: Blip2ForConditionalGeneration, prefixes: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Next-token logits (B, Q + L, V) of a decoder-only language model on `prefixes` (B, Q, W), then `ids` (B, L)."""
    embedded = torch.cat([prefixes, model.get_input_embeddings()(ids).to(prefixes.dtype)], 1)
    seen = torch.cat([torch.ones(prefixes.shape[:2], dtype=mask.dtype, device=mask.device), mask], 1)
    return model.language_model(inputs_embeds=embedded, attention_mask=seen.long(), use_cache=False).logits


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
