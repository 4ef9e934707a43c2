"""Following the reward's gradient: against finite differences and full backpropagation, to a known optimum, resumed."""

from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator

from models.generator import Conditioning
from models.keys import sample_key
from models.loading import load_generator
from models.paths import schedule
from models.samplers import keyed_noise
from pipeline.prompts import ShapesPrompts, draw_key
from pipeline.rl.algorithm import Velocities
from pipeline.rl.refl import DirectReward, DRaFTConfig, ReFLConfig
from pipeline.rl.rollout import rollout
from pipeline.rl.settings import TrainerSettings
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state
from pipeline.settings import UserError
from rewards.backbones import QFormerReward
from rewards.reward import ModelReward
from rewards.rules import RuleReward
from tests.gaussian import GOAL, Gaussian

STEPS, SHIFT = 4, 1.5
CONFIGS = [DRaFTConfig(last=1), DRaFTConfig(last=3), DRaFTConfig(last=STEPS), ReFLConfig(late=3)]
NAMES = ["draft-1", "draft-3", "draft-all", "refl"]


@pytest.fixture
def generator(generator_folder):
    """In double precision, for finite differences."""
    generator = load_generator(generator_folder)
    generator.transformer.double().requires_grad_(True)
    return generator


def ways_of(generator, config):
    """The inputs of two prompts with two siblings each, and a function of the network that asks it about them."""
    algorithm = DirectReward(config)
    cond = Conditioning(generator.encode(["a red ring", "a blue cross"]).tokens.double())
    plan = algorithm.rollout_plan(0, 0, tuple(schedule(STEPS, SHIFT)), 2)

    def predict(x, t, cond):
        return generator.predict(x.double(), t, cond)

    generator.decode = lambda latents, batch: latents.numpy()
    rolled = rollout(generator, predict, cond, ["p", "q"], (0, 0), plan, 64)
    rewards = torch.zeros(2, 2)
    advantages = algorithm.advantages(rewards, rewards.isfinite())
    assert advantages.kept.all()
    (ways,) = algorithm.examples(rolled, advantages.values, ["p", "q"], (0, 0))
    return algorithm, rolled, ways, lambda: ways.ask(lambda x, t, prompt: predict(x, t, cond[prompt]))


def bowl(latents):
    """A reward of latents."""
    return -(latents - 0.3).square().flatten(1).sum(1)


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_the_gradient_is_that_of_finite_differences(generator, config):
    algorithm, _, ways, asked = ways_of(generator, config.model_copy(update={"kl": 0.0}))

    def loss():
        return algorithm.loss(ways, Velocities(asked(), reward=bowl)).total.sum()

    weights = [p for p in generator.transformer.parameters() if p.ndim == 2]
    found = torch.autograd.grad(loss(), weights)
    size = sum(float(part.square().sum()) for part in found) ** 0.5
    values = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            torch._foreach_add_(weights, found, alpha=step / size)
            values.append(float(loss()))
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(size, rel=1e-3)


def test_the_last_steps_of_draft_and_the_jump_of_refl_are_those_of_the_rollout(generator):
    for config in CONFIGS:
        _, rolled, ways, asked = ways_of(generator, config)
        x0 = ways.x_t - ways.t * asked()
        if isinstance(config, DRaFTConfig) or rolled.plan.kept == STEPS - 1:
            torch.testing.assert_close(x0, rolled.latents, atol=1e-9, rtol=1e-9)
        else:
            assert ways.times == (schedule(STEPS, SHIFT)[rolled.plan.kept], 0.0)


def test_refl_draws_one_of_the_last_steps_in_each_iteration():
    algorithm = DirectReward(ReFLConfig(late=3))
    kept = {algorithm.rollout_plan(0, iteration, tuple(schedule(8)), 2).kept for iteration in range(50)}
    assert kept == {5, 6, 7}


def test_over_all_steps_draft_is_backpropagation_from_the_noise(generator):
    algorithm, _, ways, asked = ways_of(generator, DRaFTConfig(last=STEPS, kl=0.0))
    weight = generator.transformer.patch_in.weight
    (found,) = torch.autograd.grad(algorithm.loss(ways, Velocities(asked(), reward=bowl)).total.sum(), weight)
    keys = [sample_key(0, 0, prompt, k, "start") for prompt in "pq" for k in range(2)]
    x = keyed_noise(keys, generator.latent_shape).double()
    tokens = generator.encode(["a red ring", "a blue cross"]).tokens.double().repeat_interleave(2, 0)
    for t, s in pairwise(schedule(STEPS, SHIFT)):
        x = x + (s - t) * generator.predict(x, t, Conditioning(tokens))
    (expected,) = torch.autograd.grad(-bowl(x).sum(), weight)
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)


def test_what_lies_before_the_last_steps_has_no_gradient(generator):
    """The derivative through fewer steps is another than that through all."""
    weight, found = generator.transformer.patch_in.weight, []
    for last in (1, STEPS):
        algorithm, _, ways, asked = ways_of(generator, DRaFTConfig(last=last, kl=0.0))
        assert not ways.x_t.requires_grad
        found += torch.autograd.grad(algorithm.loss(ways, Velocities(asked(), reward=bowl)).total.sum(), weight)
    assert (found[0] - found[1]).norm() > 0.1 * found[1].norm()


def test_the_loss_against_its_formula(generator):
    algorithm, _, ways, asked = ways_of(generator, DRaFTConfig(last=2, kl=0.5))
    policy, reference = asked().detach(), torch.zeros(4, *generator.latent_shape).double()
    x0 = ways.x_t - ways.t * policy
    penalty = 0.5 * (policy**2).mean((1, 2, 3))
    found = algorithm.loss(ways, Velocities(policy, reference, reward=bowl)).total
    torch.testing.assert_close(found, ((x0 - 0.3) ** 2).sum((1, 2, 3)) + penalty)
    middle = bowl(x0).median()
    hinged = DirectReward(ReFLConfig(hinge=float(middle), kl=0.5))
    expected = torch.relu(middle - bowl(x0)) + penalty
    torch.testing.assert_close(hinged.loss(ways, Velocities(policy, reference, reward=bowl)).total, expected)
    assert (expected == penalty).any()


def test_above_the_hinge_there_is_no_gradient(generator):
    algorithm, _, ways, asked = ways_of(generator, ReFLConfig(hinge=-1e6, kl=0.0))
    total = algorithm.loss(ways, Velocities(asked(), reward=bowl)).total.sum()
    (found,) = torch.autograd.grad(total, generator.transformer.patch_in.weight)
    assert total.item() == 0
    assert found.abs().max() == 0


@pytest.mark.parametrize("kl", [0.0, 0.4])
def test_a_gaussian_goes_to_the_optimum_of_reward_minus_penalty(kl):
    """From pure noise a jump makes x0 = x_1 - v = m, the mean, whatever the noise, and v - v_ref is m_ref - m.

    So the loss is strength / 2 (m - goal)^2 + kl (m - m_ref)^2, for every picture.
    """
    mean, strength = 0.2, 1.5
    algorithm = DirectReward(ReFLConfig(late=1, kl=kl))
    plan = algorithm.rollout_plan(0, 0, (1.0, 0.0), 64)
    rolled = Gaussian(1).painted(torch.tensor(mean), plan, (0, 0))
    rewards = torch.zeros(1, 64)
    (ways,) = algorithm.examples(rolled, algorithm.advantages(rewards, rewards == 0).values, ["p"], (0, 0))
    moved = torch.tensor(mean, requires_grad=True)
    optimizer = torch.optim.SGD([moved], lr=0.4)
    for _ in range(60):
        optimizer.zero_grad()
        policy, reference = (ways.ask(lambda x, t, _, m=m: Gaussian.velocity(x, t, m)) for m in (moved, mean))
        v = Velocities(policy, reference, reward=lambda x0: -0.5 * strength * (x0 - GOAL).square().sum(1))
        algorithm.loss(ways, v).total.mean().backward()
        optimizer.step()
    expected = (strength * GOAL + 2 * kl * mean) / (strength + 2 * kl)
    assert moved.item() == pytest.approx(expected, abs=1e-4)


def trainer_of(generator_folder, judge_folder, config, **settings):
    process_state()
    reward = ModelReward(QFormerReward.from_checkpoint(judge_folder / "itm"))
    settings = {"groups": 4, "group_size": 3, "steps": STEPS, "learning_rate": 2e-3, **settings}
    generator = load_generator(generator_folder)
    return Trainer(generator, reward, DirectReward(config), TrainerSettings(**settings), 0, Accelerator())


def prompts_at(iteration):
    return ShapesPrompts(type="shapes").draw(draw_key(0, iteration), 4)


@pytest.mark.parametrize("config", [DRaFTConfig(last=2), ReFLConfig(hinge=50.0)], ids=["draft", "refl"])
def test_the_trainer_raises_a_reward_models_reward(generator_folder, judge_folder, config):
    trainer = trainer_of(generator_folder, judge_folder, config, learning_rate=1e-2)
    found = [trainer.iterate(prompts_at(0)) for _ in range(8)]
    assert found[0].kl == 0
    assert found[-1].kl > 0
    assert found[-1].reward_mean > found[0].reward_mean + 2 * found[0].reward_std
    if isinstance(config, DRaFTConfig):
        assert found[0].loss == pytest.approx(-found[0].reward_mean, abs=0.02)


@pytest.mark.parametrize("config", [DRaFTConfig(last=2), ReFLConfig()], ids=["draft", "refl"])
def test_a_resumed_trainer_goes_on_to_the_bit(generator_folder, judge_folder, tmp_path, config):
    whole = trainer_of(generator_folder, judge_folder, config, batch=5, updates=2)
    for i in range(3):
        if i == 2:
            whole.save(tmp_path / "state")
        last = whole.iterate(prompts_at(i))
    resumed = trainer_of(generator_folder, judge_folder, config, batch=5, updates=2)
    resumed.load(tmp_path / "state")
    assert resumed.iterate(prompts_at(2)).loss == last.loss
    assert all(torch.equal(a, b) for a, b in zip(whole.trained, resumed.trained, strict=True))


def test_a_reward_without_a_gradient_is_refused_before_anything_is_painted(generator_folder):
    process_state()
    with pytest.raises(UserError, match=r"^finetune\.reward: reward has no gradient"):
        Trainer(
            load_generator(generator_folder),
            RuleReward("edges"),
            DirectReward(ReFLConfig()),
            TrainerSettings(),
            0,
            Accelerator(),
        )


@pytest.mark.parametrize("config", [DRaFTConfig(last=5), ReFLConfig(late=5)], ids=["last", "late"])
def test_more_steps_than_a_picture_takes_are_refused(config):
    with pytest.raises(ValueError, match=r"algorithm\.(last|late): 5, but a picture takes 4 steps"):
        config.check(4, 2)
