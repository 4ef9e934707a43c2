"""DSG (Davidsonian Scene Graph, 2310.18235): published question graphs and answers, and the score of a picture.

What is published is annotated by hand and by language models, so it is read as follows. A dependency is a list of
question ids separated by commas; `0` stands for none. Whatever in it is not the id of another question of the same
prompt is dropped: words (`1, outside`), ids that are not there, the question's own id. A dependency that would close a
circle is dropped too; dependencies on earlier questions are laid first, so that those are the ones kept. Rows without
a question are left out, and of two rows with one id, the first is the one that others depend on.
"""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from judges.base import Answer, Question, log_odds
from judges.questions import dsg_hits, own_hits


@dataclass(frozen=True)
class Graph:
    """The questions on one prompt."""

    item: str
    prompt: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Answered:
    """What a model answered about the picture that `generator` made for the prompt `item`.

    An answer that is neither yes nor no is failed, with what was said as the error.
    """

    generator: str
    item: str
    questions: tuple[Question, ...]
    answers: tuple[Answer, ...]


def read_graphs(path: Path) -> dict[str, Graph]:
    """The graphs of a file of annotations such as `dsg-1k-anns.csv`, by item, in the order of the file.

    Raises ValueError for a file that lacks a column or a field.
    """
    grouped = _grouped(path, ("item_id", "text"), ("proposition_id", "dependency", "question_natural_language"))
    return {item: Graph(item, prompt, _questions(rows)) for (item, prompt), rows in grouped.items()}


def read_answers(path: Path) -> list[Answered]:
    """The answers of a file such as `pali17b_dsg.csv`, one entry a picture, in the order of the file.

    Raises ValueError for a file that lacks a column or a field.
    """
    grouped = _grouped(path, ("t2i_model", "item_id"), ("question_id", "dependency_id", "question", "answer"))
    return [
        Answered(generator, item, _questions(rows), tuple(_answer(row.question, row.answer) for row in rows))
        for (generator, item), rows in grouped.items()
    ]


def score(questions: Sequence[Question], answers: Sequence[Answer], dependencies: bool = True) -> float:
    """The share of questions answered as expected, between 0 and 1, with or without `dsg_hits`' rule of dependencies.

    As with the paper's authors, no answer is not the expected one.
    """
    hits = dsg_hits(questions, answers) if dependencies else own_hits(answers)
    return float(np.mean(hits))


class _Row(NamedTuple):
    id: str
    dependency: str
    question: str
    answer: str = ""


def _grouped(path: Path, keys: tuple[str, str], columns: Sequence[str]) -> dict[tuple[str, str], list[_Row]]:
    """The rows with a question of each pair of `keys`; `columns` are those of a `_Row`, under the file's names."""
    grouped: dict[tuple[str, str], list[_Row]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        needed = (*keys, *columns)
        if missing := [column for column in needed if column not in (reader.fieldnames or ())]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; DSG's files have {', '.join(needed)}")
        for fields in reader:
            if short := [column for column in needed if fields[column] is None]:
                raise ValueError(f"{path}:{reader.line_num}: no {', '.join(short)}: the row has too few fields")
            row = _Row(*(fields[column].strip() for column in columns))
            if row.question:
                grouped.setdefault((fields[keys[0]], fields[keys[1]]), []).append(row)
    return grouped


def _questions(rows: Sequence[_Row]) -> tuple[Question, ...]:
    places: dict[str, int] = {}
    for place, row in enumerate(rows):
        places.setdefault(row.id, place)
    edges = [
        (child, places[name.strip()])
        for child, row in enumerate(rows)
        for name in row.dependency.split(",")
        if name.strip() in places
    ]
    parents = _without_circles(dict.fromkeys(edges), len(rows))
    return tuple(Question(row.question, parents=tuple(found)) for row, found in zip(rows, parents, strict=True))


def _without_circles(edges: Iterable[tuple[int, int]], size: int) -> list[list[int]]:
    """The parents of each of `size` questions, from edges (child, parent) less those that would close a circle."""
    parents: list[list[int]] = [[] for _ in range(size)]
    for child, parent in sorted(edges, key=lambda edge: edge[0] < edge[1]):
        if child not in _and_ancestors(parent, parents):
            parents[child].append(parent)
    return parents


def _and_ancestors(place: int, parents: Sequence[Sequence[int]]) -> set[int]:
    found: set[int] = set()
    waiting = [place]
    while waiting:
        place = waiting.pop()
        if place not in found:
            found.add(place)
            waiting.extend(parents[place])
    return found


def _answer(question: str, said: str) -> Answer:
    if said not in ("yes", "no"):
        return Answer.failed(question, f"neither yes nor no: {said!r}")
    return Answer(question, log_odds(float(said == "yes")), said)
