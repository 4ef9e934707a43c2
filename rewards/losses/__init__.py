"""What a reward model is trained to minimise: models of how scores become preferences, and regression on scores.

A loss is a frozen setting whose methods are pure functions of scores. Each says in nats how unlikely the labels are,
and with what probability the first image of a pair is the better one, so that an evaluation can ask any of them for
the same numbers. The tie models have one parameter that is learned: `parameters` makes it, the trainer owns it,
`fitted` puts it back into the setting.
"""

from dataclasses import fields
from typing import Any

from torch import Tensor

from rewards.losses.base import PairLoss, Scores, joined
from rewards.losses.gaussian import Gaussian, Thurstone
from rewards.losses.logistic import BradleyTerry, Davidson, RaoKupper
from rewards.losses.pointwise import Pointwise

__all__ = [
    "LOSSES",
    "BradleyTerry",
    "Davidson",
    "Gaussian",
    "PairLoss",
    "Pointwise",
    "RaoKupper",
    "Scores",
    "Thurstone",
    "bradley_terry",
    "joined",
    "make_loss",
]

LOSSES: dict[str, type[PairLoss]] = {
    loss.type: loss for loss in (BradleyTerry, RaoKupper, Davidson, Gaussian, Thurstone, Pointwise)
}


def make_loss(type: str, **settings: Any) -> PairLoss:
    """The loss named `type`; `dataclasses.asdict` of a loss makes it again.

    Raises:
        ValueError: no loss has that name, that setting or that value; the message starts with the field's name.
    """
    if type not in LOSSES:
        raise ValueError(f"type: no loss is called {type!r}; known: {', '.join(LOSSES)}")
    known = [field.name for field in fields(LOSSES[type]) if field.name != "type"]
    for name in settings:
        if name not in known:
            raise ValueError(f"{name}: {type} has no such setting; known: {', '.join(known)}")
    return LOSSES[type](**settings)


def bradley_terry(reward_a: Tensor, reward_b: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
    """The `BradleyTerry` loss of rewards (B,) without its options."""
    return BradleyTerry()(Scores(reward_a), Scores(reward_b), label, weight)
