"""`summary.json`: the numbers of a run for machines, and the table that ends it for people.

Every field is documented in docs/summary.md.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.progress import duration
from pipeline.report.words import percent, span
from pipeline.runner import seconds
from pipeline.store import Artifact, atomic_write_text, read_rows


def summary(run_dir: str | Path) -> dict[str, Any]:
    """The numbers of `evaluate/metrics.json`, the images made and the seconds spent.

    Raises:
        FileNotFoundError: the artifact `evaluate` or one that it was made from is not there.
    """
    run_dir = Path(run_dir)
    evaluate = Artifact(run_dir / "evaluate")
    spent = seconds(run_dir)
    sample = Artifact(run_dir / "sample")  # not there where people's pairs were learned
    return {
        **json.loads(evaluate.path("metrics.json").read_text(encoding="utf-8")),
        "images": (
            (read_rows(sample, columns=["sample"]).num_rows if sample.manifest else 0)
            + sum(read_rows(evaluate, "curves.parquet", ["images"])["images"])
            + read_rows(evaluate, columns=["sample"]).num_rows
        ),
        "seconds": {**spent, "total": sum(spent.values())},
    }


def write(run_dir: str | Path) -> None:
    """Replace `run_dir/summary.json` by the `summary` of what stands there."""
    text = json.dumps(summary(run_dir), indent=2, allow_nan=False)
    atomic_write_text(Path(run_dir) / "summary.json", text + "\n")


def print_table(numbers: Mapping[str, Any], console: Console) -> None:
    """Show a `summary`: the generator before and after, whom to believe, and what it took."""
    console.print(_generator(numbers["generator"]))
    console.print(_trust(numbers["reward"]["accuracy"], numbers["judge"]["accuracy"]))
    console.print(_seconds(numbers["seconds"]))


def _generator(generator: Mapping[str, Any]) -> Table:
    base, tuned = generator["base"], generator["tuned"]
    table = _table("held-out images", "base", "tuned")
    table.add_row("follow their prompt (gold)", percent(base["gold"], 1), percent(tuned["gold"], 1))
    for skill, before in (base["per_skill"] or {}).items():
        after = tuned["per_skill"][skill]
        table.add_row(f"  {skill.replace('_', ' ')}", percent(before["gold"], 1), percent(after["gold"], 1))
    table.add_row("judge's mean P(yes)", percent(base["judge"], 1), percent(tuned["judge"], 1))
    table.add_row("mean reward", f"{base['reward']:.3f}", f"{tuned['reward']:.3f}")
    return table


def _trust(reward: Mapping[str, Any], judge: Mapping[str, Any]) -> Table:
    table = _table("right about", "accuracy", "95 % interval")
    for name, whom in (("judge", "reward model, by the judge"), ("gold", "reward model, by gold")):
        table.add_row(whom, percent(reward[name], 1), span(reward[f"{name}_interval"]))
    table.add_row("judge, by gold (balanced)", percent(judge["gold"], 1), span(judge["interval"]))
    return table


def _seconds(spent: Mapping[str, float]) -> Table:
    table = _table("stage", "time")
    for stage, length in spent.items():
        table.add_row(stage, duration(length))
    return table


def _table(*columns: str) -> Table:
    table = Table(*columns)
    for column in table.columns[1:]:
        column.justify = "right"
    return table
