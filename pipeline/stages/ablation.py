"""Ablations: variants of a network on the same latents, captions and noise for as many steps, and a table of them.

Not a stage of a run: `python -m pipeline pretrain configs/ablations/positions.yaml`. Each variant has a folder of its
own, named by its settings; one that was cut off goes on, one that is done is not trained again, and what is asked of it
is measured once.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from rich.table import Table
from torch import nn

from models import geometry, metering
from models.codec import Autoencoder, empty_codec, load_codec
from models.generator import NativeGenerator, sample
from models.keys import sample_key
from pipeline.judging import told
from pipeline.networks import NetworkConfig
from pipeline.progress import Progress
from pipeline.rl.grids import sheet
from pipeline.stages.flow import FlowConfig, Gallery, gallery_of, held_out, measured, train_flow
from pipeline.store import atomic_write_text
from rewards.metrics import wilson_interval

_DONE = "trained.json"
_SHOWN = 12
"""Pictures of a variant in a sheet, two of each skill."""


class AblationJob(FlowConfig):
    """Several networks, otherwise trained alike, on the latents of a codec that is there.

    Attributes:
        codec: the folder of a codec, or of a generator or a pipeline whose codec is taken.
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
        try:
            codec = empty_codec(self.codec)
        except FileNotFoundError as error:
            raise ValueError(f"codec: {error}") from None
        for name, network in self.variants.items():
            try:
                built = self.check(network, codec)
            except ValueError as error:
                raise ValueError(f"variants.{name}: {error}") from None
            for side in self.sides:
                cell = codec.cell * built.config.patch
                if side < cell or side % cell:
                    raise ValueError(f"sides: {side} pixels are no multiple of {cell}, the pixels of a patch of {name}")
        return self


def ablate(job: AblationJob, seed: int, folder: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Train and measure what is not done yet, and put all variants into one table.

    In `out` lies the generator of each variant by its name, and for each of `job.sides` a sheet of pictures of the same
    prompts from the same noise, a row a variant.
    """
    with told("job"):
        codec = load_codec(job.codec)
    gallery: Gallery | None = None
    rows, shown = {}, {side: [] for side in job.sides}
    for name, network in job.variants.items():
        place = _place(job, seed, folder, name, network)
        if not (place / _DONE).is_file():
            gallery = gallery or gallery_of(codec, job.pictures, seed, progress, job.weights)
            progress.say(f"variant {name}")
            _train(job, network, codec, gallery, seed, place, progress)
        shutil.copytree(place / "checkpoint", out / name, dirs_exist_ok=True)
        for side, pictures in shown.items():
            painter = NativeGenerator.from_pretrained(out / name).at(side)
            pictures.append(list(sample(painter, held_out(_SHOWN), range(_SHOWN))))
        gold = {str(side): _gold(place, side, job.images) for side in job.sides}
        rows[name] = {**json.loads((place / _DONE).read_text()), "gold": gold}
    for side, pictures in shown.items():
        sheet(pictures).save(out / f"samples-{side}.png")
    return {"steps": job.clean_steps + job.noisy_steps, "batch": job.batch, "seed": seed, "variants": rows}


def show(table: Mapping[str, Any]) -> Table:
    """A row a variant, its accuracy with the interval of 95 % in percent."""
    sides = next(iter(table["variants"].values()))["gold"]
    columns = ["variant", "parameters", "of the text", "Gflops", *(f"gold at {side} pixels" for side in sides)]
    found = Table(*columns, title=f"{table['steps']:,} steps of {table['batch']}")
    for name, row in table["variants"].items():
        gold = [
            f"{100 * one['gold']:.1f} % ({'–'.join(f'{100 * end:.1f}' for end in one['interval'])})"
            for one in row["gold"].values()
        ]
        found.add_row(name, f"{row['parameters']:,}", f"{row['text_parameters']:,}", f"{row['gflops']:.4f}", *gold)
    return found


def _train(
    job: AblationJob,
    network: NetworkConfig,
    codec: Autoencoder,
    gallery: Gallery,
    seed: int,
    place: Path,
    progress: Progress,
) -> None:
    """Train one variant, and write down what is known of it without looking at its pictures."""
    torch.compiler.reset()
    generator = job.new_generator(network, seed, codec)
    train_flow(job, generator, gallery, seed, place, progress)
    generator.save_pretrained(place / "checkpoint")
    painter = NativeGenerator.from_pretrained(place / "checkpoint")
    known = {
        "network": network.model_dump(mode="json"),
        "parameters": _parameters(painter.transformer),
        "text_parameters": _parameters(painter.text_encoder),
        "gflops": _gflops(place / "checkpoint"),
    }
    atomic_write_text(place / _DONE, json.dumps(known))


def _gold(place: Path, side: int, images: int) -> dict[str, Any]:
    """The accuracy of the variant in `place` on so many pictures of `side` pixels, measured once."""
    path = place / f"gold-{side}-{images}.json"
    if not path.is_file():
        found = measured(NativeGenerator.from_pretrained(place / "checkpoint").at(side), images)
        right = round(found["gold"] * images)
        atomic_write_text(path, json.dumps({**found, "interval": list(wilson_interval(right, images))}))
    return json.loads(path.read_text())


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _gflops(checkpoint: Path) -> float:
    """Of a call for one latent of the trained size: thousand millions of multiplications with additions.

    The DiT paper (2212.09748) counts so; whoever counts a multiplication and an addition as two gets twice as many.
    """
    looks = geometry.geometry(str(checkpoint))
    network = looks.network.build()
    given = geometry.asked(network, 1, (network.config.size,) * 2, looks.text_tokens)
    return metering.painted(network, given).flops / 2e9


def _place(job: AblationJob, seed: int, folder: Path, name: str, network: NetworkConfig) -> Path:
    """The folder of a variant, named by all that its training depends on."""
    settings = job.model_dump_json(exclude={"variants", "sides", "images"})
    return folder / f"{name}-{sample_key(seed, settings, network.model_dump_json()):016x}"
