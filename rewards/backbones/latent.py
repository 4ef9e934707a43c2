"""A reward on the generator's own backbone: latents, half-denoised ones too, at a time of the flow.

DiNa-LRM's idea (2602.11146): the transformer that paints also knows how a picture looks at every noise level, so a
head on its features scores latents without decoding them. Here the features are the image tokens of the native MM-DiT
after its last block, which time and prompt modulate; a head on each token, averaged, is the reward. What is left out:
features of several layers, and the mean over several draws of noise when a picture is read; clean pictures are read as
they are.

Shapes: B latents, C channels, S their size, N image tokens, W width, L text tokens, M heads.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.codec import to_pixels
from models.generator import Conditioning, NativeGenerator
from models.keys import sample_key
from models.paths import noised
from models.samplers import keyed_noise
from rewards.backbones.base import HEAD, Heads, Parts, Picture, RewardModel, mlp
from rewards.backbones.processor import check_lengths
from rewards.losses import Scores

_TEXTS_AT_ONCE = 32


class LatentReward(RewardModel):
    """A scalar reward of latents at times in [0, 1]; pictures are encoded first, and read at time 0.

    The codec and the text encoder stay frozen. In training each pair is read at a time of its own, uniform from 0 to
    `most_noise`, both pictures with the same noise.

    Args:
        head: (B, N, W) -> (B, N, M).

    Raises:
        ValueError: `most_noise` is no time.
    """

    kind = "latent"

    def __init__(self, generator: NativeGenerator, head: nn.Sequential | Heads, most_noise: float = 0.5):
        super().__init__()
        if not 0 <= most_noise <= 1:
            raise ValueError(f"most_noise: {most_noise} is no time from 0 to 1")
        self.generator = generator
        self.transformer, self.codec, self.text_encoder = generator.transformer, generator.codec, generator.text_encoder
        self.head, self.most_noise = head, most_noise
        self.tokenizer = generator.tokenizer
        self.eval().requires_grad_(False)

    @classmethod
    def from_checkpoint(cls, folder: str | Path, seed: int = 0, most_noise: float = 0.5) -> Self:
        """A new head, which depends on `seed`, on the generator in a folder that `models.load_generator` reads.

        Raises:
            FileNotFoundError: `folder` holds no generator.
        """
        generator = NativeGenerator.from_pretrained(folder)
        return cls(generator, _head(generator.transformer.config.width, seed), most_noise)

    def pixels(self, images: Sequence[Picture]) -> Tensor:
        pictures = [np.asarray(image) for image in images]
        for picture in pictures:
            self._check(*picture.shape[:2])
        return to_pixels(np.stack(pictures))

    def read(self, pictures: Tensor) -> Tensor:
        self._check(*pictures.shape[2:])
        return pictures

    def _check(self, height: int, width: int) -> None:
        """Raises ValueError where pictures are not of the size that the generator was trained on."""
        if (height, width) != (shape := self.generator.pixel_shape):
            raise ValueError(f"image: {width} x {height} pixels, the reward model reads {shape[1]} x {shape[0]}")

    def look(self, pixels: Tensor) -> Tensor:
        """Latents (B, C, S, S)."""
        return self.codec.encode(pixels)

    @torch.no_grad()
    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The encoded `text` (B, L, W). So many prompts are always encoded at once: a row does not depend on others."""
        length = self.text_encoder.config.max_position_embeddings
        check_lengths(prompts, self.tokenizer(list(prompts)).input_ids, length)
        found = []
        for start in range(0, len(prompts), _TEXTS_AT_ONCE):
            part = list(prompts[start : start + _TEXTS_AT_ONCE])
            padded = part + part[:1] * (_TEXTS_AT_ONCE - len(part))
            found.append(self.generator.encode(padded).tokens[: len(part)].cpu())
        return {"text": torch.cat(found)}

    def score(self, features: Tensor, tokens: dict[str, Tensor]) -> Scores:
        """At the times `t` (B,) of `tokens`, where they have any."""
        t = tokens.get("t")
        times = features.new_zeros(len(features)) if t is None else t
        read, _ = self.transformer.hidden(features, times, tokens["text"])  # (B, N, W)
        return Scores.of_heads(self.head(read).mean(dim=1), noise=t)

    def score_latents(self, latents: Tensor, t: float | Tensor, cond: Conditioning) -> Scores:
        """Scores (B,) of latents (B, C, S, S) at time `t`, a float or (B,), under prompts that the generator encoded.

        Gradients reach the latents.
        """
        times = torch.as_tensor(t, dtype=latents.dtype, device=latents.device).expand(len(latents))
        return self.score(latents, {"text": cond.tokens, "t": times})

    def noised(
        self, features: Tensor, tokens: dict[str, Tensor], keys: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        drawn = [torch.rand(1, generator=torch.Generator().manual_seed(sample_key(key, "time"))) for key in keys]
        t = self.most_noise * torch.cat(drawn).to(features.device)
        noise = keyed_noise(list(keys), tuple(features.shape[1:]), features.device)
        return noised(features, noise, t), {**tokens, "t": t}

    @property
    def head_count(self) -> int:
        return len(self.head) if isinstance(self.head, Heads) else 1

    def with_heads(self, count: int, seed: int) -> Self:
        self.head = Heads(_head(self.transformer.config.width, sample_key(seed, head)) for head in range(count))
        self.head.requires_grad_(False)
        return self

    def shift_heads(self, by: Tensor) -> None:
        self.head.shift(by)

    def parts(self) -> Parts:
        body = self.transformer
        return Parts(tower=(), stem=body.stem, layers=tuple(body.blocks), top=(self.head,))

    def networks(self) -> tuple[nn.Module, ...]:
        return ()

    def _save(self, folder: Path) -> dict[str, Any]:
        self.generator.save_pretrained(folder)
        save_file(self.head.state_dict(), folder / HEAD)
        heads = {"heads": len(self.head)} if isinstance(self.head, Heads) else {}
        return {"most_noise": self.most_noise, **heads}

    @classmethod
    def _load(cls, folder: Path, heads: int = 1, **settings: Any) -> Self:
        model = cls.from_checkpoint(folder, **settings)
        if heads > 1:
            model.with_heads(heads, seed=0)
        model.head.load_state_dict(load_file(folder / HEAD))
        return model


def _head(width: int, seed: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(width), *mlp((width, width, 1), seed, nn.GELU))
