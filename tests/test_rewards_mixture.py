"""Mixtures, normalisation, readings of several heads, and rules."""

import json

import numpy as np
import pytest
import torch

from rewards.losses import Scores
from rewards.mixture import Mixture, Term, mixture_of
from rewards.normalising import LEAST_STD, Moments, Normaliser
from rewards.reward import Reading, Rewards
from rewards.rules import RuleReward
from rewards.shortcuts import statistics

GREY = [np.full((4, 4, 3), level, dtype=np.uint8) for level in (0, 51, 204)]
TEXTS = ["a", "b", "c"]


class Given:
    """A reward of known values."""

    def __init__(self, *values: float):
        self.values = values

    def __call__(self, images, prompts) -> Rewards:
        return Rewards.of(self.values)


def test_a_mixture_is_the_weighted_sum_and_a_lone_reward_stays_as_it_is():
    mixture = Mixture((Term("one", Given(1.0, 2.0, 3.0)), Term("two", Given(1.0, 0.0, -1.0), weight=-0.5)))
    np.testing.assert_allclose(mixture(GREY, TEXTS).values, [0.5, 2.0, 3.5])
    alone = Given(0.1, -0.2, 1e-30)
    np.testing.assert_array_equal(mixture_of(alone)(GREY, TEXTS).values, alone(GREY, TEXTS).values)
    assert mixture_of(mixture) is mixture


def test_where_a_term_fails_there_is_no_reward():
    mixture = Mixture((Term("sure", Given(1.0, 1.0, 1.0)), Term("fails", Given(0.0, float("nan"), 0.0), 1e-6)))
    found = mixture(GREY, TEXTS)
    assert found.valid.tolist() == [True, False, True]
    assert np.isnan(found.values[1])


@pytest.fixture
def stream() -> list[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Five iterations of two groups of four, two terms of very different size, some of them invalid."""
    rng = np.random.default_rng(0)
    found = []
    for step in range(5):
        values = rng.normal(size=(2, 4, 2)) * [1.0, 100.0] + [3.0, -500.0]
        valid = rng.random((2, 4)) < 0.8
        values[~valid] = np.nan
        found.append((values.astype(np.float32), valid, [f"p{step % 2}", "p2"]))
    return found


def test_running_statistics_are_those_of_all_values_together(stream):
    normaliser, seen = Normaliser("running", 2), []
    for values, valid, ids in stream:
        normalised = normaliser(values, valid, ids)
        seen.append(values[valid].astype(float))
        everything = np.concatenate(seen)
        expected = (values - everything.mean(axis=0)) / everything.std(axis=0)
        np.testing.assert_allclose(normalised[valid], expected[valid], atol=1e-5)
        assert np.isnan(normalised[~valid]).all()


def test_statistics_of_a_prompt_are_those_of_its_own_values(stream):
    normaliser, seen = Normaliser("prompt", 2), {}
    for values, valid, ids in stream:
        normalised = normaliser(values, valid, ids)
        for group, ok, name, found in zip(values, valid, ids, normalised, strict=True):
            seen.setdefault(name, []).append(group[ok].astype(float))
            own = np.concatenate(seen[name])
            expected = (group - own.mean(axis=0)) / np.maximum(own.std(axis=0), LEAST_STD)
            np.testing.assert_allclose(found[ok], expected[ok], atol=1e-5)


@pytest.mark.parametrize("by", ["running", "prompt"])
def test_a_normaliser_goes_on_to_the_bit_through_json(stream, by):
    whole, cut = Normaliser(by, 2), Normaliser(by, 2)
    for values, valid, ids in stream[:3]:
        whole(values, valid, ids)
        cut(values, valid, ids)
    resumed = Normaliser(by, 2)
    resumed.load(json.loads(json.dumps(cut.state())))
    for values, valid, ids in stream[3:]:
        np.testing.assert_array_equal(whole(values, valid, ids), resumed(values, valid, ids))


def test_values_that_hardly_differ_are_not_blown_up():
    values = np.array([[[1.0], [1.0 + 1e-6]]], dtype=np.float32)
    assert np.abs(Normaliser("prompt", 1)(values, np.ones((1, 2), bool), ["p"])).max() < 0.01


def test_moments_joined_in_parts_are_those_of_the_whole():
    values = np.random.default_rng(1).normal(1e4, 1.0, (100, 1))
    found = Moments.none(1)
    for part in np.split(values, [3, 3, 50, 99]):
        found = found.joined(part)
    assert found.count == 100
    assert found.std == pytest.approx(values.std(), rel=1e-9)


@pytest.fixture
def heads() -> Scores:
    return Scores.of_heads(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)))


def test_the_worst_head_is_never_above_the_mean_and_no_nat_too_low(heads):
    """Samuelson's inequality (1968): no value of K lies more than √(K - 1) standard deviations from their mean."""
    mean, worst = Reading("mean")(heads), Reading("worst")(heads)
    assert (worst <= mean).all()
    assert (worst >= Reading("penalised", 3**0.5)(heads) - 1e-5).all()


def test_the_limits_of_the_penalised_reading(heads):
    torch.testing.assert_close(Reading("penalised", 0.0)(heads), heads.mean)
    two = Scores.of_heads(heads.heads[:, :2])
    torch.testing.assert_close(Reading("penalised", 1.0)(two), Reading("worst")(two))
    agreed = Scores.of_heads(heads.mean[:, None].expand(-1, 3))
    torch.testing.assert_close(Reading("penalised", 5.0)(agreed), heads.mean)


def test_one_head_that_knows_its_deviation_can_be_penalised_and_others_cannot():
    told = Scores(torch.tensor([1.0, 1.0]), log_std=torch.tensor([0.0, 2.0]).log())
    assert Reading("penalised", 0.5)(told).tolist() == [1.0, 0.0]
    for how, scores in (("worst", told), ("penalised", Scores(told.mean))):
        with pytest.raises(ValueError, match=r"^reading: .*reward\.ensemble\.heads"):
            Reading(how)(scores)


def test_a_rule_is_a_statistic_or_its_distance_from_a_range():
    values = RuleReward("brightness")(GREY, TEXTS).values
    np.testing.assert_allclose(values, [statistics(image).brightness for image in GREY])
    np.testing.assert_allclose(RuleReward("brightness", 0.1, 0.5)(GREY, TEXTS).values, [0.1, 0.0, 0.3], atol=1e-6)
    np.testing.assert_allclose(RuleReward("brightness", high=0.1)(GREY, TEXTS).values, [0.0, 0.1, 0.7], atol=1e-6)


def test_a_statistic_that_a_picture_does_not_have_is_not_valid():
    """A picture of one block has no borders between blocks."""
    assert not RuleReward("blockiness", high=1.0)(GREY, TEXTS).valid.any()
    with pytest.raises(ValueError, match=r"^name: 'beauty'"):
        RuleReward("beauty")
