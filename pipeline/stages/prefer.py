"""The stage `prefer`: verdicts become preference pairs with soft labels and provenance."""

from dataclasses import asdict, fields

import datasets
from pydantic import Field, model_validator

from pipeline.runner import Context, Stage, Work
from pipeline.settings import Section, UserError
from pipeline.store import read_rows, write_rows
from rewards.leakage import NEAR
from rewards.preferences import Rule, Scored, Strategy, pairs

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
    """Which pairs to learn from; see `rewards.preferences.Rule`.

    Attributes:
        strategy: all pairs of a prompt, its best and worst picture, or `per_prompt` pairs: those with the widest
            margin, or those whose order the judge is least certain of.
        temperature: nats of margin that make a preference of 73 %.
        min_gap, max_gap: pairs whose margins differ by less, or by more, than so many nats are left out.
        tie: pairs whose margins differ by less than so many nats are kept as ties, with the label 0.5.
        by_certainty: let pairs count by how sure the judge was of them (its self-certainty).
        heldout: share of the prompts on which the reward model is only measured.
        near: Jaccard similarity of their pairs of words from which prompts are near duplicates and share their split.
    """

    strategy: Strategy = "all"
    per_prompt: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, gt=0)
    min_gap: float = Field(0.5, ge=0)
    max_gap: float | None = Field(None, gt=0)
    tie: float = Field(0.0, ge=0)
    by_certainty: bool = False
    heldout: float = Field(0.15, gt=0, lt=1)
    near: float = Field(NEAR, gt=0, le=1)

    @model_validator(mode="after")
    def _is_a_rule(self) -> "PreferConfig":
        _ = self.rule
        return self

    @property
    def rule(self) -> Rule:
        return Rule(**self.model_dump(exclude={"heldout", "near"}))


def _run(context: Context) -> None:
    context.check_stop()
    if not context.accelerator.is_main_process or context.artifact.has("shard-00000.parquet"):
        return
    settings: PreferConfig = context.config.prefer
    rows = read_rows(context.inputs["judge"])
    scored = [Scored(**row) for row in rows.select_columns([field.name for field in fields(Scored)])]
    first = rows[0]
    try:
        found = pairs(
            scored, settings.rule, first["judge"], first["template"], heldout=settings.heldout, near=settings.near
        )
    except ValueError as error:
        raise UserError(f"prefer.{error}") from None
    if {pair.split for pair in found} != {"train", "heldout"}:
        raise UserError(
            f"prefer: {len(found)} pairs are left and do not fill both splits; "
            "sample more prompts, or change prefer.min_gap or max_gap"
        )
    write_rows(context.artifact, "shard-00000.parquet", [asdict(pair) for pair in found], FEATURES)


PREFER = Stage(
    "prefer",
    ("judge",),
    lambda config: {"version": 2, "prefer": config.prefer.model_dump(mode="json")},
    lambda config: Work(seconds=1.0),
    _run,
)
