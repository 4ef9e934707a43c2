"""What fine-tuning rewards: one name, or a mixture of weighted terms.

A term's `type` says who rates: the run's reward `model`, another one's `checkpoint`, the `judge` itself (direct
RLAIF), a `rule` on pixels, or the `gold` oracle of the embedded world, which is there to measure.
"""

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

import rewards
from pipeline.compiling import compile_module
from pipeline.judging import told
from pipeline.runner import Context
from pipeline.settings import Section, UserError
from pipeline.stages.reward import RewardConfig
from pipeline.store import Artifact, hash_path

Name = Literal["model", "judge", "gold"]


class RewardTerm(Section):
    """What every term has: a negative `weight` makes it a penalty."""

    type: str
    weight: float = 1.0
    has_gradient: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return self.type

    def depends(self) -> dict[str, Any]:
        """What of it is not in the settings themselves."""
        return {}

    def build(self, context: Context) -> "rewards.Reward":
        raise NotImplementedError


class ReadTerm(RewardTerm):
    """A reward model's, and what of its scores is read; see `rewards.reward.Reading`.

    Attributes:
        coefficient: standard deviations that `penalised` subtracts.
    """

    has_gradient: ClassVar[bool] = True
    reading: Literal["mean", "worst", "penalised"] = "mean"
    coefficient: float = Field(1.0, ge=0)

    def backbone(self, model: RewardConfig) -> str:
        """The type of its backbone, where the run's reward model is `model`."""
        raise NotImplementedError

    def loaded(self, context: Context, folder: Path, temperature: float) -> "rewards.ModelReward":
        """The reward model in `folder`, compiled where finetune.compile says so."""
        with told("finetune.reward"):
            reward = rewards.load_reward(folder, context.accelerator.device)
        self.check(reward.model.head_count, reward.model.kind == "chat", str(folder))
        if context.config.finetune.compile:
            for part in reward.model.networks():
                compile_module(part, context.accelerator.device)
        reward.reading = rewards.Reading(self.reading, self.coefficient)
        reward.temperature = temperature
        return reward

    def check(self, heads: int, knows_deviation: bool, what: str) -> None:
        """Raises UserError where the reward model `what` does not give what is read."""
        if self.reading == "mean" or heads > 1 or (self.reading == "penalised" and knows_deviation):
            return
        raise UserError(
            f"finetune.reward: reading: {self.reading} takes several heads, and {what} has one; train it with "
            "reward.ensemble.heads of 4, or read the mean"
        )


class ModelTerm(ReadTerm):
    """The reward model of the run.

    Attributes:
        temperature: by which its values are divided; `fitted` takes the one that fits its held-out pairs best, so that
            they are nats whatever its loss was.
    """

    type: Literal["model"]
    temperature: Literal["fitted"] | Annotated[float, Field(gt=0)] = 1.0

    def backbone(self, model: RewardConfig) -> str:
        return model.backbone.type

    def build(self, context: Context) -> "rewards.ModelReward":
        source = context.inputs["reward"]
        if (temperature := self.temperature_of(source)) is None:
            raise UserError(
                "finetune.reward: temperature: none fits the reward model's held-out pairs; give a number of nats"
            )
        return self.loaded(context, source.folder / "model", temperature)

    def temperature_of(self, source: Artifact) -> float | None:
        """For the model in `source`; None where none could be fitted."""
        if self.temperature != "fitted":
            return self.temperature
        return json.loads(source.path("metrics.json").read_text(encoding="utf-8"))["temperature"]


class CheckpointTerm(ReadTerm):
    """A reward model that another run saved, the folder `path`; its `temperature` divides its values.

    The folder does not tell the loss that it learned by: a chat model's deviation means something, and may be read as
    `penalised`, only if that was gaussian.
    """

    type: Literal["checkpoint"]
    path: str
    temperature: float = Field(1.0, gt=0)

    @property
    def name(self) -> str:
        return f"checkpoint {self.path}"

    def depends(self) -> dict[str, Any]:
        self._settings()
        return {"path": hash_path(self.path)}

    def backbone(self, model: RewardConfig) -> str:
        return self._settings()["type"]

    def _settings(self) -> dict[str, Any]:
        """What the model was saved with, read without importing what would load it."""
        path = Path(self.path) / "reward.json"
        if not path.is_file():
            raise UserError(f"finetune.reward: {self.path} holds no reward model (no reward.json in it)")
        return json.loads(path.read_text(encoding="utf-8"))

    def build(self, context: Context) -> "rewards.ModelReward":
        return self.loaded(context, Path(self.path), self.temperature)


class JudgeTerm(RewardTerm):
    """The run's judge: its margins, in nats."""

    type: Literal["judge"]

    def build(self, context: Context) -> "rewards.JudgeReward":
        return rewards.JudgeReward(context.config.judge.build(str(context.accelerator.device)))


class RuleTerm(RewardTerm):
    """A statistic of the picture, or how far it lies outside of `low` to `high`; see `rewards.rules`."""

    type: Literal["rule"]
    statistic: Literal["brightness", "contrast", "saturation", "edges", "sharpness", "blockiness"]
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _is_a_range(self) -> "RuleTerm":
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low: {self.low} is above high, {self.high}")
        return self

    @property
    def name(self) -> str:
        return f"rule {self.statistic}"

    def build(self, context: Context) -> "rewards.RuleReward":
        return rewards.RuleReward(self.statistic, self.low, self.high)


class GoldTerm(RewardTerm):
    """1 where the oracle of the embedded world accepts a picture, otherwise 0."""

    type: Literal["gold"]

    def build(self, context: Context) -> "rewards.GoldReward":
        return rewards.GoldReward()


AnyTerm = Annotated[ModelTerm | CheckpointTerm | JudgeTerm | RuleTerm | GoldTerm, Field(discriminator="type")]


class MixtureConfig(Section):
    """Several terms as one reward; see `rewards.mixture` and `pipeline.rl.advantage`.

    Attributes:
        combine: add up the `rewards`, or the `advantages` that each term gives within a group.
        normalise: bring each term to mean 0 and standard deviation 1 first, over all values seen so far (`running`) or
            over those of each `prompt`.
    """

    terms: tuple[AnyTerm, ...] = Field(min_length=1)
    combine: Literal["rewards", "advantages"] = "rewards"
    normalise: Literal["none", "running", "prompt"] = "none"

    @model_validator(mode="after")
    def _every_term_counts(self) -> "MixtureConfig":
        for place, term in enumerate(self.terms):
            if not term.weight:
                raise ValueError(f"terms.{place}.weight: 0 makes the term count for nothing; leave it out")
        return self

    def depends(self) -> list[dict[str, Any]]:
        return [term.depends() for term in self.terms]

    def check(self, model: RewardConfig, followed: bool = False) -> None:
        """Raises UserError where a term reads what the run's reward model will not have, or, its gradient being
        `followed`, has a backbone that gives none."""
        for term in self.terms:
            if isinstance(term, ModelTerm):
                term.check(model.ensemble.heads, model.loss.type == "gaussian", "the run's reward model")
            if followed and not rewards.BACKBONES[kind := term.backbone(model)].differentiable:
                raise UserError(
                    f"finetune.reward: {term.name} is a {kind} model, which gives no gradient of a picture; take "
                    "another backbone, or another finetune.algorithm"
                )

    def check_gradient(self, algorithm: str) -> None:
        """Raises ValueError where `algorithm`, which follows the reward's gradient, finds none."""
        for term in self.terms:
            if not term.has_gradient:
                raise ValueError(
                    f"reward: {algorithm} follows the gradient of the reward, and {term.name} has none; take model or "
                    "a checkpoint"
                )
        if self.combine != "rewards" or self.normalise != "none":
            raise ValueError(
                f"reward: {algorithm} follows the terms as they are; set combine to rewards and normalise to none"
            )

    def build(self, context: Context) -> "rewards.Mixture":
        terms = tuple(rewards.Term(term.name, term.build(context), term.weight) for term in self.terms)
        return rewards.Mixture(terms, self.combine, self.normalise)


def _form(value: Any) -> str:
    return "MixtureConfig" if isinstance(value, dict | MixtureConfig) else "Literal"


RewardChoice = Annotated[
    Annotated[Name, Tag("Literal")] | Annotated[MixtureConfig, Tag("MixtureConfig")], Discriminator(_form)
]
"""The tags are the names that `pipeline.settings` knows the members by."""

_ALONE: dict[str, RewardTerm] = {
    "model": ModelTerm(type="model"),
    "judge": JudgeTerm(type="judge"),
    "gold": GoldTerm(type="gold"),
}


def mixture_config(choice: Name | MixtureConfig) -> MixtureConfig:
    """What a plain name stands for: that term alone."""
    return choice if isinstance(choice, MixtureConfig) else MixtureConfig(terms=(_ALONE[choice],))
