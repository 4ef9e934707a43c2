from collections.abc import Sequence

import numpy as np
import pytest

from judges.base import Verdict
from rewards.backbones import QFormerReward
from rewards.reward import JudgeReward, ModelReward, load_reward

PROMPTS = ["a red circle", "a blue square", "square"]


@pytest.fixture(scope="module")
def reward(itm_folder) -> ModelReward:
    return ModelReward(QFormerReward.from_checkpoint(itm_folder), batch=4)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), dtype=np.uint8)


def prompts_of(images: Sequence[np.ndarray]) -> list[str]:
    return [PROMPTS[number % 3] for number in range(len(images))]


def test_value_does_not_depend_on_what_else_is_rated(reward, images):
    prompts = prompts_of(images)
    whole = reward(images, prompts)
    assert whole.values.dtype == np.float32
    assert whole.valid.all()
    assert len(set(whole.values)) == 11
    single = [reward([image], [prompt]).values[0] for image, prompt in zip(images, prompts, strict=True)]
    np.testing.assert_array_equal(whole.values, single)
    np.testing.assert_array_equal(reward(images[::-1], prompts[::-1]).values, whole.values[::-1])


def test_nothing_in_nothing_out(reward):
    rewards = reward([], [])
    assert rewards.values.shape == rewards.valid.shape == (0,)
    assert rewards.valid.dtype == bool


def test_prompts_must_be_as_many_as_images(reward, images):
    with pytest.raises(ValueError, match=r"^prompts: "):
        reward(images, PROMPTS)


def test_a_value_that_is_no_number_is_not_valid(reward, images):
    head = reward.model.network.reward_head.bias
    kept = head.data.clone()
    head.data.fill_(float("inf"))
    rewards = reward(images[:2], PROMPTS[:2])
    head.data.copy_(kept)
    assert not rewards.valid.any()
    assert np.isnan(rewards.values).all()


def test_a_saved_reward_gives_the_same_values(reward, images, tmp_path):
    reward.model.save_pretrained(tmp_path)
    loaded = load_reward(tmp_path)
    loaded.batch = reward.batch
    prompts = prompts_of(images)
    np.testing.assert_array_equal(loaded(images, prompts).values, reward(images, prompts).values)


class FakeJudge:
    """Calls the brightness a margin, and cannot see black."""

    id = "fake"
    template = "1"

    def score(self, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[Verdict]:
        margins = [image.mean().item() if image.any() else float("nan") for image in images]
        return [Verdict(margin, (), self.id, self.template, margin == margin) for margin in margins]


def test_a_judge_is_a_reward_and_its_failures_are_not_scored():
    images = [np.full((2, 2, 3), level, dtype=np.uint8) for level in (7, 0, 200)]
    rewards = JudgeReward(FakeJudge())(images, PROMPTS)
    np.testing.assert_array_equal(rewards.values, np.array([7, np.nan, 200], dtype=np.float32))
    assert rewards.valid.tolist() == [True, False, True]
