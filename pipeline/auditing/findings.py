"""What an audit heard from a judge, and what it found: `audit.json` is a `Findings`, field by field."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from judges.audit import Asked, agreement, decisions, failures, margins, questions_asked, spread
from judges.base import Verdict
from judges.pairwise import first_share, flip_rate
from judges.probes import Probe
from pipeline.auditing.cases import Case, Cases, ClipCase
from pipeline.estimates import Accuracy, Calibration, Estimate, accuracy, calibration, mean, share
from rewards.metrics import correctness
from rewards.tables import Refused

TOLERATED = 0.05
"""The share of changed pictures on which a judge may fail a probe and still pass it."""

QUESTIONS, LEAST_ANSWERS = 12, 3
"""At most so many questions are listed, and none with fewer answers: one wrong answer says nothing of a question."""

Status = Literal["passed", "failed", "unclear", "untried"]


@dataclass(frozen=True)
class Tried:
    """One picture that a probe was tried on.

    Attributes:
        asked, said: what was asked, and the answer, before and after the change.
        margin: of both answers, in nats; NaN where there was none.
    """

    case: Case
    asked: tuple[str, str]
    said: tuple[str, str]
    margin: tuple[float, float]


@dataclass(frozen=True)
class Trial:
    """A probe, the pictures that it was tried on, and how many were passed over: the change does not apply to them, or
    would have made another answer the right one."""

    probe: Probe
    tried: tuple[Tried, ...]
    passed_over: int


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt, of which the first follows it with probability `label`, 0 or 1, and the second does
    not, or the other way round; `margin` speaks for the first."""

    prompt: str
    label: float
    margin: float
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Watched:
    """A clip and the verdicts on it: whether it follows its prompt `throughout`, by the smallest margin of its frames,
    and `mostly`, by their mean."""

    case: ClipCase
    throughout: Verdict
    mostly: Verdict


@dataclass(frozen=True)
class Heard:
    """All that a judge said in an audit.

    Attributes:
        verdicts: on each case.
        again: places of the cases that it was asked about twice, and the second verdicts.
        wordings: templates, places of cases, and for each template its verdicts on them.
    """

    judge: str
    template: str
    cases: Cases
    verdicts: tuple[Verdict, ...]
    again: tuple[tuple[int, Verdict], ...]
    pairs: tuple[Pair, ...]
    trials: tuple[Trial, ...] = ()
    templates: tuple[str, ...] = ()
    wordings: tuple[tuple[int, tuple[Verdict, ...]], ...] = ()
    order_matters: bool = False
    clips: tuple[Watched, ...] = ()


@dataclass(frozen=True)
class Material:
    """What the judge was asked about: `follow` is the share of pictures that follow their prompt."""

    source: str
    pictures: int
    prompts: int
    follow: Estimate
    refused: tuple[Refused, ...]


@dataclass(frozen=True)
class Invalid:
    """Verdicts that could not be had: their share of all, and how many for which reason."""

    share: Estimate
    reasons: Mapping[str, int]


@dataclass(frozen=True)
class Repeated:
    """The same asked twice: share of verdicts that stayed, and the largest change of a margin, in nats."""

    agreement: Estimate
    largest_change: float | None


@dataclass(frozen=True)
class Wordings:
    """The same asked in other words: mean deviation of a picture's margins, in nats, and the share of pictures that
    some wordings accept and others do not."""

    templates: tuple[str, ...]
    deviation: Estimate
    changed: Estimate


@dataclass(frozen=True)
class Order:
    """Of a judge that sees two pictures: how often its choice changed with their order, and how often it chose the
    first, 1/2 without bias."""

    flipped: Estimate
    first: Estimate


@dataclass(frozen=True)
class Probed:
    """A probe's outcome: the share of pictures on which the judge behaved, and the mean change of its margin, in nats.

    `passed` and `failed` say that the interval of `behaved` lies above, or below, 1 - `TOLERATED`. `unanswered` are
    pictures without a verdict, `passed_over` those that the change is not for.
    """

    name: str
    title: str
    expects: str
    risk: str
    status: Status
    behaved: Estimate
    change: Estimate
    unanswered: int
    passed_over: int


@dataclass(frozen=True)
class Questioned:
    """A question and the share of its answers that were wrong, of those of which the truth is known."""

    question: str
    wrong: Estimate


@dataclass(frozen=True)
class Clips:
    """How often the verdicts on clips are right: on whether they follow their prompt `throughout`, the same `by_how` it
    is broken in one of two twins, and on whether they follow it `mostly`, in more than half of their frames."""

    frames: int
    throughout: Accuracy
    mostly: Accuracy
    by_how: Mapping[str, Accuracy]


@dataclass(frozen=True)
class Findings:
    """What an audit found out about a judge. None where nothing can be known, or the judge is not of that kind."""

    judge: str
    template: str
    material: Material
    accuracy: Accuracy
    by_skill: Mapping[str, Accuracy]
    by_origin: Mapping[str, Accuracy]
    calibration: Calibration
    pairs: Estimate
    invalid: Invalid
    repeated: Repeated
    wordings: Wordings | None
    order: Order | None
    probes: tuple[Probed, ...]
    questions: tuple[Questioned, ...]
    clips: Clips | None
    tolerated: float = TOLERATED


def findings(heard: Heard) -> Findings:
    """Everything that can be computed from what was heard."""
    cases = heard.cases.cases
    margin, truth = margins(heard.verdicts), np.array([case.truth for case in cases])
    prompts = np.array([case.prompt for case in cases])

    def sliced(labels: Sequence[str]) -> dict[str, Accuracy]:
        found = np.array(labels)
        places = {label: found == label for label in dict.fromkeys(filter(None, labels))}
        return {label: accuracy(margin[here], truth[here], prompts[here]) for label, here in places.items()}

    clear = np.where(truth == 0.5, np.nan, truth > 0.5)
    return Findings(
        judge=heard.judge,
        template=heard.template,
        material=Material(
            heard.cases.source, len(cases), len(set(prompts)), share(clear, prompts), heard.cases.refused
        ),
        accuracy=accuracy(margin, truth, prompts),
        by_skill=sliced([case.skill for case in cases]),
        by_origin=sliced([case.origin for case in cases]),
        calibration=calibration(margin, truth, prompts),
        pairs=_pairs(heard.pairs),
        invalid=Invalid(share(np.isnan(margin).astype(float), prompts), failures(heard.verdicts)),
        repeated=_repeated(heard),
        wordings=_wordings(heard),
        order=_order(heard.pairs) if heard.order_matters else None,
        probes=tuple(probed(trial) for trial in heard.trials),
        questions=_questions(heard),
        clips=_clips(heard.clips),
    )


def behaved(probe: Probe, tried: Tried) -> float:
    """Whether the judge did as it should: 1 or 0, NaN where it gave no answer."""
    before, after = np.array(tried.margin)
    if probe.expects == "same":
        return float(agreement(before, after))
    return float(1 - decisions(after))


def probed(trial: Trial) -> Probed:
    """The outcome of a trial."""
    probe, prompts = trial.probe, np.array([tried.case.prompt for tried in trial.tried])
    did = np.array([behaved(probe, tried) for tried in trial.tried])
    change = np.array([after - before for before, after in (tried.margin for tried in trial.tried)])
    found = share(did, prompts)
    unanswered = int(np.isnan(did).sum())
    return Probed(
        probe.name,
        probe.title,
        probe.expects,
        probe.risk,
        _status(found),
        found,
        mean(change, prompts),
        unanswered,
        trial.passed_over,
    )


def _status(found: Estimate) -> Status:
    if found.value is None:
        return "untried"
    if found.interval is None or found.interval[0] <= 1 - TOLERATED <= found.interval[1]:
        return "unclear"
    return "passed" if found.interval[0] > 1 - TOLERATED else "failed"


def _clips(watched: Sequence[Watched]) -> Clips | None:
    if not watched:
        return None
    prompts, how = (np.array([getattr(one.case, name) for one in watched]) for name in ("prompt", "how"))
    shows = np.array([one.case.shows for one in watched], dtype=float)  # (N, F)
    throughout, always = margins(one.throughout for one in watched), shows.min(1)
    return Clips(
        frames=shows.shape[1],
        throughout=accuracy(throughout, always, prompts),
        mostly=accuracy(margins(one.mostly for one in watched), shows.mean(1), prompts),
        by_how={
            str(kind): accuracy(throughout[how == kind], always[how == kind], prompts[how == kind])
            for kind in dict.fromkeys(how)
        },
    )


def _pairs(pairs: Sequence[Pair]) -> Estimate:
    """Share of pairs whose better picture got the higher margin; pairs without a verdict are left out."""
    margin, label = np.array([(pair.margin, pair.label) for pair in pairs]).reshape(-1, 2).T
    right = np.where(np.isnan(margin), np.nan, correctness(margin, np.zeros_like(margin), label))
    return share(right, np.array([pair.prompt for pair in pairs]))


def _order(pairs: Sequence[Pair]) -> Order:
    asked = [(pair.prompt, pair.verdict) for pair in pairs if pair.verdict]
    prompts = np.array([prompt for prompt, _ in asked])
    flipped, first = (np.array([measure([v]) for _, v in asked]) for measure in (flip_rate, first_share))
    return Order(share(flipped, prompts), share(first, prompts))


def _repeated(heard: Heard) -> Repeated:
    prompts = np.array([heard.cases.cases[place].prompt for place, _ in heard.again])
    first = margins(heard.verdicts[place] for place, _ in heard.again)
    second = margins(verdict for _, verdict in heard.again)
    change = np.abs(first - second)
    known = change[np.isfinite(change)]
    return Repeated(share(agreement(first, second), prompts), float(known.max()) if len(known) else None)


def _wordings(heard: Heard) -> Wordings | None:
    if not heard.wordings:
        return None
    prompts = np.array([heard.cases.cases[place].prompt for place, _ in heard.wordings])
    found = spread(np.array([margins(verdicts) for _, verdicts in heard.wordings]).T)
    return Wordings(heard.templates, mean(found.deviation, prompts), share(found.changed, prompts))


def _questions(heard: Heard) -> tuple[Questioned, ...]:
    truths: Iterable[Sequence[bool | None]] = (
        heard.cases.truths(case, verdict.evidence)
        for case, verdict in zip(heard.cases.cases, heard.verdicts, strict=True)
    )
    asked: list[Asked] = questions_asked(heard.verdicts, truths, (case.prompt for case in heard.cases.cases))
    listed = [one for one in asked if any(one.wrong) and len(one.wrong) >= LEAST_ANSWERS][:QUESTIONS]
    return tuple(Questioned(one.question, share(np.array(one.wrong), np.array(one.prompts))) for one in listed)
