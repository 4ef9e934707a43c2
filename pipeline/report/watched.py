"""What the watch over a training saw and did, in words and lines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Sign:
    """A signal of `rewards.hacking` in words."""

    title: str
    meaning: str


_SIGNS = {
    "heldout_gap": _Sign("held-out gap", "reward rose more on prompts that are trained on than on others"),
    "judge_divergence": _Sign(
        "judge divergence", "deviations by which the judge rose less than the reward lets expect"
    ),
    "judge_disagreement": _Sign(
        "judge disagreement", "half the mean square difference of reward and judge among siblings"
    ),
    "kl_frontier": _Sign("KL frontier", "nats by which the judge fell behind an earlier check at no greater KL"),
    "diversity_loss": _Sign("diversity loss", "share by which siblings came closer to each other"),
}
"""What is not here is a statistic of the pixels."""


@dataclass(frozen=True)
class SignalLine:
    """A signal at the last check, None where it is not known, and the iterations of the checks that it alarmed.

    `meaning` is empty where it is a statistic of the pixels.
    """

    title: str
    meaning: str
    value: float | None
    threshold: float | None
    alarms: tuple[int, ...]


@dataclass(frozen=True)
class Watched:
    """`finetune/signals.json` for readers.

    Attributes:
        said: how it went, in a sentence or two.
        stopped: whether it ended the training.
        shares: of each signal that is not of the pixels its value in units of its threshold at `iterations`, None where
            either is not known.
    """

    said: str
    stopped: bool
    lines: tuple[SignalLine, ...]
    iterations: tuple[int, ...]
    shares: dict[str, list[float | None]]


def watched(told: Mapping[str, Any]) -> Watched:
    """What the page shows of `finetune/signals.json`."""
    checks = told["checks"]
    signals = [{signal["name"]: signal for signal in check["signals"]} for check in checks]
    lines = []
    for name, last in signals[-1].items():
        alarms = [
            check["iteration"]
            for check, found in zip(checks, signals, strict=True)
            if name in found and found[name]["status"] == "alarm"
        ]
        meaning = _SIGNS[name].meaning if name in _SIGNS else ""
        lines.append(SignalLine(_title(name), meaning, last["value"], last["threshold"], tuple(alarms)))
    shares = {
        sign.title: [_share(found.get(name)) for found in signals]
        for name, sign in _SIGNS.items()
        if name in signals[-1]
    }
    iterations = tuple(check["iteration"] for check in checks)
    return Watched(_said(told, lines), told["stopped"], tuple(lines), iterations, shares)


def _said(told: Mapping[str, Any], lines: Sequence[SignalLine]) -> str:
    last = told["checks"][-1]
    if told["stopped"]:
        names = " and ".join(map(_title, last["alarms"]))
        kept = (
            f"the adapter of iteration {told['kept']} was kept" if told["kept"] else "the base model was kept as it is"
        )
        return (
            f"The training was stopped at iteration {last['iteration']}, because its reward looks hacked "
            f"({names} beyond what chance makes of the base model, check after check); {kept}, and is what this page "
            "calls tuned."
        )
    alarmed = [line.title for line in lines if line.alarms]
    if alarmed:
        return (
            f"The training ran to its end. Of {len(lines)} signals {len(alarmed)} went beyond what chance makes of the "
            f"base model ({', '.join(alarmed)}), and none of those that stop a training did so check after check."
        )
    if all(line.threshold is None for line in lines):
        return "Nothing can be said: thresholds take 50 prompts or more."
    return f"None of {len(lines)} signals went beyond what chance makes of the base model."


def _title(name: str) -> str:
    return _SIGNS[name].title if name in _SIGNS else name


def _share(signal: Mapping[str, Any] | None) -> float | None:
    if signal is None or signal["value"] is None or not signal["threshold"]:
        return None
    return signal["value"] / signal["threshold"]
