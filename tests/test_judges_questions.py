"""From questions and answers to a verdict: what each aggregate means, and what makes a verdict invalid."""

import math

import numpy as np
import pytest

from judges.base import Answer, Question, log_odds, probability
from judges.questions import AGGREGATES, QuestionJudge, Rating, Whole, checked_graph
from judges.replies import choice_answer

IMAGE = np.zeros((2, 2, 3), np.uint8)


class Told:
    """A VQA that answers every text with the margin it was told, and fails at the others."""

    id, template, most_images = "told", "{}", 1

    def __init__(self, **margins: float):
        self.margins = margins

    def ask(self, samples, questions):
        return [
            [
                Answer(q.text, self.margins[q.text]) if q.text in self.margins else Answer.failed(q.text, "is unknown")
                for q in asked
            ]
            for asked in questions
        ]


def answers(*probabilities: float) -> list[Answer]:
    return [Answer("?", log_odds(p)) for p in probabilities]


def questions(*weights: float) -> list[Question]:
    return [Question("?", weight=weight) for weight in weights]


def value(name: str, asked: list[Question], said: list[Answer]) -> float:
    return probability(AGGREGATES[name](asked, said))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("weakest", 0.2),
        ("product", 0.9 * 0.8 * 0.2),
        ("soft_tifa", (0.9 * 0.8 * 0.2) ** (1 / 3)),
        ("mean_margin", probability(np.mean([log_odds(p) for p in (0.9, 0.8, 0.2)]))),
        ("accuracy", 2.5 / 4),
        ("dsg", 2.5 / 4),
    ],
)
def test_an_aggregate_is_its_formula(name, expected):
    assert value(name, questions(1, 1, 1), answers(0.9, 0.8, 0.2)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", sorted(AGGREGATES))
def test_every_aggregate_rises_with_every_answer_and_stays_finite(name):
    low, high = answers(1e-9, 0.4, 0.3), answers(0.3, 0.6, 0.99)
    assert value(name, questions(1, 2, 3), low) < value(name, questions(1, 2, 3), high)
    for sure in (-200.0, 200.0):
        assert math.isfinite(AGGREGATES[name](questions(1, 1), [Answer("?", sure)] * 2))


@pytest.mark.parametrize("name", ["mean_margin", "accuracy", "dsg", "soft_tifa"])
def test_a_question_of_weight_two_counts_as_two(name):
    if name in ("accuracy", "dsg"):  # half an answer is added to each side of all there are
        weighed = AGGREGATES[name](questions(2, 1, 1), answers(0.9, 0.2, 0.2))
        assert probability(weighed) == pytest.approx((3 * 0.5 + 0.5) / 4)
    else:
        twice = AGGREGATES[name](questions(1, 1, 1), answers(0.9, 0.9, 0.2))
        assert AGGREGATES[name](questions(2, 1), answers(0.9, 0.2)) == pytest.approx(twice)


def test_a_child_counts_only_with_its_parent():
    asked = [Question("a"), Question("b", parents=(0,)), Question("c", parents=(1,))]
    assert value("dsg", asked, answers(0.1, 0.9, 0.9)) == pytest.approx(1.5 / 4)  # c by its parent's own answer
    assert value("accuracy", asked, answers(0.1, 0.9, 0.9)) == pytest.approx(2.5 / 4)


@pytest.mark.parametrize("parents", [((1,), (0,)), ((0,), ()), ((7,), ())])
def test_a_graph_with_a_circle_or_a_missing_parent_is_refused(parents):
    with pytest.raises(ValueError, match="depends on itself or on a question that is not there"):
        checked_graph([Question("a", parents=parents[0]), Question("b", parents=parents[1])])


def test_one_missing_answer_makes_a_verdict_invalid_with_its_reason():
    judge = QuestionJudge(Told(a=2.0, b=-1.0), lambda prompt: [Question(text) for text in prompt])
    good, bad = judge.score([IMAGE, IMAGE], ["ab", "ax"])
    assert (good.margin, good.valid) == (-1.0, True)
    assert math.isnan(bad.margin)
    assert math.isnan(bad.value)
    assert bad.reason == "x is unknown"


def test_a_prompt_that_cannot_be_taken_apart_spoils_no_other():
    def decompose(prompt):
        if prompt == "bad":
            raise ValueError("prompt: 'bad' is not in the grammar")
        return [Question(prompt)] if prompt else []

    verdicts = QuestionJudge(Told(a=1.0), decompose).score([IMAGE] * 3, ["a", "bad", ""])
    assert [verdict.valid for verdict in verdicts] == [True, False, False]
    assert verdicts[1].reason == "prompt: 'bad' is not in the grammar"
    assert verdicts[2].reason == "prompt: there is nothing to ask about ''"


def test_templates_are_ensembled():
    judge = QuestionJudge(Told(**{"is it a?": 3.0, "a?": 1.0}), Whole(["is it {prompt}?", "{prompt}?"]))
    assert judge.score([IMAGE], ["a"])[0].margin == 1.0
    with pytest.raises(ValueError, match=r"must hold \{prompt\} once"):
        Whole(["is it that?"])


def test_a_rating_is_the_place_of_its_expectation():
    (asked,) = Rating(["how good is {prompt}?"], 1, 5)("a")
    log_p = np.log([0.1, 0.1, 0.2, 0.2, 0.4])
    answer = choice_answer(asked, log_p)
    assert float(answer.text) == pytest.approx(0.1 + 0.2 + 0.6 + 0.8 + 2.0)
    assert answer.probability == pytest.approx((float(answer.text) - 1) / 4)
    assert choice_answer(asked, log_p + 7).margin == pytest.approx(answer.margin)  # whatever else there is


def test_a_scale_of_two_is_a_choice():
    log_p = np.log([0.3, 0.6])
    chosen = choice_answer(Question("?", ("0", "1"), "1"), log_p)
    assert choice_answer(Question("?", ("0", "1"), "1", scale=True), log_p).margin == pytest.approx(chosen.margin)


@pytest.mark.parametrize(
    ("choices", "expected"), [(("1", "3", "2"), "2"), (("1", "good"), "good"), (("1",), "1"), (("1", "2", "3"), "2")]
)
def test_a_scale_that_does_not_rise_or_has_no_best_end_is_refused(choices, expected):
    with pytest.raises(ValueError, match="scale"):
        Question("?", choices, expected, scale=True)
