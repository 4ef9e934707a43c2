"""Guidance has the weight of its schedule, and asks for no more than it needs."""

import pytest
import torch

from models.adapters.options import Options
from models.generator import Conditioning
from models.guidance import Guidance, guided
from models.loading import load_generator

TIMES = (torch.arange(1000) + 0.5) / 1000


class Network:
    """Predicts something of all it is told, and remembers with how many rows it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, x_t, t, cond):
        self.asked.append(len(x_t))
        times = torch.as_tensor(t, dtype=x_t.dtype).expand(len(x_t))
        return torch.sin(x_t * cond.tokens[:, 0] + times[:, None]) + cond.more["pooled"]


@pytest.fixture
def told():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, generator=random)
    conds = [Conditioning(torch.randn(4, 1, 3, generator=random), {"pooled": torch.randn(4, 3, generator=random)})]
    return x, conds[0], conds[0].map(lambda values: -2 * values)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_scale_is_the_mean_weight(schedule):
    guidance = Guidance(5.0, schedule)
    weights = torch.as_tensor(guidance.at(TIMES))
    assert weights.mean().item() == pytest.approx(5.0, rel=1e-4)
    if schedule != "constant":
        assert guidance.at(1.0) == pytest.approx(1.0)
        assert (weights[1:] < weights[:-1]).all()
        assert guidance.at(0.0) == pytest.approx(9.0)


def test_an_interval_guides_within_and_a_clamp_holds_a_least_weight():
    interval = Guidance(4.0, "interval", low=0.25, high=0.75)
    assert [interval.at(t) for t in (0.2, 0.25, 0.5, 0.75, 0.8)] == [1, 4, 4, 4, 1]
    linear, clamped = Guidance(4.0, "linear"), Guidance(4.0, "clamp-linear", least=2.5)
    torch.testing.assert_close(clamped.at(TIMES), linear.at(TIMES).clamp(min=2.5))
    assert clamped.at(1.0) == 2.5


def test_guided_is_the_formula_in_one_pass(told):
    x, cond, negative = told
    network = Network()
    found = guided(network, x, 0.3, cond, negative, 3.5)
    assert network.asked == [8]
    positive, other = (Network()(x, 0.3, each) for each in (cond, negative))
    torch.testing.assert_close(found, other + 3.5 * (positive - other))


def test_no_second_pass_where_the_weight_is_one(told):
    x, cond, negative = told
    network = Network()
    assert torch.equal(guided(network, x, 0.3, cond, negative, 1.0), network(x, 0.3, cond))
    assert torch.equal(guided(network, x, 0.3, cond, negative, torch.ones(4)), network(x, 0.3, cond))
    assert network.asked == [4] * 4


def test_rows_have_times_and_weights_of_their_own(told):
    x, cond, negative = told
    t, guidance, network = torch.tensor([0.1, 0.4, 0.6, 0.9]), Guidance(3.0, "interval", low=0.3, high=0.7), Network()
    found = guided(network, x, t, cond, negative, guidance.at(t))
    assert network.asked == [6]
    alone = [
        guided(network, x[[row]], float(t[row]), cond[[row]], negative[[row]], guidance.at(float(t[row])))
        for row in range(4)
    ]
    torch.testing.assert_close(found, torch.cat(alone))


def test_what_a_family_adjusts_sees_the_guided_and_the_positive(told):
    x, cond, negative = told

    def to_norm(moved, positive):
        return moved * positive.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)

    found = guided(Network(), x, 0.3, cond, negative, 3.0, to_norm)
    plain = guided(Network(), x, 0.3, cond, negative, 3.0)
    torch.testing.assert_close(found.norm(dim=1), Network()(x, 0.3, cond).norm(dim=1))
    torch.testing.assert_close(found / found.norm(dim=1, keepdim=True), plain / plain.norm(dim=1, keepdim=True))


@torch.no_grad()
def test_a_generator_of_ours_is_guided_away_from_its_negative_prompt(generator_folder):
    plain = load_generator(generator_folder)
    moved = load_generator(generator_folder, options=Options(guidance=Guidance(3.0), negative="a blue cross"))
    unmoved = load_generator(generator_folder, options=Options(negative="a blue cross"))
    empty = load_generator(generator_folder, options=Options(guidance=Guidance(3.0)))
    x = torch.randn(2, *plain.latent_shape, generator=torch.Generator().manual_seed(0))
    cond, negative = plain.encode(["a red ring", "red"]), plain.encode(["a blue cross"] * 2)
    t = torch.tensor([0.9, 0.4])
    positive, other = plain.predict(x, t, cond), plain.predict(x, t, negative)
    torch.testing.assert_close(moved.predict(x, t, cond), other + 3 * (positive - other), atol=1e-4, rtol=1e-4)
    assert torch.equal(unmoved.predict(x, t, cond), positive)
    assert empty.predict(x, t, cond).isfinite().all()


@torch.no_grad()
def test_a_negative_prompt_is_encoded_once_and_as_others_are(generator_folder):
    guided_one = load_generator(generator_folder, options=Options(guidance=Guidance(3.0), negative="a blue cross"))
    asked = []
    guided_one.text_encoder.register_forward_hook(lambda *_: asked.append(torch.is_autocast_enabled("cpu")))
    x, cond = torch.zeros(2, *guided_one.latent_shape), guided_one.encode(["a red ring", "red"])
    with torch.autocast("cpu", torch.bfloat16):
        for t in (0.9, 0.4):
            guided_one.predict(x, t, cond)
    assert asked == [False, False]  # the positive prompts, and the negative one
    kept = guided_one.encode_negative()
    assert torch.equal(kept.tokens, guided_one.encode(["a blue cross"]).tokens)
    guided_one.negative = "a green dot"
    guided_one.predict(x, 0.9, cond)
    assert torch.equal(guided_one.encode_negative().tokens, guided_one.encode(["a green dot"]).tokens)


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("scale", {"scale": 0.5}),
        ("scale", {"scale": float("nan")}),
        ("schedule", {"schedule": "square"}),
        ("low", {"low": 0.6, "high": 0.4}),
        ("least", {"scale": 2.0, "least": 3.0}),
    ],
)
def test_what_is_out_of_range_is_told_by_name(field, settings):
    with pytest.raises(ValueError, match=f"^{field}: "):
        Guidance(**settings)
