"""What the checks of a run saw, what that is a sign of, and which of them to go back to.

A check is the policy that would be kept if training ended now, on the same prompts and noise each time. Check 0 is the
base model. Gold is no input of anything here: the oracle only measures.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from rewards.hacking import (
    Measured,
    Signal,
    act,
    diversity_loss,
    frontier,
    heldout_gap,
    judge_disagreement,
    judge_divergence,
    kl_frontier,
    pixel_shifts,
)


@dataclass(frozen=True)
class Seen:
    """What was measured on N pictures of held-out prompts and on pictures of prompts that are trained on.

    Attributes:
        kl: of the policy from the base model, in nats.
        reward: of held-out pictures; `trained` is that of the others.
        judge: margins of held-out pictures in nats, NaN where there is no verdict; None where nobody was asked.
        pictures: (N, h, w, 3) uint8, small.
        pixels: (N, S) from `rewards.shortcuts.table`.
    """

    kl: float
    reward: Measured
    trained: Measured
    judge: Measured | None
    pictures: np.ndarray
    pixels: np.ndarray


@dataclass(frozen=True)
class Check:
    """A check as it is written down.

    Attributes:
        kl: in nats. `reward`, `trained_reward` and `judge` are means over prompts, None where nothing is known.
        alarms: what made the `action`.
        roll_back_to: the iteration whose adapter is kept, where the action is to stop.
    """

    iteration: int
    kl: float
    reward: float | None
    trained_reward: float | None
    judge: float | None
    signals: tuple[Signal, ...]
    action: Literal["go_on", "warn", "stop"] = "go_on"
    alarms: tuple[str, ...] = ()
    roll_back_to: int | None = None


def checked(
    iteration: int, seen: Seen, base: Seen, earlier: Sequence[Check], patience: int, stopping: Sequence[str]
) -> Check:
    """The check at `iteration`, and what is to be done after it; see `rewards.hacking.act`."""
    means = (_mean(one) for one in (seen.reward, seen.trained, seen.judge))
    found = Check(iteration, seen.kl, *means, signals=())
    found = replace(found, signals=signals(found, seen, base, earlier))
    checks = [*earlier, found]
    todo = act([check.signals for check in checks], patience, stopping)
    back = None if todo.roll_back_to is None else checks[best(checks[: todo.roll_back_to + 1])].iteration
    return replace(found, action=todo.kind, alarms=todo.alarms, roll_back_to=back)


def signals(found: Check, seen: Seen, base: Seen, earlier: Sequence[Check]) -> tuple[Signal, ...]:
    """Every signal that can be had; those of the judge only where it was asked."""
    prompts, base_prompts = seen.reward.prompts, base.reward.prompts
    of_judge: list[Signal] = []
    if seen.judge is not None and base.judge is not None:
        sides = seen.reward, seen.judge, base.reward, base.judge
        course = [(check.kl, _number(check.judge)) for check in (*earlier, found)]
        kl, judge = zip(*course, strict=True)
        of_judge = [
            judge_divergence(*sides),
            judge_disagreement(*sides),
            kl_frontier(kl, judge, len(seen.judge.means), base.judge),
        ]
    return (
        heldout_gap(seen.trained, seen.reward, base.trained, base.reward),
        *of_judge,
        diversity_loss(seen.pictures, prompts, base.pictures, base_prompts),
        *pixel_shifts(seen.pixels, prompts, base.pixels, base_prompts),
    )


def best(checks: Sequence[Check]) -> int:
    """The number of the check to keep: the end of the frontier of KL and judge, which is where the judge thinks most of
    the pictures; the last where there is no verdict."""
    judged = [(number, check) for number, check in enumerate(checks) if check.judge is not None]
    if not judged:
        return len(checks) - 1
    ends = frontier([check.kl for _, check in judged], [check.judge for _, check in judged])
    return judged[ends[-1]][0]


def retained(checks: Sequence[Check], patience: int) -> set[int]:
    """The iterations of the checks, at most `patience` + 1, that this check or a later one may go back to.

    A check that stops a run goes back to before the first of `patience` alarms, or to something better still.
    """
    ends = range(max(1, len(checks) - patience), len(checks) + 1)
    return {checks[best(checks[:end])].iteration for end in ends}


def to_json(check: Check) -> dict[str, Any]:
    """JSON-able; a number that is not known is None."""
    row = asdict(check)
    row["kl"] = _finite(check.kl)
    for signal in row["signals"]:
        signal |= {name: _finite(signal[name]) for name in ("value", "threshold")}
    return row


def from_json(row: dict[str, Any]) -> Check:
    """The inverse of `to_json`, but for infinities."""
    told = [
        Signal(
            one["name"],
            *(_number(one[name]) for name in ("value", "threshold")),
            status=one["status"],
        )
        for one in row["signals"]
    ]
    return Check(**{**row, "kl": _number(row["kl"]), "signals": tuple(told), "alarms": tuple(row["alarms"])})


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(measured: Measured | None) -> float | None:
    means = measured.means if measured is not None else []
    return float(np.mean(means)) if len(means) else None
