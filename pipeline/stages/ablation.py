"""Ablations: variants of a network on the same latents, captions and noise for as many steps, and a table of them.

Not a stage of a run: `python -m pipeline pretrain configs/ablations/positions.yaml`. Each variant has a folder of its
own, named by its settings; one that was cut off goes on, and one that is done is not trained again.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from models.codec import PATCH, Codec
from models.generator import NativeGenerator
from models.keys import sample_key
from models.networks import gflops
from pipeline.networks import NetworkConfig
from pipeline.progress import Progress
from pipeline.stages.flow import FlowConfig, Gallery, gallery_of, measured, train_flow
from pipeline.store import atomic_write_text
from rewards.metrics import wilson_interval

_DONE = "quality.json"


class AblationJob(FlowConfig):
    """Several networks, otherwise trained alike, on the latents of a codec that is there.

    Attributes:
        codec: the generator whose codec is taken.
        variants: the networks, by the names they have in the table.
        sides: of the pictures that are measured, in pixels; all networks are trained on the embedded world's own.
        images: how many of each side, by held-out prompts in turn of their skills.
    """

    type: Literal["ablation"]
    codec: str = "models/checkpoints/shapes"
    pictures: int = Field(20000, ge=1)
    clean_steps: int = Field(1500, ge=0)
    noisy_steps: int = Field(500, ge=0)
    noise: float = Field(0.0, ge=0, le=1)
    variants: dict[str, Annotated[NetworkConfig, Field(discriminator="type")]] = Field(min_length=1)
    sides: tuple[int, ...] = Field((32, 48), min_length=1)
    images: int = Field(510, ge=1)

    @model_validator(mode="after")
    def _networks_can_be_built(self) -> Self:
        for name, network in self.variants.items():
            try:
                built = self.check(network)
            except ValueError as error:
                raise ValueError(f"variants.{name}: {error}") from None
            for side in self.sides:
                cell = PATCH * built.config.patch
                if side < cell or side % cell:
                    raise ValueError(f"sides: {side} pixels are no multiple of {cell}, the pixels of a patch of {name}")
        return self


def ablate(job: AblationJob, seed: int, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train and measure what is not done yet, and put all variants into one table."""
    codec = Codec.from_pretrained(Path(job.codec) / "codec").eval().requires_grad_(False)
    gallery: Gallery | None = None
    rows = {}
    for name, network in job.variants.items():
        place = _place(job, seed, folder, name, network)
        if not (place / _DONE).is_file():
            gallery = gallery or gallery_of(codec, job.pictures, seed, progress)
            progress.say(f"variant {name}")
            atomic_write_text(place / _DONE, json.dumps(_row(job, network, codec, gallery, seed, place, progress)))
        rows[name] = json.loads((place / _DONE).read_text())
    return {"steps": job.clean_steps + job.noisy_steps, "batch": job.batch, "seed": seed, "variants": rows}


def _row(
    job: AblationJob,
    network: NetworkConfig,
    codec: Codec,
    gallery: Gallery,
    seed: int,
    place: Path,
    progress: Progress,
) -> dict[str, Any]:
    """Train one variant; what the table says of it."""
    torch.compiler.reset()
    generator = job.new_generator(network, seed)
    generator.codec = codec
    train_flow(job, generator, gallery, seed, place, progress)
    generator.save_pretrained(place / "checkpoint")
    painter = NativeGenerator.from_pretrained(place / "checkpoint")
    gold = {}
    for side in job.sides:
        found = measured(painter.at(side), job.images)
        right = round(found["gold"] * job.images)
        gold[str(side)] = {**found, "interval": list(wilson_interval(right, job.images))}
    return {
        "network": network.model_dump(mode="json"),
        "parameters": sum(parameter.numel() for parameter in painter.transformer.parameters()),
        "gflops": gflops(painter.transformer, job.max_tokens),
        "gold": gold,
    }


def _place(job: AblationJob, seed: int, folder: Path, name: str, network: NetworkConfig) -> Path:
    """The folder of a variant, named by all that its row depends on."""
    settings = job.model_dump_json(exclude={"variants"})
    return folder / f"{name}-{sample_key(seed, settings, network.model_dump_json()):016x}"
