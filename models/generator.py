"""What the samplers and algorithms may know of a generator, and the native one.

A generator encodes prompts, predicts the velocity of latents, and decodes latents to pictures. Its text encoder
and codec stay frozen; algorithms touch `transformer` alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerBase

from models import lora as adapters
from models.codec import Codec, to_images, to_pixels
from models.mmdit import MMDiT
from models.paths import schedule
from models.samplers import keyed_noise, ode

_PARTS = ("transformer", "codec", "text_encoder", "tokenizer")


@dataclass(frozen=True)
class Conditioning:
    """What a prompt becomes for the network: text tokens (B, L, W_text)."""

    tokens: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Tensor) -> "Conditioning":
        return replace(self, tokens=self.tokens[index])

    def repeated(self, count: int) -> "Conditioning":
        """Each row `count` times in a row."""
        return replace(self, tokens=self.tokens.repeat_interleave(count, 0))

    @staticmethod
    def joined(parts: "Sequence[Conditioning]") -> "Conditioning":
        """The rows of all, one after another."""
        return replace(parts[0], tokens=torch.cat([part.tokens for part in parts]))


class Generator(Protocol):
    """The contract; times run from 1 (noise) to 0 (data) on the path of `models.paths`."""

    transformer: nn.Module
    lora_targets: tuple[str, ...]

    @property
    def latent_shape(self) -> tuple[int, ...]: ...
    @property
    def feature_width(self) -> int: ...
    def encode(self, prompts: Sequence[str]) -> Conditioning: ...
    def predict(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor: ...
    def features(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor: ...
    def pixels(self, latents: Tensor) -> Tensor: ...
    def decode(self, latents: Tensor) -> np.ndarray: ...
    def latents(self, images: np.ndarray) -> Tensor: ...


class NativeGenerator:
    """An MM-DiT on a codec's latents with a small text encoder, saved as diffusers and transformers folders."""

    lora_targets = ("modulation", "qkv", "out", "mlp_in", "mlp_out", "text_in", "pooled_in")

    def __init__(self, transformer: MMDiT, codec: Codec, text_encoder: BertModel, tokenizer: PreTrainedTokenizerBase):
        self.transformer, self.codec = transformer, codec
        self.text_encoder, self.tokenizer = text_encoder, tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "NativeGenerator":
        """Load from a local folder. Raises FileNotFoundError naming the part that is missing."""
        for part in _PARTS:
            if not (Path(folder) / part).is_dir():
                raise FileNotFoundError(f"{folder}: holds no generator (no {part}/ in it)")
        transformer, codec, text_encoder, tokenizer = (Path(folder) / part for part in _PARTS)
        return cls(
            MMDiT.from_pretrained(transformer).eval().requires_grad_(False),
            Codec.from_pretrained(codec).eval().requires_grad_(False),
            BertModel.from_pretrained(text_encoder, add_pooling_layer=False).eval().requires_grad_(False),
            AutoTokenizer.from_pretrained(tokenizer),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        for part in _PARTS:
            getattr(self, part).save_pretrained(Path(folder) / part)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        config = self.transformer.config
        return config.channels, config.size, config.size

    @property
    def device(self) -> torch.device:
        return self.text_encoder.device

    def to(self, device: torch.device | str) -> "NativeGenerator":
        self.transformer.to(device)
        self.codec.to(device)
        self.text_encoder.to(device)
        return self

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Every prompt is padded to the encoder's full length, so its tokens do not depend on its batch."""
        length = self.text_encoder.config.max_position_embeddings
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        encoded = self.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return Conditioning(encoded.last_hidden_state)

    def predict(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """The velocity at `x_t` (B, C, S, S); `t` is a float or (B,)."""
        times = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))
        return self.transformer(x_t, times, cond.tokens)

    @property
    def feature_width(self) -> int:
        return self.transformer.config.width

    def features(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """What the network makes of `x_t` at `t`, a float or (B,), for a small head to read: (B, 2, `feature_width`).

        The mean of the normalised image tokens after the last block, and the time and text that modulated them.
        """
        times = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))
        tokens, modulation = self.transformer.hidden(x_t, times, cond.tokens)  # (B, N, W), (B, W)
        return torch.stack([self.transformer.norm_out(tokens).mean(1), modulation], 1)

    def pixels(self, latents: Tensor) -> Tensor:
        """What `decode` rounds to pictures: (B, 3, H, W) in [-1, 1], with a gradient."""
        return self.codec.decode(latents).clamp(-1, 1)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Pictures: uint8 (B, H, W, 3)."""
        return to_images(self.codec.decode(latents))

    @torch.no_grad()
    def latents(self, images: np.ndarray) -> Tensor:
        """Latents (B, C, S, S) of pictures, uint8 (B, H, W, 3)."""
        return self.codec.encode(to_pixels(images).to(self.device))


def load_generator(folder: str | Path, lora: str | Path | None = None, device: str = "cpu") -> NativeGenerator:
    """A generator ready to sample from, with the LoRA in the folder `lora` merged into its weights if given.

    Where `lora` holds a whole transformer, it takes the place of the generator's.
    """
    generator = NativeGenerator.from_pretrained(folder).to(device)
    if lora is not None and (Path(lora) / "config.json").is_file():
        generator.transformer = MMDiT.from_pretrained(lora).eval().requires_grad_(False).to(device)
    elif lora is not None:
        generator.transformer.load_lora_adapter(lora, weight_name=adapters.WEIGHTS, prefix=None)
        generator.transformer.fuse_lora()
        generator.transformer.unload_lora()
    return generator


@torch.no_grad()
def sample(
    generator: Generator,
    prompts: Sequence[str],
    keys: Sequence[int],
    steps: int = 12,
    shift: float = 1.0,
    batch: int = 64,
) -> Iterator[np.ndarray]:
    """Pictures of `prompts` by the flow ODE, one uint8 (H, W, 3) each, in order; `keys` seed their first noise."""
    times = schedule(steps, shift)
    for start in range(0, len(prompts), batch):
        cond = generator.encode(prompts[start : start + batch])
        x = keyed_noise(list(keys[start : start + batch]), generator.latent_shape, cond.tokens.device)
        for t, s in pairwise(times):
            x = ode(x, generator.predict(x, t, cond), t, s).x
        yield from generator.decode(x)
