"""DiT (2212.09748): a class-conditional transformer. Prompts are the names of its labels, and "" is none of them."""

import difflib
from collections.abc import Iterable

import diffusers
import torch
from diffusers import SchedulerMixin
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from models.adapters.diffusion import DiffusionGenerator
from models.adapters.options import Options
from models.generator import Conditioning


class DiTTransformer2DModel(diffusers.DiTTransformer2DModel, PeftAdapterMixin):
    """That of diffusers, which has no adapters of its own."""


class DiTPipeline(diffusers.DiTPipeline):
    """That of diffusers, which forgets `id2label`: of classes with one name it knows the last, and it saves none."""

    def __init__(
        self,
        transformer: nn.Module,
        vae: nn.Module,
        scheduler: SchedulerMixin,
        id2label: dict[str, str] | None = None,
    ):
        super().__init__(transformer, vae, scheduler, id2label)
        self.register_to_config(id2label=id2label)


class DiTGenerator(DiffusionGenerator):
    """Guidance 4, as in the pipeline.

    Raises:
        ValueError: the pipeline's files name no labels, or the pictures asked for are not square.
    """

    pipeline = DiTPipeline
    text_parts = ()
    scale = 4.0

    def __init__(self, pipe: DiTPipeline, options: Options):
        pipe.transformer.__class__ = DiTTransformer2DModel
        super().__init__(pipe, options)
        labels = pipe.config.get("id2label")
        if not labels:
            raise ValueError("checkpoint: model_index.json has no id2label, by which prompts would name the classes")
        self._numbers: dict[str, list[int]] = {}
        for number, names in labels.items():
            for name in (str(number), *names.split(",")):
                self._numbers.setdefault(name.strip().lower(), []).append(int(number))

    @classmethod
    def size(cls, resolution: int | tuple[int, int], cell: int, network: nn.Module) -> tuple[int, int]:
        height, width = super().size(resolution, cell, network)
        if height != width:
            raise ValueError(f"resolution: {width} x {height}, but a DiT paints squares; take one number")
        return height, width

    def encoded(self, prompts: list[str]) -> Conditioning:
        """The numbers of classes, (B,), in place of tokens."""
        return Conditioning(torch.tensor([self.label(prompt) for prompt in prompts], device=self.device))

    def label(self, prompt: str) -> int:
        """The number of a class, by one of its names, whatever the case, or by the number itself.

        Raises:
            ValueError: beginning with `prompts`, where no class has that name, or several have.
        """
        if not prompt:
            return self.transformer.config.num_embeds_ada_norm
        if (name := prompt.strip().lower()) not in self._numbers:
            near = difflib.get_close_matches(name, self._numbers, 3, 0.0)
            raise ValueError(f"prompts: {prompt!r} is no label of this model; the nearest are {', '.join(near)}")
        number, *others = dict.fromkeys(self._numbers[name])
        if others:
            numbers = ", ".join(map(str, (number, *others)))
            raise ValueError(f"prompts: {prompt!r} is a label of the classes {numbers}; give one of these numbers")
        return number

    def check(self, prompts: Iterable[str]) -> None:
        for prompt in prompts:
            self.label(prompt)

    @classmethod
    def text_tokens(cls, max_tokens: int | None = None) -> int:
        """None, but the class."""
        return 0

    def asked(self, network: nn.Module, x_t: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        return network(x_t, timestep=times, class_labels=cond.tokens, return_dict=False)[0]

    @property
    def feature_width(self) -> int:
        return self.transformer.inner_dim

    def features(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """The mean of the normalised tokens after the last block, and the time and class that modulated them."""
        network = self.transformer
        (_, tokens), ((told,), _) = self.heard([network.norm_out, network.proj_out_1], x_t, t, cond)
        return torch.stack([tokens.mean(1), told], 1)
