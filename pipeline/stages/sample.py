"""The stage `sample`: pictures of the training prompts, several each, for a judge to compare."""

import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, Self, TypeVar

import datasets
import numpy as np
from PIL import Image
from pydantic import Field, model_validator

import models
from models.keys import sample_key
from models.samplers import calls
from pipeline.forecast import fits
from pipeline.judging import told
from pipeline.pace import call_seconds
from pipeline.prompts import PromptRow, draw_key
from pipeline.runner import Context, Stage, Work
from pipeline.settings import Section
from pipeline.store import write_rows

T = TypeVar("T")

FEATURES = datasets.Features(
    {
        "prompt_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "skill": datasets.Value("string"),
        "sample": datasets.Value("int32"),
        "painted": datasets.Value("string"),
        "image": datasets.Image(),
    }
)


class Painting(Section):
    """How a stage paints; see `models.samplers`.

    Attributes:
        steps: network calls a picture; `heun` makes two a step, but one in the last.
        shift: above 1 spends more of the steps near the noise.
        sampler: `ode` (Euler, DDIM), `heun` and `dpm2m` (DPM-Solver++(2M)) have no noise of their own, the others do.
        eta: how much of it; `ddim` is `ode` at 0 and `ddpm`, which has no choice, at 1.
        shard: pictures a file, the unit in which an interrupted stage goes on.
    """

    steps: int = Field(8, ge=1)
    shift: float = Field(1.0, gt=0)
    sampler: Literal["ode", "heun", "dpm2m", "ddim", "ddpm", "sde", "dance", "cps"] = "ode"
    eta: float = Field(0.7, ge=0, le=1)
    batch: int = Field(128, ge=1)
    shard: int = Field(256, ge=1)

    @property
    def calls(self) -> int:
        """Of the network, for a picture."""
        return calls(self.sampler, self.steps)

    def check(self, place: str, generator: "models.Generator", prompts: Iterable[str]) -> None:
        """Raises UserError, beginning with `place`, where the generator takes no such steps, or no such prompt."""
        with told(place):
            generator.times(self.steps, self.shift)
            generator.check(prompts)

    def paint(self, generator: "models.Generator", prompts: Sequence[str], keys: Sequence[int]) -> Iterator[np.ndarray]:
        """Pictures, one uint8 (H, W, 3) each, in order; `keys` decide their noise."""
        return models.sample(
            generator, prompts, keys, self.steps, self.shift, self.batch, sampler=self.sampler, eta=self.eta
        )


class SampleConfig(Painting):
    """How many pictures to compare, and how they are painted.

    Attributes:
        images_per_prompt: siblings of one prompt; pairs are made among them.
        foreign: so many of the siblings are painted from a similar prompt instead. They show a judge what the prompt
            did not ask for, which a reward that never saw it would be free to add.
    """

    prompts: int = Field(384, ge=2)
    images_per_prompt: int = Field(6, ge=2)
    foreign: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _some_are_their_own(self) -> Self:
        if self.foreign > self.images_per_prompt - 1:
            raise ValueError(
                f"foreign: {self.foreign} of {self.images_per_prompt} images_per_prompt leave none of its own"
            )
        return self


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
        "version": 2,
        "seed": config.seed,
        "generator": config.generator.depends(),
        "prompts": config.prompts.depends(),
        "sample": config.sample.model_dump(mode="json"),
    }


def _work(config: Any) -> Work:
    images = config.sample.prompts * config.sample.images_per_prompt
    return Work.of(images, {"painting": painting_seconds(config, config.sample, images)}, config.generator.dtype)


def painting_seconds(config: Any, settings: Painting, images: int) -> float | None:
    """So many pictures by `settings`, on the reference machine."""
    call = call_seconds(config)
    return None if call is None else images * settings.calls * call


def _run(context: Context) -> None:
    config = context.config
    settings: SampleConfig = config.sample
    prompts = config.prompts.draw(draw_key(config.seed, "sample"), settings.prompts)
    painted = paintings(prompts, settings.images_per_prompt, settings.foreign, config.seed)
    wanted = [(prompt, k, text) for prompt, texts in zip(prompts, painted, strict=True) for k, text in enumerate(texts)]
    paint(context, config.generator.build(str(context.accelerator.device)), wanted)


def paint(
    context: Context, generator: "models.Generator", wanted: Sequence[tuple[PromptRow, int, str]], *key: str | int
) -> None:
    """Write the pictures that are not there yet: of each prompt its number among the siblings, painted from a text.

    What keys their noise is seed, `key`, prompt and sibling.
    """
    config = context.config
    settings: SampleConfig = config.sample
    settings.check("sample", generator, (text for _, _, text in wanted))
    with context.progress.track(
        len(wanted), "images", "sample", _done(context, len(wanted), settings.shard)
    ) as advance:
        for name, part in shards(context, wanted, settings.shard):
            keys = [sample_key(config.seed, "sample", *key, prompt.id, k) for prompt, k, _ in part]
            texts = [text for _, _, text in part]
            images = settings.paint(generator, texts, keys)
            rows = []
            for (prompt, k, text), image in zip(part, images, strict=True):
                rows.append({**columns(prompt), "sample": k, "painted": text, "image": Image.fromarray(image)})
                advance()
            write_rows(context.artifact, name, rows, FEATURES)


def paintings(prompts: Sequence[PromptRow], siblings: int, foreign: int, seed: int) -> list[list[str]]:
    """The texts that the siblings of each prompt are painted from: its own, and for the last `foreign` of them one of
    the ten other prompts that share most words with it (Jaccard)."""
    words = [set(prompt.text.split()) for prompt in prompts]
    found = []
    for index, prompt in enumerate(prompts):
        alike = [len(words[index] & other) / len(words[index] | other) for other in words]
        near = sorted((i for i in range(len(prompts)) if i != index), key=lambda i: -alike[i])[:10]
        rng = random.Random(sample_key(seed, "foreign", prompt.id))
        others = [prompts[rng.choice(near)].text for _ in range(foreign)]
        found.append([prompt.text] * (siblings - foreign) + others)
    return found


def columns(prompt: PromptRow) -> dict[str, str]:
    """The columns that name a prompt."""
    return {"prompt_id": prompt.id, "prompt": prompt.text, "skill": prompt.skill}


def _done(context: Context, total: int, shard: int) -> int:
    return min(total, shard * len(context.artifact.names("shard-*.parquet")))


SAMPLE = Stage(
    "sample", (), _depends, _work, _run, wanted=lambda config: config.prefer.table is None, check=fits("sample")
)
