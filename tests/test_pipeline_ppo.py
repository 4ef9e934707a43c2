"""PPO and DDPO: credit, the critic and its loss, the baseline of a prompt, known optima, and resumed training."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from models.generator import Conditioning
from models.loading import load_generator
from models.paths import schedule
from models.samplers import SAMPLERS
from pipeline.prompts import ShapesPrompts, draw_key
from pipeline.rl import algorithm_of
from pipeline.rl.advantage import mixed_advantages
from pipeline.rl.algorithm import Velocities
from pipeline.rl.critic import Critic, gae, value_loss
from pipeline.rl.ddpo import DDPO, DDPOConfig, Latest
from pipeline.rl.grpo import GRPO, GRPOConfig
from pipeline.rl.ppo import PPO, CriticSettings, PPOConfig
from pipeline.rl.rollout import rollout
from pipeline.rl.settings import TrainerSettings
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state
from rewards.reward import Rewards


@pytest.fixture
def generator(generator_folder):
    return load_generator(generator_folder)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_advantages_against_a_double_sum_of_discounted_errors():
    values, rewards, gamma, lam = normal(4, 5), normal(5, seed=1), 0.9, 0.7
    found = gae(values, rewards, gamma, lam)
    for n in range(5):
        path = [*values[:, n].tolist(), 0.0]
        for i in range(4):
            expected = 0.0
            for j in range(i, 4):
                reward = rewards[n].item() if j == 3 else 0.0
                expected += (gamma * lam) ** (j - i) * (reward + gamma * path[j + 1] - path[j])
            assert found[i, n].item() == pytest.approx(expected, abs=1e-5)


def test_lambda_0_is_the_error_of_one_step_and_lambda_1_what_the_path_brought():
    values, rewards, gamma = normal(3, 5), normal(5, seed=1), 0.8
    following = torch.cat([gamma * values[1:], rewards[None]])
    torch.testing.assert_close(gae(values, rewards, gamma, 0.0), following - values)
    outcome = torch.stack([gamma**2 * rewards, gamma * rewards, rewards])
    torch.testing.assert_close(gae(values, rewards, gamma, 1.0), outcome - values)


def test_value_loss_against_its_formula():
    values, old, returns = normal(6), normal(6, seed=1), normal(6, 2, seed=2)
    found = value_loss(values, old, returns, 0.2)
    for m in range(6):
        moved = max(-0.2, min(0.2, (values[m] - old[m]).item()))
        for f in range(2):
            plain, kept = (values[m] - returns[m, f]) ** 2, (old[m] + moved - returns[m, f]) ** 2
            assert found[m, f].item() == pytest.approx(max(plain.item(), kept.item()) / 2, rel=1e-5)


def test_a_critic_starts_at_0_is_decided_by_its_seed_and_knows_time_and_prompt(generator):
    state = torch.random.get_rng_state()
    width = generator.feature_width
    first, again, other = Critic(width, 8, 0), Critic(width, 8, 0), Critic(width, 8, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.read.weight, other.read.weight)
    cond, x = generator.encode(["a red ring", "a red ring", "a blue cross"]), normal(1, *generator.latent_shape)
    features = generator.features(x.expand(3, -1, -1, -1), torch.tensor([0.5, 0.9, 0.5]), cond)
    assert first(features).abs().max() == 0
    torch.nn.init.ones_(first.out.weight)
    painted = features.clone()
    painted[:, 0] = features[0, 0]
    values = first(painted)
    assert (values[1:] - values[0]).abs().min() > 1e-3
    torch.testing.assert_close(first(painted[2:]), values[2:])


def drawn_of(generator, algorithm, rewards_PK):
    """Examples of two groups of three paths; the velocities (M, ...) of the policy that drew them, for each."""
    width = generator.feature_width
    algorithm.parts(width, 0)
    cond = generator.encode(["a red ring", "a blue cross"])
    plan = algorithm.rollout_plan(0, 0, tuple(schedule(4)), 3)
    predict, features = (lambda x, t, c: generator.predict(x, t, c)), (lambda x, t, c: generator.features(x, t, c))
    rolled = rollout(generator, predict, cond, ["p", "q"], (0,), plan, 64, features)
    given = algorithm.advantages(rewards_PK, rewards_PK.isfinite())
    sets = algorithm.examples(rolled, given.values, ["p", "q"], (0,))
    return rolled, sets, [generator.predict(each.x_t, each.t, cond[each.prompt]).detach() for each in sets]


REWARDS = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0]])


def test_each_picture_has_a_path_of_its_own_from_the_start(generator):
    rolled, sets, _ = drawn_of(generator, PPO(PPOConfig(last_start=0)), REWARDS)
    assert [transition.x_s.shape[:2] for transition in rolled.transitions] == [(6, 1)] * 3
    assert len({tuple(x.flatten().tolist()) for x in rolled.transitions[0].x_t}) == 6
    assert [each.features.shape for each in sets] == [(6, 2, generator.feature_width)] * 3


def test_with_lambda_1_and_a_critic_of_0_the_policy_loss_is_that_of_grpo_on_the_rewards(generator):
    algorithm = PPO(PPOConfig(last_start=0, gae_lambda=1.0, kl=0.2))
    rolled, sets, velocities = drawn_of(generator, algorithm, REWARDS)
    grpo = GRPO(GRPOConfig(window=3, last_start=0, fans=(), kl=0.2))
    for mine, theirs, v in zip(sets, grpo.examples(rolled, REWARDS, ["p", "q"], (0,)), velocities, strict=True):
        moved = Velocities(v + 0.01 * normal(*v.shape), reference=v)
        values = algorithm.critic(mine.features)
        found = algorithm.loss(mine, moved)
        wrong = value_loss(values, mine.expected, mine.returns, 0.2).mean(1)
        torch.testing.assert_close(found.total - wrong, grpo.loss(theirs, moved).total)
        torch.testing.assert_close(mine.returns.flatten(), REWARDS.flatten())
        assert found.clipped.sum() > 0


def test_the_value_loss_moves_the_critic_alone_and_the_policy_loss_leaves_it(generator):
    algorithm = PPO(PPOConfig(last_start=0))
    _, sets, velocities = drawn_of(generator, algorithm, REWARDS)
    each, v = sets[1], velocities[1].requires_grad_()
    assert not each.features.requires_grad
    parameters = list(algorithm.critic.parameters())
    on_policy, *on_critic = torch.autograd.grad(algorithm.loss(each, Velocities(v)).total.sum(), [v, *parameters])
    (alone,) = torch.autograd.grad(algorithm.policy.loss(each, Velocities(v)).total.sum(), v)
    assert torch.equal(on_policy, alone)
    wrong = value_loss(algorithm.critic(each.features), each.expected, each.returns, 0.2)
    expected = torch.autograd.grad(wrong.mean(1).sum(), parameters)
    assert all(torch.allclose(a, b) for a, b in zip(on_critic, expected, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in on_critic)


def test_a_path_without_reward_teaches_neither_policy_nor_critic(generator):
    gradients = []
    for silent in (float("nan"), float("inf")):
        algorithm = PPO(PPOConfig(last_start=0, kl=0.0))
        rewards = REWARDS.clone()
        rewards[0, 1] = silent
        _, sets, velocities = drawn_of(generator, algorithm, rewards)
        v = velocities[0].requires_grad_()
        loss = algorithm.loss(sets[0], Velocities(v))
        assert loss.total.isfinite().all()
        assert loss.total[1] == 0
        assert loss.watched["valid"].tolist() == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
        parameters = list(algorithm.critic.parameters())
        gradients.append(torch.autograd.grad(loss.total.sum(), [v, *parameters]))
        assert gradients[-1][0][1].abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_explained_variance_against_numpy(generator):
    algorithm = PPO(PPOConfig(last_start=0, gamma=0.9))
    algorithm.parts(generator.feature_width, 0)
    torch.nn.init.normal_(algorithm.critic.out.weight, generator=torch.Generator().manual_seed(0))
    rewards = REWARDS.clone()
    rewards[1, 2] = float("nan")
    algorithm.parts = lambda width, seed: {}
    _, sets, velocities = drawn_of(generator, algorithm, rewards)
    losses = [algorithm.loss(each, Velocities(v)) for each, v in zip(sets, velocities, strict=True)]
    means = {name: torch.cat([loss.watched[name] for loss in losses]).mean().item() for name in losses[0].watched}
    valid = np.tile([True] * 5 + [False], 3)
    outcome = np.concatenate([0.9**ahead * rewards.numpy().flatten() for ahead in (2, 1, 0)])[valid]
    expected = torch.cat([each.expected for each in sets]).numpy()[valid]
    found = algorithm.summary(means)
    assert found["explained_variance"] == pytest.approx(1 - (outcome - expected).var() / outcome.var(), rel=1e-4)
    assert set(found) == {"value_loss", "explained_variance"}


def test_a_prompts_baseline_against_its_formula_and_its_state_survives_to_the_bit():
    values, valid = normal(4, 2, 3, 1).numpy(), np.ones((4, 2, 3), dtype=bool)
    valid[1, 0, 2] = False
    values[1, 0, 2] = np.nan
    latest, kept = Latest(buffer=5, least=4), {"p": [], "q": []}
    for call in range(4):
        ids = ["p", "q"] if call < 3 else ["p", "r"]
        if call == 2:
            state = json.loads(json.dumps(latest.state()))
            latest = Latest(buffer=5, least=4)
            latest.load(state)
        found = latest(values[call], valid[call], ids)
        here = values[call][valid[call]].astype(float)
        for row, key in enumerate(ids):
            seen = kept.setdefault(key, [])
            seen += values[call, row][valid[call, row]][:, 0].astype(float).tolist()
            known = np.array(seen[-5:]) if len(seen) >= 4 else here[:, 0]
            expected = (values[call, row, :, 0] - known.mean()) / known.std()
            np.testing.assert_allclose(found[row, :, 0], expected, rtol=1e-5)


class Line:
    """Pictures of one number; the velocity at each time is a number of its own, whatever the picture."""

    latent_shape, feature_width = (1,), 9

    def __init__(self, steps: int):
        self.times = schedule(steps)
        self.base = dict.fromkeys(self.times, -0.3)
        self.v = {t: torch.full((), -0.3, requires_grad=True) for t in self.times[:-1]}

    def prior_std(self, t):
        return 1.0

    def predict(self, x, t, cond):
        return self.v[t].expand(x.shape)

    def features(self, x, t, cond):
        painted = torch.tanh(x - torch.linspace(-3, 3, self.feature_width))
        return torch.stack([painted, torch.cos(t * torch.arange(self.feature_width)).expand_as(painted)], 1)

    def decode(self, latents, batch=None):
        return latents.numpy()

    def end(self, config, start: float, v: dict) -> float:
        """Where a path without noise ends: the mean of where one with noise does, as all is linear."""
        x = torch.full((1, 1), start)
        for step, (t, s) in enumerate(zip(self.times, self.times[1:], strict=False)):
            stochastic = step < len(self.times) - 2
            x = SAMPLERS[config.sampler if stochastic else "ode"](x, torch.full_like(x, v[t]), t, s, config.eta, None).x
        return x.item()

    def noise(self, config) -> list[tuple[float, float, float]]:
        """Of each stochastic step its time, its standard deviation, and how its mean follows the velocity."""
        found, x = [], torch.zeros(1, 1)
        for t, s in zip(self.times[:-2], self.times[1:-1], strict=True):
            step = SAMPLERS[config.sampler](x, torch.ones_like(x), t, s, config.eta, None)
            found.append((t, step.std, step.mean.item()))
        return found

    def optimum(self, config, goal: float, scale: float = 1.0) -> float:
        """The mean picture that maximises E[-(x - goal)^2 / 2] / scale - kl sum of the steps' KL, in closed form."""
        base = self.end(config, 0.0, self.base)
        reach, stiff = [], []
        for t, std, follows in self.noise(config):
            reach.append(self.end(config, 0.0, {**self.base, t: self.base[t] + 1}) - base)
            stiff.append(config.kl * follows**2 / std**2)
        reach = np.array(reach)
        away = np.linalg.solve(np.outer(reach, reach) / scale + np.diag(stiff), reach * (goal - base) / scale)
        return base + float(reach @ away)

    def spread(self, config) -> float:
        """The variance of the picture about its mean."""
        base, found = self.end(config, 0.0, self.base), 0.0
        found += (self.end(config, 1.0, self.base) - base) ** 2
        for t, std, follows in self.noise(config):
            reach = self.end(config, 0.0, {**self.base, t: self.base[t] + 1}) - base
            found += (reach / follows * std) ** 2
        return found


def tuned(line, algorithm, goal: float, iterations: int, siblings: int, rate: float) -> float:
    """The mean picture after training on the reward -(x - goal)^2 / 2, averaged over the last third."""
    config, cond, seen = algorithm.config, Conditioning(torch.zeros(1, 1, 1)), []
    parts = algorithm.parts(line.feature_width, 0)
    scaler = algorithm.scaler(1) if isinstance(algorithm, DDPO) else None
    optimizer = torch.optim.SGD(line.v.values(), lr=rate)
    critics = [torch.optim.Adam(part.module.parameters(), lr=part.learning_rate) for part in parts.values()]
    for iteration in range(iterations):
        plan = algorithm.rollout_plan(0, iteration, tuple(line.times), siblings)
        features = line.features if algorithm.needs_features else None
        rolled = rollout(line, line.predict, cond, ["p"], (iteration,), plan, siblings, features)
        rewards = -((rolled.latents[:, 0] - goal) ** 2)[None] / 2
        valid = torch.ones_like(rewards, dtype=torch.bool)
        if scaler:
            rewards = torch.from_numpy(scaler(rewards[..., None].numpy(), valid.numpy(), ["p"]))[..., 0]
        given = algorithm.advantages(rewards, valid).values
        for each in algorithm.examples(rolled, given, ["p"], (iteration,)):
            reference = torch.full_like(each.x_t, line.base[each.t])
            algorithm.loss(each, Velocities(line.predict(each.x_t, each.t, cond), reference)).total.mean().backward()
        for one in (optimizer, *critics):
            one.step()
            one.zero_grad()
        now = {t: v.item() for t, v in line.v.items()} | {0.0: 0.0}
        seen.append(line.end(config, 0.0, now))
    return float(np.mean(seen[-iterations // 3 :]))


@pytest.mark.parametrize("sampler", ["cps", "sde"])
def test_ppo_moves_a_gaussian_to_the_optimum_in_closed_form(sampler):
    critic = CriticSettings(hidden=32, learning_rate=2e-2)
    config = PPOConfig(
        sampler=sampler, eta=0.5, window=3, last_start=0, kl=0.5, gae_lambda=0.9, critic=critic, advantage_limit=100
    )
    line = Line(4)
    start, expected = line.end(config, 0.0, line.base), line.optimum(config, 2.0)
    assert 0.5 < expected - start < 0.9 * (2.0 - start)
    assert tuned(line, PPO(config), 2.0, 60, 128, 0.5) == pytest.approx(expected, abs=0.06)


def test_ddpo_moves_a_gaussian_to_the_optimum_in_closed_form():
    config = DDPOConfig(eta=0.5, kl=0.5, buffer=128, advantage_limit=100)
    line, goal = Line(4), 2.0
    spread, expected = line.spread(config), goal
    for _ in range(200):
        # Rewards are divided by their standard deviation, which depends on the mean that is reached.
        scale = math.sqrt(spread**2 / 2 + spread * (expected - goal) ** 2)
        expected += 0.2 * (line.optimum(config, goal, scale) - expected)
    start = line.end(config, 0.0, line.base)
    assert 0.5 < expected - start < 0.9 * (goal - start)
    assert tuned(line, DDPO(config), goal, 60, 128, 0.5) == pytest.approx(expected, abs=0.06)


class Brightness:
    """A reward that any generator can raise."""

    def __call__(self, images, prompts):
        return Rewards.of([image.mean() for image in images])


ALGORITHMS = pytest.mark.parametrize("config", [PPOConfig(window=2, last_start=1), DDPOConfig()], ids=["ppo", "ddpo"])


def trainer_of(generator, config, **settings):
    process_state()
    settings = TrainerSettings(**{"groups": 4, "group_size": 6, "steps": 4, **settings})
    return Trainer(generator, Brightness(), algorithm_of(config), settings, 0, Accelerator())


def prompts_at(iteration, count=4):
    return ShapesPrompts(type="shapes").draw(draw_key(0, iteration), count)


@ALGORITHMS
def test_the_trainer_raises_a_reward(generator, config):
    trainer = trainer_of(generator, config, learning_rate=5e-3)
    found = [trainer.iterate(prompts_at(0)) for _ in range(10)]
    assert found[-1].reward_mean > found[0].reward_mean + found[0].reward_std
    assert found[0].clip_fraction == 0
    assert found[0].ratio_error < 1e-5
    if isinstance(config, PPOConfig):
        assert found[0].watched["explained_variance"] == pytest.approx(0, abs=1e-6)
        assert max(one.watched["explained_variance"] for one in found[6:]) > 0.3


@ALGORITHMS
def test_a_resumed_trainer_goes_on_to_the_bit(generator, generator_folder, tmp_path, config):
    whole = trainer_of(generator, config, updates=2)
    for i in range(4):
        if i == 2:
            whole.save(tmp_path / "state")
        whole.iterate(prompts_at(i % 2))
    resumed = trainer_of(load_generator(generator_folder), config, updates=2)
    resumed.load(tmp_path / "state")
    for i in (2, 3):
        resumed.iterate(prompts_at(i % 2))
    assert resumed.scaler.state() == whole.scaler.state()
    parts = [(each.parts.get("critic"), each.trained) for each in (whole, resumed)]
    for critic, trained in parts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(trained, parts[0][1], strict=True))
        if critic is not None:
            before = Critic(generator.feature_width, 128, 0).out.weight
            assert not torch.equal(critic.out.weight, before)
            assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), parts[0][0].parameters(), strict=True))


def test_what_the_critic_reads_does_not_move_with_the_policy(generator):
    trainer = trainer_of(generator, PPOConfig(window=2, last_start=1), learning_rate=5e-3)
    cond = generator.encode(["a red ring"])
    x = normal(1, *generator.latent_shape)

    @torch.no_grad()
    def asked():
        return trainer._features(x, 0.5, cond), trainer.predict(trainer.tuned)(x, 0.5, cond)

    before, drawn = asked()
    trainer.iterate(prompts_at(0))
    after, moved = asked()
    assert torch.equal(before, after)
    assert not torch.equal(drawn, moved)


def test_settings_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="last_start: 2 is above 1"):
        PPOConfig(window=2, last_start=2).check(4, 6)
    with pytest.raises(ValueError, match="window: 1 step leaves none"):
        DDPOConfig().check(1, 6)
    with pytest.raises(ValueError, match="least: 16 is above the buffer of 8"):
        DDPOConfig(buffer=8)


def test_terms_are_mixed_by_weight_whatever_has_no_reward():
    terms = torch.stack([REWARDS, 3 * REWARDS.flip(1)], -1)
    terms[1, 0, 1] = float("nan")
    valid, weights = terms.isfinite().all(-1), torch.tensor([2.0, -1.0])
    for combine in ("rewards", "advantages"):
        found = mixed_advantages(terms, valid, weights, combine, PPO(PPOConfig()).advantages).values
        assert torch.equal(found.isfinite(), valid)
        torch.testing.assert_close(found[valid], (2 * REWARDS - 3 * REWARDS.flip(1))[valid])
