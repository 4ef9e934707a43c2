"""What a training step of a reward model reads: the pictures of its pairs, each once, and their prompts.

Where the tower is frozen its features are computed once and held; otherwise other processes decode the pictures of the
next steps.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from models.keys import sample_key
from rewards.backbones import RewardModel, filled

Key = tuple[str, int]  # prompt id and sample number
Picture = Callable[[str, int], np.ndarray | Image.Image]
Dtype = Literal["float32", "bfloat16"]

_MARGINS = ("margin_a", "margin_b")
_ENCODED_AT_ONCE = 32


@dataclass(frozen=True)
class Reader:
    """Pictures, by number, as the tower reads them: (n, ...) in fp32 on the CPU."""

    model: RewardModel
    picture: Picture
    keys: Sequence[Key]

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        return self.model.pixels([self.picture(*self.keys[number]) for number in numbers])


def all_features(read: Reader, dtype: Dtype, workers: int, check_stop: Callable[[], None]) -> Tensor:
    """The features of every image, in main memory; `check_stop` is called between batches and may raise."""
    numbers = range(len(read.keys))
    batches = [numbers[start : start + _ENCODED_AT_ONCE] for start in numbers[::_ENCODED_AT_ONCE]]
    parts = []
    for pixels in DataLoader(batches, batch_size=None, collate_fn=read, num_workers=workers):
        check_stop()
        parts.append(encoded(read.model, pixels, dtype).cpu())
    return torch.cat(parts)


@torch.no_grad()
def encoded(model: RewardModel, pixels: Tensor, dtype: Dtype) -> Tensor:
    """What never changes of images (n, ...), on the model's device.

    It encodes a fixed number at once, so that they are the same to the bit whether cached or not.
    """
    parts = []
    with autocast(model.device, dtype):
        for part in pixels.split(_ENCODED_AT_ONCE):
            features = model.encode(filled(part.to(model.device), _ENCODED_AT_ONCE))
            parts.append(features[: len(part)].float())
    return torch.cat(parts)


def autocast(device: torch.device, dtype: Dtype) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


@dataclass(frozen=True)
class Collator:
    """Gathers a batch of B pairs, of which U images are different; each is read once.

    Attributes:
        shown: image numbers to features, or to pixels (n, ...).
        tokens: those of every prompt, (P, L, ...).
        seed: of the noise in which the model may be trained; both images of a pair have the same.
        noisy: whether it is, so that an image differs from pair to pair.
        bootstrap: what each prompt weighs for each head, (P, M); None where there is one head.
    """

    shown: Callable[[list[int]], Tensor]
    tokens: dict[str, Tensor]
    seed: int
    noisy: bool
    bootstrap: Tensor | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        noisy = self.noisy and "draw" in rows[0]
        keys = [sample_key(self.seed, "noise", row["draw"]) if noisy else 0 for row in rows]
        sides = [[(row[side], row["prompt"], key) for row, key in zip(rows, keys, strict=True)] for side in ("a", "b")]
        place = {one: number for number, one in enumerate(dict.fromkeys(sides[0] + sides[1]))}
        images, prompts, noise = zip(*place, strict=True)
        drawn = {"noise": torch.tensor(noise)} if noisy else {}  # (U,)
        if "draw" in rows[0]:
            drawn["key"] = torch.tensor([sample_key(self.seed, "loss", rows[0]["draw"])])
            if self.bootstrap is not None:
                drawn["bootstrap"] = self.bootstrap[[row["prompt"] for row in rows]]  # (B, M)
        return {
            "first": torch.tensor([place[one] for one in sides[0]]),  # (B,)
            "second": torch.tensor([place[one] for one in sides[1]]),  # (B,)
            "shown": self.shown(list(images)),  # (U, ...)
            "tokens": {name: value[list(prompts)] for name, value in self.tokens.items()},  # (U, L, ...)
            "label": torch.tensor([row["label"] for row in rows]),  # (B,)
            "margin": torch.tensor([row["margin"] for row in rows]),  # (B, 2)
            "weight": torch.tensor([row["weight"] for row in rows]),  # (B,)
            **drawn,
        }


def numbered(pairs: Dataset) -> tuple[Dataset, list[Key], list[str]]:
    """`pairs` with numbers in the place of images and prompts, and what the numbers stand for."""
    first = list(zip(pairs["prompt_id"], pairs["sample_a"], strict=True))
    second = list(zip(pairs["prompt_id"], pairs["sample_b"], strict=True))
    keys = {key: number for number, key in enumerate(dict.fromkeys(first + second))}
    texts = {text: number for number, text in enumerate(dict.fromkeys(pairs["prompt"]))}
    columns = {
        "a": [keys[key] for key in first],
        "b": [keys[key] for key in second],
        "prompt": [texts[text] for text in pairs["prompt"]],
        "label": list(pairs["label"]),
        "weight": list(pairs["weight"]),
        "margin": margins(pairs),
    }
    return Dataset.from_dict(columns), list(keys), list(texts)


def margins(pairs: Dataset) -> np.ndarray:
    """The judge's margins (N, 2) of both images, NaN where the table does not tell."""
    known = [pairs[name] if name in pairs.column_names else [math.nan] * len(pairs) for name in _MARGINS]
    return np.array(known, dtype=np.float32).T
