"""Whether what a reward model is measured on stands in what it was trained on: prompts, nearly equal ones, pictures.

A prompt is the set of its pairs of neighbouring words, ends included, and two prompts are near duplicates where the
Jaccard similarity of these sets reaches a threshold. The search is exact: of two such sets, sorted by rarity, already
the rare beginnings share an element (prefix filtering; Bayardo et al., Scaling Up All Pairs Similarity Search, WWW
2007, section 4), so that only prompts with a rare pair of words in common are ever compared.

Pictures are compared by their pixels and by difference hash: 64 bits, each whether brightness rises between two
neighbours of the picture shrunk to 9 x 8. Copies that were resized or saved again as JPEG differ in a few bits.
"""

import hashlib
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Literal

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

NEAR = 0.7
"""Jaccard similarity from which two prompts are near duplicates."""

DISTANCE = 4
"""Bits of 64 in which the difference hashes of two like pictures may differ."""

_EXAMPLES = 5
_ROUNDING = 1e-9


@dataclass(frozen=True)
class ImageHash:
    """`pixels` is a sha256 of a picture's size and pixels, `difference` its 64-bit difference hash."""

    pixels: str
    difference: int


@dataclass(frozen=True)
class Example:
    """A held-out prompt, or the name of a held-out picture, and what it is like in training."""

    kind: Literal["exact", "normalised", "near", "identical", "similar"]
    heldout: str
    train: str


@dataclass(frozen=True)
class Leakage:
    """What of the held-out split stands in training too.

    Attributes:
        prompts: different held-out prompts. Of these `exact` stand in training letter for letter, `normalised` in
            another spelling, `near` as a near duplicate; each is counted once, in the first of these that holds.
        images: held-out pictures. Of these `identical` have the pixels of one in training, `similar` only a hash like
            one's.
        examples: a few of each kind.
    """

    prompts: int
    exact: int
    normalised: int
    near: int
    images: int
    identical: int
    similar: int
    examples: tuple[Example, ...]

    @property
    def found(self) -> bool:
        """Whether there is any, apart from pictures that are merely similar: simple pictures often are."""
        return bool(self.exact or self.normalised or self.near or self.identical)


def leakage(
    train: Iterable[str],
    heldout: Iterable[str],
    train_images: Mapping[str, ImageHash],
    heldout_images: Mapping[str, ImageHash],
    near: float = NEAR,
    distance: int = DISTANCE,
) -> Leakage:
    """What of the prompts `heldout` stands in `train`, and of the pictures, by name, likewise."""
    train, heldout = sorted(set(train)), sorted(set(heldout))
    examples = [*_prompts_found(train, heldout, near), *_images_found(train_images, heldout_images, distance)]
    count = Counter(example.kind for example in examples)
    shown: Counter[str] = Counter()
    few = []
    for example in examples:
        shown[example.kind] += 1
        if shown[example.kind] <= _EXAMPLES:
            few.append(example)
    kinds = ("exact", "normalised", "near", "identical", "similar")
    return Leakage(
        prompts=len(heldout), images=len(heldout_images), examples=tuple(few), **{kind: count[kind] for kind in kinds}
    )


def normalised(prompt: str) -> str:
    """`prompt` without what does not change its meaning: case, spacing, Unicode form, closing punctuation."""
    return " ".join(unicodedata.normalize("NFKC", prompt).casefold().split()).rstrip(" .!")


def near_pairs(prompts: Sequence[str], near: float = NEAR) -> Iterator[tuple[int, int]]:
    """The places i < j of all pairs of near duplicates among `prompts`, in the order of j.

    Raises:
        ValueError: `near` is no similarity from above 0 to 1.
    """
    if not 0 < near <= 1:
        raise ValueError(f"near: {near} is not a similarity from above 0 to 1")
    shingles = [_shingles(prompt) for prompt in prompts]
    frequency = Counter(chain.from_iterable(shingles))
    holders: dict[tuple[str, str], list[int]] = defaultdict(list)
    for j, own in enumerate(shingles):
        prefix = sorted(own, key=lambda shingle: (frequency[shingle], shingle))
        del prefix[len(own) - math.ceil(near * len(own) - _ROUNDING) + 1 :]
        for i in sorted({i for shingle in prefix for i in holders[shingle]}):
            other = shingles[i]
            if min(len(own), len(other)) < near * max(len(own), len(other)) - _ROUNDING:
                continue
            shared = len(own & other)
            if shared >= near * (len(own) + len(other) - shared) - _ROUNDING:
                yield i, j
        for shingle in prefix:
            holders[shingle].append(j)


def families(prompts: Iterable[str], near: float = NEAR) -> dict[str, str]:
    """For each prompt the one that stands for its family: all that near duplicates link to it, directly or not.

    The answer does not depend on the order of `prompts`, and a family keeps its prompt while none joins that links it
    to another.
    """
    texts = sorted({normalised(prompt) for prompt in prompts})
    # The order decides which prompt stands for a family. A hash makes it say nothing of their lengths or first words.
    texts.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
    links = np.array(list(near_pairs(texts, near)), dtype=int).reshape(-1, 2).T
    graph = coo_array((np.ones(links.shape[1], dtype=bool), tuple(links)), shape=(len(texts), len(texts)))
    _, family = connected_components(graph, directed=False)
    first: dict[int, str] = {}
    of = {text: first.setdefault(own, text) for text, own in zip(texts, family.tolist(), strict=True)}
    return {prompt: of[normalised(prompt)] for prompt in prompts}


def image_hash(image: np.ndarray) -> ImageHash:
    """The hashes of a picture, uint8 (H, W, 3)."""
    pixels = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
    grey = np.asarray(Image.fromarray(image).convert("L").resize((9, 8), Image.Resampling.BOX), dtype=int)
    rises = grey[:, 1:] > grey[:, :-1]  # (8, 8)
    return ImageHash(pixels, int.from_bytes(np.packbits(rises).tobytes(), "big"))


def _prompts_found(train: Sequence[str], heldout: Sequence[str], near: float) -> Iterator[Example]:
    """An example for every held-out prompt that training holds in some form. Both are sorted and without repetition."""
    known, spelt = set(train), {}
    for prompt in reversed(train):
        spelt[normalised(prompt)] = prompt
    left: dict[str, list[str]] = defaultdict(list)
    for prompt in heldout:
        if prompt in known:
            yield Example("exact", prompt, prompt)
        elif same := spelt.get(normalised(prompt)):
            yield Example("normalised", prompt, same)
        else:
            left[normalised(prompt)].append(prompt)
    # What is held out comes last, so that the first place of a pair may be in training and the second held out.
    texts, found = [*spelt, *left], set()
    for i, j in near_pairs(texts, near):
        if i < len(spelt) <= j and j not in found:
            found.add(j)
            for prompt in left[texts[j]]:
                yield Example("near", prompt, spelt[texts[i]])


def _images_found(train: Mapping[str, ImageHash], heldout: Mapping[str, ImageHash], distance: int) -> Iterator[Example]:
    """An example for every held-out picture that training holds, or one like it."""
    pixels = {found.pixels: name for name, found in train.items()}
    hashes = {found.difference: name for name, found in train.items()}
    # Hashes that differ in at most so many bits agree in one of one more bands than that.
    bands: dict[tuple[int, int], list[int]] = defaultdict(list)
    for known in hashes:
        for band in _bands(known, distance):
            bands[band].append(known)
    like = {}
    for name, found in heldout.items():
        if found.pixels in pixels:
            yield Example("identical", name, pixels[found.pixels])
            continue
        own = found.difference
        if own not in like:
            near = {known for band in _bands(own, distance) for known in bands[band]}
            close = [known for known in near if (known ^ own).bit_count() <= distance]
            like[own] = min(close, key=lambda known: ((known ^ own).bit_count(), known), default=None)
        if like[own] is not None:
            yield Example("similar", name, hashes[like[own]])


def _bands(difference: int, distance: int) -> list[tuple[int, int]]:
    """The 64 bits cut into one more piece than `distance`, with the places of the pieces."""
    cuts = [64 * k // (distance + 1) for k in range(distance + 2)]
    return [(low, difference >> low & ((1 << (high - low)) - 1)) for low, high in pairwise(cuts)]


def _shingles(prompt: str) -> frozenset[tuple[str, str]]:
    """The pairs of neighbouring words of a prompt, its ends included."""
    return frozenset(pairwise(("", *normalised(prompt).split(), "")))
