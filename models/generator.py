"""What the samplers and algorithms may know of a generator, and the native one.

A generator encodes prompts, predicts the velocity of latents, and decodes latents to pictures. Its text encoder
and codec stay frozen; algorithms touch `transformer` alone.
"""

import copy
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from models.codec import Autoencoder, load_codec, to_images, to_pixels
from models.guidance import NO_GUIDANCE, Guidance, guided
from models.keys import sample_key
from models.layers import Backbone
from models.networks import load_network
from models.paths import FLOW, Parametrisation, schedule
from models.samplers import STOCHASTIC, keyed_noise, walk
from models.text import load_encoder, memory, memory_width

_PARTS = ("transformer", "codec", "text_encoder", "tokenizer")
_PARAMETRISATION = "parametrisation.json"


@dataclass(frozen=True)
class Conditioning:
    """What prompts become for the network: text tokens (B, L, W_text), and by name what else a family wants, B rows."""

    tokens: Tensor
    more: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: slice | Tensor) -> "Conditioning":
        return self.map(lambda values: values[index])

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """With `change` done to every tensor."""
        return Conditioning(change(self.tokens), {name: change(value) for name, value in self.more.items()})

    def repeated(self, count: int) -> "Conditioning":
        """Each row `count` times in a row."""
        return self.map(lambda values: values.repeat_interleave(count, 0))

    @staticmethod
    def joined(parts: "Sequence[Conditioning]") -> "Conditioning":
        """The rows of all, one after another."""
        more = {name: torch.cat([part.more[name] for part in parts]) for name in parts[0].more}
        return Conditioning(torch.cat([part.tokens for part in parts]), more)


class Generator(ABC):
    """The contract; times run from noise (1, or a little less) to 0 (data) on the path of `models.paths`.

    A model that was trained on another path is brought to this one, see `models.adapters.diffusion`.

    Attributes:
        transformer: the network that algorithms tune; text encoders and codec stay frozen.
        lora_targets: names, or endings of names, of the layers that an adapter is put on by default.
        lora_prefix: what the names in a saved adapter begin with, see `models.lora`.
        vp: whether the network was trained on a variance preserving path; `models.inversion` goes back along that.
        guidance, negative: how far `velocity` is moved away from that of which prompt.
        adjusted: what a family makes of a guided prediction and its positive one, see `models.guidance.guided`.
    """

    transformer: nn.Module
    lora_targets: tuple[str, ...]
    lora_prefix: str | None = None
    vp: bool = False
    guidance: Guidance = NO_GUIDANCE
    negative: str = ""
    adjusted: Callable[[Tensor, Tensor], Tensor] | None = None
    _negative: tuple[str, Conditioning] | None = None

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Of one picture."""

    @property
    @abstractmethod
    def pixel_shape(self) -> tuple[int, int]:
        """Height and width of one picture."""

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest of the transformer's weights."""
        return max((weight.dtype for weight in self.transformer.parameters()), key=lambda dtype: torch.finfo(dtype).eps)

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def frozen(self) -> tuple[nn.Module, ...]:
        """What is used beside `transformer` and never learns: text encoders and codec."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Self: ...

    def copied(self, shared: bool = False) -> Self:
        """The same with a transformer of its own, whose weights are the same tensors where they are `shared`; the other
        parts are shared in any case."""
        known = {id(weight): weight for weight in self.transformer.parameters()} if shared else {}
        other = copy.copy(self)
        other.transformer = copy.deepcopy(self.transformer, known)
        return other

    def in_float32(self) -> Self:
        """The same with a transformer whose weights are float32; itself where they are."""
        if self.dtype == torch.float32:
            return self
        other = self.copied()
        other.transformer.float()
        return other

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """What prompts become, a row each; a row does not depend on the others. Raises ValueError, see `check`."""

    def check(self, prompts: Iterable[str]) -> None:
        """Raises ValueError, beginning with `prompts`, where one of them cannot be encoded."""
        return  # most families take any

    def encode_negative(self) -> Conditioning:
        """What the negative prompt becomes, one row: asked for at every call of the network, so it is encoded once and
        stays on the device, and as other prompts are, whatever the caller's autocast."""
        if self._negative is None or self._negative[0] != self.negative or self._negative[1].device != self.device:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self._negative = self.negative, self.encode([self.negative])
        return self._negative[1]

    def velocity(self, network: nn.Module, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """The velocity at `x_t` (B, ...) by `network`, `transformer` or a twin of it; `t` is a float or (B,).

        With classifier-free guidance where there is any, both predictions in one batch.
        """
        predict = partial(self._unguided, network)
        if not self.guidance.needs_negative:
            return predict(x_t, t, cond)
        negative = self.encode_negative().repeated(len(x_t))
        return guided(predict, x_t, t, cond, negative, self.guidance.at(t), self.adjusted)

    @abstractmethod
    def _unguided(self, network: nn.Module, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """The velocity without classifier-free guidance."""

    def predict(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """The velocity by `transformer`."""
        return self.velocity(self.transformer, x_t, t, cond)

    def times(self, steps: int, shift: float) -> list[float]:
        """`steps` + 1 times from noise to 0."""
        return schedule(steps, shift)

    def prior_std(self, t: float) -> float:
        """Of the latents at `t`, the first of `times`, from which pictures are painted: data have variance 1."""
        return math.hypot(1 - t, t)

    @abstractmethod
    def pixels(self, latents: Tensor) -> Tensor:
        """What `decode` rounds to pictures: (B, 3, H, W) in [-1, 1], with a gradient."""

    def decode(self, latents: Tensor, batch: int | None = None) -> np.ndarray:
        """Pictures: uint8 (B, H, W, 3), `batch` at a time."""
        return np.concatenate([to_images(self.pixels(part)) for part in latents.split(batch or len(latents))])

    @abstractmethod
    def latents(self, images: np.ndarray) -> Tensor:
        """Latents (B, ...) of pictures, uint8 (B, H, W, 3). Raises ValueError, see `to_pixels`."""

    def to_pixels(self, images: np.ndarray) -> Tensor:
        """Pictures, uint8 (B, H, W, 3), as (B, 3, H, W) in [-1, 1] on the device.

        Raises ValueError, beginning with `images`, where they are not of the size that is painted.
        """
        height, width = self.pixel_shape
        if images.shape[1:3] != (height, width):
            raise ValueError(
                f"images: {images.shape[2]} x {images.shape[1]} pixels, where the generator paints {width} x {height}; "
                "scale them"
            )
        return to_pixels(images).to(self.device)

    @property
    def feature_width(self) -> int:
        """Of `features`. Raises NotImplementedError where the family has none."""
        raise NotImplementedError

    def features(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """What the network makes of `x_t` at `t`, for a small head to read: (B, 2, `feature_width`)."""
        raise NotImplementedError


def sides(resolution: int | tuple[int, int], multiple: int) -> tuple[int, int]:
    """Height and width of pictures, in pixels; raises ValueError where one is no `multiple`, a token's side."""
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    for pixels in (height, width):
        if pixels < multiple or pixels % multiple:
            below = pixels // multiple * multiple
            near = f"{below} or {below + multiple}" if below else multiple
            raise ValueError(f"resolution: {pixels} is no multiple of {multiple}; take {near}")
    return height, width


class NativeGenerator(Generator):
    """One of our networks on a codec's latents with a small text model, saved as diffusers and transformers folders.

    Attributes:
        size: rows and columns of the latents; those that the transformer was trained on, see `at`.
        parametrisation: what the transformer predicts, and on which path.

    Raises:
        ValueError: the parts do not fit together; the line begins with the name of one.
    """

    def __init__(
        self,
        transformer: Backbone,
        codec: Autoencoder,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        parametrisation: Parametrisation = FLOW,
        guidance: Guidance = NO_GUIDANCE,
        negative: str = "",
    ):
        if codec.channels != (channels := transformer.config.channels):
            raise ValueError(f"codec: its latents have {codec.channels} channels, and the transformer takes {channels}")
        if transformer.config.get("classes"):
            raise ValueError("transformer: it is told class labels, and generators of ours are told text; take another")
        fused, wanted = transformer.reads_language_model, transformer.config.text_width
        if (width := memory_width(text_encoder) if fused else text_encoder.config.hidden_size) != wanted:
            raise ValueError(f"transformer: it takes text of width {wanted}, and that of the text encoder has {width}")
        self.transformer, self.codec = transformer, codec
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.parametrisation, self.guidance, self.negative = parametrisation, guidance, negative
        self.vp = parametrisation.path != "flow"
        self.size: tuple[int, int] = (transformer.config.size,) * 2

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, guidance: Guidance = NO_GUIDANCE, negative: str = ""
    ) -> "NativeGenerator":
        """Load from a local folder, whichever network it holds.

        Raises:
            FileNotFoundError: a part is missing; the line names it.
            ValueError: the weights are not those of the network or the codec that the folder names, see `load_network`
                and `load_codec`, or these do not fit together.
        """
        for part in _PARTS:
            if not (Path(folder) / part).is_dir():
                raise FileNotFoundError(f"{folder}: holds no generator (no {part}/ in it)")
        transformer, codec, text_encoder, tokenizer = (Path(folder) / part for part in _PARTS)
        return cls(
            load_network(transformer),
            load_codec(codec),
            load_encoder(text_encoder).eval().requires_grad_(False),
            AutoTokenizer.from_pretrained(tokenizer),
            _parametrisation_in(Path(folder)),
            guidance,
            negative,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        for part in _PARTS:
            getattr(self, part).save_pretrained(Path(folder) / part)
        if self.parametrisation != FLOW:
            (Path(folder) / _PARAMETRISATION).write_text(json.dumps(asdict(self.parametrisation)) + "\n")

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self.transformer.config.channels, *self.size

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return self.transformer.lora_targets

    def at(self, resolution: int | tuple[int, int]) -> "NativeGenerator":
        """The same generator, its parts shared, for pictures of so many pixels, or (height, width).

        Raises ValueError where they cannot be cut into the codec's and the transformer's patches.
        """
        cell = self.codec.cell
        height, width = sides(resolution, cell * self.transformer.config.patch)
        other = copy.copy(self)
        other.size = height // cell, width // cell
        return other

    @property
    def pixel_shape(self) -> tuple[int, int]:
        return self.codec.cell * self.size[0], self.codec.cell * self.size[1]

    @property
    def device(self) -> torch.device:
        return self.text_encoder.device

    @property
    def frozen(self) -> tuple[nn.Module, ...]:
        return self.codec, self.text_encoder

    def to(self, device: torch.device | str) -> "NativeGenerator":
        for module in (self.transformer, *self.frozen):
            module.to(device)
        return self

    def tokens(self, prompts: Sequence[str]) -> BatchEncoding:
        """Every prompt is padded to the text model's full length, so its tokens do not depend on its batch."""
        length = self.text_encoder.config.max_position_embeddings
        return self.tokenizer(
            list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        tokens = self.tokens(prompts)
        if self.transformer.reads_language_model:
            return Conditioning(memory(self.text_encoder, tokens.input_ids, tokens.attention_mask))
        encoded = self.text_encoder(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        return Conditioning(encoded.last_hidden_state)

    def _unguided(self, network: nn.Module, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        times = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))
        return self.parametrisation.velocity(lambda x, time: self.asked(network, x, time, cond), x_t, times)

    def asked(self, network: nn.Module, x: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        """What `network` predicts at `x` (B, ...) and `times` (B,) of its own path."""
        return network(x, times, cond.tokens)

    def times(self, steps: int, shift: float) -> list[float]:
        return self.parametrisation.times(steps, shift)

    @property
    def feature_width(self) -> int:
        return self.transformer.config.width

    def features(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """What the network makes of `x_t` at `t`, a float or (B,), for a small head to read: (B, 2, `feature_width`).

        The mean of the normalised image tokens after the last block, and the time and text that modulated them.
        """
        times = torch.as_tensor(t, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))
        return self.transformer(*self.parametrisation.inputs(x_t, times), cond.tokens, features=True)

    def pixels(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents).clamp(-1, 1)

    @torch.no_grad()
    def latents(self, images: np.ndarray) -> Tensor:
        """Latents (B, C, S, S) of pictures, uint8 (B, H, W, 3)."""
        return self.codec.encode(self.to_pixels(images))


def _parametrisation_in(folder: Path) -> Parametrisation:
    path = folder / _PARAMETRISATION
    if not path.is_file():
        return FLOW
    told, known = json.loads(path.read_text()), [field.name for field in fields(Parametrisation)]
    if surplus := sorted(told.keys() - set(known)):
        raise ValueError(f"{_PARAMETRISATION}: unknown {', '.join(surplus)}; known here: {', '.join(known)}")
    return Parametrisation(**told)


@torch.no_grad()
def sample(
    generator: Generator,
    prompts: Sequence[str],
    keys: Sequence[int],
    steps: int = 12,
    shift: float = 1.0,
    batch: int = 64,
    sampler: str = "ode",
    eta: float = 0.0,
) -> Iterator[np.ndarray]:
    """Pictures of `prompts`, one uint8 (H, W, 3) each, in order, by a `sampler` of `models.samplers`; `keys` seed their
    first noise, and with its number that of each step."""
    times, shape = generator.times(steps, shift), generator.latent_shape
    for start in range(0, len(prompts), batch):
        cond, mine = generator.encode(prompts[start : start + batch]), list(keys[start : start + batch])

        def drawn(step: int, mine: list[int] = mine, device: torch.device = cond.device) -> Tensor:
            return keyed_noise([sample_key(key, "step", step) for key in mine], shape, device)

        noise = drawn if sampler in STOCHASTIC else None
        x = generator.prior_std(times[0]) * keyed_noise(mine, shape, cond.device)
        yield from generator.decode(walk(partial(generator.predict, cond=cond), x, times, sampler, eta, noise))
