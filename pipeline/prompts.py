"""Where prompts come from: the embedded world's grammar, GenEval's, or a person's text files."""

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

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


def _of_skills(weights: dict[str, int]) -> dict[str, int]:
    known = ", ".join(SKILLS)
    for skill in weights:
        if skill not in SKILLS:
            raise ValueError(f"{skill} is no skill; they are {known}")
    if not any(weights.values()):
        raise ValueError(f"nothing would be drawn; give one of {known} a weight")
    return weights


SkillWeights = Annotated[dict[str, Annotated[int, Field(ge=0)]], AfterValidator(_of_skills)]
"""How often a skill is drawn, beside the others; one that is not named never is."""


class SkillPrompts(Section):
    """Prompts that each exercise one of the six skills of GenEval (2310.11513).

    Attributes:
        weights: how often a skill is drawn to learn from, beside the others; all alike where it is null. Prompts to
            measure on are even over skills in any case.
    """

    weights: SkillWeights | None = None

    def depends(self) -> dict:
        return self.model_dump(exclude_none=True)

    def draw(self, seed: int, count: int) -> list[PromptRow]:
        """`count` different prompts to learn from, by `weights` as far as a skill has that many."""
        rng, turns = random.Random(seed), self._turns()
        found: dict[str, PromptRow] = {}
        for attempt in range(50 * count):
            if len(found) == count:
                break
            prompt = self._drawn(rng, turns[attempt % len(turns)], "train")
            found.setdefault(prompt.text, prompt)
        return list(found.values())

    def held_out(self, seed: int, count: int) -> list[PromptRow]:
        """`count` prompts to measure on, even over skills; repeated where a skill has fewer."""
        rng = random.Random(seed)
        return [self._drawn(rng, SKILLS[place % len(SKILLS)], "eval") for place in range(count)]

    def _turns(self) -> Sequence[str]:
        """Each skill as often as its weight says, and spread out."""
        if self.weights is None:
            return SKILLS
        places = [((k + 0.5) / weight, skill) for skill, weight in self.weights.items() for k in range(weight)]
        return [skill for _, skill in sorted(places)]

    @staticmethod
    @abstractmethod
    def _drawn(rng: random.Random, skill: str, split: Literal["train", "eval"]) -> PromptRow: ...


class ShapesPrompts(SkillPrompts):
    """Prompts of the embedded world: its `train` split to learn from, its `eval` split to measure on."""

    type: Literal["shapes"]

    @staticmethod
    def _drawn(rng: random.Random, skill: str, split: Literal["train", "eval"]) -> PromptRow:
        return PromptRow(sample_prompt(rng, split, skill).text, skill)


class GenEvalPrompts(SkillPrompts):
    """Prompts by GenEval's grammar, an eighth of them to measure on and the others to learn from."""

    type: Literal["geneval"]

    @staticmethod
    def _drawn(rng: random.Random, skill: str, split: Literal["train", "eval"]) -> PromptRow:
        while True:
            prompt = PromptRow(geneval.sample_prompt(rng, skill), skill)
            if (int(prompt.id, 16) % 8 == 0) == (split == "eval"):
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
