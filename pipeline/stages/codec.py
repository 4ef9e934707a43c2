"""Which codec a generator is pretrained on, and the training of a small variational one on renderings."""

import random
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from judges.shapes.grammar import sample_prompt
from judges.shapes.render import Scene, render, scene_of
from models.codec import (
    Autoencoder,
    Codec,
    DiffusersCodec,
    Identity,
    empty_codec,
    load_codec,
    new_vae,
    to_pixels,
    vae_loss,
)
from models.keys import sample_key
from pipeline.judging import told
from pipeline.progress import Progress
from pipeline.settings import Section
from pipeline.stages.flow import Optimisation, run_task

_MEASURED = 512
"""Renderings whose latents have variance 1."""


class MeaningCodec(Section):
    """Ours, from whose latents shape, colour and place can be read; the job has the settings of its training."""

    type: Literal["meaning"] = "meaning"

    def empty(self) -> Autoencoder:
        """On the meta device."""
        with torch.device("meta"):
            return Codec()

    def build(self, seed: int) -> None:
        """A new generator has it already."""


class VAECodec(Section):
    """A small `AutoencoderKL` of diffusers, trained to give renderings back under a divergence from the normal.

    Attributes:
        channels: of the latents.
        widths: of its blocks; each but the last halves a picture's sides.
        kl: the weight of the divergence, averaged over latent dimensions.
        batch: renderings a step.
    """

    type: Literal["vae"]
    channels: int = Field(4, ge=1)
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field((16, 32, 64), min_length=1)
    kl: float = Field(1e-3, ge=0)
    steps: int = Field(2000, ge=1)
    batch: int = Field(64, ge=1)
    lr: float = Field(2e-3, gt=0)

    def empty(self) -> Autoencoder:
        """On the meta device. Raises ValueError where a width does not suit."""
        with torch.device("meta"):
            return new_vae(self.channels, self.widths, 0)

    def build(self, seed: int) -> Autoencoder:
        """Untrained; it depends on `seed` alone."""
        return new_vae(self.channels, self.widths, seed)


class IdentityCodec(Section):
    """None: the generator paints pixels."""

    type: Literal["identity"]

    def empty(self) -> Autoencoder:
        return Identity()

    def build(self, seed: int) -> Autoencoder:
        return Identity()


class FolderCodec(Section):
    """One that is there, and is not trained any further.

    Attributes:
        path: the folder of a codec of ours or of diffusers, or of a generator or a pipeline whose codec is taken.
    """

    type: Literal["folder"]
    path: str

    @field_validator("path")
    @classmethod
    def _holds_a_codec(cls, path: str) -> str:
        try:
            empty_codec(path)
        except FileNotFoundError as error:
            raise ValueError(str(error)) from None
        return path

    def empty(self) -> Autoencoder:
        """On the meta device."""
        return empty_codec(self.path)

    def build(self, seed: int) -> Autoencoder:
        """Raises UserError where its weights are missing or others."""
        with told("job"):
            return load_codec(self.path)


CodecConfig = MeaningCodec | VAECodec | IdentityCodec | FolderCodec
"""Told apart by `type`."""


def scenes_at(seed: int, task: str, step: int, count: int = 64) -> list[Scene]:
    """What a step of a task is shown, three of ten off the lattice on which objects lie in galleries."""
    rng = random.Random(sample_key(seed, task, step))
    return [scene_of(sample_prompt(rng, "train"), rng, lattice=rng.random() < 0.7) for _ in range(count)]


def teach_vae(
    config: VAECodec, codec: DiffusersCodec, optimisation: Optimisation, seed: int, folder: Path, progress: Progress
) -> None:
    """Train, and then scale the latents to mean 0 and variance 1."""

    def vae_at(step: int) -> Tensor:
        pixels = to_pixels(render(scenes_at(seed, "vae", step, config.batch)))
        return vae_loss(codec, pixels, sample_key(seed, "vae noise", step), config.kl)

    settings = optimisation.model_copy(update={"lr": config.lr})
    run_task("vae", vae_at, {"vae": codec.autoencoder}, config.steps, config.steps // 2, settings, folder, progress)
    codec.normalise(to_pixels(render(scenes_at(seed, "vae scale", 0, _MEASURED))))
