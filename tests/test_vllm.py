"""The real vLLM: served over HTTP and in process, it answers as transformers does. `make test-vllm` runs this."""

import math
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import judges
from judges.base import Question
from judges.shapes.flaws import clean
from judges.shapes.grammar import parse, sample_prompt
from judges.shapes.questions import decompose
from judges.shapes.render import scene_of
from pipeline.judging import ServerModel
from pipeline.launch import ENVIRONMENT, Serve, Servers

pytestmark = pytest.mark.vllm

CHECKPOINT = Path(__file__).parent.parent / "judges" / "checkpoints" / "shapes" / "vqa"
IMAGES = 256
CLOSE = 1e-3
"""Nats."""


def log_p(margin: float) -> float:
    """log P of the only choice of a question from its margin: log(p / (1 - p))."""
    return -math.log1p(math.exp(-margin))


def alone(question: Question, choice: str) -> Question:
    return Question(question.text, (choice,), choice)


class Exam:
    """Questions about pictures of the embedded world; yes and no are asked alone as well, for their log P."""

    def __init__(self):
        rng = random.Random(0)
        prompts = [sample_prompt(rng).text for _ in range(IMAGES)]
        shown = [prompts[(n + n % 2) % IMAGES] for n in range(IMAGES)]  # every other picture is of another prompt
        self.images = [clean(scene_of(parse(text), rng)).image for text in shown]
        self.asked = [decompose(text) for text in prompts]
        self.alone = [[alone(asked[0], choice) for choice in ("yes", "no")] for asked in self.asked]

    def sit(self, vqa) -> tuple[np.ndarray, np.ndarray, float]:
        """Margins, log-probabilities, both in nats, and questions a second."""
        vqa.ask(self.images[:8], self.asked[:8])
        begun = time.perf_counter()
        answers = vqa.ask(self.images, self.asked)
        took = time.perf_counter() - begun
        margins = np.array([answer.margin for row in answers for answer in row])
        logs = np.array([log_p(answer.margin) for row in vqa.ask(self.images, self.alone) for answer in row])
        return margins, logs, len(margins) / took


def served(exam: Exam, folder: Path) -> tuple[np.ndarray, np.ndarray, float, float]:
    """As `Exam.sit`, and the seconds that the server took to start."""
    serve = Serve(checkpoint=str(CHECKPOINT), python=sys.executable)
    with Servers(folder, "judge", print):
        begun = time.perf_counter()
        vqa = ServerModel(type="server", serve=serve).build("cpu")
        started = time.perf_counter() - begun
        return *exam.sit(vqa), started


def test_served_and_in_process_it_answers_as_transformers_does(tmp_path, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, os.environ.get(name, value))
    exam = Exam()
    margins, logs, speed = exam.sit(judges.load_blip2(CHECKPOINT))
    assert margins.std() > 1
    lines = [f"transformers {speed:7.0f} questions/s, {len(margins)} about {IMAGES} images"]
    apart = {}
    *found, speed, started = served(exam, tmp_path)
    apart["served"] = [np.abs(a - b).max() for a, b in zip(found, (margins, logs), strict=True)]
    lines.append(f"served       {speed:7.0f} questions/s, started in {started:.0f} s")
    begun = time.perf_counter()
    vqa = judges.load_vllm(CHECKPOINT, {"dtype": "float32", "enforce_eager": True})
    started = time.perf_counter() - begun
    *found, speed = exam.sit(vqa)
    apart["in process"] = [np.abs(a - b).max() for a, b in zip(found, (margins, logs), strict=True)]
    lines.append(f"in process   {speed:7.0f} questions/s, started in {started:.0f} s")
    for who, (margin, log) in apart.items():
        lines.append(f"{who}: margins differ from transformers' by {margin:.1e} nats at most, log P by {log:.1e}")
    print("\n" + "\n".join(lines))
    assert np.max(list(apart.values())) <= CLOSE  # NaN, of an answer that failed, is not
