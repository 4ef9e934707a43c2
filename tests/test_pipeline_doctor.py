"""The doctor finds exactly what is wrong with a run: here each has one planted bug, and the honest one none."""

import contextlib
import json
import math
from dataclasses import replace

import pytest
import torch
import typer
from peft.tuners.lora import Linear

import pipeline
import pipeline.rl.grpo
import pipeline.rl.rollout
import pipeline.rl.trainer
from models import lora
from models.samplers import SAMPLERS
from pipeline import cli
from pipeline.config import Config
from pipeline.doctoring import forecast, learning, policy, reward, sampling
from pipeline.doctoring import subject as subjects
from pipeline.doctoring.check import Check
from pipeline.doctoring.subject import examined, flat, gradients
from pipeline.runner import Context, process_state
from pipeline.settings import UserError, load
from pipeline.store import Artifact
from pipeline.verbs import doctor as verb
from pipeline.verbs.doctor import CHECKS
from rewards.reward import ModelReward, Rewards
from tests.processes import launched
from tests.tiny_pipelines import FAMILIES


def examine(config, folder, say=lambda line: None):
    return examined(config, Context(config, Artifact(folder / "none"), {}, process_state()), say)


@pytest.fixture(scope="module")
def config(config_at):
    return load(Config, config_at("examined"))


@pytest.fixture(scope="module")
def subject(config, folder):
    return examine(config, folder)


def test_an_honest_run_is_all_green_untouched_and_told_as_json_alone(config, folder, capsys):
    before = sorted(folder.rglob("*"))
    cli.doctor(folder / "examined.yaml", [], as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["healthy"]
    assert told["notes"] == ["the reward model of the run is not trained yet: its untrained backbone stands in for it"]
    assert [check["name"] for check in told["checks"] if check["ok"] is not True] == [learning.RANKS]
    assert len(told["checks"]) == len(CHECKS) + 3
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("kind", ["nft", "ppo", "refl"])
def test_other_algorithms_are_examined_too(config, folder, kind):
    changed = load(Config, folder / "examined.yaml", [f"finetune.algorithm={{type: {kind}}}", "finetune.steps=6"])
    other = examine(changed, folder)
    found = {check.name: check.ok for check in (one(other) for one in CHECKS)}
    assert False not in found.values()
    assert found[policy.RATIO] is (True if kind == "ppo" else None)
    assert found[policy.KL]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bfloat16_weights_are_examined_in_float32_but_for_their_ratio(config_at, folder, tmp_path_factory, dtype):
    generator = {"checkpoint": str(FAMILIES["sd3"].saved(tmp_path_factory)), "resolution": 32, "max_tokens": 12}
    path = config_at(f"coarse-{dtype}", generator={**generator, "dtype": "bfloat16"})
    other = examine(load(Config, path, [f"finetune.dtype={dtype}"]), folder)
    assert (other.generator.dtype, other.own.dtype) == (torch.float32, torch.bfloat16)
    found = {check.name: check for check in (one(replace(other)) for one in CHECKS)}
    assert not [check for check in found.values() if check.ok is False]
    assert {name for name, check in found.items() if check.ok is None} == {learning.RANKS, policy.TWIN}
    assert "bfloat16, against" in found[policy.LOW].about
    assert forecast.memory(other, forecast.measured(other)).ok


def test_where_float32_weights_have_no_room_only_ratios_are_examined(config_at, folder, tmp_path_factory, monkeypatch):
    generator = {"checkpoint": str(FAMILIES["sd3"].saved(tmp_path_factory)), "resolution": 32, "max_tokens": 12}
    config = load(Config, config_at("crowded", generator={**generator, "dtype": "bfloat16"}))
    assert examine(config, folder).exact
    monkeypatch.setattr(subjects, "device_memory", lambda ranks: 2**20)
    other = examine(config, folder)
    found = {check.name: check.ok for check in verb.diagnosed(other)}
    assert found == {
        policy.RATIO: True,
        policy.LOW: True,
        "checks in float32": None,
        forecast.MEMORY: True,
        forecast.TIME: True,
    }


def test_copies_share_the_weights_that_nobody_trains(subject, config, folder):
    known = {id(weight) for weight in subject.generator.transformer.parameters()}
    trainer = subject.trainer()
    assert {id(weight) for weight in trainer.tuned.parameters() if not weight.requires_grad} == known
    assert not known & {id(weight) for weight in trainer.plain.parameters()}
    whole = examine(load(Config, folder / "examined.yaml", ["finetune.lora=null"]), folder)
    known = {id(weight) for weight in whole.generator.transformer.parameters()}
    assert not known & {id(weight) for weight in whole.trainer().tuned.parameters()}


def kl_without_a_gradient(monkeypatch):
    monkeypatch.setattr(pipeline.rl.grpo, "gaussian_kl", torch.no_grad()(pipeline.rl.grpo.gaussian_kl))


def a_ratio_that_is_not_one(monkeypatch):
    right = pipeline.rl.grpo.log_prob
    monkeypatch.setattr(pipeline.rl.grpo, "log_prob", lambda *asked: right(*asked) + 1e-5)


def a_step_of_the_wrong_length(monkeypatch):
    right = SAMPLERS["cps"]
    monkeypatch.setitem(SAMPLERS, "cps", lambda x, v, t, s, *rest: right(x, v, t, s + 0.05 * (t - s), *rest))


def noise_of_a_batch(monkeypatch):
    def drawn(keys, shape, device="cpu"):
        return torch.randn(len(keys), *shape, generator=torch.Generator().manual_seed(keys[0])).to(device)

    monkeypatch.setattr(pipeline.rl.rollout, "keyed_noise", drawn)


def an_adapter_that_stays_on(monkeypatch):
    monkeypatch.setattr(lora, "reference", lambda transformer: contextlib.nullcontext())


def a_twin_with_half_of_the_adapter(monkeypatch):
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: right(self, adapter) / 2)


def pieces_that_weigh_as_batches(monkeypatch):
    right = pipeline.rl.trainer.Trainer._backward

    def wrong(self, piece, cond, texts, weight):
        return right(self, piece, cond, texts, weight / len(piece))

    monkeypatch.setattr(pipeline.rl.trainer.Trainer, "_backward", wrong)


def a_reward_among_batch_mates(monkeypatch):
    right = ModelReward.__call__

    def centred(self, images, prompts):
        values = right(self, images, prompts).values
        return Rewards.of(values - values.mean())

    monkeypatch.setattr(ModelReward, "__call__", centred)


def a_checkpoint_without_the_average(monkeypatch):
    right = pipeline.rl.trainer.save_state

    def forgetful(folder, modules, optimizers, extra):
        fresh = pipeline.rl.trainer.Average({"lora": modules["lora"]}, 0.0)
        right(folder, {**modules, "average": fresh}, optimizers, extra)

    monkeypatch.setattr(pipeline.rl.trainer, "save_state", forgetful)


@pytest.mark.parametrize(
    ("plant", "line"),
    [
        (kl_without_a_gradient, policy.KL),
        (a_ratio_that_is_not_one, policy.RATIO),
        (a_step_of_the_wrong_length, sampling.ODE),
        (noise_of_a_batch, sampling.KEYED),
        (an_adapter_that_stays_on, policy.OFF),
        (a_twin_with_half_of_the_adapter, policy.TWIN),
        (pieces_that_weigh_as_batches, learning.ACCUMULATION),
        (a_reward_among_batch_mates, reward.REWARD),
        (a_checkpoint_without_the_average, learning.RESUME),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_bug_turns_its_line_red_and_no_other(subject, monkeypatch, plant, line):
    plant(monkeypatch)
    found = [check(replace(subject)) for check in CHECKS]
    (red,) = [check for check in found if check.ok is False]
    assert red.name == line
    assert red.remedy


UNSYNCHRONISED = """
import sys
from accelerate import Accelerator
from pipeline.config import Config
from pipeline.settings import load
from pipeline.doctoring import learning
from pipeline.verbs import doctor as verb

config = load(Config, sys.argv[1])
every, verb.CHECKS = verb.CHECKS, (learning.same_on_all_processes,)
assert verb.doctor(config, as_json=True)
verb.CHECKS = every
Accelerator.prepare_model = lambda self, model, *rest, **more: model
assert not verb.doctor(config, as_json=True)
"""


def test_two_processes_hold_one_gradient_unless_the_exchange_is_skipped(config, folder):
    script = folder / "launched.py"
    script.write_text(UNSYNCHRONISED)
    done = launched(2, script, folder / "examined.yaml", env={"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    honest, broken = json.loads("[" + done.stdout.replace("}\n{", "},{") + "]")
    assert {check["name"]: check["measured"] for check in honest["checks"] if check["ok"]}[learning.RANKS] == 1
    red = {check["name"]: check["measured"] for check in broken["checks"] if check["ok"] is False}
    assert red == {learning.RANKS: 2}


def test_a_red_line_ends_with_code_2_and_its_remedy(config, folder, capsys, monkeypatch):
    kl_without_a_gradient(monkeypatch)
    monkeypatch.setattr(verb, "CHECKS", (policy.kl_to_base, policy.adapter_off))
    with pytest.raises(typer.Exit) as ended:
        cli.doctor(folder / "examined.yaml", [])
    assert ended.value.exit_code == 2
    (red,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("red")]
    assert policy.KL in red
    assert "no_grad" in red


def test_what_is_no_number_is_red():
    assert Check.at_most("a", math.nan, 1.0, "remedy", "").remedy == "remedy"
    assert Check.at_least("a", math.nan, 1.0, "remedy", "").ok is False


def test_pairs_that_are_not_there_are_one_line(config, folder):
    changed = load(Config, folder / "examined.yaml", ["finetune.algorithm={type: dpo, source: preferences}"])
    with pytest.raises(UserError, match="run the stage prefer first"):
        examine(changed, folder)


def test_off_line_it_learns_from_the_pairs_of_the_run(config_at, folder):
    path = config_at("paired", finetune={"algorithm": {"type": "dpo", "source": "preferences", "kl": 0.1}})
    for stage in ("sample", "judge", "prefer"):
        pipeline.run_stage(path, stage)
    other = examine(load(Config, path), folder)
    assert {prompt.id for prompt in other.prompts} <= set(other.preferences.choices)
    for check in (sampling.keyed_noise, learning.accumulation, learning.save_load_continue, policy.kl_to_base):
        assert check(other).ok


def test_the_gradients_are_those_before_the_first_step(subject):
    trainer = subject.trainer()
    start = flat(trainer.trained)
    found, done = gradients(trainer, subject.prompts)
    assert float(flat(found).norm()) == pytest.approx(done.grad_norm, rel=1e-5)
    assert not torch.equal(flat(trainer.trained), start)


def test_what_is_kept_for_the_gradient_counts_once_and_until_it_is_let_go():
    x, weight = torch.randn(100, requires_grad=True), torch.randn(100)
    with forecast.Saved([weight]) as saved:
        y = (weight * x).exp()  # keeps x for nobody, the weight that does not count, and its own result
        z = y.sin() + y.cos()  # keeps that result twice more
        assert saved.now == saved.most == 400
        z.sum().backward()
    del y, z
    assert (saved.now, saved.most) == (0, 400)


def test_a_forecast_grows_with_the_run_and_is_red_where_memory_ends(subject, monkeypatch):
    found = forecast.measured(subject)
    assert found.trained == 16 * sum(p.numel() for p in subject.trainer().trained)
    settings = subject.config.finetune
    larger = settings.model_copy(update={"groups": 8 * settings.groups, "iterations": 3 * settings.iterations})
    grown = replace(subject, config=subject.config.model_copy(update={"finetune": larger}))
    assert forecast.seconds(grown, found).measured == pytest.approx(24 * forecast.seconds(subject, found).measured)
    more = forecast.memory(grown, found).measured - forecast.memory(subject, found).measured
    assert more * 2**30 == pytest.approx(7 * found.activations)
    monkeypatch.setattr(forecast, "device_memory", lambda processes: 2**20)
    assert forecast.memory(subject, found).ok is False
