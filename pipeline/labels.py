"""A person's labels: a table of pictures, prompts and verdicts, read row by row so that a bad one spoils no other.

Parquet or JSONL with the columns

    image    path, from the folder of the table; in Parquet also the bytes, or the struct that `datasets` writes
    prompt   text
    verdict  "yes" or "no", true or false, or a number from 0 to 1: the share of people who say yes
    skill    optional text, by which the results are sliced
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from judges.base import Answer
from judges.images import open_image
from pipeline.cases import Case, Refused
from pipeline.settings import UserError

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
    cases, refused = [], []
    for number, row in enumerate(_rows(path), 1):
        if row is None:
            continue
        try:
            cases.append(_case(row, path.parent))
        except ValueError as error:
            refused.append(Refused(number, str(error)))
    if not cases:
        first = f"row 1: {refused[0].reason}" if refused else "it is empty"
        raise UserError(f"{path}: no row can be used; {first}")
    return LabelledCases(path.name, tuple(cases), tuple(refused))


def _rows(path: Path) -> Iterator[Any]:
    """What stands in each row: a mapping unless the row is broken, None for a blank line."""
    readers = {".parquet": _parquet, ".jsonl": _lines}
    if path.suffix not in readers:
        raise UserError(f"{path}: labels are read from {' or '.join(readers)}, not from {path.suffix or 'this'}")
    try:
        yield from readers[path.suffix](path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: broken Parquet: {error}") from None


def _parquet(path: Path) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path) as table:
        names = table.schema_arrow.names
        if missing := [column for column in _COLUMNS if column not in names]:
            raise UserError(f"{path}: no column {missing[0]!r}; it has {', '.join(names)}")
        for batch in table.iter_batches(
            batch_size=64, columns=[name for name in names if name in (*_COLUMNS, "skill")]
        ):
            yield from batch.to_pylist()


def _lines(path: Path) -> Iterator[Any]:
    with path.open("rb") as file:
        for line in file:
            try:
                yield json.loads(line) if line.strip() else None
            except ValueError as error:
                yield error


def _case(row: Any, folder: Path) -> Case:
    """Raises ValueError naming the column that is wrong."""
    if isinstance(row, ValueError):
        raise ValueError(f"broken JSON: {row}")
    if not isinstance(row, dict):
        raise ValueError(f"not a row with {', '.join(_COLUMNS)}, but {type(row).__name__}")
    prompt, skill = row.get("prompt"), row.get("skill") or ""
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt: {'is not text' if prompt and not isinstance(prompt, str) else 'is empty'}")
    if not isinstance(skill, str):
        raise ValueError(f"skill: {skill!r} is not text")
    truth = _truth(row.get("verdict"))
    file = _file(row.get("image"), folder)
    open_image(file)
    return Case(prompt, skill, "", file, truth)


def _truth(verdict: Any) -> float:
    if isinstance(verdict, str) and verdict.strip().lower() in _WORDS:
        return _WORDS[verdict.strip().lower()]
    if isinstance(verdict, bool | int | float) and not math.isnan(verdict) and 0 <= verdict <= 1:
        return float(verdict)
    raise ValueError(f"verdict: {verdict!r} is neither yes nor no nor a number from 0 to 1")


def _file(image: Any, folder: Path) -> bytes | Path:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if isinstance(image, str) and image:
        return folder / image
    raise ValueError("image: is empty; give a path" if not image else f"image: {type(image).__name__} is no path")
