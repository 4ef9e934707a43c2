"""What training and reinforcement learning know of a reward model.

A reward model reads a picture with a tower that sees nothing else, and then prompt and picture together. Where the
tower is frozen its features can be computed once a picture; prompts are tokenised once in any case.

Shapes: B images, H W their size in pixels as the model reads them, L tokens of a prompt, M heads of an ensemble.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rewards.losses import Scores

SETTINGS = "reward.json"
HEAD = "head.safetensors"

Picture = np.ndarray | Image.Image
"""RGB: PIL, or uint8 (H, W, 3)."""


@dataclass(frozen=True)
class Parts:
    """What of a reward model may be trained, on the way from its input to its score.

    Attributes:
        tower: reads the picture alone.
        stem: embeds what else is read.
        layers: the transformer behind, from the first layer to the last.
        top: what makes a score of that; new, or too small to be worth freezing.
    """

    tower: tuple[nn.Module, ...]
    stem: tuple[nn.Module, ...]
    layers: tuple[nn.Module, ...]
    top: tuple[nn.Module | nn.Parameter, ...]


class RewardModel(nn.Module, ABC):
    """Pictures and prompts to scores. It stays in evaluation mode: nothing is dropped and nothing drawn.

    Attributes:
        kind: names the backbone in `reward.json`.
        differentiable: whether `read` gives what `pixels` does, with a gradient.
        tokenizer: that of the prompts.
    """

    kind: ClassVar[str]
    differentiable: ClassVar[bool] = True
    tokenizer: PreTrainedTokenizerBase

    @abstractmethod
    def pixels(self, images: Sequence[Picture]) -> Tensor:
        """What the tower reads of B pictures (B, ...), in fp32 on the CPU. Raises ValueError for a wrong size."""

    def read(self, pictures: Tensor) -> Tensor:
        """What `pixels` makes of pictures, of their values (B, 3, H, W) in [-1, 1], with a gradient."""
        raise NotImplementedError

    @abstractmethod
    def look(self, pixels: Tensor) -> Tensor:
        """Features (B, ...) of `pixels`, by the tower."""

    @abstractmethod
    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What is read of each prompt, (B, L, ...) on the CPU, the same whatever its batch-mates are.

        Raises:
            ValueError: a prompt is longer than L tokens; half a prompt would be judged in silence.
        """

    @abstractmethod
    def score(self, features: Tensor, tokens: dict[str, Tensor]) -> Scores:
        """Scores (B,) of features and prompts."""

    @abstractmethod
    def parts(self) -> Parts:
        """What may be trained."""

    @abstractmethod
    def networks(self) -> tuple[nn.Module, ...]:
        """The modules that do the work, each called once for a score: what is worth compiling."""

    @abstractmethod
    def _save(self, folder: Path) -> dict[str, Any]:
        """Write weights and processors; the settings that `_load` needs besides, as JSON."""

    @classmethod
    @abstractmethod
    def _load(cls, folder: Path, **settings: Any) -> Self:
        """The inverse of `_save`."""

    @property
    def head_count(self) -> int:
        return 1

    def with_heads(self, count: int, seed: int) -> Self:
        """This model, scoring by the mean of so many heads on the same features, new where `seed` makes them so.

        Raises:
            ValueError: the backbone's score is not a head's.
        """
        raise ValueError(f"ensemble: a {self.kind} reward takes one head; set heads to 1, or take another backbone")

    def shift_heads(self, by: Tensor) -> None:
        """Add a constant (M,) to what each of several heads says."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def caches(self) -> bool:
        """Whether the tower is frozen, so that what `encode` gives is worth keeping."""
        return not any(p.requires_grad for module in self.parts().tower for p in module.parameters())

    def encode(self, pixels: Tensor) -> Tensor:
        """What never changes in training: features where the tower is frozen, otherwise the pixels themselves."""
        if not self.caches:
            return pixels
        with torch.no_grad():
            return self.look(pixels)

    def reward(self, features: Tensor, tokens: dict[str, Tensor]) -> Scores:
        """Scores (B,) from what `encode` and `tokens` gave, on the model's device."""
        return self.score(features if self.caches else self.look(features), tokens)

    forward = reward

    @property
    def noisy(self) -> bool:
        """Whether `noised` changes what it is given."""
        return type(self).noised is not RewardModel.noised

    def noised(
        self, features: Tensor, tokens: dict[str, Tensor], keys: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What a training step reads instead of clean pictures; `keys`, one a picture, decide what is drawn."""
        return features, tokens

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything that `load` needs into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"type": self.kind, **self._save(folder)}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """What `save_pretrained` wrote, in the same precision, to the bit.

        Raises:
            FileNotFoundError: `folder` holds no reward model.
            ValueError: it holds one of another backbone.
        """
        settings = saved_settings(folder)
        if (kind := settings.pop("type")) != cls.kind:
            raise ValueError(f"checkpoint: {folder} holds a {kind} reward, not a {cls.kind}")
        return cls._load(Path(folder), **settings).eval()


def saved_settings(folder: str | Path) -> dict[str, Any]:
    """The contents of `reward.json`. Raises FileNotFoundError where there is none."""
    path = Path(folder) / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: holds no reward model (no {SETTINGS} in it)")
    return json.loads(path.read_text(encoding="utf-8"))


def filled(rows: Tensor, size: int) -> Tensor:
    """`rows` (n, ...) brought to (size, ...) by repeating the first.

    Matrix products round differently for different numbers of rows; at one size, a row's result is its own.
    """
    return torch.cat([rows, rows[:1].expand(size - len(rows), *rows.shape[1:])])


class Heads(nn.ModuleList):
    """M heads on the same features (B, ..., W): what each of them says, (B, ..., M)."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([head(features) for head in self], dim=-1)

    @torch.no_grad()
    def shift(self, by: Tensor) -> None:
        for head, constant in zip(self, by, strict=True):
            head[-1].bias += constant


def spread(weight: Tensor, count: int, seed: int) -> Tensor:
    """Copies (count, ...) of `weight` that differ by Gaussian noise of its size and have it as their mean."""
    noise = torch.randn(count, *weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight + weight.square().mean().sqrt() * (noise - noise.mean(dim=0)).to(weight)


def mlp(widths: Sequence[int], seed: int, activation: type[nn.Module] = nn.Identity) -> nn.Sequential:
    """New linear layers, in fp32, from each width to the next, with `activation` between them."""
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for inner, outer in pairwise(widths):
            layers += [nn.Linear(inner, outer), activation()]
    return nn.Sequential(*layers[:-1])
