"""Between pictures and the latents that a generator works on: a small convolutional autoencoder.

Latents are bounded and the decoder is trained on noisy ones, so it turns a latent that is not quite right into
a crisp picture, and nearby latents into similar ones: what a diffusion model in them needs (2112.10752,
section 3.1, where a KL term does this). `codec_loss` hands the noisy latents back, so that a caller can ask that what
they show be read from them linearly: latents that carry meaning are learned several times faster (VA-VAE,
2501.01423). Shapes: B batch, S picture size, s = S / 4 latent size, C channels.
"""

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

PATCH = 4


class Residual(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Codec(ModelMixin, ConfigMixin):
    """Pictures (B, 3, S, S) in [-1, 1] to latents (B, C, s, s) in [-`bound`, `bound`], and back."""

    @register_to_config
    def __init__(self, channels: int = 8, width: int = 64, bound: float = 1.2):
        super().__init__()
        pixels = 3 * PATCH * PATCH
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(PATCH),
            nn.Conv2d(pixels, width, 1),
            Residual(width),
            Residual(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            Residual(width),
            Residual(width),
            Residual(width),
            nn.ReLU(),
            nn.Conv2d(width, pixels, 1),
            nn.PixelShuffle(PATCH),
        )

    def encode(self, pixels: Tensor) -> Tensor:
        return self.config.bound * torch.tanh(self.encoder(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


def codec_loss(codec: Codec, pixels: Tensor, noise_key: int, most_noise: float = 0.25) -> tuple[Tensor, Tensor]:
    """Absolute plus squared error of pictures decoded from latents with up to `most_noise`, and these latents."""
    random = torch.Generator().manual_seed(noise_key)
    latents = codec.encode(pixels)
    level = most_noise * torch.rand(len(latents), 1, 1, 1, generator=random)
    noisy = latents + (level * torch.randn(latents.shape, generator=random)).to(latents.device)
    away = codec.decode(noisy) - pixels
    return away.abs().mean() + away.square().mean(), noisy


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """The inverse of `to_pixels`; values outside [-1, 1] are clipped."""
    images = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().numpy()
