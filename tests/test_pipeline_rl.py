"""Advantages, rollouts, the GRPO loss, and a trainer that raises a reward it can raise."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from models import lora
from models.generator import sample
from models.keys import sample_key
from models.loading import load_generator
from models.paths import schedule
from models.samplers import cps, log_prob
from pipeline.prompts import PromptRow, ShapesPrompts, draw_key
from pipeline.rl.advantage import group_advantages, mixed_advantages
from pipeline.rl.algorithm import Velocities
from pipeline.rl.grpo import GRPO, GRPOConfig, Steps
from pipeline.rl.nft import NFT, NFTConfig
from pipeline.rl.rollout import Plan, rollout
from pipeline.rl.settings import TrainerSettings
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state
from pipeline.settings import UserError
from rewards.mixture import Mixture, Term
from rewards.normalising import Normaliser
from rewards.reward import Rewards
from rewards.rules import RuleReward

PLAN = Plan(times=tuple(schedule(4)), sampler="cps", eta=0.7, start=1, window=2, siblings=3)


@pytest.fixture
def generator(generator_folder):
    return load_generator(generator_folder)


class Brightness:
    """A reward that any generator can raise."""

    def __call__(self, images, prompts):
        return Rewards.of([image.mean() for image in images])


class Silent:
    """A reward that never has an answer."""

    def __call__(self, images, prompts):
        return Rewards.of([float("nan")] * len(images))


def trainer_of(generator, reward=None, algorithm=None, **settings):
    process_state()
    settings = TrainerSettings(**{"groups": 4, "group_size": 6, "steps": 4, **settings})
    algorithm = algorithm or GRPO(GRPOConfig(last_start=2))
    return Trainer(generator, reward or Brightness(), algorithm, settings, 0, Accelerator())


def prompts_at(iteration, count=4):
    return ShapesPrompts(type="shapes").draw(draw_key(0, iteration), count)


def predict(generator):
    return lambda x, t, cond: generator.predict(x, t, cond)


def test_group_advantages_against_numpy():
    rewards = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 8.0]])
    valid = torch.ones_like(rewards, dtype=torch.bool)
    found = group_advantages(rewards, valid, "group").values.numpy()
    expected = (rewards.numpy() - rewards.numpy().mean(1, keepdims=True)) / rewards.numpy().std(1, keepdims=True)
    assert np.allclose(found, expected, atol=1e-6)
    away = rewards.numpy() - rewards.numpy().mean(1, keepdims=True)
    assert np.allclose(group_advantages(rewards, valid).values.numpy(), away / np.sqrt((away**2).mean()), atol=1e-6)


def test_invalid_rewards_take_no_part_and_dull_groups_are_dropped():
    rewards = torch.tensor([[1.0, float("nan"), 3.0], [4.0, 4.0, 4.0], [float("nan"), float("nan"), 2.0]])
    found = group_advantages(rewards, rewards.isfinite(), "group")
    assert found.values[0].tolist() == pytest.approx([-1.0, 0.0, 1.0])
    assert found.kept.tolist() == [True, False, False]
    assert found.values[1:].abs().max() == 0


def test_advantages_are_clipped():
    rewards = torch.zeros(1, 100)
    rewards[0, 0] = 1.0
    assert group_advantages(rewards, torch.ones_like(rewards, dtype=torch.bool), limit=5.0).values.max() == 5.0


def easy_and_hard(groups: int = 64, siblings: int = 16) -> torch.Tensor:
    """Two independent rewards (P, K, 2); the second varies a hundred times less among siblings."""
    return torch.randn(groups, siblings, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.01])


def share_of_the_second(values: torch.Tensor, combine: str, weights: tuple[float, float] = (1.0, 1.0)) -> float:
    """How much of the variance of the advantages, and so of the gradient, follows the second reward."""
    valid = torch.ones(values.shape[:2], dtype=torch.bool)
    found = mixed_advantages(values, valid, torch.tensor(weights), combine, group_advantages).values
    away = values[..., 1] - values[..., 1].mean(dim=1, keepdim=True)
    return float(torch.corrcoef(torch.stack([found.flatten(), away.flatten()]))[0, 1] ** 2)


def test_a_hard_reward_starves_among_rewards_and_not_among_advantages():
    rewards = easy_and_hard()
    assert share_of_the_second(rewards, "rewards") < 0.02
    assert share_of_the_second(rewards, "advantages") == pytest.approx(0.5, abs=0.05)
    assert share_of_the_second(rewards, "advantages", (1.0, 3.0)) == pytest.approx(0.9, abs=0.03)


def test_a_spread_between_prompts_starves_a_normalised_reward_and_not_its_advantages():
    rewards = torch.randn(64, 16, 2, generator=torch.Generator().manual_seed(0))
    rewards[..., 1] += 100 * torch.arange(64.0)[:, None]
    valid, ids = np.ones((64, 16), dtype=bool), [str(prompt) for prompt in range(64)]
    running, prompt = (torch.from_numpy(Normaliser(by, 2)(rewards.numpy(), valid, ids)) for by in ("running", "prompt"))
    assert share_of_the_second(running, "rewards") < 0.02
    for values, combine in ((prompt, "rewards"), (running, "advantages"), (rewards, "advantages")):
        assert share_of_the_second(values, combine) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("combine", ["rewards", "advantages"])
def test_a_mixture_of_one_has_the_advantages_of_that_one(combine):
    rewards = easy_and_hard()[..., :1]
    valid = torch.ones(rewards.shape[:2], dtype=torch.bool)
    found = mixed_advantages(rewards, valid, torch.ones(1), combine, group_advantages)
    torch.testing.assert_close(found.values, group_advantages(rewards[..., 0], valid).values)


def test_a_picture_on_which_a_term_fails_takes_no_part_in_any():
    rewards = easy_and_hard(2, 4)
    rewards[0, 1, 1] = float("nan")
    valid = rewards.isfinite().all(-1)
    for combine in ("rewards", "advantages"):
        found = mixed_advantages(rewards, valid, torch.ones(2), combine, group_advantages)
        assert found.values[0, 1] == 0
        assert found.values.isfinite().all()
        moved = rewards.clone()
        moved[0, 1, 0] = 1e6
        torch.testing.assert_close(
            mixed_advantages(moved, valid, torch.ones(2), combine, group_advantages).values, found.values
        )


def test_a_rollout_without_noise_is_the_ode(generator):
    ids, texts = ["p", "q"], ["a red ring", "a blue cross"]
    plan = Plan(times=tuple(schedule(4)), sampler="cps", eta=1e-6, start=0, window=2, siblings=2)
    rolled = rollout(generator, predict(generator), generator.encode(texts), ids, (0,), plan, 64)
    keys = [sample_key(0, i, "start") for i in ids]
    straight = list(sample(generator, texts, keys, steps=4))
    for index, image in enumerate(rolled.images):
        assert np.abs(image.astype(int) - straight[index // 2]).max() <= 1


def test_siblings_share_the_path_up_to_the_window_and_part_there(generator):
    cond = generator.encode(["a red ring", "a blue cross"])
    rolled = rollout(generator, predict(generator), cond, ["p", "q"], (0,), PLAN, 64)
    first, second = rolled.transitions
    assert first.x_s.shape[:2] == (2, 3)
    assert second.x_s.shape[:2] == (6, 1)
    assert torch.equal(second.x_t, first.x_s.flatten(0, 1))
    assert second.prompt.tolist() == [0, 0, 0, 1, 1, 1]
    assert not np.array_equal(rolled.images[0], rolled.images[1])


def test_a_rollout_does_not_depend_on_who_else_is_rolled_out(generator):
    texts, ids = ["a red ring", "a blue cross"], ["p", "q"]
    both = rollout(generator, predict(generator), generator.encode(texts), ids, (0, 5), PLAN, 64)
    alone = rollout(generator, predict(generator), generator.encode(texts[1:]), ids[1:], (0, 5), PLAN, 2)
    assert np.abs(both.images[3:].astype(int) - alone.images).max() <= 1


def transition_of(generator):
    cond = generator.encode(["a red ring"])
    return cond, rollout(generator, predict(generator), cond, ["p"], (0,), PLAN, 64).transitions[0]


def with_gains(t, gains):
    return Steps(t.x_t, t.t, t.prompt, t.s, t.x_s, t.old, gains, t.mean)


def test_on_policy_the_ratio_is_one_and_the_gradient_is_that_of_the_log_probability(generator):
    cond, transition = transition_of(generator)
    algorithm = GRPO(GRPOConfig(kl=0.0))
    gains = torch.tensor([[1.0, -2.0, 0.5]])
    v = generator.predict(transition.x_t, transition.t, cond).detach().requires_grad_()
    loss = algorithm.loss(with_gains(transition, gains), Velocities(v))
    assert loss.total.item() == pytest.approx(-gains.mean().item(), abs=1e-5)
    assert loss.clipped.item() == 0
    (found,) = torch.autograd.grad(loss.total.sum(), v)
    again = v.detach().requires_grad_()
    drawn = step_of(transition, again)
    logs = log_prob(transition.x_s[0], drawn.mean.expand(3, -1, -1, -1), drawn.std)
    (expected,) = torch.autograd.grad(-(logs * gains[0]).mean(), again)
    assert torch.allclose(found, expected, atol=1e-7)


def step_of(transition, v):
    return cps(transition.x_t, v, transition.t, transition.s, 0.7, None)


def test_beyond_the_clip_there_is_no_gradient_and_kl_has_one(generator):
    cond, transition = transition_of(generator)
    v = generator.predict(transition.x_t, transition.t, cond)
    moved = (v + 0.5).detach().requires_grad_()
    drawn = step_of(transition, moved)
    better = log_prob(transition.x_s[0], drawn.mean.expand(3, -1, -1, -1), drawn.std) > transition.old[0]
    gains = torch.where(better, 1.0, -1.0)[None]
    loss = GRPO(GRPOConfig(kl=0.0, clip=1e-9)).loss(with_gains(transition, gains), Velocities(moved))
    assert loss.clipped.item() == 1
    (gradient,) = torch.autograd.grad(loss.total.sum(), moved)
    assert gradient.abs().max() == 0
    loss = GRPO(GRPOConfig(kl=1.0, clip=1e-9)).loss(with_gains(transition, gains), Velocities(moved, v))
    assert loss.kl.item() > 0
    (gradient,) = torch.autograd.grad(loss.total.sum(), moved)
    assert gradient.abs().max() > 0


def forward_of(generator, draws=2):
    """A group of three pictures noised `draws` times, the first rated best and the last worst."""
    algorithm = NFT(NFTConfig(draws=draws, kl=0.0))
    cond = generator.encode(["a red ring"])
    plan = algorithm.rollout_plan(0, 0, tuple(schedule(4)), 3)
    rolled = rollout(generator, predict(generator), cond, ["p"], (0,), plan, 64)
    sets = algorithm.examples(rolled, torch.tensor([[5.0, 0.0, -5.0]]), ["p"], (0,))
    return algorithm, cond, rolled, sets


def test_siblings_without_a_window_start_apart_and_follow_the_ode(generator):
    _, _, rolled, _ = forward_of(generator)
    straight = list(sample(generator, ["a red ring"] * 3, [sample_key(0, "p", k, "start") for k in range(3)], steps=4))
    for image, other in zip(rolled.images, straight, strict=True):
        assert np.abs(image.astype(int) - other).max() <= 1
    assert rolled.transitions == ()


def test_nft_noises_each_picture_at_times_spread_evenly(generator):
    _, _, rolled, sets = forward_of(generator)
    for draw, examples in enumerate(sets):
        assert ((examples.t >= draw / 2) & (examples.t <= (draw + 1) / 2)).all()
        assert examples.r.tolist() == [1.0, 0.5, 0.0]
        noise = (examples.x_t - (1 - examples.t.view(-1, 1, 1, 1)) * rolled.latents) / examples.t.view(-1, 1, 1, 1)
        assert noise.std().item() == pytest.approx(1, abs=0.05)


def test_nft_loss_against_its_formula_and_on_policy_its_gradient_is_the_advantage_weighted_regression(generator):
    algorithm, cond, rolled, (examples, _) = forward_of(generator)
    old = generator.predict(examples.x_t, examples.t, cond.repeated(3)).detach()
    v = (old + 0.1 * torch.randn_like(old)).requires_grad_()
    beta, t = algorithm.config.beta, examples.t.view(-1, 1, 1, 1)

    def error(velocity):
        away = examples.x_t - t * velocity - rolled.latents
        return away.square().mean((1, 2, 3)) / away.detach().abs().mean((1, 2, 3))

    good, bad = error((1 - beta) * old + beta * v), error((1 + beta) * old - beta * v)
    expected = (examples.r * good + (1 - examples.r) * bad) / beta
    assert torch.allclose(algorithm.loss(examples, Velocities(v, old=old)).total, expected, atol=1e-6)

    on_policy = old.clone().requires_grad_()
    (found,) = torch.autograd.grad(algorithm.loss(examples, Velocities(on_policy, old=old)).total.sum(), on_policy)
    again = old.clone().requires_grad_()
    (pull,) = torch.autograd.grad(((2 * examples.r - 1) * error(again)).sum(), again)
    assert torch.allclose(found, pull, atol=1e-6)


@pytest.mark.parametrize("algorithm", [GRPO(GRPOConfig(last_start=2)), NFT(NFTConfig())], ids=["grpo", "nft"])
def test_the_trainer_raises_a_reward_and_leaves_the_base_alone(generator, algorithm):
    base = copy.deepcopy(generator.transformer.state_dict())
    trainer = trainer_of(generator, algorithm=algorithm, learning_rate=5e-3)
    found = [trainer.iterate(prompts_at(i)) for i in range(12)]
    assert found[-1].reward_mean > found[0].reward_mean + 2 * found[0].reward_std
    assert found[0].clip_fraction == 0
    assert found[0].kl == pytest.approx(0, abs=1e-6)
    assert found[-1].kl > 0
    with lora.reference(trainer.tuned):
        after = trainer.tuned.state_dict()
    names = {name.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias"): name for name in base}
    for name, value in after.items():
        if name in base or name in names:
            assert torch.equal(value, base[names.get(name, name)])


def test_the_learning_rate_falls_to_zero_over_the_last_share_of_the_iterations(generator):
    trainer = trainer_of(generator, iterations=4, decay=0.5, learning_rate=1e-3)
    rates = []
    for i in range(4):
        trainer.iterate(prompts_at(i))
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 5e-4])


def test_a_resumed_trainer_goes_on_to_the_bit(generator, generator_folder, tmp_path):
    whole = trainer_of(generator, updates=2)
    for i in range(4):
        if i == 2:
            whole.save(tmp_path / "state")
        whole.iterate(prompts_at(i))
    resumed = trainer_of(load_generator(generator_folder), updates=2)
    resumed.load(tmp_path / "state")
    assert resumed.done == 2
    for i in (2, 3):
        resumed.iterate(prompts_at(i))
    for a, b in zip(whole.trained, resumed.trained, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.average.shadow, resumed.average.shadow, strict=True):
        assert torch.equal(a, b)


def mixture(normalise: str) -> Mixture:
    terms = (Term("bright", Brightness()), Term("edges", RuleReward("edges"), -3.0))
    return Mixture(terms, "advantages", normalise)


@pytest.mark.parametrize("normalise", ["running", "prompt"])
def test_a_normalised_mixture_resumes_to_the_bit(generator, generator_folder, tmp_path, normalise):
    whole = trainer_of(generator, mixture(normalise))
    for i in range(4):
        if i == 2:
            whole.save(tmp_path / "state")
        last = whole.iterate(prompts_at(i % 2))
    resumed = trainer_of(load_generator(generator_folder), mixture(normalise))
    resumed.load(tmp_path / "state")
    for i in (2, 3):
        again = resumed.iterate(prompts_at(i % 2))
    assert resumed.normaliser.state() == whole.normaliser.state()
    assert all(torch.equal(a, b) for a, b in zip(whole.trained, resumed.trained, strict=True))
    assert (again.term_means, again.term_stds) == (last.term_means, last.term_stds)
    assert last.reward_mean == pytest.approx(last.term_means[0] - 3 * last.term_means[1], rel=1e-4)


def test_without_any_reward_it_stops_and_nothing_has_moved(generator):
    trainer = trainer_of(generator, Silent())
    before = [p.clone() for p in trainer.trained]
    with pytest.raises(UserError, match="no picture of iteration 0 got a reward"):
        trainer.iterate(prompts_at(0))
    assert trainer.done == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.trained, strict=True))


def test_groups_that_cannot_be_shared_out_are_an_error(generator):
    with pytest.raises(ValueError, match="updates: 3 cannot share 2 groups"):
        trainer_of(generator, groups=2, updates=3)


def test_prompt_ids_key_the_text():
    assert PromptRow("a ring", "x").id == PromptRow("a ring", "y").id != PromptRow("a cross", "x").id
