"""Who judges in a run: settings of the models that look, of what they are asked, and of judges made of both.

`judge.type` picks the kind of judge, `judge.model.type` who answers. What a setting cannot change in a verdict (where a
server is, how many calls are in flight) is left out of the fingerprint.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

import judges
from judges import geneval
from judges.base import TEMPLATE
from judges.shapes import questions as shapes
from pipeline.launch import SPEED, Serve, start
from pipeline.settings import Section, UserError
from pipeline.store import fingerprint, hash_path

if TYPE_CHECKING:
    from judges.base import VQA, Judge
    from judges.questions import Decompose


@contextmanager
def told(place: str) -> Iterator[None]:
    """What does not fit a judge's settings, which begin at `place`, becomes one line."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{place}.{_one_line(error)}") from None
    except OSError as error:
        raise UserError(f"{place}: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form `owner/name` of a hub repository, rather than that of a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def checkpoint_id(checkpoint: str) -> str:
    """The contents of a local checkpoint, or the name of one on the hub."""
    return checkpoint if is_hub_id(checkpoint) and not Path(checkpoint).exists() else hash_path(checkpoint)


class Blip2Model(Section):
    """A BLIP-2 or InstructBLIP: a local folder or a hub id. `template` holds `{}` where the question goes."""

    type: Literal["blip2"]
    checkpoint: str
    template: str = TEMPLATE
    batch: int = Field(256, ge=1)

    def depends(self) -> dict[str, Any]:
        return {"type": self.type, "checkpoint": checkpoint_id(self.checkpoint), "template": self.template}

    def build(self, device: str) -> "VQA":
        name = f"blip2({fingerprint(self.depends())[:12]})"
        return judges.load_blip2(self.checkpoint, device, template=self.template, batch=self.batch, id=name)


class ServerModel(Section):
    """A model behind OpenAI-compatible servers: those at `urls`, or one of vLLM that the run starts, `serve`.

    See `judges.server.ServerVQA` for the other fields. With `serve`, `template` and `token_ids` follow from the
    checkpoint.
    """

    type: Literal["server"]
    urls: tuple[str, ...] = ()
    model: str = ""
    serve: Serve | None = None
    api_key_env: str = ""
    template: str | None = None
    token_ids: dict[str, tuple[int, ...]] | None = None
    reasoning: int = Field(0, ge=0)
    clamp: tuple[float, float] | None = None
    most_images: int = Field(8, ge=1)
    extra_body: dict[str, Any] = Field(default_factory=dict)
    concurrency: int = Field(16, ge=1)
    timeout: float = Field(20.0, gt=0)
    deadline: float = Field(40.0, gt=0)

    @model_validator(mode="after")
    def _is_somewhere(self) -> "ServerModel":
        if bool(self.urls) == bool(self.serve):
            raise ValueError("give either urls, where servers are, or serve, the settings of one to start")
        if bool(self.urls) != bool(self.model):
            raise ValueError("give model, the name it is served under, with urls and only with them")
        return self

    def depends(self) -> dict[str, Any]:
        elsewhere = {"urls", "serve", "api_key_env", "concurrency", "timeout", "deadline"}
        settings = self.model_dump(mode="json", exclude=elsewhere)
        if not self.serve:
            return settings
        return {**settings, "checkpoint": checkpoint_id(self.serve.checkpoint), "arguments": self.serve.telling}

    def build(self, device: str) -> "VQA":
        asking = self.model_dump(exclude={"type", "urls", "model", "serve"}, exclude_none=True)
        if not self.serve:
            found = judges.ServerVQA(self.urls, self.model, **asking)
            found.check()
            return found
        with told("judge.model.serve"):
            served = judges.served(self.serve.checkpoint, self.most_images)
        address = start(self.serve, served.arguments)
        asking = {"template": served.template, "token_ids": served.token_ids, **asking}
        asking |= {"most_images": served.most_images, "extra_body": {**served.extra_body, **self.extra_body}}
        return judges.ServerVQA([address.url], address.model, id=fingerprint(self.depends())[:12], **asking)


class ChatModel(Section):
    """A chat VLM in this process, by transformers or by vLLM: a local folder or a hub id.

    Attributes:
        reasoning: tokens of thought before an answer; `clamp` bounds the probabilities that follow it.
        engine: more settings of `vllm.LLM`, for type vllm.
    """

    type: Literal["chat", "vllm"]
    checkpoint: str
    reasoning: int = Field(0, ge=0)
    clamp: tuple[float, float] | None = None
    most_images: int = Field(8, ge=1)
    batch: int = Field(8, ge=1)
    engine: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _has_an_engine(self) -> "ChatModel":
        if self.engine and self.type != "vllm":
            raise ValueError("engine: holds settings of vLLM; set type to vllm, or leave it out")
        return self

    def depends(self) -> dict[str, Any]:
        settings = self.model_dump(mode="json", exclude={"batch", "engine", "checkpoint"})
        telling = {name: value for name, value in self.engine.items() if f"--{name.replace('_', '-')}" not in SPEED}
        return {**settings, "checkpoint": checkpoint_id(self.checkpoint), "engine": telling}

    def build(self, device: str) -> "VQA":
        asking = self.model_dump(include={"reasoning", "clamp", "most_images", "batch"})
        name = f"{self.type}({fingerprint(self.depends())[:12]})"
        if self.type == "vllm":
            return judges.load_vllm(self.checkpoint, self.engine, id=name, **asking)
        return judges.ChatVQA.from_pretrained(self.checkpoint, device, id=name, **asking)


Model = Annotated[Blip2Model | ChatModel | ServerModel, Field(discriminator="type")]


class WholeQuestions(Section):
    """The whole prompt in one question for each template, with `{prompt}` where it goes (VQAScore)."""

    type: Literal["whole"]
    templates: tuple[str, ...] = ('Does this figure show "{prompt}"?',)

    def depends(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def build(self) -> "Decompose":
        return judges.Whole(self.templates)


class GrammarQuestions(Section):
    """A prompt taken apart by the grammar of the embedded world, or of GenEval."""

    type: Literal["shapes", "geneval"]

    def depends(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def build(self) -> "Decompose":
        return {"shapes": shapes.decompose, "geneval": geneval.decompose}[self.type]


class RatingQuestions(Section):
    """How well the prompt is shown, on a scale; the expectation over its scores counts (see `judges.questions`)."""

    type: Literal["rating"]
    templates: tuple[str, ...] = ('From {low} to {high}, how well does this image show "{prompt}"?',)
    low: int = 1
    high: int = 9

    def depends(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    def build(self) -> "Decompose":
        return judges.Rating(self.templates, self.low, self.high)


class FileQuestions(Section):
    """A JSONL file of prompts and their questions, which people may write and edit.

    `python -m pipeline questions CONFIG` lets `model` write those of the run's prompts that are not in it.
    """

    type: Literal["file"]
    path: str
    model: "ChatModel | ServerModel | None" = Field(None, discriminator="type")

    def depends(self) -> dict[str, Any]:
        if not Path(self.path).is_file():
            raise UserError(
                f"judge.questions.path: {self.path} is no file; `python -m pipeline questions CONFIG` writes it with "
                "the language model in judge.questions.model"
            )
        return {"type": self.type, "path": hash_path(self.path)}

    def build(self) -> "Decompose":
        return judges.QuestionFile(self.path)

    def write(self, prompts: Sequence[str], device: str) -> dict[str, str]:
        """Let the model write what is missing; the prompts that it could not take apart, and why."""
        if not self.model:
            raise UserError("judge.questions.model: none is set; name the language model that writes the questions")
        return judges.fill_questions(judges.QuestionFile(self.path), prompts, self.model.build(device).complete)


Questions = Annotated[WholeQuestions | RatingQuestions | GrammarQuestions | FileQuestions, Field(discriminator="type")]


class Judging(Section):
    """What every judge of a run has.

    Attributes:
        cache: an SQLite file that keeps answers; null to ask again each time.
        max_invalid: the largest share of a shard's pictures that may stay without a verdict.
        shard: pictures written together.
    """

    cache: str | None = None
    max_invalid: float = Field(0.05, ge=0, le=1)
    shard: int = Field(256, ge=1)

    def build(self, device: str) -> "Judge":
        """The judge these settings describe.

        Raises:
            UserError: they do not fit what stands at a checkpoint, in a file or behind an address.
            judges.base.Unavailable: nobody answers.
        """
        with told("judge"):
            return self._build(device)

    def _build(self, device: str) -> "Judge":
        raise NotImplementedError

    def _seen(self, model: Model, device: str) -> "VQA":
        with told("judge.model"):
            found = model.build(device)
        return judges.CachedVQA(found, self.cache) if self.cache else found

    def _asked(self, questions: Questions) -> "Decompose":
        with told("judge.questions"):
            return questions.build()


class QuestionsJudge(Judging):
    """Asks `questions` about a prompt, whose answers `aggregate` weighs (see `judges.questions`)."""

    type: Literal["questions"]
    model: Model
    questions: Questions
    aggregate: Literal["weakest", "mean_margin", "accuracy", "dsg", "product", "soft_tifa"] = "weakest"

    def depends(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "aggregate": self.aggregate,
            "model": self.model.depends(),
            "questions": self.questions.depends(),
        }

    def _build(self, device: str) -> "Judge":
        aggregate = judges.AGGREGATES[self.aggregate]
        return judges.QuestionJudge(
            self._seen(self.model, device), self._asked(self.questions), aggregate, self.questions.type
        )


class ConstitutionJudge(Judging):
    """Holds samples against weighted principles: a shipped constitution's name, or a YAML file."""

    type: Literal["constitution"]
    model: Model
    principles: str
    mode: Literal["all", "drawn"] = "all"
    count: int = Field(1, ge=1)
    seed: int = 0
    aggregate: Literal["mean_margin", "weakest"] = "mean_margin"

    def depends(self) -> dict[str, Any]:
        told = [vars(principle) for principle in self._constitution().principles]
        settings = self.model_dump(mode="json", include={"type", "mode", "count", "seed", "aggregate"})
        return {**settings, "model": self.model.depends(), "principles": told}

    def _build(self, device: str) -> "Judge":
        name = f"constitution-{fingerprint(self.depends())[:12]}"
        aggregate = judges.AGGREGATES[self.aggregate]
        return judges.QuestionJudge(self._seen(self.model, device), self._constitution(), aggregate, name)

    def _constitution(self) -> "judges.Constitution":
        with told("judge"):
            return judges.Constitution.load(self.principles, self.mode, self.count, self.seed)


class PairwiseJudge(Judging):
    """Compares the siblings of a prompt with one another, and scores them by Bradley-Terry strengths.

    A model of two images sees both, in both orders. One of a single image compares by its answers to `questions`, at a
    `temperature` (see `judges.pairwise`).

    Attributes:
        rounds: every image meets twice as many others.
        principles: a constitution to compare by, one drawn for each prompt, for a model of two images; null to ask
            which shows the prompt better.
        tie: probabilities this close to 1/2 become 1/2, for a model of two images.
    """

    type: Literal["pairwise"]
    model: Model
    questions: Questions = WholeQuestions(type="whole")
    principles: str | None = None
    rounds: int = Field(2, ge=1)
    temperature: float = Field(1.0, gt=0)
    tie: float = Field(0.0, ge=0, lt=0.5)

    def depends(self) -> dict[str, Any]:
        settings = self.model_dump(mode="json", include={"type", "rounds", "temperature", "tie"})
        principles = self._constitution()
        return {
            **settings,
            "model": self.model.depends(),
            "questions": self.questions.depends(),
            "principles": [vars(principle) for principle in principles.principles] if principles else None,
        }

    def _constitution(self) -> "judges.Constitution | None":
        with told("judge"):
            return judges.Constitution.load(self.principles, "drawn") if self.principles else None

    def _build(self, device: str) -> "Judge":
        seen = self._seen(self.model, device)
        principles = self._constitution()
        if seen.most_images > 1:
            name = f"pairwise-{fingerprint(self.depends())[:12]}" if principles else "pairwise"
            comparer = judges.PairwiseJudge(seen, principles.wordings if principles else None, self.tie, name)
        elif principles or self.tie:
            given = "principles" if principles else "tie"
            raise ValueError(f"{given}: {seen.id} sees one image at a time and compares scores; leave {given} out")
        else:
            scorer = judges.QuestionJudge(seen, self._asked(self.questions), name=self.questions.type)
            comparer = judges.ScoreComparer(scorer, self.temperature)
        return judges.GroupJudge(comparer, self.rounds)


class MatchingJudge(Judging):
    """Image-text matching or contrast by a BLIP-2 that has no language model."""

    type: Literal["matching"]
    checkpoint: str
    head: Literal["itm", "itc"] = "itm"

    def depends(self) -> dict[str, Any]:
        return {"type": self.type, "head": self.head, "checkpoint": checkpoint_id(self.checkpoint)}

    def _build(self, device: str) -> "Judge":
        name = f"blip2({fingerprint(self.depends())[:12]})"
        return judges.MatchingJudge.from_pretrained(self.checkpoint, device, head=self.head, id=name)


class ClipJudge(Judging):
    """CLIPScore, or a preference model of CLIP's form (PickScore); see `judges.scorers.ClipJudge`."""

    type: Literal["clip"]
    checkpoint: str
    kind: Literal["clipscore", "preference"] = "clipscore"
    processor: str | None = None

    def depends(self) -> dict[str, Any]:
        processor = self.processor and checkpoint_id(self.processor)
        checkpoint = checkpoint_id(self.checkpoint)
        return {"type": self.type, "kind": self.kind, "checkpoint": checkpoint, "processor": processor}

    def _build(self, device: str) -> "Judge":
        name = f"clip({fingerprint(self.depends())[:12]})"
        return judges.ClipJudge.from_pretrained(
            self.checkpoint, device, kind=self.kind, processor=self.processor, id=name
        )


class EnsembleJudge(Judging):
    """Several judges as one: the weighted mean of their margins, or the worst of them."""

    type: Literal["ensemble"]
    members: tuple["JudgeConfig", ...] = Field(min_length=1)
    weights: tuple[float, ...] | None = None
    how: Literal["mean", "worst"] = "mean"

    def depends(self) -> dict[str, Any]:
        settings = self.model_dump(mode="json", include={"type", "weights", "how"})
        return {**settings, "members": [member.depends() for member in self.members]}

    def _build(self, device: str) -> "Judge":
        return judges.Ensemble([member._build(device) for member in self.members], self.weights, self.how)


JudgeConfig = Annotated[
    QuestionsJudge | ConstitutionJudge | PairwiseJudge | MatchingJudge | ClipJudge | EnsembleJudge,
    Field(discriminator="type"),
]
EnsembleJudge.model_rebuild()


class AuditConfig(Section):
    """How closely a judge is looked at.

    Attributes:
        prompts: held-out prompts of the embedded world, with four pictures each.
        probed: at most so many pictures are changed by each probe, asked about twice, and in other words.
        clips: prompts of the embedded world with two clips each of `frames` frames, one of them broken on the way.
        mistakes: at most so many wrong verdicts of either kind are shown.
        largest_side: pixels; larger pictures are shrunk on the page.
    """

    prompts: int = Field(240, ge=6)
    probed: int = Field(160, ge=1)
    clips: int = Field(60, ge=0)
    frames: int = Field(8, ge=2)
    mistakes: int = Field(6, ge=0, le=64)
    largest_side: int = Field(384, ge=32, le=2048)


class TuneConfig(Section):
    """How a judge's model is tuned to a person's labels; see `judges.tuning`.

    The learning rate is that of QLoRA (2305.14314, appendix B) for models of 7 and 13 billion parameters.

    Attributes:
        method: `sft`, or for chat models `dpo`.
        heldout: the share of prompts, in expectation, whose labels only measure.
        rank: of the adapter.
        batch: questions a step.
        beta: of `dpo`.
        save_steps: a checkpoint every so many steps.
    """

    method: Literal["sft", "dpo"] = "sft"
    heldout: float = Field(0.3, gt=0, lt=1)
    rank: int = Field(16, ge=1)
    epochs: int = Field(3, ge=1)
    batch: int = Field(32, ge=1)
    learning_rate: float = Field(2e-4, gt=0)
    beta: float = Field(0.1, gt=0)
    save_steps: int = Field(100, ge=1)
