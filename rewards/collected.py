"""People's pairs in the form of a judge's: their pictures numbered and kept once, their prompts split."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rewards.leakage import normalised
from rewards.preferences import Pair
from rewards.readers import ReadPair, opened
from rewards.tables import Refused


@dataclass(frozen=True)
class Kept:
    """A picture, number `sample` of its prompt, as it was encoded."""

    prompt_id: str
    prompt: str
    skill: str
    sample: int
    data: bytes


@dataclass(frozen=True)
class Collected:
    """A pair, and those of its pictures that no earlier pair had."""

    pair: Pair
    new: tuple[Kept, ...]


def collected(pairs: Iterable[ReadPair], reader: str, refused: list[Refused]) -> Iterator[Collected]:
    """The usable ones of `pairs`, as they are asked for; the others join `refused`.

    All are of the split `train` and of weight 1, until `preferences.divided` has seen them all. Pictures of a prompt
    are numbered in the order in which they come; those of equal bytes are one.
    """
    prompts: dict[str, str] = {}
    numbers: dict[tuple[str, bytes], int] = {}
    count: dict[str, int] = {}
    for pair, _, _ in opened(pairs, refused):
        if prompts.setdefault(pair.prompt_id, normalised(pair.prompt)) != normalised(pair.prompt):
            refused.append(Refused(pair.source, pair.row, f"prompt_id: {pair.prompt_id!r} has another prompt above"))
            continue
        samples, new = [], []
        for file in (pair.image_a, pair.image_b):
            data = file.read_bytes() if isinstance(file, Path) else file
            key = (pair.prompt_id, hashlib.sha256(data).digest())
            if key not in numbers:
                numbers[key] = count[pair.prompt_id] = count.get(pair.prompt_id, -1) + 1
                new.append(Kept(pair.prompt_id, pair.prompt, pair.skill, numbers[key], data))
            samples.append(numbers[key])
        place = (pair.prompt_id, pair.prompt, pair.skill, *samples)
        yield Collected(Pair(*place, pair.label, 1.0, "train", "table", pair.source, reader), tuple(new))
