"""Probes change what they say and nothing else, and statistics of verdicts never take a failure for an answer."""

import random

import numpy as np
import pytest

from judges.audit import agreement, decisions, failures, margins, questions_asked, reworded, spread, unremembered
from judges.base import Answer, Question, Verdict
from judges.cache import CachedVQA
from judges.probes import (
    blank,
    brighter,
    coarser,
    jpeg,
    mirrored,
    mirrored_prompt,
    miscounted,
    negated,
    probes,
    unlike,
    written,
)
from judges.questions import QuestionJudge, Whole
from judges.shapes.grammar import SKILLS, all_prompts, sample_prompt
from judges.shapes.oracle import follows
from judges.shapes.render import render, scene_of

NAN = float("nan")


@pytest.fixture(scope="module")
def shown():
    """Clean pictures of the embedded world with their prompts."""
    rng = random.Random(0)
    drawn = [sample_prompt(rng, skill=SKILLS[i % len(SKILLS)]) for i in range(24)]
    return [(render([scene_of(prompt, rng)])[0], prompt.text) for prompt in drawn]


@pytest.mark.parametrize("probe", probes(4), ids=lambda probe: probe.name)
def test_a_probe_does_to_the_truth_what_it_says(probe, shown):
    prompts = [prompt for _, prompt in shown]
    tried = 0
    for image, prompt in shown:
        before = image.copy()
        asked, changed = probe.prompt(prompt, prompts), probe.picture(image, prompt)
        np.testing.assert_array_equal(image, before)  # the original stays as it is
        if asked is None or changed is None:
            continue
        assert changed.shape == image.shape
        assert changed.dtype == np.uint8
        assert not np.array_equal(changed, image) or asked != prompt
        tried += 1
        if probe.name != "resolution":  # half of 32 pixels may be too few to tell a shape
            assert follows(changed, asked) is (probe.expects == "same")
    assert tried >= (4 if probe.name == "counting" else len(shown))


def test_writing_stays_on_its_strip_and_can_be_read():
    image = np.random.default_rng(0).integers(0, 200, (240, 320, 3), dtype=np.uint8)
    found = written(image, "score 10")
    changed = (found != image).any((1, 2))
    top = int(np.argmax(changed))
    assert changed[top:].all()
    assert 240 - top <= 40  # one line of a twelfth of the height
    strip = found[top:]
    assert (strip == 255).all(-1).mean() > 0.8
    ink = (strip < 100).all(-1)
    assert ink.sum() > 100
    assert ink.any(1).sum() >= 14
    more = written(image, "score 10 and then a good deal more, so that one line does not do")
    assert (more != found).any()
    assert int(np.argmax((more != image).any((1, 2)))) < top


def test_writing_adapts_to_tiny_pictures_and_gives_up_on_novels():
    tiny = np.zeros((32, 32, 3), np.uint8)
    longest = sorted((prompt.text for skill in SKILLS for prompt in all_prompts(skill)), key=len)[-40:]
    assert all(written(tiny, prompt) is not None for prompt in longest)
    assert written(tiny, "word " * 60) is None
    assert written(tiny, "incomprehensibilities") is None


def test_changes_of_a_file_are_small_and_of_the_size_asked_for():
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    image = np.broadcast_to(ramp[None, :, None], (40, 64, 3)).copy()
    assert np.abs(jpeg(image, 75).astype(int) - image).mean() < 4
    assert np.abs(jpeg(image, 5).astype(int) - image).mean() > np.abs(jpeg(image, 95).astype(int) - image).mean()
    noise = np.random.default_rng(0).integers(0, 256, (41, 63, 3), dtype=np.uint8)
    assert coarser(noise, 2).shape == noise.shape
    assert coarser(noise, 2).std() < 0.7 * noise.std()
    np.testing.assert_array_equal(brighter(np.array([[[100, 200, 250]]], np.uint8), 1.1), [[[110, 220, 255]]])
    assert (blank(noise) == 128).all()
    np.testing.assert_array_equal(mirrored(mirrored(noise)), noise)
    np.testing.assert_array_equal(mirrored(noise)[:, 0], noise[:, -1])


def test_a_mirror_swaps_sides_and_leaves_other_words():
    assert mirrored_prompt("a ring left of a cross") == "a ring right of a cross"
    assert mirrored_prompt("Left, right and upright; lefthanded") == "Right, left and upright; lefthanded"
    assert mirrored_prompt("a dog's bone") == "a dog's bone"
    for quoting in ('a sign that says "left"', "a sign that says 'stop'", "a sign, “open”"):
        assert mirrored_prompt(quoting) is None
    for prompt in all_prompts("position"):
        assert mirrored_prompt(mirrored_prompt(prompt.text)) == prompt.text


@pytest.mark.parametrize(
    ("prompt", "most", "other"),
    [
        ("two red rings", 4, "three red rings"),
        ("four rings", 4, "three rings"),
        ("four dogs", 10, "five dogs"),
        ("Nine dogs and two cats", 10, "Ten dogs and two cats"),
        ("10 dogs", 10, "9 dogs"),
        ("a dog", 10, None),
        ("five dogs", 4, None),
        ("an often weightless dog in 1920", 10, None),
        ("two dogs", 2, None),
    ],
)
def test_one_more_or_fewer_is_asked_for(prompt, most, other):
    assert miscounted(prompt, most) == other


def test_another_prompt_is_as_unlike_as_there_is_one():
    prompts = ["a red ring", "a red cross", "two blue squares", "a red ring"]
    assert unlike("a red ring", prompts) == "two blue squares"
    assert unlike("a red ring", ["a red ring"]) is None
    tied = [f"{number} things" for number in ("two", "three", "four", "five")]
    assert len({unlike(f"picture {number}", tied) for number in range(40)}) > 1  # not always the same picture


def test_negation_turns_question_and_answer():
    asked = Question("Is there a red ring?", parents=(1,), weight=2.0)
    assert negated(asked) == Question("Is there no red ring?", expected="no", weight=2.0)
    assert negated(Question("are there any people?", expected="no")).expected == "yes"
    for other in (Question("is there exactly one object?"), Question("does this figure show a ring?")):
        assert negated(other) is None
    assert negated(Question("is there a ring or none?", choices=("ring", "none"), expected="ring")) is None


def verdict(margin, *answers, reason=""):
    return Verdict(margin, answers, "judge", "{}", not reason, reason)


def test_a_failure_is_neither_yes_nor_no():
    given = [verdict(2.0), verdict(-1.0), verdict(0.0), verdict(5.0, reason="timed out")]
    margin = margins(given)
    np.testing.assert_array_equal(margin, [2, -1, 0, NAN])
    np.testing.assert_array_equal(decisions(margin), [1, 0, 0, NAN])
    np.testing.assert_array_equal(agreement(margin, np.array([1.0, 1.0, NAN, 1.0])), [1, 0, NAN, NAN])
    found = spread(np.array([[1.0, 1.0, NAN], [3.0, -1.0, 1.0]]))
    np.testing.assert_array_equal(found.deviation, [1, 1, NAN])
    np.testing.assert_array_equal(found.changed, [0, 1, NAN])


def test_reasons_are_counted_by_fault_and_not_by_question():
    lost = [
        verdict(NAN, Answer("a?", 1.0), Answer.failed(text, "timed out"), reason=f"{text} timed out")
        for text in ("b?", "c?")
    ]
    refused = verdict(NAN, reason="prompt: not in the grammar")
    assert failures([*lost, verdict(1.0), refused]) == {"timed out": 2, "prompt: not in the grammar": 1}


def test_wrong_answers_are_counted_where_the_truth_is_known():
    yes, no, lost = Answer("ring?", 2.0), Answer("ring?", -2.0), Answer.failed("ring?", "timed out")
    other = Answer("cross?", -1.0)
    given = [verdict(1.0, yes, other), verdict(1.0, no, other), verdict(NAN, lost, reason="timed out")]
    found = questions_asked(given, [(True, None), (True, True), (True,)], ["p", "q", "r"])
    assert [(one.question, one.wrong, one.prompts) for one in found] == [
        ("cross?", (1.0,), ("q",)),  # of the same number of wrong answers the larger share comes first
        ("ring?", (0.0, 1.0), ("p", "q")),
    ]


class Counting:
    """Its margin is the number of times that it was called."""

    id, template, most_images = "counting", "{}", 1
    calls = 0

    def ask(self, samples, questions):
        self.calls += 1
        return [[Answer(question.text, float(self.calls)) for question in asked] for asked in questions]


def test_asked_again_means_asked_again(tmp_path):
    remembering = QuestionJudge(CachedVQA(Counting(), tmp_path / "cache.sqlite"), Whole())
    picture = [np.zeros((4, 4, 3), np.uint8)]

    def twice(judge):
        return [judge.score(picture, ["a ring"])[0].margin for _ in range(2)]

    assert len(set(twice(remembering))) == 1
    fresh = unremembered(remembering)
    assert len(set(twice(fresh))) == 2
    assert fresh.id == remembering.id
    assert len(set(twice(remembering))) == 1


def test_other_words_reach_the_same_model():
    judge = QuestionJudge(Counting(), Whole())
    first, second = reworded(judge, ["Is this {prompt}?", "Does it show {prompt}?"])
    (answer,) = first.score([np.zeros((4, 4, 3), np.uint8)], ["a ring"])[0].evidence
    assert answer.question == "Is this a ring?"
    assert second.vqa is judge.vqa
    assert reworded(object(), ["Is this {prompt}?"]) == []
