"""The reward as a function of latents that a gradient passes through, for algorithms that follow it.

A reward model reads decoded pictures as floats, before they are rounded to 256 levels; its frozen weights take part
with their derivative. A latent reward whose codec is the generator's reads the latents themselves, and nothing is
decoded.

Shapes: B latents, M terms of a mixture.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.codec import same_codec
from models.generator import Generator
from rewards.backbones import LatentReward, RewardModel
from rewards.mixture import Mixture
from rewards.reward import ModelReward


class Gradient:
    """The weighted sum of the terms of `mixture`, as they are, of what `generator` paints.

    Raises:
        ValueError: a term has no gradient, or reads pictures in a way that passes none; the message begins
            with `reward`.
    """

    def __init__(self, mixture: Mixture, generator: Generator):
        for term in mixture.terms:
            if not isinstance(term.reward, ModelReward) or not term.reward.model.differentiable:
                raise ValueError(
                    f"reward: {term.name} has no gradient; take a reward model that reads pixels or latents"
                )
        self.terms, self.generator = mixture.terms, generator
        self._reads_latents = [_has_codec(term.reward.model, generator) for term in self.terms]
        self._blank()

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """Values (B,) of `latents` (B, ...), each under its prompt."""
        found = []
        for term, reads_latents in zip(self.terms, self._reads_latents, strict=True):
            model = term.reward.model
            seen = latents if reads_latents else model.look(model.read(self.generator.pixels(latents)))
            found.append(term.weight * term.reward.value(seen, prompts))
        return sum(found)

    @torch.no_grad()
    def _blank(self) -> None:
        """Have every model read a picture once, so that one that cannot says so now."""
        device = next(self.generator.transformer.parameters()).device
        pixels = self.generator.pixels(torch.zeros(1, *self.generator.latent_shape, device=device))
        for term in self.terms:
            try:
                term.reward.model.look(term.reward.model.read(pixels))
            except ValueError as error:
                raise ValueError(f"reward: {term.name}: {error}") from None


def _has_codec(model: RewardModel, generator: Generator) -> bool:
    """Whether `model` reads latents, and they are the generator's."""
    return isinstance(model, LatentReward) and same_codec(model.codec, generator.codec)
