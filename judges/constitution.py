"""Constitutions: weighted principles that a judge holds samples against, or compares them by.

A file is a list of principles, each with the fields of `Principle`. `all` of them are asked, to be aggregated by
weight (`judges.questions.mean_margin`, or `weakest` where one breach is enough); or some are `drawn` for each prompt,
as Constitutional AI draws one for each comparison (2212.08073, section 4.1). Deviation: the draw depends on seed and
prompt alone, so that siblings are held against the same principles and their margins can be compared.
"""

import dataclasses
import difflib
import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from judges.base import Question

Mode = Literal["all", "drawn"]

_SHIPPED = Path(__file__).parent / "constitutions"


@dataclass(frozen=True)
class Principle:
    """Something that speaks for a sample, or against it.

    Attributes:
        name: unique in its constitution.
        question: to be answered yes or no; `{prompt}` stands for the prompt.
        expected: the answer that speaks for the sample, "yes" or "no".
        weight: how much it counts; where principles are drawn, how often it is.
        comparison: asks which of two images, 1 or 2, is better by this principle; made of the question where empty.
    """

    name: str
    question: str
    expected: str = "yes"
    weight: float = 1.0
    comparison: str = ""

    def __post_init__(self):
        for field in ("name", "question", "expected", "comparison"):
            if not isinstance(getattr(self, field), str):
                raise ValueError(f"{field}: {getattr(self, field)!r} is not text; put it in quotes")
        if not self.name.strip():
            raise ValueError("name: is empty")
        if not self.question.strip():
            raise ValueError("question: is empty; ask what can be answered yes or no")
        if self.expected not in ("yes", "no"):
            raise ValueError(f"expected: {self.expected!r} is neither yes nor no")
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not 0 < self.weight < math.inf:
            raise ValueError(f"weight: {self.weight!r} is not a positive number; leave out what should not count")
        for field in ("question", "comparison"):
            _check_braces(field, getattr(self, field))

    def asked(self, prompt: str) -> Question:
        """The question about one sample."""
        return Question(self.question.format(prompt=prompt), expected=self.expected, weight=self.weight)

    def compared(self, prompt: str) -> Question:
        """The question which of two images is better."""
        made = f'For which image is "{self.expected}" the truer answer to this, image 1 or image 2? {self.question}'
        return Question((self.comparison or made).format(prompt=prompt), ("1", "2"), "1", weight=self.weight)


class Constitution:
    """Principles as the questions of a `QuestionJudge`, and their `wordings` as those of a `PairwiseJudge`.

    Args:
        principles: at least one, no name twice.
        mode: ask `all`, or `drawn` ones.
        count: how many are drawn for a prompt: without replacement, each time in proportion to the weights. What was
            drawn counts alike.
        seed: another one draws others.

    Raises:
        ValueError: a setting is out of range; the message starts with its name.
    """

    def __init__(self, principles: Sequence[Principle], mode: Mode = "all", count: int = 1, seed: int = 0):
        names = [principle.name for principle in principles]
        if not names:
            raise ValueError("principles: a constitution needs at least one")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"principles: {twice!r} stands twice")
        if mode not in ("all", "drawn"):
            raise ValueError(f"mode: {mode!r} is neither 'all' nor 'drawn'")
        if mode == "drawn" and not 1 <= count <= len(names):
            raise ValueError(f"count: {count} of {len(names)} principles cannot be drawn")
        self.principles, self.mode, self.count, self.seed = tuple(principles), mode, count, seed

    @classmethod
    def load(cls, source: str | Path, mode: Mode = "all", count: int = 1, seed: int = 0) -> "Constitution":
        """From a shipped constitution's name or a YAML file's path."""
        return cls(read_principles(source), mode, count, seed)

    def __call__(self, prompt: str) -> list[Question]:
        return [principle.asked(prompt) for principle in self.of(prompt)]

    def wordings(self, prompt: str) -> list[Question]:
        """The questions which of two images is better, each with the choices 1 and 2."""
        return [principle.compared(prompt) for principle in self.of(prompt)]

    def of(self, prompt: str) -> list[Principle]:
        """The principles that a prompt's samples are held against, in the order of the constitution."""
        if self.mode == "all":
            return list(self.principles)
        waits = {principle.name: self._wait(prompt, principle) for principle in self.principles}
        drawn = sorted(waits, key=waits.__getitem__)[: self.count]
        return [dataclasses.replace(p, weight=1.0) for p in self.principles if p.name in drawn]

    def _wait(self, prompt: str, principle: Principle) -> float:
        """An exponential waiting time of rate `weight`; the first ones to come are a weighted draw."""
        key = f"{self.seed}\x1f{prompt}\x1f{principle.name}"
        return random.Random(key).expovariate(principle.weight)


def shipped() -> list[str]:
    """The names of the constitutions that come with Salon."""
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def read_principles(source: str | Path) -> tuple[Principle, ...]:
    """The principles in a shipped constitution or a YAML file.

    Raises:
        ValueError: in one line, the file, the principle, the field and the remedy.
    """
    path = _SHIPPED / f"{source}.yaml" if str(source) in shipped() else Path(source)
    if not path.is_file():
        raise ValueError(f"constitution: {source} is neither a file nor one of {', '.join(shipped())}")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: not a list of principles; begin each with '- name:'")
    return tuple(_principle(path, number, entry) for number, entry in enumerate(entries, 1))


def _principle(path: Path, number: int, entry: Any) -> Principle:
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: principle {number}: not a mapping; give it a name and a question")
    place = f"{path}: principle {entry.get('name') or number}"
    fields = [field.name for field in dataclasses.fields(Principle)]
    for key in entry:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(fields)}"
            raise ValueError(f"{place}: {key}: unknown key; {hint}")
    for required in ("name", "question"):
        if entry.get(required) is None:
            raise ValueError(f"{place}: {required}: missing; every principle needs a name and a question")
    if isinstance(expected := entry.get("expected"), bool):  # YAML 1.1 reads a bare yes or no as a truth value
        entry = entry | {"expected": "yes" if expected else "no"}
    try:
        return Principle(**entry)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _check_braces(field: str, text: str) -> None:
    try:
        inserted = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ValueError(f"{field}: {error}; write a literal brace twice") from None
    for name in inserted:
        if name != "prompt":
            raise ValueError(f"{field}: {{{name}}} is unknown; only {{prompt}} can be inserted")
