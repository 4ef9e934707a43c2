import dataclasses
import math
import random
from collections import defaultdict

import pytest

from rewards.preferences import Pair, Rule, Scored, pairs


def image(prompt: int, sample: int, margin: float, valid: bool = True, text: str | None = None) -> Scored:
    return Scored(f"p{prompt}", text or f"prompt {prompt}", "colours", sample, margin, valid)


def make(scored: list[Scored], heldout: float = 0.2, near: float = 0.7, **changes) -> list[Pair]:
    return pairs(scored, Rule(**{"min_gap": 0.0, **changes}), "j", "t", heldout, near)


def samples(made: list[Pair]) -> set[tuple[str, frozenset[int]]]:
    return {(pair.prompt_id, frozenset((pair.sample_a, pair.sample_b))) for pair in made}


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
    assert len(samples(made)) == len(made)


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
    for number in range(20):
        entries = [
            image(prompt, sample, sample, text=f"{text.strip()} {number}")
            for prompt, text in enumerate(("a cup", "A  cup", "a\tCUP"))
            for sample in (0, 1)
        ]
        assert len({pair.split for pair in make(entries, heldout=0.5)}) == 1


def test_near_duplicates_share_their_split_and_others_need_not():
    long = "an old fisherman mending nets by the harbour at dawn, oil on canvas, muted colours, soft light"
    for number in range(20):
        texts = [f"{long}, series {number}", f"{long}, detailed, series {number}"]
        entries = [image(prompt, sample, sample, text=texts[prompt]) for prompt in (0, 1) for sample in (0, 1)]
        assert len({pair.split for pair in make(entries, heldout=0.5)}) == 1
    apart = [image(number, sample, sample, text=f"a {number} cup") for number in range(20) for sample in (0, 1)]
    assert len({pair.split for pair in make(apart, heldout=0.5)}) == 2


def test_margin_takes_the_widest_of_each_prompt(scored):
    one = make(scored, strategy="margin", per_prompt=1)
    assert samples(one) == samples(make(scored, strategy="best_vs_worst"))
    assert samples(make(scored, strategy="margin", per_prompt=15)) == samples(make(scored))
    certainty = {key: abs(label - 0.5) for key, label in keyed(make(scored)).items()}
    taken = samples(make(scored, strategy="margin", per_prompt=3))
    for prompt in {key[0] for key in taken}:
        left = [certainty[key] for key in certainty if key[0] == prompt and key not in taken]
        kept = [certainty[key] for key in taken if key[0] == prompt]
        assert len(kept) == min(3, len(kept) + len(left))
        assert not left or max(left) <= min(kept)


def keyed(made: list[Pair]) -> dict[tuple[str, frozenset[int]], float]:
    return {(pair.prompt_id, frozenset((pair.sample_a, pair.sample_b))): pair.label for pair in made}


def test_uncertainty_takes_the_closest_of_one_judge(scored):
    labels = keyed(make(scored))
    taken = samples(make(scored, strategy="uncertainty", per_prompt=1))
    assert {key[0] for key in taken} == {key[0] for key in labels}
    for key in taken:
        assert abs(labels[key] - 0.5) == min(abs(labels[other] - 0.5) for other in labels if other[0] == key[0])


def test_uncertainty_takes_what_several_judges_disagree_on():
    """Far apart but disputed is less certain than close and agreed on."""
    entries = [image(0, 0, 0.0), image(0, 1, 0.2), image(0, 2, 3.0)]
    agreed = [dataclasses.replace(entry, disagreement=0.01) for entry in entries]
    disputed = [*agreed[:2], dataclasses.replace(entries[2], disagreement=5.0)]
    settings = {"strategy": "uncertainty", "per_prompt": 1}
    assert samples(make(agreed, **settings)) == {("p0", frozenset((0, 1)))}
    assert samples(make(disputed, **settings)) == {("p0", frozenset((1, 2)))}
    unanimous = [dataclasses.replace(entry, disagreement=0.0) for entry in [*entries, image(0, 3, 3.0)]]
    assert samples(make(unanimous, **settings)) == {("p0", frozenset((2, 3)))}


def test_gaps_are_bounded_on_both_sides():
    entries = [image(0, sample, margin) for sample, margin in enumerate((0.0, 0.4, 1.0, 4.0))]
    made = make(entries, min_gap=0.5, max_gap=3.0)
    assert samples(made) == {("p0", frozenset(pair)) for pair in ((0, 2), (1, 2), (2, 3))}


def test_ties_are_kept_as_ties_below_the_least_gap():
    entries = [image(0, sample, margin) for sample, margin in enumerate((0.0, 0.1, 0.5, 2.0))]
    labels = keyed(make(entries, min_gap=1.0, tie=0.2))
    assert {key: label for key, label in labels.items() if label == 0.5} == {("p0", frozenset((0, 1))): 0.5}
    assert labels.keys() == samples(make(entries, min_gap=1.0)) | {("p0", frozenset((0, 1)))}


@pytest.mark.parametrize("strategy", ["all", "best_vs_worst", "margin", "uncertainty"])
@pytest.mark.parametrize("images", [2, 3, 6])
def test_a_prompt_gives_as_many_pairs_as_the_rule_says(strategy, images):
    rule = {"strategy": strategy, "per_prompt": 4 if strategy in ("margin", "uncertainty") else None}
    entries = [image(0, sample, float(sample)) for sample in range(images)]
    assert len(make(entries, **rule)) == Rule(**rule).most(images)


def test_nothing_is_held_out_at_zero(scored):
    assert {pair.split for pair in make(scored, heldout=0.0)} == {"train"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("strategy", "some"),
        ("temperature", 0.0),
        ("temperature", math.nan),
        ("min_gap", -1.0),
        ("max_gap", -1.0),
        ("max_gap", math.inf),
        ("tie", -0.1),
        ("per_prompt", 3),
        ("near", 0.0),
        ("heldout", 1.0),
        ("heldout", -0.1),
    ],
)
def test_settings_out_of_range_are_named(scored, field, value):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        make(scored, **{field: value})


def test_a_strategy_that_takes_some_is_told_how_many(scored):
    with pytest.raises(ValueError, match=r"^per_prompt: 'margin' takes"):
        make(scored, strategy="margin")


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
