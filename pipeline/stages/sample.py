"""The stage `sample`: pictures of the training prompts, several each, for a judge to compare."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import datasets
from PIL import Image
from pydantic import Field

from models.generator import load_generator, sample, sample_key
from pipeline.prompts import PromptRow, draw_key
from pipeline.runner import Context, Stage, Work
from pipeline.settings import Section
from pipeline.store import hash_path, write_rows

T = TypeVar("T")

CALL_SECONDS = 1.5e-3
"""One network call for one picture of the embedded generator, its share of decoding included, on the reference
machine."""

FEATURES = datasets.Features(
    {
        "prompt_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "skill": datasets.Value("string"),
        "sample": datasets.Value("int32"),
        "image": datasets.Image(),
    }
)


class SampleConfig(Section):
    """How many pictures to compare, and the ODE that draws them.

    Attributes:
        images_per_prompt: siblings of one prompt; pairs are made among them.
        steps: network calls a picture.
        shift: above 1 spends more of the steps near the noise.
        shard: pictures a file, the unit in which an interrupted stage goes on.
    """

    prompts: int = Field(384, ge=2)
    images_per_prompt: int = Field(6, ge=2)
    steps: int = Field(8, ge=1)
    shift: float = Field(1.0, gt=0)
    batch: int = Field(128, ge=1)
    shard: int = Field(256, ge=1)


def shards(context: Context, items: Sequence[T], size: int) -> Iterator[tuple[str, Sequence[T]]]:
    """The unfinished shards of this process with their items; a place to stop lies before each turn."""
    process, artifact = context.accelerator, context.artifact
    starts = range(0, len(items), size)
    for turn in range(0, len(starts), process.num_processes):
        context.check_stop()
        index = turn + process.process_index
        name = f"shard-{index:05d}.parquet"
        if index < len(starts) and not artifact.has(name):
            yield name, items[starts[index] : starts[index] + size]


def _depends(config: Any) -> dict[str, Any]:
    return {
        "version": 1,
        "seed": config.seed,
        "generator": hash_path(config.generator.checkpoint),
        "prompts": config.prompts.depends(),
        "sample": config.sample.model_dump(mode="json"),
    }


def _work(config: Any) -> Work:
    images = config.sample.prompts * config.sample.images_per_prompt
    return Work(images, images * config.sample.steps * CALL_SECONDS)


def _run(context: Context) -> None:
    config = context.config
    settings: SampleConfig = config.sample
    prompts = config.prompts.draw(draw_key(config.seed, "sample"), settings.prompts)
    wanted = [(prompt, k) for prompt in prompts for k in range(settings.images_per_prompt)]
    generator = load_generator(config.generator.checkpoint, device=str(context.accelerator.device))
    with context.progress.track(
        len(wanted), "images", "sample", _done(context, len(wanted), settings.shard)
    ) as advance:
        for name, part in shards(context, wanted, settings.shard):
            keys = [sample_key(config.seed, "sample", prompt.id, k) for prompt, k in part]
            texts = [prompt.text for prompt, _ in part]
            images = sample(generator, texts, keys, settings.steps, settings.shift, settings.batch)
            rows = []
            for (prompt, k), image in zip(part, images, strict=True):
                rows.append({**columns(prompt), "sample": k, "image": Image.fromarray(image)})
                advance()
            write_rows(context.artifact, name, rows, FEATURES)


def columns(prompt: PromptRow) -> dict[str, str]:
    """The columns that name a prompt."""
    return {"prompt_id": prompt.id, "prompt": prompt.text, "skill": prompt.skill}


def _done(context: Context, total: int, shard: int) -> int:
    return min(total, shard * len(context.artifact.names("shard-*.parquet")))


SAMPLE = Stage("sample", (), _depends, _work, _run)
