"""The stage `prefer`: verdicts become preference pairs with soft labels and provenance."""

from dataclasses import asdict
from typing import Literal

import datasets
from pydantic import Field

from pipeline.runner import Context, Stage, Work
from pipeline.settings import Section, UserError
from pipeline.store import read_rows, write_rows
from rewards.preferences import Scored, pairs

FEATURES = datasets.Features(
    {
        "prompt_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "skill": datasets.Value("string"),
        "sample_a": datasets.Value("int32"),
        "sample_b": datasets.Value("int32"),
        "label": datasets.Value("float32"),
        "weight": datasets.Value("float32"),
        "split": datasets.Value("string"),
        "strategy": datasets.Value("string"),
        "judge": datasets.Value("string"),
        "template": datasets.Value("string"),
    }
)


class PreferConfig(Section):
    """Which pairs to learn from.

    Attributes:
        temperature: nats of margin that make a preference of 73 %.
        min_gap: pairs whose margins differ by less than so many nats are left out.
        by_certainty: let pairs count by how sure the judge was of them (its self-certainty).
        heldout: share of the prompts on which the reward model is only measured.
    """

    strategy: Literal["all", "best_vs_worst"] = "all"
    temperature: float = Field(1.0, gt=0)
    min_gap: float = Field(0.5, ge=0)
    heldout: float = Field(0.15, gt=0, lt=1)
    by_certainty: bool = False


def _run(context: Context) -> None:
    context.check_stop()
    if not context.accelerator.is_main_process or context.artifact.has("shard-00000.parquet"):
        return
    settings: PreferConfig = context.config.prefer
    rows = read_rows(context.inputs["judge"])
    scored = [
        Scored(**row)
        for row in rows.select_columns(["prompt_id", "prompt", "skill", "sample", "margin", "valid", "certainty"])
    ]
    first = rows[0]
    try:
        found = pairs(scored, judge=first["judge"], template=first["template"], **settings.model_dump())
    except ValueError as error:
        raise UserError(f"prefer.{error}") from None
    if {pair.split for pair in found} != {"train", "heldout"}:
        raise UserError(
            f"prefer: {len(found)} pairs are left and do not fill both splits; "
            "sample more prompts or lower prefer.min_gap"
        )
    write_rows(context.artifact, "shard-00000.parquet", [asdict(pair) for pair in found], FEATURES)


PREFER = Stage(
    "prefer",
    ("judge",),
    lambda config: {"version": 1, "prefer": config.prefer.model_dump(mode="json")},
    lambda config: Work(seconds=1.0),
    _run,
)
