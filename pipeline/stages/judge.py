"""The stage `judge`: a verdict on every sampled picture, evidence included."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from pydantic import Field

import judges
from pipeline.runner import Context, Stage, Work
from pipeline.settings import Section
from pipeline.stages.sample import shards
from pipeline.store import hash_path, read_rows, write_rows

JUDGE_SECONDS = 6e-3
"""One picture and its questions for the embedded judge, on the reference machine."""

FEATURES = datasets.Features(
    {
        "prompt_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "skill": datasets.Value("string"),
        "sample": datasets.Value("int32"),
        "margin": datasets.Value("float32"),
        "value": datasets.Value("float32"),
        "valid": datasets.Value("bool"),
        "judge": datasets.Value("string"),
        "template": datasets.Value("string"),
        "evidence": datasets.List(
            {
                "question": datasets.Value("string"),
                "margin": datasets.Value("float32"),
                "probability": datasets.Value("float32"),
            }
        ),
    }
)


class JudgeConfig(Section):
    """Which judge: a local folder or a hub id of a BLIP-2."""

    checkpoint: str
    shard: int = Field(256, ge=1)

    def depends(self) -> dict[str, Any]:
        """The contents of a local checkpoint, or the name of one on the hub."""
        local = Path(self.checkpoint).exists() or not is_hub_id(self.checkpoint)
        return {"checkpoint": hash_path(self.checkpoint) if local else self.checkpoint}


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form `owner/name` of a hub repository, rather than that of a path."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def _depends(config: Any) -> dict[str, Any]:
    return {"version": 1, **config.judge.depends()}


def _work(config: Any) -> Work:
    images = config.sample.prompts * config.sample.images_per_prompt
    return Work(images, images * JUDGE_SECONDS)


def _run(context: Context) -> None:
    config = context.config
    pictures = read_rows(context.inputs["sample"])
    judge = judges.load_judge(config.judge.checkpoint, str(context.accelerator.device))
    with context.progress.track(len(pictures), "images", "judge") as advance:
        for name, part in shards(context, range(len(pictures)), config.judge.shard):
            rows = pictures.select(part)
            verdicts = judge.score([np.asarray(image) for image in rows["image"]], rows["prompt"])
            kept = rows.select_columns(["prompt_id", "prompt", "skill", "sample"])
            judged = []
            for row, verdict in zip(kept, verdicts, strict=True):
                evidence = [
                    {"question": a.question, "margin": a.margin, "probability": a.probability} for a in verdict.evidence
                ]
                judged.append(
                    {
                        **row,
                        "margin": verdict.margin,
                        "value": verdict.value,
                        "valid": verdict.valid,
                        "judge": verdict.judge,
                        "template": verdict.template,
                        "evidence": evidence,
                    }
                )
            write_rows(context.artifact, name, judged, FEATURES)
            advance(len(judged))


JUDGE = Stage("judge", ("sample",), _depends, _work, _run)
