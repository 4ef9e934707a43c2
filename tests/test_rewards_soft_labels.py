"""Whether a judge's doubts are worth keeping: rewards learn renderings of the embedded world from a noisy judge."""

import dataclasses
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from scipy.special import expit

from judges.shapes.grammar import change_one, sample_prompt
from judges.shapes.render import render, scene_of
from rewards.backbones import Frozen, QFormerReward
from rewards.preferences import Pair
from rewards.train import RewardTraining, train

CHECKPOINT = Path(__file__).parent.parent / "judges" / "checkpoints" / "shapes" / "itm"
FOLLOWS = 1.0
"""The true margin, in nats, of a picture that follows its prompt; that of others is its negative."""


class World:
    """Four renderings of each of some prompts, two of them with one thing changed, and a judge who errs by `noise`."""

    def __init__(self, seed: int, prompts: int = 24, noise: float = 1.5) -> None:
        rng = random.Random(seed)
        self.prompts = [sample_prompt(rng) for _ in range(prompts)]
        scenes = [
            scene_of(change_one(prompt, rng) if sample % 2 else prompt, rng)
            for prompt in self.prompts
            for sample in range(4)
        ]
        self.images = render(scenes)
        self.truth = np.tile([FOLLOWS, -FOLLOWS], 2 * prompts)
        self.margin = self.truth + noise * np.random.default_rng(seed).normal(size=len(self.truth))

    def image(self, prompt_id: str, sample: int) -> np.ndarray:
        return self.images[4 * int(prompt_id) + sample]

    def pairs(self, hard: bool) -> Dataset:
        """Half of the prompts are labelled by the judge to learn from, half by the truth to measure on."""
        rows = []
        for number, prompt in enumerate(self.prompts):
            split = "heldout" if number % 2 else "train"
            known = self.truth if number % 2 else self.margin
            for a, b in itertools.combinations(range(4), 2):
                gap = known[4 * number + a] - known[4 * number + b]
                label = float(gap > 0) if hard and split == "train" else float(expit(gap))
                rows.append(Pair(str(number), prompt.text, "", a, b, label, 1.0, split, "all", "planted", "1"))
        return Dataset.from_list([dataclasses.asdict(row) for row in rows])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_soft_labels_of_a_noisy_judge_give_lower_heldout_nll_than_hard_ones(tmp_path, seed):
    world = World(seed)
    config = RewardTraining(epochs=5, batch=12, grouped=True, learning_rate=1e-3, trained=Frozen(share=0.67))
    nll = {}
    for hard in (False, True):
        model, folder = QFormerReward.from_checkpoint(CHECKPOINT), tmp_path / str(hard)
        nll[hard] = train(model, world.pairs(hard), world.image, config, folder)["curve"][-1]["heldout_nll"]
    assert nll[False] < nll[True] - 0.05
    assert nll[False] < np.log(2)  # what a coin costs
