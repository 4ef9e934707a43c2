"""Qwen-Image (2508.02324): a double-stream MM-DiT on the last hidden states of Qwen2.5-VL.

The pipeline puts prompts into a chat template and drops the states of the template's beginning; texts differ in length,
and their padding is masked. Guided predictions are brought to the length of the positive ones, token by token.
"""

from typing import Any

from diffusers import QwenImagePipeline
from torch import Tensor, nn

from models.adapters.base import DiffusersGenerator
from models.adapters.flows import even, padded, trimmed
from models.adapters.packing import PATCH, packed, unpacked
from models.generator import Conditioning


class QwenImageGenerator(DiffusersGenerator):
    """Guidance 4, a LoRA on all projections of the joint attention.

    Latents are the codec's, normalised by channel: (16, H / 8, W / 8).
    """

    pipeline = QwenImagePipeline
    scale = 4.0
    max_tokens = 512
    patch = PATCH

    @classmethod
    def targets(cls, network: nn.Module) -> tuple[str, ...]:
        """Without what the last block makes of the text, for nothing comes of it."""
        others = range(network.config.num_layers - 1)
        return (
            "attn.to_q",
            "attn.to_k",
            "attn.to_v",
            "attn.to_out.0",
            "attn.add_k_proj",
            "attn.add_v_proj",
            *(f"transformer_blocks.{block}.attn.add_q_proj" for block in others),
            *(f"transformer_blocks.{block}.attn.to_add_out" for block in others),
        )

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.codec.config.z_dim, self.height // self.cell, self.width // self.cell

    def encoded(self, prompts: list[str]) -> Conditioning:
        tokens, mask = self.pipe.encode_prompt(prompts, device=self.device, max_sequence_length=self.max_tokens)
        rows = tokens if mask is None else [row[kept] for row, kept in zip(tokens, mask.bool(), strict=True)]
        return padded(rows, self.max_tokens)

    def asked(self, network: nn.Module, x_t: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        text, mask = trimmed(cond)
        tokens = network(
            hidden_states=packed(x_t),
            timestep=times,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *self.grid)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpacked(tokens, x_t.shape[2])

    def adjusted(self, moved: Tensor, positive: Tensor) -> Tensor:
        tokens, wanted = packed(moved), packed(positive).norm(dim=-1, keepdim=True)
        return unpacked(tokens * (wanted / tokens.norm(dim=-1, keepdim=True)), moved.shape[2])

    def timing(self, steps: int) -> dict[str, Any]:
        if steps == 1 and self.pipe.scheduler.config.shift_terminal:
            raise ValueError("steps: 1 is too few for noise levels that are stretched to a last one; take 2 or more")
        return even(steps, self.mu)

    def decoded(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        frames = (latents * std + mean)[:, :, None]  # (B, C, 1, H, W)
        return self.codec.decode(frames.to(self.codec.dtype), return_dict=False)[0][:, :, 0]

    def compressed(self, pixels: Tensor) -> Tensor:
        z = self.codec.encode(pixels[:, :, None].to(self.codec.dtype)).latent_dist.mode()[:, :, 0]
        mean, std = self._statistics(z)
        return (z - mean) / std

    def _statistics(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of the codec's latents, shaped to broadcast over `z`."""
        config = self.codec.config
        return z.new_tensor(config.latents_mean)[:, None, None], z.new_tensor(config.latents_std)[:, None, None]
