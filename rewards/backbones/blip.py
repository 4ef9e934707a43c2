"""What rewards on a BLIP or a BLIP-2 have in common: pictures, and of a BLIP-2 a linear head in nats of log-odds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2PreTrainedModel, PreTrainedModel

from rewards.backbones.base import Picture, RewardModel, spread
from rewards.backbones.processor import RewardProcessor
from rewards.losses import Scores


class BlipReward(RewardModel):
    """Pictures go through `network.vision_model`, which sees nothing else, and prompts through `processor`."""

    network: PreTrainedModel
    processor: RewardProcessor

    def pixels(self, images: Sequence[Picture]) -> Tensor:
        return self.processor.pixels(images, self.network.config.vision_config.image_size)

    def read(self, pictures: Tensor) -> Tensor:
        return self.processor.read(pictures)

    def look(self, pixels: Tensor) -> Tensor:
        return self.network.vision_model(pixel_values=pixels).last_hidden_state

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return self.processor.tokens(prompts)

    def _save(self, folder: Path) -> dict[str, Any]:
        self.network.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        return {}


class Blip2Reward(BlipReward):
    """`network` gives the log-odds (B, M) of features (B, N, D) and tokens by its `reward_head`."""

    def __init__(self, network: Blip2PreTrainedModel, processor: RewardProcessor):
        super().__init__()
        self.network, self.processor = network, processor
        self.tokenizer = processor.tokenizer
        self.eval().requires_grad_(False)

    def score(self, features: Tensor, tokens: dict[str, Tensor]) -> Scores:
        return Scores.of_heads(self.network(features, **tokens))

    @property
    def head_count(self) -> int:
        return self.network.reward_head.out_features

    def with_heads(self, count: int, seed: int) -> Self:
        """Each starts near the log-odds that image and prompt match, and their mean at them."""
        network, old = self.network, self.network.reward_head
        network.config.reward_heads = count
        network.reward_head = nn.Linear(old.in_features, count).requires_grad_(False)
        network.reward_head.weight.copy_(spread(old.weight[0], count, seed))
        network.reward_head.bias.copy_(old.bias.expand(count))
        return self

    @torch.no_grad()
    def shift_heads(self, by: Tensor) -> None:
        self.network.reward_head.bias += by


def processor_of(folder: str | Path, config: Blip2Config, positions: int) -> RewardProcessor:
    """Where the tokenizer has no length, it is what the reader's `positions` leave beside the queries."""
    return RewardProcessor.from_pretrained(folder, positions - config.num_query_tokens)
