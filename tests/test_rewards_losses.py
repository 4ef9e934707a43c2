import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy import special, stats
from scipy.integrate import quad
from sklearn.metrics import log_loss, mean_squared_error
from torch import Tensor
from torch.autograd import gradcheck
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid
from torch.nn.functional import cross_entropy as torch_cross_entropy

from rewards.losses import (
    LOSSES,
    BradleyTerry,
    Davidson,
    Gaussian,
    PairLoss,
    Pointwise,
    RaoKupper,
    Scores,
    Thurstone,
    bradley_terry,
    make_loss,
)
from rewards.losses.gaussian import divergence, log_ndtr
from rewards.metrics import nll

EVERY = [
    BradleyTerry(),
    BradleyTerry(margin=0.7, smoothing=0.1),
    RaoKupper(),
    Davidson(reading="half"),
    Gaussian(),
    Gaussian(likelihood="sampled", samples=8),
    Thurstone(),
    Thurstone(objective="fidelity"),
    Pointwise(),
    Pointwise(error="huber", delta=0.3),
    Pointwise(error="bce", temperature=2.0),
]
every = pytest.mark.parametrize("loss", EVERY, ids=lambda loss: "-".join(map(str, list(asdict(loss).values())[:3])))


def drawn(shape: tuple[int, ...], seed: int = 0, uniform: bool = False) -> Tensor:
    draw = torch.rand if uniform else torch.randn
    return draw(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scored(mean: Tensor, seed: int = 3) -> Scores:
    """Scores of these means and any standard deviation and noise."""
    return Scores(mean, drawn(mean.shape, seed).to(mean) / 2, drawn(mean.shape, seed + 1, uniform=True).to(mean))


def labels_for(loss: PairLoss, count: int) -> Tensor:
    """Soft labels, or for regression numbers of both images."""
    return drawn((count, 2) if isinstance(loss, Pointwise) else (count,), 9, uniform=True)


def swapped(loss: PairLoss, target: Tensor) -> Tensor:
    return target.flip(1) if isinstance(loss, Pointwise) else 1 - target


def minimise(value, *parameters: Tensor) -> None:
    optimizer = torch.optim.LBFGS(parameters, max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = value()
        found.backward()
        return found

    optimizer.step(closure)


@pytest.fixture
def rewards() -> tuple[Tensor, Tensor]:
    return tuple(drawn((2, 64)) * 3)


def test_is_binary_cross_entropy_of_the_margin(rewards):
    a, b = rewards
    label, weight = drawn((2, 64), 1, uniform=True)
    expected = binary_cross_entropy_with_logits(a - b, label, reduction="none")
    torch.testing.assert_close(bradley_terry(a, b, label), expected.mean())
    torch.testing.assert_close(bradley_terry(a, b, label, weight), (weight * expected).sum() / weight.sum())


def test_hard_labels_give_the_loss_of_imagereward(rewards):
    a, b = rewards
    torch.testing.assert_close(bradley_terry(a, b, torch.ones(64)), -logsigmoid(a - b).mean())


def test_is_least_where_the_margin_is_the_logit_of_the_label():
    label = torch.tensor([0.2, 0.5, 0.9])
    margin = label.logit().requires_grad_()
    loss = bradley_terry(margin, torch.zeros(3), label)
    loss.backward()
    entropy = -(label * label.log() + (1 - label) * (1 - label).log()).mean()
    torch.testing.assert_close(loss.detach(), entropy)
    torch.testing.assert_close(margin.grad, torch.zeros(3), atol=1e-7, rtol=0)


def test_is_finite_with_a_gradient_for_huge_margins():
    a = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = bradley_terry(a, torch.zeros(2), torch.tensor([1.0, 1.0]))
    loss.backward()
    assert loss.item() == 5e3
    assert a.grad.tolist() == [0.0, -0.5]


def test_equal_rewards_cost_a_bit_whatever_the_label():
    loss = bradley_terry(torch.ones(3), torch.ones(3), torch.tensor([0.0, 0.3, 1.0]))
    assert loss.item() == pytest.approx(math.log(2))


@every
def test_does_not_depend_on_which_image_comes_first(loss, rewards):
    a, b = (scored(mean, seed) for mean, seed in zip(rewards, (3, 5), strict=True))
    target = labels_for(loss, 64)
    torch.testing.assert_close(loss(a, b, target), loss(b, a, swapped(loss, target)))
    torch.testing.assert_close(loss.probability(a, b), 1 - loss.probability(b, a))
    torch.testing.assert_close(loss.probability(a, a), torch.full_like(a.mean, 0.5))


@every
def test_outcomes_are_a_distribution_and_rise_with_the_reward(loss):
    b = scored(torch.zeros(41, dtype=torch.float64))
    a = Scores(torch.linspace(-2, 2, 41, dtype=torch.float64), b.log_std[:1].expand(41), b.noise[:1].expand(41))
    b = Scores(b.mean, a.log_std, a.noise)
    found = loss.outcomes(a, b)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(1), torch.ones_like(a.mean))
    assert (loss.probability(a, b).diff() > 0).all()


@every
def test_gradients_are_those_of_finite_differences(loss):
    target, weight = labels_for(loss, 5), drawn((5,), 11, uniform=True)
    free = loss.parameters().double()
    inputs = [x.requires_grad_() for x in (*drawn((4, 5), 1), *drawn((2, 5), 2, uniform=True))]

    def value(mean_a, mean_b, std_a, std_b, noise_a, noise_b, *_):
        a, b = Scores(mean_a, std_a, noise_a), Scores(mean_b, std_b, noise_b)
        return loss(a, b, target, weight, free, torch.Generator().manual_seed(0))

    assert gradcheck(value, (*inputs, *free.values()))


@every
def test_extreme_scores_have_finite_losses_and_gradients(loss):
    mean = torch.tensor([200.0, -200.0, 200.0, -200.0, 0.0, 0.0, 200.0, -200.0])
    log_std = torch.tensor([0.0, 0.0, -30.0, -30.0, -30.0, 30.0, 30.0, 30.0])
    target = labels_for(loss, 8).float()
    for hard in (target, target.round()):
        inputs = [x.clone().requires_grad_() for x in (mean, -mean, log_std, log_std)]
        a, b = Scores(inputs[0], inputs[2]), Scores(inputs[1], inputs[3])
        value = replace(loss, regularisation=0.0) if isinstance(loss, Gaussian) else loss
        found = value(a, b, hard)
        found.backward()
        assert found.isfinite()
        assert all(x.grad.isfinite().all() for x in inputs if x.grad is not None)
        assert value.outcomes(a, b).isfinite().all()


@every
def test_a_loss_is_made_again_from_its_settings(loss):
    assert make_loss(**asdict(loss)) == loss
    assert LOSSES[loss.type] is type(loss)


@pytest.mark.parametrize("loss", [RaoKupper(tie=1e-9), Davidson(tie=1e-9)])
def test_without_ties_the_tie_models_are_bradley_terry(loss, rewards):
    a, b = map(Scores, rewards)
    label = labels_for(loss, 64)
    torch.testing.assert_close(loss(a, b, label), BradleyTerry()(a, b, label))
    assert (loss.outcomes(a, b)[:, 1] < 1e-8).all()


def test_rao_kupper_ties_are_logistic_differences_within_eta(rewards):
    a, b = rewards
    margin = (a - b).numpy()
    outcomes = RaoKupper(tie=0.8).outcomes(Scores(a), Scores(b)).numpy()
    np.testing.assert_allclose(outcomes[:, 1], special.expit(0.8 - margin) - special.expit(-0.8 - margin), atol=1e-12)
    np.testing.assert_allclose(outcomes[:, 0], stats.logistic.sf(0.8, loc=margin))


def test_davidson_leaves_decided_pairs_to_bradley_terry(rewards):
    a, b = rewards
    outcomes = Davidson(tie=0.6).outcomes(Scores(a), Scores(b))
    torch.testing.assert_close(outcomes[:, 0] / (outcomes[:, 0] + outcomes[:, 2]), torch.sigmoid(a - b))
    torch.testing.assert_close(outcomes[:, 1] ** 2, 0.36 * outcomes[:, 0] * outcomes[:, 2])


def test_tie_labels_are_read_as_stated():
    label = torch.tensor([0.0, 0.45, 0.5, 0.7, 1.0])
    band = [[0, 0, 1], [0.45, 0, 0.55], [0, 1, 0], [0.7, 0, 0.3], [1, 0, 0]]
    half = [[0, 0, 1], [0, 0.9, 0.1], [0, 1, 0], [0.4, 0.6, 0], [1, 0, 0]]
    torch.testing.assert_close(Davidson().labels(label), torch.tensor(band))
    torch.testing.assert_close(Davidson(band=0.1).labels(label)[1], torch.tensor([0.0, 1.0, 0.0]))
    found = RaoKupper(reading="half").labels(label)
    torch.testing.assert_close(found, torch.tensor(half))
    # Half of the ties is what a model without ties makes of them: the label comes back.
    torch.testing.assert_close(BradleyTerry().labels(found)[:, 0], label)


def test_smoothing_is_that_of_torch(rewards):
    a, b = map(Scores, rewards)
    hard = torch.arange(64) % 2
    for loss, target in ((BradleyTerry(), 1.0 - hard), (Davidson(), torch.eye(3)[2 * hard])):
        logits, place = loss.log_outcomes(a, b), hard * (2 if isinstance(loss, Davidson) else 1)
        expected = torch_cross_entropy(logits, place, label_smoothing=0.2)
        torch.testing.assert_close(replace(loss, smoothing=0.2)(a, b, target), expected)
        torch.testing.assert_close(replace(loss, smoothing=0.0)(a, b, target), torch_cross_entropy(logits, place))


def test_the_margin_is_asked_of_decided_pairs_alone(rewards):
    a, b = rewards
    loss = BradleyTerry(margin=0.8)
    torch.testing.assert_close(loss(Scores(a), Scores(b), torch.ones(64)), -logsigmoid(a - b - 0.8).mean())
    torch.testing.assert_close(loss(Scores(a), Scores(b), torch.full((64,), 0.5)), bradley_terry(a, b, a * 0 + 0.5))
    torch.testing.assert_close(loss.probability(Scores(a), Scores(b)), torch.sigmoid(a - b))


def test_log_ndtr_is_that_of_scipy_and_its_gradient_too():
    z = torch.tensor([-1e6, -1e4, -200, -40, -5, -1e-3, 0.0, 1e-3, 2.0, 9.0], requires_grad=True)
    found = log_ndtr(z)
    found.sum().backward()
    exact = z.detach().double().numpy()
    np.testing.assert_allclose(found.detach(), special.log_ndtr(exact), rtol=5e-6)
    slope = np.exp(stats.norm.logpdf(exact) - special.log_ndtr(exact))[2:]
    np.testing.assert_allclose(z.grad, [1e6, 1e4, *slope], rtol=1e-4)


def test_gaussians_of_one_width_are_thurstones_case_v(rewards):
    a, b = rewards
    log_std = torch.full_like(a, math.log(0.7))
    outcomes = Gaussian(min_std=1e-9).outcomes(Scores(a, log_std), Scores(b, log_std))
    expected = stats.norm.cdf((a - b).numpy() / (0.7 * math.sqrt(2)))
    np.testing.assert_allclose(outcomes[:, 0], expected, rtol=1e-10)
    torch.testing.assert_close(Thurstone(variance=0.49).outcomes(Scores(a), Scores(b)), outcomes)


def test_noise_is_a_known_variance(rewards):
    a, b = rewards
    noise = drawn((2, 64), 7, uniform=True)
    one, other = (Scores(mean, noise=sigma) for mean, sigma in zip((a, b), noise, strict=True))
    loss = Thurstone(slope=2.0, variance=0.05)
    wide = [Scores(s.mean, torch.log(2 * s.noise**2 + 0.05) / 2) for s in (one, other)]
    torch.testing.assert_close(loss.outcomes(one, other), Gaussian(min_std=1e-9).outcomes(*wide))
    clean = [Scores(s.mean, noise=torch.zeros_like(s.noise)) for s in (one, other)]
    torch.testing.assert_close(loss.outcomes(*clean), loss.outcomes(Scores(a), Scores(b)))
    seen, clear = (loss.probability(*pair) - 0.5 for pair in ((one, other), clean))
    assert (seen.abs() <= clear.abs()).all()


def test_sure_gaussians_are_bradley_terry_if_sampled_and_a_step_if_not(rewards):
    a, b = rewards
    sure = torch.full_like(a, -30.0)
    pair = Scores(a, sure), Scores(b, sure)
    sampled = Gaussian(likelihood="sampled", min_std=1e-9)
    torch.testing.assert_close(sampled.probability(*pair), torch.sigmoid(a - b))
    torch.testing.assert_close(Gaussian(min_std=1e-9).probability(*pair), (a > b).double())


def test_quadrature_and_sampling_agree_with_the_integral():
    a = Scores(torch.tensor([0.5, -2.0, 3.0]).double(), torch.tensor([0.3, -1.0, 0.5]).double())
    b = Scores(torch.zeros(3).double(), torch.tensor([0.0, 0.2, -0.4]).double())
    std = torch.sqrt(torch.exp(2 * a.log_std) + torch.exp(2 * b.log_std))
    exact = [
        quad(lambda x, m=m, s=s: special.expit(x) * stats.norm.pdf(x, m, s), -40, 40, points=[m])[0]
        for m, s in zip(a.mean.tolist(), std.tolist(), strict=True)
    ]
    loss = Gaussian(likelihood="sampled", samples=20_000, min_std=1e-9, regularisation=0.0)
    np.testing.assert_allclose(loss.probability(a, b), exact, atol=1e-6)
    first = torch.ones(3)
    by_sampling = loss(a, b, first, generator=torch.Generator().manual_seed(1))
    assert by_sampling.item() == pytest.approx(-np.log(exact).mean(), abs=0.01)
    assert loss(a, b, first, generator=torch.Generator().manual_seed(1)) == by_sampling
    assert loss(a, b, first, generator=torch.Generator().manual_seed(2)) != by_sampling


def test_regularisation_fixes_the_scale_that_the_closed_form_leaves_open(rewards):
    a, b = (scored(mean) for mean in rewards)
    label = drawn((64,), 1, uniform=True)
    wider = [Scores(2 * s.mean, s.log_std + math.log(2)) for s in (a, b)]
    free = Gaussian(regularisation=0.0, min_std=1e-9)
    torch.testing.assert_close(free(a, b, label), free(*wider, label))
    assert not torch.isclose(Gaussian()(a, b, label), Gaussian()(*wider, label))
    log_std = torch.linspace(-3, 2, 11, dtype=torch.float64)
    expected = kl_divergence(Normal(0.0, log_std.exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(divergence(log_std), expected)


def test_regularisation_keeps_widths_from_collapsing():
    widths = []
    for regularisation in (0.0, 0.01):
        mean = torch.tensor([1.0, 0.5], dtype=torch.float64)
        log_std = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        loss = Gaussian(regularisation=regularisation)
        first = torch.ones(1).double()
        minimise(lambda: loss(Scores(mean[:1], log_std[:1]), Scores(mean[1:], log_std[1:]), first), log_std)  # noqa: B023
        widths.append(log_std.exp().max().item())
    assert widths[0] < 0.1 < widths[1] < 1


def test_noisy_hard_labels_square_their_odds_under_fidelity():
    label = torch.tensor([1.0, 1.0, 1.0, 0.0]).double()  # odds of 3
    odds = {}
    for objective in ("nll", "fidelity"):
        loss = Thurstone(objective=objective)
        reward = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        minimise(lambda: loss(Scores(reward.expand(4)), Scores(torch.zeros(4).double()), label), reward)  # noqa: B023
        odds[objective] = loss.probability(Scores(reward), Scores(torch.zeros(1))).logit().exp().item()
    assert odds == pytest.approx({"nll": 3, "fidelity": 9}, rel=1e-3)


def test_fidelity_is_nothing_where_the_label_is_predicted_and_one_at_most():
    loss = Thurstone(objective="fidelity")
    a, b = Scores(torch.tensor([0.4, -200.0])), Scores(torch.tensor([0.0, 200.0]))
    assert loss(a, b, loss.probability(a, b)).item() == pytest.approx(0, abs=1e-6)
    assert loss(a, b, torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0])).item() == pytest.approx(1)


def test_pointwise_errors_are_those_of_scikit_learn_and_scipy(rewards):
    a, b = rewards
    pair, both = (Scores(a), Scores(b)), np.stack([a.numpy(), b.numpy()], axis=1)
    target = drawn((64, 2), 5)
    assert Pointwise()(*pair, target).item() == pytest.approx(mean_squared_error(target, both))
    huber = special.huber(0.4, both - target.numpy()).mean()
    assert Pointwise(error="huber", delta=0.4)(*pair, target).item() == pytest.approx(huber)
    hard = (target > 0).double()
    expected = log_loss(hard.flatten(), special.expit(both).flatten())
    assert Pointwise(error="bce")(*pair, hard).item() == pytest.approx(expected)
    torch.testing.assert_close(Pointwise(temperature=2.0).probability(*pair), torch.sigmoid((a - b) / 2))


@every
def test_the_nll_of_an_evaluation_is_that_of_the_probability(loss, rewards):
    a, b = (scored(mean / 6) for mean in rewards)
    label = drawn((64,), 1, uniform=True)
    assert loss.nll(a, b, label).mean().item() == pytest.approx(nll(loss.probability(a, b), label))
    certain = (
        Scores(torch.tensor([200.0]), torch.tensor([-30.0])),
        Scores(torch.tensor([-200.0]), torch.tensor([-30.0])),
    )
    assert 100 < loss.nll(*certain, torch.zeros(1)).item() < math.inf


@pytest.mark.parametrize("loss", [BradleyTerry(), Gaussian(regularisation=0.0), Thurstone()])
def test_the_nll_of_an_evaluation_is_the_loss_of_a_plain_likelihood(loss, rewards):
    a, b = (scored(mean) for mean in rewards)
    label, weight = drawn((2, 64), 1, uniform=True)
    expected = (weight * loss.nll(a, b, label)).sum() / weight.sum()
    torch.testing.assert_close(loss(a, b, label, weight), expected)


def compared(seed: int, items: int, pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """True rewards of items, and which two are compared in each pair."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, items, pairs)
    second = (first + rng.integers(1, items, pairs)) % items
    return torch.tensor(rng.normal(size=items)), torch.tensor(first), torch.tensor(second)


def outcomes_of(loss: PairLoss, a: Scores, b: Scores, seed: int) -> Tensor:
    """One outcome a pair (B, K), drawn from what `loss` says of true scores."""
    draw = torch.multinomial(loss.outcomes(a, b), 1, generator=torch.Generator().manual_seed(seed))
    return torch.eye(loss.outcomes(a, b).shape[1], dtype=torch.float64)[draw.squeeze(1)]


def test_bradley_terry_recovers_the_scores_of_a_known_model():
    truth, first, second = compared(0, items=40, pairs=10_000)
    loss = BradleyTerry()
    won = outcomes_of(loss, Scores(truth[first]), Scores(truth[second]), 0)[:, 0]
    found = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    minimise(lambda: loss(Scores(found[first]), Scores(found[second]), won), found)
    assert np.corrcoef(found.detach(), truth)[0, 1] > 0.99


@pytest.mark.parametrize("truth", [RaoKupper(tie=0.4), Davidson(tie=0.6)], ids=["rao_kupper", "davidson"])
def test_tie_models_recover_scores_and_tie_parameter_within_five_percent(truth):
    rewards, first, second = compared(1, items=40, pairs=10_000)
    target = outcomes_of(truth, Scores(rewards[first]), Scores(rewards[second]), 1)
    start = make_loss(truth.type)
    free = start.parameters().double()
    found = torch.zeros(40, dtype=torch.float64, requires_grad=True)
    minimise(lambda: start(Scores(found[first]), Scores(found[second]), target, free=free), found, *free.values())
    fitted = start.fitted(free)
    assert fitted.tie == pytest.approx(truth.tie, rel=0.05)
    assert abs(start.tie - truth.tie) > 0.2
    assert np.corrcoef(found.detach(), rewards)[0, 1] > 0.985
    pair = Scores(found[first]), Scores(found[second])
    torch.testing.assert_close(fitted.outcomes(*pair), start.outcomes(*pair, free))


def test_a_tie_parameter_that_is_not_learned_stays():
    loss = RaoKupper(tie=0.3, learn=False)
    assert len(loss.parameters()) == 0
    assert loss.fitted(loss.parameters()) == loss


@pytest.mark.parametrize(("likelihood", "pairs"), [("closed_form", 10_000), ("sampled", 4_000)])
def test_gaussians_recover_which_items_are_uncertain(likelihood, pairs):
    rewards, first, second = compared(2, items=10, pairs=pairs)
    truth = Gaussian(likelihood=likelihood, regularisation=1e-3)
    width = torch.linspace(-1.5, 1.5, 10, dtype=torch.float64)
    mean = 2 * rewards
    target = outcomes_of(truth, Scores(mean[first], width[first]), Scores(mean[second], width[second]), 2)
    found = torch.zeros(2, 10, dtype=torch.float64, requires_grad=True)
    minimise(
        lambda: truth(
            Scores(found[0][first], found[1][first]), Scores(found[0][second], found[1][second]), target[:, 0]
        ),
        found,
    )
    assert stats.spearmanr(found[1].detach(), width).statistic > 0.8
    assert np.corrcoef(found[0].detach(), mean)[0, 1] > 0.98


@pytest.mark.parametrize("seed", [0, 2, 3])
def test_soft_labels_of_a_noisy_judge_teach_better_than_hard_ones(seed):
    """Rewards are linear in 12 features; the judge's margin is the true one and noise of 1 nat."""
    rng = np.random.default_rng(seed)
    true = torch.tensor(rng.normal(size=12) / math.sqrt(12) * 1.5)
    seen, heldout = torch.tensor(rng.normal(size=(300, 12))), torch.tensor(rng.normal(size=(3000, 12)))
    judged = seen @ true + torch.tensor(rng.normal(size=300))
    liked = torch.tensor(rng.random(3000)) < torch.sigmoid(heldout @ true)
    says = torch.sigmoid(judged)
    labels = {"soft": says, "likelier": judged > 0, "drawn": torch.tensor(rng.random(300)) < says}
    loss, cost = BradleyTerry(), {}
    for name, label in labels.items():
        weights = torch.zeros(12, dtype=torch.float64, requires_grad=True)
        minimise(lambda: loss(Scores(seen @ weights), Scores(torch.zeros(300)), label.double()), weights)  # noqa: B023
        margin = (heldout @ weights).detach()
        cost[name] = loss.nll(Scores(margin), Scores(torch.zeros(3000)), liked.double()).mean().item()
    assert cost["soft"] < cost["likelier"] - 0.02
    assert cost["soft"] < cost["drawn"]


@pytest.mark.parametrize(
    ("type", "field", "value"),
    [
        ("bradley_terry", "smoothing", 1.0),
        ("bradley_terry", "margin", -0.1),
        ("rao_kupper", "tie", 0.0),
        ("rao_kupper", "reading", "third"),
        ("davidson", "tie", math.inf),
        ("davidson", "band", 0.5),
        ("gaussian", "likelihood", "guessed"),
        ("gaussian", "samples", 0),
        ("gaussian", "regularisation", math.nan),
        ("gaussian", "min_std", 0.0),
        ("thurstone", "slope", -1.0),
        ("thurstone", "variance", 0.0),
        ("thurstone", "objective", "hinge"),
        ("pointwise", "error", "mae"),
        ("pointwise", "delta", 0.0),
        ("pointwise", "temperature", -2.0),
        ("pointwise", "smoothing", 0.1),
        ("davidson", "regularisation", 0.1),
    ],
)
def test_settings_out_of_range_are_named(type, field, value):
    with pytest.raises(ValueError, match=rf"^{field}: "):
        make_loss(type, **{field: value})


def test_an_unknown_loss_is_named():
    with pytest.raises(ValueError, match=r"^type: no loss is called 'hinge'; known: bradley_terry"):
        make_loss("hinge")
    with pytest.raises(ValueError, match=r"^type: 'davidson'"):
        RaoKupper(type="davidson")


def test_scores_and_targets_that_do_not_fit_are_named(rewards):
    a, b = map(Scores, rewards)
    with pytest.raises(ValueError, match=r"^log_std: "):
        Gaussian()(a, b, torch.ones(64))
    with pytest.raises(ValueError, match=r"^target: \(64, 2\)"):
        BradleyTerry()(a, b, torch.ones(64, 2))
    with pytest.raises(ValueError, match=r"^target: \(64,\)"):
        Pointwise()(a, b, torch.ones(64))
