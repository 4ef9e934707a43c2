"""The verb evaluate-reward: on a run's own pairs, on people's tables, and on whatever cannot be used."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from scipy.special import ndtr

import pipeline
from judges.base import Verdict
from pipeline import cli
from pipeline.assessing.pressure import of_tuning
from pipeline.assessing.scoring import fitting
from pipeline.auditing.cases import png
from pipeline.config import Config
from pipeline.loop import run_dir
from pipeline.settings import UserError, load
from pipeline.store import Artifact, read_rows, write_rows
from pipeline.verbs.evaluate_reward import evaluate_reward
from rewards import ClipReward, load_reward
from rewards.evaluation import BASELINE, BEFORE
from rewards.reward import ModelReward

FEW = ["evaluate_reward.prompts=4", "evaluate_reward.images=4", "evaluate_reward.probed=8", "evaluate_reward.shown=2"]
SECTIONS = {"accuracy", "slices", "calibration", "shortcuts", "pressure", "pictures", "leakage", "provenance"}
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("ring", "circle", "square", "triangle", "cross")
TEXTS = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]


@pytest.fixture(scope="module")
def file(config_at) -> Path:
    """The settings of a run whose loss is not Bradley-Terry, and all that is made of them but the report."""
    path = config_at("rated", reward={"loss": {"type": "thurstone", "variance": 0.2}}, finetune={"watch": None})
    for stage in ("sample", "judge", "prefer", "reward", "finetune", "evaluate"):
        pipeline.run_stage(path, stage)
    return path


@pytest.fixture(scope="module")
def config(file) -> Config:
    return load(Config, file, FEW)


@pytest.fixture(scope="module")
def report(config) -> dict:
    evaluate_reward(config)
    return json.loads((run_dir(config) / "evaluate-reward" / "report.json").read_text())


@pytest.fixture
def table(tmp_path) -> Callable[..., Path]:
    """Writes people's pairs of noise, one a prompt; rows are changed by their number."""

    def write(changes: dict[int, dict] | None = None, count: int = len(TEXTS), side: int = 32, **columns) -> Path:
        rows = []
        for number in range(count):
            noise = np.random.default_rng(number).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
            for name, image in zip("ab", noise, strict=True):
                (tmp_path / f"{number}{name}.png").write_bytes(png(image))
            row = {"prompt": TEXTS[number % len(TEXTS)], "image_a": f"{number}a.png", "image_b": f"{number}b.png"}
            row |= {"label": number % 2, "model_a": "one", "model_b": "two", "prompt_id": str(number)}
            row |= {name: value(number) for name, value in columns.items()}
            rows.append({**row, **(changes or {}).get(number, {})})
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def invoke(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Runs the verb as the command line does: its exit code, and what it said, on stderr where it failed."""

    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["pipeline", "evaluate-reward", *map(str, arguments)])
        with pytest.raises(SystemExit) as done:
            cli.main()
        said = capsys.readouterr()
        return done.value.code, (said.err if done.value.code else said.out).strip()

    return call


def line_of(report: dict, task: str, scorer: str) -> dict:
    return next(line for line in report["evaluation"]["lines"] if (line["task"], line["scorer"]) == (task, scorer))


def test_the_numbers_are_those_of_the_model_on_the_held_out_pairs(config, report):
    folder = run_dir(config)
    pairs = [pair for pair in read_rows(Artifact(folder / "prefer")) if pair["split"] == "heldout"]
    pictures = {(row["prompt_id"], row["sample"]): row for row in read_rows(Artifact(folder / "sample"))}
    reward = load_reward(folder / "reward" / "model")

    def rewards_of(side):
        rows = [pictures[pair["prompt_id"], pair[side]] for pair in pairs]
        return reward([np.asarray(row["image"]) for row in rows], [row["prompt"] for row in rows]).values

    margin = rewards_of("sample_a") - rewards_of("sample_b")
    right = (margin > 0) == (np.array([pair["label"] for pair in pairs]) > 0.5)
    assert line_of(report, "judge", "reward")["accuracy"]["value"] == pytest.approx(right.mean())
    assert report["measured"]["pairs"] == line_of(report, "judge", BEFORE)["accuracy"]["count"] == len(pairs)
    task = next(task for task in report["evaluation"]["tasks"] if task["name"] == "judge")
    label = np.array([pair["label"] for pair in pairs])
    said = ndtr(margin / np.sqrt(2 * 0.2))
    assert task["calibration"]["before"]["brier"]["value"] == pytest.approx(np.mean((said - label) ** 2), rel=1e-4)
    assert "too few" in report["conclusion"]["reading"]
    assert any(note.startswith("No interval on the pairs by judge") for note in report["notes"])


def test_the_stage_evaluate_takes_the_probabilities_of_the_loss(config):
    rows = read_rows(Artifact(run_dir(config) / "evaluate"), "pairs.parquet")
    margin = np.array(rows["reward_a"]) - np.array(rows["reward_b"])
    np.testing.assert_allclose(rows["preference"], ndtr(margin / np.sqrt(2 * 0.2)), atol=1e-5)


def test_what_changes_nothing_is_found_to_change_nothing(report):
    found = {one["name"]: one for one in report["invariances"]}
    assert found["other batch-mates"]["largest"] == 0
    assert found["one picture at a time"]["largest"] < 1e-3
    assert {effect["name"] for effect in report["effects"]} >= {"blank", "wrong_image", "resolution", "flip"}
    assert report["choosing"]["truth"] == "gold"
    assert [point["n"] for point in report["choosing"]["curves"]["points"]] == [1, 2, 4]
    assert report["tuning"] is not None
    assert report["leakage"]["exact"] == report["leakage"]["near"] == 0


def test_the_page_reaches_for_nothing_and_shows_all_parts(config, report):
    folder = run_dir(config) / "evaluate-reward"
    page, card = (folder / "index.html").read_text(), (folder / "card.md").read_text()
    assert set(re.findall(r'<section id="(\w+)"', page)) == SECTIONS
    assert not re.findall(r"https?:|<script|<link|url\((?!#)", page)
    assert set(re.findall(r'src="([^:"]*:)', page)) == {"data:"}
    assert report["conclusion"]["claim"] in page
    assert report["conclusion"]["claim"] in card
    assert report["provenance"]["weights"] in card
    assert page.count('class="duel"') >= 2
    assert set(json.loads((folder / "cost.json").read_text())) == {"device", "batch", "images_per_second", "peak_bytes"}


def test_it_is_done_once_and_gives_the_same_again(config, report, capsys, tmp_path):
    evaluate_reward(config)
    assert "nothing left to do" in capsys.readouterr().out
    evaluate_reward(config, to=tmp_path / "again")
    for name in ("report.json", "index.html", "card.md"):
        again = (tmp_path / "again" / name).read_bytes()
        assert again == (run_dir(config) / "evaluate-reward" / name).read_bytes()


def test_people_are_a_task_of_their_own_beside_which_the_judge_stands(file, table, config, invoke):
    path = table({3: {"label": 1.5}, 4: {"prompt": ""}, 9: {"prompt": f"{TEXTS[0]} " * 12}}, count=60)
    code, said = invoke(file, *FEW, "evaluate_reward.most_refused=0.1", "--table", path)
    assert code == 0, said
    report = json.loads((run_dir(config) / "evaluate-reward-pairs" / "report.json").read_text())
    assert [task["name"] for task in report["evaluation"]["tasks"]] == ["people"]
    assert {line["scorer"] for line in report["evaluation"]["lines"]} == {
        "reward",
        BEFORE,
        "judge",
        "random",
        "label ceiling",
    }
    assert [refused["row"] for refused in report["measured"]["refused"]] == [4, 5]
    assert line_of(report, "people", "reward")["accuracy"]["interval"]  # 58 prompts
    assert {painter["model"] for painter in report["evaluation"]["painters"]} == {"one", "two"}
    read = {
        one["value"]: one["accuracy"]["count"]
        for one in report["evaluation"]["slices"]
        if one["column"] == "prompt read"
    }
    assert read == {"cut": 1, "whole": 57}
    assert report["choosing"] is report["tuning"] is None
    assert report["leakage"]["prompts"] > 0


def test_a_reward_that_learned_from_people_is_held_against_people(config_at, table, judge_folder, tmp_path):
    ClipReward.fresh(judge_folder / "itm", 0).save_pretrained(tmp_path / "clip")
    path = config_at("taught", prefer={"table": {"reader": "pairs", "path": str(table())}, "heldout": 0.4})
    settings = yaml.safe_load(path.read_text())
    del settings["prefer"]["min_gap"]
    path.write_text(yaml.safe_dump(settings))
    for stage in ("prefer", "reward"):
        pipeline.run_stage(path, stage)
    config = load(Config, path, [*FEW, f"evaluate_reward.baseline={tmp_path / 'clip'}"])
    evaluate_reward(config)
    report = json.loads((run_dir(config) / "evaluate-reward" / "report.json").read_text())
    assert line_of(report, "people", BASELINE)["lead"]["count"] > 0
    heldout = sum(pair["split"] == "heldout" for pair in read_rows(Artifact(run_dir(config) / "prefer")))
    assert line_of(report, "people", "reward")["accuracy"]["count"] == heldout
    assert report["provenance"]["judge"] == "pairs.jsonl"
    assert report["choosing"]["truth"] == "gold"
    assert report["leakage"]["identical"] == 0


def test_a_table_with_scores_needs_no_run(table, tmp_path, invoke):
    path = table(score_a=lambda number: float(number % 2), score_b=lambda number: 0.5)
    code, said = invoke("--table", path, "--to", tmp_path / "out")
    assert code == 0, said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert line_of(report, "people", "reward")["accuracy"]["value"] == 1
    assert report["effects"] == []
    assert report["leakage"] is None
    assert not (tmp_path / "out" / "cost.json").exists()


def test_with_a_run_its_model_is_evaluated_whatever_scores_the_table_brings(table, file, config, tmp_path, invoke):
    path = table(score_a=lambda number: float(number % 2), score_b=lambda number: 0.5)
    code, said = invoke(file, "--table", path, "--to", tmp_path / "out", *FEW)
    assert code == 0, said
    assert json.loads((tmp_path / "out" / "report.json").read_text())["provenance"]["weights"]
    assert (tmp_path / "out" / "cost.json").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"image_b": None}, r"pairs\.jsonl: row 2: image_b: is missing"),
        ({"image_b": "1a.png"}, r"pairs\.jsonl: row 2: image_b: is the same picture as image_a"),
        ({"label": 1.5}, r"pairs\.jsonl: row 2: label: 1\.5 is no share from 0 to 1"),
        ({"label": float("nan")}, r"pairs\.jsonl: row 2: label: nan is no finite number"),
        ({"score_a": float("nan"), "score_b": 0.0}, r"pairs\.jsonl: row 2: score_a: nan is no finite number"),
        ({"image_a": "cut.png"}, r"pairs\.jsonl: row 2: image_a: .*cut\.png: is truncated or damaged .*save it again"),
        ({"image_a": "gone.png"}, r"pairs\.jsonl: row 2: image_a: gone\.png is not there"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(changes, line, table, tmp_path, file, invoke):
    (tmp_path / "cut.png").write_bytes(png(np.full((32, 32, 3), 9, np.uint8))[:60])
    code, said = invoke(file, "--table", table({1: changes}, count=4), "--to", tmp_path / "out")
    assert code == 2
    assert re.search(rf"^{line}; 1 of 4 rows cannot be used", said)
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.fixture
def refused(invoke, tmp_path) -> Callable[..., str]:
    def call(table: Path, *arguments: object) -> str:
        code, said = invoke(*arguments, "--table", table, "--to", tmp_path / "out")
        assert code == 2
        assert "\n" not in said
        assert not (tmp_path / "out").exists()
        return said

    return call


def test_a_table_that_cannot_be_used_is_named(table, file, tmp_path, invoke, refused):
    assert "nothing to evaluate" in invoke()[1]
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a", "image_a": "a.png", "image_c": "b.png", "label": 1}\n')
    assert "other.jsonl: no column 'image_b'; did you mean 'image_" in refused(other, file)
    assert "reader: 'pear' is none of" in refused(table(), file, "--reader", "pear")
    assert "no score_a and score_b; name the CONFIG" in refused(table())
    assert "pairs.jsonl: label: no pair with two scores has a better picture" in refused(
        table(label=lambda number: 0.5), file, "evaluate_reward.judge=false"
    )
    assert re.search(
        r"pairs\.jsonl: image: 48 x 48 pixels, the reward model reads 32 x 32;", refused(table(side=48), file)
    )


def test_what_is_not_done_yet_is_named_and_what_is_no_evaluation_stays(config_at, file, config, invoke):
    assert "evaluate-reward needs the result of sample" in invoke(config_at("empty"))[1]
    assert not (run_dir(config).parent / "empty").exists()
    assert "holds the result of something else" in invoke(file, *FEW, "--to", run_dir(config) / "reward")[1]
    assert (run_dir(config) / "reward" / "model").exists()


def test_a_changed_setting_is_evaluated_anew(config, report):
    folder = run_dir(config) / "evaluate-reward"
    evaluate_reward(config.model_copy(update={"seed": config.seed}), to=folder)
    changed = config.evaluate_reward.model_copy(update={"prompts": 0})
    evaluate_reward(config.model_copy(update={"evaluate_reward": changed}), to=folder)
    found = json.loads((folder / "report.json").read_text())
    assert found["choosing"] is None
    assert any("best of n was not tried" in note for note in found["notes"])


class Word:
    """A reward model that reads three words."""

    class model:
        @staticmethod
        def tokens(prompts: Sequence[str]) -> dict:
            if any(len(prompt.split()) > 3 or "unread" in prompt for prompt in prompts):
                raise ValueError("prompt: too long")
            return {}


def test_as_many_words_are_read_as_fit():
    assert fitting(Word, ["a b", "a b c d e"]) == {"a b": "a b", "a b c d e": "a b c"}
    with pytest.raises(UserError, match="reads not one word of 'unread words'"):
        fitting(Word, ["unread words"])


class Judge:
    id, template = "judge", "{}"

    def score(self, images, prompts):
        return [Verdict(float("nan"), (), "judge", "{}", False, "asked in vain") for _ in prompts]


def test_the_curve_of_a_run_is_found_again_in_its_checks(config, tmp_path):
    """Gold, here the judge's margin, is planted as d(α - β ln d) on top of what each prompt had."""
    names = {name: datasets.Value("string") for name in ("prompt_id", "prompt", "skill")}
    numbers = {name: datasets.Value("float32") for name in ("kl", "reward", "judge")}
    features = datasets.Features(
        {
            **names,
            **numbers,
            "iteration": datasets.Value("int32"),
            "sample": datasets.Value("int32"),
            "image": datasets.Image(),
        }
    )
    rng, rows = np.random.default_rng(0), []
    base = rng.normal(size=60)
    for iteration, kl in enumerate((0.0, 1.0, 4.0, 16.0, 64.0)):
        distance = np.sqrt(kl)
        gain = distance * (3 - 1.5 * np.log(distance)) if kl else 0.0
        for prompt in range(60):
            noise = rng.normal(0, 0.05, 2)
            named = {"prompt_id": str(prompt), "prompt": f"prompt {prompt}", "skill": "", "sample": 0}
            judged = {"judge": base[prompt] + gain + noise[0], "reward": base[prompt] + 2 * distance + noise[1]}
            rows.append({**named, **judged, "iteration": iteration, "kl": kl, "image": Image.new("RGB", (2, 2))})
    artifact = Artifact(tmp_path / "finetune")
    artifact.begin("checks")
    write_rows(artifact, "checks-00000.parquet", rows, features)
    found = of_tuning(config, artifact, Judge())
    assert (found.truth, found.note) == ("judge", "")
    gold = found.curves.gold
    assert gold.alpha.value == pytest.approx(3, abs=0.1)
    assert gold.beta.value == pytest.approx(1.5, abs=0.1)
    assert gold.peak.value == pytest.approx(np.exp(3 / 1.5 - 1), abs=0.2)
    assert gold.stop < gold.peak.value < 8
    assert found.curves.points[-1].proxy.value == pytest.approx(16, abs=0.1)


def test_scores_do_not_leave_the_batch_of_the_model(config):
    reward = load_reward(run_dir(config) / "reward" / "model")
    images = list(np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8))
    whole = reward.scores(images, TEXTS[:5])
    part = ModelReward(reward.model, reward.batch).scores(images[3:], TEXTS[3:5])
    assert torch.equal(whole[[3, 4]].mean, part.mean)
