"""A person's labels: a table of pictures, prompts and verdicts, read row by row so that a bad one spoils no other.

A file that `rewards.tables` reads, with the columns

    image    path, from the folder of the table; in Parquet also the bytes, or the struct that `datasets` writes
    prompt   text
    verdict  "yes" or "no", true or false, or a number from 0 to 1: the share of people who say yes
    skill    optional text, by which the results are sliced
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from judges.base import Answer
from judges.images import open_image
from pipeline.auditing.cases import Case
from pipeline.settings import UserError
from rewards.tables import Refused, Table

_COLUMNS = ("image", "prompt", "verdict")
_WORDS = {"yes": 1.0, "no": 0.0}


@dataclass(frozen=True)
class LabelledCases:
    """Pictures with a person's verdicts; of other pictures and prompts nothing is known."""

    source: str
    cases: tuple[Case, ...]
    refused: tuple[Refused, ...]
    most: int = 10

    def gold(self, image: np.ndarray, prompt: str) -> bool | None:
        return None

    def truths(self, case: Case, answers: Sequence[Answer]) -> list[bool | None]:
        """A picture that follows has all the expected answers; of one that does not, nobody said which it lacks."""
        return [True if case.truth == 1 else None] * len(answers)


def read_labels(path: str | Path) -> LabelledCases:
    """The usable rows of a table, and the others with their reasons.

    Raises:
        UserError: the file cannot be read, lacks a column, or holds no usable row.
    """
    path = Path(path)
    table, cases, refused = Table(str(path)), [], []
    try:
        table.files()
        for number, row in enumerate(table.rows([(name,) for name in _COLUMNS], ("skill",)), 1):
            try:
                cases.append(_case(row, table))
            except ValueError as error:
                refused.append(Refused(path.name, number, str(error)))
    except ValueError as error:
        raise UserError(str(error)) from None
    if not cases:
        first = f"row 1: {refused[0].reason}" if refused else "it is empty"
        raise UserError(f"{path}: no row can be used; {first}")
    return LabelledCases(path.name, tuple(cases), tuple(refused))


def _case(row: dict[str, Any] | ValueError, table: Table) -> Case:
    """Raises ValueError naming the column that is wrong."""
    if isinstance(row, ValueError):
        raise row
    prompt, skill = row.get("prompt"), row.get("skill") or ""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt: {'is not text' if prompt and not isinstance(prompt, str) else 'is empty'}")
    if not isinstance(skill, str):
        raise ValueError(f"skill: {skill!r} is not text")
    truth = _truth(row.get("verdict"))
    try:
        file = table.picture(row.get("image"))
        open_image(file)
    except ValueError as error:
        raise ValueError(f"image: {error}") from None
    return Case(prompt, skill, "", file, truth)


def _truth(verdict: Any) -> float:
    if isinstance(verdict, str) and verdict.strip().lower() in _WORDS:
        return _WORDS[verdict.strip().lower()]
    if isinstance(verdict, bool | int | float) and not math.isnan(verdict) and 0 <= verdict <= 1:
        return float(verdict)
    raise ValueError(f"verdict: {verdict!r} is neither yes nor no nor a number from 0 to 1")
