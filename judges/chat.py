"""Chat models that see pictures (Qwen-VL, LLaVA and their like) in this process, without a server.

`InProcessVQA` is what all of them have in common: wording, reasoning, reading and clamping are those of `replies`, so
that the same weights answer the same through transformers (`ChatVQA`), vLLM (`vllm_engine`) and a server (`server`).
Whoever runs the model only writes: it continues conversations and tells the log-probabilities of its tokens.
"""

import hashlib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from judges.base import Answer, Question, Sample, images_of
from judges.replies import (
    PLACE,
    REPLY_TOKENS,
    TEMPLATE,
    WORDINGS,
    BadReply,
    Completion,
    Form,
    LogProbs,
    Message,
    NoAnswer,
    Position,
    Token,
    check_template,
    clamped,
    form_of,
    read_whole,
    spelling_ids,
    told,
)

Place = tuple[int, int]
"""The row of a sample and the place of a question about it."""


@dataclass(frozen=True)
class Asking:
    """How a chat model is asked.

    Attributes:
        template: what the model is told, with `{question}` and, unless it is asked only what it answers with yes and
            no of itself, `{how}`, the instruction how to answer.
        reasoning: how many tokens the model may think before it answers; 0 to answer at once.
        clamp: the least and the most probability after reasoning, which makes a model too sure of itself
            (Constitutional AI, 2212.08073, has 0.4 and 0.6).
        answer_tokens: the length of an answer to an open question.
        most_images: pictures a sample may have.
        chat_template_kwargs: more that the chat template is told, such as `{"enable_thinking": False}`.

    Raises:
        ValueError: a setting is out of range.
    """

    template: str = TEMPLATE
    reasoning: int = 0
    clamp: tuple[float, float] | None = None
    answer_tokens: int = 32
    most_images: int = 8
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name, least in (("reasoning", 0), ("answer_tokens", 1), ("most_images", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: {getattr(self, name)} is too small, the least is {least}")
        if self.clamp and not (self.reasoning and 0 < self.clamp[0] < self.clamp[1] < 1):
            raise ValueError(f"clamp: {self.clamp} needs reasoning, and a least and a most probability between 0 and 1")
        check_template(self.template, self.reasoning)

    @property
    def version(self) -> str:
        """Differs between two ways of asking that may bring different answers."""
        text = json.dumps([asdict(self), WORDINGS, PLACE], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


class Shown:
    """The pictures of a sample, converted when they are first needed, once for all questions about them."""

    def __init__(self, sample: Sample):
        self.images = images_of(sample)

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """Raises NoAnswer for what is not uint8 (H, W, 3)."""
        for pixels in self.images:
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
                raise NoAnswer(f"has a picture that is {pixels.dtype} {pixels.shape}, not uint8 (H, W, 3)")
        return [Image.fromarray(pixels) for pixels in self.images]


Asked = tuple[Place, Question, Shown]
"""A question, where its answer belongs, and what it is about."""


def in_chunks(
    samples: Sequence[Sample],
    questions: Sequence[Sequence[Question]],
    size: int,
    answer: Callable[[Sequence[Asked]], Mapping[Place, Answer]],
) -> list[list[Answer]]:
    """The answers to the questions about each sample, `size` questions at a time, so that pictures do not pile up."""
    if len(samples) != len(questions):
        raise ValueError(f"questions: there are lists for {len(questions)} samples, not for {len(samples)}")
    asked = (
        ((row, place), question, shown)
        for row, (shown, several) in enumerate(zip(map(Shown, samples), questions, strict=True))
        for place, question in enumerate(several)
    )
    answers: dict[Place, Answer] = {}
    while chunk := list(islice(asked, size)):
        answers |= answer(chunk)
    return [[answers[row, place] for place in range(len(several))] for row, several in enumerate(questions)]


@dataclass(frozen=True)
class Talk:
    """A conversation in which it is the model's turn.

    Attributes:
        pictures: what the user shows first, numbered where there are several.
        turns: what user and model said, in turn, the user first and last.
        listed: the tokens whose log-probabilities are wanted at the first place of the reply.
    """

    pictures: Sequence[Image.Image]
    turns: tuple[str, ...]
    listed: tuple[int, ...] = ()

    def messages(self, part: Callable[[Image.Image], dict[str, Any]]) -> list[dict[str, Any]]:
        """As a chat template takes it; `part` makes a part of a message out of a picture."""
        shown: list[dict[str, Any]] = []
        for number, picture in enumerate(self.pictures, 1):
            if len(self.pictures) > 1:
                shown.append({"type": "text", "text": PLACE.format(number)})
            shown.append(part(picture))
        contents = [[{"type": "text", "text": turn}] for turn in self.turns]
        contents[0] = shown + contents[0]
        return [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]


@dataclass(frozen=True)
class Written:
    """A model's turn: what it wrote, or why it did not.

    `certainty` is its self-certainty over the whole vocabulary, in nats, averaged over the tokens; NaN where unknown.
    """

    completion: Completion
    certainty: float = math.nan
    error: str = ""

    @classmethod
    def failed(cls, error: str) -> "Written":
        return cls(Completion(message=Message()), error=error)


def written(
    text: str,
    ended: bool,
    tokens: Iterable[tuple[str, float]],
    listed: Iterable[tuple[str, float]] = (),
    certainty: float = math.nan,
) -> Written:
    """What a model wrote, from its `tokens` and those `listed` for the first place, with log-probabilities in nats."""
    places, first = list(tokens), list(listed)
    if not all(math.isfinite(log_p) for _, log_p in (*places, *first)):
        return Written.failed("has no answer: the model's probabilities are no numbers; load it with another dtype")
    top = tuple(Token(token=token, logprob=min(log_p, 0.0)) for token, log_p in first)
    content = tuple(
        Position(token=token, logprob=min(log_p, 0.0), top_logprobs=() if n else top)
        for n, (token, log_p) in enumerate(places)
    )
    completion = Completion(
        message=Message(content=text),
        logprobs=LogProbs(content=content) if content else None,
        finish_reason="stop" if ended else "length",
    )
    return Written(completion, certainty)


@dataclass(frozen=True)
class _Job:
    """One question on its way to an answer."""

    place: Place
    question: Question
    form: Form
    talk: Talk


class InProcessVQA(ABC):
    """Answers questions about samples through a chat model in this process. See `replies` for what a margin is.

    Args:
        tokenizer: that of the model.
        engine: what runs the model.
        weights: names them and their dtype.
        batch: the conversations written at once.
        asking: the fields of `Asking`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, engine: str, weights: str, batch: int, **asking: Any):
        if batch < 1:
            raise ValueError(f"batch: {batch} is not a number of conversations from 1")
        self.tokenizer, self.batch, self.asking = tokenizer, batch, Asking(**asking)
        self.template, self.most_images = self.asking.template, self.asking.most_images
        self.id = f"{engine}({weights}, {self.asking.version})"
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._control = re.compile("|".join(map(re.escape, special)) or "(?!)")
        self._vocabulary = tokenizer.get_vocab()
        self._spellings: dict[tuple[str, ...], tuple[int, ...]] = {(): ()}

    @abstractmethod
    def _write(self, talks: Sequence[Talk], tokens: int, scored: bool) -> list[Written]:
        """The model's greedy turns of at most so many tokens; with log-probabilities if `scored`."""

    def ask(self, samples: Sequence[Sample], questions: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        """One answer for each question, in order. One that cannot be had says why."""
        return in_chunks(samples, questions, self.batch, self._answers)

    def complete(self, instructions: Sequence[str], tokens: int = REPLY_TOKENS) -> list[str | NoAnswer]:
        """The replies to instructions that need no picture, of at most so many tokens; or why there is none."""
        safe = [text for text in instructions if not self._control.search(text)]
        chunks = [safe[start : start + self.batch] for start in range(0, len(safe), self.batch)]
        said = (
            _whole(reply) for chunk in chunks for reply in self._write([Talk((), (t,)) for t in chunk], tokens, False)
        )
        replies = dict(zip(safe, said, strict=True))
        return [replies.get(text, NoAnswer("the prompt holds a command to the model")) for text in instructions]

    def _answers(self, asked: Sequence[Asked]) -> dict[Place, Answer]:
        answers: dict[Place, Answer] = {}
        jobs: list[_Job] = []
        for place, question, shown in asked:
            try:
                jobs.append(self._job(place, question, shown))
            except NoAnswer as reason:
                answers[place] = Answer.failed(question.text, str(reason))
        if self.asking.reasoning:
            jobs = list(self._thought(jobs, answers))
        closed, opened = [j for j in jobs if j.form.labels], [j for j in jobs if not j.form.labels]
        for tokens, group in ((1, closed), (self.asking.answer_tokens, opened)):
            talks = [replace(job.talk, listed=self._listed(job.form.labels)) for job in group]
            for job, reply in zip(group, self._write(talks, tokens, True) if talks else [], strict=True):
                answers[job.place] = self._answer(job, reply)
        return answers

    def _job(self, place: Place, question: Question, shown: Shown) -> _Job:
        """Raises NoAnswer for a question that cannot be put to the model."""
        form = form_of(question)
        self._listed(form.labels)
        text = told(form, self.template, self.asking.reasoning)
        if found := self._control.search(text):
            raise NoAnswer(f"holds {found.group()!r}, which is a command to the model")
        if len(shown.images) > self.most_images:
            raise NoAnswer(f"the sample has {len(shown.images)} pictures, most_images is {self.most_images}")
        return _Job(place, question, form, Talk(shown.pictures, (text,)))

    def _listed(self, labels: tuple[str, ...]) -> tuple[int, ...]:
        if labels not in self._spellings:
            self._spellings[labels] = spelling_ids(self._vocabulary, labels)
        return self._spellings[labels]

    def _thought(self, jobs: Sequence[_Job], answers: dict[Place, Answer]) -> Iterator[_Job]:
        """The jobs after what the model thought about them; those it had no thought about go to `answers`."""
        thoughts = self._write([job.talk for job in jobs], self.asking.reasoning, False) if jobs else []
        for job, thought in zip(jobs, thoughts, strict=True):
            text = (thought.completion.message.content or "").strip()
            if text and not self._control.search(text):
                yield replace(job, talk=replace(job.talk, turns=(*job.talk.turns, text, job.form.how)))
            else:
                reason = thought.error or f"has no answer: the model thought {text!r}"
                answers[job.place] = Answer.failed(job.form.text, reason)

    def _answer(self, job: _Job, reply: Written) -> Answer:
        if reply.error:
            return Answer.failed(job.form.text, reply.error)
        try:
            answer = job.form.read(reply.completion, False)
        except (BadReply, NoAnswer) as reason:
            return Answer.failed(job.form.text, str(reason))
        certainty = answer.certainty if math.isnan(reply.certainty) else reply.certainty
        return clamped(job.question, replace(answer, certainty=certainty), self.asking.clamp)


def _whole(reply: Written) -> str | NoAnswer:
    try:
        return NoAnswer(reply.error) if reply.error else read_whole(reply.completion)
    except (BadReply, NoAnswer) as reason:
        return NoAnswer(str(reason))


class ChatVQA(InProcessVQA):
    """Answers from a chat model of `AutoModelForImageTextToText`, asked through its own chat template.

    A choice's probability is that of the tokens that spell its label, next after the question. Certainty is over the
    whole vocabulary, and for open answers, which are written greedily, the mean over their tokens. Conversations of a
    batch are padded on the left and masked, and `generate` counts positions from the mask, so that an answer depends
    on its batch-mates by no more than rounding. A language model that takes padding for text, as recurrent ones may,
    needs `batch=1`.

    Every question is a pass over its pictures as well; where many are asked about each picture, vLLM, which keeps
    what they have in common, is faster.

    Args:
        model: with a language-modelling head.
        processor: with a chat template.
        id: names the weights.
        asking: the fields of `Asking`.
    """

    def __init__(
        self, model: PreTrainedModel, processor: ProcessorMixin, id: str = "chat", batch: int = 8, **asking: Any
    ):
        super().__init__(processor.tokenizer, "chat", f"{id}, {model.dtype}", batch, **asking)
        self.model, self.processor = model.eval().requires_grad_(False), processor
        if self.tokenizer.pad_token_id is None:  # masked, so that any token will do
            self.tokenizer.pad_token = self.tokenizer.eos_token
        stop = model.generation_config.eos_token_id
        self._stop = set(stop) if isinstance(stop, list) else {stop}
        # A checkpoint's own settings may hold penalties, which would change what is written.
        model.generation_config = GenerationConfig(eos_token_id=stop, pad_token_id=self.tokenizer.pad_token_id)
        self._limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str = "cpu", dtype: str | torch.dtype = "auto", **settings: Any
    ) -> "ChatVQA":
        """Load from a local folder or a hub id; `settings` are those of the constructor.

        Raises:
            ValueError: the checkpoint has no language-modelling head or no chat template.
        """
        config = AutoConfig.from_pretrained(folder)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(
                f"checkpoint: {folder} holds a {config.model_type} model, which does not answer in words; use one "
                "that AutoModelForImageTextToText loads"
            )
        processor = chat_processor(folder)
        model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        if missing := sorted(report["missing_keys"]):
            raise ValueError(
                f"checkpoint: {folder} lacks {missing[0]} and so cannot answer; use one that was saved by "
                f"{type(model).__name__}"
            )
        return cls(model.to(device), processor, **{"id": str(folder), **settings})

    @torch.inference_mode()
    def _write(self, talks: Sequence[Talk], tokens: int, scored: bool) -> list[Written]:
        inputs = self.inputs(talks)
        lengths = inputs.attention_mask.sum(1).tolist()
        problems = [self._problem(length + tokens) for length in lengths]
        if any(problems):
            fit = [talk for talk, problem in zip(talks, problems, strict=True) if not problem]
            rest = iter(self._write(fit, tokens, scored) if fit else [])
            return [Written.failed(problem) if problem else next(rest) for problem in problems]
        out = self.model.generate(
            **inputs.to(self.model.device, self.model.dtype),
            max_new_tokens=tokens,
            do_sample=False,
            output_logits=scored,
            return_dict_in_generate=True,
        )
        ids = out.sequences[:, inputs.input_ids.shape[1] :]
        return self._read(talks, ids, out.logits if scored else ())

    def inputs(self, talks: Sequence[Talk]) -> BatchFeature:
        """What the model is fed to take its turn in each conversation, padded on the left."""
        return self.processor.apply_chat_template(
            [talk.messages(lambda picture: {"type": "image", "image": picture}) for talk in talks],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
            **self.asking.chat_template_kwargs,
        )

    def _problem(self, length: int) -> str:
        if length <= self._limit:
            return ""
        return (
            f"makes {length} tokens with its pictures and the room for a reply, {length - self._limit} more than "
            f"{self.id} can read"
        )

    def _read(self, talks: Sequence[Talk], ids: torch.Tensor, logits: Sequence[torch.Tensor]) -> list[Written]:
        """What was written: `ids` (R, N), and where it is scored N times `logits` (R, V)."""
        lines = [self._kept(row) for row in ids.tolist()]
        texts = [self.tokenizer.decode(line, skip_special_tokens=True).strip() for line in lines]
        ended = [len(line) < ids.shape[1] for line in lines]
        if not logits:
            return [written(text, end, ()) for text, end in zip(texts, ended, strict=True)]
        log_ps = [step.float().log_softmax(-1) for step in logits]
        said = torch.stack([log_p.gather(1, ids[:, [n]])[:, 0] for n, log_p in enumerate(log_ps)], 1)  # (R, N)
        sure = torch.stack([-math.log(log_p.shape[1]) - log_p.mean(1) for log_p in log_ps], 1)  # (R, N)
        found = []
        for row, talk in enumerate(talks):
            kept = 1 if talk.listed else len(lines[row])
            names = self.tokenizer.convert_ids_to_tokens(ids[row, :kept].tolist())
            listed = self.tokenizer.convert_ids_to_tokens(list(talk.listed))
            first = log_ps[0][row, list(talk.listed)].tolist()
            tokens = zip(names, said[row, :kept].tolist(), strict=True)
            certainty = sure[row, :kept].mean().item()
            found.append(written(texts[row], ended[row], tokens, zip(listed, first, strict=True), certainty))
        return found

    def _kept(self, ids: Sequence[int]) -> list[int]:
        """A reply up to where it ends."""
        end = next((n for n, token in enumerate(ids) if token in self._stop), len(ids))
        return list(ids[:end])


def chat_processor(folder: str | Path) -> ProcessorMixin:
    """The processor of a chat model.

    Raises:
        ValueError: it has no chat template, or needs a package that is not installed.
    """
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except ImportError as error:
        needed = " ".join(str(error).split()).partition(".")[0]
        raise ValueError(f"checkpoint: {folder} cannot be loaded here: {needed}; install it") from None
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"checkpoint: {folder} has no chat template; save one beside it as chat_template.jinja, or load a BLIP-2 "
            "with load_blip2"
        )
    return processor
