"""Which reward model a run learns: settings of its backbone, of how much of it is trained, and of its loss.

`reward.backbone.type` picks the backbone, `reward.train.type` what of it learns, `reward.loss.type` how its scores
explain the judge's preferences.
"""

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_type_hints

from pydantic import Field, create_model, model_validator

import rewards
from pipeline.judging import checkpoint_id
from pipeline.settings import Section
from rewards.losses import BradleyTerry, Davidson, Gaussian, PairLoss, Pointwise, RaoKupper, Thurstone, make_loss

if TYPE_CHECKING:
    from rewards.backbones import RewardModel, Trained


class Backbone(Section):
    """What all backbones have: a checkpoint, a local folder or a hub id.

    `build` gives the untrained reward model, in which whatever is new depends on `seed`. It raises ValueError where the
    checkpoint does not fit, and OSError where there is none.
    """

    type: str
    checkpoint: str

    def depends(self) -> dict[str, Any]:
        return {**self.model_dump(mode="json"), "checkpoint": checkpoint_id(self.checkpoint)}


class QFormerBackbone(Backbone):
    """A BLIP-2 for image-text matching, with a scalar head."""

    type: Literal["qformer"]

    def build(self, seed: int) -> "RewardModel":
        return rewards.QFormerReward.from_checkpoint(self.checkpoint)


class VQABackbone(Backbone):
    """A BLIP-2 that answers questions, its yes with a scalar head; see `rewards.backbones.vqa`.

    Attributes:
        template: the question, with `{}` where the prompt goes.
        length: tokens that every question is padded to; null for the tokenizer's length.
    """

    type: Literal["vqa"]
    template: str | None = None
    length: int | None = Field(None, ge=1)

    def build(self, seed: int) -> "RewardModel":
        settings = self.model_dump(exclude={"type", "checkpoint"}, exclude_none=True)
        return rewards.VQAReward.from_checkpoint(self.checkpoint, **settings)


class ClipBackbone(Backbone):
    """A CLIP or SigLIP, such as PickScore; or a `fresh` one around the vision tower of a BLIP-2 checkpoint.

    Attributes:
        processor: where tokenizer and image processor are, if not beside the weights.
    """

    type: Literal["clip"]
    fresh: bool = False
    processor: str | None = None

    @model_validator(mode="after")
    def _has_one_processor(self) -> Self:
        if self.fresh and self.processor:
            raise ValueError("processor: a fresh model takes that of its checkpoint; leave it out")
        return self

    def depends(self) -> dict[str, Any]:
        return {**super().depends(), "processor": self.processor and checkpoint_id(self.processor)}

    def build(self, seed: int) -> "RewardModel":
        if self.fresh:
            return rewards.ClipReward.fresh(self.checkpoint, seed)
        return rewards.ClipReward.from_checkpoint(self.checkpoint, self.processor)


class ImageRewardBackbone(Backbone):
    """A BLIP for image-text retrieval with ImageReward's MLP; or a `fresh` one made of a BLIP-2 checkpoint."""

    type: Literal["imagereward"]
    fresh: bool = False

    def build(self, seed: int) -> "RewardModel":
        make = rewards.ImageReward.fresh if self.fresh else rewards.ImageReward.from_checkpoint
        return make(self.checkpoint, seed)


class ChatBackbone(Backbone):
    """A chat model that sees pictures, with HPSv3's head; see `rewards.backbones.chat`.

    Attributes:
        template: what it is told, with `{}` where the prompt goes.
        size: pixels a side of every picture.
        length: tokens of picture and prompt together.
        dtype: of the chat model; the head is always float32.
    """

    type: Literal["chat"]
    template: str | None = None
    size: int = Field(448, ge=1)
    length: int = Field(512, ge=1)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def build(self, seed: int) -> "RewardModel":
        settings = self.model_dump(exclude={"type", "checkpoint"}, exclude_none=True)
        return rewards.ChatReward.from_checkpoint(self.checkpoint, seed, **settings)


class LatentBackbone(Backbone):
    """The transformer of a native generator, the folder in `checkpoint`, on latents with noise up to `most_noise`."""

    type: Literal["latent"]
    most_noise: float = Field(0.5, ge=0, le=1)

    def build(self, seed: int) -> "RewardModel":
        return rewards.LatentReward.from_checkpoint(self.checkpoint, seed, self.most_noise)


BackboneConfig = Annotated[
    QFormerBackbone | VQABackbone | ClipBackbone | ImageRewardBackbone | ChatBackbone | LatentBackbone,
    Field(discriminator="type"),
]


class FrozenTower(Section):
    """What reads pictures alone is frozen, and the lowest `share` of the layers behind it."""

    type: Literal["frozen"] = "frozen"
    share: float = Field(0.0, ge=0, le=1)

    def build(self) -> "Trained":
        return rewards.Frozen(share=self.share)


class LoraAdapters(Section):
    """Adapters on every linear layer, and what is new."""

    type: Literal["lora"]
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)

    def build(self) -> "Trained":
        return rewards.Lora(rank=self.rank, alpha=self.alpha)


class FullTraining(Section):
    """Everything that reads pictures or prompts; never a generator's codec and text encoder."""

    type: Literal["full"]

    def build(self) -> "Trained":
        return rewards.Full()


TrainConfig = Annotated[FrozenTower | LoraAdapters | FullTraining, Field(discriminator="type")]


class LossSection(Section):
    """A loss of `rewards.losses`, with its fields as settings."""

    def build(self) -> PairLoss:
        return make_loss(**self.model_dump())

    @model_validator(mode="after")
    def _is_in_range(self) -> Self:
        self.build()
        return self


def _section(kind: type[PairLoss]) -> type[LossSection]:
    hints = get_type_hints(kind)
    settings = {field.name: (hints[field.name], field.default) for field in fields(kind)}
    return create_model(kind.__name__, __base__=LossSection, **settings)


BradleyTerryLoss, RaoKupperLoss, DavidsonLoss = map(_section, (BradleyTerry, RaoKupper, Davidson))
GaussianLoss, ThurstoneLoss, PointwiseLoss = map(_section, (Gaussian, Thurstone, Pointwise))

LossConfig = Annotated[
    BradleyTerryLoss | RaoKupperLoss | DavidsonLoss | GaussianLoss | ThurstoneLoss | PointwiseLoss,
    Field(discriminator="type"),
]
