"""A run changes its reward model by `reward.*` alone."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pipeline
from pipeline.config import Config
from pipeline.settings import SettingsError, UserError, load
from rewards import load_reward
from rewards.losses import make_loss
from tests import tiny_chat

CHANGES = {
    "clip": {"backbone": {"type": "clip", "fresh": True}, "train": {"type": "full"}},
    "imagereward": {"backbone": {"type": "imagereward", "fresh": True}, "loss": {"type": "rao_kupper"}},
    "chat": {
        "backbone": {"type": "chat", "template": "is there {} ?", "size": 16, "length": 64},
        "train": {"type": "lora", "rank": 2},
        "loss": {"type": "gaussian", "likelihood": "sampled"},
    },
    "vqa": {
        "backbone": {"type": "vqa", "template": "is there {} ?", "length": 20},
        "train": {"type": "lora", "rank": 2},
    },
    "latent": {"backbone": {"type": "latent", "most_noise": 0.8}, "loss": {"type": "thurstone"}},
    "qformer": {
        "backbone": {"type": "qformer"},
        "train": {"type": "frozen", "share": 0.5},
        "loss": {"type": "pointwise", "error": "huber"},
    },
}


@pytest.fixture(scope="module")
def checkpoints(judge_folder, generator_folder, tmp_path_factory) -> dict[str, str]:
    chat = tiny_chat.save(*tiny_chat.llava(), tmp_path_factory.mktemp("chat"))
    of_itm = dict.fromkeys(("clip", "imagereward", "qformer"), str(judge_folder / "itm"))
    return {**of_itm, "vqa": str(judge_folder / "vqa"), "chat": str(chat), "latent": str(generator_folder)}


@pytest.fixture(scope="module")
def config_of(config_at, checkpoints) -> Callable[[str], Path]:
    def write(kind: str) -> Path:
        changes = CHANGES[kind]
        return config_at(
            "models", reward={**changes, "backbone": {**changes["backbone"], "checkpoint": checkpoints[kind]}}
        )

    return write


@pytest.fixture(scope="module")
def upstream(config_of, folder) -> Path:
    """A run up to its preference pairs."""
    for stage in ("sample", "judge", "prefer"):
        pipeline.run_stage(config_of("qformer"), stage)
    return folder / "models"


@pytest.mark.parametrize("kind", CHANGES)
def test_any_backbone_is_trained_by_changing_reward_alone(upstream, config_of, kind):
    pipeline.run_stage(config_of(kind), "reward")
    metrics = json.loads((upstream / "reward" / "metrics.json").read_text())
    model = load_reward(upstream / "reward" / "model")
    assert model.model.kind == kind
    assert np.isfinite(metrics["heldout_nll"])
    loss = make_loss(**metrics["loss"])
    assert loss.type == CHANGES[kind].get("loss", {"type": "bradley_terry"})["type"]
    images = list(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    assert np.ptp(model(images, ["a red ring", "a red ring"]).values) > 0


def test_the_fingerprint_follows_what_changes_the_model(config_of, judge_folder):
    config = load(Config, config_of("clip"))
    backbone = config.reward.backbone
    weights = judge_folder / "itm" / "model.safetensors"
    before, kept = backbone.depends(), weights.read_bytes()
    weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert backbone.depends() != before
    weights.write_bytes(kept)
    assert backbone.depends() == before
    assert load(Config, config_of("clip"), ["reward.backbone.fresh=false"]).reward.backbone.depends() != before


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["reward.backbone=judges/itm"], "reward.backbone: should be an object, not 'judges/itm'"),
        (["reward.backbone.type=clipp"], "reward.backbone.type: unknown clipp; did you mean clip?"),
        (["reward.backbone.frehs=true"], "did you mean reward.backbone.fresh?"),
        (["reward.backbone.processor=here"], "reward.backbone: processor: a fresh model takes that of its checkpoint"),
        (["reward.train={type: lora, rank: 0}"], "reward.train.rank"),
        (["reward.loss.type=bradley-terry"], "did you mean bradley_terry?"),
        (["reward.loss={type: thurstone, variance: 0}"], "reward.loss: variance: 0.0"),
        (["reward.loss={type: davidson, slope: 1}"], "unknown key reward.loss.slope"),
        (["reward.loss={type: gaussian}"], "reward: loss: gaussian reads the standard deviation"),
        (["reward.backbone={type: chat, checkpoint: x}", "reward.ensemble.heads=4"], "a chat reward takes one head"),
    ],
)
def test_a_setting_that_does_not_fit_is_named(config_of, changes, line):
    with pytest.raises(SettingsError) as error:
        load(Config, config_of("clip"), changes)
    assert line in str(error.value)


@pytest.mark.parametrize(
    ("kind", "checkpoint", "line"),
    [
        ("qformer", "nowhere", "nowhere"),
        ("latent", "itm", "reward.backbone: .* holds no generator"),
        ("clip", "itm", "reward.backbone.checkpoint: .* holds a blip-2 model; the backbone clip needs a CLIPModel"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(upstream, config_at, checkpoints, kind, checkpoint, line):
    found = {"itm": checkpoints["qformer"]}.get(checkpoint, checkpoint)
    path = config_at("models", reward={"backbone": {"type": kind, "checkpoint": found}})
    with pytest.raises(UserError, match=line) as error:
        pipeline.run_stage(path, "reward")
    assert "\n" not in str(error.value)


def test_pictures_of_another_size_are_refused_before_training(upstream, config_at, judge_folder, tmp_path):
    itm = tmp_path / "itm"
    itm.mkdir()
    for file in (judge_folder / "itm").iterdir():
        (itm / file.name).write_bytes(file.read_bytes())
    settings = json.loads((itm / "preprocessor_config.json").read_text())
    (itm / "preprocessor_config.json").write_text(
        json.dumps({**settings, "do_resize": True, "size": {"height": 64, "width": 64}})
    )
    path = config_at("models", reward={"backbone": {"type": "qformer", "checkpoint": str(itm)}})
    with pytest.raises(UserError, match=r"^reward\.backbone\.image: 64 x 64 pixels, the reward model reads 32 x 32"):
        pipeline.run_stage(path, "reward")


def test_the_shipped_run_takes_any_backbone():
    for kind, changes in CHANGES.items():
        told = {**changes, "backbone": {**changes["backbone"], "checkpoint": "judges/checkpoints/shapes/itm"}}
        overrides = [f"reward.{name}={json.dumps(value)}" for name, value in told.items()]
        assert load(Config, "configs/shapes.yaml", overrides).reward.backbone.type == kind
