"""Stable Diffusion 3 and 3.5 (2403.03206): an MM-DiT on three text encoders.

Left out: the image prompts and skipped layers that the pipeline also takes.
"""

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor, nn

from models.adapters.base import DiffusersGenerator
from models.adapters.options import Options
from models.generator import Conditioning


class SD3Generator(DiffusersGenerator):
    """Guidance 4.5, a LoRA on all projections of the joint attention, as Flow-GRPO (2505.05470) tunes SD3.5-Medium."""

    pipeline = StableDiffusion3Pipeline
    text_parts = ("text_encoder", "text_encoder_2", "text_encoder_3")
    scale = 4.5
    max_tokens = 256
    lora_targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )

    def __init__(self, pipe: DiffusionPipeline, options: Options):
        super().__init__(pipe, options)
        most = self.transformer.config.pos_embed_max_size
        if max(self.grid) > most:
            raise ValueError(
                f"resolution: {max(self.height, self.width)} is above the {most * self.patch * self.cell} pixels that "
                "this network has positions for"
            )

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
