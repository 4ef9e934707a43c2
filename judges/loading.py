"""From a checkpoint to the judge it holds, without settings: what a person tries first."""

import json
from pathlib import Path

from judges.base import Judge
from judges.blip2 import load_blip2
from judges.questions import QuestionJudge, Whole
from judges.shapes.questions import decompose


def load_judge(checkpoint: str | Path, device: str = "cpu") -> Judge:
    """A BLIP-2 or InstructBLIP judge from a local folder or a hub id.

    `judge.json` in the folder may name the `questions` to ask: `shapes`, the embedded world's, or `whole`, the default,
    the whole prompt in one question (VQAScore, 2404.01291, section 3).
    """
    settings = Path(checkpoint) / "judge.json"
    asked = json.loads(settings.read_text())["questions"] if settings.is_file() else "whole"
    decomposition = {"shapes": decompose, "whole": Whole()}[asked]
    return QuestionJudge(load_blip2(checkpoint, device), decomposition, name=asked)
