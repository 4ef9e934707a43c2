"""Asks a judge all that an audit wants to hear, a few pictures in memory at a time.

About pictures of which the truth is known; twice about some of them; in other words; about pictures changed such that
the right answer is known to stay or to become no; and, of one that sees two pictures, which is better. What is asked
depends on the cases, the settings and the seed alone.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np

from judges.audit import margins, reworded, unremembered
from judges.base import Judge, Question, Verdict
from judges.cache import CachedVQA
from judges.frames import PerFrame
from judges.pairwise import GroupJudge, PairwiseJudge
from judges.probes import Probe, negated, probes
from judges.questions import QuestionJudge
from models.keys import sample_key
from pipeline.auditing.cases import Case, Cases, ClipCase
from pipeline.auditing.findings import Heard, Pair, Trial, Tried, Watched
from pipeline.progress import Advance, Progress

WORDINGS = ("Does this figure show {prompt}?", "Does the figure show {prompt}?", "Is this {prompt}?")
"""Of words that the embedded judge knows too."""

NEGATION = Probe(
    "negation",
    "asked “is there no …?” instead of “is there a …?”",
    expects="same",
    tried_on="all",
    risk="a question with “no” or “not” in it may be answered as if these words were not there",
)

_CALL = 64

T = TypeVar("T")


def examine(
    judge: Judge, cases: Cases, most: int, seed: int, progress: Progress, clips: Sequence[ClipCase] = ()
) -> Heard:
    """Ask about every case, about at most `most` of them in each other way, and about the `clips`.

    A judge that compares the pictures of a prompt with one another is not probed: there is nothing that a changed
    picture could be compared with. Only of one that asks questions can these be negated, put in other words, and asked
    about every frame of a clip.
    """
    most = min(most, len(cases.cases))
    compares, asks = isinstance(judge, GroupJudge), isinstance(judge, QuestionJudge)
    tricks = () if compares else probes(cases.most)
    words = reworded(judge, WORDINGS)
    ways = 1 + compares + asks + len(tricks) + len(words)
    watched = clips if asks else ()
    with progress.track(len(cases.cases) + ways * most + len(watched), "verdicts", "audit") as advance:
        verdicts = judged(judge, cases.cases, _by_prompt(cases.cases), advance)
        ask = _Examination(cases, [verdicts[place] for place in range(len(verdicts))], most, seed, advance)
        trials = [ask.trial(judge, probe) for probe in tricks]
        return Heard(
            judge=judge.id,
            template=judge.template,
            cases=cases,
            verdicts=tuple(ask.verdicts),
            again=ask.again(unremembered(judge)),
            pairs=ask.duels(judge) if compares else ask.ranked(),
            trials=(*trials, ask.negation(judge)) if asks else tuple(trials),
            templates=WORDINGS if words else (),
            wordings=ask.wordings(words),
            order_matters=compares and isinstance(judge.comparer, PairwiseJudge),
            clips=_watched(judge, watched, advance) if isinstance(judge, QuestionJudge) else (),
        )


@dataclass(frozen=True)
class _Examination:
    """The further ways to ask, once there is a verdict on each case. Each is `most` steps of progress long."""

    cases: Cases
    verdicts: Sequence[Verdict]
    most: int
    seed: int
    advance: Advance

    def again(self, judge: Judge) -> tuple[tuple[int, Verdict], ...]:
        """Second verdicts, called for in another order; where siblings are compared, on all those of some prompts."""
        if isinstance(judge, GroupJudge):
            groups = _by_prompt(self.cases.cases)
            self._rng("again").shuffle(groups)
            groups = groups[: np.searchsorted(np.cumsum([len(group) for group in groups]), self.most) + 1]
        else:
            places = self._shuffled("again", range(len(self.verdicts)))
            groups = [[place] for place in places[: self.most]]
        found = judged(judge, self.cases.cases, groups, self.advance)
        self._complete(len(found))
        return tuple(sorted(found.items()))

    def wordings(self, judges: Sequence[Judge]) -> tuple[tuple[int, tuple[Verdict, ...]], ...]:
        """The verdicts of each of the judges on the same cases."""
        places = self._shuffled("wordings", range(len(self.verdicts)))[: self.most]
        found = []
        for judge in judges:
            found.append(judged(judge, self.cases.cases, [[place] for place in places], self.advance))
            self._complete(len(places))
        return tuple((place, tuple(verdicts[place] for verdicts in found)) for place in places if found)

    def trial(self, judge: Judge, probe: Probe) -> Trial:
        """A probe on cases drawn from those that it is for."""
        all_prompts = list(dict.fromkeys(case.prompt for case in self.cases.cases))
        waiting = iter(self._shuffled(probe.name, self._eligible(probe)))
        tried: list[Tried] = []
        passed_over = 0
        while batch := list(islice(waiting, min(_CALL, self.most - len(tried)))):
            changed = [(place, *found) for place in batch if (found := self._changed(probe, place, all_prompts))]
            passed_over += len(batch) - len(changed)
            if not changed:
                continue
            places, images, prompts = zip(*changed, strict=True)
            for place, prompt, verdict in zip(places, prompts, judge.score(images, prompts), strict=True):
                tried.append(self._tried(place, prompt, verdict))
            self.advance(len(changed))
        self._complete(len(tried))
        return Trial(probe, tuple(tried), passed_over)

    def negation(self, judge: QuestionJudge) -> Trial:
        """The first question on each prompt that can be negated, negated."""
        cases, eligible = self.cases.cases, self._eligible(NEGATION)
        turned = {place: _negated(judge.decompose(cases[place].prompt)) for place in eligible}
        fit = [(place, *turned[place]) for place in self._shuffled(NEGATION.name, eligible) if turned[place]]
        tried = []
        for batch in _chunks(fit[: self.most]):
            images = [cases[place].image() for place, _, _ in batch]
            answered = judge.vqa.ask(images, [[question] for _, _, question in batch])
            for (place, number, question), (after,) in zip(batch, answered, strict=True):
                before = self.verdicts[place].evidence[number]
                asked, said = (before.question, question.text), (before.text, after.text or after.error)
                margin = (before.margin, after.margin if after.valid else math.nan)
                tried.append(Tried(cases[place], asked, said, margin))
            self.advance(len(batch))
        self._complete(len(tried))
        return Trial(NEGATION, tuple(tried), len(eligible) - len(fit))

    def ranked(self) -> tuple[Pair, ...]:
        """Pairs of one prompt, by the margins that stand."""
        margin = margins(self.verdicts)
        return tuple(self._pair(a, b, float(margin[a] - margin[b])) for a, b in self._torn())

    def duels(self, judge: GroupJudge) -> tuple[Pair, ...]:
        """Pairs of one prompt, shown to the judge's comparer."""
        found = []
        torn = self._torn()
        for batch in _chunks(self._rng("duels").sample(torn, min(len(torn), self.most))):
            first, second = ([self.cases.cases[place].image() for place in side] for side in zip(*batch, strict=True))
            compared = judge.comparer.compare(first, second, [self.cases.cases[a].prompt for a, _ in batch])
            for (a, b), verdict in zip(batch, compared, strict=True):
                found.append(self._pair(a, b, verdict.margin if verdict.valid else math.nan, verdict))
            self.advance(len(batch))
        self._complete(len(found))
        return tuple(found)

    def _torn(self) -> list[tuple[int, int]]:
        """The places of any two cases of one prompt of which one follows it, in turn first and second."""
        truth = [case.truth for case in self.cases.cases]
        found = []
        for group in _by_prompt(self.cases.cases):
            follow, stray = [i for i in group if truth[i] > 0.5], [i for i in group if truth[i] < 0.5]
            found += product(follow, stray)
        return [pair if turn % 2 else pair[::-1] for turn, pair in enumerate(found)]

    def _pair(self, a: int, b: int, margin: float, verdict: Verdict | None = None) -> Pair:
        case = self.cases.cases[a]
        return Pair(case.prompt, float(case.truth > 0.5), margin, verdict)

    def _eligible(self, probe: Probe) -> list[int]:
        """Places of the cases that a probe is for; without a verdict there is nothing to compare with."""
        margin, truth = margins(self.verdicts), np.array([case.truth for case in self.cases.cases])
        chosen = {
            "all": np.isfinite(margin),
            "accepted": (margin > 0) & (truth > 0.5),
            "rejected": (margin <= 0) & (truth < 0.5),
        }
        return np.flatnonzero(chosen[probe.tried_on]).tolist()

    def _changed(self, probe: Probe, place: int, prompts: Sequence[str]) -> tuple[np.ndarray, str] | None:
        """The changed picture and prompt; None where the change does not apply, or does to the truth what it should
        not."""
        case = self.cases.cases[place]
        prompt = probe.prompt(case.prompt, prompts)
        image = None if prompt is None else probe.picture(case.image(), case.prompt)
        if prompt is None or image is None:
            return None
        truth, wanted = self.cases.gold(image, prompt), probe.expects == "same" and case.truth > 0.5
        return (image, prompt) if truth in (None, wanted) else None

    def _tried(self, place: int, prompt: str, after: Verdict) -> Tried:
        before = self.verdicts[place]
        case = self.cases.cases[place]
        return Tried(
            case, (case.prompt, prompt), (_said(before), _said(after)), tuple(margins([before, after]).tolist())
        )

    def _shuffled(self, way: str, places: Sequence[int]) -> list[int]:
        """The places in an order of its own for each way of asking, one of every prompt before a second of any."""
        seen: Counter[str] = Counter()
        turns = []
        for place in self._rng(way).sample(places, len(places)):
            prompt = self.cases.cases[place].prompt
            turns.append((seen[prompt], place))
            seen[prompt] += 1
        return [place for _, place in sorted(turns, key=lambda turn: turn[0])]

    def _rng(self, way: str) -> random.Random:
        return random.Random(sample_key(self.seed, "audit", way))

    def _complete(self, done: int) -> None:
        if done < self.most:
            self.advance(self.most - done)


def _watched(judge: QuestionJudge, clips: Sequence[ClipCase], advance: Advance) -> tuple[Watched, ...]:
    """The verdicts on clips of one length, every frame of which is asked about once for both."""
    frames = max((len(case.clip) for case in clips), default=1)
    found: list[Watched] = []
    with TemporaryDirectory() as folder:
        vqa = CachedVQA(judge.vqa, Path(folder) / "answers.sqlite")
        throughout, mostly = (
            QuestionJudge(PerFrame(vqa, frames, reduce), judge.decompose, judge.aggregate) for reduce in ("min", "mean")
        )
        for batch in _chunks(clips, max(1, _CALL // frames)):
            asked = [case.images() for case in batch], [case.prompt for case in batch]
            found += map(Watched, batch, throughout.score(*asked), mostly.score(*asked))
            advance(len(batch))
    return tuple(found)


def _said(verdict: Verdict) -> str:
    return ("yes" if verdict.margin > 0 else "no") if verdict.valid else verdict.reason


def _negated(questions: Sequence[Question]) -> tuple[int, Question] | None:
    """The place of the first question that can be negated, and its negation."""
    return next(((i, turned) for i, question in enumerate(questions) if (turned := negated(question))), None)


def _by_prompt(cases: Sequence[Case]) -> list[list[int]]:
    """The places of the cases of each prompt."""
    found: dict[str, list[int]] = {}
    for place, case in enumerate(cases):
        found.setdefault(case.prompt, []).append(place)
    return list(found.values())


def judged(
    judge: Judge, cases: Sequence[Case], groups: Iterable[Sequence[int]], advance: Advance
) -> dict[int, Verdict]:
    """The verdicts on the cases at these places; what is in a group belongs into one call."""
    found: dict[int, Verdict] = {}
    for places in _calls(groups):
        asked = [cases[place] for place in places]
        verdicts = judge.score([case.image() for case in asked], [case.prompt for case in asked])
        found |= zip(places, verdicts, strict=True)
        advance(len(places))
    return found


def _calls(groups: Iterable[Sequence[int]]) -> Iterator[list[int]]:
    call: list[int] = []
    for group in groups:
        call += group
        if len(call) >= _CALL:
            yield call
            call = []
    if call:
        yield call


def _chunks(items: Sequence[T], size: int = _CALL) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
