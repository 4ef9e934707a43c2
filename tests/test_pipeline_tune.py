"""A judge is tuned to labels that it never measures itself on, and told from one that did not get better."""

import json
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from transformers import Blip2ForConditionalGeneration
from typer.testing import CliRunner

from judges import load_judge, tuning
from pipeline.auditing.labels import read_labels
from pipeline.cli import app
from pipeline.config import Config
from pipeline.estimates import Estimate, rise
from pipeline.judging import FileQuestions, MatchingJudge, ServerModel
from pipeline.runner import Interrupted
from pipeline.settings import UserError, load
from pipeline.verbs.tune import claim, split, tune

PROMPTS = [
    f"a {colour} {shape}" for colour in ("red", "blue", "green", "black") for shape in ("ring", "cross", "square")
]
TUNE = {"learning_rate": 1e-2, "epochs": 12, "batch": 16, "heldout": 0.4, "save_steps": 4}


def write_labels(folder, prompts, verdict=lambda light: light, copies=3):
    """Dark and light pictures of each prompt; this person says yes to the light ones."""
    random, rows = np.random.default_rng(0), []
    folder.mkdir(exist_ok=True)
    for prompt in prompts:
        for number in range(2 * copies):
            light = bool(number % 2)
            name = f"{prompt.replace(' ', '-')}-{number}.png"
            pixels = random.integers(*((160, 256) if light else (0, 96)), (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name)
            rows.append({"image": name, "prompt": prompt, "verdict": verdict(light)})
    table = folder / "labels.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    return table


def parts_of(prompt):
    _, colour, shape = prompt.split()
    return {"prompt": prompt, "questions": [{"text": f"is there a {shape}?"}, {"text": f"is there a {colour} object?"}]}


@pytest.fixture(scope="module")
def labels(folder):
    return write_labels(folder / "person", PROMPTS)


@pytest.fixture(scope="module")
def config_of(config_at):
    def config(name, **changes):
        found = load(Config, config_at(name))
        return found.model_copy(update={"tune": found.tune.model_copy(update={**TUNE, **changes})})

    return config


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tuned(config_of, labels, folder):
    tune(config_of("tuned"), labels)
    return folder / "tuned" / "tune"


def margins(checkpoint, cases):
    verdicts = load_judge(checkpoint).score([case.image() for case in cases], [case.prompt for case in cases])
    return np.array([verdict.margin for verdict in verdicts])


def test_the_tuned_judge_agrees_better_and_loads_by_itself(tuned, labels, judge_folder):
    found = json.loads((tuned / "tune.json").read_text())
    heldout = split(read_labels(labels), TUNE["heldout"])[1]
    truth = np.array([case.truth > 0.5 for case in heldout])
    scores = []
    for name, checkpoint in (("before", judge_folder / "vqa"), ("after", tuned / "checkpoint")):
        margin = margins(checkpoint, heldout)
        scores.append(balanced_accuracy_score(truth, margin > 0))
        assert found[name]["balanced"]["value"] == pytest.approx(scores[-1])
        assert found[name]["plain"]["count"] == len(heldout)
    assert found["rise"]["value"] == pytest.approx(scores[1] - scores[0])
    assert found["rise"]["interval"][0] > 0.2
    assert found["better"]
    assert found["claim"].startswith("The tuned judge agrees better")
    assert str(tuned / "checkpoint") in found["claim"]
    Blip2ForConditionalGeneration.from_pretrained(tuned / "checkpoint")
    assert (tuned / "adapter" / "adapter_model.safetensors").is_file()


def test_the_same_again_has_nothing_left_to_do_and_another_does_not_write_over_it(
    tuned, config_of, labels, folder, capsys
):
    before = files(tuned)
    tune(config_of("tuned"), labels)
    assert "nothing left to do" in capsys.readouterr().out
    other = write_labels(folder / "other", PROMPTS, lambda light: not light)
    for settings, table in (({"rank": 2}, labels), ({}, other)):
        with pytest.raises(UserError, match=r"tuned by other settings or labels; .* --to"):
            tune(config_of("tuned", **settings), table)
    assert files(tuned) == before


def test_interrupted_it_goes_on_to_the_same_bytes(tuned, config_of, labels, folder, monkeypatch):
    steps, train = [], tuning.tune

    def until(last):
        def watched(vqa, lessons, teaching, place, on_step, should_stop):
            def step(number, count, loss):
                steps.append(number)
                if number == last:
                    signal.raise_signal(signal.SIGTERM)
                on_step(number, count, loss)

            return train(vqa, lessons, teaching, place, step, should_stop)

        return watched

    place = folder / "interrupted"
    monkeypatch.setattr(tuning, "tune", until(7))
    with pytest.raises(Interrupted):
        tune(config_of("tuned"), labels, place)
    assert not (place / "tune.json").exists()
    monkeypatch.setattr(tuning, "tune", until(None))
    tune(config_of("tuned"), labels, place)
    assert all(after == before + 1 for before, after in pairwise(sorted(set(steps))))
    assert len(steps) - len(set(steps)) <= 1
    mine, whole = files(place), files(tuned)
    assert set(mine) == set(whole)
    assert {path for path in whole if mine[path] != whole[path]} == {Path("tune.json"), Path("manifest.json")}
    told = [json.loads(found[Path("tune.json")]) for found in (mine, whole)]
    assert {**told[0], "claim": told[1]["claim"]} == told[1]


def test_one_that_did_not_learn_is_not_called_better(config_of, labels, folder):
    tune(config_of("idle", learning_rate=1e-12, epochs=1), labels)
    found = json.loads((folder / "idle" / "tune" / "tune.json").read_text())
    assert found["rise"]["value"] == 0
    assert not found["better"]
    assert found["claim"].startswith("The tuned judge agrees no better")
    assert found["claim"].endswith(f"keep {config_of('idle').judge.model.checkpoint}")


def test_the_rise_is_that_of_balanced_accuracy_and_leaves_out_what_has_no_verdict():
    random = np.random.default_rng(0)
    before, after = random.normal(size=(2, 400))
    truth = (random.random(400) < 0.2).astype(float)
    after[:3], before[5], truth[7] = np.nan, np.nan, 0.5
    known = np.isfinite(before) & np.isfinite(after) & (truth != 0.5)
    expected = [balanced_accuracy_score(truth[known], margin[known] > 0) for margin in (before, after)]
    found = rise(before, after, truth, np.arange(400).astype(str))
    assert found.value == pytest.approx(expected[1] - expected[0])
    assert found.count == known.sum()
    assert found.interval[0] < found.value < found.interval[1]
    assert rise(before, before, truth, np.arange(400).astype(str)).value == 0
    assert rise(before, after, np.ones(400), np.arange(400).astype(str)).value is None


def test_a_prompt_is_on_one_side_and_stays_there(labels, folder):
    taught, heldout = split(read_labels(labels), 0.4)
    sides = {case.prompt for case in taught}, {case.prompt for case in heldout}
    assert not sides[0] & sides[1]
    assert len(taught) + len(heldout) == 6 * len(PROMPTS)
    more = [*PROMPTS, *(f"{prompt} " for prompt in PROMPTS), *(f"a white {prompt[2:]}" for prompt in PROMPTS)]
    grown = split(read_labels(write_labels(folder / "grown", more, copies=1)), 0.4)
    for before, after in zip(sides, grown, strict=True):
        assert before <= {case.prompt for case in after}
        assert {f"{prompt} " for prompt in before} <= {case.prompt for case in after}


@pytest.mark.parametrize(
    ("prompts", "verdict", "reason"),
    [
        (PROMPTS, lambda light: True, "labels.jsonl: no verdict is 'no'"),
        (PROMPTS, lambda light: 0.2, "labels.jsonl: no verdict is 'yes'"),
        (PROMPTS[:2], lambda light: light, "of its 2 prompts too few are .* label more prompts"),
    ],
)
def test_labels_that_cannot_teach_are_refused(config_of, folder, prompts, verdict, reason):
    table = write_labels(folder / "bad", prompts, verdict)
    with pytest.raises(UserError, match=reason):
        tune(config_of("bad labels"), table)
    assert not (folder / "bad labels").exists()


def test_questions_on_parts_alone_teach_no_no(config_of, labels, folder):
    path = folder / "parts.jsonl"
    path.write_text("\n".join(json.dumps(parts_of(prompt)) for prompt in PROMPTS))
    config = config_of("parts")
    judge = config.judge.model_copy(update={"questions": FileQuestions(type="file", path=str(path))})
    with pytest.raises(UserError, match=r"judge.questions: labels.jsonl teaches it nothing: none .* whole prompt"):
        tune(config.model_copy(update={"judge": judge}), labels)
    assert not (folder / "parts").exists()


def test_what_a_rise_means_is_said_plainly():
    def said(value, interval):
        return claim(Estimate(value, interval, 90, 30), "old", "new")

    assert said(0.1, (0.02, 0.18)).endswith("+10.0 points (+2.0 to +18.0); set judge.model.checkpoint to new")
    assert "may or may not" in said(0.1, (-0.02, 0.22))
    for line in (said(0.1, (-0.02, 0.22)), said(0.0, (0.0, 0.0)), said(-0.1, (-0.2, -0.01)), said(None, None)):
        assert line.endswith("keep old")


def test_judges_that_cannot_be_tuned_are_refused(config_of, labels, folder, itm_folder):
    config = config_of("bad judge")
    server = ServerModel(type="server", urls=("http://127.0.0.1:9/v1",), model="m")
    matching = MatchingJudge(type="matching", checkpoint=str(itm_folder))
    for judge, reason in (
        (config.judge.model_copy(update={"model": server}), r"judge.model.type: .*'server' cannot be tuned"),
        (matching, r"judge.type: .*'matching' cannot be tuned"),
    ):
        with pytest.raises(UserError, match=reason):
            tune(config.model_copy(update={"judge": judge}), labels)
    with pytest.raises(UserError, match=r"tune.method: dpo is for models of type chat"):
        tune(config_of("bad judge", method="dpo"), labels)
    full = folder / "full"
    full.mkdir()
    (full / "diary.txt").write_text("dear")
    with pytest.raises(UserError, match="full is not empty"):
        tune(config, labels, full)
    assert files(full) == {Path("diary.txt"): b"dear"}
    assert not (folder / "bad judge").exists()


def test_the_verb_needs_labels_and_names_what_is_wrong_with_them(config_at, folder):
    command = ["tune", str(config_at("verb")), "tune.rank=2"]
    assert CliRunner().invoke(app, command).exit_code == 2
    done = CliRunner().invoke(app, [*command, "--labels", str(folder / "none.jsonl")])
    assert isinstance(done.exception, UserError)
    assert str(done.exception) == f"{folder / 'none.jsonl'}: No such file or directory"
    assert not (folder / "verb").exists()
