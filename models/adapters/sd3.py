"""Stable Diffusion 3 and 3.5 (2403.03206): an MM-DiT on three text encoders.

Left out: the image prompts and skipped layers that the pipeline also takes.
"""

from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from models.adapters.base import CLIP_TOKENS, DiffusersGenerator
from models.adapters.flows import JOINT_ATTENTION
from models.generator import Conditioning


class SD3Generator(DiffusersGenerator):
    """Guidance 4.5, a LoRA on all projections of the joint attention, as Flow-GRPO (2505.05470) tunes SD3.5-Medium."""

    pipeline = StableDiffusion3Pipeline
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    scale = 4.5
    max_tokens = 256
    lora_targets = JOINT_ATTENTION

    @classmethod
    def size(cls, resolution: int | tuple[int, int], cell: int, network: nn.Module) -> tuple[int, int]:
        found = super().size(resolution, cell, network)
        most = network.config.pos_embed_max_size * cls.patch_of(network) * cell
        if max(found) > most:
            raise ValueError(f"resolution: {max(found)} is above the {most} pixels that this network has positions for")
        return found

    @classmethod
    def text_tokens(cls, max_tokens: int | None = None) -> int:
        """CLIP's, and then T5's."""
        return CLIP_TOKENS + super().text_tokens(max_tokens)

    def encoded(self, prompts: list[str]) -> Conditioning:
        tokens, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_tokens,
        )
        return Conditioning(tokens, {"pooled": pooled})

    def asked(self, network: nn.Module, x_t: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        return network(
            hidden_states=x_t,
            timestep=1000 * times,
            encoder_hidden_states=cond.tokens,
            pooled_projections=cond.more["pooled"],
            return_dict=False,
        )[0]
