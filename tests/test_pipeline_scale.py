"""Data stages write the same bytes on one, two and four processes; the model of scale is of what is shared out."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import pipeline
from benchmarks.scale import Link, Machine, Tuning, iteration, shards_in_turns, shared_steps
from models.loading import load_generator
from models.paths import schedule
from pipeline.rl.grpo import GRPO, GRPOConfig
from pipeline.rl.rollout import rollout
from pipeline.settings import UserError
from pipeline.store import Artifact
from tests.processes import launched

DATA = ("sample", "judge", "prefer", "evaluate")
SMALL_SHARDS = {"sample": {"shard": 12}, "judge": {"shard": 12}, "evaluate": {"shard": 4}}
"""Five or six of each stage, so that four processes take two turns, not all of them in the second."""


@pytest.fixture(scope="module")
def one(config_at, folder):
    pipeline.run(config_at("one", **SMALL_SHARDS))
    return folder / "one"


@pytest.mark.parametrize("processes", [2, 4])
def test_data_stages_write_the_same_bytes_on_any_number_of_processes(one, config_at, folder, processes):
    name = f"on{processes}"
    shutil.copytree(one, folder / name)
    (folder / name / "events.jsonl").unlink()
    for stage in DATA:
        shutil.rmtree(folder / name / stage)
    done = launched(processes, "-m", "pipeline", "run", config_at(name, **SMALL_SHARDS))
    assert done.returncode == 0, done.stderr[-3000:]
    events = [json.loads(line) for line in (folder / name / "events.jsonl").read_text().splitlines()]
    took_part = {event["stage"]: event["processes"] for event in events if event["kind"] == "stage_start"}
    assert took_part.items() >= dict.fromkeys(DATA, processes).items()
    assert not {"reward", "finetune"} & took_part.keys()
    for stage in DATA:
        assert Artifact(folder / name / stage).files == Artifact(one / stage).files, stage


TUNING = Tuning(groups=48, siblings=24, shared=3, steps=10, learned=3, updates=1, trained=10**7, terms=1)
MACHINE = Machine(call=1.0, lesson=3.0, picture=0.1, fixed=0.0, local=Link(0.0, 1e30), between=Link(0.0, 1e30), node=8)


def test_one_process_does_all_the_work():
    rollouts = 48 * (3 + 24 * 7)
    lessons = 48 * (1 + 24 * 2)
    assert iteration(TUNING, MACHINE, 1).seconds == pytest.approx(rollouts + 3 * lessons + 0.1 * 48 * 24)


@pytest.mark.parametrize("first", [0, 1])
def test_calls_and_lessons_are_those_of_a_rollout(generator_folder, first):
    generator, times = load_generator(generator_folder), tuple(schedule(4, 1.0))
    algorithm = GRPO(GRPOConfig(window=2, last_start=1))
    plan = replace(algorithm.rollout_plan(0, 0, times, 5), start=first)
    rows = []
    hook = generator.transformer.register_forward_hook(lambda module, given, made: rows.append(len(made)))
    with torch.no_grad():
        cond = generator.encode(["a red ring", "a blue cross"])
    rolled = rollout(generator, generator.predict, cond, ["one", "two"], (0,), plan, 64)
    hook.remove()
    lessons = algorithm.examples(rolled, torch.randn(2, 5), ["one", "two"], (0,))
    shape = {"groups": 2, "siblings": 5, "steps": 4, "learned": 2, "updates": 1, "trained": 1, "terms": 1}
    model = Tuning(**shape, shared=shared_steps(plan))
    assert sum(rows) == 2 * model.calls(5)
    assert sum(map(len, lessons)) == 2 * model.lessons(5)


def test_siblings_that_part_little_by_little_are_refused():
    plan = GRPO(GRPOConfig(window=2, fans=(2, 2))).rollout_plan(0, 0, tuple(schedule(8, 1.0)), 4)
    with pytest.raises(UserError, match=r"finetune\.algorithm\.fans: "):
        shared_steps(plan)


def test_whole_groups_scale_without_loss_and_shared_ones_repeat_their_prefix():
    seconds = {count: iteration(TUNING, MACHINE, count).seconds for count in (1, 2, 48, 96)}
    assert seconds[1] / seconds[2] == pytest.approx(2)
    assert seconds[1] / seconds[48] == pytest.approx(48)
    assert seconds[48] / 2 < seconds[96] < seconds[48]


def test_more_processes_than_pictures_are_refused_as_a_run_would():
    with pytest.raises(UserError, match="cannot be shared out over 1153 processes"):
        iteration(TUNING, MACHINE, 48 * 24 + 1)


def test_gradients_cross_the_slowest_link_twice_but_for_a_share():
    slow = Machine(0.0, 0.0, 0.0, 0.0, local=Link(0.0, 4e9), between=Link(0.0, 1e9), node=8)
    assert iteration(TUNING, slow, 1).bytes == 0
    inside, across = iteration(TUNING, slow, 8), iteration(TUNING, slow, 16)
    assert inside.seconds == pytest.approx(4e7 * 2 * 7 / 8 / 4e9, rel=0.01)
    assert across.seconds == pytest.approx(4e7 * 2 * 15 / 16 / 1e9, rel=0.01)


def test_data_stages_stop_scaling_at_their_shards():
    assert [shards_in_turns(2400, 256, count) for count in (1, 2, 8, 10, 512)] == [2400, 1280, 512, 256, 256]
