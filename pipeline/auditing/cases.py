"""Pictures and clips of which is known whether they follow their prompt: what a judge is audited on."""

import io
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from judges.base import Answer
from judges.images import open_image
from judges.shapes import flaws
from judges.shapes.grammar import change_one, parse
from judges.shapes.motion import Break, Clip, breaks, broken, drifting, shown
from judges.shapes.oracle import follows, read
from judges.shapes.questions import queries
from judges.shapes.render import render, scene_of
from models.keys import sample_key
from pipeline.prompts import PromptRow, draw_key
from pipeline.settings import UserError
from rewards.tables import Refused


@dataclass(frozen=True)
class Case:
    """A picture, its prompt, and how likely it follows.

    Attributes:
        origin: how it came about; "" where that is not known.
        file: an encoded picture, or where it lies.
        truth: the probability, in [0, 1], that the picture follows its prompt: 0 or 1 where that is certain, 0.5 where
            people are torn.
    """

    prompt: str
    skill: str
    origin: str
    file: bytes | Path
    truth: float

    def image(self) -> np.ndarray:
        """The picture, uint8 (H, W, 3)."""
        return open_image(self.file)


@dataclass(frozen=True)
class ClipCase:
    """A clip of the embedded world, its prompt, and which frames follow it.

    Attributes:
        how: what breaks the prompt on the way, in this clip or in its twin.
    """

    prompt: str
    how: Break
    clip: Clip
    shows: tuple[bool, ...]

    def images(self) -> list[np.ndarray]:
        """The frames, uint8 (H, W, 3) each."""
        return list(render(self.clip))

    def truths(self, answers: Sequence[Answer]) -> list[bool | None]:
        """Whether the expected answer to each question is right in every frame; None where that is not known."""
        right = {q.text: all(q.answer(scene) for scene in self.clip) for q in queries(parse(self.prompt))}
        return [right.get(answer.question) for answer in answers]


class Cases(Protocol):
    """Cases, the rows that could not become one, and what is known of pictures made from them.

    `most` is how far numbers in their prompts may be raised.
    """

    source: str
    cases: tuple[Case, ...]
    refused: tuple[Refused, ...]
    most: int

    def gold(self, image: np.ndarray, prompt: str) -> bool | None:
        """Whether a picture follows a prompt; None where nobody knows."""

    def truths(self, case: Case, answers: Sequence[Answer]) -> list[bool | None]:
        """Whether the expected answer to each question is the right one; None where that is not known."""


@dataclass(frozen=True)
class ShapesCases:
    """Pictures of the embedded world, of which its oracle knows everything."""

    cases: tuple[Case, ...]
    source: str = "the embedded world"
    refused: tuple[Refused, ...] = ()
    most: int = 4

    def gold(self, image: np.ndarray, prompt: str) -> bool | None:
        return follows(image, prompt)

    def truths(self, case: Case, answers: Sequence[Answer]) -> list[bool | None]:
        seen = read(case.image())
        right = {query.text: query.answer(seen) for query in queries(parse(case.prompt))}
        return [right.get(answer.question) for answer in answers]


def shapes_cases(config: Any, count: int, device: str) -> ShapesCases:
    """Four pictures of each of `count` held-out prompts: clean, another prompt's, spoilt, and the generator's.

    The second shows the prompt with one attribute changed. The oracle says of each whether it follows.

    Raises:
        UserError: the prompts of `config` are not those of the embedded world.
    """
    if config.prompts.type != "shapes":
        raise UserError(
            f"prompts.type: nobody knows which pictures follow {config.prompts.type!r} prompts; audit with a table of "
            "human labels"
        )
    prompts = config.prompts.held_out(draw_key(config.seed, "audit"), count)
    painted = _painted(config, prompts, device)
    cases = []
    for place, (row, painting) in enumerate(zip(prompts, painted, strict=True)):
        rng = random.Random(sample_key(config.seed, "audit", row.id, place))
        prompt = parse(row.text)
        pictures = {
            "rendered for the prompt": flaws.clean(scene_of(prompt, rng)).image,
            "rendered with one thing changed": flaws.clean(scene_of(change_one(prompt, rng), rng)).image,
            "rendered with flaws": flaws.flawed(scene_of(prompt, rng), rng).image,
            "painted by the generator": painting,
        }
        for origin, image in pictures.items():
            cases.append(Case(row.text, row.skill, origin, png(image), float(follows(image, prompt))))
    return ShapesCases(tuple(cases))


def shapes_clips(config: Any, count: int, frames: int) -> tuple[ClipCase, ...]:
    """Twin clips of each of `count` held-out prompts: one follows in every frame, the other is broken on the way.

    Each way to break occurs about equally often, as far as the prompts allow it.
    """
    used: Counter[Break] = Counter()
    found = []
    for place, row in enumerate(config.prompts.held_out(draw_key(config.seed, "audit", "clips"), count)):
        rng = random.Random(sample_key(config.seed, "audit", "clips", row.id, place))
        prompt = parse(row.text)
        how = min(breaks(prompt), key=used.__getitem__)
        used[how] += 1
        for clip in (drifting(prompt, rng, frames), broken(prompt, rng, frames, how)):
            found.append(ClipCase(row.text, how, clip, shown(prompt, clip)))
    return tuple(found)


def _painted(config: Any, prompts: Sequence[PromptRow], device: str) -> list[np.ndarray]:
    generator = config.generator.build(device)
    config.evaluate.check("evaluate", generator, (prompt.text for prompt in prompts))
    keys = [sample_key(config.seed, "audit", prompt.id, place) for place, prompt in enumerate(prompts)]
    return list(config.evaluate.paint(generator, [p.text for p in prompts], keys))


def png(image: np.ndarray) -> bytes:
    """A picture, uint8 (H, W, 3), as a PNG."""
    with io.BytesIO() as file:
        Image.fromarray(image).save(file, "PNG")
        return file.getvalue()
