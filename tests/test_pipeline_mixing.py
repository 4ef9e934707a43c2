"""What a run may reward, from its settings to its artifacts: mixtures, readings of an ensemble, refreshes."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline import store
from pipeline.config import Config
from pipeline.mixing import mixture_config
from pipeline.rl.refresh import replayed
from pipeline.settings import UserError, dump, load
from pipeline.stages.finetune import FINETUNE as FINETUNE_STAGE
from pipeline.store import Artifact, read_rows
from rewards import load_reward
from rewards.backbones import load_model

MIXED = {
    "terms": [
        {"type": "model", "reading": "worst"},
        {"type": "judge", "weight": 0.5},
        {"type": "rule", "statistic": "saturation", "high": 0.3, "weight": -2.0},
    ],
    "combine": "advantages",
    "normalise": "running",
}
REFRESH = {"every": 1, "prompts": 12, "images": 3, "replay": 0.5}
WATCH = {"every": 3, "prompts": 50, "images": 2}
FINETUNE = {"iterations": 3, "save_every": 2, "watch": WATCH, "reward": MIXED, "refresh": REFRESH}


@pytest.fixture(scope="module")
def config_of(config_at) -> Callable[..., Path]:
    """Writes the settings of a run with an ensemble of two heads, with changes of `finetune`."""

    def write(name: str = "mixed", **changes) -> Path:
        return config_at(name, reward={"ensemble": {"heads": 2}}, finetune={**FINETUNE, **changes})

    return write


@pytest.fixture(scope="module")
def upstream(config_of, folder) -> Path:
    """A run up to its reward model."""
    for stage in ("sample", "judge", "prefer", "reward"):
        pipeline.run_stage(config_of(), stage)
    return folder / "mixed"


@pytest.fixture(scope="module")
def whole(upstream, config_of) -> dict[str, bytes]:
    """The files of a run that was never cut off."""
    pipeline.run_stage(config_of(), "finetune")
    return made(upstream)


def made(run: Path) -> dict[str, bytes]:
    folder = run / "finetune"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_mixture_tells_what_its_terms_said(upstream, whole):
    rows = read_rows(Artifact(upstream / "finetune"), "terms-*.parquet").to_list()
    assert [row["term"] for row in rows[:3]] == ["model", "judge", "rule saturation"]
    assert len(rows) == 3 * 3
    curves = read_rows(Artifact(upstream / "finetune"), "curves-*.parquet")
    first = sum(row["weight"] * row["mean"] for row in rows[:3])
    assert curves[0]["reward_mean"] == pytest.approx(first, rel=1e-4)


def test_the_last_refreshed_model_is_kept_with_the_numbers_of_all(upstream, whole):
    numbers = json.loads(whole["refreshes.json"])
    assert [one["iteration"] for one in numbers] == [1, 2]
    for one in numbers:
        assert one["fresh_pairs"] > 0
        assert set(one["heldout_accuracy"]["before"]) == set(one["heldout_accuracy"]["after"]) == {"fresh", "old"}
    old, new = (load_model(upstream / place).state_dict() for place in ("reward/model", "finetune/reward"))
    assert any(not np.array_equal(old[name], new[name]) for name in old)
    assert load_reward(upstream / "finetune" / "reward").model.head_count == 2


class Cut(BaseException):
    """The power goes."""


@pytest.mark.parametrize("place", ["refresh-00001/judge/manifest.json", "refresh-00002/reward/metrics.json"])
def test_a_refresh_goes_on_with_what_stands_of_it_to_the_bit(whole, upstream, config_of, monkeypatch, place):
    (upstream / "finetune" / "manifest.json").unlink()

    def published(temporary: Path, path: Path) -> None:
        publish(temporary, path)
        if path.match(place):
            raise Cut

    publish = store._publish
    monkeypatch.setattr(store, "_publish", published)
    with pytest.raises(Cut):
        pipeline.run_stage(config_of(), "finetune")
    monkeypatch.undo()
    pipeline.run_stage(config_of(), "finetune")
    assert made(upstream) == whole


def test_only_what_names_an_ensemble_reads_one(config_at):
    path = config_at("bad", finetune={"reward": {"terms": [{"type": "model", "reading": "worst"}]}})
    with pytest.raises(UserError, match="reading: worst takes several heads, and the run's reward model has one"):
        pipeline.run(path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("reward=modell", "finetune.reward: "),
        ("reward={terms: []}", "finetune.reward.terms"),
        ("reward={terms: [{type: modle}]}", "finetune.reward.terms.0.type: unknown modle; did you mean model?"),
        ("reward={terms: [{type: model, wieght: 2}]}", "did you mean finetune.reward.terms.0.weight?"),
        ("reward={terms: [{type: model}, {type: judge, weight: 0}]}", "terms.1.weight: 0 makes"),
        ("reward={terms: [{type: rule, statistic: edges, low: 2, high: 1}]}", "low: 2.0 is above high, 1.0"),
        ("reward={terms: [{type: model}], combine: advantage}", "finetune.reward.combine"),
        ("reward={terms: [{type: model}, {type: gold}]}", "allow_gold"),
        ("reward={terms: [{type: checkpoint, path: nowhere}]}", "nowhere"),
        ("refresh={every: 0}", "finetune.refresh.every"),
        ("refresh={}", "refresh: the run's reward model is not among the rewards"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_line_and_nothing_is_written(config_at, folder, change, line):
    path = config_at("bad", finetune={"reward": "judge"})
    with pytest.raises(UserError) as error:
        pipeline.run(path, f"finetune.{change}")
    assert line in str(error.value)
    assert "\n" not in str(error.value)
    assert not (folder / "bad").exists()


def test_a_plain_name_is_that_term_alone_and_both_forms_come_back_from_yaml(config_at, tmp_path):
    for choice in ("model", "judge", {"terms": [{"type": "model", "temperature": "fitted"}], "combine": "advantages"}):
        config = load(Config, config_at("form", finetune={"reward": choice}))
        assert mixture_config(config.finetune.reward).terms[0].type == (choice if isinstance(choice, str) else "model")
        (tmp_path / "again.yaml").write_text(dump(config))
        assert load(Config, tmp_path / "again.yaml") == config


def test_the_fingerprint_follows_what_a_refresh_depends_on(config_of):
    def depends(*overrides, **changes) -> dict:
        config = load(Config, config_of("depends", **changes), overrides)
        return FINETUNE_STAGE.depends(config)

    assert depends() == depends()
    assert depends() == depends("sample.batch=7")
    for change in ("steps=9", "shift=2", "sampler=heun", "eta=0.1"):
        assert depends() != depends(f"sample.{change}")
    assert depends(refresh={**REFRESH, "replay": 0.25}) != depends()
    assert depends(refresh=None) != depends()


def test_replayed_pairs_are_the_share_asked_for():
    old = [{"split": split, "row": row} for split, rows in (("train", 50), ("heldout", 3)) for row in range(rows)]
    fresh = [{"split": split} for split, rows in (("train", 12), ("heldout", 4)) for _ in range(rows)]
    for share, train, heldout in ((0.0, 0, 0), (0.25, 4, 1), (0.5, 12, 3), (0.9, 50, 3)):
        found = replayed(old, fresh, share, 0, 1)
        assert [sum(pair["split"] == split for pair in found) for split in ("train", "heldout")] == [train, heldout]
        assert len({(pair["split"], pair["row"]) for pair in found}) == len(found)
    assert replayed(old, fresh, 0.5, 0, 1) != replayed(old, fresh, 0.5, 0, 2)
