"""The prompts of the embedded world: a grammar over the six skills of GenEval (2310.11513, section 3.1).

A prompt says which objects a picture holds and, for two of them, how they stand to each other. Its text
and its meaning convert into each other without loss, so a prompt read from a file is as good as a sampled one.
A picture follows a prompt when it holds *exactly* the objects asked for: GenEval lets extra objects pass
outside its counting task; here they count as a mistake everywhere.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations, product
from typing import Protocol

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "white", "black")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {"two": 2, "three": 3, "four": 4}
SKILLS = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")
SPLITS = ("train", "eval")

_OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
_PLURAL = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
_SINGULAR = {plural: shape for shape, plural in _PLURAL.items()}
_NUMBER_WORD = {number: word for word, number in NUMBERS.items()}
_EVAL_SHARE = 0.2


@dataclass(frozen=True)
class Thing:
    """An object as a prompt names it; `colour` is None where the prompt leaves it open."""

    shape: str
    colour: str | None = None

    @property
    def text(self) -> str:
        return f"{self.colour} {self.shape}" if self.colour else self.shape

    @property
    def phrase(self) -> str:
        return f"{'an' if self.text[0] in 'aeiou' else 'a'} {self.text}"

    @property
    def plural(self) -> str:
        return f"{self.colour} {_PLURAL[self.shape]}" if self.colour else _PLURAL[self.shape]

    def matches(self, shape: str | None, colour: str | None) -> bool:
        """Whether an object fits; one whose shape or colour cannot be told (None) fits nothing."""
        return colour is not None and self.shape == shape and self.colour in (None, colour)


class Object(Protocol):
    """Something in a picture: None for a shape or colour that cannot be told, centre in pixels, y downwards."""

    @property
    def shape(self) -> str | None: ...
    @property
    def colour(self) -> str | None: ...
    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...


@dataclass(frozen=True)
class Prompt:
    """The meaning of a prompt: one thing `count` times, or two different things, perhaps in a `relation`."""

    things: tuple[Thing, ...]
    count: int = 1
    relation: str | None = None

    @property
    def objects(self) -> tuple[Thing, ...]:
        """Every object the picture must hold, one entry each."""
        return self.things * self.count

    @property
    def text(self) -> str:
        if self.count > 1:
            return f"{_NUMBER_WORD[self.count]} {self.things[0].plural}"
        joint = f" {self.relation} " if self.relation else " and "
        return joint.join(thing.phrase for thing in self.things)

    @property
    def skill(self) -> str:
        if self.count > 1:
            return "counting"
        if self.relation:
            return "position"
        coloured = self.things[0].colour is not None
        if len(self.things) == 1:
            return "colors" if coloured else "single_object"
        return "color_attribution" if coloured else "two_object"

    @property
    def key(self) -> str:
        """Equal for prompts of one meaning ("a ring above a cross", "a cross below a ring")."""
        swapped = replace(self, things=self.things[::-1], relation=_OPPOSITE.get(self.relation))
        return min(self.text, swapped.text)

    @property
    def split(self) -> str:
        """`eval` for a fixed fifth of the meanings of each skill, otherwise `train`."""
        return "eval" if self.key in _eval_keys() else "train"


def parse(text: str) -> Prompt:
    """The meaning of `text`. Raises ValueError where the grammar does not hold it."""
    words = text.strip().lower()
    relation = next((r for r in RELATIONS if f" {r} " in words), None)
    parts = words.split(f" {relation or 'and'} ")
    if len(parts) == 1 and parts[0].split()[0:1] and parts[0].split()[0] in NUMBERS:
        number, *name = parts[0].split()
        prompt = Prompt((_thing([*name[:-1], _SINGULAR.get(name[-1], "")] if name else []),), NUMBERS[number])
    else:
        prompt = Prompt(tuple(_thing(re.sub(r"^an? ", "", part).split()) for part in parts), 1, relation)
    if prompt not in _known():
        raise ValueError(
            f"prompt: {text!r} is not in the grammar of the shapes world (for example 'a red ring above a blue cross')"
        )
    return prompt


def _thing(words: list[str]) -> Thing:
    *colour, shape = words or [""]
    return Thing(shape, " ".join(colour) or None)


@cache
def all_prompts(skill: str, split: str | None = None) -> tuple[Prompt, ...]:
    """Every prompt of a skill (of one split), in a fixed order."""
    plain = [Thing(s) for s in SHAPES]
    coloured = [Thing(s, c) for s in SHAPES for c in COLOURS]
    pairs = {
        "two_object": [(a, b) for a, b in product(plain, plain) if a != b],
        "color_attribution": [(a, b) for a, b in product(coloured, coloured) if a != b],
    }
    match skill:
        case "single_object":
            prompts = [Prompt((thing,)) for thing in plain]
        case "colors":
            prompts = [Prompt((thing,)) for thing in coloured]
        case "counting":
            prompts = [Prompt((thing,), n) for n in NUMBERS.values() for thing in plain + coloured]
        case "position":
            both = pairs["two_object"] + pairs["color_attribution"]
            prompts = [Prompt(pair, 1, relation) for pair in both for relation in RELATIONS]
        case "two_object" | "color_attribution":
            prompts = [Prompt(pair) for pair in pairs[skill]]
        case _:
            raise ValueError(f"skill: {skill!r} is none of {', '.join(SKILLS)}")
    return tuple(p for p in prompts if split is None or p.split == split)


@cache
def _known() -> frozenset[Prompt]:
    return frozenset(p for skill in SKILLS for p in all_prompts(skill))


@cache
def _eval_keys() -> frozenset[str]:
    chosen: set[str] = set()
    for skill in SKILLS:
        keys = {p.key for p in all_prompts(skill)}
        ordered = sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())
        chosen.update(ordered[: max(1, round(_EVAL_SHARE * len(ordered)))])
    return frozenset(chosen)


def sample_prompt(rng: random.Random, split: str | None = None, skill: str | None = None) -> Prompt:
    """A prompt drawn evenly over skills; position prompts are half plain, half coloured."""
    skill = skill or rng.choice(SKILLS)
    prompts = all_prompts(skill, split)
    if skill == "position":
        prompts = _position_halves(split)[rng.random() < 0.5]
    return rng.choice(prompts)


@cache
def _position_halves(split: str | None) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    prompts = all_prompts("position", split)
    plain = tuple(p for p in prompts if p.things[0].colour is None)
    return plain, tuple(p for p in prompts if p.things[0].colour is not None)


def change_one(prompt: Prompt, rng: random.Random, split: str | None = None) -> Prompt:
    """`prompt` with one attribute changed to a value that makes it false of every picture of the original.

    With a `split` the changed prompt is of it too. Raises ValueError where there is none.
    """
    for _ in range(1000):
        changed = _change_one(prompt, rng)
        if split is None or changed.split == split:
            return changed
    raise ValueError(f"prompt: no change of {prompt.text!r} in one attribute is in the split {split}")


def _change_one(prompt: Prompt, rng: random.Random) -> Prompt:
    options = ["shape"]
    if prompt.things[0].colour:
        options.append("colour")
    if prompt.count > 1:
        options.append("count")
    if prompt.relation:
        options.append("relation")
    match rng.choice(options):
        case "count":
            return replace(prompt, count=rng.choice([n for n in NUMBERS.values() if n != prompt.count]))
        case "relation":
            return replace(prompt, relation=rng.choice([r for r in RELATIONS if r != prompt.relation]))
        case what:
            index = rng.randrange(len(prompt.things))
            return rng.choice(_neighbours(prompt, index, what))


@cache
def _neighbours(prompt: Prompt, index: int, what: str) -> tuple[Prompt, ...]:
    thing = prompt.things[index]
    if what == "shape":
        others = [replace(thing, shape=s) for s in SHAPES if s != thing.shape]
    else:
        others = [replace(thing, colour=c) for c in COLOURS if c != thing.colour]
    changed = [replace(prompt, things=(*prompt.things[:index], o, *prompt.things[index + 1 :])) for o in others]
    return tuple(p for p in changed if p in _known() and p.key != prompt.key)


def relation(a: tuple[float, float], b: tuple[float, float]) -> str:
    """How the centre `a` (x, y) stands to the centre `b`, along the axis on which they differ more."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def holds(prompt: Prompt, objects: Sequence[Object]) -> bool:
    """Whether a picture of exactly these objects follows the prompt."""
    wanted = prompt.objects
    if len(objects) != len(wanted):
        return False
    return any(
        all(thing.matches(o.shape, o.colour) for thing, o in zip(wanted, order, strict=True))
        and (prompt.relation is None or relation((order[0].x, order[0].y), (order[1].x, order[1].y)) == prompt.relation)
        for order in permutations(objects)
    )


def vocabulary() -> tuple[str, ...]:
    """Every word a prompt can hold, in a fixed order."""
    words = [
        "a",
        "an",
        "and",
        "left",
        "right",
        "of",
        "above",
        "below",
        *NUMBERS,
        *COLOURS,
        *SHAPES,
        *_SINGULAR,
    ]
    return tuple(dict.fromkeys(words))
