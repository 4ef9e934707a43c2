"""Qwen-Image (2508.02324): a double-stream MM-DiT on the last hidden states of Qwen2.5-VL.

The pipeline puts prompts into a chat template and drops the states of the template's beginning; texts differ in length,
and their padding is masked. Guided predictions are brought to the length of the positive ones, token by token.
"""

from typing import Any

from diffusers import QwenImagePipeline
from torch import Tensor, nn

from models.adapters.base import DiffusersGenerator
from models.adapters.flows import JOINT_ATTENTION, PATCH, even, normalised, padded, restored, trimmed
from models.generator import Conditioning
from models.layers import patched, unpatched

_TEXT_AFTER = ("attn.add_q_proj", "attn.to_add_out")
"""What asks for, and makes, the text that leaves a block."""


class QwenImageGenerator(DiffusersGenerator):
    """Guidance 4, a LoRA on all projections of the joint attention.

    Latents are the codec's, normalised by channel: (16, H / 8, W / 8).
    """

    pipeline = QwenImagePipeline
    patch_size = PATCH
    scale = 4.0
    max_tokens = 512

    @classmethod
    def targets(cls, network: nn.Module) -> tuple[str, ...]:
        """Without what the last block makes of the text, for nothing comes of it."""
        others = range(network.config.num_layers - 1)
        return (
            *(name for name in JOINT_ATTENTION if name not in _TEXT_AFTER),
            *(f"transformer_blocks.{block}.{name}" for name in _TEXT_AFTER for block in others),
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
            hidden_states=patched(x_t, PATCH),
            timestep=times,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *self.grid)]] * len(x_t),
            return_dict=False,
        )[0]
        return unpatched(tokens, PATCH, self.grid[0])

    def adjusted(self, moved: Tensor, positive: Tensor) -> Tensor:
        tokens, wanted = patched(moved, PATCH), patched(positive, PATCH).norm(dim=-1, keepdim=True)
        return unpatched(tokens * (wanted / tokens.norm(dim=-1, keepdim=True)), PATCH, self.grid[0])

    def timing(self, steps: int) -> dict[str, Any]:
        if steps == 1 and self.pipe.scheduler.config.shift_terminal:
            raise ValueError("steps: 1 is too few for noise levels that are stretched to a last one; take 2 or more")
        return even(steps, self.mu)

    def decoded(self, latents: Tensor) -> Tensor:
        frames = restored(latents, *self._statistics)[:, :, None]  # (B, C, 1, H, W)
        return self.codec.decode(frames.to(self.codec.dtype), return_dict=False)[0][:, :, 0]

    def compressed(self, pixels: Tensor) -> Tensor:
        z = self.codec.encode(pixels[:, :, None].to(self.codec.dtype)).latent_dist.mode()[:, :, 0]
        return normalised(z, *self._statistics)

    @property
    def _statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of the codec's channels."""
        return self.codec.config.latents_mean, self.codec.config.latents_std
