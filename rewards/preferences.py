"""Preference pairs from the margins a judge gave to several images of each prompt.

A judge that sees one image at a time gives each a log-odds, and the soft label of a pair is P(a better) =
sigmoid((m_a - m_b) / T), the Bradley-Terry model with the judge's margins as strengths. RLAIF (2309.00267,
section 3.1) likewise trains on the labeller's probabilities instead of its hard choices.
"""

import hashlib
import itertools
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy.special import expit

Strategy = Literal["all", "best_vs_worst"]


@dataclass(frozen=True)
class Scored:
    """One image, number `sample` of its prompt, as a judge sees it: `margin` in nats, void unless `valid`.

    `certainty` is the judge's self-certainty in nats; NaN where it is not known.
    """

    prompt_id: str
    prompt: str
    skill: str
    sample: int
    margin: float
    valid: bool
    certainty: float = math.nan


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt.

    Attributes:
        label: soft label, the probability that image `sample_a` is better than `sample_b`.
        weight: every prompt has the same total within its split, unless the judge's certainty counts; the mean over the
            split is 1.
        judge: the id of the judge that scored both; `template` is the version of its question.
    """

    prompt_id: str
    prompt: str
    skill: str
    sample_a: int
    sample_b: int
    label: float
    weight: float
    split: Literal["train", "heldout"]
    strategy: Strategy
    judge: str
    template: str


def pairs(
    scored: Iterable[Scored],
    strategy: Strategy,
    temperature: float,
    min_gap: float,
    judge: str,
    template: str,
    heldout: float,
    by_certainty: bool = False,
) -> list[Pair]:
    """The preference pairs among the valid images of each prompt, ordered by prompt id and samples.

    The result does not depend on the order of `scored`. Which image of a pair comes first, and which prompts
    are held out, is read off hashes: a prompt keeps its split when others are added, and two spellings of
    one prompt share theirs.

    Args:
        strategy: `all` pairs of a prompt, or its `best_vs_worst` alone.
        temperature: T of the soft labels, in nats of margin.
        min_gap: pairs whose margins differ by less than this many nats are dropped.
        heldout: the share of prompts, in expectation, that training never sees.
        by_certainty: weigh each pair by the mean certainty of its two verdicts.

    Raises:
        ValueError: a setting or an image is out of range; the message starts with the field's name.
    """
    if strategy not in ("all", "best_vs_worst"):
        raise ValueError(f"strategy: {strategy!r} is neither 'all' nor 'best_vs_worst'")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: {temperature} is not a positive number")
    if not 0 <= min_gap < math.inf:
        raise ValueError(f"min_gap: {min_gap} is not a number of nats from 0")
    if not 0 <= heldout < 1:
        raise ValueError(f"heldout: {heldout} is not a share from 0 to below 1")
    found = []
    for group in _by_prompt(scored):
        for first, second in _choose(group, strategy):
            if abs(first.margin - second.margin) < min_gap:
                continue
            a, b = _shuffled(first, second)
            label = float(expit((a.margin - b.margin) / temperature))
            split = "heldout" if _unit_hash("split", normalised(a.prompt)) < heldout else "train"
            place = (a.prompt_id, a.prompt, a.skill, a.sample, b.sample)
            weight = _certainty(a, b) if by_certainty else 1.0
            found.append(Pair(*place, label, weight, split, strategy, judge, template))
    return _balanced(found)


def normalised(prompt: str) -> str:
    """`prompt` without what does not change its meaning: case, spacing, Unicode form, closing punctuation."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split()).rstrip(" .!")


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
    return list(groups.values())


def _choose(group: Sequence[Scored], strategy: Strategy) -> list[tuple[Scored, Scored]]:
    if strategy == "all":
        return list(itertools.combinations(group, 2))
    ranked = sorted(group, key=lambda image: image.margin)
    return [(ranked[0], ranked[-1])] if len(ranked) > 1 else []


def _shuffled(first: Scored, second: Scored) -> tuple[Scored, Scored]:
    """Both in an order that knows nothing of their margins."""
    first, second = sorted((first, second), key=lambda image: image.sample)
    swap = _unit_hash("order", first.prompt_id, str(first.sample), str(second.sample)) < 0.5
    return (second, first) if swap else (first, second)


def _unit_hash(*parts: str) -> float:
    """A number in [0, 1) that `parts` alone decide."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


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
