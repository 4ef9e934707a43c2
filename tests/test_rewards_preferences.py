import dataclasses
import math
import random
from collections import defaultdict

import pytest

from rewards.preferences import Pair, Scored, normalised, pairs


def image(prompt: int, sample: int, margin: float, valid: bool = True, text: str | None = None) -> Scored:
    return Scored(f"p{prompt}", text or f"prompt {prompt}", "colours", sample, margin, valid)


def make(scored: list[Scored], **changes) -> list[Pair]:
    settings = {"strategy": "all", "temperature": 1.0, "min_gap": 0.0, "heldout": 0.2, **changes}
    return pairs(scored, judge="j", template="t", **settings)


@pytest.fixture
def scored() -> list[Scored]:
    """Between two and six images of each of 300 prompts, every tenth verdict invalid."""
    rng = random.Random(0)
    return [
        image(prompt, sample, rng.gauss(0, 2), valid=(prompt + sample) % 10 != 0)
        for prompt in range(300)
        for sample in range(2 + prompt % 5)
    ]


def test_label_is_the_sigmoid_of_the_margin_over_the_temperature(scored):
    margin = {(entry.prompt_id, entry.sample): entry.margin for entry in scored}
    for temperature in (0.5, 1.0, 4.0):
        for pair in make(scored, temperature=temperature):
            gap = margin[pair.prompt_id, pair.sample_a] - margin[pair.prompt_id, pair.sample_b]
            assert pair.label == pytest.approx(1 / (1 + math.exp(-gap / temperature)))


def test_temperature_goes_from_hard_labels_to_ties(scored):
    hard = make(scored, temperature=1e-5, min_gap=1e-3)
    assert all(min(pair.label, 1 - pair.label) < 1e-6 for pair in hard)
    assert all(pair.label == pytest.approx(0.5, abs=1e-5) for pair in make(scored, temperature=1e6))


def test_all_takes_every_pair_of_valid_images_once(scored):
    valid = defaultdict(int)
    for entry in scored:
        valid[entry.prompt_id] += entry.valid
    made = make(scored)
    assert len(made) == sum(count * (count - 1) // 2 for count in valid.values())
    assert len({(pair.prompt_id, frozenset((pair.sample_a, pair.sample_b))) for pair in made}) == len(made)


def test_best_vs_worst_is_one_pair_a_prompt_with_its_widest_gap(scored):
    widest = defaultdict(lambda: 0.5)
    for pair in make(scored):
        widest[pair.prompt_id] = max(widest[pair.prompt_id], pair.label, 1 - pair.label)
    made = make(scored, strategy="best_vs_worst")
    assert {pair.prompt_id: max(pair.label, 1 - pair.label) for pair in made} == dict(widest)


def test_invalid_verdicts_enter_no_pair_whatever_their_margin():
    invalid = [
        image(0, 1, math.nan, valid=False),
        image(0, 3, 9.0, valid=False),
        image(1, 0, 9.0, valid=False),
    ]
    made = make([image(0, 0, 1.0), image(0, 2, 2.0), *invalid])
    assert [{pair.sample_a, pair.sample_b} for pair in made] == [{0, 2}]


def test_gaps_below_the_least_are_dropped():
    entries = [image(0, 0, 0.0), image(0, 1, 0.4), image(0, 2, 1.0)]
    assert {frozenset((pair.sample_a, pair.sample_b)) for pair in make(entries, min_gap=0.5)} == {
        frozenset((0, 2)),
        frozenset((1, 2)),
    }
    assert len(make(entries, min_gap=1.0)) == 1


def test_weights_balance_prompts_within_a_split(scored):
    made = make(scored, min_gap=0.3)
    for split in ("train", "heldout"):
        totals = defaultdict(float)
        for pair in made:
            if pair.split == split:
                totals[pair.prompt_id] += pair.weight
        count = sum(pair.split == split for pair in made)
        assert sum(totals.values()) == pytest.approx(count)
        assert max(totals.values()) == pytest.approx(min(totals.values()))


def test_the_first_image_is_the_better_one_half_the_time(scored):
    labels = [pair.label > 0.5 for pair in make(scored)]
    assert 0.45 < sum(labels) / len(labels) < 0.55


def test_order_of_input_does_not_matter(scored):
    assert make(random.Random(1).sample(scored, len(scored))) == make(scored)


def test_split_has_its_share_and_stays_when_prompts_are_added(scored):
    split = {pair.prompt_id: pair.split for pair in make(scored)}
    assert 0.12 < sum(value == "heldout" for value in split.values()) / len(split) < 0.28
    fewer = make([entry for entry in scored if int(entry.prompt_id[1:]) % 3 == 0])
    assert all(split[pair.prompt_id] == pair.split for pair in fewer)


def test_spellings_of_one_prompt_share_its_split():
    spellings = ["A red Circle.", "a red  circle", " a RED circle ! "]
    assert len({normalised(text) for text in spellings}) == 1
    for number in range(20):
        entries = [
            image(prompt, sample, sample, text=f"{text.strip()} {number}")
            for prompt, text in enumerate(("a cup", "A  cup", "a\tCUP"))
            for sample in (0, 1)
        ]
        assert len({pair.split for pair in make(entries, heldout=0.5)}) == 1


def test_nothing_is_held_out_at_zero(scored):
    assert {pair.split for pair in make(scored, heldout=0.0)} == {"train"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("strategy", "some"),
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("min_gap", -1.0),
        ("heldout", 1.0),
        ("heldout", -0.1),
    ],
)
def test_settings_out_of_range_are_named(scored, field, value):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        make(scored, **{field: value})


@pytest.mark.parametrize(
    ("field", "changes"),
    [("margin", {"margin": math.inf}), ("sample", {"sample": 0}), ("prompt_id", {"prompt": "another"})],
)
def test_broken_rows_are_named(field, changes):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        make([image(0, 0, 1.0), dataclasses.replace(image(0, 1, 2.0), **changes)])


def test_pairs_weigh_by_the_certainty_of_both_verdicts(scored):
    rng = random.Random(1)
    sure = [dataclasses.replace(entry, certainty=rng.uniform(0.1, 3)) for entry in scored]
    certainty = {(entry.prompt_id, entry.sample): entry.certainty for entry in sure}
    plain, weighed = make(sure), make(sure, by_certainty=True)
    factors = defaultdict(set)
    for a, b in zip(plain, weighed, strict=True):
        mean = (certainty[b.prompt_id, b.sample_a] + certainty[b.prompt_id, b.sample_b]) / 2
        factors[b.split].add(round(b.weight / a.weight / mean, 9))
    assert all(len(found) == 1 for found in factors.values())
    for split in factors:
        weights = [pair.weight for pair in weighed if pair.split == split]
        assert sum(weights) == pytest.approx(len(weights))


def test_certainty_that_is_not_known_weighs_nothing(scored):
    with pytest.raises(ValueError, match=r"by_certainty: the verdict on sample \d of 'p\d+' does not tell"):
        make(scored, by_certainty=True)
