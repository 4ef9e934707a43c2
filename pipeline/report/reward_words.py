"""The sentences on a reward: whether it may be believed, for what, and where it is weakest.

Nothing is called a fault unless its 95 % interval says so.
"""

from collections.abc import Iterator

from pipeline.assessing.assessment import Assessment
from pipeline.assessing.pressure import Pressure
from pipeline.report.audit_words import Conclusion, estimate
from pipeline.report.words import percent
from rewards.evaluation import BASELINE, BEFORE
from rewards.metrics.intervals import Estimate
from rewards.overoptimisation import Fit

BELIEVED, USEFUL = 0.8, 0.5
"""Shares of the way from a coin to the ceiling of the labels: the lower end of the interval decides."""

MOVED, FELT, FOLLOWS, OFF, UNSTEADY = 0.25, 0.5, 0.1, 0.05, 0.02
"""Standard deviations by which a harmless change may move the reward, and by which a harmful one has to lower it; a
correlation within prompts; a calibration error; a share of pairs."""

WHO = {"judge": "the judge does", "people": "people do", "gold": "gold does"}
CHANGES = {
    "blank": "a blank picture",
    "wrong_image": "the picture of another prompt",
    "jpeg": "saved as a JPEG of quality 75",
    "resolution": "half the resolution, scaled up again",
    "brightness": "5 % brighter",
    "flip": "mirrored, left and right swapped in the prompt",
}
"""What was changed, by the name of the effect."""


def conclusion(found: Assessment) -> Conclusion:
    """The page's first sentences; the first of the cautions is the weakest point."""
    accuracy, cautions = found.evaluation.line.accuracy, tuple(_cautions(found))
    claim = f"The reward orders {percent(accuracy.value)} of the pairs as {WHO[found.evaluation.tasks[0].name]}"
    if accuracy.interval is None:
        few = f"That is on {accuracy.prompts} prompts, too few to tell how far it can be believed."
        return Conclusion(f"{claim}.", few, cautions)
    low, high = accuracy.interval
    claim += f" (95\N{NO-BREAK SPACE}% interval {100 * low:.0f}\N{EN DASH}{100 * high:.0f})."
    return Conclusion(claim, " ".join(_reading(found)), cautions)


def _reading(found: Assessment) -> Iterator[str]:
    drawn, ceiling = found.evaluation.line.drawn, found.evaluation.tasks[0].ceiling.value or 1.0
    low, high = drawn.interval or (0.0, 1.0)
    believed, useful = (0.5 + share * (ceiling - 0.5) for share in (BELIEVED, USEFUL))
    value = found.evaluation.line.accuracy.value or 0.0
    wrong = f"about one pair in {round(1 / (1 - value))} is ordered wrongly" if value < 0.9999 else "no pair was wrong"
    if low >= believed:
        yield f"It may be believed for ranking pictures of one prompt, as best-of-n and fine-tuning do: {wrong}."
    elif low >= useful:
        yield f"Believe it on the average, not pair by pair: {wrong}. Fine-tune on it with an eye on the truth."
    elif low > 0.5:
        yield f"Do not lean on it: {wrong}, and a generator that is tuned on it learns its mistakes too."
    elif high < 0.5:
        yield "It is wrong more often than right: see whether pictures or labels are swapped."
    else:
        yield "It cannot be told from a coin. Nothing should be tuned on it."
    yield from _on_use(found)


def _on_use(found: Assessment) -> Iterator[str]:
    """What optimising it gained, and how far to go."""
    if found.choosing and found.choosing.curves:
        last, name = found.choosing.curves.points[-1], found.choosing.truth
        if last.gold.value is not None and last.gold.interval and last.gold.interval[0] > 0:
            yield f"The best of {last.n} pictures by it is better in truth: {name} {_gain(last.gold, name)}."
    if found.tuning and found.tuning.curves and found.tuning.curves.gold.stop is not None:
        yield f"In its run of fine-tuning the truth rose up to a KL of {found.tuning.curves.gold.stop**2:.2g} nats."


def _gain(gain: Estimate, truth: str) -> str:
    scale, unit = (100, " points") if truth == "gold" else (1, " nats")
    value = f"{scale * (gain.value or 0):+.3g}{unit}"
    low, high = (f"{scale * end:+.3g}" for end in gain.interval or (0.0, 0.0))
    return f"{value} ({low} to {high})".replace("-", "\N{MINUS SIGN}")


def _cautions(found: Assessment) -> Iterator[str]:
    """What to beware of, the gravest kind first."""
    yield from _on_leakage(found)
    yield from _on_rivals(found)
    yield from _on_changes(found)
    yield from _on_pressure(found)
    yield from _on_slices(found)
    yield from _on_looks(found)
    yield from _on_probabilities(found)
    yield from _on_steadiness(found)
    yield from _on_copies(found)
    if found.measured.refused:
        count = len(found.measured.refused)
        yield f"{count} {'row' if count == 1 else 'rows'} of the table could not be used, for the reasons below."


def _on_leakage(found: Assessment) -> Iterator[str]:
    leak = found.leakage
    if leak and (prompts := leak.exact + leak.normalised + leak.near):
        yield (
            f"It was trained on {prompts:,} of these {leak.prompts:,} prompts, or on near duplicates of them: the "
            "accuracy flatters it."
        )


def _on_copies(found: Assessment) -> Iterator[str]:
    leak = found.leakage
    if leak and leak.identical:
        yield f"Of the {leak.images:,} pictures {leak.identical:,} stand pixel for pixel among those it was trained on."


def _on_rivals(found: Assessment) -> Iterator[str]:
    task = found.evaluation.tasks[0].name
    for line in found.evaluation.lines:
        surely = line.lead is None or line.lead.interval is None or line.lead.interval[0] > 0
        if line.task == task and line.scorer in _RIVALS and not surely:
            yield f"It is not surely better than {_RIVALS[line.scorer]}, right about {estimate(line.accuracy)}."


_RIVALS = {BEFORE: "it was before its training", BASELINE: "the public model beside it"}


def _on_changes(found: Assessment) -> Iterator[str]:
    for effect in found.effects:
        shift = effect.shift.interval
        if shift is None:
            continue
        title = CHANGES.get(effect.name, effect.name)
        if effect.expects == "no" and shift[1] > -FELT:
            yield (
                f"It does not look closely: {title} costs only {-(effect.shift.value or 0):.2f} standard deviations of "
                "reward."
            )
        if effect.expects == "same" and (shift[0] > MOVED or shift[1] < -MOVED):
            moved = f"{effect.shift.value or 0:+.2f}".replace("-", "\N{MINUS SIGN}")
            yield f"It judges the file as well as what it shows: {title} moves it by {moved} standard deviations."


def _on_pressure(found: Assessment) -> Iterator[str]:
    for what, pressure in (("the best of n", found.choosing), ("fine-tuning", found.tuning)):
        if pressure and pressure.curves:
            yield from _on_curves(what, pressure, pressure.curves.gold)


def _on_curves(what: str, pressure: Pressure, fit: Fit) -> Iterator[str]:
    assert pressure.curves
    last = pressure.curves.points[-1]
    if last.gold.interval and last.gold.interval[1] < 0 < (last.proxy.value or 0):
        yield f"Under {what} it is gamed: it rises while {pressure.truth} falls ({_gain(last.gold, pressure.truth)})."
    elif fit.stop is not None and fit.peak.value is not None and fit.peak.value < last.distance:
        yield f"Under {what} {pressure.truth} peaks at a KL of {fit.peak.value**2:.2g} nats and falls beyond."
    elif last.gold.interval and last.gold.interval[0] <= 0 and last.proxy.interval and last.proxy.interval[0] > 0:
        yield f"Under {what} it rises, and {pressure.truth} not surely so ({_gain(last.gold, pressure.truth)})."


def _on_slices(found: Assessment) -> Iterator[str]:
    overall, task = found.evaluation.line.accuracy, found.evaluation.tasks[0].name
    weak = [line for line in found.evaluation.slices if line.task == task and _above(overall, line.accuracy)]
    for line in sorted(weak, key=lambda line: line.accuracy.value or 0):
        yield f"It is weaker where {line.column} is {line.value.replace('_', ' ')}: {estimate(line.accuracy)} right."


def _on_looks(found: Assessment) -> Iterator[str]:
    for shortcut in found.shortcuts:
        taken = shortcut.given_gold or shortcut.correlation
        if taken.interval and (taken.interval[0] > FOLLOWS or taken.interval[1] < -FOLLOWS):
            given = ", gold taken out" if shortcut.given_gold else ""
            value = f"{taken.value or 0:+.2f}".replace("-", "\N{MINUS SIGN}")
            yield f"It moves with the {shortcut.name} of pictures: correlation {value} within prompts{given}."


def _on_probabilities(found: Assessment) -> Iterator[str]:
    task = found.evaluation.labelled
    before, after = task.calibration.before.ece, task.calibration.after
    if before.interval and before.interval[0] > OFF:
        remedy = ""
        temperature = task.calibration.temperature.value
        if after and temperature and (after.ece.value or 0) < (before.value or 0):
            off = 100 * (after.ece.value or 0)
            remedy = f"; with its margins divided by {temperature:.2g} they would be off by {off:.0f}"
        yield f"Its probabilities are off by {100 * (before.value or 0):.0f} points on the average{remedy}."
    if task.uncertainty and (auc := task.uncertainty.auc.interval) and auc[0] <= 0.5:
        yield "Its standard deviations do not tell where it errs."


def _on_steadiness(found: Assessment) -> Iterator[str]:
    for one in found.invariances:
        if one.flipped.interval and one.flipped.interval[0] > UNSTEADY:
            yield f"With {one.name} it orders {estimate(one.flipped)} of the pairs otherwise."


def _above(higher: Estimate, lower: Estimate) -> bool:
    """Whether one interval lies above the other."""
    return higher.interval is not None and lower.interval is not None and higher.interval[0] > lower.interval[1]
