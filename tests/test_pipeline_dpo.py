"""Direct preference optimisation: pairs, loss and gradient, the known optimum of a Gaussian, resumed training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from models.loading import load_generator
from models.paths import endpoints, schedule
from models.samplers import cps, log_prob
from pipeline.prompts import PromptRow, ShapesPrompts, draw_key
from pipeline.rl import algorithm_of
from pipeline.rl.algorithm import Velocities
from pipeline.rl.d3po import D3PO, D3POConfig
from pipeline.rl.dpo import DPO, DPOConfig, Pairs, best_and_worst
from pipeline.rl.preferred import Preferences
from pipeline.rl.raft import RAFT, Chosen, RAFTConfig
from pipeline.rl.rollout import Plan, Rollout
from pipeline.rl.settings import TrainerSettings
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state
from pipeline.settings import UserError
from rewards.reward import Rewards
from tests.gaussian import SPREAD, Gaussian

RANDOM = torch.Generator().manual_seed(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=RANDOM)


def pairs_of(count: int = 5) -> Pairs:
    t, label = torch.rand(count, generator=RANDOM), torch.rand(count, generator=RANDOM)
    return Pairs(normal(count, 2, 3, 4), t, torch.arange(count), normal(count, 2, 3, 4), label)


def test_the_loss_against_its_formula():
    pairs, policy, reference = pairs_of(), normal(5, 2, 3, 4), normal(5, 2, 3, 4)
    found = DPO(DPOConfig(beta=3.0, kl=0.5)).loss(pairs, Velocities(policy, reference))
    for row in range(5):
        away = []
        for side in range(2):
            target = pairs.target[row, side]
            policy_error = ((target - policy[row, side]) ** 2).mean()
            away.append(policy_error - ((target - reference[row, side]) ** 2).mean())
        p, z = float(pairs.label[row]), float(-3.0 / 2 * (away[0] - away[1]))
        expected = -p * math.log(1 / (1 + math.exp(-z))) - (1 - p) * math.log(1 / (1 + math.exp(z)))
        expected += 0.5 * float(((policy[row] - reference[row]) ** 2).mean())
        assert found.total[row].item() == pytest.approx(expected, rel=1e-5)


def test_at_the_reference_the_loss_is_log_2_and_its_gradient_goes_from_loser_to_winner():
    pairs = pairs_of()
    pairs = Pairs(pairs.x_t, pairs.t, pairs.prompt, pairs.target, torch.ones(5))
    reference = normal(5, 2, 3, 4)
    policy = reference.clone().requires_grad_()
    loss = DPO(DPOConfig(beta=8.0)).loss(pairs, Velocities(policy, reference))
    assert loss.total.tolist() == pytest.approx([math.log(2)] * 5)
    (found,) = torch.autograd.grad(loss.total.sum(), policy)
    # d/dv of -log sigma(z) at z = 0 is beta / 4 of that of the errors' difference.
    towards = 8.0 / 4 * 2 * (reference - pairs.target) / 12
    torch.testing.assert_close(found, torch.stack([towards[:, 0], -towards[:, 1]], 1))


def test_on_a_variance_preserving_path_losses_are_of_eps():
    pairs = pairs_of()
    single = Chosen(pairs.x_t[:, 0], pairs.t, pairs.prompt, pairs.target[:, 0])
    cases = [(DPO(DPOConfig(beta=3.0, kl=0.5)), pairs), (RAFT(RAFTConfig(kl=0.5)), single)]
    for algorithm, examples in cases:
        policy, reference = (normal(*examples.x_t.shape) for _ in range(2))
        eps = [endpoints(examples.x_t, v, examples.t)[1] for v in (policy, reference, examples.target)]
        of_eps = replace(examples, target=eps[2])
        expected = algorithm.loss(of_eps, Velocities(*eps[:2]))
        found = algorithm.loss(examples, Velocities(policy, reference, counts=(1 - examples.t) ** 2))
        torch.testing.assert_close(found.total, expected.total)
        torch.testing.assert_close(found.kl, expected.kl)


@pytest.mark.parametrize("vp", [True, False])
def test_the_trainer_tells_how_velocities_count(generator_folder, vp):
    generator, seen = load_generator(generator_folder), []
    generator.vp = vp
    trainer = trainer_of(generator, RAFTConfig())
    asked = trainer.algorithm.loss
    trainer.algorithm.loss = lambda examples, v: (seen.append((examples.t, v.counts)), asked(examples, v))[1]
    trainer.iterate(prompts_at(trainer, 0))
    assert seen
    for t, counts in seen:
        torch.testing.assert_close(counts, (1 - t) ** 2 if vp else 1.0)


@pytest.mark.parametrize("config", [DPOConfig(), D3POConfig()], ids=["dpo", "d3po"])
def test_a_pair_is_two_rows_of_a_call(generator_folder, config):
    trainer, rows = trainer_of(load_generator(generator_folder), config, batch=5), []
    trainer.tuned.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    trainer.iterate(prompts_at(trainer, 0))
    assert max(rows) == 4


def test_both_pictures_of_a_pair_are_asked_about_at_their_time_and_prompt():
    pairs = pairs_of(3)

    def predict(x_t, t, prompt):
        return x_t * t.view(-1, 1, 1) + prompt.view(-1, 1, 1)

    for row in range(3):
        for side in range(2):
            expected = pairs.x_t[row, side] * pairs.t[row] + row
            torch.testing.assert_close(pairs.ask(predict)[row, side], expected)


@pytest.mark.parametrize("t", [1.0, 0.4])
def test_the_mean_of_a_gaussian_moves_to_the_optimum_in_closed_form(t):
    """Preferences of a linear reward k x are those of the reference tilted by it, whose mean is shifted.

    The policy's velocity differs from the reference's by -(t / V) (m - m0), and the errors of a pair under the same
    noise by -(t / V) (a - b). So z = beta (t / V)^2 (m - m0) (a - b), which is k (a - b) at
    m - m0 = k / beta (V / t)^2: at t = 1 the shift by k / beta of a KL-regularised optimum.
    """
    mean, slope, beta = 0.5, 0.3, 2.0
    x0 = mean + SPREAD * normal(200, 2, 1)
    noise = normal(200, 1, 1).expand(200, 2, 1)
    label = torch.sigmoid(slope * (x0[:, 0, 0] - x0[:, 1, 0]))
    pairs = Pairs((1 - t) * x0 + t * noise, torch.full((200,), t), torch.zeros(200), noise - x0, label)
    algorithm = DPO(DPOConfig(beta=beta))
    moved = torch.tensor(mean, requires_grad=True)
    optimizer = torch.optim.LBFGS([moved], lr=0.5, max_iter=200, tolerance_grad=1e-9, tolerance_change=1e-12)

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        policy, reference = (
            pairs.ask(lambda x, t, prompt, m=m: Gaussian.velocity(x, t, m)) for m in (moved, torch.tensor(mean))
        )
        total = algorithm.loss(pairs, Velocities(policy, reference)).total.mean()
        total.backward()
        return total

    optimizer.step(loss)
    variance = (1 - t) ** 2 * SPREAD**2 + t**2
    assert moved.item() == pytest.approx(mean + slope / beta * (variance / t) ** 2, rel=2e-3)


def rollout_of(latents: torch.Tensor) -> Rollout:
    plan = Plan.ode((1.0, 0.0), siblings=1)
    return Rollout(np.zeros((len(latents), 1, 1, 3), np.uint8), latents, (), plan, (plan.numbers,) * len(latents))


def test_online_pairs_are_best_against_worst_under_the_same_noise():
    latents, rewards = normal(6, 2, 3), torch.tensor([[3.0, 1.0, 2.0], [0.0, float("nan"), 5.0]])
    algorithm = DPO(DPOConfig(draws=3))
    advantages = algorithm.advantages(rewards, rewards.isfinite())
    assert best_and_worst(advantages.values).tolist() == [[0, 1], [2, 0]]
    sets = algorithm.examples(rollout_of(latents), advantages.values, ["p", "q"], (0, 1))
    assert len(sets) == 3
    for draw, pairs in enumerate(sets):
        assert ((pairs.t >= draw / 3) & (pairs.t <= (draw + 1) / 3)).all()
        t = pairs.t.view(-1, 1, 1, 1)
        x0, noise = pairs.x_t - t * pairs.target, pairs.x_t + (1 - t) * pairs.target
        torch.testing.assert_close(x0, torch.stack([latents[[0, 1]], latents[[5, 3]]]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(noise[:, 0], noise[:, 1], atol=1e-5, rtol=1e-5)
        assert pairs.label.tolist() == [1.0, 1.0]


PICTURES = {
    (text, number): np.full((32, 32, 3), 40 * number + 10 * place, np.uint8)
    for place, text in enumerate(["a red ring", "a blue cross", "a green disc", "a red disc"])
    for number in range(3)
}


def preferences_of(encode=None, invert=None) -> Preferences:
    rows = []
    for text in ("a red ring", "a blue cross", "a green disc", "a red disc"):
        for a, b, label, weight in ((0, 1, 0.2, 1.0), (1, 2, 0.7, 3.0), (0, 2, 0.9, 0.0)):
            names = {"prompt_id": text, "prompt": text, "skill": "one", "split": "train"}
            rows.append({**names, "sample_a": a, "sample_b": b, "label": label, "weight": weight})
    rows.append({**rows[0], "prompt": "held out", "split": "heldout"})
    means = encode or (lambda images: torch.from_numpy(images.mean((1, 2))).float())
    return Preferences(rows, lambda prompt_id, number: PICTURES[prompt_id, number], means, invert)


def test_pairs_of_the_run_are_drawn_by_weight_from_its_training_prompts():
    preferences = preferences_of()
    prompts = preferences.draw(0, 9)
    assert {prompt.text for prompt in prompts} == {text for text, _ in PICTURES}
    ids = [prompt.id for prompt in prompts]
    drawn = [choice for at in range(200) for choice in preferences.choose(ids, (0, at))]
    assert {choice.weight for choice in drawn} == {1.0, 3.0}
    assert sum(choice.weight == 3 for choice in drawn) / len(drawn) == pytest.approx(0.75, abs=0.05)
    assert preferences.choose(ids[::-1], (0, 7)) == preferences.choose(ids, (0, 7))[::-1]


def test_offline_pairs_are_the_runs_own_with_soft_labels():
    preferences = preferences_of()
    algorithm = algorithm_of(DPOConfig(source="preferences", draws=2), preferences)
    rewards = torch.full((2, 1), float("nan"))
    found = algorithm.advantages(rewards, rewards.isfinite())
    assert found.kept.tolist() == [True, True]
    ids = [PromptRow(text, "one").id for text in ("a blue cross", "a red disc")]
    sets = algorithm.examples(rollout_of(normal(2, 3)), found.values, ids, (0, 5))
    for draw, pairs in enumerate(sets):
        chosen = preferences.choose(ids, (0, 5, draw))
        assert pairs.label.tolist() == pytest.approx([choice.label for choice in chosen])
        x0 = pairs.x_t - pairs.t.view(-1, 1, 1) * pairs.target
        for row, choice in enumerate(chosen):
            for side, number in enumerate((choice.a, choice.b)):
                expected = float(PICTURES[choice.prompt_id, number].mean())
                assert x0[row, side].tolist() == pytest.approx([expected] * 3, abs=1e-3)


def test_supervised_fine_tuning_takes_the_pictures_that_win_most():
    """The pairs 0-1, 1-2 and 0-2 have labels 0.2, 0.7 and 0.9, and weights 1, 3 and 0: 1 wins 0.725, 2 wins 0.3 and 0
    wins 0.2."""
    preferences = preferences_of()
    ids = [PromptRow(text, "one").id for text in ("a blue cross", "a red disc")]
    assert [number for _, number in preferences.best(ids[0], 5)] == [1, 2, 0, 1, 2]
    algorithm = algorithm_of(RAFTConfig(source="preferences", best=2), preferences)
    for chosen in algorithm.examples(rollout_of(normal(2, 3)), torch.zeros(2, 1), ids, (0, 5)):
        x0 = chosen.x_t - chosen.t.view(-1, 1) * chosen.target
        texts = ("a blue cross", "a red disc")
        expected = [float(PICTURES[text, number].mean()) for text in texts for number in (1, 2)]
        assert x0.mean(1).tolist() == pytest.approx(expected, abs=1e-3)


def test_with_inversion_each_picture_has_the_noise_that_it_is_painted_from():
    def invert(latents, prompts):
        assert [prompt.split()[-1] for prompt in prompts] == ["cross", "cross", "disc", "disc"]
        return 2 * latents + 1

    preferences = preferences_of(invert=invert)
    algorithm = algorithm_of(DPOConfig(source="preferences", inversion=True), preferences)
    ids = [PromptRow(text, "one").id for text in ("a blue cross", "a red disc")]
    for pairs in algorithm.examples(rollout_of(normal(2, 3)), torch.zeros(2, 1), ids, (0, 5)):
        t = pairs.t.view(-1, 1, 1)
        x0, noise = pairs.x_t - t * pairs.target, pairs.x_t + (1 - t) * pairs.target
        torch.testing.assert_close(noise, 2 * x0 + 1, atol=1e-2, rtol=1e-4)


def test_a_run_without_pairs_is_told_so():
    with pytest.raises(UserError, match=r"finetune\.algorithm\.source: preferences, but the run has no pair"):
        Preferences([], lambda *key: None, lambda images: None)


def test_d3po_pairs_the_steps_of_the_best_and_the_worst_and_its_loss_is_its_formula():
    algorithm = D3PO(D3POConfig(beta=5.0, window=2))
    mean = torch.tensor(0.2)
    plan = algorithm.rollout_plan(0, 0, tuple(schedule(4)), 6)
    rolled = Gaussian(3).painted(mean, plan, (0, 0))
    rewards = rolled.latents.sum(1)[None]
    found = algorithm.advantages(rewards, torch.ones_like(rewards, dtype=torch.bool))
    first, second = algorithm.examples(rolled, found.values, ["p"], (0, 0))
    best, worst = int(rewards.argmax()), int(rewards.argmin())
    for side, sibling in enumerate((best, worst)):
        torch.testing.assert_close(first.x_t[0, side], rolled.transitions[0].x_t[0])
        torch.testing.assert_close(first.x_s[0, side], rolled.transitions[0].x_s[0, sibling])
        torch.testing.assert_close(second.x_t[0, side], rolled.transitions[1].x_t[sibling])
        torch.testing.assert_close(second.x_s[0, side], rolled.transitions[1].x_s[sibling, 0])
    for steps in (first, second):
        policy, reference = (steps.ask(lambda x, t, _, m=m: Gaussian.velocity(x, t, m)) for m in (0.5, 0.2))
        logs = []
        for v in (policy, reference):
            drawn = cps(steps.x_t[0], v[0], steps.t, steps.s, 0.7, None)
            logs.append(log_prob(steps.x_s[0], drawn.mean, drawn.std))
        z = 5.0 * ((logs[0][0] - logs[1][0]) - (logs[0][1] - logs[1][1]))
        expected = -torch.log(torch.sigmoid(z))
        torch.testing.assert_close(algorithm.loss(steps, Velocities(policy, reference)).total[0], expected)
        at_reference = algorithm.loss(steps, Velocities(reference, reference))
        assert at_reference.total.item() == pytest.approx(math.log(2))
        assert at_reference.kl.item() == 0


class Brightness:
    """A reward that any generator can raise."""

    def __call__(self, images, prompts):
        return Rewards.of([image.mean() for image in images])


def trainer_of(generator, config, **settings):
    process_state()
    siblings = 1 if config.offline else 6
    algorithm = algorithm_of(config, preferences_of(generator.latents) if config.offline else None)
    settings = TrainerSettings(**{"groups": 4, "steps": 3, "learning_rate": 5e-3, **settings})
    settings = settings.model_copy(update={"group_size": siblings})
    return Trainer(generator, Brightness(), algorithm, settings, 0, Accelerator())


def prompts_at(trainer, iteration):
    config = trainer.algorithm.config
    source = trainer.algorithm.preferences if config.offline else ShapesPrompts(type="shapes")
    return source.draw(draw_key(0, iteration), 4)


CONFIGS = [
    DPOConfig(),
    DPOConfig(source="preferences", beta=200.0),
    D3POConfig(),
    RAFTConfig(),
    RAFTConfig(source="preferences", best=2),
]
NAMES = ["dpo", "dpo-offline", "d3po", "raft", "supervised"]


@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_a_resumed_trainer_goes_on_to_the_bit(generator_folder, tmp_path, config):
    whole = trainer_of(load_generator(generator_folder), config)
    for i in range(3):
        if i == 2:
            whole.save(tmp_path / "state")
        last = whole.iterate(prompts_at(whole, i))
    resumed = trainer_of(load_generator(generator_folder), config)
    resumed.load(tmp_path / "state")
    again = resumed.iterate(prompts_at(resumed, 2))
    assert (again.loss, again.kl, again.watched) == (last.loss, last.kl, last.watched)
    assert last.kl > 0
    assert all(torch.equal(a, b) for a, b in zip(whole.trained, resumed.trained, strict=True))


@pytest.mark.parametrize("config", [DPOConfig(), D3POConfig(), RAFTConfig(kl=0.0)], ids=["dpo", "d3po", "raft"])
def test_the_trainer_raises_a_reward_online(generator_folder, config):
    trainer = trainer_of(load_generator(generator_folder), config)
    found = [trainer.iterate(prompts_at(trainer, i)) for i in range(12)]
    assert found[-1].reward_mean > found[0].reward_mean + 0.5 * found[0].reward_std


def test_offline_the_pairs_of_the_run_are_told_apart_better_and_better(generator_folder):
    trainer = trainer_of(load_generator(generator_folder), CONFIGS[1])
    found = [trainer.iterate(prompts_at(trainer, i)) for i in range(12)]
    assert found[0].loss == pytest.approx(math.log(2), abs=1e-5)
    assert found[-1].loss < found[0].loss
    assert found[-1].watched["preference_accuracy"] > 0.7
    assert len(found[0].images) == 4


def test_the_loss_of_raft_against_its_formula():
    algorithm = RAFT(RAFTConfig(best=2, draws=2, kl=0.1))
    latents, rewards = normal(8, 2, 3), torch.tensor([[3.0, 1.0, 2.0, 0.0], [float("nan"), 7.0, 5.0, 6.0]])
    found = algorithm.advantages(rewards, rewards.isfinite())
    sets = algorithm.examples(rollout_of(latents), found.values, ["p", "q"], (0, 1))
    assert found.values.tolist() == [[4, 2, 3, 1], [0, 4, 2, 3]]
    assert found.kept.tolist() == [True, True]
    for chosen in sets:
        assert chosen.prompt.tolist() == [0, 0, 1, 1]
        t = chosen.t.view(-1, 1, 1)
        torch.testing.assert_close(chosen.x_t - t * chosen.target, latents[[0, 2, 5, 7]], atol=1e-5, rtol=1e-5)
        v, reference = normal(4, 2, 3), normal(4, 2, 3)
        noise = chosen.x_t + (1 - t) * chosen.target
        expected = ((v - (noise - latents[[0, 2, 5, 7]])) ** 2).mean((1, 2)) + 0.1 * ((v - reference) ** 2).mean((1, 2))
        torch.testing.assert_close(algorithm.loss(chosen, Velocities(v, reference)).total, expected)


def test_raft_moves_a_gaussian_to_the_mean_of_the_best():
    """Of 3 draws the best is 3 / (2 sqrt(pi)) standard deviations above the mean, and the flow-matching loss is
    least for a network that paints the mean of the best."""
    mean, groups = 0.5, 4000
    algorithm = RAFT(RAFTConfig(draws=1, kl=0.0))
    x0 = mean + SPREAD * normal(3 * groups, 1)
    found = algorithm.advantages(x0.view(groups, 3), torch.ones(groups, 3, dtype=torch.bool))
    ids = [str(prompt) for prompt in range(groups)]
    (chosen,) = algorithm.examples(rollout_of(x0), found.values, ids, (0, 1))
    # At the time 1 all that a network knows of a picture is the mean: v = x_1 - mean.
    end = chosen.x_t + (1 - chosen.t.view(-1, 1)) * chosen.target
    moved = torch.tensor(mean, requires_grad=True)
    chosen = type(chosen)(end, 1.0, chosen.prompt, chosen.target)
    policy = chosen.ask(lambda x, t, prompt: Gaussian.velocity(x, t, moved))
    (gradient,) = torch.autograd.grad(algorithm.loss(chosen, Velocities(policy)).total.mean(), moved)
    # The loss is quadratic in the mean, with the second derivative 2.
    assert mean - gradient.item() / 2 == pytest.approx(mean + SPREAD * 3 / (2 * math.sqrt(math.pi)), abs=0.05)


def test_settings_that_leave_nothing_to_choose_from():
    with pytest.raises(ValueError, match=r"algorithm\.best: 6 of a group of 6"):
        RAFTConfig(best=6).check(4, 6)
    with pytest.raises(ValueError, match=r"algorithm\.window: 4 of 4 steps"):
        D3POConfig(window=4).check(4, 6)
