"""What several heads on one backbone take in training: weights of their own, and one level in the end.

Shapes: B pictures, P prompts, M heads.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rewards.backbones import RewardModel
from rewards.preferences import unit_hash

LEVELLED = 256
"""Training pairs on whose pictures the levels of heads are taken."""

_SCORED_AT_ONCE = 32


def bootstrap_weights(texts: Sequence[str], heads: int, seed: int) -> Tensor:
    """What prompts weigh for each head (P, M), exponential with mean 1: Rubin's Bayesian bootstrap (1981).

    Whole prompts are drawn, since the pairs of one are not independent.
    """
    uniform = [[unit_hash("bootstrap", str(seed), str(head), text) for head in range(heads)] for text in texts]
    return -torch.log1p(-torch.tensor(uniform, dtype=torch.float64)).float()


@torch.no_grad()
def level(
    model: RewardModel,
    pixels: Callable[[list[int]], Tensor],
    images: list[int],
    tokens: dict[str, Tensor],
    prompts: list[int],
) -> None:
    """Bring the heads to one mean over pictures, in place.

    Preferences say nothing of the level at which a head stands, and the worst of heads, or their deviation, would be
    that of their levels. Levels may still differ from prompt to prompt.

    Args:
        pixels: what the tower reads of pictures, by their numbers.
        images: numbers of B pictures; `prompts` are the rows of `tokens` (P, L, ...) that belong to them.
    """
    found = []
    for start in range(0, len(images), _SCORED_AT_ONCE):
        part = slice(start, start + _SCORED_AT_ONCE)
        told = {name: value[prompts[part]].to(model.device) for name, value in tokens.items()}
        found.append(model.score(model.encode(pixels(images[part]).to(model.device)), told).heads)
    means = torch.cat(found).mean(dim=0)  # (M,)
    model.shift_heads(means.mean() - means)
