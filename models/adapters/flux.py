"""FLUX.1 [dev] and [schnell]: double-stream, then single-stream blocks, on CLIP's pooled text and T5's tokens.

[dev] is distilled: it is told a guidance scale and needs no second prediction, so `guidance` is 1 by default.
Left out: the image prompts that the pipeline also takes.
"""

from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn

from models.adapters.base import DiffusersGenerator
from models.adapters.flows import JOINT_ATTENTION, PATCH, even
from models.generator import Conditioning
from models.layers import patched, unpatched


class FluxGenerator(DiffusersGenerator):
    """Embedded guidance 3.5 for [dev], a LoRA on all projections of both kinds of attention."""

    pipeline = FluxPipeline
    patch_size = PATCH
    text_parts = ("text_encoder", "text_encoder_2")
    max_tokens = 512
    lora_targets = JOINT_ATTENTION

    @property
    def default_embedded_scale(self) -> float | None:
        return 3.5 if self.transformer.config.guidance_embeds else None

    def encoded(self, prompts: list[str]) -> Conditioning:
        tokens, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=self.max_tokens)
        return Conditioning(tokens, {"pooled": pooled})

    def asked(self, network: nn.Module, x_t: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        rows, columns = (torch.arange(count, device=x_t.device) for count in self.grid)
        places = torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns)  # (N, 3)
        told = None if self.embedded_scale is None else torch.full_like(times, self.embedded_scale)
        tokens = network(
            hidden_states=patched(x_t, PATCH),
            timestep=times,
            guidance=told,
            pooled_projections=cond.more["pooled"],
            encoder_hidden_states=cond.tokens,
            txt_ids=places.new_zeros(cond.tokens.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return unpatched(tokens, PATCH, self.grid[0])

    def timing(self, steps: int) -> dict[str, Any]:
        return even(steps, self.mu)
