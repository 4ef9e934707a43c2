"""The report's figures: numbers in, SVG for a page out.

Colours are CSS variables of the page with a fallback, so a figure follows the reader's light or dark mode.
They stand in Matplotlib under stand-ins, which are replaced in the text of the SVG. The palette is Okabe and
Ito's (jfly.uni-koeln.de/color), which colour-blind readers can tell apart. Equal numbers give equal bytes.
"""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.ndimage import gaussian_filter1d

from rewards.metrics.probabilities import Bin

_INK, _MUTED, _RULE, _BASE, _TUNED, _GOLD = (f"#0{digit}0{digit}0{digit}" for digit in range(1, 7))
_VARIABLES = {
    _INK: "var(--ink, #1c1d1f)",
    _MUTED: "var(--muted, #5f6368)",
    _RULE: "var(--rule, #d9d9d6)",
    _BASE: "var(--base, #8b9097)",
    _TUNED: "var(--tuned, #0072b2)",
    _GOLD: "var(--gold, #d55e00)",
}
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9.0,
    "text.color": _MUTED,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _MUTED,
    "ytick.labelcolor": _MUTED,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "figure.constrained_layout.use": True,
}
_house_style = partial(style.context, ["default", _STYLE])


@dataclass(frozen=True)
class Share:
    """A share between 0 and 1 with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """A number that a training logged per iteration; NaN where it did not. `colour` is a stand-in."""

    title: str
    values: np.ndarray
    colour: str = _TUNED
    percent: bool = False


def smooth(values: np.ndarray) -> np.ndarray:
    """A Gaussian mean over neighbours, with a deviation of a thirtieth of the length; NaNs weigh nothing."""
    values = np.asarray(values, dtype=float)
    known = np.isfinite(values)
    blur = partial(gaussian_filter1d, sigma=max(1.0, len(values) / 30), mode="constant")
    weight = blur(known.astype(float))
    return np.divide(blur(np.where(known, values, 0.0)), weight, out=np.full(len(values), np.nan), where=weight > 1e-6)


@_house_style()
def progress(iterations: Sequence[int], reward: Sequence[float], gold: Sequence[float | None]) -> str:
    """Reward of the rollouts over the iterations and, where it is known, their gold accuracy below."""
    curves = [Curve("mean reward of the rollouts", _array(reward))]
    if any(value is not None for value in gold):
        curves.append(Curve("rollouts that follow their prompt (gold)", _array(gold), _GOLD, percent=True))
    return _curves("progress", iterations, curves)


@_house_style()
def steps(iterations: Sequence[int], kl: Sequence[float], grad_norm: Sequence[float]) -> str:
    """How far the policy moved from the base, in nats, and how large its gradients were."""
    curves = [Curve("KL from the base, nats", _array(kl)), Curve("gradient norm", _array(grad_norm), _BASE)]
    return _curves("steps", iterations, curves)


@_house_style()
def signals(iterations: Sequence[int], shares: Mapping[str, Sequence[float | None]]) -> str:
    """Signs of hacking over the checks, in units of their thresholds: above the broken line is an alarm."""
    figure = Figure(figsize=(5.0, 3.0))
    axes = figure.subplots()
    axes.axhline(1, color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    looks = zip((_TUNED, _GOLD, _INK, _BASE, _MUTED), ("-", "-", "-", "-", ":"), strict=True)
    for (name, values), (colour, line) in zip(shares.items(), looks, strict=False):
        axes.plot(iterations, _array(values), line, marker=".", color=colour, label=name)
    axes.set(xlabel="iteration", title="signal ÷ threshold")
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.4)
    return _svg(figure, "signals")


@_house_style()
def reliability(
    bins: Sequence[Bin],
    predicted_by: str = "probability that the reward model gave",
    observed_as: str = "share in which the judge agreed",
    name: str = "reliability",
) -> str:
    """Predicted against observed probability; the diagonal is perfect, areas are numbers of pairs."""
    figure = Figure(figsize=(3.6, 3.5))
    axes = figure.subplots()
    low = 0.5 if min(min(point.predicted, point.observed) for point in bins) >= 0.5 else 0.0
    axes.plot([low, 1], [low, 1], color=_MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    most = max(point.pairs for point in bins)
    predicted, observed = [point.predicted for point in bins], [point.observed for point in bins]
    axes.plot(predicted, observed, color=_TUNED, linewidth=1.0, alpha=0.5)
    axes.scatter(predicted, observed, [12 + 120 * point.pairs / most for point in bins], color=_TUNED, linewidths=0)
    margin = 0.04 * (1 - low)
    axes.set(xlim=(low - margin, 1 + margin), ylim=(low - margin, 1 + margin), aspect="equal")
    axes.set(xlabel=predicted_by, title=observed_as)
    return _svg(figure, name)


@_house_style()
def skills(labels: Sequence[str], base: Sequence[Share], tuned: Sequence[Share]) -> str:
    """Bars from 0 to 1 for each label, base above tuned, with their intervals."""
    figure = Figure(figsize=(5.0, 0.6 + 0.46 * len(labels)))
    axes = figure.subplots()
    place = np.arange(len(labels))
    for offset, name, colour, shares in ((-0.18, "base", _BASE, base), (0.18, "tuned", _TUNED, tuned)):
        value = np.array([share.value for share in shares])
        reach = np.abs([[share.low for share in shares], [share.high for share in shares]] - value)
        axes.barh(place + offset, value, 0.32, color=colour, label=name)
        axes.errorbar(value, place + offset, xerr=reach, fmt="none", ecolor=_INK, elinewidth=1.0, capsize=2.0)
    axes.set(xlim=(0, 1), yticks=place, yticklabels=labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(_PERCENT)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=1.0, handleheight=0.7)
    return _svg(figure, "skills")


@dataclass(frozen=True)
class Dot:
    """A measured point; `low` and `high` are the ends of its 95 % interval, where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Course:
    """Points under a title, and a line through them; `percent` for shares. `colour` is a stand-in."""

    title: str
    dots: Sequence[Dot]
    line: Sequence[tuple[float, float]] = ()
    colour: str = _TUNED
    percent: bool = False


TUNED, GOLD = _TUNED, _GOLD


@_house_style()
def courses(name: str, axis: str, found: Sequence[Course]) -> str:
    """Panels below each other: points with their intervals, and a broken line for what was fitted or claimed."""
    figure = Figure(figsize=(5.0, 0.5 + 1.7 * len(found)))
    panels: Sequence[Axes] = figure.subplots(len(found), sharex=True, squeeze=False)[:, 0]
    for axes, course in zip(panels, found, strict=True):
        for dot in course.dots:
            if dot.low is not None:
                axes.plot([dot.x, dot.x], [dot.low, dot.high], color=course.colour, linewidth=1.2, alpha=0.5)
        axes.plot(
            [dot.x for dot in course.dots], [dot.y for dot in course.dots], "o", color=course.colour, markersize=4
        )
        if course.line:
            axes.plot(*zip(*course.line, strict=True), color=course.colour, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.set_title(course.title)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        if course.percent:
            axes.yaxis.set_major_formatter(_PERCENT)
    panels[-1].set_xlabel(axis)
    return _svg(figure, name)


_PERCENT = PercentFormatter(xmax=1, decimals=0, symbol=" %")


def _curves(name: str, iterations: Sequence[int], curves: Sequence[Curve]) -> str:
    """Panels below each other: what was logged, pale, and its smooth course."""
    figure = Figure(figsize=(5.0, 0.5 + 1.6 * len(curves)))
    panels: Sequence[Axes] = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
    for axes, curve in zip(panels, curves, strict=True):
        axes.plot(iterations, curve.values, ".-", color=curve.colour, alpha=0.4, linewidth=0.8, markersize=3)
        axes.plot(iterations, smooth(curve.values), color=curve.colour, linewidth=1.8)
        axes.set_title(curve.title)
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        if curve.percent:
            axes.yaxis.set_major_formatter(_PERCENT)
    panels[-1].set_xlabel("iteration")
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    return _svg(figure, name)


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array(values, dtype=float)


def _svg(figure: Figure, name: str) -> str:
    """The `<svg>` element; `name` keeps its ids apart from those of the page's other figures."""
    undated: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with io.StringIO() as file, style.context({"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata=undated)
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if f"#{match[1]}" in text else "", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    return text
