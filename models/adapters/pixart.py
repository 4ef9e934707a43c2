"""PixArt-alpha (2310.00426) and PixArt-Sigma (2403.04692): a DiT with cross-attention to T5's tokens.

Prompts are lower-cased and stripped; what the pipelines clean away beyond that, where further packages are installed,
and their nearest standard size with a crop to the one asked for, are left out.
"""

import diffusers
import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn
from torch.nn import functional as F

from models.adapters.diffusion import DiffusionGenerator
from models.adapters.options import Options
from models.generator import Conditioning


class PixArtTransformer2DModel(diffusers.PixArtTransformer2DModel, PeftAdapterMixin):
    """That of diffusers, which has no adapters of its own."""


class PixArtGenerator(DiffusionGenerator):
    """PixArt-Sigma, with guidance 4.5, as in the pipeline."""

    pipeline = PixArtSigmaPipeline
    scale = 4.5
    max_tokens = 300

    def __init__(self, pipe: DiffusionPipeline, options: Options):
        pipe.transformer.__class__ = PixArtTransformer2DModel
        super().__init__(pipe, options)

    def encoded(self, prompts: list[str]) -> Conditioning:
        tokens, mask, _, _ = self.pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_tokens,
        )
        return Conditioning(tokens, {"mask": mask})

    def asked(self, network: nn.Module, x_t: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        return network(
            x_t,
            encoder_hidden_states=cond.tokens,
            timestep=times,
            added_cond_kwargs=self.added(x_t),
            encoder_attention_mask=cond.more["mask"],
            return_dict=False,
        )[0]

    def added(self, x_t: Tensor) -> dict[str, Tensor | None]:
        """The pictures' size, for networks that are told it."""
        if not self.transformer.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        told = {"resolution": [self.height, self.width], "aspect_ratio": [self.height / self.width]}
        return {name: torch.tensor(values, device=x_t.device).expand(len(x_t), -1) for name, values in told.items()}

    @property
    def feature_width(self) -> int:
        return self.transformer.inner_dim

    def features(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """The mean of the normalised tokens after the last block, and the time that modulated them."""
        network = self.transformer
        (_, tokens), (_, (_, told)) = self.heard([network.norm_out, network.adaln_single], x_t, t, cond)
        return torch.stack([tokens.mean(1), F.silu(told)], 1)


class PixArtAlphaGenerator(PixArtGenerator):
    """PixArt-alpha, which reads fewer tokens."""

    pipeline = PixArtAlphaPipeline
    max_tokens = 120
