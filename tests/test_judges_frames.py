"""Clips: frames evenly taken, asked one by one or shown together, and no verdict without all of them."""

import math

import numpy as np
import pytest

from judges.base import Answer, Question
from judges.frames import PerFrame, WholeClip, for_clips, sample_frames
from judges.questions import QuestionJudge, Whole

BRIGHT, DARK = Question("is it bright?"), Question("is it dark?", expected="no")


class Bright:
    """Sees one picture: a nat for every level above 100, and black ones not at all."""

    id, template, most_images = "bright", "{}", 1

    def __init__(self):
        self.calls = []

    def ask(self, samples, questions):
        self.calls.append((samples, questions))
        return [[self.answer(s, q) for q in asked] for s, asked in zip(samples, questions, strict=True)]

    def answer(self, sample, question):
        level = int(sample[0, 0, 0])
        if level == 0:
            return Answer.failed(question.text, "too dark to see")
        return Answer(question.text, level - 100.0, "yes" if level > 100 else "no", level / 10)


class Film(Bright):
    """Sees up to four: whether the last is brighter than the first."""

    id, most_images = "film", 4

    def answer(self, sample, question):
        return Answer(question.text, float(sample[-1][0, 0, 0]) - float(sample[0][0, 0, 0]), "yes")


def clip(*levels: int) -> list[np.ndarray]:
    return [np.full((2, 2, 3), level, np.uint8) for level in levels]


@pytest.mark.parametrize(
    ("length", "count", "places"),
    [
        (9, 3, [0, 4, 8]),
        (10, 4, [0, 3, 6, 9]),
        (10, 2, [0, 9]),
        (5, 4, [0, 1, 3, 4]),
        (3, 8, [0, 1, 2]),
        (5, 5, [0, 1, 2, 3, 4]),
        (9, 1, [4]),
        (1, 1, [0]),
        (1, 4, [0]),
    ],
)
def test_frames_are_evenly_spread_from_the_first_to_the_last(length, count, places):
    assert sample_frames(range(length), count) == places


def test_many_frames_are_taken_once_and_in_order():
    for length in range(2, 40):
        for count in range(2, length + 1):
            found = sample_frames(range(length), count)
            gaps = np.diff(found)
            assert (found[0], found[-1], len(found)) == (0, length - 1, count)
            assert gaps.min() >= 1
            assert gaps.max() - gaps.min() <= 1


def test_a_clip_without_frames_and_no_frames_are_refused():
    with pytest.raises(ValueError, match="the clip is empty"):
        sample_frames([], 2)
    with pytest.raises(ValueError, match="frames: 0"):
        sample_frames([1], 0)
    with pytest.raises(ValueError, match="frames: 0"):
        PerFrame(Bright(), 0)
    with pytest.raises(ValueError, match="reduce: 'max'"):
        PerFrame(Bright(), 2, "max")


@pytest.mark.parametrize(("reduce", "margin", "text"), [("mean", 10.0, "yes"), ("min", -10.0, "no")])
def test_margins_of_all_frames_are_reduced(reduce, margin, text):
    vqa = Bright()
    judge = PerFrame(vqa, frames=3, reduce=reduce)
    film, still = judge.ask([clip(90, 0, 110, 0, 130), clip(105)[0]], [[BRIGHT, DARK], [BRIGHT]])
    assert [(a.question, a.margin) for a in film] == [(BRIGHT.text, margin), (DARK.text, margin)]
    assert film[0].text == text
    assert film[0].certainty == pytest.approx(11.0)
    assert (still[0].margin, still[0].text) == (5.0, "yes")
    assert len(vqa.calls) == 1
    assert len(vqa.calls[0][0]) == 4


def test_a_clip_of_one_picture_is_that_picture():
    image = clip(130)[0]
    for reduce in ("mean", "min"):
        assert PerFrame(Bright(), 4, reduce).ask([image], [[BRIGHT]]) == Bright().ask([image], [[BRIGHT]])


def test_one_frame_that_cannot_be_judged_makes_the_clip_invalid():
    (failed,), (fine,) = PerFrame(Bright(), 3).ask([clip(200, 0, 200), clip(120, 110)], [[BRIGHT], [BRIGHT]])
    assert not failed.valid
    assert failed.error == "frame 2 of 3: too dark to see"
    assert math.isnan(failed.margin)
    assert fine.margin == 15.0


def test_a_model_of_many_pictures_is_shown_the_frames_in_order():
    vqa = Film()
    answers = WholeClip(vqa, 3).ask([clip(10, 99, 20, 99, 30), clip(9)[0]], [[BRIGHT], [DARK]])
    assert [[answer.margin for answer in found] for found in answers] == [[20.0], [0.0]]
    assert [[int(frame[0, 0, 0]) for frame in sample] for sample in vqa.calls[0][0]] == [[10, 20, 30], [9]]
    with pytest.raises(ValueError, match="frames: film takes 4 pictures, not 5"):
        WholeClip(vqa, 5)


def test_how_a_clip_is_shown_follows_from_what_the_model_takes():
    assert isinstance(for_clips(Bright(), 4), PerFrame)
    assert isinstance(for_clips(Film(), 5), PerFrame)
    assert isinstance(for_clips(Film(), 4), WholeClip)
    assert isinstance(for_clips(Bright(), 1), PerFrame)
    judges = [PerFrame(Bright(), 4), PerFrame(Bright(), 5), PerFrame(Bright(), 4, "min"), WholeClip(Film(), 4)]
    assert len({judge.id for judge in judges}) == 4


def test_clips_are_judged_as_pictures_are():
    judge = QuestionJudge(PerFrame(Bright(), 2, "min"), Whole())
    first, second = judge.score([clip(120, 0, 140), clip(0, 140)], ["dawn", "dawn"])
    assert first.margin == 20.0
    assert (second.valid, "frame 1 of 2" in second.reason) == (False, True)
