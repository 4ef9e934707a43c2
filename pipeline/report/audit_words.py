"""The audit's sentences: whether a judge can be believed, and what to beware of.

Nothing is called a fault unless its 95 % interval says so.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.auditing.findings import Findings, Probed
from pipeline.estimates import Estimate
from pipeline.report.words import percent

BELIEVED, USEFUL, COIN = 0.9, 0.75, 0.5
"""Balanced accuracies: the lower end of the interval decides."""

_DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Conclusion:
    """What an audit comes to.

    Attributes:
        claim: how often the judge is right.
        reading: whether it can be believed.
        cautions: what to beware of, one a sentence; none where nothing was found.
    """

    claim: str
    reading: str
    cautions: tuple[str, ...]


def conclusion(found: Findings) -> Conclusion:
    """The page's first sentences."""
    balanced = found.accuracy.balanced
    if balanced.value is None or balanced.interval is None:
        return Conclusion(
            "How often the judge is right cannot be told.",
            "That takes valid verdicts on pictures of several prompts, on some that follow and on some that do not.",
            tuple(_cautions(found)),
        )
    claim = f"The judge is right about {percent(balanced.value)} of the pictures ({_interval(balanced)})."
    cautions = tuple(_cautions(found))
    reading = _reading(balanced.value, *balanced.interval)
    return Conclusion(claim, f"{reading} Beware of this:" if cautions else reading, cautions)


def estimate(found: Estimate, digits: int = 1) -> str:
    """A share and its interval in per cent."""
    if found.interval is None:
        return percent(found.value, digits)
    return f"{percent(found.value, digits)} ({_interval(found, digits)})"


def _interval(found: Estimate, digits: int = 0) -> str:
    assert found.interval
    low, high = (f"{100 * end:.{digits}f}" for end in found.interval)
    return f"95\N{NO-BREAK SPACE}% interval {low}{_DASH}{high}"


def _reading(value: float, low: float, high: float) -> str:
    mistakes = f"about one verdict in {round(1 / (1 - value))} is wrong" if value < 1 else "no verdict was wrong"
    if low >= BELIEVED:
        return f"It can be believed: {mistakes}."
    if low >= USEFUL:
        return f"Believe it on the average, not picture by picture: {mistakes}."
    if low > COIN:
        return (
            f"Do not lean on it: {mistakes}, and a reward made of its verdicts teaches its mistakes too. Tune it on "
            "labels, ask it simpler questions, or take another judge."
        )
    if high < COIN:
        return "It is wrong more often than right: see whether its answers are read the wrong way round."
    return "It cannot be told from a coin. Nothing should be trained on it."


def _cautions(found: Findings) -> Iterator[str]:
    yield from _on_answers(found)
    yield from _on_accuracy(found)
    yield from _on_probes(found.probes)
    yield from _on_probabilities(found)
    yield from _on_steadiness(found)


def _on_answers(found: Findings) -> Iterator[str]:
    if found.material.refused:
        count = len(found.material.refused)
        rows = "1 row of the table was" if count == 1 else f"{count} rows of the table were"
        yield f"{rows} left out, for the reasons below."
    if found.invalid.reasons:
        reason = next(iter(found.invalid.reasons))
        yield f"It gave no verdict on {estimate(found.invalid.share)} of the pictures; most often: “{reason}”."


def _on_accuracy(found: Findings) -> Iterator[str]:
    follow, stray = found.accuracy.follow, found.accuracy.stray
    for leaning, kind, worse, better in (("yes", "do not follow", stray, follow), ("no", "follow", follow, stray)):
        if _above(better, worse):
            yield (
                f"It leans towards {leaning}: of the pictures that {kind} their prompt it gets {percent(worse.value)} "
                f"right, of the others {percent(better.value)}."
            )
    for skill, accuracy in found.by_skill.items():
        if _above(found.accuracy.balanced, accuracy.balanced):
            yield f"It is weaker on {skill.replace('_', ' ')}: {estimate(accuracy.balanced)} right."
    if found.clips and _above(found.accuracy.balanced, found.clips.throughout.balanced):
        yield (
            "It is weaker on clips than on pictures: it is right about "
            f"{estimate(found.clips.throughout.balanced)} of them, as every frame has to follow."
        )


def _above(higher: Estimate, lower: Estimate) -> bool:
    """Whether one interval lies above the other."""
    return higher.interval is not None and lower.interval is not None and higher.interval[0] > lower.interval[1]


def _on_probes(probes: Sequence[Probed]) -> Iterator[str]:
    """One sentence for all failed probes that mean the same."""
    failed: dict[tuple[str, str], list[str]] = {}
    for probe in probes:
        if probe.status == "failed":
            did = "kept its verdict" if probe.expects == "same" else "said no"
            failed.setdefault((probe.risk, did), []).append(f"{estimate(probe.behaved)} of: {probe.title}")
    for (risk, did), outcomes in failed.items():
        yield f"{risk[0].upper()}{risk[1:]}. It {did} on only {'; '.join(outcomes)}."


def _on_probabilities(found: Findings) -> Iterator[str]:
    ece, temperature = found.calibration.ece, found.calibration.temperature.value
    if ece.interval and ece.interval[0] > found.tolerated:
        scaled = found.calibration.scaled_ece.value
        remedy = ""
        if temperature and scaled is not None and ece.value is not None and scaled < ece.value:
            remedy = f"; divided by {temperature:.2g}, its margins would be off by {100 * scaled:.0f}"
        yield f"Its probabilities are off by {100 * (ece.value or 0):.0f} points on the average{remedy}."


def _on_steadiness(found: Findings) -> Iterator[str]:
    again, words, order = found.repeated.agreement, found.wordings, found.order
    if again.value is not None and again.value < 1:
        yield f"Asked the same again, it says the same of {estimate(again)} of the pictures only."
    if words and words.changed.interval and words.changed.interval[0] > found.tolerated:
        yield f"In other words it is asked the same and decides otherwise on {estimate(words.changed)} of the pictures."
    if order and order.flipped.interval and order.flipped.interval[0] > found.tolerated:
        yield f"With two pictures swapped it chooses the other one in {estimate(order.flipped)} of the pairs."
    if order and order.first.interval and not order.first.interval[0] <= 0.5 <= order.first.interval[1]:
        yield f"It has a favourite place: it chooses the picture shown first in {estimate(order.first)} of its answers."
