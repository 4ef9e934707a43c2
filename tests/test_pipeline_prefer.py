"""Verdicts on disk become pairs on disk; what does not fit is told in one line."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from judges.base import Verdict
from judges.ensemble import Ensemble
from pipeline.config import Config
from pipeline.runner import Context
from pipeline.settings import SettingsError, UserError, load
from pipeline.stages import judge
from pipeline.stages.prefer import PREFER, PreferConfig
from pipeline.store import Artifact, read_rows, write_rows
from rewards.preferences import Rule

FIXED = np.zeros((2, 2, 3), dtype=np.uint8)


class Fixed:
    """A judge that gives the margins it was made with, whatever it sees."""

    template = "t"

    def __init__(self, name: str, margins: list[float]):
        self.id, self.margins = name, margins

    def score(self, images, prompts):
        return [Verdict(margin, (), self.id, self.template) for margin in self.margins]


def judged(folder, scorer, prompts: int, images: int) -> Artifact:
    """The artifact of a judge that scored so many pictures of each prompt."""
    artifact = Artifact(folder / "judge")
    artifact.begin("f")
    rows = [
        {"prompt_id": f"p{k}", "prompt": f"a {k} cup", "skill": "", "sample": sample, **judge.columns_of(verdict)}
        for k in range(prompts)
        for sample, verdict in enumerate(scorer.score([FIXED] * images, [""] * images))
    ]
    write_rows(artifact, "shard-00000.parquet", rows, judge.FEATURES)
    artifact.finish({})
    return artifact


def preferred(folder, scorer, prompts: int = 20, images: int = 3, **settings) -> list[dict]:
    """The pairs that the stage writes."""
    source, artifact = judged(folder, scorer, prompts, images), Artifact(folder / "prefer")
    artifact.begin("g")
    PREFER.run(Context(SimpleNamespace(prefer=PreferConfig(**settings)), artifact, {"judge": source}))
    artifact.finish({})
    return read_rows(artifact).to_list()


def test_the_disagreement_of_an_ensemble_picks_the_pairs(tmp_path):
    """The second and third picture are a nat apart, but on the third the members are five apart."""
    ensemble = Ensemble([Fixed("a", [0.0, 3.0, 9.0]), Fixed("b", [0.1, 3.0, -1.0])])
    rows = preferred(tmp_path, ensemble, strategy="uncertainty", per_prompt=1, heldout=0.5)
    assert {frozenset((row["sample_a"], row["sample_b"])) for row in rows} == {frozenset((1, 2))}
    assert len(rows) == 20
    assert {row["judge"] for row in rows} == {ensemble.id}
    stored = read_rows(Artifact(tmp_path / "judge"))
    assert stored["disagreement"][:3] == pytest.approx([0.05, 0.0, 5.0])


def test_one_judge_is_in_no_disagreement_and_its_closest_are_taken(tmp_path):
    rows = preferred(tmp_path, Fixed("a", [0.0, 3.0, 9.0]), strategy="uncertainty", per_prompt=1, heldout=0.5)
    assert {frozenset((row["sample_a"], row["sample_b"])) for row in rows} == {frozenset((0, 1))}
    assert all(math.isnan(value) for value in read_rows(Artifact(tmp_path / "judge"))["disagreement"])


def test_ties_are_written_as_ties(tmp_path):
    rows = preferred(tmp_path, Fixed("a", [0.0, 0.1, 2.0]), tie=0.2, heldout=0.5)
    ties = [row for row in rows if {row["sample_a"], row["sample_b"]} == {0, 1}]
    assert len(rows) == 60
    assert len(ties) == 20
    assert all(row["label"] == 0.5 for row in ties)


def test_one_split_left_empty_is_told(tmp_path):
    with pytest.raises(UserError, match=r"^prefer: 0 pairs are left and do not fill both splits"):
        preferred(tmp_path, Fixed("a", [0.0, 0.1, 0.2]))


def test_settings_that_do_not_go_together_are_named(tmp_path, config_at):
    def refusal(**changes) -> str:
        path = tmp_path / "run.yaml"
        settings = yaml.safe_load(config_at("prefer settings").read_text())
        path.write_text(yaml.safe_dump({**settings, "prefer": changes}))
        with pytest.raises(SettingsError) as caught:
            load(Config, path)
        return str(caught.value)

    assert "prefer: per_prompt: 'uncertainty' takes that many of each prompt" in refusal(strategy="uncertainty")
    assert "prefer: per_prompt: 'all' has no use for it" in refusal(per_prompt=2)
    assert "prefer: max_gap: 0.2 is less than min_gap, 0.5" in refusal(max_gap=0.2)
    assert "prefer.strategy" in refusal(strategy="widest")


def test_defaults_are_those_of_the_rule():
    assert PreferConfig().rule == Rule()
