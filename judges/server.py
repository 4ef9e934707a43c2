"""Any chat model behind an OpenAI-compatible server (vLLM's `api_server`, data-parallel, several URLs) as a judge.

Pictures travel as PNG bytes inside the request, never as addresses. What the model is told and how its reply is read
is in `replies`, how servers are called and what is done about their failures in `pool`. Nothing is kept between two
calls of `ask`, so each begins with a look at the servers' health.
"""

import asyncio
import base64
import hashlib
import io
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from judges.base import Answer, Question, Sample, images_of
from judges.pool import Call, Limits, Pool, opened
from judges.replies import (
    MOST_LISTED,
    PLACE,
    REPLY_TOKENS,
    TEMPLATE,
    WORDINGS,
    Form,
    NoAnswer,
    check_template,
    clamped,
    form_of,
    parse,
    read_thought,
    read_whole,
    told,
)

K, T = TypeVar("K"), TypeVar("T")

_TOP = 20
"""How many of the likeliest tokens a server lists at most (vLLM's `--max-logprobs`, OpenAI's limit)."""


class ServerVQA:
    """Answers questions about samples through a chat server. See `replies` for what a margin is.

    A question that stays unanswered, for whatever reason, has an answer that is invalid and says why.

    Args:
        urls: where the servers are, each ending in `/v1`.
        model: the name under which they serve it.
        id: names the weights; `model` unless given.
        api_key_env: the environment variable that holds the key; empty where none is needed.
        template: what the model is told, with `{question}` and, unless it is asked only what it answers with yes and
            no of itself, `{how}`, the instruction how to answer.
        token_ids: the tokens of labels (`{"yes": [9891, 3869], "no": [...]}`), for vLLM, which then lists exactly
            those instead of the likeliest 20 (its `logprob_token_ids`). Used where all labels of a question are here.
        reasoning: how many tokens the model may think before it answers; 0 to answer at once.
        clamp: the least and the most probability after reasoning, which makes a model too sure of itself
            (Constitutional AI, 2212.08073, has 0.4 and 0.6).
        answer_tokens: the length of an answer to an open question.
        most_images: pictures a sample may have.
        most_characters: the length of a question with its instructions. Nothing is ever cut.
        extra_body: more that the server is told, such as `{"chat_template_kwargs": {"enable_thinking": false}}`.
        limits: those of `Limits`, by name.

    Raises:
        ValueError: a setting is out of range or the key is not in the environment.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str,
        *,
        id: str = "",
        api_key_env: str = "",
        template: str = TEMPLATE,
        token_ids: Mapping[str, Sequence[int]] | None = None,
        reasoning: int = 0,
        clamp: tuple[float, float] | None = None,
        answer_tokens: int = 32,
        most_images: int = 8,
        most_characters: int = 8000,
        extra_body: Mapping[str, Any] | None = None,
        **limits: float,
    ):
        if isinstance(urls, str) or not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise ValueError(f"urls: {urls!r} is not a list of addresses that begin with http:// or https://")
        if api_key_env and not os.environ.get(api_key_env):
            raise ValueError(f"api_key_env: the environment has no {api_key_env}; export it")
        if reasoning < 0 or answer_tokens < 1 or most_images < 0 or most_characters < 1:
            raise ValueError("reasoning, answer_tokens, most_images, most_characters: one of them is too small")
        if clamp and not (reasoning and 0 < clamp[0] < clamp[1] < 1):
            raise ValueError(f"clamp: {clamp} needs reasoning, and a least and a most probability between 0 and 1")
        check_template(template, reasoning)
        self.urls, self.model, self.template, self.api_key_env = tuple(urls), model, template, api_key_env
        self.token_ids = {label: tuple(ids) for label, ids in (token_ids or {}).items()}
        self.extra_body = dict(extra_body or {})
        self.reasoning, self.clamp, self.answer_tokens = reasoning, clamp, answer_tokens
        self.most_images, self.most_characters = most_images, most_characters
        self.limits = Limits(**limits)
        self.id = f"server({id or model}, {self._version()})"

    def ask(self, samples: Sequence[Sample], questions: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        """One answer for each question, in order. Blocks; not for code that runs in an event loop itself.

        Raises:
            ValueError: a server serves another model, or refuses us.
            Unavailable: nobody answers.
        """
        if len(samples) != len(questions):
            raise ValueError(f"questions: there are lists for {len(questions)} samples, not for {len(samples)}")
        jobs = (
            ((row, place), partial(self._answer, question, shown))
            for row, (shown, asked) in enumerate(zip(map(_Shown, samples), questions, strict=True))
            for place, question in enumerate(asked)
        )
        answers = asyncio.run(self._work_off(jobs)) if any(questions) else {}
        return [
            [clamped(question, answers[row, place], self.clamp) for place, question in enumerate(asked)]
            for row, asked in enumerate(questions)
        ]

    def check(self) -> None:
        """Look at the servers' health.

        Raises:
            ValueError, Unavailable: as `ask`.
        """
        asyncio.run(self._work_off(iter(())))

    def complete(self, instructions: Sequence[str], tokens: int = REPLY_TOKENS) -> list[str | NoAnswer]:
        """The replies to instructions that need no picture, of at most so many tokens; or why there is none.

        Raises:
            ValueError, Unavailable: as `ask`.
        """
        jobs = ((row, partial(self._reply, text, tokens)) for row, text in enumerate(instructions))
        replies = asyncio.run(self._work_off(jobs)) if instructions else {}
        return [replies[row] for row in range(len(instructions))]

    async def _work_off(self, jobs: Iterator[tuple[K, Callable[[Pool], Awaitable[T]]]]) -> dict[K, T]:
        """As many workers as there may be calls in flight take jobs from one iterator: pictures do not pile up."""
        done: dict[K, T] = {}
        key = os.environ[self.api_key_env] if self.api_key_env else "none"
        async with opened(self.urls, self.model, key, self.limits) as pool:

            async def work() -> None:
                for key, job in jobs:
                    done[key] = await job(pool)

            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(self.limits.concurrency):
                        workers.create_task(work())
            except ExceptionGroup as group:
                raise group.exceptions[0] from None
        return done

    async def _answer(self, question: Question, shown: "_Shown", pool: Pool) -> Answer:
        try:
            form = form_of(question)
            text = self._text(form)
            if len(shown.images) > self.most_images:
                raise NoAnswer(f"the sample has {len(shown.images)} pictures, most_images is {self.most_images}")
            return await pool.talk(partial(self._converse, form, text, shown.urls))
        except NoAnswer as reason:
            return Answer.failed(question.text, str(reason))

    async def _reply(self, text: str, tokens: int, pool: Pool) -> str | NoAnswer:
        request = self._request([{"role": "user", "content": _content((), text)}], max_tokens=tokens)
        try:
            return await pool.talk(lambda call: call(request, lambda body: read_whole(parse(body))))
        except NoAnswer as reason:
            return reason

    async def _converse(self, form: Form, text: str, pictures: Sequence[str], call: Call) -> Answer:
        messages = [{"role": "user", "content": _content(pictures, text)}]
        if self.reasoning:
            thought = await call(self._request(messages, max_tokens=self.reasoning), read_thought)
            messages += [{"role": "assistant", "content": thought}, {"role": "user", "content": form.how}]
        if not form.labels:
            request = self._request(messages, max_tokens=self.answer_tokens, logprobs=True)
            return await call(request, lambda body: form.read(parse(body), True))
        request = self._request(messages, max_tokens=1, logprobs=True, top_logprobs=_TOP)
        exact = all(label in self.token_ids for label in form.labels)
        if exact:
            most = MOST_LISTED // len(form.labels)
            ids = list(dict.fromkeys(token for label in form.labels for token in self.token_ids[label][:most]))
            request["extra_body"] = {**self.extra_body, "logprob_token_ids": ids}
        return await call(request, lambda body: form.read(parse(body), not exact))

    def _request(self, messages: Sequence[dict[str, Any]], **settings) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": list(messages),
            "temperature": 0,
            "extra_body": self.extra_body,
            **settings,
        }

    def _text(self, form: Form) -> str:
        """What the model is told first. Raises NoAnswer where it is too long, or leaves out what may be answered."""
        text = told(form, self.template, self.reasoning)
        if len(text) > self.most_characters:
            raise NoAnswer(
                f"makes {len(text)} characters with its instructions, most_characters is {self.most_characters}"
            )
        return text

    def _version(self) -> str:
        """Differs between two of us who may answer differently."""
        asked = [self.template, WORDINGS, PLACE, self.token_ids, self.reasoning, self.clamp, self.answer_tokens]
        text = json.dumps([*asked, self.extra_body], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


class _Shown:
    """The pictures of a sample, encoded when they are first needed, once for all questions about them."""

    def __init__(self, sample: Sample):
        self.images = images_of(sample)

    @cached_property
    def urls(self) -> list[str]:
        return [data_url(image) for image in self.images]


def data_url(pixels: np.ndarray) -> str:
    """A picture as a PNG in a `data:` URL. Raises NoAnswer for what is not uint8 (H, W, 3)."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise NoAnswer(f"the picture is {pixels.dtype} {pixels.shape}, not uint8 (H, W, 3)")
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def _content(pictures: Sequence[str], text: str) -> list[dict[str, Any]]:
    """The parts of a message: the pictures, numbered where there are several, then the text."""
    parts: list[dict[str, Any]] = []
    for number, url in enumerate(pictures, 1):
        if len(pictures) > 1:
            parts.append({"type": "text", "text": PLACE.format(number)})
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [*parts, {"type": "text", "text": text}]
