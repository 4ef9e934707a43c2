"""Scores of the material of an evaluation: by the reward model, by others, and by the judge."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from judges.base import Judge
from pipeline.assessing.material import Material
from pipeline.progress import Advance
from pipeline.settings import UserError
from rewards.losses import Scores
from rewards.reward import ModelReward


@dataclass(frozen=True)
class Scored:
    """What a reward model says of N pictures.

    Attributes:
        reward: (N,) its mean; `sigma` (N,) the standard deviation, NaN where it knows none.
        read: as much of each prompt as it reads.
    """

    reward: np.ndarray
    sigma: np.ndarray
    read: tuple[str, ...]


def scored(reward: ModelReward, material: Material, advance: Advance) -> Scored:
    """Scores of all pictures.

    Raises:
        UserError: the model does not read pictures of this size.
    """
    told = fitting(reward, [picture.prompt for picture in material.pictures])
    read = tuple(told[picture.prompt] for picture in material.pictures)
    means, sigmas = [], []
    for part, images in material.images():
        try:
            found = reward.scores(images, [read[place] for place in part])
        except ValueError as error:
            raise UserError(f"{material.source}: {error}; give pictures that it reads, or another model") from None
        means.append(found.mean.double().numpy())
        sigmas.append(deviation(found))
        advance(len(images))
    return Scored(np.concatenate(means), np.concatenate(sigmas), read)


def fitting(reward: ModelReward, prompts: Sequence[str]) -> dict[str, str]:
    """For each prompt as many of its first words as the model reads."""
    unique = list(dict.fromkeys(prompts))
    if _fits(reward, unique):
        return dict(zip(unique, unique, strict=True))
    return {prompt: _cut(reward, prompt) for prompt in unique}


def deviation(scores: Scores) -> np.ndarray:
    """The standard deviation (B,) that a model gives of its scores, or that of its heads; NaN where it has neither."""
    if scores.log_std is not None:
        return scores.log_std.double().exp().numpy()
    if scores.heads is not None:
        return scores.heads.double().std(dim=1, correction=0).numpy()
    return np.full(len(scores.mean), np.nan)


def judged(judge: Judge, material: Material, advance: Advance) -> np.ndarray:
    """The judge's margins (N,) in nats, NaN where it gave no verdict."""
    found: list[float] = []
    for part, images in material.images():
        verdicts = judge.score(images, [material.pictures[place].prompt for place in part])
        found += [verdict.margin if verdict.valid else np.nan for verdict in verdicts]
        advance(len(images))
    return np.array(found)


def _fits(reward: ModelReward, prompts: Sequence[str]) -> bool:
    try:
        reward.model.tokens(prompts)
    except ValueError:
        return False
    return True


def _cut(reward: ModelReward, prompt: str) -> str:
    words = prompt.split()
    if _fits(reward, [prompt]):
        return prompt
    fit, many = 0, len(words)
    while many - fit > 1:
        middle = (fit + many) // 2
        fit, many = (middle, many) if _fits(reward, [" ".join(words[:middle])]) else (fit, middle)
    if not fit:
        raise UserError(f"prompt: the reward model reads not one word of {prompt[:80]!r}; leave this prompt out")
    return " ".join(words[:fit])
