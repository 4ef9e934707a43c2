import itertools
import math

import numpy as np
import pytest

from rewards.overoptimisation import best_of_n, chosen, fit, kl_of_best_of_n, over_training


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def hackable(rng: np.random.Generator, prompts: int, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Proxy, gold and prompts of images: gold falls where the proxy's own part is large."""
    quality, trick = rng.normal(size=(2, prompts * images))
    return quality + trick, quality - 0.35 * trick**2 * (trick > 0), np.repeat(np.arange(prompts), images)


def test_the_kl_of_best_of_n_is_that_of_the_largest_of_n_uniforms():
    x = (np.arange(100_000) + 0.5) / 100_000
    for n in (2, 4, 16):
        density = n * x ** (n - 1)
        assert kl_of_best_of_n(n) == pytest.approx(np.mean(density * np.log(density)), abs=1e-4)
    assert kl_of_best_of_n(1) == 0


@pytest.mark.parametrize("proxy", [[3.0, 1.0, 2.0, 5.0, 4.0], [1.0, 1.0, 0.0, 2.0, 2.0], [0.0] * 5])
def test_chances_are_those_of_all_subsets(proxy):
    sizes = [1, 2, 3, 5]
    expected = np.zeros((4, 5))
    for row, n in zip(expected, sizes, strict=True):
        subsets = list(itertools.combinations(range(5), n))
        for subset in subsets:
            best = [i for i in subset if proxy[i] == max(proxy[j] for j in subset)]
            row[best] += 1 / len(best) / len(subsets)
    np.testing.assert_allclose(chosen(np.array(proxy), sizes), expected, atol=1e-12)


def test_the_estimate_is_unbiased_and_steadier_than_one_draw(rng):
    """The mean of the largest of 4 of 8 normal samples is the expected largest of 4."""
    samples = rng.normal(size=(2000, 8))
    found = [float(chosen(row, [4])[0] @ row) for row in samples]
    first_four = samples[:, :4].max(axis=1)
    assert np.mean(found) == pytest.approx(1.02938, abs=0.03)
    assert np.std(found) < 0.9 * np.std(first_four)


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_a_fit_recovers_the_curve_that_it_was_given(form, rng):
    alpha, beta = 2.0, 0.5
    d = np.linspace(0, 4, 9)
    bend = d if form == "best_of_n" else np.log(np.where(d > 0, d, 1))
    curve = d * (alpha - beta * bend)
    prompts = np.repeat(np.arange(80), len(d))
    level = rng.normal(1, 0.05, size=80)[prompts]
    found = fit(np.tile(d, 80), level * np.tile(curve, 80), prompts, form)
    assert found.alpha.value == pytest.approx(alpha * level[:: len(d)].mean())
    assert found.beta.value == pytest.approx(beta * level[:: len(d)].mean())
    fine = np.linspace(0.01, 25, 250_001)
    gold = fine * (alpha - beta * (fine if form == "best_of_n" else np.log(fine)))
    assert found.peak.value == pytest.approx(fine[gold.argmax()], abs=1e-3)
    assert found.best.value == pytest.approx(gold.max() * level[:: len(d)].mean(), rel=1e-4)


def test_gold_peaks_where_the_proxy_goes_on(rng):
    proxy, gold, prompts = hackable(rng, 200, 64)
    found = best_of_n(proxy, gold, prompts)
    assert [point.n for point in found.points] == [1, 2, 4, 8, 16, 32, 64]
    assert found.points[0].proxy.value == found.points[0].gold.value == found.points[0].kl == 0
    gains = [point.proxy.value for point in found.points]
    assert gains == sorted(gains)
    measured = found.points[int(np.argmax([point.gold.value for point in found.points]))].distance
    assert found.gold.peak.value == pytest.approx(measured, abs=0.4)
    assert found.gold.stop == found.gold.peak.interval[0] < found.gold.peak.value
    assert found.gold.note == ""
    assert "beyond the farthest distance measured" in found.proxy.note or found.proxy.stop is None


def test_the_interval_of_the_peak_covers_it(rng):
    d = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    hits = 0
    for _ in range(60):
        slope = rng.normal(2, 1, size=(70, 1))
        gain = d * (slope - 0.6 * d) + rng.normal(0, 0.5, size=(70, 6)) * (d > 0)
        low, high = fit(np.tile(d, 70), gain.ravel(), np.repeat(np.arange(70), 6), "best_of_n").peak.interval
        hits += low <= 2 / 1.2 <= high
    assert 52 <= hits < 60


def test_a_curve_that_only_rises_has_no_peak_and_says_so(rng):
    quality = rng.normal(size=60 * 8)
    d = np.tile(np.sqrt(kl_of_best_of_n([1, 2, 4, 8])), 60)
    found = fit(d, d + rng.normal(0, 0.5, size=240), np.repeat(np.arange(60), 4), "best_of_n")
    assert found.peak.value is found.stop is None
    assert found.note.startswith("beta is not determined: its interval")
    few = best_of_n(quality, quality, np.repeat(np.arange(30), 16))
    assert few.gold.note == "beta is not determined: no interval: 30 prompts, and it takes 50"
    assert few.gold.beta.value is not None


def test_a_curve_that_bends_upwards_is_told_from_one_that_is_not_determined(rng):
    d = np.tile([0.0, 1.0, 2.0, 3.0], 60)
    found = fit(d, d**2 + rng.normal(0, 0.1, size=240), np.repeat(np.arange(60), 4), "best_of_n")
    assert found.beta.interval[1] < 0
    assert found.note == "beta is below 0: no sign of a peak within the distances measured"


def test_a_peak_beyond_what_was_measured_is_no_place_to_stop(rng):
    d = np.tile([0.0, 0.5, 1.0, 1.5], 60)
    gain = d * (4 - d) + rng.normal(0, 0.02, size=240)
    found = fit(d, gain, np.repeat(np.arange(60), 4), "best_of_n")
    assert found.peak.value == pytest.approx(2, abs=0.1)
    assert found.stop == 1.5
    assert "measure farther" in found.note


def test_a_run_is_fitted_over_its_checkpoints(rng):
    kl = np.repeat([0.0, 1.0, 4.0, 9.0, 16.0, 25.0], 60)
    prompts = np.tile(np.arange(60), 6)
    d = np.sqrt(kl)
    gold = d * (1.5 - np.log(np.where(d > 0, d, 1))) + rng.normal(0, 0.1, size=360)
    found = over_training(kl, d, gold, prompts)
    assert [point.kl for point in found.points] == [0, 1, 4, 9, 16, 25]
    assert all(point.n is None and point.gold.count == 60 for point in found.points)
    assert found.gold.form == "rl"
    assert found.gold.peak.interval[0] < math.exp(0.5) < found.gold.peak.interval[1]


def test_what_cannot_be_measured_is_refused(rng):
    with pytest.raises(ValueError, match="sizes: the best of 8, but prompt 'b' has 2 images; sample more"):
        best_of_n(np.arange(10.0), np.arange(10.0), ["a"] * 8 + ["b"] * 2, [8])
    with pytest.raises(ValueError, match=r"sizes: \[1, 2\] has no two values above 1; sample 4 images"):
        best_of_n(np.arange(4.0), np.arange(4.0), ["a", "a", "b", "b"])
    with pytest.raises(ValueError, match="distance: alpha and beta take two distances above 0"):
        over_training(np.arange(2.0), np.arange(2.0), np.arange(2.0), ["a", "b"])
    with pytest.raises(ValueError, match="proxy: no image has both"):
        best_of_n([math.nan], [1.0], ["a"])
