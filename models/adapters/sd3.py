"""Stable Diffusion 3 and 3.5 (2403.03206): an MM-DiT on three text encoders.

Left out: the image prompts and skipped layers that the pipeline also takes.
"""

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor, nn

from models.adapters.base import CLIP_TOKENS, DiffusersGenerator
from models.adapters.flows import JOINT_ATTENTION
from models.adapters.options import Options
from models.generator import Conditioning


class SD3Generator(DiffusersGenerator):
    """Guidance 4.5, a LoRA on all projections of the joint attention, as Flow-GRPO (2505.05470) tunes SD3.5-Medium."""

    pipeline = StableDiffusion3Pipeline
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    scale = 4.5
    max_tokens = 256
    lora_targets = JOINT_ATTENTION

    def __init__(self, pipe: DiffusionPipeline, options: Options):
        super().__init__(pipe, options)
        most = self.transformer.config.pos_embed_max_size
        if max(self.grid) > most:
            raise ValueError(
                f"resolution: {max(self.height, self.width)} is above the {most * self.patch * self.cell} pixels that "
                "this network has positions for"
            )

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
