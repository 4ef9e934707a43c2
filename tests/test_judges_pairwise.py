"""Comparisons: swapping removes a bias for a place, temperatures and strengths are recovered, failures stay such."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression

from judges.base import Answer, Question, Verdict
from judges.pairwise import (
    Better,
    GroupJudge,
    PairwiseJudge,
    ScoreComparer,
    bradley_terry,
    first_share,
    fit_temperature,
    flip_rate,
    order_margins,
    ring,
)

PROMPT = "a red {ring}"


def picture(brightness: int) -> np.ndarray:
    return np.full((2, 2, 3), brightness, np.uint8)


class Pair:
    """Sees two pictures: prefers the brighter one, by a nat for each 10 levels, and the first by `bias` nats."""

    id, template, most_images = "pair", "{}", 2

    def __init__(self, bias: float = 0.0, fails=lambda first, second: False):
        self.bias, self.fails = bias, fails

    def ask(self, samples, questions):
        return [
            [self.answer(*sample, question) for question in asked]
            for sample, asked in zip(samples, questions, strict=True)
        ]

    def answer(self, first, second, question):
        assert question.choices == ("1", "2")
        if self.fails(first.flat[0], second.flat[0]):
            return Answer.failed(question.text, "refused")
        first_better = (float(first.mean()) - float(second.mean())) / 10 + self.bias
        text = "1" if first_better > 0 else "2"
        return Answer(question.text, first_better if question.expected == "1" else -first_better, text, 0.5)


class Scores:
    """Scores a picture by its brightness; black ones cannot be scored."""

    id, template = "brightness", "{}"

    def score(self, images, prompts):
        levels = [float(image.mean()) for image in images]
        return [
            Verdict(level, (Answer(prompt, level),), self.id, self.template)
            if level
            else Verdict(math.nan, (), self.id, self.template, False, "it is black")
            for level, prompt in zip(levels, prompts, strict=True)
        ]


def compare(judge, a: int, b: int) -> Verdict:
    return judge.compare([picture(a)], [picture(b)], [PROMPT])[0]


def test_both_orders_are_asked_in_one_call_and_averaged():
    verdict = compare(PairwiseJudge(Pair(bias=0.7)), 60, 50)
    first, then = verdict.evidence
    assert (first.margin, then.margin) == pytest.approx((1.7, 0.3))
    assert verdict.value == pytest.approx((expit(1.7) + 1 - expit(-0.3)) / 2)
    assert (first.text, then.text) == ("1", "2")
    assert first.question == 'Which image shows "a red {ring}" better, image 1 or image 2?'


@pytest.mark.parametrize("bias", [-8.0, -0.7, 0.0, 3.0, 20.0])
def test_swapping_removes_a_bias_for_a_place(bias):
    judge = PairwiseJudge(Pair(bias))
    assert compare(judge, 50, 50).margin == pytest.approx(0, abs=1e-12)
    assert compare(judge, 55, 50).margin == pytest.approx(-compare(judge, 50, 55).margin)
    assert compare(judge, 55, 50).margin > 0


def test_disagreeing_orders_shrink_towards_a_half():
    margins = [compare(PairwiseJudge(Pair(bias)), 60, 50).margin for bias in (0, 1, 2, 4, 8)]
    assert margins == sorted(margins, reverse=True)
    assert 0 < margins[-1] < 0.01


def test_certain_answers_keep_their_margin():
    assert compare(PairwiseJudge(Pair()), 255, 1).margin == pytest.approx(25.4)
    assert compare(PairwiseJudge(Pair()), 1, 255).margin == pytest.approx(-25.4)


def test_a_tie_band_reaches_as_far_as_it_says():
    near, far = expit(0.3) - 0.5 + 1e-9, expit(0.3) - 0.5 - 1e-9
    assert compare(PairwiseJudge(Pair(), tie=near), 53, 50).margin == 0
    assert compare(PairwiseJudge(Pair(), tie=near), 50, 53).margin == 0
    assert compare(PairwiseJudge(Pair(), tie=far), 53, 50).margin == pytest.approx(0.3)


@pytest.mark.parametrize(("order", "fails"), [("given", lambda a, b: a == 60), ("swapped", lambda a, b: a == 50)])
def test_one_failed_order_makes_the_verdict_invalid(order, fails):
    judge = PairwiseJudge(Pair(fails=fails))
    failed, fine = judge.compare([picture(60), picture(90)], [picture(50), picture(80)], [PROMPT] * 2)
    assert not failed.valid
    assert math.isnan(failed.value)
    assert failed.reason.startswith(f"in the order {order}: ")
    assert failed.reason.endswith("refused")
    assert len(failed.evidence) == 2
    assert fine.margin == pytest.approx(1)


def test_wordings_are_averaged_by_weight():
    class Opinions(Pair):
        def answer(self, first, second, question):
            strength = 1 if "better" in question.text else -2
            answer = super().answer(first, second, question)
            return replace(answer, margin=strength * answer.margin)

    def wording(prompt):
        better, worse = Question("better?", ("1", "2"), "1", weight=3), Question("nicer?", ("1", "2"), "1")
        return [better, worse]

    verdict = compare(PairwiseJudge(Opinions(), wording), 60, 50)
    assert verdict.value == pytest.approx((3 * expit(1) + expit(-2)) / 4)
    assert [answer.question for answer in verdict.evidence] == ["better?", "better?", "nicer?", "nicer?"]


def test_what_cannot_be_compared_is_refused():
    class One(Pair):
        most_images = 1

    with pytest.raises(ValueError, match="one image at a time; compare its scores with ScoreComparer"):
        PairwiseJudge(One())
    with pytest.raises(ValueError, match=r"tie: 0\.5"):
        PairwiseJudge(Pair(), tie=0.5)
    with pytest.raises(ValueError, match="a sample has 2"):
        PairwiseJudge(Pair()).compare([[picture(1), picture(2)]], [picture(3)], [PROMPT])
    for question in (Question("which?", ("1", "2", "tie"), "1"), Question("which?", ("1", "2"), "2")):
        with pytest.raises(ValueError, match="two choices and expect the first"):
            compare(PairwiseJudge(Pair(), lambda prompt, question=question: [question]), 1, 2)
    with pytest.raises(ValueError, match="asks nothing"):
        compare(PairwiseJudge(Pair(), lambda prompt: []), 1, 2)
    with pytest.raises(ValueError, match=r"'which\?' must hold \{prompt\} once"):
        Better(["which?"])


def test_flips_and_the_share_of_the_first_tell_a_bias():
    def verdicts(bias):
        shades = (40, 50, 60)
        return [compare(PairwiseJudge(Pair(bias)), a, b) for a, b in itertools.product(shades, shades) if a != b]

    assert (flip_rate(verdicts(0)), first_share(verdicts(0))) == (0, 0.5)
    assert (flip_rate(verdicts(9)), first_share(verdicts(9))) == (1, 1)
    assert (flip_rate(verdicts(-9)), first_share(verdicts(-9))) == (1, 0)
    assert flip_rate(verdicts(1.5)) == pytest.approx(4 / 6)
    assert first_share(verdicts(1.5)) == pytest.approx(10 / 12)


def test_statistics_leave_out_invalid_verdicts_and_refuse_foreign_ones():
    judge = PairwiseJudge(Pair(9, fails=lambda a, b: a == 60))
    invalid = compare(judge, 60, 50)
    assert math.isnan(flip_rate([invalid]))
    assert math.isnan(first_share([]))
    assert order_margins([invalid, compare(judge, 40, 50)]).shape == (1, 2)
    with pytest.raises(ValueError, match="did not ask every question in both orders"):
        flip_rate([Verdict(1.0, (Answer("a?", 1.0), Answer("b?", 1.0)), "other", "{}")])


def test_scores_are_compared_through_their_gap():
    comparer = ScoreComparer(Scores(), temperature=4)
    better, first_black, second_black = comparer.compare(
        [picture(60), picture(0), picture(60)], [picture(50), picture(50), picture(0)], ["a", "b", "c"]
    )
    assert better.margin == pytest.approx(10 / 4)
    assert [(answer.question, answer.margin) for answer in better.evidence] == [("a", 60), ("a", 50)]
    assert (first_black.valid, first_black.reason) == (False, "first sample: it is black")
    assert (second_black.valid, second_black.reason) == (False, "second sample: it is black")
    assert math.isnan(second_black.margin)
    with pytest.raises(ValueError, match="temperature: 0"):
        ScoreComparer(Scores(), 0)


@pytest.mark.parametrize("temperature", [0.01, 1.0, 300.0])
def test_the_temperature_of_exact_soft_labels_is_recovered(temperature):
    gaps = np.random.default_rng(0).normal(0, 2, 50)
    assert fit_temperature(gaps, expit(gaps / temperature)) == pytest.approx(temperature, rel=1e-4)


def test_the_temperature_of_simulated_labels_is_recovered():
    random = np.random.default_rng(0)
    gaps = random.normal(0, 5, 20_000)
    labels = random.random(20_000) < expit(gaps / 2.5)
    assert fit_temperature(gaps, labels) == pytest.approx(2.5, rel=0.05)


def test_the_temperature_is_that_of_logistic_regression_through_the_origin():
    random = np.random.default_rng(1)
    gaps, labels = random.normal(1, 3, 200), random.random(200)
    labels = np.where(random.random(200) < 0.5, labels, gaps > 0)
    reference = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10)
    rows, weights = np.tile(gaps, 2)[:, None], np.concatenate([labels, 1 - labels])
    reference.fit(rows, np.repeat([1, 0], 200), sample_weight=weights)
    assert fit_temperature(gaps, labels) == pytest.approx(1 / reference.coef_.item(), rel=1e-5)


def test_a_temperature_scales_with_the_gaps_and_forgets_their_direction():
    gaps, labels = np.array([1.0, 2.0, -3.0, 0.0]), np.array([0.8, 0.4, 0.1, 0.9])
    fitted = fit_temperature(gaps, labels)
    assert fit_temperature(1e6 * gaps, labels) == pytest.approx(1e6 * fitted)
    assert fit_temperature(-gaps, 1 - labels) == pytest.approx(fitted)


@pytest.mark.parametrize(
    ("gaps", "labels", "message"),
    [
        ([1, -2], [1, 0], "no temperature is too small"),
        ([1, -2], [0, 1], "they do not follow the gaps"),
        ([1, -1], [0.5, 0.5], "they do not follow the gaps"),
        ([0, 0], [1, 0], "they do not follow the gaps"),
        ([], [], "they do not follow the gaps"),
        ([1, math.nan], [1, 0], "gaps: not all are finite"),
        ([1, 2], [1, 1.5], "labels: not all are probabilities"),
        ([1, 2], [1, math.nan], "labels: not all are probabilities"),
        ([1, 2], [1], "give one for each"),
    ],
)
def test_a_temperature_that_labels_do_not_tell_is_refused(gaps, labels, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(gaps, labels)


def against_all(strengths: np.ndarray) -> np.ndarray:
    return expit(strengths[:, None] - strengths[None, :])


@pytest.mark.parametrize("missing", [False, True])
def test_strengths_are_recovered_from_all_comparisons_or_some(missing):
    strengths = np.random.default_rng(0).normal(0, 2, 8)
    p = against_all(strengths)
    if missing:
        met = ring(8, 2)
        p = np.array([[p[i, j] if (i, j) in met else np.nan for j in range(8)] for i in range(8)])
    assert bradley_terry(p, ridge=1e-9) == pytest.approx(strengths - strengths.mean(), abs=1e-5)


def test_two_items_differ_by_the_log_odds():
    p = np.array([[np.nan, 0.9], [np.nan, np.nan]])
    assert bradley_terry(p, ridge=1e-9) == pytest.approx([logit(0.9) / 2, -logit(0.9) / 2], abs=1e-6)
    assert bradley_terry(p.T, ridge=1e-9) == pytest.approx([-logit(0.9) / 2, logit(0.9) / 2], abs=1e-6)


def test_simulated_wins_give_the_strengths_that_made_them():
    random = np.random.default_rng(0)
    strengths = np.array([-1.0, 0.0, 0.4, 0.6])
    p = random.binomial(20_000, against_all(strengths)) / 20_000
    assert bradley_terry(p) == pytest.approx(strengths, abs=0.05)


def test_whoever_wins_always_stays_finite_and_first():
    found = bradley_terry(np.array([[0.9, 1, 1], [0, np.nan, 1], [0, 0, 0.5]]))
    assert np.isfinite(found).all()
    assert found[0] - found[1] == pytest.approx(found[1] - found[2])
    assert found[0] - found[1] > 5


def test_strengths_of_separate_sets_are_not_compared():
    p = np.full((6, 6), np.nan)
    p[0, 1] = p[2, 3] = p[3, 4] = 0.8
    found = bradley_terry(p)
    assert np.isnan(found).tolist() == [True, True, False, False, False, True]
    assert np.isnan(bradley_terry(np.full((3, 3), np.nan))).all()
    assert bradley_terry(np.zeros((0, 0))).shape == (0,)


@pytest.mark.parametrize(
    ("p", "message"), [(np.zeros((2, 3)), "not square"), (np.full((2, 2), 1.1), "not all are probabilities")]
)
def test_what_is_no_table_of_probabilities_is_refused(p, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(p)


@pytest.mark.parametrize(("count", "rounds"), [(1, 2), (2, 2), (5, 1), (8, 2), (8, 3), (8, 20)])
def test_in_a_ring_all_meet_equally_many_and_none_twice(count, rounds):
    met = ring(count, rounds)
    assert len(set(met)) == len(met)
    assert all(i < j for i, j in met)
    meetings = np.bincount(np.array(met, int).ravel(), minlength=count)
    assert meetings.tolist() == [min(2 * rounds, count - 1)] * count


@pytest.mark.parametrize("rounds", [1, 2, 9])
def test_a_group_is_scored_on_the_scale_of_its_comparisons(rounds):
    shades = {"a": [50, 70, 40, 60, 90], "b": [10, 20]}
    rows = [("a", 50), ("b", 10), ("a", 70), ("a", 40), ("b", 20), ("a", 60), ("a", 90)]
    judge = GroupJudge(PairwiseJudge(Pair()), rounds)
    verdicts = judge.score([picture(shade) for _, shade in rows], [prompt for prompt, _ in rows])
    for (prompt, shade), verdict in zip(rows, verdicts, strict=True):
        assert verdict.valid
        assert verdict.margin == pytest.approx((shade - np.mean(shades[prompt])) / 10, abs=0.02)
        assert len(verdict.evidence) == min(2 * rounds, len(shades[prompt]) - 1)
    assert [answer.question for answer in verdicts[4].evidence] == ["better than image 1 of this prompt"]
    assert verdicts[4].evidence[0].margin == pytest.approx(1)
    assert verdicts[1].evidence[0].margin == pytest.approx(-1)


def test_only_images_that_nothing_valid_compares_are_invalid():
    judge = GroupJudge(PairwiseJudge(Pair(fails=lambda a, b: 70 in (a, b))), rounds=3)
    lost, *rest, alone = judge.score([picture(n) for n in (70, 50, 60, 40, 30, 5)], ["a"] * 5 + ["b"])
    assert not lost.valid
    assert "refused" in lost.reason
    assert [verdict.margin for verdict in rest] == pytest.approx([0.5, 1.5, -0.5, -1.5], abs=0.02)
    assert (alone.valid, alone.reason) == (False, "no siblings to compare it with")
    with pytest.raises(ValueError, match="rounds: 0"):
        GroupJudge(PairwiseJudge(Pair()), 0)


def test_no_images_make_no_verdicts():
    assert GroupJudge(PairwiseJudge(Pair())).score([], []) == []
    assert ScoreComparer(Scores()).compare([], [], []) == []
