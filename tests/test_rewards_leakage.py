import io
import itertools
import random

import numpy as np
import pytest
from PIL import Image

from rewards.leakage import NEAR, Leakage, families, image_hash, leakage, near_pairs, normalised

WORDS = [f"word{number}" for number in range(12)]


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """300 prompts of 2 to 15 words, of which every second one changes some words of the one before."""
    rng = random.Random(0)
    found = []
    for _ in range(150):
        words = rng.choices(WORDS, k=rng.randint(2, 15))
        found.append(" ".join(words))
        changed = [rng.choice(WORDS) if rng.random() < 0.05 else word for word in words]
        found.append(" ".join(changed))
    return found


def picture(seed: int, size: int = 96) -> np.ndarray:
    """A picture with coarse structure, as photographs have: uint8 (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


def saved_again(image: np.ndarray, size: int, quality: int) -> np.ndarray:
    with io.BytesIO() as file:
        Image.fromarray(image).resize((size, size)).save(file, "JPEG", quality=quality)
        return np.asarray(Image.open(file))


def jaccard(first: str, second: str) -> float:
    a, b = ({*itertools.pairwise(["^", *text.split(), "$"])} for text in (first, second))
    return len(a & b) / len(a | b)


def found(train: list[str], heldout: list[str], **changes) -> Leakage:
    return leakage(train, heldout, {}, {}, **changes)


@pytest.mark.parametrize("near", [0.3, 0.5, 0.6, 0.7, 0.8, 1.0])
def test_near_pairs_are_those_of_all_comparisons(prompts, near):
    places = itertools.combinations(range(len(prompts)), 2)
    wanted = {(i, j) for i, j in places if jaccard(prompts[i], prompts[j]) >= near - 1e-9}
    pairs = list(near_pairs(prompts, near))
    assert len(set(pairs)) == len(pairs)
    assert set(pairs) == wanted
    assert wanted


def test_families_are_closed_under_likeness(prompts):
    family = families(prompts, 0.6)
    for i, j in near_pairs(prompts, 0.6):
        assert family[prompts[i]] == family[prompts[j]]
    assert 1 < len(set(family.values())) < len(set(prompts))
    assert all(family[leader] == leader for leader in family.values())


def test_families_know_no_order_and_stay_when_strangers_come(prompts):
    family = families(prompts, 0.6)
    assert families(random.Random(1).sample(prompts, len(prompts)), 0.6) == family
    strangers = [f"nothing like it {number}" for number in range(50)]
    assert {prompt: leader for prompt, leader in families([*strangers, *prompts], 0.6).items() if prompt in family} == (
        family
    )


def test_spellings_are_one_family():
    spellings = ["A red Circle.", "a red  circle", " a RED circle ! ", "ａ red circle"]
    assert len({normalised(text) for text in spellings}) == 1
    assert len(set(families(spellings).values())) == 1


def test_one_word_of_a_short_prompt_tells_two_families():
    assert len(set(families(["a photo of a cat", "a photo of a car", "a photo of two cats"]).values())) == 3
    turned = ["a red cube left of a blue ball", "a blue ball left of a red cube"]
    assert len(set(families(turned).values())) == 2


def test_each_held_out_prompt_counts_once():
    long = "an old fisherman mending nets by the harbour at dawn, oil on canvas, muted colours"
    train = ["a cup", "a Fork", f"{long}, soft light"]
    report = found(train, ["a cup", "a fork.", f"{long}, hard light", "a spoon", "a cup"])
    assert (report.prompts, report.exact, report.normalised, report.near) == (4, 1, 1, 1)
    assert report.found
    assert {(example.kind, example.train) for example in report.examples} == {
        ("exact", "a cup"),
        ("normalised", "a Fork"),
        ("near", f"{long}, soft light"),
    }


def test_splits_by_family_do_not_leak(prompts):
    family = families(prompts)
    leaders = sorted(set(family.values()))
    held = set(leaders[::5])
    train = [prompt for prompt in prompts if family[prompt] not in held]
    heldout = [prompt for prompt in prompts if family[prompt] in held]
    assert not found(train, heldout).found
    assert found(prompts[::2], prompts[1::2], near=NEAR).found


def test_pictures_are_known_again_after_resizing_and_jpeg():
    pictures = [picture(seed) for seed in range(40)]
    train = {f"train {seed}": image_hash(image) for seed, image in enumerate(pictures[:30])}
    copies = [saved_again(image, 48, 60) for image in pictures[:10]]
    heldout = {"same": pictures[0].copy(), **{f"copy {k}": copy for k, copy in enumerate(copies)}}
    heldout |= {f"other {k}": image for k, image in enumerate(pictures[30:])}
    report = leakage([], [], train, {name: image_hash(image) for name, image in heldout.items()})
    assert (report.images, report.identical, report.similar) == (21, 1, 10)
    assert all(
        example.heldout.removeprefix("copy ") == example.train.removeprefix("train ")
        for example in report.examples
        if example.kind == "similar"
    )


@pytest.mark.parametrize("distance", [0, 1, 4, 9])
def test_like_hashes_are_those_of_all_comparisons(distance):
    rng = random.Random(0)
    base = [image_hash(picture(seed)) for seed in range(20)]
    train = {str(k): type(h)(f"t{k}", h.difference) for k, h in enumerate(base)}
    heldout = {}
    for k in range(200):
        bits = sum(1 << place for place in rng.sample(range(64), k % 12))
        heldout[str(k)] = type(base[0])(f"h{k}", rng.choice(base).difference ^ bits)
    near = sum(
        any((own.difference ^ known.difference).bit_count() <= distance for known in train.values())
        for own in heldout.values()
    )
    assert leakage([], [], train, heldout, distance=distance).similar == near > 0


def test_a_picture_is_hashed_with_its_shape():
    flat = np.zeros((4, 8, 3), dtype=np.uint8)
    assert image_hash(flat).pixels != image_hash(flat.reshape(8, 4, 3)).pixels
    assert not leakage([], [], {"a": image_hash(flat)}, {"b": image_hash(flat.reshape(8, 4, 3))}).found


def test_a_similarity_out_of_range_is_named():
    with pytest.raises(ValueError, match=r"^near: 1\.5 "):
        families(["a cup"], 1.5)
