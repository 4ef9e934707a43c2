"""An audit as one page: what was found, and the pictures on which it was found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from judges.audit import margins
from judges.base import Answer, Verdict, probability
from pipeline.auditing.cases import Case, png
from pipeline.auditing.findings import Findings, Heard, Probed, Trial, Tried, Watched, behaved
from pipeline.estimates import Calibration
from pipeline.report import figures
from pipeline.report.audit_words import BELIEVED, USEFUL, Conclusion, conclusion
from pipeline.report.pages import page
from pipeline.report.pictures import Picture, picture

EXAMPLES = 3

HOW = {
    "vanishes": "an object vanishes",
    "shape": "an object takes another shape",
    "colour": "an object takes another colour",
    "crosses": "an object goes to another side",
}
"""What breaks clips, by its name."""


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
class Strip:
    """The frames of a clip, which of them follow, what breaks it, or "", and the verdict, given with the probability
    `sure`."""

    frames: tuple[tuple[Picture, bool], ...]
    prompt: str
    how: str
    said: str
    sure: float
    right: bool
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class View:
    """All that the page shows.

    Attributes:
        name: of the run.
        false_yes, false_no: the surest wrong verdicts of either kind.
        clips: up to `EXAMPLES` of either kind of wrong verdict, the surest first, or else one that was right.
        how: what breaks clips, by its name.
        reliability: SVG; empty without valid verdicts.
        believed, useful: the accuracies from which the page's first sentences call a judge so.
    """

    name: str
    conclusion: Conclusion
    found: Findings
    probes: tuple[Shown, ...]
    false_yes: tuple[Mistake, ...]
    false_no: tuple[Mistake, ...]
    clips: tuple[Strip, ...]
    reliability: str
    how: Mapping[str, str] = field(default_factory=lambda: HOW)
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
        clips=_strips(heard.clips, min(mistakes, EXAMPLES), side),
        reliability=_reliability(found.calibration),
    )


def render(shown: View) -> str:
    """The page as HTML."""
    return page("audit.html.j2", view=shown)


def _reliability(found: Calibration) -> str:
    if not found.reliability:
        return ""
    return figures.reliability(
        found.reliability, "probability that the judge gave", "share of the pictures that do follow"
    )


def _mistakes(heard: Heard, yes: bool, count: int, side: int) -> tuple[Mistake, ...]:
    """Verdicts "yes", or "no", on pictures that do the contrary, the surest first."""
    margin, truth = margins(heard.verdicts), np.array([case.truth for case in heard.cases.cases])
    wrong = (margin > 0) & (truth < 0.5) if yes else (margin <= 0) & (truth > 0.5)
    places = sorted(np.flatnonzero(wrong), key=lambda place: (-abs(margin[place]), place))[:count]
    return tuple(_mistake(heard, heard.cases.cases[place], heard.verdicts[place], side) for place in places)


def _mistake(heard: Heard, case: Case, verdict: Verdict, side: int) -> Mistake:
    evidence = _evidences(verdict.evidence, heard.cases.truths(case, verdict.evidence))
    said, sure = _said(verdict)
    return Mistake(_picture(case.image(), side), case.prompt, case.origin, said, sure, evidence)


def _strips(watched: Sequence[Watched], count: int, side: int) -> tuple[Strip, ...]:
    """Up to `count` broken clips that passed for whole, as many whole ones that did not, or else a broken one that was
    told."""
    answered = sorted((one for one in watched if one.throughout.valid), key=lambda one: -abs(one.throughout.margin))
    kinds = [(all(one.case.shows), one.throughout.margin > 0) for one in answered]
    missed, refused, told = (
        [one for one, kind in zip(answered, kinds, strict=True) if kind == wanted]
        for wanted in ((False, True), (True, False), (False, False))
    )
    wrong = missed[:count] + refused[:count]
    return tuple(_strip(one, not wrong, side) for one in wrong or told[:1])


def _strip(watched: Watched, right: bool, side: int) -> Strip:
    case, verdict = watched.case, watched.throughout
    return Strip(
        frames=tuple(
            (_picture(image, side), follows) for image, follows in zip(case.images(), case.shows, strict=True)
        ),
        prompt=case.prompt,
        how="" if all(case.shows) else HOW[case.how],
        said=_said(verdict)[0],
        sure=_said(verdict)[1],
        right=right,
        evidence=_evidences(verdict.evidence, case.truths(verdict.evidence)),
    )


def _said(verdict: Verdict) -> tuple[str, float]:
    """The verdict and the probability with which it was given."""
    return "yes" if verdict.margin > 0 else "no", _sure(verdict.margin)


def _evidences(answers: Sequence[Answer], truths: Sequence[bool | None]) -> tuple[Evidence, ...]:
    return tuple(_evidence(answer, truth) for answer, truth in zip(answers, truths, strict=True))


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
