"""Frozen weights that are shared out over two processes change nothing of what is learned, and no process waits."""

import json

import pytest
from accelerate import Accelerator

from judges.shapes.grammar import vocabulary
from models.loading import load_generator
from models.pretrain import new_generator
from pipeline import forecast
from pipeline.config import Config
from pipeline.doctoring import forecast as doctoring
from pipeline.doctoring import policy
from pipeline.prompts import ShapesPrompts
from pipeline.rl.grpo import GRPO, GRPOConfig
from pipeline.rl.settings import TrainerSettings
from pipeline.rl.shares import share_of
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state
from pipeline.settings import SettingsError, UserError, load
from tests import sharded
from tests.processes import launched
from tests.sharded import FAMILIES_TRIED, RUNS, brightness
from tests.tiny_pipelines import FAMILIES

RULE = {"terms": [{"type": "rule", "statistic": "brightness"}]}


@pytest.fixture(scope="module")
def settings(config_at):
    """Writes those of a run of a given name, with changes to its generator: its reward takes no earlier stage, and its
    watch has other numbers of prompts on every process."""
    short = {"iterations": 1, "steps": 2, "group_size": 2, "batch": 64, "algorithm": {"type": "grpo", "last_start": 0}}
    watch = {"every": 1, "prompts": 51, "judge": False}
    finetune = {"reward": RULE, "shard": True, "watch": watch, **short}
    return lambda name, **generator: config_at(name, finetune=finetune, generator=generator)


@pytest.fixture(scope="module")
def found(settings, generator_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded") / "found.json"
    pipe = {"checkpoint": str(FAMILIES["sd3"].saved(tmp_path_factory)), "resolution": 32, "max_tokens": 12}
    configs = settings("alone"), settings("coarse", **pipe, dtype="bfloat16")
    done = launched(2, sharded.__file__, generator_folder, *configs, out)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", RUNS)
def test_what_is_learned_is_what_is_learned_of_whole_weights(found, name):
    low = name == "low"  # bfloat16 rounds what lies elsewhere in memory otherwise
    one = found[name]
    assert one["apart"] < (1e-3 if low else 1e-6)
    assert one["again"] == [pytest.approx(told, rel=1e-2 if low else 1e-4, abs=1e-6) for told in one["told"]]
    assert all(grad_norm > 1e-4 for _, _, grad_norm, *_ in one["told"])


def test_processes_with_other_groups_to_learn_from_do_not_wait_for_each_other(found):
    assert [dropped for *_, dropped in found["uneven"]["told"]] == [1, 1]
    assert [groups for *_, groups, _ in found["redrawn"]["told"]] == [6, 6]
    for name in ("uneven", "redrawn"):
        first, second = found[name]["pieces"]
        assert first != second


def test_a_process_holds_its_part(found):
    held, whole = found["resumed"]["held"]
    assert held == pytest.approx(whole / 2, rel=0.01)


def test_what_one_process_saves_goes_on_to_the_bit_and_paints_the_same(found):
    assert found["resumed"]["apart"] == 0
    assert found["resumed"]["kept"] < 1e-5


def test_a_watch_sees_the_same_pictures(found):
    assert found["looked"]["pictures"] == [6, 3]
    assert found["looked"]["apart"] <= 1  # of 255: a value half-way is rounded either way


@pytest.mark.parametrize("family", FAMILIES_TRIED)
def test_networks_of_diffusers_predict_and_learn_the_same(found, family):
    assert found["predicted"][family] < 1e-4


def test_the_stage_and_its_watch_come_to_an_end(found):
    assert found["staged"] == [True, True]


def test_the_doctor_examines_sharded_weights(found):
    assert found["healthy"] == {"gradients over processes": True, "adapter off is base": True}
    assert found["coarse"] == {
        policy.RATIO: True,
        policy.LOW: True,
        "checks in float32": None,
        doctoring.MEMORY: None,
        doctoring.TIME: True,
    }


def test_uneven_shares_are_refused_with_what_is_even(found):
    assert "finetune.groups: finetune.shard" in found["refused"]
    assert "make it a multiple of 2, or finetune.group_size" in found["refused"]


@pytest.mark.parametrize(
    ("groups", "size", "whole", "grid"), [(3, 4, False, (1, 2)), (4, 3, False, (2, 1)), (6, 5, True, (2, 1))]
)
def test_even_shares_are_those_of_the_wholest_groups(groups, size, whole, grid):
    shares = [share_of(groups, size, 2, rank, whole, even=True) for rank in range(2)]
    assert {(share.columns, share.rows) for share in shares} == {grid}
    assert len({(len(share.group_numbers), len(share.siblings)) for share in shares}) == 1


def test_shared_groups_are_not_even_where_they_must_be_whole():
    with pytest.raises(UserError, match=r"make it a multiple of 2$"):
        share_of(3, 4, 2, 0, whole=True, even=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"twin": True}, r"shard: a twin .* set finetune\.twin to null"),
        ({"compile": True}, r"shard: what is compiled .* set finetune\.compile to false"),
        ({"algorithm": {"type": "nft"}, "updates": 2}, r"finetune\.twin: .* set finetune\.shard to false"),
        ({"lora": None}, r"shard: without an adapter .* set finetune\.lora"),
        ({"reward": "model", "refresh": {}}, r"shard: a refresh .* set finetune\.refresh to null"),
        ({"algorithm": {"type": "dpo", "source": "preferences", "inversion": True}}, "shard: inversion"),
    ],
)
def test_what_is_whole_on_every_process_is_refused_in_the_settings(config_at, changes, match):
    with pytest.raises(SettingsError, match=match):
        load(Config, config_at("refused", finetune={"shard": True, **changes}))


def test_one_process_keeps_all(generator_folder):
    process_state()
    settings = TrainerSettings(groups=2, group_size=2, steps=3, shard=True)
    algorithm = GRPO(GRPOConfig(last_start=1))
    trainer = Trainer(load_generator(generator_folder), brightness, algorithm, settings, 0, Accelerator())
    assert not trainer.sharded
    assert trainer.plain is trainer.tuned
    assert trainer.iterate(ShapesPrompts(type="shapes").draw(0, 2)).grad_norm > 0


@pytest.fixture(scope="module")
def deep(config_at, tmp_path_factory):
    """A run whose network is most of it, and which nothing but its twin and its weights could make smaller."""
    folder = tmp_path_factory.mktemp("deep")
    new_generator(vocabulary(), size=32, width=64, depth=12, text_depth=1, max_tokens=12, seed=0).save_pretrained(
        folder
    )
    small = {"batch": 1, "lora": {"rank": 1}, "dtype": "bfloat16", "gradient_checkpointing": True, "watch": None}
    low = dict.fromkeys(("dtype", "text_dtype", "codec_dtype"), "bfloat16")
    path = config_at("deep", generator={"checkpoint": str(folder), **low}, finetune={"reward": RULE, **small})
    return lambda *more: load(Config, path, more)


def finetune(config, processes):
    return next(need for need in forecast.needs(config, processes, 2**40) if need.stage == "finetune")


def test_a_forecast_counts_a_share_and_what_is_gathered(deep):
    alone, shards = deep("finetune.twin=false"), deep("finetune.shard=true")
    assert finetune(shards, 1) == finetune(alone, 1)
    whole, shared = finetune(alone, 8), finetune(shards, 8)
    network = whole.held["network"]
    assert shared.held["network"] == pytest.approx(network / 8, abs=8)
    assert network / 6 < shared.held["gathered"] < network / 4
    assert {**shared.held, "network": network} == {**whole.held, "gathered": shared.held["gathered"]}
    assert shared.phases == whole.phases


@pytest.mark.parametrize(
    ("dtype", "twin", "settings"),
    [
        ("bfloat16", "null", ("finetune.shard=true",)),
        ("float32", "null", ("finetune.shard=true",)),
        ("float32", "true", ("finetune.twin=false", "finetune.shard=true")),
    ],
)
def test_a_remedy_shares_out_what_does_not_fit(deep, dtype, twin, settings):
    asked = f"generator.dtype={dtype}", f"finetune.twin={twin}"
    room = finetune(deep(asked[0], "finetune.shard=true"), 8).total
    found = forecast.remedy(deep(*asked), "finetune", room, 8)
    assert found.settings == settings
    assert found.need.total <= room
    assert finetune(deep(*asked, *settings), 8) == found.need
    assert "finetune.shard=true" not in forecast.remedy(deep(*asked), "finetune", room, 1).settings
