"""What the adapters of diffusers pipelines share: parts, guidance, schedule, offload, conditionings of known prompts.

A family's file names its pipeline and says how a prompt is encoded (`encoded`) and how the network is asked
(`asked`). Where its latents or its schedule are not those of `DiffusersGenerator`, it overrides `latent_shape`,
`decoded` and `compressed`, or `timing`. The pipeline's own loop is never run: its parts and methods are used.
"""

import contextlib
import copy
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

from models.adapters.options import Options
from models.adapters.prompts import PromptCache
from models.codec import to_images
from models.generator import Conditioning, Generator, sides
from models.guidance import Guidance
from models.paths import shifted

CLIP_TOKENS = 77
"""To which CLIP's prompts are cut and padded."""


class DiffusersGenerator(Generator):
    """A text-to-image pipeline of diffusers, brought to the flow's path.

    Attributes:
        pipe: the pipeline, for its parts and methods.
        height, width: of pictures, in pixels.

    Class attributes, of a family:
        pipeline: the class of its pipelines.
        network: the name of the pipeline's part that is tuned.
        text_parts: the names of its text encoders.
        patch_size: latent cells along a side of a token, where the network's settings do not tell.
        loading: what the pipeline is told when it is loaded, such as which of its parts stay away.
        scale, max_tokens: what None stands for in `Options`, as are the properties `default_...`. Without `max_tokens`
            the family's text encoders have one length.

    Raises:
        ValueError: an option does not suit the family; the message begins with the option's name.
    """

    pipeline: ClassVar[type[DiffusionPipeline]]
    network: ClassVar[str] = "transformer"
    text_parts: ClassVar[tuple[str, ...]] = ("text_encoder",)
    patch_size: ClassVar[int | None] = None
    loading: ClassVar[Mapping[str, Any]] = {}
    scale: ClassVar[float] = 1.0
    max_tokens: ClassVar[int | None] = None

    def __init__(self, pipe: DiffusionPipeline, options: Options):
        self.pipe, self.options = pipe, options
        self.codec: nn.Module = pipe.vae
        self.text_encoders = [part for name in self.text_parts if (part := getattr(pipe, name)) is not None]
        self.lora_prefix = self.network
        self.lora_targets = self.targets(self.transformer)
        self.guidance, self.negative = options.guidance or Guidance(self.scale), options.negative
        if options.embedded_guidance is not None and self.default_embedded_scale is None:
            raise ValueError("embedded_guidance: this network is told none; set guidance, or leave it out")
        if options.max_tokens is not None and self.max_tokens is None:
            raise ValueError("max_tokens: this family's text encoders have one length; leave it out")
        if options.codec_dtype == "float16" and self.codec.config.get("force_upcast"):
            raise ValueError("codec_dtype: this codec overflows in float16; take float32 or bfloat16")
        told = options.embedded_guidance
        self.embedded_scale = self.default_embedded_scale if told is None else told
        self.max_tokens = options.max_tokens or self.max_tokens
        self.height, self.width = self.size(options.resolution or self.default_resolution, self.cell, self.transformer)
        for module in (self.transformer, *self.frozen):
            module.eval().requires_grad_(False)
        self.codec.enable_slicing()  # a picture does not depend on its batch
        self._known = PromptCache(self.manner, options)

    @classmethod
    def targets(cls, network: nn.Module) -> tuple[str, ...]:
        """The `lora_targets` of a generator with that network."""
        return cls.lora_targets

    @classmethod
    def text_tokens(cls, max_tokens: int | None = None) -> int:
        """How many tokens of text the network hears at most, of prompts that are cut to `max_tokens`."""
        return max_tokens or cls.max_tokens or CLIP_TOKENS

    @classmethod
    def patch_of(cls, network: nn.Module) -> int:
        """Latent cells along a side of one of the network's tokens."""
        return cls.patch_size or network.config.patch_size

    @classmethod
    def size(cls, resolution: int | tuple[int, int], cell: int, network: nn.Module) -> tuple[int, int]:
        """Height and width of pictures, in pixels, of whose sides `cell` are one latent cell.

        Raises ValueError, beginning with `resolution`, where the network paints none such.
        """
        return sides(resolution, cell * cls.patch_of(network))

    @property
    def transformer(self) -> nn.Module:
        """The pipeline's part that is tuned. Another one makes it another pipeline, which shares the other parts."""
        return getattr(self.pipe, self.network)

    @transformer.setter
    def transformer(self, network: nn.Module) -> None:
        self.pipe = copy.copy(self.pipe)
        vars(self.pipe)[self.network] = network  # the index keeps the name that diffusers knows the class by

    @property
    def manner(self) -> list[Any]:
        """All that a prompt's conditioning depends on, besides the prompt and the text encoders' weights."""
        return [self.max_tokens, self.options.text_dtype]

    @property
    def default_resolution(self) -> int:
        return self.pipe.default_sample_size * self.cell

    @property
    def default_embedded_scale(self) -> float | None:
        """None where the network is not told a guidance scale."""
        return None

    @property
    def cell(self) -> int:
        """Pixels along a side of one latent cell."""
        return self.pipe.vae_scale_factor

    @property
    def patch(self) -> int:
        return self.patch_of(self.transformer)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.codec.config.latent_channels, self.height // self.cell, self.width // self.cell

    @property
    def pixel_shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the network's tokens."""
        return self.height // self.cell // self.patch, self.width // self.cell // self.patch

    @property
    def tokens(self) -> int:
        """Of the network, for one picture."""
        return math.prod(self.grid)

    @property
    def device(self) -> torch.device:
        return next(self.transformer.parameters()).device

    @property
    def frozen(self) -> tuple[nn.Module, ...]:
        return self.codec, *self.text_encoders

    def to(self, device: torch.device | str) -> Self:
        self.transformer.to(device)
        for module in self.frozen:
            module.to("cpu" if self.options.offload else device)
        return self

    def in_float32(self) -> Self:
        other = super().in_float32()
        if other is not self:
            other.options = replace(self.options, dtype="float32")
        return other

    @abstractmethod
    def encoded(self, prompts: list[str]) -> Conditioning:
        """What prompts become, by the pipeline's text encoders, which are on the device; a row each, of one length."""

    @abstractmethod
    def asked(self, network: nn.Module, x_t: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        """What `network` predicts at `x_t` (B, ...) and `times` (B,) of its own path, which is the flow's velocity, or
        in a `DiffusionGenerator` what that says; without classifier-free guidance.

        `x_t` and `cond` have the dtype of the network's weights, `times` are float32.
        """

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """A prompt is encoded alone and once: its row depends on nothing else."""
        return Conditioning.joined(self._known(prompts, self._encoded_alone)).map(lambda values: values.to(self.device))

    @torch.no_grad()
    def _encoded_alone(self, prompts: Sequence[str]) -> Iterator[Conditioning]:
        """Each by itself; the text encoders come to the device once for all."""
        with self._awake(*self.text_encoders), torch.autocast(self.device.type, enabled=False):
            for prompt in prompts:
                yield self.encoded([prompt])

    def _unguided(self, network: nn.Module, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).expand(len(x_t))
        return self._predicted(network, x_t, times, cond)

    def _predicted(self, network: nn.Module, x_t: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        """What is `asked` in the dtype of the network's weights, in that of `x_t`."""
        dtype = getattr(torch, self.options.dtype)
        told = cond.map(lambda values: values.to(dtype) if values.is_floating_point() else values)
        return self.asked(network, x_t.to(dtype), times, told).to(x_t.dtype)

    def times(self, steps: int, shift: float) -> list[float]:
        """`steps` + 1 times of the family's own schedule; a `shift` other than 1 comes on top of the schedule's."""
        return [shifted(t, shift) for t in self.sigmas(steps)]

    def sigmas(self, steps: int) -> list[float]:
        """`steps` + 1 noise levels from 1 to 0, as the pipeline's loop would ask its scheduler for them."""
        if steps < 1:
            raise ValueError(f"steps: {steps} is below 1")
        self.pipe.scheduler.set_timesteps(steps, **self.timing(steps))
        return self.pipe.scheduler.sigmas.tolist()

    def timing(self, steps: int) -> dict[str, Any]:
        """What the pipeline's loop tells `set_timesteps` of its scheduler beside the number of steps."""
        return {"mu": self.mu} if self.pipe.scheduler.config.use_dynamic_shifting else {}

    @property
    def mu(self) -> float:
        """The shift towards noise that grows with the number of tokens, as the scheduler's settings tell (FLUX.1)."""
        config = self.pipe.scheduler.config
        share = (self.tokens - config.base_image_seq_len) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + share * (config.max_shift - config.base_shift)

    def pixels(self, latents: Tensor) -> Tensor:
        with self._awake(self.codec, stay=latents.requires_grad):
            return self._shown(latents)

    def decode(self, latents: Tensor, batch: int | None = None) -> np.ndarray:
        """The codec comes to the device once for all."""
        with self._awake(self.codec):
            return np.concatenate([to_images(self._shown(part)) for part in latents.split(batch or len(latents))])

    def _shown(self, latents: Tensor) -> Tensor:
        return self.decoded(latents).to(latents.dtype).clamp(-1, 1)

    @torch.no_grad()
    def latents(self, images: np.ndarray) -> Tensor:
        """The mean of the codec's latents (B, ...) of pictures, uint8 (B, H, W, 3)."""
        pixels = self.to_pixels(images)
        with self._awake(self.codec):
            return self.compressed(pixels).to(pixels.dtype)

    def decoded(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) by the codec, which is on the device."""
        config = self.codec.config
        z = latents / config.scaling_factor + (config.shift_factor or 0)
        return self.codec.decode(z.to(self.codec.dtype), return_dict=False)[0]

    def compressed(self, pixels: Tensor) -> Tensor:
        """The inverse of `decoded`, as far as the codec is one."""
        config = self.codec.config
        z = self.codec.encode(pixels.to(self.codec.dtype)).latent_dist.mode()
        return (z - (config.shift_factor or 0)) * config.scaling_factor

    @property
    def feature_width(self) -> int:
        return self._last_norm.linear.out_features // 2

    def features(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """The mean of the normalised image tokens after the last block, and the time and text that modulate them."""
        last = self._last_norm
        (_, tokens), (_, modulation) = self.heard([last.norm, last.silu], x_t, t, cond)  # (B, N, W), (B, W)
        return torch.stack([tokens.mean(1), modulation], 1)

    def heard(
        self, modules: Sequence[nn.Module], x_t: Tensor, t: float | Tensor, cond: Conditioning
    ) -> list[tuple[tuple[Any, ...], Any]]:
        """What `modules` of the network are given and return while it is asked."""
        found: dict[nn.Module, tuple[tuple[Any, ...], Any]] = {}

        def keep(module: nn.Module, given: tuple[Any, ...], returned: Any) -> None:
            found[module] = given, returned

        hooks = [module.register_forward_hook(keep) for module in modules]
        try:
            self._unguided(self.transformer, x_t, t, cond)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[module] for module in modules]

    @property
    def _last_norm(self) -> AdaLayerNormContinuous:
        for module in self.transformer.children():
            if isinstance(module, AdaLayerNormContinuous):
                return module
        raise NotImplementedError(f"{type(self.transformer).__name__} has no features for a critic")

    @contextlib.contextmanager
    def _awake(self, *modules: nn.Module, stay: bool = False) -> Iterator[None]:
        """Within the block `modules` are on the device. They `stay` there where a gradient will come back to them."""
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            if self.options.offload and not stay:
                for module in modules:
                    module.to("cpu")
