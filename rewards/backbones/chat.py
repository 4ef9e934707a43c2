"""A chat model that sees pictures, with a head on the last token of what it is told: HPSv3's form (2508.03789).

The model reads picture and prompt through its chat template; the hidden state at the token where its answer would begin
goes through an MLP to the mean of the reward and the logarithm of its standard deviation. HPSv3 (on Qwen2-VL) reads it
at a token of its own that it adds to the vocabulary; the last token of the template serves without one. Its public
weights, Qwen2-VL's with such a token and head, do not load here.

Shapes: B images, S their size in pixels, L tokens of picture and prompt, D width of the language model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from rewards.backbones.base import HEAD, Parts, Picture, RewardModel, filled, mlp
from rewards.backbones.processor import check_lengths
from rewards.losses import Scores

TEMPLATE = (
    "Rate how good this image is as a picture of the following text, considering how well it follows the text and how "
    "well it is made.\nText: {}"
)
HIDDEN = (1024, 16)
"""Widths of the head's hidden layers, as in HPSv3's code."""

_AT_ONCE = 32


class ChatReward(RewardModel):
    """The mean and the uncertainty of a reward, from a model of `AutoModelForImageTextToText`.

    Every picture is scaled to a square, so that pictures take as many tokens as one another. The language model must
    read causally: prompts are padded on the right, behind the token that counts.

    Args:
        network: what of it writes answers is not used.
        processor: with a chat template.
        template: what the model is told, with `{}` where the prompt goes.
        size: pixels a side of every picture.
        length: tokens of picture and prompt together.

    Raises:
        ValueError: the template has no place for the prompt.
    """

    kind = "chat"
    differentiable = False

    def __init__(
        self,
        network: PreTrainedModel,
        head: nn.Sequential,
        processor: ProcessorMixin,
        template: str = TEMPLATE,
        size: int = 448,
        length: int = 512,
    ):
        super().__init__()
        if template.count("{}") != 1:
            raise ValueError(f"template: {template!r} must hold {{}} once")
        self.network, self.head, self.processor = network, head, processor
        self.tokenizer = processor.tokenizer
        self.template, self.size, self.length = template, size, length
        blank = self._pictures([np.zeros((size, size, 3), np.uint8)])
        self._layout = {name: value for name, value in blank.items() if name != "pixel_values"}
        self.eval().requires_grad_(False)

    @classmethod
    def from_checkpoint(cls, folder: str | Path, seed: int = 0, dtype: str = "float32", **settings: Any) -> Self:
        """A chat model from a local folder or a hub id, with a head in fp32 that depends on `seed`.

        Raises:
            ValueError: the checkpoint holds no chat model that sees pictures.
            OSError: `folder` holds no checkpoint.
        """
        network = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        head = mlp((network.config.get_text_config().hidden_size, *HIDDEN, 2), seed, nn.ReLU)
        return cls(network, head, AutoProcessor.from_pretrained(folder, backend="pil"), **settings)

    def pixels(self, images: Sequence[Picture]) -> Tensor:
        """Whatever rows the image processor makes of a picture, (B, rows, ...)."""
        return self._pictures(images)["pixel_values"].unflatten(0, (len(images), -1))

    def look(self, pixels: Tensor) -> Tensor:
        """The pixels: how features reach the language model differs from model to model."""
        return pixels

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        parts = [self._tokens(prompts[start : start + _AT_ONCE]) for start in range(0, len(prompts), _AT_ONCE)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def score(self, features: Tensor, tokens: dict[str, Tensor]) -> Scores:
        layout = {name: filled(value, len(features)).to(features.device) for name, value in self._layout.items()}
        pixels = features.flatten(0, 1).to(self.network.dtype)
        read = self.network.model(**tokens, **layout, pixel_values=pixels, use_cache=False).last_hidden_state
        last = tokens["attention_mask"].sum(1) - 1
        found = self.head(read[torch.arange(len(read), device=read.device), last].float())  # (B, 2)
        return Scores(found[:, 0], found[:, 1])

    @property
    def caches(self) -> bool:
        """Pixels take more memory than they take time."""
        return False

    def parts(self) -> Parts:
        inner, reader = self.network.model, self.network.get_decoder()
        return Parts(
            tower=tuple(module for module in inner.children() if module is not reader),
            stem=(reader.get_input_embeddings(),),
            layers=tuple(reader.layers),
            top=(reader.norm, self.head),
        )

    def networks(self) -> tuple[nn.Module, ...]:
        return (self.network.model,)

    def _tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Of a few: the processor makes pixels of a picture for every one of them."""
        blank = Image.new("RGB", (self.size, self.size))
        made = self.processor(
            text=[self._told(prompt) for prompt in prompts],
            images=[[blank] for _ in prompts],
            padding="max_length",
            max_length=self.length,
            padding_side="right",
            return_tensors=None,
            return_attention_mask=True,
        )
        check_lengths(prompts, made["input_ids"], self.length)
        found = {name: value for name, value in made.items() if name not in ("pixel_values", *self._layout)}
        return {name: torch.as_tensor(np.asarray(value)) for name, value in found.items()}

    def _told(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": self.template.format(prompt)}]
        return self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    def _pictures(self, images: Sequence[Picture]) -> dict[str, Tensor]:
        """What the image processor makes of pictures as squares."""
        pictures = [image if isinstance(image, Image.Image) else Image.fromarray(image) for image in images]
        squares = [p.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC) for p in pictures]
        return dict(self.processor.image_processor(squares, return_tensors="pt"))

    def _save(self, folder: Path) -> dict[str, Any]:
        self.network.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        save_file(self.head.state_dict(), folder / HEAD)
        return {"template": self.template, "size": self.size, "length": self.length}

    @classmethod
    def _load(cls, folder: Path, **settings: Any) -> Self:
        model = cls.from_checkpoint(folder, dtype="auto", **settings)
        model.head.load_state_dict(load_file(folder / HEAD))
        return model
