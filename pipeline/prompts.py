"""Where prompts come from: the embedded world's grammar, GenEval's, or a person's text files."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal

from judges import geneval
from judges.shapes.grammar import SKILLS, sample_prompt
from models.keys import sample_key
from pipeline.settings import Section, UserError


@dataclass(frozen=True)
class PromptRow:
    """A prompt, what it exercises, and the id that keys its noise and its groups."""

    text: str
    skill: str

    @property
    def id(self) -> str:
        return sha256(self.text.encode()).hexdigest()[:16]


class ShapesPrompts(Section):
    """Prompts of the embedded world: its `train` split to learn from, its `eval` split to measure on."""

    type: Literal["shapes"]

    def depends(self) -> dict:
        return self.model_dump()

    def draw(self, seed: int, count: int) -> list[PromptRow]:
        """`count` different prompts to learn from, even over skills as far as a skill has that many."""
        rng = random.Random(seed)
        return _different(count, lambda attempt: self._drawn(rng, attempt, "train"))

    def held_out(self, seed: int, count: int) -> list[PromptRow]:
        """`count` prompts to measure on, even over skills; repeated where a skill has fewer."""
        rng = random.Random(seed)
        return [self._drawn(rng, place, "eval") for place in range(count)]

    @staticmethod
    def _drawn(rng: random.Random, place: int, split: Literal["train", "eval"]) -> PromptRow:
        prompt = sample_prompt(rng, split, SKILLS[place % len(SKILLS)])
        return PromptRow(prompt.text, prompt.skill)


class GenEvalPrompts(Section):
    """Prompts by GenEval's grammar (2310.11513), an eighth of them to measure on and the others to learn from."""

    type: Literal["geneval"]

    def depends(self) -> dict:
        return self.model_dump()

    def draw(self, seed: int, count: int) -> list[PromptRow]:
        """`count` different prompts to learn from, even over skills as far as a skill has that many."""
        rng = random.Random(seed)
        return _different(count, lambda attempt: self._drawn(rng, attempt, held_out=False))

    def held_out(self, seed: int, count: int) -> list[PromptRow]:
        """`count` prompts to measure on, even over skills; repeated where a skill has fewer."""
        rng = random.Random(seed)
        return [self._drawn(rng, place, held_out=True) for place in range(count)]

    @staticmethod
    def _drawn(rng: random.Random, place: int, held_out: bool) -> PromptRow:
        skill = geneval.SKILLS[place % len(geneval.SKILLS)]
        while True:
            prompt = PromptRow(geneval.sample_prompt(rng, skill), skill)
            if (int(prompt.id, 16) % 8 == 0) == held_out:
                return prompt


class FilePrompts(Section):
    """UTF-8 text files with one prompt a line: `train` to learn from, `eval` to measure on."""

    type: Literal["file"]
    train: str
    eval: str

    def depends(self) -> dict:
        lines = {
            field: _lines(path, f"prompts.{field}") for field, path in (("train", self.train), ("eval", self.eval))
        }
        return {"type": self.type, **{field: [row.text for row in rows] for field, rows in lines.items()}}

    def draw(self, seed: int, count: int) -> list[PromptRow]:
        lines = _lines(self.train, "prompts.train")
        return random.Random(seed).sample(lines, min(count, len(lines)))

    def held_out(self, seed: int, count: int) -> list[PromptRow]:
        lines = _lines(self.eval, "prompts.eval")
        order = random.Random(seed).sample(lines, len(lines))
        return [order[i % len(order)] for i in range(count)]


def _different(count: int, drawn: Callable[[int], PromptRow]) -> list[PromptRow]:
    """The first `count` different ones of what is `drawn` attempt by attempt; fewer where they hardly come."""
    found: dict[str, PromptRow] = {}
    for attempt in range(50 * count):
        if len(found) == count:
            break
        prompt = drawn(attempt)
        found.setdefault(prompt.text, prompt)
    return list(found.values())


PromptSource = ShapesPrompts | GenEvalPrompts | FilePrompts


def _lines(path: str, field: str) -> list[PromptRow]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{field}: {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{field}: {path} is not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    lines = list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not lines:
        raise UserError(f"{field}: {path} holds no prompt; write one a line")
    return [PromptRow(line, "") for line in lines]


def draw_key(seed: int, *parts: str | int) -> int:
    """The seed of one drawing of prompts."""
    return sample_key(seed, "prompts", *parts)
