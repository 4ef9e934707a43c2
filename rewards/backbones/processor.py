"""Images and prompts as encoders read them: pixels of one size, tokens of one length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from PIL.Image import Resampling
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_utils import BaseImageProcessor

from rewards.backbones.base import Picture

_UNSET_LENGTH = 1_000_000  # transformers puts about 1e30 where a tokenizer was saved without a length

_MODES = {Resampling.BILINEAR: "bilinear", Resampling.BICUBIC: "bicubic"}


@dataclass(frozen=True)
class RewardProcessor:
    """A tokenizer and an image processor.

    Every prompt is padded to the tokenizer's full length, so that a score does not depend on its batch-mates.
    The image processor is always the PIL one: it resizes the same with and without torchvision.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: BaseImageProcessor

    @classmethod
    def from_pretrained(cls, folder: str | Path, length: int | None = None) -> Self:
        """The processor saved beside a model: a local folder or a hub id.

        Args:
            length: tokens that every prompt is padded to, where the tokenizer was saved without one.
        """
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if length is not None and tokenizer.model_max_length > _UNSET_LENGTH:
            tokenizer.model_max_length = length
        return cls(tokenizer, AutoImageProcessor.from_pretrained(folder, backend="pil"))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both parts into `folder`, beside the model."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def pixels(self, images: Sequence[Picture], size: int) -> Tensor:
        """Pixels (B, 3, size, size) in fp32. Raises ValueError where the image processor makes another size of one."""
        pixels = self.image_processor(list(images), return_tensors="pt").pixel_values
        if tuple(pixels.shape[-2:]) != (size, size):
            height, width = pixels.shape[-2:]
            raise ValueError(f"image: {width} x {height} pixels, the reward model reads {size} x {size}")
        return pixels

    def read(self, pictures: Tensor) -> Tensor:
        """Pixels (B, 3, size, size) of the values (B, 3, H, W) in [-1, 1] of pictures, with a gradient.

        It follows the image processor up to its rounding to 256 levels. Raises ValueError for one that does more than
        resize, crop and normalise, or resizes otherwise than bilinearly or bicubically.
        """
        told = self.image_processor
        x = (pictures + 1) * (255 / 2)
        if told.do_resize:
            if told.resample not in _MODES:
                raise ValueError(f"image processor: there is no gradient through its resampling, {told.resample}")
            x = F.interpolate(x, _resized(x.shape[-2:], told.size), mode=_MODES[told.resample], antialias=True)
            x = x.clamp(0, 255)
        if getattr(told, "do_center_crop", None):
            height, width = told.crop_size["height"], told.crop_size["width"]
            top, left = (x.shape[-2] - height) // 2, (x.shape[-1] - width) // 2
            if top < 0 or left < 0:
                raise ValueError(f"image processor: it fills pictures up to {width} x {height}, which is not read here")
            x = x[..., top : top + height, left : left + width]
        if told.do_rescale:
            x = x * told.rescale_factor
        if told.do_normalize:
            mean, std = (x.new_tensor(values).view(3, 1, 1) for values in (told.image_mean, told.image_std))
            x = (x - mean) / std
        return x

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, both (B, L) int64. Raises ValueError where a prompt is longer than L."""
        length = self.tokenizer.model_max_length
        found = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, padding_side="right", return_attention_mask=True
        )
        check_lengths(prompts, found["input_ids"], length)
        return {name: torch.tensor(found[name]) for name in ("input_ids", "attention_mask")}


def check_lengths(prompts: Sequence[str], ids: Sequence[Sequence[int]], length: int) -> None:
    """Raises ValueError naming the first prompt of more than `length` tokens."""
    for prompt, found in zip(prompts, ids, strict=True):
        if len(found) > length:
            raise ValueError(f"prompt: {len(found)} tokens, the reward model reads {length}: {prompt[:80]!r}")


def _resized(shape: Sequence[int], size: Mapping[str, int | None]) -> tuple[int, int]:
    """Height and width of a picture of `shape` after an image processor's resizing to `size`."""
    if shortest := size.get("shortest_edge"):
        least = min(shape)
        return tuple(shortest * side // least for side in shape)
    return size["height"], size["width"]
