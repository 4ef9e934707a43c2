"""The stage `evaluate`: base and tuned generator on the same held-out prompts and noise, and how far to believe
the judge and the reward model.

The oracle of the embedded world is asked here and nowhere before; other prompts have no gold, and its fields are
null.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import datasets
import numpy as np
from PIL import Image
from pydantic import Field
from scipy.special import expit

import models
import rewards
from judges.shapes.oracle import gold
from models.keys import sample_key
from pipeline.forecast import fits
from pipeline.pace import judging_seconds, rewarding_seconds
from pipeline.pictures import pictures_of, source_of
from pipeline.prompts import draw_key
from pipeline.runner import Context, Stage, Work
from pipeline.stages.reward import trained_loss
from pipeline.stages.sample import Painting, columns, painting_seconds, shards
from pipeline.store import read_rows, write_rows
from rewards.losses import joined

MODELS = ("base", "tuned")
_AT_ONCE = 256
"""Pictures of pairs that are in memory together."""

GOLD_SECONDS = 4e-3
"""One picture for the oracle of the embedded world, on the reference machine."""

FEATURES = datasets.Features(
    {
        "model": datasets.Value("string"),
        "prompt_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "skill": datasets.Value("string"),
        "sample": datasets.Value("int32"),
        "image": datasets.Image(),
        "judge": datasets.Value("float32"),
        "judge_value": datasets.Value("float32"),
        "judge_valid": datasets.Value("bool"),
        "reward": datasets.Value("float32"),
        "gold": datasets.Value("bool"),
    }
)
PAIRS = datasets.Features(
    {
        "prompt_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "skill": datasets.Value("string"),
        "sample_a": datasets.Value("int32"),
        "sample_b": datasets.Value("int32"),
        "label": datasets.Value("float32"),
        "reward_a": datasets.Value("float32"),
        "reward_b": datasets.Value("float32"),
        "preference": datasets.Value("float32"),
        "gold_a": datasets.Value("bool"),
        "gold_b": datasets.Value("bool"),
    }
)
CURVES = datasets.Features(
    {
        "iteration": datasets.Value("int32"),
        "reward": datasets.Value("float32"),
        "gold": datasets.Value("float32"),
        "images": datasets.Value("int32"),
    }
)


class EvaluateConfig(Painting):
    """On how much to measure: pictures of each of the two generators."""

    images: int = Field(768, ge=2)


def _depends(config: Any) -> dict[str, Any]:
    return {
        "version": 3,
        "seed": config.seed,
        "generator": config.generator.depends(),
        "prompts": config.prompts.depends(),
        "evaluate": config.evaluate.model_dump(mode="json"),
        "judge": config.judge.depends(),
    }


def _work(config: Any) -> Work:
    images = len(MODELS) * config.evaluate.images
    rollouts = config.finetune.iterations * config.finetune.kept_images
    parts = {
        "painting": painting_seconds(config, config.evaluate, images),
        "the judge": judging_seconds(config.judge, images),
        "the reward": rewarding_seconds(config, images),
        "gold": rollouts * GOLD_SECONDS if config.prompts.type == "shapes" else 0.0,
    }
    return Work.of(images, parts, config.generator.dtype)


def _gold(config: Any, images: Sequence[np.ndarray], prompts: Sequence[str], painted: bool = True) -> list[bool | None]:
    """Gold is known of what was `painted` for prompts of the embedded world."""
    known = painted and config.prompts.type == "shapes"
    return list(gold(images, prompts)) if known else [None] * len(images)


def _run(context: Context) -> None:
    reward = _paint(context)
    context.accelerator.wait_for_everyone()
    if context.accelerator.is_main_process:
        _measure(context, reward)


def _paint(context: Context) -> "rewards.ModelReward":
    """Pictures of both models, and what judge, reward and oracle say of them; the reward, which is loaded once."""
    config, settings = context.config, context.config.evaluate
    device = str(context.accelerator.device)
    prompts = config.prompts.held_out(draw_key(config.seed, "evaluate"), settings.images)
    size = max(1, settings.shard // len(MODELS))
    mine = [prompts[k].text for _, part in shards(context, range(len(prompts)), size) for k in part]
    generators, waiting = _generators(context, mine)
    judge = config.judge.build(device)
    reward = rewards.load_reward(context.inputs["reward"].folder / "model", device)
    with context.progress.track(len(MODELS) * len(prompts), "images", "evaluate") as advance:
        for name, part in shards(context, range(len(prompts)), size):
            keys = [sample_key(config.seed, "evaluate", prompts[k].id, k) for k in part]
            texts = [prompts[k].text for k in part]
            images = []
            for model in MODELS:
                images += settings.paint(generators[model].to(device), texts, keys)
                generators[model].to(waiting)
            # Both models' images in one call: a judge that compares compares them with one another.
            shown = [(model, k) for model in MODELS for k in part]
            texts = texts * len(MODELS)
            verdicts, rated = judge.score(images, texts), reward(images, texts)
            found = zip(shown, images, verdicts, rated.values, _gold(config, images, texts), strict=True)
            rows = []
            for (model, k), image, verdict, value, right in found:
                seen = {
                    "judge": verdict.margin,
                    "judge_value": verdict.value,
                    "judge_valid": verdict.valid,
                    "reward": float(value),
                    "gold": right,
                }
                named = {"model": model, **columns(prompts[k]), "sample": k}
                rows.append({**named, "image": Image.fromarray(image), **seen})
            write_rows(context.artifact, name, rows, FEATURES)
            advance(len(rows))
    return reward


def _generators(context: Context, prompts: Sequence[str]) -> tuple[dict[str, "models.Generator"], str]:
    """Base and tuned generator, which share text encoders and codec, and the device on which they wait for their turn.

    Where parts wait in main memory while they are not used, so does the generator whose turn it is not, and `prompts`
    are encoded here, before judge and reward take their room.
    """
    config, device = context.config, str(context.accelerator.device)
    folder = context.inputs["finetune"].folder / config.finetune.kept_folder
    if config.generator.ours or not config.generator.offload:
        base = config.generator.build(device)
        config.evaluate.check("evaluate", base, prompts)
        return {"base": base, "tuned": config.generator.tuned(base, folder)}, device
    asked = list(dict.fromkeys([*prompts, config.generator.negative]))
    base = config.generator.model_copy(update={"cached_prompts": len(asked)}).build(device)
    config.evaluate.check("evaluate", base, asked)
    for start in range(0, len(asked), config.evaluate.batch):
        base.encode(asked[start : start + config.evaluate.batch])
    return {"base": base.to("cpu"), "tuned": config.generator.tuned(base, folder)}, "cpu"


def _measure(context: Context, reward: "rewards.ModelReward") -> None:
    """Everything that is computed from all pictures at once."""
    artifact = context.artifact
    _measure_rollouts(context)
    untrained = context.config.reward.untrained(context.config.seed)
    initial = rewards.ModelReward(untrained.to(context.accelerator.device))
    pairs, before = _scored_pairs(context, reward, initial)
    write_rows(artifact, "pairs.parquet", pairs, PAIRS)
    rows = read_rows(artifact).remove_columns("image").to_list()
    found = {
        "generator": {model: generator_metrics([r for r in rows if r["model"] == model]) for model in MODELS},
        "reward": reward_metrics(pairs, before),
        "judge": judge_metrics(rows),
    }
    artifact.write_text("metrics.json", json.dumps(found, indent=2) + "\n")


def _measure_rollouts(context: Context) -> None:
    """The curves of fine-tuning: reward over all rollouts, gold over the pictures that were kept."""
    tuned = context.inputs["finetune"]
    kept = read_rows(tuned, "rollouts-*.parquet")
    right: dict[int, list[bool | None]] = {}
    with context.progress.track(len(kept), "rollouts", "evaluate") as advance:
        for part in kept.iter(batch_size=context.config.evaluate.shard):
            images = [np.asarray(image) for image in part["image"]]
            for iteration, passed in zip(part["iteration"], _gold(context.config, images, part["prompt"]), strict=True):
                right.setdefault(iteration, []).append(passed)
            advance(len(images))
    rows = [
        {
            "iteration": curve["iteration"],
            "reward": curve["reward_mean"],
            "gold": _share(right.get(curve["iteration"], [])),
            "images": curve["images"],
        }
        for curve in read_rows(tuned, "curves-*.parquet")
    ]
    write_rows(context.artifact, "curves.parquet", rows, CURVES)


def _scored_pairs(
    context: Context, reward: "rewards.ModelReward", initial: "rewards.ModelReward"
) -> tuple[list[dict[str, Any]], list[tuple[float, float]]]:
    """The held-out pairs with their rewards, and what the reward model said of them before its training."""
    pairs = [pair for pair in read_rows(context.inputs["prefer"]) if pair["split"] == "heldout"]
    prompts = {pair["prompt_id"] for pair in pairs}
    source, pattern = source_of(context.inputs)
    pictures = read_rows(source, pattern, ["prompt_id", "prompt", "sample"])
    chosen = pictures.select([i for i, p in enumerate(pictures["prompt_id"]) if p in prompts])
    keys, texts = list(zip(chosen["prompt_id"], chosen["sample"], strict=True)), list(chosen["prompt"])
    shown, found, before, right = pictures_of(context.inputs), [], [], []
    for start in range(0, len(keys), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        images = shown.of(keys[part])
        found.append(reward.scores(images, texts[part]))
        before += initial(images, texts[part]).values.tolist()
        right += _gold(context.config, images, texts[part], context.config.prefer.table is None)
    scores = joined(found)
    after = scores.mean.tolist()
    place = {key: row for row, key in enumerate(keys)}
    first, second = ([place[pair["prompt_id"], pair[side]] for pair in pairs] for side in ("sample_a", "sample_b"))
    preference = expit(trained_loss(context.inputs["reward"]).log_odds(scores[first], scores[second]).numpy())
    rows = []
    for pair, a, b, better in zip(pairs, first, second, preference.tolist(), strict=True):
        named = {name: pair[name] for name in ("prompt_id", "prompt", "skill", "sample_a", "sample_b", "label")}
        seen = {"reward_a": after[a], "reward_b": after[b], "preference": better}
        rows.append({**named, **seen, "gold_a": right[a], "gold_b": right[b]})
    return rows, [(before[a], before[b]) for a, b in zip(first, second, strict=True)]


def _share(values: Sequence[bool | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _gold_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    share = _share([row["gold"] for row in rows])
    interval = None
    if share is not None:
        interval = list(rewards.metrics.wilson_interval(sum(row["gold"] for row in rows), len(rows)))
    return {"gold": share, "interval": interval, "images": len(rows)}


def generator_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Share of pictures that the oracle accepts with Wilson's interval, per skill too; mean judge and reward."""
    skills = sorted({row["skill"] for row in rows})
    return {
        **_gold_metrics(rows),
        "per_skill": {skill: _gold_metrics([row for row in rows if row["skill"] == skill]) for skill in skills},
        "judge": float(np.mean([row["judge_value"] for row in rows if row["judge_valid"]])),
        "reward": float(np.mean([row["reward"] for row in rows])),
    }


def reward_metrics(pairs: Sequence[dict[str, Any]], before: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """How often the reward orders a held-out pair as the judge does, and as gold does where it tells them apart.

    Intervals are bootstrapped over prompts; `initial_*` is the backbone before preference training.
    """
    label = np.array([pair["label"] for pair in pairs])
    first, second = (np.array([pair[name] for pair in pairs]) for name in ("reward_a", "reward_b"))
    old_first, old_second = np.array(before).T
    prompts = np.array([pair["prompt_id"] for pair in pairs])
    told = np.array([pair["gold_a"] is not None and pair["gold_a"] != pair["gold_b"] for pair in pairs])
    truth = np.array([float(bool(pair["gold_a"])) for pair in pairs])

    def accuracy(a: np.ndarray, b: np.ndarray, right: np.ndarray, rows: np.ndarray) -> tuple[Any, Any]:
        if not rows.any():
            return None, None
        correct = rewards.metrics.correctness(a[rows], b[rows], right[rows])
        return float(correct.mean()), list(rewards.metrics.clustered_interval(correct, prompts[rows]))

    clear = label != 0.5
    judged, judged_interval = accuracy(first, second, label, clear)
    golden, golden_interval = accuracy(first, second, truth, told)
    probability = np.array([pair["preference"] for pair in pairs])
    return {
        "accuracy": {
            "judge": judged,
            "judge_interval": judged_interval,
            "gold": golden,
            "gold_interval": golden_interval,
            "initial_judge": accuracy(old_first, old_second, label, clear)[0],
            "initial_gold": accuracy(old_first, old_second, truth, told)[0],
        },
        "pairs": len(pairs),
        "gold_pairs": int(told.sum()),
        "nll": float(rewards.metrics.nll(probability, label)),
        "brier": float(rewards.metrics.brier(probability, label)),
        "ece": float(rewards.metrics.ece(probability, label)),
        "reliability": [asdict(bin) for bin in rewards.metrics.reliability(probability, label)],
    }


def judge_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Balanced accuracy of "margin above 0" against gold, over the pictures of both generators."""
    known = [row for row in rows if row["gold"] is not None and row["judge_valid"]]
    said, right = (np.array([row[name] for row in known]) for name in ("judge", "gold"))
    accuracy = interval = None
    if known and 0 < right.sum() < len(right):
        correct = (said > 0) == right
        accuracy = float((correct[right].mean() + correct[~right].mean()) / 2)
        ends = [rewards.metrics.wilson_interval(int(correct[side].sum()), int(side.sum())) for side in (right, ~right)]
        interval = [float(np.mean([end[i] for end in ends])) for i in (0, 1)]
    return {"accuracy": {"gold": accuracy, "interval": interval}, "images": len(known)}


EVALUATE = Stage("evaluate", ("sample", "prefer", "reward", "finetune"), _depends, _work, _run, check=fits("evaluate"))
