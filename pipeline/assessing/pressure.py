"""What becomes of the truth when a reward is optimised: by choosing the best of n pictures, and by a run's fine-tuning.

The truth is gold where there is an oracle, otherwise the judge, which then is only what the reward was trained on.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np

from judges.base import Judge
from models.keys import sample_key
from pipeline.assessing.material import gold_of
from pipeline.assessing.scoring import fitting
from pipeline.progress import Advance
from pipeline.prompts import draw_key
from pipeline.store import Artifact, read_rows
from rewards.metrics.intervals import prompt_means
from rewards.overoptimisation import Overoptimisation, best_of_n, over_training
from rewards.reward import ModelReward

_PARTS = 10
"""Stretches of a run that count as one checkpoint each where there are only rollouts."""
_REPEATED = 4
"""Held-out prompts repeat where a skill has few; so many times the number wanted are drawn."""
_AT_ONCE = 64


@dataclass(frozen=True)
class Pressure:
    """Curves of the reward and of the truth.

    Attributes:
        curves: None where there are none.
        note: why, or what weakens them; may be empty.
    """

    truth: Literal["gold", "judge"]
    curves: Overoptimisation | None
    note: str = ""


def of_choosing(
    config: Any, prompts: int, images: int, reward: ModelReward, judge: Judge | None, device: str, advance: Advance
) -> Pressure:
    """The best of n, on `images` new pictures of each of `prompts` held-out prompts by the untuned generator."""
    drawn_prompts = config.prompts.held_out(draw_key(config.seed, "evaluate-reward"), _REPEATED * prompts)
    rows = list({row.id: row for row in drawn_prompts}.values())[:prompts]
    generator, drawn = config.generator.build(device), config.evaluate
    wanted = [(row, k) for row in rows for k in range(images)]
    drawn.check("evaluate", generator, (row.text for row in rows))
    keys = [sample_key(config.seed, "evaluate-reward", row.id, k) for row, k in wanted]
    proxy, truth = [], []
    for start in range(0, len(wanted), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        texts = [row.text for row, _ in wanted[part]]
        painted = list(drawn.paint(generator, texts, keys[part]))
        read = fitting(reward, texts)
        proxy += reward(painted, [read[text] for text in texts]).values.tolist()
        truth += _truth(config, painted, texts, judge)
        advance(len(painted))
    return _curves(judge, lambda: best_of_n(proxy, truth, [row.id for row, _ in wanted]))


def of_tuning(config: Any, finetune: Artifact, judge: Judge | None) -> Pressure:
    """The curves of a run's fine-tuning: from its checks on held-out prompts, or else from its rollouts."""
    if config.finetune.reward != "model" or config.finetune.refresh:
        return Pressure(_name(judge), None, "the run was tuned on another reward than this model")
    if finetune.names("checks-*.parquet"):
        found = _checks(config, finetune, judge)
        return _curves(judge, lambda: over_training(*found))
    if not finetune.names("rollouts-*.parquet"):
        return Pressure(_name(judge), None, "fine-tuning kept no pictures")
    found = _rollouts(config, finetune, judge)
    note = "from rollouts, whose prompts differ from one iteration to the next: a rough curve"
    return _curves(judge, lambda: over_training(*found), note)


def _curves(judge: Judge | None, compute: Callable[[], Overoptimisation], note: str = "") -> Pressure:
    try:
        return Pressure(_name(judge), compute(), note)
    except ValueError as error:
        return Pressure(_name(judge), None, str(error))


def _name(judge: Judge | None) -> Literal["gold", "judge"]:
    return "judge" if judge else "gold"


def _truth(config: Any, images: list[np.ndarray], prompts: list[str], judge: Judge | None) -> list[float]:
    if judge is None:
        return gold_of(config, images, prompts)
    return [verdict.margin if verdict.valid else np.nan for verdict in judge.score(images, prompts)]


def _checks(config: Any, finetune: Artifact, judge: Judge | None) -> tuple[np.ndarray, ...]:
    """KL, gain of the reward and of the truth over the first check on the same prompt, and the prompt, of each picture
    (N,)."""
    rows = read_rows(finetune, "checks-*.parquet")
    iteration, prompts = np.array(rows["iteration"]), np.array(rows["prompt_id"])
    known = np.array(rows["judge"], dtype=float)
    truth = known if judge and np.isfinite(known).any() else _truths(config, rows, judge)
    reward, base = np.array(rows["reward"], dtype=float), iteration == iteration.min()
    gains = (values - _level(values, base, prompts) for values in (reward, truth))
    return np.array(rows["kl"], dtype=float), *gains, prompts


def _level(values: np.ndarray, base: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """The mean (N,) of each picture's prompt over the pictures of the base model; NaN where it has none."""
    means, found = prompt_means(values[base], prompts[base])
    level = dict(zip(found, means, strict=True))
    return np.array([level.get(prompt, np.nan) for prompt in prompts])


def _rollouts(config: Any, finetune: Artifact, judge: Judge | None) -> tuple[np.ndarray, ...]:
    """The same of stretches of the run, over the mean of the first, whose KL counts as none."""
    rows = read_rows(finetune, "rollouts-*.parquet")
    of = {curve["iteration"]: curve["kl"] for curve in read_rows(finetune, "curves-*.parquet")}
    part = np.array(rows["iteration"]) * _PARTS // (max(of) + 1)
    of_rows = np.array([of[iteration] for iteration in rows["iteration"]])
    of_part = {own: of_rows[part == own].mean() if own else 0.0 for own in set(part.tolist())}
    kl = np.array([of_part[own] for own in part.tolist()])
    truth = _truths(config, rows, judge)
    first = part == 0
    gains = (values - np.nanmean(values[first]) for values in (np.array(rows["reward"], dtype=float), truth))
    return kl, *gains, np.array(rows["prompt_id"])


def _truths(config: Any, rows: datasets.Dataset, judge: Judge | None) -> np.ndarray:
    found: list[float] = []
    for part in rows.iter(batch_size=_AT_ONCE):
        found += _truth(config, [np.asarray(image) for image in part["image"]], part["prompt"], judge)
    return np.array(found)
