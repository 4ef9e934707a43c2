"""What a reward model is trained to minimise."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(reward_a: Tensor, reward_b: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of P(a better) = sigmoid(r_a - r_b) with a soft label p (Bradley & Terry, 1952).

    -[p log sigmoid(r_a - r_b) + (1 - p) log sigmoid(r_b - r_a)], in nats. p = 1 is the loss of ImageReward
    (2304.05977, section 2.3), p = 0.5 a tie.

    Args:
        reward_a: (B,) log-odds of the first image, `reward_b` of the second.
        label: (B,) probability in [0, 1] that the first is the better one.
        weight: (B,) non-negative; None weighs all pairs the same.

    Returns:
        The weighted mean, a scalar.
    """
    margin = reward_a - reward_b
    loss = -(label * logsigmoid(margin) + (1 - label) * logsigmoid(-margin))
    return loss.mean() if weight is None else (weight * loss).sum() / weight.sum()
