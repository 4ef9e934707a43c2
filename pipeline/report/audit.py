"""An audit as one page: what was found, and the pictures on which it was found."""

from dataclasses import asdict, dataclass

import numpy as np

from judges.audit import margins
from judges.base import Answer, Verdict, probability
from pipeline.cases import Case, png
from pipeline.estimates import Calibration
from pipeline.findings import Findings, Heard, Probed, Trial, Tried, behaved
from pipeline.report import figures
from pipeline.report.audit_words import BELIEVED, USEFUL, Conclusion, conclusion
from pipeline.report.pages import page
from pipeline.report.pictures import Picture, picture

EXAMPLES = 3


@dataclass(frozen=True)
class Evidence:
    """A question as it was asked, the answer, and the probability with which it was, or was not, the expected one;
    `error` where there was none.

    `wrong` is None where the right answer is not known.
    """

    question: str
    said: str
    sure: float
    error: str
    wrong: bool | None


@dataclass(frozen=True)
class Mistake:
    """A wrong verdict, given with the probability `sure`."""

    picture: Picture
    prompt: str
    origin: str
    said: str
    sure: float
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class Example:
    """A picture before and after a change, what was asked of it and answered, and with which probability; `after` is
    None where only the question changed."""

    before: Picture
    after: Picture | None
    asked: tuple[str, str]
    said: tuple[str, str]
    sure: tuple[float, float]
    behaved: bool


@dataclass(frozen=True)
class Shown:
    """A probe's outcome with examples, those first on which the judge did not behave."""

    probe: Probed
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class View:
    """All that the page shows.

    Attributes:
        name: of the run.
        false_yes, false_no: the surest wrong verdicts of either kind.
        reliability: SVG; empty without valid verdicts.
        believed, useful: the accuracies from which the page's first sentences call a judge so.
    """

    name: str
    conclusion: Conclusion
    found: Findings
    probes: tuple[Shown, ...]
    false_yes: tuple[Mistake, ...]
    false_no: tuple[Mistake, ...]
    reliability: str
    believed: float = BELIEVED
    useful: float = USEFUL


def view(name: str, heard: Heard, found: Findings, mistakes: int, side: int) -> View:
    """What the page on the run `name` shows: at most so many `mistakes` of either kind, pictures of at most `side`
    pixels."""
    return View(
        name=name,
        conclusion=conclusion(found),
        found=found,
        probes=tuple(
            Shown(probe, _examples(trial, side)) for probe, trial in zip(found.probes, heard.trials, strict=True)
        ),
        false_yes=_mistakes(heard, True, mistakes, side),
        false_no=_mistakes(heard, False, mistakes, side),
        reliability=_reliability(found.calibration),
    )


def render(shown: View) -> str:
    """The page as HTML."""
    return page("audit.html.j2", view=shown)


def _reliability(found: Calibration) -> str:
    if not found.reliability:
        return ""
    bins = [figures.Bin(**asdict(point)) for point in found.reliability]
    return figures.reliability(bins, "probability that the judge gave", "share of the pictures that do follow")


def _mistakes(heard: Heard, yes: bool, count: int, side: int) -> tuple[Mistake, ...]:
    """Verdicts "yes", or "no", on pictures that do the contrary, the surest first."""
    margin, truth = margins(heard.verdicts), np.array([case.truth for case in heard.cases.cases])
    wrong = (margin > 0) & (truth < 0.5) if yes else (margin <= 0) & (truth > 0.5)
    places = sorted(np.flatnonzero(wrong), key=lambda place: (-abs(margin[place]), place))[:count]
    return tuple(_mistake(heard, heard.cases.cases[place], heard.verdicts[place], side) for place in places)


def _mistake(heard: Heard, case: Case, verdict: Verdict, side: int) -> Mistake:
    truths = heard.cases.truths(case, verdict.evidence)
    evidence = tuple(_evidence(answer, truth) for answer, truth in zip(verdict.evidence, truths, strict=True))
    said = "yes" if verdict.margin > 0 else "no"
    return Mistake(_picture(case.image(), side), case.prompt, case.origin, said, _sure(verdict.margin), evidence)


def _evidence(answer: Answer, truth: bool | None) -> Evidence:
    wrong = None if truth is None or not answer.valid else (answer.margin > 0) != truth
    return Evidence(answer.question, answer.text, _sure(answer.margin), answer.error, wrong)


def _examples(trial: Trial, side: int) -> tuple[Example, ...]:
    """Up to `EXAMPLES` on which the judge did not behave, the surest first, or else one on which it did."""
    answered = [(tried, behaved(trial.probe, tried)) for tried in trial.tried]
    bad = sorted((tried for tried, well in answered if well == 0), key=lambda tried: -abs(tried.margin[1]))
    good = [tried for tried, well in answered if well == 1]
    return tuple(_example(trial, tried, side) for tried in (bad[:EXAMPLES] or good[:1]))


def _example(trial: Trial, tried: Tried, side: int) -> Example:
    before = tried.case.image()
    after = trial.probe.picture(before, tried.case.prompt)
    assert after is not None, f"{trial.probe.name} was tried on a picture that it is not for"
    changed = not np.array_equal(before, after)
    return Example(
        _picture(before, side),
        _picture(after, side) if changed else None,
        tried.asked,
        tried.said,
        (_sure(tried.margin[0]), _sure(tried.margin[1])),
        behaved(trial.probe, tried) == 1,
    )


def _sure(margin: float) -> float:
    """The probability of the likelier answer."""
    return probability(abs(margin))


def _picture(image: np.ndarray, side: int) -> Picture:
    return picture(png(image), side)
