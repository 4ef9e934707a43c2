import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from scipy.special import expit
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torch.nn.functional import binary_cross_entropy

from rewards import metrics
from rewards.metrics import correlation, intervals

PROMPT = ["p", "p", "p", "p", "q", "q"]
REWARD_A = [2.0, 1.0, 0.0, 3.0, 0.0, 1.0]
REWARD_B = [0.0, 1.0, 1.0, 0.0, 4.0, 1.0]
LABEL = [1.0, 1.0, 1.0, 0.5, 0.0, 0.5]
"""By margin: right by 2, a predicted tie, wrong by 1, a tie missed by 3; right by 4, a tie found."""


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def prompt_share(values) -> float:
    found = metrics.prompt_share(values, PROMPT)
    assert found.value is not None
    return found.value


def test_the_four_published_accuracies_on_a_table_worked_out_by_hand():
    table = (REWARD_A, REWARD_B, LABEL)
    assert metrics.pairwise_accuracy(*table) == 2 / 4
    assert prompt_share(metrics.correctness(*table)) == pytest.approx((1 / 3 + 1) / 2)
    assert prompt_share(metrics.concordance(*table)) == pytest.approx((3 / 4 + 1) / 2)
    assert metrics.half_credit(*table).mean() == pytest.approx(4 / 6)
    assert metrics.half_credit(*table, 1.0).mean() == pytest.approx(4.5 / 6)
    assert metrics.tuned_threshold(metrics.half_credit, *table) == 1.0
    assert metrics.three_way_credit(*table).tolist() == [1, 0, 0, 0, 1, 1]
    assert metrics.three_way_credit(*table, 3.0).tolist() == [0, 0, 0, 1, 1, 1]
    assert prompt_share(metrics.three_way_credit(*table)) == pytest.approx((1 / 4 + 1) / 2)


@pytest.mark.parametrize("credit", [metrics.half_credit, metrics.three_way_credit])
def test_no_threshold_earns_more_than_the_tuned_one(credit, rng):
    a, b = rng.integers(0, 8, size=(2, 300)) / 4
    label = np.where(np.abs(a - b + rng.normal(size=300)) < 0.7, 0.5, a - b + rng.normal(size=300) > 0)
    tuned = metrics.tuned_threshold(credit, a, b, label)
    earned = {limit: credit(a, b, label, limit).mean() for limit in np.arange(0, 2.3, 0.05)}
    assert credit(a, b, label, tuned).mean() == pytest.approx(max(earned.values()))
    assert tuned > 0
    assert metrics.tuned_threshold(credit, a, b, np.round(a > b)) == 0


def test_without_ties_the_conventions_agree(rng):
    prompts = np.repeat(np.arange(60), 4)
    margin, label = rng.normal(size=(2, 240))
    found = metrics.agreement(margin, np.zeros(240), expit(4 * label + margin), prompts)
    assert found.imagereward.value == found.hpsv2.value == found.hpsv2_inversion.value
    zero = np.zeros(240)
    assert found.imagereward.value == metrics.half_credit(margin, zero, expit(4 * label + margin)).mean()
    assert found.balanced.value == pytest.approx(metrics.balanced_accuracy(margin, zero, expit(4 * label + margin)))
    for estimate in (found.imagereward, found.hpsv2, found.pickscore, found.acc23, found.balanced):
        assert estimate.interval[0] < estimate.value < estimate.interval[1]


def test_a_threshold_is_not_tuned_on_the_pairs_it_is_tried_on(rng):
    prompts = np.arange(100)
    first = intervals.halves(prompts)
    assert first.sum() == 50
    # Ties have margins below 1 in one half of the prompts and none in the other.
    margin = np.where(first, rng.uniform(0, 2, size=100), rng.uniform(1, 2, size=100))
    label = np.where(first & (margin < 1), 0.5, 1.0)
    limits = metrics.cross_fitted_threshold(metrics.three_way_credit, margin, np.zeros(100), label, prompts)
    assert (limits[first] == 0).all()
    assert 0.9 < limits[~first].min() == limits[~first].max() < 1


def test_pairs_without_a_reward_are_left_out():
    prompts = np.arange(60)
    margin = np.where(prompts < 10, np.nan, 1.0)
    found = metrics.agreement(margin, np.zeros(60), np.ones(60), prompts)
    assert (found.imagereward.value, found.imagereward.count, found.imagereward.prompts) == (1.0, 50, 50)
    assert found.imagereward.interval == metrics.wilson_interval(50, 50)
    assert found.balanced.value is None


def test_too_few_prompts_have_no_interval_and_say_so(rng):
    for prompts in (49, 50):
        found = metrics.mean(rng.random(3 * prompts), np.repeat(np.arange(prompts), 3))
        assert (found.interval is None) == (prompts < 50)
        assert found.note == ("no interval: 49 prompts, and it takes 50" if prompts < 50 else "")
    assert metrics.share(np.ones(10), np.arange(10)).interval is None
    assert metrics.mean([math.nan], ["a"]).note == "nothing to measure it on"


def test_macro_counts_prompts_and_micro_pairs(rng):
    sizes = rng.integers(1, 9, size=80)
    prompts, values = np.repeat(np.arange(80), sizes), rng.random(sizes.sum())
    values[0] = math.nan
    by_prompt = [values[prompts == k] for k in range(80)]
    macro = metrics.prompt_share(values, prompts)
    assert macro.value == pytest.approx(
        np.nanmean([np.nanmean(part) if len(part) > 1 else part[0] for part in by_prompt])
    )
    assert metrics.mean(values, prompts).value == pytest.approx(np.nanmean(values))
    assert (macro.count, macro.prompts) == (sizes.sum() - 1, 80 - (sizes[0] == 1))


def test_the_interval_of_a_ratio_is_that_of_its_resampled_sums(rng):
    prompts, columns = np.repeat(np.arange(70), 2), rng.random((140, 2))
    found = metrics.estimate(columns, prompts, lambda sums: sums[..., 0] / sums[..., 1])
    ratios = []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(prompts == k) for k in rng.integers(70, size=70)])
        ratios.append(columns[rows, 0].sum() / columns[rows, 1].sum())
    assert found.interval == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.015)


@pytest.mark.parametrize(("ours", "theirs"), [("spearman", scipy.stats.spearmanr), ("kendall", scipy.stats.kendalltau)])
def test_rank_correlations_are_scipys(ours, theirs, rng):
    prompts = rng.permutation(np.repeat(np.arange(60), rng.integers(2, 7, size=60)))
    x = rng.integers(0, 5, size=len(prompts)).astype(float)
    y = np.round(x + rng.normal(size=len(prompts)))
    y[3] = math.nan
    known = np.isfinite(y)
    groups = [known & (prompts == k) for k in range(60)]
    alone = [theirs(x[rows], y[rows]).statistic for rows in groups if len(set(x[rows])) > 1 and len(set(y[rows])) > 1]
    found = getattr(metrics, ours)(x, y, prompts)
    assert found.value == pytest.approx(np.mean(alone))
    assert found.prompts == len(alone)
    pooled = getattr(metrics, f"pooled_{ours}")(x, y, prompts)
    assert pooled.value == pytest.approx(theirs(x[known], y[known]).statistic)
    assert (pooled.count, pooled.prompts) == (known.sum(), 60)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("pooled_spearman", scipy.stats.spearmanr), ("pooled_kendall", scipy.stats.kendalltau)]
)
def test_pooled_intervals_are_those_of_drawing_prompts(ours, theirs, rng):
    prompts = np.repeat(np.arange(60), 3)
    x = rng.normal(size=60)[prompts] + rng.normal(size=180)
    y = x + rng.normal(size=180)
    drawn = [np.concatenate([np.arange(3 * k, 3 * k + 3) for k in rng.integers(60, size=60)]) for _ in range(400)]
    literal = np.quantile([theirs(x[rows], y[rows]).statistic for rows in drawn], [0.025, 0.975])
    assert getattr(metrics, ours)(x, y, prompts).interval == pytest.approx(literal, abs=0.03)


def test_a_weight_is_a_number_of_copies(rng):
    x, y = rng.integers(0, 6, size=(2, 40)).astype(float)
    weights = rng.integers(0, 4, size=(3, 40))
    found = correlation._weighted_spearman(x, y, weights.astype(float))
    for rho, copies in zip(found, weights, strict=True):
        assert rho == pytest.approx(scipy.stats.spearmanr(np.repeat(x, copies), np.repeat(y, copies)).statistic)


def test_partial_correlation_is_that_of_residuals(rng):
    prompts = np.repeat(np.arange(80), 4)
    content = rng.normal(size=80)[prompts] * 5
    gold = rng.normal(size=320) + content
    x, y = gold + rng.normal(size=320), gold + rng.normal(size=320)

    def within(score):
        return score - np.array([score[prompts == k].mean() for k in range(80)])[prompts]

    def residual(score):
        control = within(gold)
        return within(score) - control * (control @ within(score)) / (control @ control)

    assert metrics.partial_correlation(x, y, prompts).value == pytest.approx(
        scipy.stats.pearsonr(within(x), within(y)).statistic
    )
    given = metrics.partial_correlation(x, y, prompts, [gold])
    assert given.value == pytest.approx(scipy.stats.pearsonr(residual(x), residual(y)).statistic)
    assert given.interval[0] < 0 < given.interval[1]
    assert metrics.partial_correlation(x, y, prompts).interval[0] > 0.3


def test_correlation_within_prompts_does_not_see_what_prompts_ask_for(rng):
    prompts = np.repeat(np.arange(100), 3)
    content = rng.normal(size=100)[prompts] * 10
    found = metrics.partial_correlation(content + rng.normal(size=300), content + rng.normal(size=300), prompts)
    assert found.interval[0] < 0 < found.interval[1]
    constant = metrics.partial_correlation(content, rng.normal(size=300), prompts)
    assert constant.value is None
    assert metrics.partial_correlation(content, rng.normal(size=300), np.arange(300)).count == 0


def test_nothing_is_left_of_a_score_given_itself(rng):
    prompts = np.repeat(np.arange(60), 3)
    x, y = rng.normal(size=(2, 180))
    assert metrics.partial_correlation(x, y, prompts, [x]).value is None


def test_best_of_is_the_mean_over_all_subsets(rng):
    prompts = np.repeat(["a", "b", "c"], [6, 5, 3])
    reward, gold = rng.integers(0, 4, size=(2, 14)).astype(float)
    shares = []
    for name in ("a", "b"):
        credits = []
        for subset in itertools.combinations(np.flatnonzero(prompts == name), 4):
            rows = np.array(subset)
            top = rows[reward[rows] == reward[rows].max()]
            credits.append((gold[top] == gold[rows].max()).mean())
        shares.append(np.mean(credits))
    found = metrics.best_of(reward, gold, prompts)
    assert found.value == pytest.approx(np.mean(shares))
    assert (found.count, found.prompts) == (2, 2)
    assert metrics.best_of(gold, gold, prompts).value == 1


def test_a_win_and_a_tie_are_one_and_a_half():
    assert metrics.win_rate([1.0, 1.0, 0.0, math.nan], [0.0, 1.0, 2.0, 1.0], list("abcd")).value == 0.5
    assert metrics.win_rate([1.0, 1.0], [0.0, 1.0], list("ab")).value == 0.75


def test_nobody_beats_the_ceiling_of_the_labels(rng):
    label = rng.random(4000)
    drawn = (rng.random(4000) < label).astype(float)
    ceiling = metrics.label_ceiling(label, np.arange(4000))
    assert ceiling.value == pytest.approx(metrics.pairwise_accuracy(label, np.full(4000, 0.5), drawn), abs=0.02)


def test_auc_is_scikit_learns(rng):
    positive = rng.random(200) < 0.4
    score = np.round(rng.normal(size=200) + positive, 1)
    found = metrics.auc(score, positive, np.arange(200))
    assert found.value == pytest.approx(roc_auc_score(positive, score))
    assert found.interval[0] < found.value < found.interval[1]


def test_a_temperature_mends_what_is_too_sure(rng):
    prompts = np.repeat(np.arange(500), 4)
    margin = rng.normal(size=2000)
    label = (rng.random(2000) < expit(margin)).astype(float)
    found = metrics.calibration(3 * margin, label, prompts)
    assert found.temperature.interval[0] < 3 < found.temperature.interval[1]
    assert found.after.nll.value < found.before.nll.value
    assert found.after.brier.value < found.before.brier.value
    assert found.after.ece.value < 0.04 < found.before.ece.value
    assert found.before.nll.value == pytest.approx(metrics.nll(expit(3 * margin), label))
    assert found.before.brier.value == pytest.approx(metrics.brier(expit(3 * margin), label))
    assert found.before.ece.value == pytest.approx(metrics.ece(expit(3 * margin), label))


def test_where_no_temperature_fits_the_calibration_says_why():
    prompts = np.arange(60)
    margin = np.where(prompts % 2, 1.0, -1.0)
    found = metrics.calibration(margin, (margin < 0).astype(float), prompts)
    assert found.after is None
    assert found.temperature.value is None
    assert found.note.startswith("labels:")


def test_a_calibrated_reward_is_as_accurate_as_its_margins_claim(rng):
    prompts = np.repeat(np.arange(1000), 4)
    margin = 2 * rng.normal(size=4000)
    label = (rng.random(4000) < expit(margin)).astype(float)
    bins = metrics.accuracy_by_margin(margin, label, prompts, 5)
    assert [found.accuracy.count for found in bins] == [800] * 5
    for found in bins:
        assert found.low < found.high
        assert abs(found.claimed - found.accuracy.value) < 0.06
    assert bins[-1].accuracy.value > bins[0].accuracy.value + 0.3


def test_a_sigma_that_knows_its_errors_is_told_from_one_that_does_not(rng):
    prompts = np.arange(3000)
    sigma = rng.uniform(0.2, 3, size=3000)
    margin = rng.normal(size=3000)
    label = (margin + sigma * rng.normal(size=3000) > 0).astype(float)
    found = metrics.uncertainty(margin, sigma, label, prompts)
    assert found.auc.interval[0] > 0.55
    assert all(abs(one.claimed - one.error.value) < 0.08 for one in found.bins)
    guessed = metrics.uncertainty(margin, rng.permutation(sigma), label, prompts)
    assert guessed.auc.interval[0] < 0.5 < guessed.auc.interval[1]


def test_slices_cover_every_combination_once(rng):
    columns = {"model": ["x", "y", "x", "y", "x"], "skill": ["one", "one", "two", "two", "one"]}
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = metrics.sliced(columns, lambda rows: metrics.mean(values[rows], rows))
    assert {one.columns: one.estimate.value for one in found} == {
        (("model", "x"), ("skill", "one")): 3.0,
        (("model", "x"), ("skill", "two")): 3.0,
        (("model", "y"), ("skill", "one")): 2.0,
        (("model", "y"), ("skill", "two")): 4.0,
    }
    assert len(metrics.sliced(columns, lambda rows: metrics.mean(values[rows], rows), least=2)) == 1
    with pytest.raises(ValueError, match=r"columns: of different lengths \(a 1, b 2\)"):
        metrics.sliced({"a": [1], "b": [1, 2]}, lambda rows: metrics.mean(values[rows], rows))


def test_what_prompts_and_pairs_are_sliced_by():
    assert metrics.generator_pair(["sana", "flux"], ["flux", "sana"]) == ["flux / sana"] * 2
    assert metrics.same_model(["a", "a"], ["a", "b"]) == ["same", "cross"]
    assert metrics.length(["a cat", "one two three four five six", "a " * 41]) == [
        "01-05 words",
        "06-10 words",
        "41 words or more",
    ]
    assert metrics.truncated([False, True]) == ["whole", "cut"]
    prompts = ["a cat without a hat", "It isn't red", "No dogs", "a knot in a notebook"]
    assert metrics.negation(prompts) == ["negated", "negated", "negated", "plain"]


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
