"""The stage `prefer`: verdicts become preference pairs with soft labels and provenance, or people's pairs are read.

Of people's pairs the artifact holds the pictures too, and the rows that could not be used with their reasons.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from typing import Any, Literal

import datasets
from pydantic import Field, model_validator

from pipeline import pictures
from pipeline.runner import Context, Stage, Work
from pipeline.settings import Section, UserError
from pipeline.store import hash_path, read_rows, write_rows
from rewards.collected import Kept, collected
from rewards.leakage import NEAR
from rewards.preferences import Pair, Rule, Scored, Strategy, divided, pairs
from rewards.readers import READERS, read_pairs
from rewards.tables import Refused, Table

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
        "margin_a": datasets.Value("float32"),
        "margin_b": datasets.Value("float32"),
    }
)
REFUSED = "refused.json"


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """What is wrong with a table becomes one line that says where it was set."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"prefer.table: {error}") from None


class TableConfig(Section):
    """People's pairs, to learn from without sampling and judging; see `rewards.readers`.

    Attributes:
        reader: what kind of table it is.
        path: a file, a folder, or the id of a hub dataset, `owner/name`. Pictures that a file names beside it are taken
            to be what they were: of a run's fingerprint are only the files that hold rows.
        split: which files of a folder, or which split of a hub dataset.
        config, revision: the configuration and the commit of a hub dataset.
        limit: the number of usable pairs to read; the stage `reward` holds their encoded pictures in memory.
        shard: pairs of which the pictures make a file.
    """

    reader: Literal[tuple(READERS)]
    path: str
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    limit: int | None = Field(None, ge=2)
    shard: int = Field(512, ge=1)

    @property
    def table(self) -> Table:
        return Table(self.path, self.split, self.config, self.revision)

    def depends(self) -> dict[str, Any]:
        """Raises UserError where a table that is here cannot be read or lacks a column."""
        settings = self.model_dump(mode="json", exclude={"path"})
        if self.table.on_hub:
            return {**settings, "path": self.path}
        with _named():
            next(read_pairs(self.reader, self.table, []), None)
            return {**settings, "files": [hash_path(path) for path in self.table.files()]}


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
        table: people's pairs in the place of the judge's. `sample` and `judge` are not run, and only `heldout` and
            `near` apply.
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
    table: TableConfig | None = None

    @model_validator(mode="after")
    def _is_a_rule(self) -> "PreferConfig":
        rule = self.rule
        changed = [field.name for field in fields(Rule) if getattr(rule, field.name) != getattr(Rule(), field.name)]
        if self.table and changed:
            raise ValueError(f"{changed[0]}: people chose and labelled the pairs of a table; leave it out")
        return self

    @property
    def rule(self) -> Rule:
        return Rule(**self.model_dump(exclude={"heldout", "near", "table"}))

    def most(self, prompts: int, images: int) -> int:
        """How many pairs there are at most of so many prompts with so many images each; 0 where nobody knows."""
        return (self.table.limit or 0) if self.table else prompts * self.rule.most(images)


def _depends(config: Any) -> dict[str, Any]:
    settings: PreferConfig = config.prefer
    source = {"table": settings.table.depends()} if settings.table else {}
    return {"version": 3, "prefer": settings.model_dump(mode="json", exclude={"table"}), **source}


def _run(context: Context) -> None:
    context.check_stop()
    if context.artifact.has("shard-00000.parquet"):
        return
    found = _people_prefer(context) if context.config.prefer.table else judge_prefers(context)
    if {pair.split for pair in found} != {"train", "heldout"}:
        remedy = "a larger table" if context.config.prefer.table else "more prompts, or other min_gap and max_gap"
        raise UserError(f"prefer: {len(found)} pairs are left and do not fill both splits; it takes {remedy}")
    if context.accelerator.is_main_process:
        write_rows(context.artifact, "shard-00000.parquet", [asdict(pair) for pair in found], FEATURES)


def judge_prefers(context: Context) -> list[Pair]:
    """The pairs that the verdicts among the context's inputs make."""
    settings: PreferConfig = context.config.prefer
    rows = read_rows(context.inputs["judge"])
    scored = [Scored(**row) for row in rows.select_columns([field.name for field in fields(Scored)])]
    first = rows[0]
    try:
        return pairs(
            scored, settings.rule, first["judge"], first["template"], heldout=settings.heldout, near=settings.near
        )
    except ValueError as error:
        raise UserError(f"prefer.{error}") from None


def _people_prefer(context: Context) -> list[Pair]:
    """Every process reads all rows, and writes its share of the pictures."""
    settings: PreferConfig = context.config.prefer
    source, process, artifact = settings.table, context.accelerator, context.artifact
    refused: list[Refused] = []
    found: list[Pair] = []
    rows = collected(read_pairs(source.reader, source.table, refused), source.reader, refused)
    wanted = itertools.islice(rows, source.limit)
    with _named():
        for index in itertools.count():
            context.check_stop()
            part = list(itertools.islice(wanted, source.shard))
            if not part:
                break
            name = f"pictures-{index:05d}.parquet"
            kept = [_picture_row(picture) for one in part for picture in one.new]
            if kept and index % process.num_processes == process.process_index and not artifact.has(name):
                write_rows(artifact, name, kept, pictures.FEATURES)
            found += [one.pair for one in part]
            context.log(f"prefer: {len(found)} pairs read")
        if not found:
            first = refused[0] if refused else "it is empty"
            raise ValueError(f"{source.path} has no pair that can be used; {first}")
        found = divided(found, settings.heldout, settings.near)
    if process.is_main_process:
        _tell_refused(context, refused)
    return found


def _picture_row(kept: Kept) -> dict[str, Any]:
    named = {name: getattr(kept, name) for name in ("prompt_id", "prompt", "skill", "sample")}
    return {**named, "image": {"bytes": kept.data, "path": None}}


def _tell_refused(context: Context, refused: Sequence[Refused]) -> None:
    rows = [asdict(one) for one in sorted(refused, key=lambda one: one.row)]
    context.artifact.write_text(REFUSED, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
    if refused:
        place = context.artifact.folder / REFUSED
        context.log(f"prefer: {len(rows)} rows left out, see {place}; the first: {refused[0]}")


PREFER = Stage("prefer", ("judge",), _depends, lambda config: Work(seconds=1.0), _run)
