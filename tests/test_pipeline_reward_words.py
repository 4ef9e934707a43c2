"""What is said of a reward: each planted fault is named, and a reward without one is believed."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.assessing.assessment import Assessment, Measured, Provenance, as_json
from pipeline.assessing.pressure import Pressure
from pipeline.assessing.trials import Invariance
from pipeline.report.reward_words import conclusion
from rewards.evaluation import Pairs, Pictures, evaluate
from rewards.leakage import Leakage
from rewards.losses import BradleyTerry
from rewards.metrics.intervals import Estimate
from rewards.overoptimisation import best_of_n
from rewards.shortcuts import Effect, Shortcut
from rewards.tables import Refused

PROMPTS = 100


def assessed(right: float, label: float = 1.0, before: float = 0.5, prompts: int = PROMPTS, margin: float = 3.0):
    """Of a reward that orders the share `right` of the pairs, two a prompt, as labels of `label` do."""
    rng = np.random.default_rng(0)
    count = 4 * prompts

    def scores(share: float) -> np.ndarray:
        found = np.zeros(count)
        sign = np.where(rng.permutation(2 * prompts) < share * 2 * prompts, 1, -1)
        found[::2] = margin * sign
        return found

    texts = np.repeat([f"prompt {k}" for k in range(prompts)], 4)
    nothing = np.full(count, np.nan)
    skills = np.repeat(np.where(np.arange(prompts) % 2, "odd", "even"), 4)
    pictures = Pictures(
        texts, texts, skills, np.full(count, ""), texts, scores(right), nothing, nothing, nothing,
        {"before training": scores(before)},
    )  # fmt: skip
    better, swapped = np.arange(0, count, 2), np.arange(2 * prompts) % 2
    pairs = Pairs("people", better + swapped, better + 1 - swapped, np.where(swapped, 1 - label, label))
    return Assessment(
        name="planted",
        measured=Measured("table", len(pairs), count, prompts, False, ()),
        evaluation=evaluate(pictures, pairs, BradleyTerry()),
        shortcuts=(),
        effects=(),
        invariances=(),
        choosing=None,
        tuning=None,
        leakage=Leakage(prompts, 0, 0, 0, count, 0, 0, ()),
        provenance=Provenance("", {}, {}, 0, {}, "", "", "", {}, {}),
        notes=(),
    )


def sure(value: float, reach: float = 0.02) -> Estimate:
    return Estimate(value, (value - reach, value + reach), 200, PROMPTS)


@pytest.mark.parametrize(
    ("right", "label", "reading"),
    [
        (0.99, 1.0, "It may be believed for ranking"),
        (0.85, 1.0, "Believe it on the average"),
        (0.65, 1.0, "Do not lean on it"),
        (0.5, 1.0, "It cannot be told from a coin"),
        (0.2, 1.0, "It is wrong more often than right"),
        (0.99, 0.8, "It may be believed for ranking"),  # nobody does better than 80 % on choices drawn from such labels
    ],
)
def test_the_reading_follows_the_interval(right, label, reading):
    said = conclusion(assessed(right, label))
    assert said.reading.startswith(reading)
    assert said.claim.startswith(f"The reward orders {100 * right:.0f}")


def test_few_prompts_are_no_ground_for_a_verdict():
    said = conclusion(assessed(1.0, prompts=20))
    assert said.claim == "The reward orders 100\N{NO-BREAK SPACE}% of the pairs as people do."
    assert said.reading.startswith("That is on 20 prompts, too few")


def test_a_reward_without_a_fault_has_no_cautions():
    assert conclusion(assessed(0.95)).cautions == ()


@pytest.mark.parametrize(
    ("changes", "caution"),
    [
        ({"leakage": Leakage(100, 3, 1, 2, 400, 0, 0, ())}, "It was trained on 6 of these 100 prompts"),
        ({"leakage": Leakage(100, 0, 0, 0, 400, 7, 0, ())}, "Of the 400 pictures 7 stand pixel for pixel"),
        ({"effects": (Effect("blank", "no", sure(-0.1), sure(0.6)),)}, "It does not look closely: a blank picture"),
        ({"effects": (Effect("jpeg", "same", sure(-0.5), sure(0.9)),)}, "It judges the file as well as what it shows"),
        ({"shortcuts": (Shortcut("saturation", sure(0.5), sure(0.4)),)}, "It moves with the saturation of pictures"),
        ({"invariances": (Invariance("other batch-mates", 1.0, sure(0.1)),)}, "With other batch-mates it orders"),
        ({"measured": Measured("table", 1, 2, 1, False, (Refused("table", 3, "x"),))}, "1 row of the table could not"),
    ],
)
def test_a_fault_is_named(changes, caution):
    cautions = conclusion(replace(assessed(0.95), **changes)).cautions
    assert len(cautions) == 1
    assert cautions[0].startswith(caution)


def test_what_its_interval_does_not_bear_out_is_no_fault():
    unsure = {
        "effects": (
            Effect("blank", "no", sure(-0.6, 0.05), sure(0.6)),
            Effect("jpeg", "same", sure(0.3, 0.1), sure(0.5)),
        ),
        "shortcuts": (Shortcut("edges", sure(0.5), sure(0.15, 0.1)),),
    }
    assert conclusion(replace(assessed(0.95), **unsure)).cautions == ()


def test_training_that_helped_nothing_is_said():
    said = conclusion(assessed(0.9, before=0.9))
    assert any("not surely better than it was before its training" in caution for caution in said.cautions)


def test_probabilities_that_are_too_sure_are_named_with_their_remedy():
    said = conclusion(assessed(0.75, before=0.3, margin=8.0))
    assert any(caution.startswith("Its probabilities are off by 25 points") for caution in said.cautions)


def pressed(gold_follows: bool) -> Pressure:
    rng = np.random.default_rng(1)
    proxy = rng.normal(size=8 * PROMPTS)
    gold = proxy if gold_follows else -proxy
    return Pressure("gold", best_of_n(proxy, (gold > 0.5).astype(float), np.repeat(np.arange(PROMPTS), 8)))


def test_optimisation_that_pays_is_a_use_and_one_that_does_not_a_fault():
    good = conclusion(replace(assessed(0.95), choosing=pressed(True)))
    assert "The best of 8 pictures by it is better in truth: gold +" in good.reading
    bad = conclusion(replace(assessed(0.95), choosing=pressed(False)))
    assert bad.cautions[0].startswith("Under the best of n it is gamed: it rises while gold falls")


def test_what_is_not_known_is_null():
    found = as_json({"a": (float("nan"), 1.0), "b": Estimate(0.5, None, 3, 2)})
    assert found["a"] == [None, 1.0]
    assert found["b"]["note"] == "no interval: 2 prompts, and it takes 50"
