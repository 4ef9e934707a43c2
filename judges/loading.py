"""From a checkpoint to the judge it holds."""

import json
from pathlib import Path

from judges.base import Judge
from judges.blip2 import Blip2Judge
from judges.shapes import questions as shapes

_QUESTIONS = {
    "shapes": {"whole": shapes.whole, "decompose": shapes.decompose},
    "whole": {"whole": 'Does this figure show "{}"?'.format},
}


def load_judge(folder: str | Path, device: str = "cpu") -> Judge:
    """A BLIP-2 judge from a local folder or a hub id.

    `judge.json` in the folder may name the `questions` to ask: `shapes`, the embedded world's decomposition, or
    `whole`, the default, the whole prompt in one question (VQAScore, 2404.01291, section 3).
    """
    settings = Path(folder) / "judge.json"
    asked = json.loads(settings.read_text())["questions"] if settings.is_file() else "whole"
    return Blip2Judge.from_pretrained(folder, device, **_QUESTIONS[asked])
