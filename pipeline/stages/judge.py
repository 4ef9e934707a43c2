"""The stage `judge`: a verdict on every sampled picture, evidence included."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import datasets
import numpy as np

from judges.base import Judge, Unavailable, Verdict
from pipeline.pace import judging_seconds
from pipeline.runner import Context, Stage, Work
from pipeline.stages.sample import shards
from pipeline.store import read_rows, write_rows

FEATURES = datasets.Features(
    {
        "prompt_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "skill": datasets.Value("string"),
        "sample": datasets.Value("int32"),
        "margin": datasets.Value("float32"),
        "value": datasets.Value("float32"),
        "valid": datasets.Value("bool"),
        "reason": datasets.Value("string"),
        "certainty": datasets.Value("float32"),
        "disagreement": datasets.Value("float32"),
        "judge": datasets.Value("string"),
        "template": datasets.Value("string"),
        "evidence": datasets.List(
            {
                "question": datasets.Value("string"),
                "answer": datasets.Value("string"),
                "margin": datasets.Value("float32"),
                "probability": datasets.Value("float32"),
                "certainty": datasets.Value("float32"),
                "error": datasets.Value("string"),
            }
        ),
    }
)


def _depends(config: Any) -> dict[str, Any]:
    return {"version": 3, **config.judge.depends()}


def _work(config: Any) -> Work:
    images = config.sample.prompts * config.sample.images_per_prompt
    return Work.of(images, {"the judge": judging_seconds(config.judge, images)})


def columns_of(verdict: Verdict) -> dict[str, Any]:
    """A verdict as a row of `FEATURES`, without the columns that name the picture."""
    evidence = [
        {
            "question": a.question,
            "answer": a.text,
            "margin": a.margin,
            "probability": a.probability,
            "certainty": a.certainty,
            "error": a.error,
        }
        for a in verdict.evidence
    ]
    names = ("margin", "value", "valid", "reason", "certainty", "disagreement")
    told = {name: getattr(verdict, name) for name in names}
    return {**told, "judge": verdict.judge, "template": verdict.template, "evidence": evidence}


def _run(context: Context) -> None:
    judge_pictures(context, context.config.judge.build(str(context.accelerator.device)))


def judge_pictures(context: Context, judge: Judge) -> None:
    """Verdicts of `judge` on all pictures of `sample`."""
    pictures = read_rows(context.inputs["sample"])
    groups = [[place for place, _ in rows] for _, rows in groupby(enumerate(pictures["prompt_id"]), lambda row: row[1])]
    with context.progress.track(len(pictures), "images", "judge") as advance:
        for name, part in shards(context, groups, max(1, context.config.judge.shard // len(groups[0]))):
            rows = pictures.select([place for group in part for place in group])
            verdicts = _scored(context, judge, [np.asarray(image) for image in rows["image"]], rows["prompt"])
            if verdicts:
                kept = rows.select_columns(["prompt_id", "prompt", "skill", "sample"])
                judged = [{**row, **columns_of(verdict)} for row, verdict in zip(kept, verdicts, strict=True)]
                write_rows(context.artifact, name, judged, FEATURES)
                advance(len(judged))
    context.check_stop()


def _scored(
    context: Context, judge: Judge, images: Sequence[np.ndarray], prompts: Sequence[str]
) -> list[Verdict] | None:
    """The verdicts, or None where too many are missing: what a judge fails at is no random sample of what it sees.

    The run then stops before the next shard and can go on later, when the judge does.
    """
    try:
        verdicts = judge.score(images, prompts)
    except Unavailable as error:
        context.ask_to_stop(f"judge: {error}")
        return None
    missing = [verdict for verdict in verdicts if not verdict.valid]
    if len(missing) > context.config.judge.max_invalid * len(verdicts):
        context.ask_to_stop(
            f"judge: {len(missing)} of {len(verdicts)} pictures have no verdict, above judge.max_invalid; "
            f"the first: {missing[0].reason}"
        )
        return None
    return verdicts


JUDGE = Stage("judge", ("sample",), _depends, _work, _run, wanted=lambda config: config.prefer.table is None)
