"""The run's preference pairs as what an algorithm learns from, in the place of pictures of its own.

Prompts are drawn evenly and the pairs of a prompt by their weights, of which every prompt has the same total unless the
judge's certainty counts (see `rewards.preferences`). So is every pair weighed as the reward model weighs it.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np
from torch import Tensor

from models.keys import sample_key
from pipeline.prompts import PromptRow
from pipeline.settings import UserError


@dataclass(frozen=True)
class Choice:
    """Two pictures of a prompt by their numbers, and with which probability the first is the better one."""

    prompt_id: str
    a: int
    b: int
    label: float
    weight: float


class Preferences:
    """The pairs of the split `train`; it draws prompts as the run's source of them does.

    Args:
        rows: of the artifact of `prefer`.
        pictures: uint8 (H, W, 3), by prompt id and number.
        encode: latents (B, ...) of pictures (B, H, W, 3).
        invert: the noise (B, ...) from which the base model paints latents (B, ...), given their prompts.

    Raises:
        UserError: no pair is left.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        pictures: Callable[[str, int], np.ndarray],
        encode: Callable[[np.ndarray], Tensor],
        invert: Callable[[Tensor, Sequence[str]], Tensor] | None = None,
    ):
        self.pictures, self.encode, self.invert = pictures, encode, invert
        self.prompts: dict[str, PromptRow] = {}
        self.choices: dict[str, list[Choice]] = {}
        for row in rows:
            if row["split"] == "train" and row["weight"] > 0:
                prompt = PromptRow(row["prompt"], row["skill"])
                self.prompts.setdefault(prompt.id, prompt)
                choice = Choice(row["prompt_id"], row["sample_a"], row["sample_b"], row["label"], row["weight"])
                self.choices.setdefault(prompt.id, []).append(choice)
        if not self.prompts:
            raise UserError(
                "finetune.algorithm.source: preferences, but the run has no pair to learn from; "
                "judge more pictures, or take online"
            )

    def draw(self, seed: int, count: int) -> list[PromptRow]:
        """`count` different prompts that have pairs, or all where there are fewer."""
        prompts = list(self.prompts.values())
        return random.Random(seed).sample(prompts, min(count, len(prompts)))

    def choose(self, ids: Sequence[str], seed: Sequence[str | int]) -> list[Choice]:
        """A pair of each of the prompts `ids`, likelier where it weighs more; `seed` and the ids decide which."""
        found = []
        for one in ids:
            rng, choices = random.Random(sample_key(*seed, one, "pair")), self.choices[one]
            found += rng.choices(choices, [choice.weight for choice in choices])
        return found

    def best(self, one: str, count: int) -> list[tuple[str, int]]:
        """The `count` pictures of a prompt that win most: the largest share of the weight of the pairs they are in, of
        equal ones the lower number. Where there are fewer they come again."""
        won, weights = defaultdict(float), defaultdict(float)
        for choice in self.choices[one]:
            for number, share in ((choice.a, choice.label), (choice.b, 1 - choice.label)):
                won[choice.prompt_id, number] += choice.weight * share
                weights[choice.prompt_id, number] += choice.weight
        ordered = sorted(won, key=lambda key: (-won[key] / weights[key], key))
        return list(islice(cycle(ordered), count))

    def latents(self, keys: Sequence[tuple[str, int]]) -> Tensor:
        """Of the pictures with these prompt ids and numbers, (len(keys), ...)."""
        return self.encode(np.stack([self.pictures(*key) for key in keys]))
