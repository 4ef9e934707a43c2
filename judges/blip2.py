"""BLIP-2 and InstructBLIP answering questions, on transformers (2301.12597, 2305.06500), read as log-odds.

What can be computed once for a picture is: BLIP-2's query outputs, InstructBLIP's image features (its Q-Former reads
the question). Any number of questions are then batched over it. A decoder-only language model reads a picture's query
outputs once and the questions about it side by side, under a mask that hides them from one another. Questions are
padded on the right and masked, so an answer does not depend on its batch-mates. Images are resized and normalised by
the checkpoint's own image processor.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    PreTrainedTokenizerBase,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from judges.base import TEMPLATE, Answer, Question, Sample, only_image
from judges.replies import NoAnswer, choice_answer, spellings

OPEN_TOKENS = 16
"""The length of an answer to an open question, in tokens."""
SIDE_BY_SIDE = 16
"""At most so many questions are read after one prefix: the cost of attention grows with the square of their length."""

T = TypeVar("T")


@dataclass(frozen=True)
class _Reading:
    """One pass of the language model about picture `image`: `given` is the question, `said` the answer so far.

    `reads` tells at how many tokens into the answer which token's log-probability belongs to which (choice, spelling).
    """

    image: int
    place: int
    text: str
    given: tuple[int, ...]
    said: tuple[int, ...]
    reads: tuple[tuple[int, int, tuple[int, int]], ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.given + self.said


class Blip2VQA:
    """Answers from a BLIP-2 with a decoder-only (OPT) or an encoder-decoder (T5) language model.

    A choice's probability is that of its tokens after the question, summed over its spellings in lower case and
    capitalised. One-token choices, yes and no, are all read from one pass. The answer to an open question is written
    greedily; its margin is the log-odds of the expected text.
    """

    most_images = 1

    def __init__(
        self,
        model: Blip2ForConditionalGeneration,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BlipImageProcessorPil,
        template: str = TEMPLATE,
        id: str = "blip2",
        batch: int = 256,
    ):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.image_processor = image_processor
        self.template, self.id, self.batch = template, id, batch
        self.seq2seq = not model.config.use_decoder_only_language_model
        self._tokens: dict[tuple[str, bool], tuple[int, ...]] = {}

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu", **settings) -> "Blip2VQA":
        """Load from a local folder or a hub id; `settings` are those of the constructor."""
        return cls(
            Blip2ForConditionalGeneration.from_pretrained(folder).to(device),
            AutoTokenizer.from_pretrained(folder),
            BlipImageProcessorPil.from_pretrained(folder),
            **{"id": str(folder), **settings},
        )

    @torch.inference_mode()
    def ask(self, samples: Sequence[Sample], questions: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        """The answers to the questions about each picture, in order. Raises ValueError for a sample of several."""
        images = [only_image(sample) for sample in samples]
        answers: list[list[Answer]] = []
        for start, chunk in _chunks(images, self.batch):
            features = self._look(self._pixels(chunk))
            asked = questions[start : start + len(chunk)]
            found: dict[tuple[int, int], Answer] = {}
            readings = []
            for image, several in enumerate(asked):
                for place, question in enumerate(several):
                    try:
                        self._check(question)
                        if question.choices:
                            readings += self._readings(image, place, question)
                        else:
                            found[image, place] = self._open(features, image, question)
                    except NoAnswer as reason:
                        found[image, place] = Answer.failed(question.text, str(reason))
            for key, scores in self._read(features, readings).items():
                found[key] = _choice(asked[key[0]][key[1]], *scores)
            answers += [[found[i, p] for p in range(len(several))] for i, several in enumerate(asked)]
        return answers

    def _pixels(self, images: Sequence[np.ndarray]) -> Tensor:
        pixels = self.image_processor(list(images), return_tensors="pt").pixel_values
        return pixels.to(self.model.device, self.model.dtype)

    def _look(self, pixels: Tensor) -> Tensor:
        """What is kept of each picture: (B, Q, W), here what the language model is shown of it."""
        return self.model.get_image_features(pixels, return_dict=True).pooler_output

    def _prefixes(self, features: Tensor, index: Tensor, texts: Sequence[str]) -> Tensor:
        """What the language model is shown before each of R questions about picture `index[r]`: (R, Q, W)."""
        return features[index]

    def _prefix(self, reading: _Reading) -> Hashable:
        """Equal for readings with equal prefixes."""
        return reading.image

    def _check(self, question: Question) -> None:
        """Raises NoAnswer for a question that is too long."""
        if (excess := self._excess(question.text)) > 0:
            length = len(self._given(question.text))
            raise NoAnswer(f"is {length} tokens long, {excess} more than {self.id} can read")

    def _excess(self, question: str) -> float:
        """By how many tokens a question is too long; a T5, whose positions are relative, has no limit."""
        limit = getattr(self.model.config.text_config, "max_position_embeddings", None) or math.inf
        return self.model.config.num_query_tokens + len(self._given(question)) + OPEN_TOKENS - limit

    def _given(self, question: str) -> tuple[int, ...]:
        return self._ids(self.template.format(question), special=True)

    def _ids(self, text: str, special: bool = False) -> tuple[int, ...]:
        if (text, special) not in self._tokens:
            self._tokens[text, special] = tuple(self.tokenizer(text, add_special_tokens=special).input_ids)
        return self._tokens[text, special]

    def _readings(self, image: int, place: int, question: Question) -> list[_Reading]:
        reads: dict[tuple[int, ...], list] = defaultdict(list)
        for number, choice in enumerate(question.choices):
            for spelling, ids in enumerate(spellings(choice, self._ids, self.tokenizer.unk_token_id)):
                reads[ids[:-1]] += [(at, token, (number, spelling)) for at, token in enumerate(ids)]
        given = self._given(question.text)
        return [_Reading(image, place, question.text, given, said, tuple(r)) for said, r in reads.items()]

    def _read(
        self, features: Tensor, readings: list[_Reading]
    ) -> dict[tuple[int, int], tuple[dict[int, float], float]]:
        """For each question the log-probability of every choice, and the certainty with which it was chosen."""
        logs: dict[tuple[int, int], dict[tuple[int, int], float]] = defaultdict(lambda: defaultdict(float))
        certainty: dict[tuple[int, int], float] = {}
        for batch in self._batches(readings):
            chunk = [reading for row in batch for reading in row]
            log_p = self._next_tokens(features, batch).float().log_softmax(-1)  # (R, A, V), A the longest answer
            rows = torch.tensor([row for row, r in enumerate(chunk) for _ in r.reads])
            steps = torch.tensor([step for r in chunk for step, _, _ in r.reads])
            tokens = torch.tensor([token for r in chunk for _, token, _ in r.reads])
            values = iter(log_p[rows, steps, tokens].tolist())
            sure = (-math.log(log_p.shape[-1]) - log_p[:, 0].mean(-1)).tolist()
            for reading, value in zip(chunk, sure, strict=True):
                key = reading.image, reading.place
                certainty[key] = value
                for _, _, spelled in reading.reads:
                    logs[key][spelled] += next(values)
        return {key: (_summed(spelled), certainty[key]) for key, spelled in logs.items()}

    def _batches(self, readings: Sequence[_Reading]) -> Iterator[Sequence[Sequence[_Reading]]]:
        """Rows of readings that are read after one prefix; those in a batch are of similar length."""
        most = 1 if self.seq2seq else min(SIDE_BY_SIDE, self.batch)
        alike: dict[Hashable, list[_Reading]] = defaultdict(list)
        for reading in readings:
            alike[self._prefix(reading)].append(reading)
        rows = [row for found in alike.values() for _, row in _chunks(found, most)]
        rows.sort(key=lambda row: sum(len(reading.tokens) for reading in row))
        for _, batch in _chunks(rows, self.batch // max((len(row) for row in rows), default=1)):
            yield batch

    def _next_tokens(self, features: Tensor, rows: Sequence[Sequence[_Reading]]) -> Tensor:
        """Next-token logits (R, A, V) of R readings in rows, after the question and 0 to A - 1 tokens of the answer."""
        readings = [reading for row in rows for reading in row]
        index = torch.tensor([row[0].image for row in rows])
        prefixes = self._prefixes(features, index, [row[0].text for row in rows])
        longest = max(len(r.said) for r in readings) + 1
        if self.seq2seq:
            ids, mask = self._padded([r.given for r in readings])
            start = self.model.language_model.config.decoder_start_token_id
            said, _ = self._padded([(start, *r.said) for r in readings])
            return self.model.language_model(
                inputs_embeds=_embedded(self.model, prefixes, ids),
                attention_mask=_mask(prefixes, mask),
                decoder_input_ids=said,
                use_cache=False,
            ).logits
        hidden = self._side_by_side(prefixes, [[r.tokens for r in row] for row in rows])
        starts = [start for row in rows for start in accumulate((len(r.tokens) for r in row[:-1]), initial=0)]
        ends = [start + len(r.given) for start, r in zip(starts, readings, strict=True)]
        row = torch.tensor([number for number, row in enumerate(rows) for _ in row], device=hidden.device)
        last = torch.tensor(ends, device=hidden.device) + prefixes.shape[1] - 1
        at = (last[:, None] + torch.arange(longest, device=hidden.device)).clamp(max=hidden.shape[1] - 1)
        return self.model.language_model.get_output_embeddings()(hidden[row[:, None], at])

    def _side_by_side(self, prefixes: Tensor, rows: Sequence[Sequence[tuple[int, ...]]]) -> Tensor:
        """Last hidden states (P, Q + L, W) of a decoder-only language model on P rows of texts, L tokens the longest.

        Each text is read as if it followed the row's prefix (P, Q, W) directly: it sees the prefix and itself, and its
        positions go on from there.
        """
        ids, _ = self._padded([[token for text in row for token in text] for row in rows])
        part, _ = self._padded([[part for part, text in enumerate(row, 1) for _ in text] for row in rows], fill=0)
        place, _ = self._padded([[place for text in row for place in range(len(text))] for row in rows], fill=0)
        queries = prefixes.shape[1]
        part = F.pad(part, (queries, 0))  # (P, Q + L), 0 on the prefix, and on the padding, which comes last
        seen = ((part == 0)[:, None] | (part[:, None] == part[:, :, None])).tril()
        unseen = torch.finfo(prefixes.dtype).min
        positions = torch.arange(queries, device=ids.device).expand(len(rows), -1)
        return self.model.language_model.get_decoder()(
            inputs_embeds=_embedded(self.model, prefixes, ids),
            attention_mask=torch.zeros_like(seen, dtype=prefixes.dtype).masked_fill(~seen, unseen)[:, None],
            position_ids=torch.cat([positions, queries + place], 1),
            use_cache=False,
        ).last_hidden_state

    def _padded(self, sequences: Sequence[Sequence[int]], fill: int | None = None) -> tuple[Tensor, Tensor]:
        """The sequences (R, L) with `fill`, or else the padding token, on their right, and where they are."""
        lengths = torch.tensor([len(ids) for ids in sequences])
        ids = torch.full((len(sequences), int(lengths.max())), self.tokenizer.pad_token_id if fill is None else fill)
        for row, found in zip(ids, sequences, strict=True):
            row[: len(found)] = torch.tensor(found)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]
        return ids.to(self.model.device), mask.to(self.model.device)

    def _open(self, features: Tensor, image: int, question: Question) -> Answer:
        """Alone: greedy writing is not the same for sequences of other lengths beside it."""
        given = self._given(question.text)
        prefixes = self._prefixes(features, torch.tensor([image]), [question.text])
        ids, mask = self._padded([given])
        written = self.model.language_model.generate(
            inputs_embeds=_embedded(self.model, prefixes, ids),
            attention_mask=_mask(prefixes, mask),
            max_new_tokens=OPEN_TOKENS,
            do_sample=False,
        )
        text = self.tokenizer.decode(written[0], skip_special_tokens=True).strip()
        expected = Question(question.text, (question.expected,), question.expected)
        scores = self._read(features, self._readings(image, 0, expected))[image, 0]
        return replace(_choice(expected, *scores), text=text)


class InstructBlipVQA(Blip2VQA):
    """Answers from an InstructBLIP, whose Q-Former reads the question as well."""

    def __init__(self, *args, qformer_tokenizer: PreTrainedTokenizerBase, **settings):
        super().__init__(*args, **settings)
        self.qformer_tokenizer = qformer_tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu", **settings) -> "InstructBlipVQA":
        return cls(
            InstructBlipForConditionalGeneration.from_pretrained(folder).to(device),
            AutoTokenizer.from_pretrained(folder),
            BlipImageProcessorPil.from_pretrained(folder),
            qformer_tokenizer=AutoTokenizer.from_pretrained(folder, subfolder="qformer_tokenizer"),
            **{"id": str(folder), **settings},
        )

    def _look(self, pixels: Tensor) -> Tensor:
        return self.model.vision_model(pixel_values=pixels).last_hidden_state

    def _excess(self, question: str) -> float:
        told = len(self.qformer_tokenizer(self.template.format(question)).input_ids)
        return max(super()._excess(question), told - self.model.config.qformer_config.max_position_embeddings)

    def _prefix(self, reading: _Reading) -> Hashable:
        return reading.image, reading.text

    def _prefixes(self, features: Tensor, index: Tensor, texts: Sequence[str]) -> Tensor:
        told = self.qformer_tokenizer([self.template.format(t) for t in texts], padding=True, return_tensors="pt")
        queries = self.model.query_tokens.expand(len(texts), -1, -1)
        out = self.model.qformer(
            input_ids=told.input_ids.to(features.device),
            attention_mask=_mask(queries, told.attention_mask.bool().to(features.device)),
            query_embeds=queries,
            encoder_hidden_states=features[index],
        ).last_hidden_state
        return self.model.language_projection(out[:, : queries.shape[1]])


def load_blip2(folder: str | Path, device: str = "cpu", **settings) -> Blip2VQA:
    """The VQA of a checkpoint, by its `model_type`. Raises ValueError where it is neither BLIP-2 nor InstructBLIP."""
    kinds = {"blip-2": Blip2VQA, "instructblip": InstructBlipVQA}
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in kinds:
        raise ValueError(f"checkpoint: {folder} holds a {config.model_type} model, not one of {', '.join(kinds)}")
    if config.architectures and not config.architectures[0].endswith("ForConditionalGeneration"):
        raise ValueError(f"checkpoint: {folder} holds {config.architectures[0]}, which has no language model to ask")
    return kinds[config.model_type].from_pretrained(folder, device, **settings)


def language_logits(model: Blip2ForConditionalGeneration, prefixes: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Next-token logits (R, Q + L, V) of a decoder-only language model on `prefixes` (R, Q, W), then `ids` (R, L)."""
    return model.language_model.get_output_embeddings()(language_states(model, prefixes, ids, mask))


def language_states(model: Blip2ForConditionalGeneration, prefixes: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states (R, Q + L, W) of a decoder-only language model on `prefixes` (R, Q, W), then `ids` (R, L)."""
    decoder = model.language_model.get_decoder()
    embedded = _embedded(model, prefixes, ids)
    return decoder(inputs_embeds=embedded, attention_mask=_mask(prefixes, mask), use_cache=False).last_hidden_state


def _embedded(model: Blip2ForConditionalGeneration, prefixes: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([prefixes, model.get_input_embeddings()(ids).to(prefixes.dtype)], 1)


def _mask(prefixes: Tensor, mask: Tensor) -> Tensor:
    return torch.cat([mask.new_ones(prefixes.shape[:2]), mask], 1).long()


def _summed(spelled: dict[tuple[int, int], float]) -> dict[int, float]:
    """log P of each choice from those of its spellings."""
    logs: dict[int, float] = {}
    for (choice, _), value in spelled.items():
        logs[choice] = np.logaddexp(logs[choice], value).item() if choice in logs else value
    return logs


def _choice(question: Question, logs: dict[int, float], certainty: float) -> Answer:
    log_p = np.array([logs[number] for number in range(len(logs))])
    return replace(choice_answer(question, log_p), certainty=certainty)


def _chunks(items: Sequence[T], size: int) -> Iterator[tuple[int, Sequence[T]]]:
    for start in range(0, len(items), size):
        yield start, items[start : start + size]
