import numpy as np
import pytest

from judges import probes
from rewards.reward import Rewards
from rewards.shortcuts import NAMES, effects, shortcuts, statistics, table


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def photo(rng) -> np.ndarray:
    """Smooth colours with some noise, 64 x 64."""
    y, x = np.mgrid[:64, :64] / 64
    waves = np.stack([np.sin(5 * x), np.cos(4 * y), np.sin(3 * x + 4 * y)], axis=-1)
    return np.clip(120 + 60 * waves + rng.normal(0, 6, size=(64, 64, 3)), 0, 255).astype(np.uint8)


def test_statistics_of_plain_colours():
    white = statistics(np.full((16, 16, 3), 255, np.uint8))
    assert (white.brightness, white.contrast, white.saturation) == pytest.approx((1, 0, 0), abs=1e-9)
    assert (white.edges, white.sharpness, white.blockiness) == pytest.approx((0, 0, 0), abs=1e-9)
    red = statistics(np.full((16, 16, 3), (255, 0, 0), np.uint8))
    assert (red.brightness, red.saturation) == pytest.approx((0.299, 1))
    assert statistics(np.zeros((1000, 500, 3), np.uint8)).megapixels == 0.5
    assert statistics(np.zeros((1, 1, 3), np.uint8)).edges == 0


def test_each_change_moves_its_statistic(photo):
    plain = statistics(photo)
    assert statistics(probes.brighter(photo, 1.2)).brightness > 1.1 * plain.brightness
    blurred = statistics(probes.coarser(photo, 4))
    assert blurred.sharpness < 0.5 * plain.sharpness
    assert blurred.edges < plain.edges
    grey = np.repeat(photo.mean(axis=-1, keepdims=True), 3, axis=-1).astype(np.uint8)
    assert statistics(grey).saturation == 0 < plain.saturation
    assert statistics(probes.jpeg(photo, 10)).blockiness > 1 > abs(plain.blockiness) + 0.5
    mirrored = statistics(probes.mirrored(photo))
    assert mirrored.brightness == pytest.approx(plain.brightness)


def test_a_reward_of_colours_is_found_out_and_an_honest_one_is_not(rng):
    prompts = np.repeat(np.arange(80), 4)
    images = rng.integers(60, 200, size=(80, 1, 1, 1, 3)) * rng.uniform(0.6, 1.2, size=(80, 4, 1, 1, 1))
    images = np.clip(images + rng.normal(0, 5, size=(80, 4, 12, 12, 3)), 0, 255).astype(np.uint8).reshape(-1, 12, 12, 3)
    found = table(images)
    gold = rng.normal(size=320)
    bright = found[:, NAMES.index("brightness")]
    gamed = {one.name: one for one in shortcuts(gold + 20 * bright, found, prompts, gold)}
    assert gamed["brightness"].correlation.interval[0] > 0.5
    assert gamed["brightness"].given_gold.value == pytest.approx(1)
    assert gamed["megapixels"].correlation.value is None
    honest = {one.name: one for one in shortcuts(gold + rng.normal(size=320), found, prompts, gold)}
    assert honest["brightness"].given_gold.interval[0] < 0 < honest["brightness"].given_gold.interval[1]


def test_what_gold_explains_is_no_shortcut(rng):
    prompts = np.repeat(np.arange(100), 4)
    sharp = rng.normal(size=400)
    gold = sharp + rng.normal(size=400)
    [found] = shortcuts(gold + rng.normal(size=400), sharp[:, None], prompts, gold, ["sharpness"])
    assert found.correlation.interval[0] > 0.2
    assert found.given_gold.interval[0] < 0 < found.given_gold.interval[1]


def test_changes_show_what_a_reward_looks_at(photo, rng):
    prompts = [f"a red square left of {k // 2}" for k in range(100)]
    images = [np.clip(photo + 1.0 * (k % 7), 0, 255).astype(np.uint8) for k in range(100)]
    asked: list[str] = []

    def brightness(shown, texts):
        asked.extend(texts)
        return Rewards.of([image.mean() / 100 for image in shown])

    found = {one.name: one for one in effects(brightness, images, prompts, probes.probes())}
    assert set(found) == {"blank", "wrong_image", "jpeg", "resolution", "brightness", "flip"}
    assert found["brightness"].shift.interval[0] > 0
    assert found["brightness"].fell.value == 0
    assert (found["flip"].shift.value, found["flip"].fell.value) == pytest.approx((0, 0.5))
    assert (found["wrong_image"].expects, found["wrong_image"].fell.value) == ("no", 0.5)
    assert "a red square right of 3" in asked


def test_the_unit_of_a_shift_is_the_spread_within_prompts(rng):
    prompts = [str(k // 4) for k in range(240)]
    values = np.repeat(rng.normal(0, 100, size=60), 4) + rng.normal(0, 2, size=240)
    images = [np.array([[[k, 0, 0]]], np.uint8) for k in range(240)]

    def reward(shown, texts):
        return Rewards.of([values[image[0, 0, 0]] + image[0, 0, 1] for image in shown])

    probe = probes.Probe("mark", "", "same", "all", "", picture=lambda image, prompt: image + np.uint8([0, 1, 0]))
    [found] = effects(reward, images, prompts, [probe])
    assert found.shift.value == pytest.approx(0.5, rel=0.1)
