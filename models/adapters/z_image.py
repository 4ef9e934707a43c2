"""Z-Image (2511.22699): a single-stream DiT, which image and text tokens go through together, on Qwen3.

The network's time runs from 0 at the noise to 1 at the data, and its prediction from the noise to the data: both are
turned round. It takes a list of texts, each of its own length. The pipeline's guidance scale g stands for
positive + g (positive - negative), which is our scale g + 1; Z-Image-Turbo is distilled and takes none.
"""

from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import Tensor, nn

from models.adapters.base import DiffusersGenerator
from models.adapters.flows import PATCH, even, padded, ragged
from models.generator import Conditioning


class ZImageGenerator(DiffusersGenerator):
    """No guidance, as for Turbo; a LoRA on all projections of the attention."""

    pipeline = ZImagePipeline
    patch_size = PATCH
    max_tokens = 512
    default_resolution = 1024
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    def encoded(self, prompts: list[str]) -> Conditioning:
        rows, _ = self.pipe.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens
        )
        return padded(rows, self.max_tokens)

    def asked(self, network: nn.Module, x_t: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        frames = list(x_t[:, :, None])  # B of (C, 1, H, W)
        reversed_times = (1000 - 1000 * times) / 1000  # rounded as in the pipeline
        return -torch.stack(network(frames, reversed_times, ragged(cond), return_dict=False)[0])[:, :, 0]

    def timing(self, steps: int) -> dict[str, Any]:
        return even(steps, self.mu)

    @property
    def feature_width(self) -> int:
        return self.transformer.dim

    def features(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """The mean of the normalised image tokens after the last block, and how the time scales them."""
        (last,) = self.transformer.all_final_layer.values()
        (_, tokens), (_, scale) = self.heard([last.norm_final, last.adaLN_modulation], x_t, t, cond)
        return torch.stack([tokens[:, : self.tokens].mean(1), scale], 1)
