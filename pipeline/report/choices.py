"""Which images the report shows, by rules that are fixed before anyone has looked.

Rows are dicts with the columns of `evaluate/shard-*.parquet` and `evaluate/pairs.parquet`.
"""

from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def skills(rows: Iterable[Row]) -> list[str]:
    """The skills in the order in which they first appear."""
    return list(dict.fromkeys(row["skill"] for row in rows))


def examples(rows: Iterable[Row], skill: str, count: int) -> list[tuple[Row, Row]]:
    """(base, tuned) of the first `count` prompts of `skill` in the order of the rows; the lowest samples."""
    mine = [row for row in rows if row["skill"] == skill]
    lowest: dict[str, int] = {}
    for row in mine:
        lowest[row["prompt_id"]] = min(row["sample"], lowest.get(row["prompt_id"], row["sample"]))
    chosen = list(lowest.items())[:count]
    found = {(row["model"], row["prompt_id"], row["sample"]): row for row in mine}
    return [(found["base", *key], found["tuned", *key]) for key in chosen]


def reward_against_judge(pairs: Iterable[Row], count: int) -> list[Row]:
    """The pairs of which judge and reward name different winners, widest difference of P(a better) first."""
    torn = [pair for pair in pairs if (pair["label"] - 0.5) * (pair["preference"] - 0.5) < 0]
    return sorted(torn, key=lambda pair: (-abs(pair["label"] - pair["preference"]), *_place(pair)))[:count]


def judge_against_gold(rows: Sequence[Row], count: int) -> list[Row]:
    """The images that judge and gold see differently, the surest verdict first; invalid verdicts are none."""
    wrong = [row for row in rows if has_both(row) and says_yes(row) != row["gold"]]
    return sorted(wrong, key=lambda row: (-abs(row["judge"]), *_place(row)))[:count]


def has_both(row: Row) -> bool:
    """Whether the judge gave a verdict on an image of which the truth is known."""
    return row["judge_valid"] and row["gold"] is not None


def says_yes(row: Row) -> bool:
    """Whether the judge holds that the image follows its prompt: its logit margin is positive."""
    return row["judge"] > 0


def _place(row: Row) -> tuple[str, ...]:
    """Breaks ties, so that the order never depends on that of the rows."""
    return tuple(str(row.get(name)) for name in ("prompt_id", "sample", "sample_a", "sample_b", "model"))
