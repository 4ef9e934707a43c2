"""Sana (2410.10629): linear attention on the latents of a deep compression autoencoder, on Gemma 2.

Prompts follow an instruction to enhance them, of whose states the pipeline keeps the first; the negative prompt comes
without it. The pipeline draws with DPM-Solver++(2M) on the flow, of which Euler's step is the first order, and counts
time in whole training steps.
"""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SanaPipeline
from torch import Tensor, nn

from models.adapters.base import DiffusersGenerator
from models.adapters.options import Options
from models.generator import Conditioning

_INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class SanaGenerator(DiffusersGenerator):
    """Guidance 4.5, a LoRA on all projections of self- and cross-attention. Latents: (32, H / 32, W / 32).

    Raises:
        ValueError: the pipeline's scheduler is not one of a flow.
    """

    pipeline = SanaPipeline
    scale = 4.5
    max_tokens = 300
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipe: DiffusionPipeline, options: Options):
        super().__init__(pipe, options)
        config = pipe.scheduler.config
        self._whole_steps = not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
        if self._whole_steps and not (config.use_flow_sigmas and config.prediction_type == "flow_prediction"):
            raise ValueError("scheduler: its config is not one of a flow (use_flow_sigmas and flow_prediction)")

    @property
    def default_resolution(self) -> int:
        return self.transformer.config.sample_size * self.cell

    def prior_std(self, t: float) -> float:
        """The pipeline's first latents have variance 1, although their time is a little below 1."""
        return 1.0

    @property
    def manner(self) -> list[Any]:
        """The negative prompt is encoded in another way than others."""
        return [*super().manner, self.options.negative]

    def encoded(self, prompts: list[str]) -> Conditioning:
        (prompt,) = prompts
        tokens, mask, _, _ = self.pipe.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_tokens,
            complex_human_instruction=None if prompt == self.options.negative else _INSTRUCTION,
        )
        return Conditioning(tokens, {"mask": mask.bool()})

    def asked(self, network: nn.Module, x_t: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        timestep = self.pipe.scheduler.config.num_train_timesteps * times
        v = network(
            x_t,
            encoder_hidden_states=cond.tokens,
            encoder_attention_mask=cond.more["mask"],
            timestep=(timestep.floor() if self._whole_steps else timestep) * self.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return v[:, : x_t.shape[1]]  # without the variance that some networks learn

    def decoded(self, latents: Tensor) -> Tensor:
        z = latents / self.codec.config.scaling_factor
        return self.codec.decode(z.to(self.codec.dtype), return_dict=False)[0]

    def compressed(self, pixels: Tensor) -> Tensor:
        return self.codec.encode(pixels.to(self.codec.dtype)).latent * self.codec.config.scaling_factor

    @property
    def feature_width(self) -> int:
        return self.transformer.proj_out.in_features

    def features(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """The mean of the normalised tokens after the last block, and the time that modulates them."""
        network = self.transformer
        (_, tokens), (_, (_, time)) = self.heard([network.norm_out.norm, network.time_embed], x_t, t, cond)
        return torch.stack([tokens.mean(1), F.silu(time)], 1)
