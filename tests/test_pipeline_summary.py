"""`summary.json`: the numbers it holds, that every one is documented, and the closing table."""

import io
import json
import re
from pathlib import Path

import datasets
import pytest
from rich.console import Console

from pipeline import summary
from pipeline.store import Artifact, write_rows

SKILLS = ("counting", "position")
SAMPLE = datasets.Features({"sample": datasets.Value("int32"), "prompt": datasets.Value("string")})
CURVES = datasets.Features({"iteration": datasets.Value("int32"), "images": datasets.Value("int32")})


def metrics(gold=True):
    def share(value):
        interval = [value - 0.05, value + 0.05]
        return {"gold": value, "interval": interval} if gold else {"gold": None, "interval": None}

    def model(value, reward):
        skills = {skill: {**share(value + 0.1 * place), "images": 20} for place, skill in enumerate(SKILLS)}
        return {
            **share(value),
            "per_skill": skills if gold else None,
            "judge": 0.6,
            "reward": reward,
            "images": 40,
        }

    accuracy = {"judge": 0.9, "judge_interval": [0.88, 0.92], "initial_judge": 0.7}
    for name, value in (("gold", 0.87), ("gold_interval", [0.84, 0.9]), ("initial_gold", 0.71)):
        accuracy[name] = value if gold else None
    return {
        "generator": {"base": model(0.45, 0.12), "tuned": model(0.71, 1.5)},
        "reward": {
            "accuracy": accuracy,
            "pairs": 1200,
            "gold_pairs": 600,
            "nll": 0.31,
            "brier": 0.08,
            "ece": 0.02,
            "reliability": [{"predicted": 0.55, "observed": 0.57, "pairs": 100}],
        },
        "judge": {"accuracy": share(0.93), "images": 80},
    }


def finished(folder, fill):
    artifact = Artifact(folder)
    artifact.begin(folder.name)
    fill(artifact)
    artifact.finish({})


def make_run(folder, gold=True):
    def fill_sample(artifact):
        for shard, count in enumerate((3, 4)):
            rows = [{"sample": sample, "prompt": "a ring"} for sample in range(count)]
            write_rows(artifact, f"shard-{shard:05d}.parquet", rows, SAMPLE)

    def fill_evaluate(artifact):
        artifact.write_text("metrics.json", json.dumps(metrics(gold)))
        write_rows(artifact, "shard-00000.parquet", [{"sample": 0, "prompt": "a ring"}] * 80, SAMPLE)
        curves = [{"iteration": 0, "images": 100}, {"iteration": 1, "images": 200}]
        write_rows(artifact, "curves.parquet", curves, CURVES)

    finished(folder / "sample", fill_sample)
    finished(folder / "evaluate", fill_evaluate)
    events = [
        {"kind": "stage_start", "stage": "sample", "fingerprint": "a"},
        {"kind": "interrupted", "stage": "sample", "fingerprint": "a", "seconds": 100.0},
        {"kind": "stage_start", "stage": "sample", "fingerprint": "a"},
        {"kind": "stage_end", "stage": "sample", "fingerprint": "a", "seconds": 25.0},
        {"kind": "stage_start", "stage": "evaluate", "fingerprint": "b"},
        {"kind": "stage_end", "stage": "evaluate", "fingerprint": "b", "seconds": 8.0},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def fields(value, name=""):
    """The dotted names of all numbers in `value`, as the documentation writes them."""
    if isinstance(value, dict):
        return {field for key, each in value.items() for field in fields(each, f"{name}.{key}".lstrip("."))}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return fields(value[0], f"{name}[]")
    return {name}


def table(numbers):
    console = Console(file=io.StringIO(), width=100)
    summary.print_table(numbers, console)
    lines = console.file.getvalue().replace("\xa0", " ").replace("\N{EN DASH}", "-").splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def test_the_numbers_are_those_of_the_run(tmp_path):
    numbers = summary.summary(make_run(tmp_path))
    assert {name: numbers[name] for name in metrics()} == metrics()
    assert numbers["images"] == 3 + 4 + 100 + 200 + 80
    assert numbers["seconds"] == {"sample": 125.0, "evaluate": 8.0, "total": 133.0}


def test_write_leaves_the_summary_and_nothing_else(tmp_path):
    before = {path.name for path in make_run(tmp_path).iterdir()}
    summary.write(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary.summary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before | {"summary.json"}


def test_a_run_without_evaluation_has_no_summary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.json is not finished"):
        summary.write(tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_every_field_is_documented_and_every_documented_field_is_there(tmp_path):
    page = (Path(__file__).parent.parent / "docs" / "summary.md").read_text()
    documented = set(re.findall(r"^\| `([^`]*)` \|", page, re.MULTILINE))
    found = fields(summary.summary(make_run(tmp_path)))
    found = {re.sub(r"^generator\.(base|tuned)\.", "generator.*.", name) for name in found}
    found = {re.sub(r"per_skill\.\w+", "per_skill.<skill>", name) for name in found}
    found = {re.sub(r"^seconds\.(sample|evaluate)$", "seconds.<stage>", name) for name in found}
    assert found == documented


def test_the_table_holds_what_a_reader_wants_first(tmp_path):
    rows = table(summary.summary(make_run(tmp_path)))
    assert ["follow their prompt (gold)", "45.0 %", "71.0 %"] in rows
    assert ["counting", "45.0 %", "71.0 %"] in rows
    assert ["position", "55.0 %", "81.0 %"] in rows
    assert ["mean reward", "0.120", "1.500"] in rows
    assert ["reward model, by the judge", "90.0 %", "88.0-92.0"] in rows
    assert ["reward model, by gold", "87.0 %", "84.0-90.0"] in rows
    assert ["judge, by gold (balanced)", "93.0 %", "88.0-98.0"] in rows
    assert ["sample", "2 min 05 s"] in rows
    assert rows[-1] == ["total", "2 min 13 s"]


def test_the_table_shows_a_dash_where_gold_is_not_known(tmp_path):
    rows = table(summary.summary(make_run(tmp_path, gold=False)))
    assert ["follow their prompt (gold)", "-", "-"] in rows
    assert ["reward model, by gold", "-", ""] in rows
    assert "counting" not in [row[0] for row in rows]
