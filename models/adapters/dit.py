"""DiT (2212.09748): a class-conditional transformer. Prompts are the names of its labels, and "" is none of them."""

import difflib

import diffusers
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from models.adapters.diffusion import DiffusionGenerator
from models.adapters.options import Options
from models.generator import Conditioning


class DiTTransformer2DModel(diffusers.DiTTransformer2DModel, PeftAdapterMixin):
    """That of diffusers, which has no adapters of its own."""


class DiTGenerator(DiffusionGenerator):
    """Guidance 4, as in the pipeline.

    Raises:
        ValueError: the pipeline's files name no labels, or the pictures asked for are not square.
    """

    pipeline = DiTPipeline
    text_parts = ()
    scale = 4.0

    def __init__(self, pipe: DiffusionPipeline, options: Options):
        pipe.transformer.__class__ = DiTTransformer2DModel
        super().__init__(pipe, options)
        if not pipe.labels:
            raise ValueError("checkpoint: model_index.json has no id2label, by which prompts would name the classes")
        names: dict[str, list[str]] = {}
        for name, number in pipe.labels.items():
            names.setdefault(str(number), []).append(name)
        # The pipeline alone would not save them.
        pipe.register_to_config(id2label={number: ", ".join(each) for number, each in names.items()})
        if self.height != self.width:
            raise ValueError(f"resolution: {self.width} x {self.height}, but a DiT paints squares; take one number")

    def encoded(self, prompts: list[str]) -> Conditioning:
        """The numbers of classes, (B,), in place of tokens."""
        return Conditioning(torch.tensor([self.label(prompt) for prompt in prompts], device=self.device))

    def label(self, prompt: str) -> int:
        """The number of a class, by one of its names, whatever the case.

        Raises:
            ValueError: beginning with `prompts`, where no class has that name.
        """
        if not prompt:
            return self.transformer.config.num_embeds_ada_norm
        known = {name.lower(): number for name, number in self.pipe.labels.items()}
        if (name := prompt.strip().lower()) not in known:
            near = difflib.get_close_matches(name, known, 3, 0.0)
            raise ValueError(f"prompts: {prompt!r} is no label of this model; the nearest are {', '.join(near)}")
        return known[name]

    def asked(self, network: nn.Module, x_t: Tensor, timesteps: Tensor, cond: Conditioning) -> Tensor:
        return network(x_t, timestep=timesteps, class_labels=cond.tokens, return_dict=False)[0]

    @property
    def feature_width(self) -> int:
        return self.transformer.inner_dim

    def features(self, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        """The mean of the normalised tokens after the last block, and the time and class that modulated them."""
        network = self.transformer
        (_, tokens), ((told,), _) = self.heard([network.norm_out, network.proj_out_1], x_t, t, cond)
        return torch.stack([tokens.mean(1), told], 1)
