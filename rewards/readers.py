"""People's preferences between pictures: the published tables, and anyone's own, read as pairs of one form.

    pickapic     Pick-a-Pic v2 (2305.01569): caption, jpg_0, jpg_1, label_0, label_1
    hpdv2        HPDv2 (2306.09341), train: prompt, file_path, human_preference; test: prompt, image_path, rank
    hpdv3        HPDv3 (2508.03789): prompt, path1 (preferred), path2, choice_dist
    imagereward  ImageRewardDB (2304.05977): prompt_id, prompt, image_path, rank
    rewardbench  prompt, chosen, rejected, as RewardBench (2403.13787) has them, with pictures
    mmrb2        Multimodal RewardBench 2 (2512.16899), text to image: prompt_text, response_a_images, …, chosen
    pairs        anyone's own: prompt, image_a, image_b, label, and where there are, a model's score_a and score_b

A row that cannot be used spoils no other: it is refused with its reason.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from judges.images import open_image
from rewards.leakage import normalised
from rewards.preferences import unit_hash
from rewards.tables import Refused, Table


@dataclass(frozen=True)
class ReadPair:
    """Two pictures of one prompt and what people said of them.

    Attributes:
        image_a, image_b: encoded pictures, or where they lie; `opened` decodes them.
        label: the share of people, or the probability, that says the first is better; 0.5 is a tie.
        source, row: the table, and the row in it, from 1, of the pair or of the first of its pictures.
        prompt_id: what the pairs of one prompt share: the table's name for it, or its normalised text.
        skill: a slice of the table that it belongs to; "" where there is none.
        model_a, model_b: what painted the pictures; "" where that is not known.
        score_a, score_b: what a model says of the pictures; NaN where the table does not tell.
    """

    prompt: str
    image_a: bytes | Path
    image_b: bytes | Path
    label: float
    source: str
    row: int
    prompt_id: str
    skill: str = ""
    model_a: str = ""
    model_b: str = ""
    score_a: float = math.nan
    score_b: float = math.nan

    def swapped(self) -> "ReadPair":
        """The same with the pictures in the other order."""
        return replace(
            self,
            label=1 - self.label,
            image_a=self.image_b,
            image_b=self.image_a,
            model_a=self.model_b,
            model_b=self.model_a,
            score_a=self.score_b,
            score_b=self.score_a,
        )


def read_pairs(reader: str, table: Table, refused: list[Refused]) -> Iterator[ReadPair]:
    """The usable pairs of a table, in its order, read as they are asked for; the other rows join `refused`.

    In tables that name the better picture first, a hash decides which picture of a pair is the first.

    Raises:
        ValueError: there is no such reader, or the table cannot be read or lacks a column.
    """
    if reader not in READERS:
        raise ValueError(f"reader: {reader!r} is none of {', '.join(READERS)}")
    kind = READERS[reader]
    return kind.pairs(_rows(table, kind, refused), refused)


def opened(pairs: Iterable[ReadPair], refused: list[Refused]) -> Iterator[tuple[ReadPair, np.ndarray, np.ndarray]]:
    """Each pair with its pictures, uint8 (H, W, 3). Pairs that lack one, or show the same twice, join `refused`."""
    for pair in pairs:
        try:
            first, second = _opened("image_a", pair.image_a), _opened("image_b", pair.image_b)
            if np.array_equal(first, second):
                raise ValueError("image_b: is the same picture as image_a")
        except ValueError as error:
            refused.append(Refused(pair.source, pair.row, str(error)))
        else:
            yield pair, first, second


@dataclass(frozen=True)
class _Row:
    """A row of a table, numbered from 1. What it is asked for and does not have is a ValueError naming the column."""

    table: Table
    number: int
    cells: dict[str, Any]

    def text(self, column: str) -> str:
        value = self.cells.get(column)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{column}: {'is empty' if value in (None, '') else f'{value!r} is not text'}")
        return value

    def word(self, column: str) -> str:
        """The cell as text, "" where there is none."""
        value = self.cells.get(column)
        return "" if value is None else str(value)

    def number_of(self, column: str) -> float:
        return _number(column, self.cells.get(column))

    def picture(self, column: str) -> bytes | Path:
        return self._picture(column, self.cells.get(column))

    def pictures(self, *columns: str) -> list[bytes | Path]:
        """The pictures in the first of `columns` that is not empty."""
        column = next((name for name in columns if self.cells.get(name)), columns[0])
        value = self.cells.get(column)
        if not isinstance(value, list) or len(value) < 2:
            raise ValueError(f"{column}: does not name two pictures or more")
        return [self._picture(column, item) for item in value]

    def pair(
        self,
        prompt: str,
        images: tuple[str, str],
        label: float,
        models: tuple[str, str] = ("", ""),
        skill: str = "",
    ) -> ReadPair:
        """The pair in the columns of these names."""
        text = self.text(prompt)
        first, second = map(self.picture, images)
        model_a, model_b = map(self.word, models)
        place = (self.table.source, self.number, normalised(text))
        return ReadPair(text, first, second, label, *place, self.word(skill), model_a, model_b)

    def _picture(self, column: str, value: Any) -> bytes | Path:
        try:
            return self.table.picture(value)
        except ValueError as error:
            raise ValueError(f"{column}: {error}") from None


@dataclass(frozen=True)
class _Ranked:
    """A picture and its rank among those of its prompt, of which the lowest is the best."""

    row: _Row
    prompt_id: str
    prompt: str
    picture: bytes | Path
    rank: float


Pairs = Callable[[Iterator[_Row], list[Refused]], Iterator[ReadPair]]


@dataclass(frozen=True)
class _Reader:
    """How a kind of table is read. One of the names in each entry of `required` must be a column of it."""

    pairs: Pairs
    required: tuple[tuple[str, ...], ...]
    optional: tuple[str, ...] = ()


def _rows(table: Table, kind: _Reader, refused: list[Refused]) -> Iterator[_Row]:
    for number, cells in enumerate(table.rows(kind.required, kind.optional), 1):
        if isinstance(cells, ValueError):
            refused.append(Refused(table.source, number, str(cells)))
        else:
            yield _Row(table, number, cells)


def _each(pairs_of: Callable[[_Row], list[ReadPair]]) -> Pairs:
    """Reads tables of which each row is by itself."""

    def read(rows: Iterator[_Row], refused: list[Refused]) -> Iterator[ReadPair]:
        for row in rows:
            try:
                found = [_checked(pair) for pair in pairs_of(row)]
            except ValueError as error:
                refused.append(Refused(row.table.source, row.number, str(error)))
            else:
                yield from found

    return read


def _pickapic(row: _Row) -> list[ReadPair]:
    first, second = row.number_of("label_0"), row.number_of("label_1")
    if not math.isclose(first + second, 1, abs_tol=1e-6):
        raise ValueError(f"label_0: {first} and label_1, {second}, do not add up to 1")
    return [row.pair("caption", ("jpg_0", "jpg_1"), first, ("model_0", "model_1"))]


def _hpdv3(row: _Row) -> list[ReadPair]:
    label, votes = 1.0, row.cells.get("choice_dist")
    if votes:
        if not isinstance(votes, list) or len(votes) != 2:
            raise ValueError(f"choice_dist: {votes!r} are not the votes for path1 and path2")
        first, second = (_number("choice_dist", vote) for vote in votes)
        if min(first, second) < 0 or first + second == 0:
            raise ValueError(f"choice_dist: {votes!r} are no votes")
        label = first / (first + second)
    return [_either_first(row.pair("prompt", ("path1", "path2"), label, ("model1", "model2")))]


def _rewardbench(row: _Row) -> list[ReadPair]:
    models = ("chosen_model", "rejected_model")
    return [_either_first(row.pair("prompt", ("chosen", "rejected"), 1.0, models, "subset"))]


def _mmrb2(row: _Row) -> list[ReadPair]:
    if row.cells.get("prompt_images"):
        raise ValueError("prompt_images: the prompt has pictures; only text to image is read")
    chosen = row.word("chosen").upper()
    if chosen not in ("A", "B"):
        raise ValueError(f"chosen: {row.word('chosen')!r} is neither A nor B")
    images, models = ("response_a_images", "response_b_images"), ("response_a_model", "response_b_model")
    return [row.pair("prompt_text", images, float(chosen == "A"), models, "prompt_source")]


def _own(row: _Row) -> list[ReadPair]:
    pair = row.pair("prompt", ("image_a", "image_b"), row.number_of("label"), ("model_a", "model_b"), "skill")
    pair = replace(pair, prompt_id=row.word("prompt_id") or pair.prompt_id)
    if not {"score_a", "score_b"} & row.cells.keys():
        return [pair]
    return [replace(pair, score_a=row.number_of("score_a"), score_b=row.number_of("score_b"))]


def _hpdv2(row: _Row) -> list[ReadPair]:
    prompt, pictures = row.text("prompt"), row.pictures("image_path", "file_path")
    # What people chose says 1 of the better one; of what they ranked, the lowest number is the best.
    column, sign = ("human_preference", -1) if row.cells.get("human_preference") else ("rank", 1)
    ranks = row.cells.get(column)
    if not isinstance(ranks, list) or len(ranks) != len(pictures):
        raise ValueError(f"{column}: {ranks!r} are not {len(pictures)} numbers, one for each picture")
    return _pairs_of(
        [
            _Ranked(row, normalised(prompt), prompt, picture, sign * _number(column, rank))
            for picture, rank in zip(pictures, ranks, strict=True)
        ]
    )


def _imagereward(rows: Iterator[_Row], refused: list[Refused]) -> Iterator[ReadPair]:
    """Reads tables of which each row is a picture, those of a prompt one after the other."""
    seen: set[str] = set()
    for prompt_id, group in itertools.groupby(_ranked(rows, refused), lambda ranked: ranked.prompt_id):
        if prompt_id in seen:
            reason = f"prompt_id: {prompt_id!r} stood further up; keep the rows of a prompt together"
            refused += [Refused(ranked.row.table.source, ranked.row.number, reason) for ranked in group]
            continue
        seen.add(prompt_id)
        for pair in _pairs_of(list(group)):
            try:
                yield _checked(pair)
            except ValueError as error:
                refused.append(Refused(pair.source, pair.row, str(error)))


def _ranked(rows: Iterator[_Row], refused: list[Refused]) -> Iterator[_Ranked]:
    for row in rows:
        try:
            column = "image" if row.cells.get("image") else "image_path"
            prompt = row.text("prompt")
            prompt_id = row.word("prompt_id") or normalised(prompt)
            found = _Ranked(row, prompt_id, prompt, row.picture(column), row.number_of("rank"))
        except ValueError as error:
            refused.append(Refused(row.table.source, row.number, str(error)))
        else:
            yield found


def _pairs_of(group: Sequence[_Ranked]) -> list[ReadPair]:
    """All pairs of a prompt's pictures; those of equal rank are ties."""
    found = []
    for place, (a, b) in enumerate(itertools.combinations(group, 2)):
        label = 0.5 if a.rank == b.rank else float(a.rank < b.rank)
        where = (a.row.table.source, a.row.number, a.prompt_id, a.row.word("classification"))
        found.append(_either_first(ReadPair(a.prompt, a.picture, b.picture, label, *where), place))
    return found


def _either_first(pair: ReadPair, place: int = 0) -> ReadPair:
    """The pair, number `place` of its row, in an order that knows nothing of its label."""
    return pair.swapped() if unit_hash("order", pair.source, str(pair.row), str(place)) < 0.5 else pair


def _checked(pair: ReadPair) -> ReadPair:
    if not 0 <= pair.label <= 1:
        raise ValueError(f"label: {pair.label} is no share from 0 to 1")
    if pair.image_a == pair.image_b:
        raise ValueError("image_b: is the same picture as image_a")
    return pair


def _number(column: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{column}: {'is empty' if value is None else f'{value!r} is no finite number'}")
    return float(value)


def _opened(side: str, file: bytes | Path) -> np.ndarray:
    try:
        return open_image(file)
    except ValueError as error:
        raise ValueError(f"{side}: {error}") from None


def _one(*names: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name,) for name in names)


READERS = {
    "pickapic": _Reader(
        _each(_pickapic), _one("caption", "jpg_0", "jpg_1", "label_0", "label_1"), ("model_0", "model_1")
    ),
    "hpdv2": _Reader(_each(_hpdv2), (("prompt",), ("image_path", "file_path"), ("rank", "human_preference"))),
    "hpdv3": _Reader(_each(_hpdv3), _one("prompt", "path1", "path2"), ("choice_dist", "model1", "model2")),
    "imagereward": _Reader(
        _imagereward, (*_one("prompt_id", "prompt", "rank"), ("image_path", "image")), ("classification",)
    ),
    "rewardbench": _Reader(
        _each(_rewardbench), _one("prompt", "chosen", "rejected"), ("subset", "chosen_model", "rejected_model")
    ),
    "mmrb2": _Reader(
        _each(_mmrb2),
        _one("prompt_text", "response_a_images", "response_b_images", "chosen"),
        ("prompt_images", "prompt_source", "response_a_model", "response_b_model"),
    ),
    "pairs": _Reader(
        _each(_own),
        _one("prompt", "image_a", "image_b", "label"),
        ("prompt_id", "skill", "model_a", "model_b", "score_a", "score_b"),
    ),
}
"""How each kind of table is read, by its name."""
