"""What a judge of the embedded world is taught: batches of pictures, half of them flawed, with texts and truths.

Every prompt in them is of the `train` split. Batches are drawn from the `random.Random` handed in.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from judges.shapes.flaws import Example, clean, flawed
from judges.shapes.grammar import Object, Prompt, Thing, change_one, holds, relation, sample_prompt
from judges.shapes.questions import ask, describe
from judges.shapes.render import SIZE, scene_of

_FLAWED = 0.6  # share of the pictures
_ORDERS = ("[BOS]", "[BOS] below")  # what a description from left to right follows, and one from top to bottom
_SKILLS = {  # how often each is drawn: the harder, the more
    "single_object": 1,
    "colors": 1,
    "two_object": 2,
    "color_attribution": 2,
    "counting": 3,
    "position": 3,
}


@dataclass(frozen=True)
class Matching:
    """Pictures (B, SIZE, SIZE, 3) with T texts each and whether the picture follows them, bool (B, T)."""

    images: np.ndarray
    texts: list[list[str]]
    labels: np.ndarray


@dataclass(frozen=True)
class Contrast:
    """Pictures (B, SIZE, SIZE, 3) with a true text each, and whether picture i follows text j, bool (B, B)."""

    images: np.ndarray
    texts: list[str]
    follows: np.ndarray


@dataclass(frozen=True)
class Answering:
    """Pictures with texts to complete: row r, (given, to say), is about picture `index[r]`."""

    images: np.ndarray
    index: list[int]
    texts: list[tuple[str, str]]


def _example(rng: random.Random) -> tuple[Prompt, Example]:
    prompt = sample_prompt(rng, "train", rng.choices(list(_SKILLS), list(_SKILLS.values()))[0])
    scene = scene_of(prompt, rng, lattice=rng.random() < 0.5)
    return prompt, flawed(scene, rng) if rng.random() < _FLAWED else clean(scene)


def vision_examples(rng: random.Random, size: int) -> list[Example]:
    """What the vision tower is taught on."""
    return [_example(rng)[1] for _ in range(size)]


def matching_batch(rng: random.Random, size: int) -> Matching:
    """Four texts a picture: its prompt, another way to tell it, and a change of each in one attribute."""
    drawn = [_example(rng) for _ in range(size)]
    texts = [_texts(prompt, example.objects, rng) for prompt, example in drawn]
    labels = [[holds(p, example.objects) for p in told] for told, (_, example) in zip(texts, drawn, strict=True)]
    images = np.stack([example.image for _, example in drawn])
    return Matching(images, [[p.text for p in told] for told in texts], np.array(labels))


def contrast_batch(rng: random.Random, size: int) -> Contrast:
    """A true text of each picture; pictures of which the grammar has nothing true to say are left out."""
    drawn: list[tuple[Prompt, Example]] = []
    while len(drawn) < size:
        prompt, example = _example(rng)
        told = prompt if holds(prompt, example.objects) and rng.random() < 0.5 else retell(example.objects, rng)
        if told:
            drawn.append((told, example))
    follows = [[holds(told, example.objects) for told, _ in drawn] for _, example in drawn]
    images = np.stack([example.image for _, example in drawn])
    return Contrast(images, [told.text for told, _ in drawn], np.array(follows))


def answering_batch(rng: random.Random, size: int, questions: int, template: str) -> Answering:
    """A description of each picture and `questions` questions about it, phrased by `template`."""
    drawn = [_example(rng) for _ in range(size)]
    index, texts = [], []
    for row, (prompt, example) in enumerate(drawn):
        downwards = rng.random() < 0.5
        texts.append((_ORDERS[downwards], describe(example.objects, SIZE, downwards)))
        told = rng.choice([prompt, retell(example.objects, rng) or prompt])
        for text, truth in ask(example.objects, told, change_one(told, rng, "train"), rng, questions):
            texts.append((template.format(text), "yes" if truth else "no"))
        index += [row] * (1 + questions)
    return Answering(np.stack([example.image for _, example in drawn]), index, texts)


def _texts(prompt: Prompt, objects: Sequence[Object], rng: random.Random) -> list[Prompt]:
    told = retell(objects, rng) or change_one(prompt, rng, "train")
    return [prompt, told, change_one(prompt, rng, "train"), change_one(told, rng, "train")]


def retell(objects: Sequence[Object], rng: random.Random) -> Prompt | None:
    """A random prompt of the `train` split that a picture of `objects` follows; None where none was found."""
    objects = rng.sample(list(objects), len(objects))
    if not objects or any(o.shape is None or o.colour is None for o in objects):
        return None
    coloured = rng.random() < 0.6
    things = tuple(Thing(o.shape, o.colour if coloured else None) for o in objects)
    if len(set(things)) == 1:
        found = Prompt(things[:1], len(things))
    elif len(things) == 2:
        place = relation((objects[0].x, objects[0].y), (objects[1].x, objects[1].y))
        found = Prompt(things, 1, rng.choice([None, place]))
    else:
        return None
    return found if found.split == "train" and holds(found, objects) else None
