"""The stage `finetune` with algorithms that learn from the run's pairs or from the reward's gradient."""

from types import SimpleNamespace

import numpy as np
import pytest

import pipeline
from pipeline.config import Config
from pipeline.settings import SettingsError, UserError, load
from pipeline.stages.finetune import preferences_of
from pipeline.store import Artifact, read_rows

STAGES = ("sample", "judge", "prefer", "reward")
ALGORITHMS = {
    "dpo": {"type": "dpo", "source": "preferences"},
    "inverted": {"type": "dpo", "source": "preferences", "inversion": True},
    "supervised": {"type": "raft", "source": "preferences"},
    "draft": {"type": "draft", "last": 2},
}


@pytest.fixture(scope="module")
def run_at(config_at, folder):
    """Fine-tunes by an algorithm in one run folder, of which the earlier stages are made once."""
    for stage in STAGES:
        pipeline.run_stage(config_at("pairs"), stage)

    def run(algorithm: str, **settings) -> Artifact:
        path = config_at("pairs", finetune={"algorithm": ALGORITHMS[algorithm], "watch": None, **settings})
        pipeline.run_stage(path, "finetune")
        return Artifact(folder / "pairs" / "finetune")

    return run


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_curves_and_kept_pictures_are_those_of_every_algorithm(run_at, folder, algorithm):
    artifact = run_at(algorithm)
    curves, kept = read_rows(artifact, "curves-*.parquet"), read_rows(artifact, "rollouts-*.parquet")
    siblings = 3 if algorithm == "draft" else 1
    assert curves["images"] == [2 * siblings] * 4
    assert np.isfinite(curves["reward_mean"]).all()
    assert curves["kl"][0] == pytest.approx(0, abs=1e-6)
    assert curves["kl"][-1] > 0
    assert len(kept) == 4 * min(4, 2 * siblings)
    assert artifact.has("lora/pytorch_lora_weights.safetensors")
    if algorithm != "draft":
        pairs = read_rows(Artifact(folder / "pairs" / "prefer"))
        learned = {row["prompt"] for row in pairs if row["split"] == "train"}
        assert set(kept["prompt"]) <= learned


def test_the_watch_looks_at_an_offline_run(run_at):
    artifact = run_at("dpo", watch={"every": 2, "prompts": 50, "judge": False})
    assert artifact.has("signals.json")


class Wide:
    """A generator of pictures that are wider than those of the embedded world."""

    pixel_shape = 32, 48


def test_pairs_of_another_size_are_refused(run_at, folder):
    run_at("dpo")
    inputs = {name: Artifact(folder / "pairs" / name) for name in ("sample", "prefer")}
    expected = (
        r"finetune\.algorithm\.source: a picture of the pairs is 32 x 32 pixels, and the generator paints 48 x 32"
    )
    with pytest.raises(UserError, match=expected):
        preferences_of(SimpleNamespace(inputs=inputs), Wide())


@pytest.mark.parametrize(
    ("finetune", "message"),
    [
        (
            {"algorithm": {"type": "refl"}, "reward": "judge"},
            "refl follows the gradient of the reward, and judge has none",
        ),
        (
            {
                "algorithm": {"type": "draft"},
                "reward": {"terms": [{"type": "model"}, {"type": "rule", "statistic": "edges"}]},
            },
            "draft follows the gradient of the reward, and rule edges has none",
        ),
        (
            {"algorithm": {"type": "draft"}, "reward": {"terms": [{"type": "model"}], "normalise": "running"}},
            "draft follows the terms as they are; set combine to rewards and normalise to none",
        ),
        (
            {"algorithm": {"type": "dpo", "inversion": True}},
            "algorithm: inversion: on-line pictures come from a known noise; set source to preferences",
        ),
        ({"algorithm": {"type": "raft", "best": 3}}, "algorithm.best: 3 of a group of 3 leaves nothing to choose from"),
        (
            {"algorithm": {"type": "raft"}, "enlarge": 1},
            "enlarge: raft chooses among siblings that are painted together",
        ),
        ({"enlarge": 3}, "enlarge: 3 of 2 groups; make it 2 or less"),
        ({"algorithm": {"type": "draft", "last": 4}}, "algorithm.last: 4, but a picture takes 3 steps"),
    ],
)
def test_settings_that_cannot_work_are_one_line(config_at, finetune, message):
    with pytest.raises(SettingsError, match=f"finetune[.:] ?(reward: )?{message}"):
        load(Config, config_at("wrong", finetune=finetune))
