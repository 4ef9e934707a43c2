"""Every judge that settings can describe scores pictures, and the stage is honest about those it could not judge."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import yaml
from pydantic import TypeAdapter

from judges.base import Judge, Unavailable
from judges.decompose import EXAMPLE_REPLY
from pipeline.config import Config
from pipeline.judging import JudgeConfig
from pipeline.loop import run_loop
from pipeline.runner import Interrupted
from pipeline.settings import UserError, load
from pipeline.store import Artifact, fingerprint, read_rows
from pipeline.verbs.questions import write_questions
from tests.servers import ChatServer, first_token, reply

PROMPTS = ["a red ring", "a red ring", "a blue cross above a red ring", "a blue cross above a red ring"]


def settings(value: dict) -> JudgeConfig:
    return TypeAdapter(JudgeConfig).validate_json(json.dumps(value))


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def blip2(judge_folder) -> dict:
    return {"type": "blip2", "checkpoint": str(judge_folder / "vqa")}


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    lines = [{"prompt": p, "questions": [{"text": "is there a red ring?"}]} for p in dict.fromkeys(PROMPTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


KINDS = {
    "whole": {"type": "questions", "questions": {"type": "whole"}},
    "shapes": {"type": "questions", "questions": {"type": "shapes"}, "aggregate": "dsg"},
    "rating": {"type": "questions", "questions": {"type": "rating", "templates": ["is there {prompt}?"], "high": 2}},
    "file": {"type": "questions", "questions": {"type": "file"}},
    "constitution": {"type": "constitution", "principles": "shapes"},
    "drawn": {"type": "constitution", "principles": "shapes", "mode": "drawn"},
    "pairwise": {"type": "pairwise", "questions": {"type": "shapes"}},
    "matching": {"type": "matching"},
    "ensemble": {"type": "ensemble", "how": "worst"},
}


@pytest.fixture
def judge_settings(request, blip2, asked, judge_folder) -> dict:
    value = dict(KINDS[request.param])
    if value["type"] == "matching":
        return value | {"checkpoint": str(judge_folder / "itm")}
    if value["type"] == "ensemble":
        member = {**KINDS["shapes"], "model": blip2}
        return value | {"members": [member, {"type": "matching", "checkpoint": str(judge_folder / "itm")}]}
    if value.get("questions") == {"type": "file"}:
        value["questions"] = {"type": "file", "path": asked}
    return value | {"model": blip2}


@pytest.mark.parametrize("judge_settings", KINDS, indirect=True)
def test_every_judge_scores_and_answers_for_its_fingerprint(judge_settings, pictures):
    config = settings(judge_settings)
    verdicts = config.build("cpu").score(pictures, PROMPTS)
    if judge_settings.get("questions", {}).get("type") == "rating":  # the tiny vocabulary has no numbers
        assert all(math.isnan(v.margin) and "no tokens of the model say" in v.reason for v in verdicts)
    else:
        assert all(verdict.valid and math.isfinite(verdict.margin) for verdict in verdicts)
        assert {v.margin for v in config.build("cpu").score(pictures, PROMPTS)} == {v.margin for v in verdicts}
    changed = settings(judge_settings | {"cache": "somewhere.db", "shard": 3, "max_invalid": 0.5})
    assert fingerprint(config.depends()) == fingerprint(changed.depends())


def test_a_judge_that_compares_agrees_with_the_scores_it_compares_by(blip2, pictures):
    scored = settings({**KINDS["shapes"], "aggregate": "weakest", "model": blip2}).build("cpu").score(pictures, PROMPTS)
    compared = settings({**KINDS["pairwise"], "model": blip2}).build("cpu").score(pictures, PROMPTS)
    for a, b in ((0, 1), (2, 3)):
        gap = scored[a].margin - scored[b].margin
        assert compared[a].margin - compared[b].margin == pytest.approx(gap, rel=0.02)
        assert compared[a].margin + compared[b].margin == pytest.approx(0, abs=1e-6)


def test_a_cache_answers_the_second_time(blip2, pictures, tmp_path):
    judge = settings({**KINDS["shapes"], "model": blip2, "cache": str(tmp_path / "answers.db")}).build("cpu")
    first = judge.score(pictures, PROMPTS)
    judge.vqa.vqa = None  # whoever is asked again fails
    assert [v.margin for v in judge.score(pictures, PROMPTS)] == [v.margin for v in first]


def used(config: JudgeConfig) -> Judge:
    """As a stage does: first comes its fingerprint."""
    config.depends()
    return config.build("cpu")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"questions": {"type": "file", "path": "nowhere.jsonl"}}, "judge.questions.path: nowhere.jsonl is no file"),
        ({"questions": {"type": "whole", "templates": ["Is it?"]}}, "judge.questions.templates: 'Is it.' must hold"),
        ({"model": {"type": "blip2", "checkpoint": "ITM"}}, "judge.model.checkpoint: .* has no language model to ask"),
        ({"model": {"type": "chat", "checkpoint": "ITM"}}, "judge.model.checkpoint: .* has no chat template"),
        ({"model": {"type": "vllm", "checkpoint": "VQA"}}, "judge.model.vllm: it is not installed here"),
        ({"model": {"type": "server", "urls": ["localhost"], "model": "m"}}, "judge.model.urls: "),
        ({"type": "constitution", "principles": "alignments"}, "judge.constitution: alignments is neither"),
        ({"type": "pairwise", "principles": "alignments"}, "judge.constitution: alignments is neither"),
        ({"type": "pairwise", "principles": "shapes"}, "judge.principles: blip2.* sees one image at a time"),
        ({"type": "pairwise", "tie": 0.1}, "judge.tie: blip2.* sees one image at a time"),
    ],
)
def test_what_does_not_fit_is_one_line(change, line, blip2, judge_folder):
    text = json.dumps({**KINDS["whole"], "model": blip2, **change})
    for name in ("itm", "vqa"):
        text = text.replace(f'"{name.upper()}"', json.dumps(str(judge_folder / name)))
    value = json.loads(text)
    if value["type"] == "constitution":
        value.pop("questions")
    with pytest.raises(UserError, match=line) as caught:
        used(settings(value))
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_cannot_match_is_refused(judge_folder):
    with pytest.raises(
        UserError, match=r"judge\.checkpoint: .* lacks .*; use one that was saved by Blip2ForImageTextRetrieval"
    ):
        settings({"type": "matching", "checkpoint": str(judge_folder / "vqa")}).build("cpu")


def test_settings_that_tell_in_a_verdict_tell_in_the_fingerprint(judge_folder, tmp_path):
    def digest(judge: dict) -> str:
        return fingerprint(settings(judge).depends())

    folder, engine = str(judge_folder / "vqa"), {"max_model_len": 512, "gpu_memory_utilization": 0.5}
    vllm = {**KINDS["whole"], "model": {"type": "vllm", "checkpoint": folder, "engine": engine}}
    faster = {**vllm, "model": {**vllm["model"], "engine": {**engine, "gpu_memory_utilization": 0.9}}}
    shorter = {**vllm, "model": {**vllm["model"], "engine": {**engine, "max_model_len": 128}}}
    assert digest(vllm) == digest(faster) != digest(shorter)

    principles = tmp_path / "principles.yaml"
    compared = {"type": "pairwise", "model": vllm["model"], "principles": str(principles)}
    digests = set()
    for question in ("Is it neat?", "Is it large?"):
        principles.write_text(yaml.safe_dump([{"name": "one", "question": question}]))
        digests.add(digest(compared))
    assert len(digests) == 2

    clip = {"type": "clip", "checkpoint": folder}
    assert digest(clip) != digest({**clip, "processor": str(judge_folder / "itm")})


def test_the_server_must_serve_the_model_that_was_configured(pictures):
    with ChatServer(model="another") as server:
        config = settings({**KINDS["whole"], "model": {"type": "server", "urls": [server.url], "model": "judge"}})
        with pytest.raises(UserError, match=r"judge\.model\.model: .* does not serve 'judge', it serves another"):
            config.build("cpu")
    with pytest.raises(Unavailable):
        config.build("cpu")


@dataclass
class Fickle:
    """Answers as a judge does, except on a share of the questions."""

    share: float

    def __call__(self, seen) -> dict:
        failed = int(seen.images[0].sum()) % 100 < 100 * self.share
        return first_token(hm=math.log(0.9)) if failed else first_token(yes=math.log(0.7), no=math.log(0.2))


def test_too_many_missing_verdicts_stop_the_run_resumably(config_at, folder):
    answers = Fickle(0.4)
    with ChatServer(answer=answers) as server:
        path = config_at("fickle")
        told = yaml.safe_load(path.read_text())
        model = {"type": "server", "urls": [server.url], "model": "judge"}
        told["judge"] = {"type": "questions", "model": model, "questions": {"type": "whole"}, "shard": 20}
        path.write_text(yaml.safe_dump(told))
        with pytest.raises(Interrupted):
            run_loop(load(Config, path), only=["sample", "judge"])
        assert not Artifact(folder / "fickle" / "judge").names("shard-*.parquet")
        run_loop(load(Config, path, ["judge.max_invalid=0.9"]), only=["sample", "judge"])
    rows = read_rows(Artifact(folder / "fickle" / "judge"))
    missing = [row for row in rows if not row["valid"]]
    assert 0 < len(missing) < len(rows) == 18 * 3
    assert all("none of yes, no" in row["reason"] for row in missing)


def test_a_language_model_writes_the_questions_that_are_missing(config_at, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    with ChatServer(answer=lambda seen: reply(EXAMPLE_REPLY)) as server:
        path = config_at("asking")
        told = yaml.safe_load(path.read_text())
        model = {"type": "server", "urls": [server.url], "model": "judge"}
        told["judge"]["questions"] = {"type": "file", "path": str(asked), "model": model}
        path.write_text(yaml.safe_dump(told))
        config = load(Config, path)
        write_questions(config)
        lines = asked.read_bytes().splitlines()
        calls = len(server.asked())
        assert calls == len(lines) == len({json.loads(line)["prompt"] for line in lines})
        asked.write_bytes(b"\n".join(lines[1:]))
        write_questions(config)
        assert len(server.asked()) == calls + 1
    assert f"has the questions of {len(lines)} of {len(lines)} prompts" in capsys.readouterr().out.replace("\n", "")
    with pytest.raises(UserError, match=r"judge\.questions\.type: must be file"):
        write_questions(load(Config, config_at("unasked")))
