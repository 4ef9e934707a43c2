"""vLLM in this process (0.32 or later): the chat models of `chat` and BLIP-2, batched and with common prefixes kept.

vLLM lists the log-probabilities of exactly those tokens that spell a choice (`logprob_token_ids`), in the model's own
distribution, before penalties and temperature. What it does not tell is that distribution as a whole, so certainty is
over the choices; with transformers (`ChatVQA`, `Blip2VQA`) it is over the vocabulary.

vLLM is imported when an engine is started, for it has an environment of its own.
"""

import importlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from scipy.special import logsumexp
from transformers import AutoConfig, ProcessorMixin

from judges.base import TEMPLATE, Answer, Question, Sample, only_image
from judges.blip2 import OPEN_TOKENS
from judges.chat import Asked, InProcessVQA, Place, Talk, Written, chat_processor, in_chunks, written
from judges.replies import NoAnswer, choice_answer, spellings

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams

BATCH = 1024
"""Questions handed to vLLM at once; it decides by itself how many of them it runs together."""


class VllmVQA(InProcessVQA):
    """Answers from a chat model, asked through its own chat template: those that `ChatVQA` gives.

    Args:
        llm: takes `most_images` pictures a request (`limit_mm_per_prompt`).
        id: names the weights.
        add_special: see `adds_special`.
        asking: the fields of `Asking`.
    """

    def __init__(self, llm: "LLM", id: str = "chat", batch: int = BATCH, add_special: bool = False, **asking: Any):
        super().__init__(llm.get_tokenizer(), "vllm", f"{id}, {llm.model_config.dtype}", batch, **asking)
        self.llm, self.add_special = llm, add_special

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, engine: Mapping[str, Any] | None = None, most_images: int = 8, **settings: Any
    ) -> "VllmVQA":
        """Load from a local folder or a hub id; `settings` are those of the constructor, `engine` those of `vllm.LLM`.

        Raises:
            ValueError: vLLM is not installed, or the checkpoint has no chat template.
        """
        special = adds_special(chat_processor(folder))
        llm = start(folder, most_images, engine or {})
        return cls(llm, **{"id": str(folder), "add_special": special, **settings}, most_images=most_images)

    def _write(self, talks: Sequence[Talk], tokens: int, scored: bool) -> list[Written]:
        conversations = [talk.messages(lambda picture: {"type": "image_pil", "image_pil": picture}) for talk in talks]
        call = partial(
            self.llm.chat,
            use_tqdm=False,
            chat_template_kwargs=dict(self.asking.chat_template_kwargs),
            tokenization_kwargs={"add_special_tokens": self.add_special},
        )
        outs = run(call, conversations, [sampling(tokens, talk.listed, scored) for talk in talks])
        return [
            Written.failed(out) if isinstance(out, str) else self._read(talk, out)
            for talk, out in zip(talks, outs, strict=True)
        ]

    def _read(self, talk: Talk, out: "RequestOutput") -> Written:
        reply = out.outputs[0]
        ended = reply.finish_reason == "stop"
        steps = list(zip(reply.token_ids, reply.logprobs or (), strict=False))
        if ended and not talk.listed:
            steps = steps[:-1]  # less the token that ends it
        said = [(token, log_p[token].logprob) for token, log_p in steps]
        first = [(token, steps[0][1][token].logprob) for token in talk.listed]
        return written(reply.text.strip(), ended, self._named(said), self._named(first))

    def _named(self, tokens: Sequence[tuple[int, float]]) -> list[tuple[str, float]]:
        names = self.tokenizer.convert_ids_to_tokens([token for token, _ in tokens])
        return [(name, log_p) for name, (_, log_p) in zip(names, tokens, strict=True)]


@dataclass(frozen=True)
class _Job:
    """One question about one picture, in tokens.

    Attributes:
        question: as it was asked.
        given: the question in the template.
        spellings: the tokens of each spelling of each choice; of an open question, of the expected answer.
    """

    question: Question
    picture: Image.Image
    given: tuple[int, ...]
    spellings: tuple[list[tuple[int, ...]], ...]

    def prompt(self, said: tuple[int, ...] = ()) -> dict[str, Any]:
        """The request for what follows the question and the answer so far."""
        return {"prompt_token_ids": [*self.given, *said], "multi_modal_data": {"image": self.picture}}

    def answer(self, log_p: Mapping[tuple[int, ...], float]) -> Answer:
        """From log P of the last of its tokens, given those before, for each beginning of a spelling."""
        logs = [
            logsumexp([sum(log_p[ids[: n + 1]] for n in range(len(ids))) for ids in spelled])
            for spelled in self.spellings
        ]
        closed = self.question if self.question.choices else replace(self.question, choices=(self.question.expected,))
        return choice_answer(closed, np.array(logs))


class VllmBlip2VQA:
    """Answers from a BLIP-2 with an OPT language model: those that `Blip2VQA` gives.

    A request holds the tokens of `template` and the picture; vLLM puts the query outputs before them.
    """

    most_images = 1

    def __init__(self, llm: "LLM", template: str = TEMPLATE, id: str = "blip2", batch: int = BATCH):
        self.llm, self.tokenizer, self.template, self.batch = llm, llm.get_tokenizer(), template, batch
        self.id = f"vllm({id}, {llm.model_config.dtype})"

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, engine: Mapping[str, Any] | None = None, **settings: Any
    ) -> "VllmBlip2VQA":
        """As `VllmVQA.from_pretrained`."""
        return cls(start(folder, 1, engine or {}), **{"id": str(folder), **settings})

    def ask(self, samples: Sequence[Sample], questions: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        """The answers to the questions about each picture, in order. Raises ValueError for a sample of several."""
        return in_chunks([only_image(sample) for sample in samples], questions, self.batch, self._answers)

    def _answers(self, asked: Sequence[Asked]) -> dict[Place, Answer]:
        answers: dict[Place, Answer] = {}
        jobs: dict[Place, _Job] = {}
        for place, question, shown in asked:
            try:
                jobs[place] = self._job(question, shown.pictures[0])
            except NoAnswer as reason:
                answers[place] = Answer.failed(question.text, str(reason))
        answers |= self._read(jobs)
        opened = [place for place, job in jobs.items() if not job.question.choices and answers[place].valid]
        params = [sampling(OPEN_TOKENS, (), False) for _ in opened]
        for place, out in zip(opened, self._run([jobs[place].prompt() for place in opened], params), strict=True):
            answers[place] = (
                Answer.failed(jobs[place].question.text, out)
                if isinstance(out, str)
                else replace(answers[place], text=out.outputs[0].text.strip())
            )
        return answers

    def _job(self, question: Question, picture: Image.Image) -> _Job:
        """Raises NoAnswer for a question that is too long."""
        given = self._ids(self.template.format(question.text), special=True)
        limit = self.llm.model_config.max_model_len
        length = self.llm.model_config.hf_config.num_query_tokens + len(given) + OPEN_TOKENS
        if length > limit:
            raise NoAnswer(f"is {len(given)} tokens long, {length - limit} more than {self.id} can read")
        choices = question.choices or (question.expected,)
        unknown = self.tokenizer.unk_token_id
        return _Job(question, picture, given, tuple(spellings(choice, self._ids, unknown) for choice in choices))

    def _ids(self, text: str, special: bool = False) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=special).input_ids)

    def _read(self, jobs: Mapping[Place, _Job]) -> dict[Place, Answer]:
        """The answers; those to open questions without what the model would write."""
        wanted: dict[tuple[Place, tuple[int, ...]], set[int]] = defaultdict(set)
        for place, job in jobs.items():
            for ids in chain.from_iterable(job.spellings):
                for at, token in enumerate(ids):
                    wanted[place, ids[:at]].add(token)
        prompts = [jobs[place].prompt(said) for place, said in wanted]
        outs = self._run(prompts, [sampling(1, tuple(sorted(tokens)), True) for tokens in wanted.values()])
        refused: dict[Place, str] = {}
        log_p: dict[Place, dict[tuple[int, ...], float]] = defaultdict(dict)
        for ((place, said), tokens), out in zip(wanted.items(), outs, strict=True):
            if isinstance(out, str):
                refused[place] = out
            else:
                first = out.outputs[0].logprobs[0]
                log_p[place] |= {(*said, token): first[token].logprob for token in tokens}
        return {
            place: Answer.failed(job.question.text, refused[place]) if place in refused else job.answer(log_p[place])
            for place, job in jobs.items()
        }

    def _run(
        self, prompts: Sequence[dict[str, Any]], params: Sequence["SamplingParams"]
    ) -> list["RequestOutput | str"]:
        return run(partial(self.llm.generate, use_tqdm=False), prompts, params)


def load_vllm(folder: str | Path, engine: Mapping[str, Any] | None = None, **settings: Any) -> VllmVQA | VllmBlip2VQA:
    """The VQA of a checkpoint on vLLM, by its `model_type`; see the classes for their `settings`.

    Raises:
        ValueError: vLLM is not installed or does not run such a checkpoint.
    """
    kind = VllmBlip2VQA if is_blip2(folder) else VllmVQA
    return kind.from_pretrained(folder, engine, **settings)


def is_blip2(folder: str | Path) -> bool:
    """Whether a checkpoint is a BLIP-2. Raises ValueError for one that vLLM does not run."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type == "blip-2" and not config.use_decoder_only_language_model:
        raise ValueError(f"checkpoint: {folder} is a BLIP-2 with a T5, which vLLM does not run; use load_blip2")
    if config.model_type == "blip-2" and "Blip2ForImageTextRetrieval" in (config.architectures or ()):
        raise ValueError(f"checkpoint: {folder} holds a BLIP-2 for matching, which has no language model to ask")
    return config.model_type == "blip-2"


def start(folder: str | Path, most_images: int, engine: Mapping[str, Any]) -> "LLM":
    """vLLM with a checkpoint, for so many pictures a request. Raises ValueError where there is none, or an old one."""
    try:
        vllm = importlib.import_module("vllm")
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ValueError(
            "vllm: it is not installed here; use the environment that `make vllm` builds, or transformers"
        ) from None
    try:
        vllm.SamplingParams(logprob_token_ids=[0])
    except TypeError:
        raise ValueError(f"vllm: {vllm.__version__} cannot list chosen tokens; install 0.32 or later") from None
    return vllm.LLM(model=str(folder), limit_mm_per_prompt={"image": most_images}, **engine)


def adds_special(processor: ProcessorMixin) -> bool:
    """Whether a chat template leaves out the token that texts begin with: transformers adds it then, vLLM does not."""
    message = {"role": "user", "content": [{"type": "text", "text": "?"}]}
    begin = processor.tokenizer.bos_token
    return not (begin and processor.apply_chat_template([message], tokenize=False).startswith(begin))


def sampling(tokens: int, listed: tuple[int, ...], scored: bool) -> "SamplingParams":
    """Greedy writing; with the log-probabilities of what is written, or of the tokens `listed`, if `scored`."""
    params = importlib.import_module("vllm").SamplingParams
    if listed:
        return params(max_tokens=tokens, temperature=0.0, logprobs=len(listed), logprob_token_ids=list(listed))
    return params(max_tokens=tokens, temperature=0.0, logprobs=0 if scored else None)


def run(
    call: Callable[..., list["RequestOutput"]], prompts: Sequence[Any], params: Sequence["SamplingParams"]
) -> list["RequestOutput | str"]:
    """What vLLM writes to each prompt, or why it refuses it. It refuses all for one, so each half is tried again."""
    if not prompts:
        return []
    try:
        return call(prompts, params)
    except importlib.import_module("vllm.exceptions").VLLMValidationError as error:
        if len(prompts) == 1:
            return [f"is refused by vLLM: {' '.join(str(error).split())}"]
    half = len(prompts) // 2
    return run(call, prompts[:half], params[:half]) + run(call, prompts[half:], params[half:])
