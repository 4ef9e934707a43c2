"""The report's sentences: what the numbers say, also when they say that it went wrong."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from pipeline.report.choices import Row, has_both, says_yes

_UNKNOWN = "\N{EN DASH}"


@dataclass(frozen=True)
class Change:
    """What tuning did to the same prompts and noise.

    Attributes:
        images: how many were compared.
        mended: how many follow their prompt only after tuning.
        spoilt: how many did so only before.
        low, high: the 95 % interval of the change of the share that follows.
    """

    images: int
    mended: int
    spoilt: int
    low: float
    high: float


@dataclass(frozen=True)
class Headline:
    """What happened, in one sentence; and how far to believe it."""

    claim: str
    reading: str


@dataclass(frozen=True)
class JudgeLine:
    """How the judge did on the images of one model.

    Attributes:
        model: "base" or "tuned".
        yes: share of the images that follow their prompt of which it says so; None where there are none.
        no: share of the others of which it says that they don't.
        silent: images of which it could give no verdict.
    """

    model: str
    yes: float | None
    no: float | None
    silent: int


def paired_change(rows: Iterable[Row]) -> Change | None:
    """How `gold` changed from base to tuned, image by image; None where it is not known.

    The interval is of the mean over images, as everywhere on the page, and of the width that the spread between
    prompts gives it, because samples of one prompt are no independent witnesses.
    """
    gold = {(row["model"], row["prompt_id"], row["sample"]): row["gold"] for row in rows}
    steps: dict[str, list[int]] = {}
    for (model, prompt_id, sample), before in gold.items():
        if model == "base" and before is not None:
            steps.setdefault(prompt_id, []).append(gold["tuned", prompt_id, sample] - before)
    if not steps:
        return None
    flat = [step for several in steps.values() for step in several]
    low, high = _interval(list(steps.values()))
    return Change(len(flat), flat.count(1), flat.count(-1), low, high)


def headline(generator: Mapping[str, Any], change: Change | None) -> Headline:
    """The page's first two sentences, from `generator` of `evaluate/metrics.json`."""
    base, tuned = generator["base"], generator["tuned"]
    rewards = f"from {base['reward']:.2f} to {tuned['reward']:.2f}"
    if change is None:
        return Headline(
            "Held-out images that follow their prompt in the eyes of the judge: "
            f"{_step(base['judge'], tuned['judge'])}.",
            "The truth is not known in this world: this is the mean P(yes) of the judge. "
            f"The mean reward went {rewards}. Look at the pictures before you believe either.",
        )
    if change.low > 0:
        verdict = "The images became better"
    elif change.high < 0:
        verdict = "The images became worse"
    else:
        verdict = "Chance alone could explain the change"
    interval = (
        f"95 % interval of the change: {_signed(round(100 * change.low))} to {_signed(round(100 * change.high))} points"
    )
    reading = (
        f"{verdict} ({interval}). Of {change.images:,} images drawn from the same noise before and after, "
        f"{change.mended:,} were mended and {change.spoilt:,} spoilt."
    )
    if change.low <= 0 and tuned["reward"] > base["reward"]:
        reading += f" The mean reward rose all the same, {rewards}: so far only the score is better."
    return Headline(f"Held-out images that follow their prompt: {_step(base['gold'], tuned['gold'])}.", reading)


def course(name: str, values: Sequence[float | None], shown: Callable[[float], str]) -> str:
    """How a curve went: its mean over the first and the last tenth of the known values; "" without any."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    tenth = max(1, len(known) // 10)
    first, last = float(np.mean(known[:tenth])), float(np.mean(known[-tenth:]))
    return f"{name} {shown(first)} → {shown(last)}"


def judge_lines(rows: Sequence[Row]) -> tuple[JudgeLine, ...]:
    """How often the judge is right on either kind of image, before and after tuning."""
    lines = []
    for model in ("base", "tuned"):
        mine = [row for row in rows if row["model"] == model]
        known = [row for row in mine if has_both(row)]
        yes = [says_yes(row) for row in known if row["gold"]]
        no = [not says_yes(row) for row in known if not row["gold"]]
        silent = sum(not row["judge_valid"] for row in mine)
        lines.append(JudgeLine(model, _mean(yes), _mean(no), silent))
    return tuple(lines)


def percent(share: float | None, digits: int = 0) -> str:
    """0.451 -> "45 %"; a dash where nothing is known."""
    return _UNKNOWN if share is None else f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def span(interval: Sequence[float] | None) -> str:
    """The ends of an interval of shares in per cent; nothing where nothing is known."""
    return "" if interval is None else "\N{EN DASH}".join(f"{100 * end:.1f}" for end in interval)


def points(before: float | None, after: float | None) -> str:
    """The change between two shares as their percentages are shown: "+26"; a dash where nothing is known."""
    if before is None or after is None:
        return _UNKNOWN
    return _signed(round(100 * after) - round(100 * before))


def _step(before: float, after: float) -> str:
    change = points(before, after)
    return f"{percent(before)} → {percent(after)} ({change} point{'' if change[1:] == '1' else 's'})"


def _signed(number: int) -> str:
    return f"{number:+d}".replace("-", "\N{MINUS SIGN}") if number else "0"


def _interval(clusters: Sequence[Sequence[int]]) -> tuple[float, float]:
    """95 % interval of the mean of all values in -1..1, clusters being what is independent.

    Student's on the linearised mean (Cochran, Sampling Techniques, 3rd ed., chapter 9A); a single cluster tells nothing
    of others.
    """
    if len(clusters) < 2:
        return -1.0, 1.0
    sums, sizes = np.array([(sum(values), len(values)) for values in clusters]).T
    mean = sums.sum() / sizes.sum()
    deviation = np.std(sums - mean * sizes, ddof=1) / np.mean(sizes)
    reach = stats.t.ppf(0.975, len(clusters) - 1) * deviation / np.sqrt(len(clusters))
    return float(mean - reach), float(mean + reach)


def _mean(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
