"""The settings of the trainer, whatever the algorithm, of the watch over it, and of refreshing its reward."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from pipeline.settings import Section, UserError


class AlgorithmSettings(Section):
    """What the settings of every algorithm have, beside their `type` and their own knobs.

    Attributes:
        follows_reward: whether it takes the gradient of the reward, which must then have one.
        rows: of a network call, for each example that is learned from.
        whole_groups: whether it takes all siblings of a prompt together, to choose among them.
    """

    type: str
    follows_reward: ClassVar[bool] = False
    rows: ClassVar[int] = 1
    whole_groups: ClassVar[bool] = False

    @property
    def offline(self) -> bool:
        """Whether it learns from the run's preference pairs, and not from what the policy paints."""
        return False

    def check(self, steps: int, siblings: int) -> None:
        """Raises ValueError where a path of so many steps, or a group of so many siblings, has no room for it."""


class LoraSettings(Section):
    """The adapter (2106.09685): B A is scaled by `alpha` / `rank`.

    Attributes:
        targets: names, or endings of names, of the layers it is put on; null for those of the generator's family.
    """

    rank: int = Field(32, ge=1)
    alpha: float = Field(64.0, gt=0)
    targets: tuple[str, ...] | None = Field(None, min_length=1)


class TrainerSettings(Section):
    """What every algorithm is trained with.

    Attributes:
        groups: prompts an iteration, over all processes.
        group_size: pictures of each.
        redraws: how often, at most, the groups of an iteration that have no signal are made up for by groups of other
            prompts (dynamic sampling; DAPO, 2503.14476, section 3.2).
        enlarge: so many groups of an iteration, those whose rewards vary most, get as many siblings again
            (variance-aware group sizes; after SuperFlow, 2512.17951).
        updates: optimiser steps an iteration, each on a share of the groups, equal ones where they divide.
        steps: network calls a picture; `shift` spends more of them near the noise.
        decay: share of the iterations, at the end, over which the learning rate falls to 0.
        average: decay of the moving average of the weights that are trained, which is what is kept in the end.
        lora: the adapter that is trained, or null to train the whole transformer.
        keep_base: of a transformer that is trained as a whole keep a frozen copy, for whatever measures how far it has
            come; an adapter is switched off instead.
        dtype: in which the transformer computes, by autocast; weights, log-probabilities and losses are float32.
        gradient_checkpointing: compute the transformer's blocks once more for the gradient rather than keep them.
        twin: a copy of the transformer, with the adapter merged into it, rolls out, which is faster; without one the
            transformer that learns rolls out itself, in half the memory. Where it is null there is one beside whole
            float32 weights alone: merged into coarser ones an adapter is lost to rounding.
        shard: share the frozen weights out over all processes, each of which gathers a block at a time, so that a
            transformer which does not fit on one device can be tuned; one process keeps them all. Takes an adapter and
            no twin.
        batch: pictures a network call, and so many are decoded at a time.
        overlap: lots in which the groups of an iteration are rolled out; one is rated while the next is rolled out,
            which pays where a server is the judge.
        compile: torch.compile what runs in rollouts, where this machine can; pays on runs of minutes.
    """

    iterations: int = Field(100, ge=1)
    groups: int = Field(32, ge=1)
    group_size: int = Field(16, ge=2)
    redraws: int = Field(0, ge=0)
    enlarge: int = Field(0, ge=0)
    updates: int = Field(1, ge=1)
    steps: int = Field(8, ge=1)
    shift: float = Field(1.0, gt=0)
    learning_rate: float = Field(2e-3, gt=0)
    decay: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(1e-4, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    average: float = Field(0.9, ge=0, lt=1)
    lora: LoraSettings | None = LoraSettings()
    keep_base: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    twin: bool | None = None
    shard: bool = False
    batch: int = Field(256, ge=1)
    overlap: int = Field(1, ge=1)
    compile: bool = False

    @property
    def helpings(self) -> int:
        """Of `group_size` pictures in an iteration, redraws left out."""
        return self.groups + self.enlarge

    def shards(self, processes: int) -> bool:
        """Whether frozen weights are shared out among so many."""
        return self.shard and processes > 1

    @model_validator(mode="after")
    def _every_update_has_a_group(self) -> Self:
        if self.updates > self.groups:
            raise ValueError(
                f"updates: {self.updates} cannot share {self.groups} groups; make it {self.groups} or less"
            )
        return self

    @model_validator(mode="after")
    def _there_is_a_group_to_enlarge(self) -> Self:
        if self.enlarge > self.groups:
            raise ValueError(f"enlarge: {self.enlarge} of {self.groups} groups; make it {self.groups} or less")
        return self

    @model_validator(mode="after")
    def _twin_is_compiled(self) -> Self:
        if self.compile and self.twin is False:
            raise ValueError("compile: what is compiled is the twin; set finetune.twin to true, or compile to false")
        return self

    @model_validator(mode="after")
    def _frozen_weights_are_sharded(self) -> Self:
        if self.shard and self.lora is None:
            raise ValueError("shard: without an adapter no weight is frozen; set finetune.lora, or shard to false")
        if self.shard and self.twin:
            raise ValueError("shard: a twin is whole on every process; set finetune.twin to null, or shard to false")
        if self.shard and self.compile:
            raise ValueError(
                "shard: what is compiled is the twin, and beside shards there is none; set finetune.compile to false, "
                "or shard to false"
            )
        return self

    def has_twin(self, dtype: str) -> bool:
        """Whether a twin rolls out, where the transformer's weights are of `dtype`."""
        return dtype == "float32" and not self.shard if self.twin is None else self.twin

    def check_weights(self, dtype: str, needs_old: bool) -> None:
        """Raises UserError where weights of `dtype` cannot be trained so; `needs_old` is the algorithm's."""
        exact = dtype == "float32"
        if not exact and self.lora is None:
            raise UserError(
                f"generator.dtype: full fine-tuning trains these weights, and of {dtype} ones small steps are lost to "
                "rounding; set it to float32, and finetune.dtype to bfloat16"
            )
        if not exact and self.twin:
            raise UserError(
                f"finetune.twin: merged into {dtype} weights an adapter is lost to rounding; set it to null, or "
                "generator.dtype to float32"
            )
        if not exact and self.compile:
            raise UserError(
                f"finetune.compile: what is compiled is the twin, and beside {dtype} weights there is none; set it to "
                "false, or generator.dtype to float32"
            )
        if needs_old and self.updates > 1 and not self.has_twin(dtype):
            alone = "set finetune.shard to false" if self.shard else "set it to true"
            remedy = alone if exact else "set generator.dtype to float32"
            raise UserError(
                "finetune.twin: the algorithm asks the policy that rolled out, which over several updates a twin alone "
                f"remembers; {remedy}, or finetune.updates to 1"
            )


class RefreshSettings(Section):
    """How the reward model keeps up with what the policy paints; see `pipeline.rl.refresh`.

    Attributes:
        every: iterations between two refreshes.
        prompts: of the training prompts, with `images` pictures each, fresh from the policy.
        epochs: over the pairs of a refresh.
        replay: the share of them that are the run's old pairs.
    """

    every: int = Field(100, ge=1)
    prompts: int = Field(64, ge=2)
    images: int = Field(4, ge=2)
    epochs: int = Field(1, ge=1)
    replay: float = Field(0.5, ge=0, lt=1)


class WatchSettings(Section):
    """Checks for signs that the reward is hacked; see `pipeline.rl.checks` and `rewards.hacking`.

    Attributes:
        every: iterations between two checks; the base model and the last iteration are checked too.
        prompts: that many held out, and as many that are trained on; thresholds are learned from 50 or more.
        images: pictures of each held-out prompt; of the others one.
        judge: ask the run's judge too, for what the reward is not trained on. Where it is the reward it is not asked.
        stop_on: what ends a training when it lasts; the other signals, or all where this is empty, only warn. A loss of
            diversity is not among them, as some of it comes with most success.
        patience: checks in a row that make an alarm last.
    """

    every: int = Field(20, ge=1)
    prompts: int = Field(64, ge=50)
    images: int = Field(2, ge=2)
    judge: bool = True
    stop_on: tuple[Literal["heldout_gap", "judge_divergence", "diversity_loss", "kl_frontier"], ...] = (
        "heldout_gap",
        "judge_divergence",
        "kl_frontier",
    )
    patience: int = Field(2, ge=1)
