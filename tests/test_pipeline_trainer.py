"""The trainer's frame: who does what on several processes, what learns and in which precision, and what it tells."""

import copy
import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.loading import load_generator
from pipeline.config import Config
from pipeline.prompts import PromptRow, ShapesPrompts, draw_key
from pipeline.rl.algorithm import Loss
from pipeline.rl.grids import grid
from pipeline.rl.grpo import GRPO, GRPOConfig
from pipeline.rl.looking import Sight, Wanted
from pipeline.rl.settings import TrainerSettings
from pipeline.rl.shares import assembled, share_of
from pipeline.rl.trainer import Trainer
from pipeline.runner import Context, process_state
from pipeline.settings import SettingsError, UserError, load
from pipeline.stages import finetune
from pipeline.store import Artifact, read_rows
from rewards.mixture import mixture_of
from tests import geometries
from tests.geometries import GEOMETRIES, brightness, trained
from tests.processes import launched, python

HOME = Path(__file__).parent.parent


# Who does what.


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize(("groups", "size"), [(1, 12), (2, 5), (3, 4), (8, 2), (9, 16)])
def test_every_picture_is_somebodys_and_only_once(groups, size, ranks):
    shares = [share_of(groups, size, ranks, rank) for rank in range(ranks)]
    every = np.arange(groups * size).reshape(groups, size)
    parts = [share.part(torch.from_numpy(every)).numpy() for share in shares]
    assert all(part.size for part in parts)
    assert sum(part.size for part in parts) == every.size
    assert np.array_equal(assembled(shares, parts), every)
    for share in shares:
        assert share.of(list(range(groups))) == share.part(torch.arange(groups)).tolist()


def test_groups_stay_whole_where_that_leaves_nobody_idle():
    assert [share_of(8, 16, 4, rank).siblings for rank in range(4)] == [range(16)] * 4
    assert [share_of(2, 16, 4, rank).siblings for rank in (0, 1)] == [range(8), range(8, 16)]
    assert share_of(5, 16, 4, 3, whole=True).siblings == range(16)


@pytest.mark.parametrize(("groups", "size", "whole"), [(3, 4, False), (6, 16, True)])
def test_what_cannot_be_shared_out_says_what_can(groups, size, whole):
    with pytest.raises(UserError, match="make it 7 or more") as error:
        share_of(groups, size, 7, 0, whole)
    assert ("group_size 7" in str(error.value)) != whole
    share_of(7, size, 7, 0, whole)


@pytest.fixture(scope="module")
def on_two(generator_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "found.json"
    done = launched(2, geometries.__file__, generator_folder, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", GEOMETRIES)
def test_two_processes_learn_what_one_learns(on_two, generator_folder, name):
    algorithm, settings = GEOMETRIES[name]
    one, two = trained(str(generator_folder), algorithm, settings), on_two[name]
    assert two["pictures"][0] < one["pictures"][0]
    # Batches of other sizes are rounded otherwise, which may move a pixel to the next of its 256 levels.
    assert np.allclose(one["advantages"][0], two["advantages"][0], atol=1e-3)
    assert one["loss"][0] == pytest.approx(two["loss"][0], abs=1e-5)
    # A step of rounding may flip a pixel, and with it a reward.
    assert np.allclose(one["loss"], two["loss"], atol=2e-4)
    for value in ("grad_norm", "kl", "reward_mean"):
        assert np.allclose(one[value], two[value], rtol=1e-3, atol=1e-6), value


@pytest.mark.parametrize("name", ["three groups", "forward", "whole"])
def test_without_a_twin_it_learns_the_same_in_less_memory(generator_folder, name):
    algorithm, settings = GEOMETRIES[name]
    both, alone = (trained(str(generator_folder), algorithm, {**settings, "twin": twin}) for twin in (True, False))
    assert np.allclose(both["advantages"][0], alone["advantages"][0], atol=1e-5)
    for value in ("loss", "grad_norm", "kl", "reward_mean"):
        assert np.allclose(both[value], alone[value], rtol=1e-3, atol=2e-4), value


def test_what_only_a_twin_remembers_is_asked_of_none(generator_folder):
    algorithm, settings = GEOMETRIES["forward"]
    with pytest.raises(UserError, match=r"finetune\.twin: .* set it to true, or finetune\.updates to 1"):
        trained(str(generator_folder), algorithm, {**settings, "twin": False, "updates": 2})


def test_processes_that_were_asked_for_and_did_not_start_are_missed(config_at):
    """Accelerate itself starts the one process."""
    asked = "--cpu", "--num_processes", "2", "-m", "pipeline", "finetune", config_at("asked")
    done = python("-m", "accelerate.commands.launch", *asked, env={"PYTHONPATH": str(HOME)})
    assert done.returncode != 0
    assert "accelerate launch: several processes were asked for" in done.stderr


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_processes_that_shard_are_refused(config_at, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(finetune, "Accelerator", lambda **told: SimpleNamespace(distributed_type=kind))
    artifact = Artifact(tmp_path / "finetune")
    artifact.begin("alone")
    rule = {"terms": [{"type": "rule", "statistic": "brightness"}]}
    with pytest.raises(UserError, match=r"configs/accelerate/ddp\.yaml"):
        finetune.FINETUNE.run(Context(load(Config, config_at("sharded", finetune={"reward": rule})), artifact, {}))


@pytest.mark.parametrize(("name", "processes"), [("single", 1), ("cpu2", 2), ("ddp", 2)])
def test_launch_profiles_are_what_accelerate_reads(name, processes):
    found = load_config_from_file(str(HOME / "configs" / "accelerate" / f"{name}.yaml"))
    assert found.num_processes == processes
    assert found.mixed_precision == "no"


# What learns, and in which precision.


@pytest.fixture
def generator(generator_folder):
    return load_generator(generator_folder)


def trainer_of(generator, algorithm=None, measured=False, **settings):
    process_state()
    settings = TrainerSettings(**{"groups": 4, "group_size": 6, "steps": 4, **settings})
    algorithm = algorithm or GRPO(GRPOConfig(last_start=2))
    return Trainer(generator, brightness, algorithm, settings, 0, Accelerator(), measured)


def prompts_at(iteration, count=4):
    return ShapesPrompts(type="shapes").draw(draw_key(0, iteration), count)


def asked(trainer):
    x = torch.randn(3, *trainer.generator.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return x, 0.5, trainer.generator.encode(["a red ring", "a blue cross", "a green dot"])


def test_a_whole_transformer_learns_and_its_base_is_a_copy(generator, generator_folder, tmp_path):
    before = load_generator(generator_folder)
    trainer = trainer_of(generator, lora=None, learning_rate=2e-3)
    told = [trainer.iterate(prompts_at(i)) for i in range(12)]
    assert told[0].kl == 0
    assert told[-1].kl > 0
    assert told[-1].reward_mean > told[0].reward_mean + told[0].reward_std
    base = before.predict(*asked(trainer))
    weights = copy.deepcopy(trainer.tuned.state_dict())
    with trainer.reference(), torch.no_grad():
        assert torch.equal(trainer.generator.predict(*asked(trainer)), base)
    assert all(torch.equal(value, weights[name]) for name, value in trainer.tuned.state_dict().items())
    trainer.policy.save(tmp_path / "kept")
    again = load_generator(generator_folder, tmp_path / "kept")
    with torch.no_grad():
        assert torch.equal(again.predict(*asked(trainer)), trainer.generator.predict(*asked(trainer)))


def test_a_whole_transformer_without_a_copy_has_no_base(generator):
    trainer = trainer_of(generator, GRPO(GRPOConfig(kl=0.0, last_start=2)), lora=None)
    trainer.iterate(prompts_at(0))
    with pytest.raises(UserError, match=r"finetune\.keep_base"):
        trainer.reference().__enter__()
    assert trainer_of(generator, GRPO(GRPOConfig(kl=0.0)), lora=None, measured=True).policy.base


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({}, "watch: it measures the KL"),
        ({"watch": None}, "algorithm: grpo asks the base model"),
        ({"watch": None, "algorithm": {"type": "dpo"}}, "algorithm: dpo asks the base model"),
    ],
)
def test_what_asks_the_base_model_takes_one(config_at, changes, match):
    with pytest.raises(SettingsError, match=match):
        load(Config, config_at("baseless", finetune={"lora": None, "keep_base": False, **changes}))


@pytest.mark.parametrize("settings", [{"lora": None}, {"dtype": "float16"}], ids=["whole", "float16"])
def test_a_resumed_trainer_goes_on_to_the_bit(generator, generator_folder, tmp_path, settings):
    whole = trainer_of(generator, updates=2, **settings)
    for i in range(3):
        if i == 1:
            whole.save(tmp_path / "state")
        whole.iterate(prompts_at(i))
    resumed = trainer_of(load_generator(generator_folder), updates=2, **settings)
    resumed.load(tmp_path / "state")
    for i in (1, 2):
        resumed.iterate(prompts_at(i))
    assert all(torch.equal(a, b) for a, b in zip(whole.trained, resumed.trained, strict=True))
    assert resumed.grad_scaler.state_dict() == whole.grad_scaler.state_dict()


def test_on_policy_ratios_are_off_by_what_is_told(generator_folder):
    errors = []
    for dtype in ("float32", "float16", "bfloat16"):
        trainer = trainer_of(load_generator(generator_folder), dtype=dtype)
        trainer.iterate(prompts_at(0))
        errors.append(trainer.iterate(prompts_at(1)).ratio_error)
        assert all(p.dtype == torch.float32 for p in trainer.trained)
    assert errors == sorted(errors)
    assert errors[0] < 2e-6
    assert 1e-5 < errors[2] < 1e-2


def test_half_precision_steps_as_single_does_and_overflows_are_skipped(generator, generator_folder):
    single, half = trainer_of(load_generator(generator_folder)), trainer_of(generator, dtype="float16")
    assert half.iterate(prompts_at(0)).grad_norm == pytest.approx(single.iterate(prompts_at(0)).grad_norm, rel=0.05)
    before, scale = [p.clone() for p in half.trained], half.grad_scaler.get_scale()
    half.trained[0].register_hook(lambda gradient: gradient * math.inf)
    half.iterate(prompts_at(1))
    assert all(torch.equal(a, b) for a, b in zip(before, half.trained, strict=True))
    assert half.grad_scaler.get_scale() == scale / 2


def test_gradient_checkpointing_changes_no_bit(generator, generator_folder):
    plain, checkpointed = (
        trainer_of(generator),
        trainer_of(load_generator(generator_folder), gradient_checkpointing=True),
    )
    calls = []
    block = checkpointed.tuned.blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for i in range(2):
        plain.iterate(prompts_at(i))
        checkpointed.iterate(prompts_at(i))
    assert all(torch.equal(a, b) for a, b in zip(plain.trained, checkpointed.trained, strict=True))
    assert calls.count(True) >= 4


def test_a_lot_is_rated_while_the_next_is_rolled_out(generator, generator_folder, monkeypatch):
    rolling, waited = threading.Semaphore(0), []

    def slow(images, prompts):
        if len(waited) < 2:
            rolling.acquire()  # its own lot's rollout
            waited.append(rolling.acquire(timeout=20))  # the next one's
            rolling.release()
        return brightness(images, prompts)

    at_once, in_lots = trainer_of(load_generator(generator_folder)), trainer_of(generator, overlap=3)
    in_lots.reward = mixture_of(slow)
    roll = in_lots._roll
    monkeypatch.setattr(in_lots, "_roll", lambda *asked: (rolling.release(), roll(*asked))[1])
    expected, found = at_once.iterate(prompts_at(0)), in_lots.iterate(prompts_at(0))
    assert waited == [True, True]
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1
    assert found.prompts == expected.prompts
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2)


class Broken(GRPO):
    """Its loss is `factor` times what it should be from the second call on."""

    def __init__(self, factor):
        super().__init__(GRPOConfig(last_start=2))
        self.factor, self.calls = factor, 0

    def loss(self, examples, v):
        self.calls += 1
        found = super().loss(examples, v)
        return found if self.calls == 1 else Loss(found.total * self.factor, found.kl, found.clipped)


def test_a_gradient_that_is_not_finite_stops_before_the_step(generator):
    trainer = trainer_of(generator, Broken(math.nan))
    trainer.iterate(prompts_at(0))
    before = [p.clone() for p in trainer.trained]
    with pytest.raises(UserError, match="the gradient of iteration 1 is not finite"):
        trainer.iterate(prompts_at(1))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.trained, strict=True))


def test_a_loss_that_is_not_finite_stops_and_so_does_a_rollout(generator):
    trainer = trainer_of(generator, Broken(1.0))
    trainer.algorithm.loss = lambda examples, v: Loss(
        v.policy.sum((1, 2, 3)) * 0, v.policy.sum((1, 2, 3)).detach() * math.inf, torch.zeros(len(examples))
    )
    with pytest.raises(UserError, match="the loss of iteration 0 is not finite"):
        trainer.iterate(prompts_at(0))
    trainer.trained[0].data.fill_(math.nan)
    with pytest.raises(UserError, match="a log-probability or a latent of iteration 0 is not finite"):
        trainer.iterate(prompts_at(0))
    assert trainer.done == 0


# What it tells.


@pytest.fixture
def tune(config_at, folder):
    """Runs the stage alone, on a rule, and gives its artifact."""

    def run(name, **settings):
        rule = {"terms": [{"type": "rule", "statistic": "brightness"}]}
        watch = {"every": 2, "prompts": 50, "judge": False, "stop_on": []}
        config = load(Config, config_at(name, finetune={"reward": rule, "watch": watch, **settings}))
        artifact = Artifact(folder / name / "finetune")
        artifact.begin("alone")
        finetune.FINETUNE.run(Context(config, artifact, {}))
        artifact.finish({})
        return artifact

    return run


class Killed(BaseException):
    pass


def test_a_run_that_was_cut_off_tells_the_same_lines(tune, folder, monkeypatch):
    whole = tune("told")
    lines = [json.loads(line) for line in whole.path("log.jsonl").read_text().splitlines()]
    curves = read_rows(whole, "curves-*.parquet")
    assert [line["iteration"] for line in lines] == curves["iteration"] == [0, 1, 2, 3]
    for name in ("reward_mean", "loss", "grad_norm", "ratio_error"):
        assert np.allclose([line[name] for line in lines], curves[name], rtol=1e-6)

    iterate = Trainer.iterate

    def killed(trainer, *asked):
        if trainer.done == 3:
            raise Killed
        return iterate(trainer, *asked)

    monkeypatch.setattr(Trainer, "iterate", killed)
    with pytest.raises(Killed):
        tune("cut")
    followed = folder / "cut" / "finetune" / "log.jsonl"
    assert len(followed.read_text().splitlines()) == 3
    monkeypatch.undo()
    again = tune("cut")
    assert {n: r.sha256 for n, r in again.files.items()} == {n: r.sha256 for n, r in whole.files.items()}
    assert not followed.is_symlink()


def test_nothing_of_a_broken_iteration_is_checkpointed(tune, folder, monkeypatch):
    step = Trainer._step

    def breaks(trainer, moves):
        if trainer.done == 3:
            trainer.trained[0].grad.fill_(math.nan)
        return step(trainer, moves)

    monkeypatch.setattr(Trainer, "_step", breaks)
    with pytest.raises(UserError, match="the gradient of iteration 3 is not finite"):
        tune("broken", save_every=1)
    state = json.loads((folder / "broken" / "finetune" / "resume" / "trainer" / "extra.json").read_text())
    assert state["done"] == 3


def test_tensorboard_is_told_the_curves_once(tune, folder):
    lines = [json.loads(line) for line in tune("board", trackers=["tensorboard"]).path("log.jsonl").open()]
    events = EventAccumulator(str(folder / "board" / "trackers" / "board")).Reload()
    found = events.Scalars("reward_mean")
    assert [event.step for event in found] == [0, 1, 2, 3]
    assert [event.value for event in found] == pytest.approx([line["reward_mean"] for line in lines])


def test_a_tracker_that_is_not_installed_is_a_line(config_at, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"finetune: trackers: wandb is not installed; pip install '.\[wandb\]'"):
        load(Config, config_at("tracked", finetune={"trackers": ["wandb"]}))


def test_a_run_leaves_grids_of_base_and_tuned_pictures(tune):
    kept = tune("painted", learning_rate=1e-2)
    assert kept.names("grids/*") == ["grids/00002.png", "grids/00004.png"]
    sheet = np.asarray(Image.open(kept.path("grids/00004.png")))
    rows = read_rows(kept, "checks-*.parquet")
    for top, iteration in ((0, 0), (34, 4)):
        mine = rows.filter(lambda row, at=iteration: row["iteration"] == at and row["sample"] == 0)
        assert np.array_equal(sheet[top : top + 32, 34:66], np.asarray(mine[1]["image"]))
    assert not np.array_equal(sheet[:32], sheet[34:])


def test_a_grid_shows_the_first_picture_of_each_held_out_prompt():
    def sight(number, sample, held_out, shade):
        image = np.full((4, 6, 3), shade, dtype=np.uint8)
        return Sight(Wanted(PromptRow(str(number), ""), number, sample, held_out), image, 0.0, 0.0)

    sides = [
        [sight(0, 0, True, s), sight(0, 1, True, 99), sight(1, 0, True, s + 1), sight(0, 0, False, 99)] for s in (1, 11)
    ]
    sheet = np.asarray(grid(*sides))
    assert sheet.shape == (10, 14, 3)
    assert [int(sheet[y, x, 0]) for y in (0, 9) for x in (0, 13)] == [1, 2, 11, 12]
    assert set(np.unique(sheet)) == {1, 2, 11, 12, 255}


def test_what_is_compiled_is_called_with_few_sizes(generator, generator_folder, monkeypatch):
    monkeypatch.setattr("pipeline.rl.trainer.compile_module", lambda network, device: True)
    eager = trainer_of(load_generator(generator_folder), batch=16, groups=3)
    compiled = trainer_of(generator, batch=16, groups=3, compile=True)
    sizes = []
    compiled.plain.register_forward_hook(lambda network, given, _: sizes.append(len(given[0])))
    expected, found = eager.iterate(prompts_at(0, 3)), compiled.iterate(prompts_at(0, 3))
    assert {4, 16} <= set(sizes) <= {2, 4, 8, 16}
    assert np.abs(found.images.astype(int) - expected.images).max() <= 1
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-2)
