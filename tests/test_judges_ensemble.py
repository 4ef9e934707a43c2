"""Several judges as one: means and worst cases of margins, and never a score without one of them."""

import math

import numpy as np
import pytest

from judges.base import Answer, Verdict
from judges.ensemble import Ensemble

IMAGES, PROMPTS = [np.zeros((2, 2, 3), np.uint8)] * 2, ["a", "b"]


class Fixed:
    """Gives each sample the margin it was made with; None stands for no answer."""

    def __init__(self, id: str, *margins: float | None, template: str = "{}"):
        self.id, self.margins, self.template = id, margins, template

    def score(self, images, prompts):
        return [self.verdict(m, prompt) for m, prompt in zip(self.margins, prompts, strict=True)]

    def verdict(self, margin, prompt):
        if margin is None:
            return Verdict(math.nan, (Answer.failed(prompt, "busy"),), self.id, self.template, False, "busy")
        return Verdict(margin, (Answer(f"{self.id} on {prompt}", margin),), self.id, self.template)


def test_the_mean_is_weighted_and_the_worst_is_the_smallest():
    judges = [Fixed("x", 1.0, -4.0), Fixed("y", 3.0, 2.0)]
    assert [v.margin for v in Ensemble(judges).score(IMAGES, PROMPTS)] == [2.0, -1.0]
    assert [v.margin for v in Ensemble(judges, [3, 1]).score(IMAGES, PROMPTS)] == [1.5, -2.5]
    assert [v.margin for v in Ensemble(judges, how="worst").score(IMAGES, PROMPTS)] == [1.0, -4.0]


def test_an_ensemble_of_one_is_that_judge():
    for how in ("mean", "worst"):
        assert [v.margin for v in Ensemble([Fixed("x", 0.3, -7)], how=how).score(IMAGES, PROMPTS)] == [0.3, -7]


def test_a_verdict_keeps_evidence_members_and_their_disagreement():
    verdict = Ensemble([Fixed("x", 1.0, 0), Fixed("y", 4.0, 0), Fixed("z", 7.0, 0)]).score(IMAGES, PROMPTS)[0]
    assert [answer.question for answer in verdict.evidence] == ["x on a", "y on a", "z on a"]
    assert [member.judge for member in verdict.members] == ["x", "y", "z"]
    assert verdict.disagreement == pytest.approx(math.sqrt(6))


@pytest.mark.parametrize("how", ["mean", "worst"])
def test_one_member_without_an_answer_makes_the_verdict_invalid(how):
    failed, fine = Ensemble([Fixed("x", 1.0, 1.0), Fixed("y", None, 1.0)], how=how).score(IMAGES, PROMPTS)
    assert (failed.valid, failed.reason) == (False, "y: busy")
    assert math.isnan(failed.value)
    assert math.isnan(failed.disagreement)
    assert len(failed.evidence) == 2
    assert (fine.valid, fine.margin, fine.disagreement) == (True, 1.0, 0.0)


def test_the_id_tells_ensembles_apart():
    judges = [Fixed("x", template="A"), Fixed("y", template="B"), Fixed("z", template="A")]
    ids = [Ensemble(judges).id, Ensemble(judges, [2, 1, 1]).id, Ensemble(judges, how="worst").id]
    assert ids == ["mean(0.3333 x, 0.3333 y, 0.3333 z)", "mean(0.5 x, 0.25 y, 0.25 z)", "worst(x, y, z)"]
    assert Ensemble(judges).template == "A; B"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"judges": []}, "judges: an ensemble needs at least one"),
        ({"weights": [1.0]}, "weights: 1 for 2 judges"),
        ({"weights": [1.0, -1.0]}, r"weights: -1\.0 is not a positive number"),
        ({"weights": [1.0, 0.0]}, r"weights: 0\.0 is not a positive number"),
        ({"weights": [1.0, math.nan]}, "weights: nan is not a positive number"),
        ({"weights": [1.0, 1.0], "how": "worst"}, "weights: the worst margin has none"),
        ({"how": "median"}, "how: 'median' is neither"),
    ],
)
def test_a_wrong_setting_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Ensemble(**({"judges": [Fixed("x", 1.0), Fixed("y", 1.0)]} | arguments))
