"""Between pictures and the latents that a generator works on.

`Codec` is ours, a small convolutional autoencoder whose latents carry meaning. They are bounded and its decoder is
trained on noisy ones, so it turns a latent that is not quite right into a crisp picture, and nearby latents into
similar ones: what a diffusion model in them needs (2112.10752, section 3.1, where a KL term does this). `codec_loss`
hands the noisy latents back, so that a caller can ask that what they show be read from them linearly: latents that
carry meaning are learned several times faster (VA-VAE, 2501.01423). `DiffusersCodec` is an autoencoder of diffusers,
with a KL term (2112.10752) or of deep compression (2410.10733); `new_vae` and `vae_loss` make a small one of the first
kind. `Identity` leaves pictures as they are. Each is an `Autoencoder`; `load_codec` reads whichever a folder holds.

Shapes: B batch, H W picture size, h w latent size, C channels.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

_CONFIG = "config.json"
_INSIDE = ("", "codec", "vae")
"""Where a codec is: in its own folder, in that of a generator of ours, or of a pipeline of diffusers."""
_THEIRS = ("AutoencoderKL", "AutoencoderDC")
_GROUPS = 8
"""Of the normalisation in a small autoencoder."""


class Autoencoder(Protocol):
    """A module between pictures (B, 3, H, W) in [-1, 1] and latents (B, C, h, w), whose folder says what it is.

    Attributes:
        cell: pixels along a side of a latent's cell, H / h.
        channels: C.
        config: its settings, those of the class that the folder names.
    """

    cell: int
    channels: int
    config: Any

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def save_pretrained(self, folder: str | Path) -> None: ...


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
    """Latents in [-`bound`, `bound`], of cells of 4 x 4 pixels."""

    cell = 4

    @register_to_config
    def __init__(self, channels: int = 8, width: int = 64, bound: float = 1.2):
        super().__init__()
        pixels = 3 * self.cell * self.cell
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(self.cell),
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
            nn.PixelShuffle(self.cell),
        )

    @property
    def channels(self) -> int:
        return self.config.channels

    def encode(self, pixels: Tensor) -> Tensor:
        return self.config.bound * torch.tanh(self.encoder(pixels))

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents)


class Identity(nn.Module, ConfigMixin):
    """The latents are the pixels."""

    config_name = _CONFIG
    cell, channels = 1, 3

    @register_to_config
    def __init__(self) -> None:
        super().__init__()

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        return cls.from_config(cls.load_config(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        self.save_config(folder)


class DiffusersCodec(nn.Module):
    """An `AutoencoderKL` or `AutoencoderDC` of diffusers, and saved as one.

    Latents are those that pipelines of diffusers denoise: the mean of the posterior, less `shift_factor`, times
    `scaling_factor`. Pictures are decoded one by one, so that no picture depends on its batch. What is left out: means
    and deviations by channel, which a few autoencoders have beside these.
    """

    def __init__(self, autoencoder: "diffusers.AutoencoderKL | diffusers.AutoencoderDC"):
        super().__init__()
        self.autoencoder = autoencoder

    @property
    def config(self) -> Any:
        return self.autoencoder.config

    @property
    def cell(self) -> int:
        return compression(self.autoencoder)

    @property
    def channels(self) -> int:
        return self.config.latent_channels

    @property
    def _shift(self) -> float:
        return self.config.get("shift_factor") or 0.0

    def encode(self, pixels: Tensor) -> Tensor:
        return (self._mean(pixels) - self._shift) * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        z = latents / self.config.scaling_factor + self._shift
        return torch.cat([self.autoencoder.decode(one).sample for one in z.split(1)])

    def _mean(self, pixels: Tensor) -> Tensor:
        """Of the posterior, as the autoencoder has it."""
        found = self.autoencoder.encode(pixels)
        return found.latent_dist.mode() if "latent_dist" in found else found.latent

    @torch.no_grad()
    def normalise(self, pixels: Tensor) -> None:
        """Set the factors such that latents of `pixels` have mean 0 and variance 1 (2112.10752, section D.1)."""
        z = self._mean(pixels)
        self.autoencoder.register_to_config(shift_factor=z.mean().item(), scaling_factor=1 / z.std().item())

    def save_pretrained(self, folder: str | Path) -> None:
        self.autoencoder.save_pretrained(folder)


_OURS: dict[str, type[nn.Module]] = {"Codec": Codec, "Identity": Identity}


def compression(autoencoder: nn.Module) -> int:
    """Pixels along a side of a latent's cell, of an autoencoder of diffusers."""
    config = autoencoder.config
    return 2 ** (len(config.get("block_out_channels") or config.encoder_block_out_channels) - 1)


def load_codec(folder: str | Path) -> Autoencoder:
    """The codec in a folder, frozen: its own, or that of the generator or of the pipeline which the folder holds.

    Raises:
        FileNotFoundError: there is no codec, or there are no weights.
        ValueError: it is none of those known here, or its weights are not those that its settings ask for.
    """
    place = _place(Path(folder))
    kind = _class_of(place)
    found = Identity.from_pretrained(place) if kind is Identity else _with_weights(kind, place)
    return _as_codec(found).eval().requires_grad_(False)


def empty_codec(folder: str | Path) -> Autoencoder:
    """The same without its weights, on the meta device. Raises as `load_codec` does, where there is no such codec."""
    place = _place(Path(folder))
    kind = _class_of(place)
    with torch.device("meta"):
        return _as_codec(kind.from_config(kind.load_config(place)))


def same_codec(codec: nn.Module, other: nn.Module) -> bool:
    """Whether two codecs make the same latents of a picture."""

    def settings(module: nn.Module) -> str:
        known = {name: value for name, value in module.config.items() if not name.startswith("_")}
        return json.dumps(known, sort_keys=True)

    if type(codec) is not type(other) or settings(codec) != settings(other):
        return False
    mine, theirs = codec.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _as_codec(module: nn.Module) -> Autoencoder:
    return module if isinstance(module, tuple(_OURS.values())) else DiffusersCodec(module)


def _place(folder: Path) -> Path:
    for name in _INSIDE:
        if (folder / name / _CONFIG).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: holds no codec (no {_CONFIG} in it, in codec/ or in vae/)")


def _class_of(place: Path) -> type[nn.Module]:
    """That which the config in a folder names."""
    name = json.loads((place / _CONFIG).read_text()).get("_class_name", "a network without a name")
    if name in _OURS:
        return _OURS[name]
    if name not in _THEIRS:
        raise ValueError(f"codec: {place} is {name}; known here: {', '.join((*_OURS, *_THEIRS))}")
    return getattr(diffusers, name)


def _with_weights(kind: type[nn.Module], place: Path) -> nn.Module:
    if not any(place.glob("*.safetensors")):
        raise FileNotFoundError(f"{place}: holds no weights (no .safetensors in it)")
    found, told = kind.from_pretrained(
        place, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
    )
    wrong = [name for name, *_ in told["mismatched_keys"]]
    for names, what in ((told["missing_keys"], "lacks"), (told["unexpected_keys"], "also has")):
        if names:
            raise ValueError(f"codec: {place} is no {kind.__name__} of its settings; it {what} {min(names)}")
    if wrong:
        raise ValueError(f"codec: {place}: {min(wrong)} is of another shape than the settings beside it ask for")
    return found


def codec_loss(codec: Codec, pixels: Tensor, noise_key: int, most_noise: float = 0.25) -> tuple[Tensor, Tensor]:
    """Absolute plus squared error of pictures decoded from latents with up to `most_noise`, and these latents."""
    random = torch.Generator().manual_seed(noise_key)
    latents = codec.encode(pixels)
    level = most_noise * torch.rand(len(latents), 1, 1, 1, generator=random)
    noisy = latents + (level * torch.randn(latents.shape, generator=random)).to(latents.device)
    away = codec.decode(noisy) - pixels
    return away.abs().mean() + away.square().mean(), noisy


def new_vae(channels: int, widths: Sequence[int], seed: int) -> DiffusersCodec:
    """An untrained `AutoencoderKL` without attention, each of whose blocks but the last halves a picture's sides.

    Its weights depend on `seed` alone. Raises ValueError where a width cannot be normalised in groups.
    """
    for width in widths:
        if width % _GROUPS:
            raise ValueError(f"widths: {width} is no multiple of {_GROUPS}, the groups of its normalisation")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiffusersCodec(
            diffusers.AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * len(widths),
                up_block_types=("UpDecoderBlock2D",) * len(widths),
                block_out_channels=tuple(widths),
                latent_channels=channels,
                norm_num_groups=_GROUPS,
                scaling_factor=1.0,
                use_quant_conv=False,
                use_post_quant_conv=False,
                mid_block_add_attention=False,
            )
        )


def vae_loss(codec: DiffusersCodec, pixels: Tensor, noise_key: int, kl: float) -> Tensor:
    """Absolute plus squared error of pictures decoded from a draw of the posterior, plus `kl` times its divergence from
    the standard normal, in nats, averaged over latent dimensions (2112.10752, section 3.1; a perceptual and an
    adversarial term are left out)."""
    posterior = codec.autoencoder.encode(pixels).latent_dist
    drawn = posterior.sample(torch.Generator().manual_seed(noise_key))
    away = codec.autoencoder.decode(drawn).sample - pixels
    return away.abs().mean() + away.square().mean() + kl * posterior.kl().sum() / drawn.numel()


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """The inverse of `to_pixels`; values outside [-1, 1] are clipped."""
    images = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).cpu().numpy()
