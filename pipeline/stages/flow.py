"""What `pretrain` and its ablations share: training a network on latents of renderings, and measuring it."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from judges.shapes.grammar import SKILLS, Prompt, change_one, sample_prompt, vocabulary
from judges.shapes.oracle import gold
from judges.shapes.render import SIZE, render, scene_of
from models.codec import Autoencoder, to_images, to_pixels
from models.generator import NativeGenerator, sample
from models.keys import sample_key
from models.layers import Backbone
from models.objectives import Objective, Times, Weight
from models.paths import Parametrisation, PathName, Prediction
from models.pretrain import Batch, new_generator, new_network, pretraining_loss
from models.text import reading_loss
from pipeline.compiling import compile_module
from pipeline.networks import NetworkConfig
from pipeline.progress import Progress
from pipeline.prompts import SkillWeights
from pipeline.settings import Section
from pipeline.training import Average, hybrid_optimizers, steps_done, train, trapezoid


class Optimisation(Section):
    """Muon's learning rate for hidden matrices, AdamW's for the rest, and the moving average of the weights."""

    matrix_lr: float = Field(3e-3, gt=0)
    lr: float = Field(1e-3, gt=0)
    average: float = Field(0.998, ge=0, lt=1)
    save_every: int = Field(100, ge=1)


class ObjectiveConfig(Section):
    """What the network is trained on; see `models.objectives` and `models.paths`.

    As it stands it is flow matching. Diffusion is `{path: vp, prediction: eps, times: uniform}`, score matching
    `{path: vp, prediction: score, times: uniform, weight: simple}`.

    Attributes:
        path: between pictures and noise; `prediction`: what the network predicts on it.
        times: how they are drawn; `mean` and `std` are those of `logit-normal`, `heavy` is how much `mode` prefers the
            middle.
        weight: how much an error counts; `gamma` bounds it for `min-snr`.
    """

    path: PathName = "flow"
    prediction: Prediction = "velocity"
    times: Times = "logit-normal"
    mean: float = 0.0
    std: float = Field(1.0, gt=0)
    heavy: float = Field(1.29, ge=-1, le=1.75)
    weight: Weight = "plain"
    gamma: float = Field(5.0, gt=0)

    @property
    def parametrisation(self) -> Parametrisation:
        return Parametrisation(self.path, self.prediction)

    def build(self) -> Objective:
        return Objective(**self.model_dump(exclude={"path", "prediction"}))


class FlowConfig(Section):
    """A network on a codec's latents of `pictures` renderings, and on their captions.

    Skills are drawn by `weights`, evenly where they are null. It sees true captions for `clean_steps`, and then for
    `noisy_steps` captions of which a share `noise` has one attribute changed. Of a share `unconditional` it is told
    nothing, which classifier-free guidance takes. Where it is fused with a language model, that reads captions for
    `language_steps` first, and is then frozen.
    """

    type: str
    pictures: int = Field(60000, ge=1)
    weights: SkillWeights | None = None
    width: int = Field(96, ge=1)
    depth: int = Field(4, ge=1)
    text_depth: int = Field(1, ge=1)
    max_tokens: int = Field(12, ge=1)
    batch: int = Field(128, ge=1)
    clean_steps: int = Field(4500, ge=0)
    noisy_steps: int = Field(1500, ge=0)
    noise: float = Field(0.4, ge=0, le=1)
    unconditional: float = Field(0.0, ge=0, lt=1)
    language_steps: int = Field(500, ge=1)
    objective: ObjectiveConfig = ObjectiveConfig()
    compile: bool = True
    optimisation: Optimisation = Optimisation()

    def check(self, network: NetworkConfig, codec: Autoencoder) -> Backbone:
        """The network for a codec's latents, without its weights. Raises ValueError where it does not take such."""
        if self.width % 32:
            raise ValueError(f"width: {self.width} is no multiple of 32, the width of a head")
        with torch.device("meta"):
            return new_network(network.network, codec, SIZE, self.width, self.depth, network.choices)

    def new_generator(self, network: NetworkConfig, seed: int, codec: Autoencoder | None = None) -> NativeGenerator:
        """Untrained, but for the `codec` if there is one; it depends on `seed` alone."""
        sizes = self.width, self.depth, self.text_depth, self.max_tokens
        chosen = network.network, network.choices
        return new_generator(vocabulary(), SIZE, *sizes, seed, self.objective.parametrisation, *chosen, codec)


@dataclass(frozen=True)
class Gallery:
    """Prompts and the latents (P, C, S, S) of a rendering of each."""

    prompts: Sequence[Prompt]
    latents: Tensor


def gallery_of(
    codec: Autoencoder, pictures: int, seed: int, progress: Progress, weights: Mapping[str, int] | None = None
) -> Gallery:
    """Of the `train` split, by `weights` of skills."""

    def drawn_by(rng: random.Random) -> Prompt:
        skill = rng.choices(list(weights), list(weights.values()))[0] if weights else None
        return sample_prompt(rng, "train", skill)

    prompts, latents = [], []
    with progress.track(pictures, "pictures", "gallery", 0) as advance:
        for start in range(0, pictures, 256):
            rng = random.Random(sample_key(seed, "gallery", start))
            drawn = [drawn_by(rng) for _ in range(min(256, pictures - start))]
            images = render([scene_of(prompt, rng, lattice=True) for prompt in drawn])
            with torch.no_grad():
                latents.append(codec.encode(to_pixels(images)))
            prompts += drawn
            advance(len(drawn))
    return Gallery(prompts, torch.cat(latents))


def captions_of(prompts: Sequence[Prompt], noise: float, rng: random.Random, unconditional: float = 0.0) -> list[str]:
    """The texts of `train` prompts, a share `noise` of them with one attribute changed, within the split: held-out
    prompts are neither shown nor lied about. Of a share `unconditional` nothing is told."""
    told = [(change_one(p, rng, "train") if rng.random() < noise else p).text for p in prompts]
    return ["" if unconditional and rng.random() < unconditional else text for text in told]


def run_task(
    name: str,
    loss_at: Callable[[int], Tensor],
    modules: Mapping[str, nn.Module],
    steps: int,
    decay: int,
    settings: Optimisation,
    folder: Path,
    progress: Progress,
) -> None:
    """Train for one task, going on where it was cut off, and leave the averaged weights in `modules`."""
    optimizers = hybrid_optimizers(modules, settings.matrix_lr, settings.lr)
    average = Average(modules, settings.average)
    recent: list[float] = []
    with progress.track(steps, "steps", name, steps_done(folder / name)) as advance:

        def on_step(step: int, loss: float) -> None:
            recent.append(loss)
            advance(1, loss=float(np.mean(recent[-50:])))

        train(
            loss_at,
            modules,
            optimizers,
            steps,
            lambda step: trapezoid(step, steps, 50, decay),
            folder / name,
            average,
            settings.save_every,
            on_step=on_step,
        )
    average.swap()


def train_flow(
    config: FlowConfig, generator: NativeGenerator, gallery: Gallery, seed: int, folder: Path, progress: Progress
) -> None:
    """Train the transformer, and the text encoder with it; a language model is trained alone, before it."""

    def drawn_at(task: str, step: int) -> tuple[list[int], random.Random]:
        rng = random.Random(sample_key(seed, task, step))
        return [rng.randrange(len(gallery.prompts)) for _ in range(config.batch)], rng

    def captions_at(step: int) -> Batch:
        chosen, rng = drawn_at("flow", step)
        noise = config.noise if step >= config.clean_steps else 0.0
        prompts = [gallery.prompts[i] for i in chosen]
        return gallery.latents[chosen], captions_of(prompts, noise, rng, config.unconditional)

    def reading_at(step: int) -> Tensor:
        texts = [gallery.prompts[i].text for i in drawn_at("language", step)[0]]
        tokens = generator.tokens(texts)
        return reading_loss(generator.text_encoder, tokens.input_ids, tokens.attention_mask)

    modules = {"transformer": generator.transformer, "text_encoder": generator.text_encoder}
    if generator.transformer.reads_language_model:
        reader = {"language": modules.pop("text_encoder")}
        steps = config.language_steps
        run_task("language", reading_at, reader, steps, steps // 3, config.optimisation, folder, progress)
        generator.text_encoder.requires_grad_(False)
    if config.compile:
        compile_module(generator.transformer, generator.device)
    loss_at = pretraining_loss(generator, captions_at, seed, config.objective.build())
    steps = config.clean_steps + config.noisy_steps
    run_task("flow", loss_at, modules, steps, config.noisy_steps, config.optimisation, folder, progress)


def held_out(count: int) -> list[str]:
    """Prompts to measure on, in turn of their skills."""
    return [sample_prompt(random.Random(i), "eval", SKILLS[i % len(SKILLS)]).text for i in range(count)]


def measured(generator: NativeGenerator, images: int = 510) -> dict[str, Any]:
    """How many of its pictures of held-out prompts follow them, by the oracle; larger ones are scaled to its size."""
    texts = held_out(images)
    painted = np.stack(list(sample(generator, texts, range(images))))
    if painted.shape[1] != SIZE:
        pixels = F.interpolate(to_pixels(painted), (SIZE, SIZE), mode="bilinear", antialias=True)
        painted = to_images(pixels)
    right = np.array(gold(list(painted), texts))
    per_skill = {skill: float(right[i :: len(SKILLS)].mean()) for i, skill in enumerate(SKILLS)}
    return {"gold": float(right.mean()), "per_skill": per_skill, "images": images}
