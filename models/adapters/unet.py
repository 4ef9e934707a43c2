"""What the families on diffusers' `UNet2DConditionModel` share (Latent Diffusion, 2112.10752, section 3.3)."""

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from models.adapters.diffusion import DiffusionGenerator
from models.adapters.options import Options
from models.generator import Conditioning


class UNetGenerator(DiffusionGenerator):
    """A U-Net on text tokens; a LoRA on all projections of its attention, as DDPO (2305.13301) tunes Stable Diffusion.

    Raises:
        ValueError: the network is distilled to be told a guidance scale.
    """

    network = "unet"

    def __init__(self, pipe: DiffusionPipeline, options: Options):
        super().__init__(pipe, options)
        if self.transformer.config.time_cond_proj_dim is not None:
            raise ValueError(
                "checkpoint: this U-Net is a latent consistency model, which no ODE is behind; take the one it was "
                "distilled from"
            )

    @classmethod
    def patch_of(cls, network: nn.Module) -> int:
        """Latent cells along a side of what its deepest layers see as one."""
        return 2 ** (len(network.config.block_out_channels) - 1)

    def added(self, cond: Conditioning) -> dict[str, Tensor] | None:
        """What the network is told beside time and text tokens."""
        return None

    def asked(self, network: nn.Module, x_t: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        return network(x_t, times, cond.tokens, added_cond_kwargs=self.added(cond), return_dict=False)[0]

    @property
    def feature_width(self) -> int:
        channels = self.transformer.config.block_out_channels
        return max(channels[-1], self.transformer.time_embedding.linear_2.out_features)

    def features(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """The mean of the middle block's cells, and the time (and size and pooled text) that modulates it."""
        [((_, told, *_), cells)] = self.heard([self.transformer.mid_block], x_t, t, cond)
        both = cells.mean((2, 3)), F.silu(told)
        return torch.stack([F.pad(each, (0, self.feature_width - each.shape[1])) for each in both], 1)
