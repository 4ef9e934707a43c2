"""Preference pairs from the margins a judge gave to several images of each prompt.

A judge that sees one image at a time gives each a log-odds, and the soft label of a pair is P(a better) =
sigmoid((m_a - m_b) / T), the Bradley-Terry model with the judge's margins as strengths. RLAIF (2309.00267,
section 3.1) likewise trains on the labeller's probabilities instead of its hard choices.
"""

import hashlib
import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from scipy.special import expit, ndtr

from rewards.leakage import families

Strategy = Literal["all", "best_vs_worst", "margin", "uncertainty"]


@dataclass(frozen=True)
class Scored:
    """One image, number `sample` of its prompt, as a judge sees it: `margin` in nats, void unless `valid`.

    `certainty` is the judge's self-certainty in nats, `disagreement` the standard deviation of its members' margins in
    nats; each is NaN where it is not known.
    """

    prompt_id: str
    prompt: str
    skill: str
    sample: int
    margin: float
    valid: bool
    certainty: float = math.nan
    disagreement: float = math.nan


@dataclass(frozen=True)
class Rule:
    """Which pairs are made of a prompt's images, and what they are labelled.

    Attributes:
        strategy: `all` pairs; `best_vs_worst` alone; by `margin`, the widest gaps first; by `uncertainty`, first those
            whose order the judge is least sure of, which teach the most where labels cost something.
        per_prompt: the number of pairs that `margin` and `uncertainty` take of each prompt.
        temperature: T of the soft labels, in nats of margin.
        min_gap, max_gap: pairs whose margins differ by less, or by more, than so many nats are dropped.
        tie: pairs whose margins differ by less than this many nats are kept nevertheless, as ties: their label is 0.5.
        by_certainty: weigh each pair by the mean certainty of its two verdicts.

    Raises:
        ValueError: a setting is out of range; the message starts with the field's name.
    """

    strategy: Strategy = "all"
    per_prompt: int | None = None
    temperature: float = 1.0
    min_gap: float = 0.5
    max_gap: float | None = None
    tie: float = 0.0
    by_certainty: bool = False

    def __post_init__(self) -> None:
        if self.strategy not in get_args(Strategy):
            raise ValueError(f"strategy: {self.strategy!r} is none of {', '.join(get_args(Strategy))}")
        if self.strategy in ("margin", "uncertainty"):
            if self.per_prompt is None or self.per_prompt < 1:
                raise ValueError(f"per_prompt: {self.strategy!r} takes that many of each prompt; give a number from 1")
        elif self.per_prompt is not None:
            raise ValueError(f"per_prompt: {self.strategy!r} has no use for it; leave it out or use 'margin'")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: {self.temperature} is not a positive number")
        for name in ("min_gap", "tie"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)} is not a number of nats from 0")
        if self.max_gap is not None and not self.min_gap <= self.max_gap < math.inf:
            raise ValueError(f"max_gap: {self.max_gap} is less than min_gap, {self.min_gap}, or infinite")

    def most(self, images: int) -> int:
        """How many pairs a prompt of so many images gives at most."""
        wanted = {"all": None, "best_vs_worst": 1}.get(self.strategy, self.per_prompt)
        every = images * (images - 1) // 2
        return every if wanted is None else min(wanted, every)

    def label(self, a: Scored, b: Scored) -> float:
        """The probability that `a` is better than `b`."""
        gap = a.margin - b.margin
        return 0.5 if abs(gap) < self.tie else float(expit(gap / self.temperature))

    def choose(self, group: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
        """The pairs that are made of one prompt's images."""
        found = [pair for pair in itertools.combinations(group, 2) if self._admits(*pair)]
        if self.strategy == "uncertainty":
            found.sort(key=lambda pair: -self._doubt(*pair))
        elif self.strategy != "all":
            found.sort(key=lambda pair: -_gap(*pair))
        return found[: self.most(len(group))]

    def _admits(self, a: Scored, b: Scored) -> bool:
        gap = _gap(a, b)
        return gap < self.tie or self.min_gap <= gap <= (math.inf if self.max_gap is None else self.max_gap)

    def _doubt(self, a: Scored, b: Scored) -> float:
        """The probability that the margins stand in the wrong order.

        Where several judges gave them they are means with errors, else they are taken at their word (Bradley-Terry).
        """
        spread = math.hypot(a.disagreement, b.disagreement)
        if math.isnan(spread):
            return float(expit(-_gap(a, b) / self.temperature))
        return float(ndtr(-_gap(a, b) / spread)) if spread else 0.5 * (_gap(a, b) == 0)


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt.

    Attributes:
        label: soft label, the probability that image `sample_a` is better than `sample_b`.
        weight: every prompt has the same total within its split, unless the judge's certainty counts; the mean over the
            split is 1.
        strategy: how it was chosen; `table` if people did.
        judge: the id of the judge that scored both; `template` is the version of its question. Of people's pairs they
            are the table and its reader.
        margin_a, margin_b: what the judge said of each image, in nats; NaN where nobody scored them.
    """

    prompt_id: str
    prompt: str
    skill: str
    sample_a: int
    sample_b: int
    label: float
    weight: float
    split: Literal["train", "heldout"]
    strategy: Strategy | Literal["table"]
    judge: str
    template: str
    margin_a: float = math.nan
    margin_b: float = math.nan


def pairs(scored: Iterable[Scored], rule: Rule, judge: str, template: str, heldout: float, near: float) -> list[Pair]:
    """The preference pairs among the valid images of each prompt, ordered by prompt id and samples.

    The result does not depend on the order of `scored`. Which image of a pair comes first, and which prompts are held
    out, is read off hashes. Near duplicates of one prompt share their split, and a prompt keeps its own when others
    are added, unless one of them links it to near duplicates that it did not have (see `leakage.families`).

    Args:
        heldout: the share of prompts, in expectation, that training never sees.
        near: the similarity from which prompts are near duplicates.

    Raises:
        ValueError: a setting or an image is out of range; the message starts with the field's name.
    """
    groups = _by_prompt(scored)
    splits = _splits([group[0].prompt for group in groups], heldout, near)
    found = []
    for group in groups:
        split = splits[group[0].prompt]
        for a, b in sorted((_shuffled(*pair) for pair in rule.choose(group)), key=_samples):
            place = (a.prompt_id, a.prompt, a.skill, a.sample, b.sample)
            weight = _certainty(a, b) if rule.by_certainty else 1.0
            made = (rule.label(a, b), weight, split, rule.strategy, judge, template)
            found.append(Pair(*place, *made, a.margin, b.margin))
    return _balanced(found)


def divided(found: Sequence[Pair], heldout: float, near: float) -> list[Pair]:
    """Pairs that people labelled, in their splits and with their weights; `heldout` and `near` are those of `pairs`."""
    splits = _splits([pair.prompt for pair in found], heldout, near)
    return _balanced([replace(pair, split=splits[pair.prompt]) for pair in found])


def unit_hash(*parts: str) -> float:
    """A number in [0, 1) that `parts` alone decide."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _splits(prompts: Iterable[str], heldout: float, near: float) -> dict[str, Literal["train", "heldout"]]:
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout: {heldout} is not a share from 0 to below 1")
    family = families(prompts, near)
    return {prompt: "heldout" if unit_hash("split", family[prompt]) < heldout else "train" for prompt in family}


def _by_prompt(scored: Iterable[Scored]) -> list[list[Scored]]:
    """The valid images of each prompt, in the order of prompt id and sample."""
    groups: dict[str, list[Scored]] = defaultdict(list)
    texts: dict[str, str] = {}
    for image in sorted(scored, key=lambda image: (image.prompt_id, image.sample)):
        group = groups[image.prompt_id]
        if texts.setdefault(image.prompt_id, image.prompt) != image.prompt:
            raise ValueError(f"prompt_id: {image.prompt_id!r} names two different prompts")
        if not image.valid:
            continue
        if not math.isfinite(image.margin):
            raise ValueError(f"margin: {image.margin} in a valid verdict on {image.prompt_id!r}")
        if group and group[-1].sample == image.sample:
            raise ValueError(f"sample: {image.sample} of {image.prompt_id!r} stands twice")
        group.append(image)
    return [group for group in groups.values() if group]


def _gap(a: Scored, b: Scored) -> float:
    return abs(a.margin - b.margin)


def _samples(pair: tuple[Scored, Scored]) -> tuple[int, ...]:
    return tuple(sorted(image.sample for image in pair))


def _shuffled(first: Scored, second: Scored) -> tuple[Scored, Scored]:
    """Both in an order that knows nothing of their margins."""
    first, second = sorted((first, second), key=lambda image: image.sample)
    swap = unit_hash("order", first.prompt_id, str(first.sample), str(second.sample)) < 0.5
    return (second, first) if swap else (first, second)


def _certainty(a: Scored, b: Scored) -> float:
    for image in (a, b):
        if not 0 <= image.certainty < math.inf:
            raise ValueError(
                f"by_certainty: the verdict on sample {image.sample} of {image.prompt_id!r} does not tell how sure the "
                f"judge was ({image.certainty}); use false"
            )
    return (a.certainty + b.certainty) / 2


def _balanced(found: Sequence[Pair]) -> list[Pair]:
    """The pairs with weights that share out each prompt's among its pairs and have the mean 1 over a split."""
    of_prompt = Counter(pair.prompt_id for pair in found)
    shared = [pair.weight / of_prompt[pair.prompt_id] for pair in found]
    total: dict[str, float] = defaultdict(float)
    for pair, weight in zip(found, shared, strict=True):
        total[pair.split] += weight
    of_split = Counter(pair.split for pair in found)
    return [
        replace(pair, weight=weight * of_split[pair.split] / total[pair.split])
        for pair, weight in zip(found, shared, strict=True)
    ]
