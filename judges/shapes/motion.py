"""Clips of the embedded world: scenes whose objects drift, and some in which the prompt stops being true on the way.

A clip is its frames in order, each a scene, so `render` paints it and what is true of each frame is known exactly.
Views of a scene from several sides are not made: in a flat picture they would hide objects behind one another or swap
left and right, and a judge is asked nothing of views that it is not asked of frames.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from judges.shapes.grammar import COLOURS, RELATIONS, SHAPES, Prompt, holds
from judges.shapes.render import BORDER, SIZE, Item, Scene, apart, related, scene_of

Clip = tuple[Scene, ...]
"""Scenes in order: the frames."""

Break = Literal["vanishes", "shape", "colour", "crosses"]
"""What happens to an object: it is gone, or takes another shape or colour, or goes to another side than was asked."""

_REACH = 12.0  # pixels that an object drifts at most along either axis
_LESS = 0.97  # of it after every attempt that leaves no room


def drifting(prompt: Prompt, rng: random.Random, frames: int) -> Clip:
    """A clip that follows `prompt` in every frame: each object glides as far as the others leave it room."""
    start, reach = scene_of(prompt, rng), _REACH
    while True:
        clip = _glide(start, [_nearby(item, reach, rng) for item in start], frames)
        if all(_apart(scene) and related(prompt.relation, _spots(scene)) for scene in clip):
            return clip
        reach *= _LESS


def broken(prompt: Prompt, rng: random.Random, frames: int, how: Break) -> Clip:
    """A clip of at least two `frames` that follows `prompt` in the first, and no more from some frame on.

    Raises:
        ValueError: the prompt cannot be broken like this (see `breaks`).
    """
    if how not in breaks(prompt):
        raise ValueError(f"how: {prompt.text!r} can be broken by {', '.join(breaks(prompt))}, not by {how!r}")
    if how == "crosses":
        return _crossing(prompt, rng, frames)
    clip = drifting(prompt, rng, frames)
    start, index = rng.randrange(1, frames), rng.randrange(len(prompt.objects))
    change = _change(clip[0][index], how, rng)
    return clip[:start] + tuple(_changed(scene, index, change) for scene in clip[start:])


def breaks(prompt: Prompt) -> tuple[Break, ...]:
    """The ways in which a clip can stop following `prompt`; a colour that it leaves open cannot become wrong."""
    found: list[Break] = ["vanishes", "shape"]
    if prompt.things[0].colour:
        found.append("colour")
    if prompt.relation:
        found.append("crosses")
    return tuple(found)


def shown(prompt: Prompt, clip: Clip) -> tuple[bool, ...]:
    """Whether each frame follows the prompt."""
    return tuple(holds(prompt, scene) for scene in clip)


def _glide(start: Scene, ends: Sequence[tuple[float, float]], frames: int) -> Clip:
    """Every object on a straight way to its end, slow at first and at last."""
    return tuple(
        tuple(
            replace(item, x=(1 - done) * item.x + done * x, y=(1 - done) * item.y + done * y)
            for item, (x, y) in zip(start, ends, strict=True)
        )
        for done in (1 - np.cos(np.linspace(0, np.pi, frames))) / 2
    )


def _nearby(item: Item, reach: float, rng: random.Random) -> tuple[float, float]:
    least, most = item.radius + BORDER, SIZE - item.radius - BORDER
    x, y = (rng.uniform(max(least, at - reach), min(most, at + reach)) for at in (item.x, item.y))
    return x, y


def _spots(scene: Scene) -> list[tuple[float, float]]:
    return [(item.x, item.y) for item in scene]


def _apart(scene: Scene) -> bool:
    return apart(_spots(scene), [item.radius for item in scene])


def _crossing(prompt: Prompt, rng: random.Random, frames: int) -> Clip:
    """Beyond doubt at both ends; on the way there is a moment at which the relation turns."""
    while True:
        start = scene_of(prompt, rng)
        other = replace(prompt, relation=rng.choice([r for r in RELATIONS if r != prompt.relation]))
        clip = _glide(start, _spots(scene_of(other, rng)), frames)
        shows = shown(prompt, clip)
        turned = related(other.relation, _spots(clip[-1])) and list(shows) == sorted(shows, reverse=True)
        if turned and all(map(_apart, clip)):
            return clip


def _change(item: Item, how: Break, rng: random.Random) -> dict[str, str] | None:
    """What an object takes on; None where it vanishes."""
    match how:
        case "shape":
            return {"shape": rng.choice([shape for shape in SHAPES if shape != item.shape])}
        case "colour":
            return {"colour": rng.choice([colour for colour in COLOURS if colour != item.colour])}
    return None


def _changed(scene: Scene, index: int, change: dict[str, str] | None) -> Scene:
    kept = () if change is None else (replace(scene[index], **change),)
    return (*scene[:index], *kept, *scene[index + 1 :])
