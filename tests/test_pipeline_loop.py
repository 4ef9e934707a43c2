"""The whole loop on a tiny configuration: it ends, it resumes to the byte after kills, and bad input stops it."""

import json
from pathlib import Path

import numpy as np
import pytest

import pipeline
from models import load_generator, sample
from pipeline.cli import _STAGES
from pipeline.config import Config
from pipeline.settings import SettingsError, UserError, load
from pipeline.stages import STAGES
from pipeline.store import Artifact, read_rows
from rewards import load_reward
from tests.processes import python

HOME = Path(__file__).parent.parent
KILLED = """
import json, os, signal, sys
from contextlib import contextmanager
from pathlib import Path
import pipeline
from pipeline import progress, store
config, run, kills = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
track, publish = progress.Progress.track, store._publish

def hit():
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

@contextmanager
def counted(self, total, unit, description, done=0):
    with track(self, total, unit, description, done) as advance:
        def and_count(n=1, **shown):
            advance(n, **shown)
            if description == stage:
                hit()
        yield and_count

def published(temporary, path):
    if stage in ("prefer", "report") and path.parent.name == stage:
        hit()
    publish(temporary, path)

progress.Progress.track, store._publish = counted, published
for stage, left in kills.items():
    child = os.fork()
    if not child:
        pipeline.run(config)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (stage, status)
    assert not (run / stage / "manifest.json").exists(), stage
"""


@pytest.fixture(scope="module")
def whole(config_at, folder):
    numbers = pipeline.run(config_at("whole"))
    return folder / "whole", numbers


def made(run: Path) -> dict[str, bytes]:
    """Every file that holds no time."""
    timed = {"events.jsonl", "summary.json", "lock", "config.yaml"}
    files = [path for path in run.rglob("*") if path.is_file() and path.name not in timed]
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_the_loop_ends_with_a_summary_and_a_report(whole):
    run, numbers = whole
    assert json.loads((run / "summary.json").read_text()) == numbers
    for model in ("base", "tuned"):
        assert 0 <= numbers["generator"][model]["gold"] <= 1
        assert numbers["generator"][model]["images"] == 12
        assert len(numbers["generator"][model]["per_skill"]) == 6
    assert 0 <= numbers["reward"]["accuracy"]["judge"] <= 1
    assert numbers["images"] == 18 * 3 + 4 * 6 + 24
    assert set(numbers["seconds"]) == {*(stage.name for stage in STAGES), "total"}
    assert "<html" in (run / "report" / "index.html").read_text()


def test_the_tuned_generator_is_evaluated_and_not_the_base_twice(whole):
    run, _ = whole
    rows = read_rows(Artifact(run / "evaluate"))
    images = {m: [np.asarray(r["image"]) for r in rows if r["model"] == m] for m in ("base", "tuned")}
    assert any(not np.array_equal(a, b) for a, b in zip(images["base"], images["tuned"], strict=True))


def test_a_second_run_has_nothing_left_to_do(whole, config_at, capsys):
    run, _ = whole
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}
    pipeline.run(config_at("whole"))
    assert "nothing left to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.parquet")}


def test_kills_in_every_stage_leave_no_trace(whole, config_at, folder):
    path = config_at("cut")
    kills = {"sample": 30, "judge": 2, "prefer": 1, "reward": 3, "finetune": 3, "evaluate": 2, "report": 1}
    done = python("-c", KILLED, path, folder / "cut", json.dumps(kills))
    assert done.returncode == 0, done.stderr[-3000:]
    pipeline.run(path)
    run, _ = whole
    expected, found = made(run), made(folder / "cut")
    named = {"report/index.html", "report/manifest.json"}  # they hold the run's name
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= named


def test_a_changed_setting_reruns_exactly_what_depends_on_it(whole, config_at, folder):
    path = config_at("whole", evaluate={"images": 6})
    kept = {s: (folder / "whole" / s / "manifest.json").read_bytes() for s in ("sample", "judge", "reward", "finetune")}
    evaluated = (folder / "whole" / "evaluate" / "manifest.json").read_bytes()
    numbers = pipeline.run(path)
    assert numbers["generator"]["base"]["images"] == 6
    assert all((folder / "whole" / s / "manifest.json").read_bytes() == old for s, old in kept.items())
    assert (folder / "whole" / "evaluate" / "manifest.json").read_bytes() != evaluated


def test_a_damaged_shard_is_made_again_to_the_byte(whole, config_at, folder):
    path = config_at("whole", evaluate={"images": 6})
    shard = folder / "whole" / "sample" / "shard-00001.parquet"
    other = folder / "whole" / "sample" / "shard-00000.parquet"
    good, untouched = shard.read_bytes(), other.stat().st_mtime_ns
    shard.write_bytes(good[:-1] + b"?")
    pipeline.run(path)
    assert shard.read_bytes() == good
    assert other.stat().st_mtime_ns == untouched


def test_the_library_face(whole, generator_folder):
    run, _ = whole
    generator = load_generator(generator_folder, run / "finetune" / "lora")
    images = list(sample(generator, ["a red ring"], [0], steps=2))
    rewards = load_reward(run / "reward" / "model")(images, ["a red ring"])
    assert rewards.valid.all()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("finetune.lerning_rate=1", "did you mean finetune.learning_rate?"),
        ("finetune.group_size=1", "finetune.group_size"),
        ("finetune.learning_rate=fast", "finetune.learning_rate"),
        ("finetune.reward=gold", "allow_gold"),
        ("finetune.steps=2", "last_start"),
        ("generator.checkpoint=nowhere", "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(config_at, folder, change, line):
    path = config_at("bad")
    with pytest.raises(UserError) as error:
        pipeline.run(path, change)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "bad").exists()


@pytest.mark.parametrize(
    ("content", "line"), [(b"", "holds no prompt"), (b"\xff\xfea", "not UTF-8"), (None, "No such")]
)
def test_bad_prompt_files_are_told_apart(config_at, folder, content, line):
    prompts = folder / "prompts.txt"
    prompts.unlink(missing_ok=True)
    if content is not None:
        prompts.write_bytes(content)
    path = config_at("file", prompts={"type": "file", "train": str(prompts), "eval": str(prompts)})
    with pytest.raises(UserError, match=line):
        pipeline.run(path)
    assert not (folder / "file" / "sample").exists()


def test_gold_may_be_trained_on_only_where_the_config_says_so(config_at):
    path = config_at("gold", finetune={"reward": "gold"})
    with pytest.raises(SettingsError, match="allow_gold"):
        load(Config, path)
    assert load(Config, path, ["finetune.allow_gold=true"]).finetune.reward == "gold"


@pytest.mark.parametrize("path", sorted((HOME / "configs").glob("shapes*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid(path):
    assert load(Config, path).name


def test_the_command_line_knows_every_stage():
    assert tuple(_STAGES) == tuple(stage.name for stage in STAGES)
