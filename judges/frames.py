"""Clips, and objects from several sides: samples of many pictures, for models of one picture and of many.

A model of one picture is asked about every frame (`PerFrame`), which tells what is in them; one of many pictures is
shown the frames in order (`WholeClip`), which also tells what happens between them.
"""

import math
import sys
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

from judges.base import VQA, Answer, Question, Sample, images_of

Reduce = Literal["mean", "min"]

T = TypeVar("T")


def sample_frames(frames: Sequence[T], count: int) -> list[T]:
    """At most `count` of the frames, evenly spread, the first and the last among them; of one, the middle.

    Raises:
        ValueError: there is no frame, or none is wanted.
    """
    if count < 1:
        raise ValueError(f"frames: {count} is not a number of frames from 1")
    if not len(frames):
        raise ValueError("frames: the clip is empty")
    if count == 1:
        return [frames[(len(frames) - 1) // 2]]
    places = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return [frames[place] for place in places]


class PerFrame:
    """Clips for a model of one picture: `frames` of each are asked about, and their margins reduced.

    `mean` asks whether the answer holds most of the time, `min` whether it always does. Where one frame could not be
    judged, neither could the clip.
    """

    most_images = sys.maxsize

    def __init__(self, vqa: VQA, frames: int = 8, reduce: Reduce = "mean"):
        if reduce not in ("mean", "min"):
            raise ValueError(f"reduce: {reduce!r} is neither 'mean' nor 'min'")
        self.vqa, self.frames, self.reduce = vqa, _checked(frames), reduce
        self.id, self.template = f"{reduce} of {frames} frames({vqa.id})", vqa.template

    def ask(self, samples: Sequence[Sample], questions: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        clips = [sample_frames(images_of(sample), self.frames) for sample in samples]
        shown = [frame for clip in clips for frame in clip]
        asked = [wanted for clip, wanted in zip(clips, questions, strict=True) for _ in clip]
        answered = iter(self.vqa.ask(shown, asked))
        per_clip = [[next(answered) for _ in clip] for clip in clips]  # answers[clip][frame][question]
        return [
            [self._reduced(question, answers) for question, *answers in zip(wanted, *frames, strict=True)]
            for wanted, frames in zip(questions, per_clip, strict=True)
        ]

    def _reduced(self, question: Question, answers: Sequence[Answer]) -> Answer:
        """What the answers on every frame, in order, say of the clip."""
        for number, answer in enumerate(answers, 1):
            if not answer.valid:
                failure = answer.error or "no finite margin"
                return Answer.failed(question.text, f"frame {number} of {len(answers)}: {failure}")
        margins = [answer.margin for answer in answers]
        margin = min(margins) if self.reduce == "min" else math.fsum(margins) / len(margins)
        text = min(answers, key=lambda answer: answer.margin).text
        if question.scale and self.reduce == "mean":
            text = f"{math.fsum(float(answer.text) for answer in answers) / len(answers):.3f}"
        elif margin > 0 and not question.scale:
            text = question.expected
        return Answer(question.text, margin, text, math.fsum(a.certainty for a in answers) / len(answers))


class WholeClip:
    """Clips for a model of many pictures: at most `frames` of each, in order, are one sample to it.

    Raises:
        ValueError: the model does not take that many.
    """

    most_images = sys.maxsize

    def __init__(self, vqa: VQA, frames: int = 8):
        if _checked(frames) > vqa.most_images:
            raise ValueError(f"frames: {vqa.id} takes {vqa.most_images} pictures, not {frames}; use fewer, or PerFrame")
        self.vqa, self.frames = vqa, frames
        self.id, self.template = f"{frames} frames({vqa.id})", vqa.template

    def ask(self, samples: Sequence[Sample], questions: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        return self.vqa.ask([sample_frames(images_of(sample), self.frames) for sample in samples], questions)


def for_clips(vqa: VQA, frames: int = 8, reduce: Reduce = "mean") -> PerFrame | WholeClip:
    """`vqa` for clips: shown `frames` at once where it takes so many, otherwise asked frame by frame."""
    return WholeClip(vqa, frames) if vqa.most_images >= frames > 1 else PerFrame(vqa, frames, reduce)


def _checked(frames: int) -> int:
    if frames < 1:
        raise ValueError(f"frames: {frames} is not a number of frames from 1")
    return frames
