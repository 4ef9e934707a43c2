"""Flow-matching pretraining of a native generator, on data handed to it (2209.03003; 2403.03206, section 3)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from models.codec import PATCH, Codec
from models.generator import NativeGenerator
from models.keys import sample_key
from models.mmdit import MMDiT
from models.paths import noised, velocity
from models.text import text_encoder, word_tokenizer

Batch = tuple[Tensor, list[str]]  # latents (B, C, S, S) and their captions


def new_generator(
    vocabulary: Sequence[str], size: int, width: int, depth: int, text_depth: int, max_tokens: int, seed: int
) -> NativeGenerator:
    """An untrained generator of pictures of `size` pixels; its weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = word_tokenizer(vocabulary)
        codec = Codec()
        transformer = MMDiT(
            channels=codec.config.channels,
            size=size // PATCH,
            width=width,
            depth=depth,
            heads=width // 32,
            text_width=width,
        )
        encoder = text_encoder(len(tokenizer), width, text_depth, max_tokens)
        return NativeGenerator(transformer, codec, encoder, tokenizer)


def flow_matching_loss(generator: NativeGenerator, batch: Batch, noise_key: int) -> Tensor:
    """Mean square error of the velocity, times drawn logit-normal(0, 1) and stratified over the batch."""
    x0, captions = batch[0].to(generator.device), batch[1]
    random = torch.Generator().manual_seed(noise_key)
    noise = torch.randn(x0.shape, generator=random).to(x0.device)
    quantiles = (torch.arange(len(x0)) + torch.rand(len(x0), generator=random)) / len(x0)
    t = torch.special.ndtri(quantiles.clamp(1e-4, 1 - 1e-4)).sigmoid().to(x0.device)
    predicted = generator.predict(noised(x0, noise, t), t, generator.encode(captions))
    return (predicted - velocity(x0, noise)).square().mean()


def pretraining_loss(
    generator: NativeGenerator, batch_at: Callable[[int], Batch], seed: int
) -> Callable[[int], Tensor]:
    """The loss as a function of the step alone, which is what makes a training run resumable bit for bit."""
    return lambda step: flow_matching_loss(generator, batch_at(step), sample_key(seed, "pretrain", step))
