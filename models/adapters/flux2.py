"""FLUX.2: double-stream, then single-stream blocks, on the hidden states of three layers of a language model.

[dev] reads Mistral Small 3 and is distilled: it is told a guidance scale. [klein] reads Qwen3 and is told none: its
base weights take classifier-free guidance, its distilled ones no guidance. Texts are padded to one length, and their
padding is attended to. Left out: the image prompts and the rewriting of prompts that the pipelines also offer.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from models.adapters.base import DiffusersGenerator
from models.adapters.flows import JOINT_ATTENTION, PATCH, even, normalised, restored
from models.adapters.options import Options
from models.generator import Conditioning
from models.guidance import NO_GUIDANCE


class Flux2Generator(DiffusersGenerator):
    """Embedded guidance 4 for [dev], a LoRA on all projections of both kinds of attention.

    Latents are patches of 2 x 2 cells of the codec's, normalised by its batch norm: (128, H / 16, W / 16).
    """

    pipeline = Flux2Pipeline
    patch_size = PATCH
    max_tokens = 512

    @property
    def default_embedded_scale(self) -> float | None:
        return 4.0 if self.transformer.config.guidance_embeds else None

    @classmethod
    def targets(cls, network: nn.Module) -> tuple[str, ...]:
        """Outputs of single-stream blocks by their full names: a double-stream block's `to_out` is a list of layers."""
        singles = range(network.config.num_single_layers)
        return (
            *JOINT_ATTENTION,
            "attn.to_qkv_mlp_proj",
            *(f"single_transformer_blocks.{block}.attn.to_out" for block in singles),
        )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.transformer.config.in_channels, *self.grid

    def encoded(self, prompts: list[str]) -> Conditioning:
        tokens, _ = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=self.max_tokens)
        return Conditioning(tokens)

    def asked(self, network: nn.Module, x_t: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        tokens = network(
            hidden_states=x_t.flatten(2).transpose(1, 2),  # (B, N, C)
            timestep=times,
            guidance=None if self.embedded_scale is None else torch.full_like(times, self.embedded_scale),
            encoder_hidden_states=cond.tokens,
            img_ids=_places(1, *self.grid, 1, device=x_t.device),
            txt_ids=_places(1, 1, 1, cond.tokens.shape[1], device=x_t.device),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).unflatten(2, self.grid)

    def timing(self, steps: int) -> dict[str, Any]:
        return even(steps, compute_empirical_mu(self.tokens, steps))

    def decoded(self, latents: Tensor) -> Tensor:
        cells = F.pixel_shuffle(restored(latents, *self._statistics), PATCH)
        return self.codec.decode(cells.to(self.codec.dtype), return_dict=False)[0]

    def compressed(self, pixels: Tensor) -> Tensor:
        z = F.pixel_unshuffle(self.codec.encode(pixels.to(self.codec.dtype)).latent_dist.mode(), PATCH)
        return normalised(z, *self._statistics)

    @property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of the patches' channels."""
        norm = self.codec.bn
        return norm.running_mean, (norm.running_var.float() + norm.eps).sqrt()


class Flux2KleinGenerator(Flux2Generator):
    """Guidance 4 for base weights, none for distilled ones.

    Raises:
        ValueError: guidance is asked of distilled weights.
    """

    pipeline = Flux2KleinPipeline
    scale = 4.0

    def __init__(self, pipe: DiffusionPipeline, options: Options):
        if pipe.config.is_distilled:
            if options.guidance is not None and options.guidance.needs_negative:
                raise ValueError("guidance: these weights of FLUX.2 [klein] are distilled and take none; leave it out")
            options = replace(options, guidance=NO_GUIDANCE)
        super().__init__(pipe, options)


def _places(*sizes: int, device: torch.device) -> Tensor:
    """Time, row, column and place in the text of each token of a grid of these sizes: (N, 4)."""
    return torch.cartesian_prod(*(torch.arange(size, device=device) for size in sizes))
