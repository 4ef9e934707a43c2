import math

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from torch.nn.functional import binary_cross_entropy

from rewards import metrics


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_accuracy_counts_predicted_ties_wrong_and_leaves_label_ties_out():
    reward_a, reward_b = [1.0, 0.0, 0.5, 9.0], [0.0, 1.0, 0.5, 0.0]
    label = [0.9, 0.8, 0.7, 0.5]
    assert metrics.pairwise_accuracy(reward_a, reward_b, label) == pytest.approx(1 / 3)
    np.testing.assert_equal(metrics.correctness(reward_a, reward_b, label), [1, 0, 0, math.nan])
    assert math.isnan(metrics.pairwise_accuracy([1.0], [0.0], [0.5]))


def test_accuracy_does_not_depend_on_which_image_comes_first(rng):
    a, b, label = rng.normal(size=(3, 200))
    label = 1 / (1 + np.exp(-label))
    assert metrics.pairwise_accuracy(a, b, label) == metrics.pairwise_accuracy(b, a, 1 - label)


def test_balanced_accuracy_gives_nothing_for_a_position():
    label = np.array([1.0] * 90 + [0.0] * 10)
    assert metrics.pairwise_accuracy(np.ones(100), np.zeros(100), label) == 0.9
    assert metrics.balanced_accuracy(np.ones(100), np.zeros(100), label) == 0.5
    assert metrics.balanced_accuracy(label, 1 - label, label) == 1.0
    assert metrics.balanced_accuracy(np.zeros(100), np.zeros(100), label) == 0.0


def test_bootstrap_of_single_pairs_is_the_normal_interval(rng):
    values = rng.random(2000) < 0.7
    low, high = metrics.clustered_interval(values, np.arange(2000), seed=1)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_knows_that_copies_are_no_evidence(rng):
    values = (rng.random(100) < 0.5).astype(float)
    alone = metrics.clustered_interval(values, np.arange(100))
    copied = metrics.clustered_interval(np.repeat(values, 20), np.repeat(np.arange(100), 20))
    assert copied == pytest.approx(alone)
    low, high = metrics.clustered_interval(np.repeat(values, 20), np.arange(2000))
    assert high - low < 0.3 * (copied[1] - copied[0])


def test_bootstrap_covers_as_often_as_it_says(rng):
    hits = 0
    prompts = np.repeat(np.arange(60), 5)
    for trial in range(100):
        values = rng.random(300) < rng.beta(2, 2, size=60)[prompts]
        low, high = metrics.clustered_interval(values, prompts, 0.9, trial)
        hits += low <= 0.5 <= high
    assert 0.8 < hits / 100 < 0.98


def test_bootstrap_leaves_ties_out_and_may_find_nothing():
    with_tie = metrics.clustered_interval([1.0, math.nan, 0.0, 1.0], list("abcd"))
    assert with_tie == metrics.clustered_interval([1.0, 0.0, 1.0], list("acd"))
    assert all(map(math.isnan, metrics.clustered_interval([math.nan], ["a"])))


def test_wilson_interval_solves_its_equation():
    low, high = metrics.wilson_interval(15, 40)
    for bound in (low, high):
        assert abs(15 / 40 - bound) == pytest.approx(1.959964 * math.sqrt(bound * (1 - bound) / 40), rel=1e-5)
    assert metrics.wilson_interval(0, 10)[0] == 0
    assert metrics.wilson_interval(10, 10)[1] == pytest.approx(1)


def test_hard_labels_agree_with_scikit_learn(rng):
    probability = rng.random(500)
    label = (rng.random(500) < probability).astype(float)
    assert metrics.nll(probability, label) == pytest.approx(log_loss(label, probability))
    assert metrics.brier(probability, label) == pytest.approx(brier_score_loss(label, probability))
    observed, predicted = calibration_curve(label, probability, n_bins=10)
    found = metrics.reliability(probability, label)
    np.testing.assert_allclose([b.observed for b in found], observed)
    np.testing.assert_allclose([b.predicted for b in found], predicted)
    assert sum(b.pairs for b in found) == 500


def test_soft_labels_agree_with_torch(rng):
    probability, label = rng.random((2, 100))
    expected = binary_cross_entropy(torch.tensor(probability), torch.tensor(label))
    assert metrics.nll(probability, label) == pytest.approx(expected.item())
    assert metrics.nll([0.0, 1.0], [0.0, 1.0]) == 0
    assert metrics.nll([0.0], [1.0]) == math.inf


def test_calibrated_predictions_have_no_calibration_error(rng):
    probability = rng.random(1000)
    assert metrics.ece(probability, probability) == pytest.approx(0)
    assert metrics.ece(np.full(10, 0.9), np.full(10, 0.4)) == pytest.approx(0.5)
    assert metrics.reliability([0.0, 1.0], [0.0, 1.0], bins=4) == [metrics.Bin(0, 0, 1), metrics.Bin(1, 1, 1)]
