"""The watch over fine-tuning: what it looks at, how far the policy has gone, and what it does about a hacked reward."""

import json
import math
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import pipeline.rl.watch
from judges.base import Unavailable
from models import lora
from models.generator import Conditioning, sample
from models.keys import sample_key
from models.loading import load_generator
from models.paths import schedule
from pipeline.config import Config
from pipeline.prompts import PromptRow, ShapesPrompts, draw_key
from pipeline.rl.checks import Check, Seen, best, checked, from_json, retained, to_json
from pipeline.rl.grpo import GRPO, GRPOConfig
from pipeline.rl.looking import EVALUATED, Wanted, divergences, held_out, of_same_skills, painted, wanted
from pipeline.rl.settings import TrainerSettings, WatchSettings
from pipeline.rl.trainer import Trainer
from pipeline.rl.watch import CHECKS, Watch
from pipeline.runner import Context, Interrupted, process_state
from pipeline.settings import load
from pipeline.stages import finetune
from pipeline.store import Artifact, read_rows
from rewards.hacking import STOPPING, Measured, Signal
from rewards.mixture import mixture_of
from rewards.reward import Rewards
from rewards.shortcuts import statistics

SHAPES = ShapesPrompts(type="shapes")
BRIGHT = {
    "reward": {"terms": [{"type": "rule", "statistic": "brightness"}]},
    "iterations": 16,
    "groups": 4,
    "group_size": 8,
    "steps": 4,
    "learning_rate": 5e-3,
    "average": 0.5,
}
WATCH = {"every": 4, "prompts": 50, "images": 2}


class Brightness:
    """A reward that is easily hacked."""

    def __call__(self, images, prompts):
        return Rewards.of([image.mean() / 10 for image in images])


def drawn(iterations=10):
    return [prompt for k in range(iterations) for prompt in SHAPES.draw(draw_key(0, "finetune", k), 8)]


# What is looked at.


def test_held_out_prompts_differ_are_spread_over_skills_and_are_not_trained_on():
    prompts = held_out(SHAPES, 0, 64)
    assert len(set(prompts)) == 64
    assert len({prompt.skill for prompt in prompts}) == 6
    assert not set(prompts) & set(drawn(200))


def test_held_out_prompts_are_those_of_no_evaluation_where_a_skill_has_others():
    evaluated = set(SHAPES.held_out(draw_key(0, "evaluate"), EVALUATED))
    scarce = {prompt.skill for prompt in held_out(SHAPES, 0, 64) if prompt in evaluated}
    assert not scarce & {"position", "color_attribution"}


def test_trained_prompts_are_of_the_same_skills():
    like = [PromptRow("x", "a"), PromptRow("y", "a"), PromptRow("z", "b")]
    pool = [PromptRow(text, skill) for text, skill in ("1b", "1b", "2b", "3a", "4c", "5a", "6a")]
    assert [prompt.text for prompt in of_same_skills(iter(pool), like)] == ["1", "3", "5"]


@pytest.fixture
def trainer(generator_folder):
    process_state()
    settings = TrainerSettings(groups=4, group_size=6, steps=4, learning_rate=5e-3, batch=32)
    generator = load_generator(generator_folder)
    return Trainer(generator, Brightness(), GRPO(GRPOConfig(last_start=2)), settings, 0, Accelerator())


def test_a_picture_is_the_same_whoever_paints_it_and_the_base_is_at_no_distance_from_itself(trainer):
    every = wanted(SHAPES, 0, 50, 2, drawn())
    images, kl = painted(trainer, every, 0, 2)
    assert kl == [0.0] * 100
    mine = [place for place, one in enumerate(every) if one.number % 2]
    again, _ = painted(trainer, [every[place] for place in mine], 0, 2)
    assert np.abs(again.astype(int) - images[mine]).max() <= 1


def test_what_is_painted_is_what_would_be_kept_and_training_goes_on_from_where_it_was(
    trainer, generator_folder, tmp_path
):
    for k in range(3):
        trainer.iterate(SHAPES.draw(draw_key(0, k), 4))
    weights = [p.clone() for p in trainer.trained]
    every = wanted(SHAPES, 0, 50, 2, [])
    images, kl = painted(trainer, every, 0, 2)
    assert np.mean(kl) > 0
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.trained, strict=True))
    trainer.average.swap()
    lora.save(trainer.tuned, tmp_path)
    keys = [sample_key(0, "watch", f"{one.prompt.id}/{one.sample}", 0, "start") for one in every]
    kept = load_generator(generator_folder, tmp_path)
    for image, other in zip(images, sample(kept, [one.prompt.text for one in every], keys, steps=4), strict=True):
        assert np.abs(image.astype(int) - other).max() <= 1


class Gaussian:
    """The exact velocity for data N(mean, 1) of every dimension; with the adapter off the mean is 0."""

    def __init__(self, mean):
        self.mean = self.now = mean
        self.transformer = self

    def disable_lora(self):
        self.now = 0.0

    def enable_lora(self):
        self.now = self.mean

    def predict(self, x, t, cond):
        t = t.view(-1, 1)
        away = (x - (1 - t) * self.now) / ((1 - t) ** 2 + t**2)
        return t * away - self.now - (1 - t) * away


@pytest.mark.parametrize("steps", [4, 8])
def test_the_kl_of_two_gaussians(steps):
    """With exact velocities the bound is tight: it is the KL at the last time at which the sampler asks."""
    generator, siblings, dimensions = Gaussian(0.5), 8, 3
    every = [Wanted(PromptRow(str(n), ""), n, k, True) for n in range(400) for k in range(siblings)]
    latents = 0.5 + torch.randn(len(every), dimensions, generator=torch.Generator().manual_seed(0))
    fake = SimpleNamespace(
        generator=generator,
        reference=lambda: lora.reference(generator),
        times=tuple(schedule(steps)),
        settings=SimpleNamespace(batch=1000),
    )
    cond = Conditioning(torch.zeros(len(every), 1, 1))
    found = np.mean(list(divergences(fake, latents, cond, every, 0, siblings)))
    t = 1 / steps
    expected = dimensions * ((1 - t) * 0.5) ** 2 / (2 * ((1 - t) ** 2 + t**2))
    assert found == pytest.approx(expected, rel=0.02)
    assert generator.now == 0.5


# What is decided.


def check(iteration, kl=0.0, judge=0.0, alarms=()):
    signals = tuple(Signal(name, 1.0, 0.5, "alarm") for name in alarms)
    return Check(iteration, kl, 0.0, 0.0, judge, signals)


def test_the_settings_name_the_signals_that_stop():
    (names,) = get_args(WatchSettings.model_fields["stop_on"].annotation)[:1]
    assert set(get_args(names)) == set(STOPPING)


def test_the_best_check_is_where_the_judge_thinks_most_and_without_a_judge_the_last():
    course = [check(0, 0, 1.0), check(20, 1, 3.0), check(40, 4, 3.0), check(60, 9, 2.0)]
    assert best(course) == 1
    assert best(course[:1]) == 0
    assert best([*course, check(80, 16, None)]) == 1
    assert best([check(0, 0, None), check(20, 1, None)]) == 1


@pytest.mark.parametrize("judged", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("patience", [1, 2, 3])
def test_what_a_run_goes_back_to_was_retained(judged, patience):
    rng = np.random.default_rng(patience)
    for _ in range(100):
        judge = [float(value) if rng.random() < judged else None for value in rng.normal(size=10)]
        course = [check(k, float(k), judge[k]) for k in range(10)]
        kept = {0}
        for end in range(1, 11):
            kept = retained(course[:end], patience) & (kept | {end - 1})
            assert kept == retained(course[:end], patience)
            assert len(kept) <= patience + 1
            if end > patience:
                assert course[best(course[: end - patience])].iteration in kept


def measured(rng, rise=0.0, noise=1.0):
    prompts = np.repeat(np.arange(60), 2)
    return Measured(rise + np.repeat(np.arange(60) % 5, 2) + noise * rng.normal(size=120), prompts)


def seen_by(rng, kl, reward=0.0, judge=0.0):
    rated = measured(rng, reward)
    judged = Measured(rated.values - reward + judge + 0.1 * rng.normal(size=120), rated.prompts)
    return Seen(kl, rated, measured(rng, reward), judged, rng.normal(size=(120, 4)), rng.normal(size=(120, 7)))


def course_of(rng, rises, stopping=STOPPING):
    base = seen_by(rng, 0.0)
    checks = [checked(0, base, base, [], 2, stopping)]
    for k, (reward, judge) in enumerate(rises, 1):
        checks.append(checked(20 * k, seen_by(rng, float(k), reward, judge), base, checks, 2, stopping))
    return checks


def test_a_reward_that_leaves_the_judge_behind_stops_the_run_which_goes_back_to_the_judges_best():
    rises = [(1, 1), (2, 2), (4, 1.5), (6, 1)]
    checks = course_of(np.random.default_rng(0), rises)
    assert [one.action for one in checks] == ["go_on", "go_on", "go_on", "warn", "stop"]
    assert checks[-1].roll_back_to == 40
    assert "judge_divergence" in checks[-1].alarms
    assert course_of(np.random.default_rng(0), rises, stopping=())[-1].action == "warn"


def test_a_reward_and_a_judge_that_rise_together_go_on():
    checks = course_of(np.random.default_rng(0), [(1, 1), (2, 2), (3, 3), (4, 4)])
    assert not {name for one in checks for name in one.alarms} & set(STOPPING)


def test_a_check_is_read_as_it_was_written():
    checks = course_of(np.random.default_rng(0), [(4, 0), (6, 0)])
    assert any(math.isnan(signal.threshold) for signal in checks[0].signals)
    for one in checks:
        text = json.dumps(to_json(one), allow_nan=False)
        assert json.dumps(to_json(from_json(json.loads(text))), allow_nan=False) == text


# What a run does.


class Eye:
    """A judge whose margin is `function` of a picture."""

    def __init__(self, function):
        self.function = function

    def score(self, images, prompts):
        return [SimpleNamespace(margin=float(self.function(image)), valid=True) for image in images]


LIKES_DARKNESS = Eye(lambda image: -20 * statistics(image).brightness)
AGREES = Eye(lambda image: 20 * statistics(image).brightness)


@pytest.fixture(scope="module")
def tune(config_at, folder):
    """Runs the stage alone, with a planted judge, and gives its artifact."""

    def run(name, judge, **settings):
        config = load(Config, config_at(name, finetune={**BRIGHT, "watch": WATCH, **settings}))
        artifact = Artifact(folder / name / "finetune")
        artifact.begin("alone")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(config.judge), "build", lambda self, device: judge)
            finetune.FINETUNE.run(Context(config, artifact, {}))
        artifact.finish({})
        return artifact

    return run


@pytest.fixture(scope="module")
def hacked(tune):
    return tune("hacked", LIKES_DARKNESS)


def told(artifact):
    return json.loads(artifact.path("signals.json").read_text())


def test_a_hacked_reward_stops_the_run_which_goes_back(hacked, generator_folder):
    story = told(hacked)
    *_, before, last = story["checks"]
    assert story["stopped"]
    assert [one["action"] for one in story["checks"][-2:]] == ["warn", "stop"]
    assert before["iteration"] < last["iteration"] < BRIGHT["iterations"]
    assert last["iteration"] == max(read_rows(hacked, "curves-*.parquet")["iteration"]) + 1
    assert story["kept"] == last["roll_back_to"] < before["iteration"]
    assert 0 == story["checks"][0]["kl"] < before["kl"] < last["kl"]
    rows = read_rows(hacked, "checks-*.parquet").filter(lambda row: row["iteration"] == story["kept"])[:6]
    named = zip(rows["prompt_id"], rows["sample"], strict=True)
    keys = [sample_key(0, "watch", f"{prompt}/{sibling}", 0, "start") for prompt, sibling in named]
    kept = load_generator(generator_folder, hacked.folder / finetune.ADAPTER)
    for image, other in zip(rows["image"], sample(kept, rows["prompt"], keys, BRIGHT["steps"]), strict=True):
        assert np.abs(np.asarray(image).astype(int) - other).max() <= 1


def test_checks_are_rows_for_others_to_measure_on(hacked):
    story, rows = told(hacked), read_rows(hacked, "checks-*.parquet")
    assert rows.column_names == list(CHECKS)
    assert len(rows) == len(story["checks"]) * WATCH["prompts"] * WATCH["images"]
    for one in story["checks"]:
        mine = rows.filter(lambda row, at=one["iteration"]: row["iteration"] == at)
        assert set(mine["kl"]) == {np.float32(one["kl"])}
        assert np.mean(mine["reward"]) == pytest.approx(one["reward"], abs=1e-6)
        assert mine["judge"] == pytest.approx(
            [LIKES_DARKNESS.function(np.asarray(image)) for image in mine["image"]], abs=1e-5
        )


def test_a_run_whose_judge_agrees_goes_on_to_the_end(tune):
    found = tune("honest", AGREES, iterations=8)
    story = told(found)
    assert not story["stopped"]
    assert story["kept"] == story["checks"][-1]["iteration"] == 8
    assert not {name for one in story["checks"] for name in one["alarms"]} & {"judge_divergence", "kl_frontier"}
    assert story["checks"][-1]["reward"] > story["checks"][0]["reward"]


def test_another_algorithm_is_watched_alike(tune):
    found = tune("forward", LIKES_DARKNESS, algorithm={"type": "nft"})
    assert told(found)["stopped"]


class Killed(BaseException):
    pass


def killed_at(module, name, count):
    """`module.name`, which is cut off before its `count`-th call."""
    function = getattr(module, name)

    def counted(*args, **kwargs):
        nonlocal count
        count -= 1
        if count == 0:
            raise Killed
        return function(*args, **kwargs)

    return counted


@pytest.mark.parametrize(
    ("module", "name", "count"),
    [
        (pipeline.rl.watch, "atomic_write_text", 3),  # within a check
        (finetune, "_drawn", 25),  # between two
        (finetune, "write_rows", 1),  # after the one that stopped it
    ],
)
def test_a_run_that_was_cut_off_goes_on_to_the_byte(tune, hacked, module, name, count, monkeypatch):
    run = f"cut-{name}-{count}"
    monkeypatch.setattr(module, name, killed_at(module, name, count))
    with pytest.raises(Killed):
        tune(run, LIKES_DARKNESS)
    monkeypatch.undo()
    found = tune(run, LIKES_DARKNESS)
    assert {n: r.sha256 for n, r in found.files.items()} == {n: r.sha256 for n, r in hacked.files.items()}


def test_without_a_watch_nothing_is_checked(tune):
    found = tune("blind", LIKES_DARKNESS, watch=None, iterations=1)
    assert not {"signals.json", "checks-00000.parquet"} & set(found.files)


def test_a_reward_that_has_changed_rates_the_base_model_anew(trainer, config_at, tmp_path):
    artifact = Artifact(tmp_path / "finetune")
    artifact.begin("alone")
    context = Context(load(Config, config_at("again")), artifact, {})
    watch = Watch(context, WatchSettings(prompts=50, stop_on=()), trainer, None, drawn())
    watch.check()
    assert not list(artifact.resume.glob("adapter-*"))
    before = watch.base_seen
    trainer.reward = mixture_of(lambda images, prompts: Rewards.of([image.std() for image in images]))
    watch.rate_again()
    after = watch.base_seen
    assert after.reward.values == pytest.approx([image.std() for image in before.pictures], rel=1e-5)
    assert np.array_equal(after.pixels, before.pixels)
    watch.checks.clear()
    watch.check()
    assert watch.checks[0].reward == pytest.approx(after.reward.means.mean())
    assert max(abs(signal.value) for signal in watch.checks[0].signals) == 0


def test_a_judge_out_of_reach_stops_the_run_resumably(tune):
    class Away:
        def score(self, images, prompts):
            raise Unavailable("nobody answers")

    with pytest.raises(Interrupted):
        tune("away", Away(), iterations=1)
    assert told(tune("away", LIKES_DARKNESS, iterations=1))["kept"] == 1
