"""People's pairs instead of a judge's: a run learns from a table, and says what it could not use."""

import functools
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

import pipeline
from pipeline.config import Config
from pipeline.pictures import pictures_of
from pipeline.runner import Interrupted, states
from pipeline.settings import SettingsError, UserError, load
from pipeline.stages import STAGES, prefer
from pipeline.stages.finetune import FINETUNE
from pipeline.store import Artifact, fingerprint, read_rows, write_rows
from tests.processes import python

SHAPES = ("circle", "square", "triangle", "ring", "star")
PROMPTS = [f"a {colour} {shape}" for colour in ("red", "green", "blue", "yellow") for shape in SHAPES]


def png(number: int, side: int = 32) -> bytes:
    """Noise as red as `number`, from 0 to 150, says."""
    noise = np.random.default_rng(number).integers(0, 100, (side, side, 3))
    noise[..., 0] += number
    with io.BytesIO() as file:
        Image.fromarray(noise.astype(np.uint8)).save(file, "PNG")
        return file.getvalue()


def own(number: int, text: str, **changes) -> dict:
    """A pair of which the redder picture is liked better."""
    first = number % 2
    return {
        "prompt": text,
        "image_a": f"{number}-{first}.png",
        "image_b": f"{number}-{1 - first}.png",
        "label": 0.9 if first else 0.1,
        **changes,
    }


@pytest.fixture(scope="module")
def pictures_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    for number in range(len(PROMPTS)):
        for better in (0, 1):
            (folder / f"{number}-{better}.png").write_bytes(png(3 * number + 80 * better))
    (folder / "cut.png").write_bytes(png(0)[:200])
    (folder / "large.png").write_bytes(png(0, side=48))
    return folder


BAD = {
    "label: 1.5 is no share from 0 to 1": {"label": 1.5},
    "label: nan is no finite number": {"label": float("nan")},
    "image_b: is the same picture as image_a": {"image_b": "0-0.png", "image_a": "0-0.png"},
    "image_b: is missing": {"image_b": None},
    "cut.png: is truncated or damaged": {"image_a": "cut.png"},
    "prompt: is empty": {"prompt": ""},
    "score_a: nan is no finite number": {"score_a": float("nan"), "score_b": 1.0},
    "prompt_id: 'p0' has another prompt above": {"prompt": "a blue ring", "prompt_id": "p0"},
}


@pytest.fixture(scope="module")
def good(pictures_folder: Path) -> Path:
    """A table of usable pairs."""
    return write(pictures_folder / "good.jsonl", [own(k, prompt) for k, prompt in enumerate(PROMPTS)])


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config_for(config_at) -> Callable[..., Path]:
    """Writes the settings of a run on a table."""

    def make(name: str, table: Path | str, reward: dict | None = None, **changes) -> Path:
        settings = yaml.safe_load(config_at(name, reward=reward or {}).read_text())
        settings["prefer"] = {"heldout": 0.3, "table": {"reader": "pairs", "path": str(table), "shard": 8, **changes}}
        path = config_at(name)
        path.write_text(yaml.safe_dump(settings))
        return path

    return make


def test_a_reward_is_learned_from_a_table_alone(config_for, pictures_folder, folder):
    """Through the command line; bad rows are left out, told and kept."""
    rows = [own(0, PROMPTS[0], prompt_id="p0")]
    rows += [own(0, PROMPTS[0], **changes) for changes in BAD.values()]
    rows += [own(k, prompt) for k, prompt in enumerate(PROMPTS)]
    path = config_for("told", write(pictures_folder / "bad.jsonl", rows))
    done = python("-m", "pipeline", "prefer", path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    pipeline.run_stage(path, "reward")
    run = folder / "told"
    assert not {"sample", "judge"} & {entry.name for entry in run.iterdir()}
    refused = json.loads((run / "prefer" / prefer.REFUSED).read_text())
    assert [row["row"] for row in refused] == list(range(2, 2 + len(BAD)))
    for row, reason in zip(refused, BAD, strict=True):
        assert reason in row["reason"]
    metrics = json.loads((run / "reward" / "metrics.json").read_text())
    assert metrics["train_pairs"] + metrics["heldout_pairs"] == 1 + len(PROMPTS)
    with pytest.raises(UserError, match="sample: these settings have no use for this stage"):
        pipeline.run_stage(path, "sample")


def test_pictures_are_kept_once_and_as_they_were(config_for, pictures_folder, folder):
    rows = [own(0, "a red ring"), own(0, "a red ring"), own(2, "A red ring"), own(0, "a blue ring")]
    rows += [own(k, prompt) for k, prompt in enumerate(PROMPTS)]
    rows += [own(0, "a red ring")] * 16  # two files full of pairs without a new picture
    pipeline.run_stage(config_for("kept", write(pictures_folder / "kept.jsonl", rows)), "prefer")
    artifact = Artifact(folder / "kept" / "prefer")
    pairs, pictures = read_rows(artifact).to_list(), pictures_of({"prefer": artifact})
    assert [(row["sample_a"], row["sample_b"]) for row in pairs[:4]] == [(0, 1), (0, 1), (2, 3), (0, 1)]
    assert pairs[0]["prompt_id"] == pairs[2]["prompt_id"] != pairs[3]["prompt_id"]
    assert pairs[0]["split"] == pairs[2]["split"]
    for row, number in zip(pairs[4:-16], range(len(PROMPTS)), strict=True):
        for side, better in (("a", number % 2), ("b", 1 - number % 2)):
            shown = np.asarray(Image.open(pictures_folder / f"{number}-{better}.png"))
            assert np.array_equal(pictures(row["prompt_id"], row[f"sample_{side}"]), shown)
    weights = {split: [row["weight"] for row in pairs if row["split"] == split] for split in ("train", "heldout")}
    assert all(np.mean(found) == pytest.approx(1) for found in weights.values())


def test_only_what_depends_on_the_table_is_made_again(config_for, good, pictures_folder, folder):
    table = write(pictures_folder / "mine.jsonl", [json.loads(line) for line in good.read_text().splitlines()])

    def todo(**changes) -> list[str]:
        found = states(load(Config, config_for("again", table, **changes)), STAGES, folder / "again")
        return [entry.stage.name for entry in found if entry.state != "reuse"]

    assert todo() == ["prefer", "reward", "finetune", "evaluate", "report"]
    pipeline.run_stage(config_for("again", table), "prefer")
    assert todo() == todo(reward={"epochs": 3}) == ["reward", "finetune", "evaluate", "report"]
    assert "prefer" in todo(limit=10)
    write(table, [own(0, "a red ring")])
    assert "prefer" in todo()


def test_stopped_while_reading_it_goes_on_to_the_same_bytes(config_for, good, folder, monkeypatch):
    def written_then_stopped(*given: object) -> None:
        write_rows(*given)
        os.kill(os.getpid(), signal.SIGINT)

    pipeline.run_stage(config_for("whole", good), "prefer")
    path = config_for("cut", good)
    monkeypatch.setattr(prefer, "write_rows", written_then_stopped)
    with pytest.raises(Interrupted):
        pipeline.run_stage(path, "prefer")
    monkeypatch.undo()
    whole, cut = (Artifact(folder / name / "prefer") for name in ("whole", "cut"))
    assert cut.names() == ["pictures-00000.parquet"]
    first = (cut.folder / "pictures-00000.parquet").stat().st_mtime_ns
    pipeline.run_stage(path, "prefer")
    assert (cut.folder / "pictures-00000.parquet").stat().st_mtime_ns == first
    assert cut.names() == whole.names()
    assert all((cut.folder / name).read_bytes() == (whole.folder / name).read_bytes() for name in whole.names())


def test_a_hub_dataset_is_streamed_up_to_the_limit(config_for, tmp_path, folder, monkeypatch):
    features = datasets.Features({name: datasets.Image() for name in ("chosen", "rejected")})
    features["prompt"] = datasets.Value("string")
    rows = [
        {"prompt": prompt, "chosen": {"bytes": png(80 + k)}, "rejected": {"bytes": png(k)}}
        for k, prompt in enumerate(PROMPTS)
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train-00000-of-00001.parquet")
    load_dataset = functools.partial(datasets.load_dataset, str(tmp_path))

    def from_here(name: str, *rest: object, revision: str, **options: object) -> datasets.IterableDataset:
        assert (name, revision) == ("someone/pairs", "v1")
        return load_dataset(*rest, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_here)
    path = config_for("hub", "someone/pairs", reader="rewardbench", revision="v1", limit=15)
    pipeline.run_stage(path, "prefer")
    pairs = read_rows(Artifact(folder / "hub" / "prefer"))
    assert len(pairs) == 15
    assert set(pairs["label"]) == {0.0, 1.0}
    assert set(pairs["judge"]) == {"someone/pairs[train]"}


def test_the_whole_loop_runs_on_a_table(config_for, good, folder):
    numbers = pipeline.run(config_for("loop", good))
    assert numbers["reward"]["accuracy"]["gold"] is None
    assert 0 <= numbers["reward"]["accuracy"]["judge"] <= 1
    assert numbers["images"] == 4 * 6 + 24
    assert "<html" in (folder / "loop" / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{"promt": "a cat", "image_a": "a", "image_b": "b", "label": 1}], "no column 'prompt'; did you mean 'promt'?"),
        (None, "absent.jsonl: No such file"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_line_and_nothing_is_written(config_for, tmp_path, folder, rows, line):
    table = tmp_path / "absent.jsonl" if rows is None else write(tmp_path / "mine.jsonl", rows)
    done = python("-m", "pipeline", "reward", config_for("unread", table))
    assert done.returncode == 2
    assert done.stderr.startswith("prefer.table: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (folder / "unread").exists()


def test_what_a_table_cannot_give_is_one_line(config_for, good, pictures_folder):
    def refusal(table: Path, *stages: str, **changes) -> str:
        path = config_for("refused", table, **changes)
        for stage in stages[:-1]:
            pipeline.run_stage(path, stage)
        with pytest.raises(UserError) as error:
            pipeline.run_stage(path, stages[-1])
        assert "\n" not in str(error.value)
        return str(error.value)

    bad = write(pictures_folder / "none.jsonl", [own(0, "a red ring", label=2)])
    assert "no pair that can be used; none.jsonl: row 1: label: 2.0 is no share" in refusal(bad, "prefer")
    few = write(pictures_folder / "few.jsonl", [own(0, "a red ring"), own(2, "a red ring")])
    assert "do not fill both splits; it takes a larger table" in refusal(few, "prefer")
    loss = {"reward": {"loss": {"type": "pointwise"}}}
    assert "pointwise learns the judge's margins" in refusal(good, "prefer", "reward", **loss)
    rows = [*(own(k, prompt) for k, prompt in enumerate(PROMPTS)), own(0, "a red ring", image_a="large.png")]
    mixed = write(pictures_folder / "mixed.jsonl", rows)
    assert "48 x 48 pixels, the reward model reads 32 x 32" in refusal(mixed, "prefer", "reward")


@pytest.mark.parametrize("change", ["generator.resolution=48", "prompts={type: geneval}", "seed=7"])
def test_what_is_tuned_on_a_table_depends_on_the_generator_too(config_for, good, change):
    path = config_for("fingerprints", good)
    before, after = (FINETUNE.depends(load(Config, path, changes)) for changes in ([], [change]))
    assert fingerprint(before) != fingerprint(after)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ("prefer.min_gap=0.2", "prefer: min_gap: people chose and labelled the pairs of a table; leave it out"),
        ("prefer.table.reader=pickpic", "prefer.table.reader"),
        ("prefer.table.limit=0", "prefer.table.limit"),
    ],
)
def test_settings_that_do_not_fit_a_table_are_named(config_for, good, changes, line):
    with pytest.raises(SettingsError) as error:
        load(Config, config_for("settings", good), [changes])
    assert line in str(error.value)
