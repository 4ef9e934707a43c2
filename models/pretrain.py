"""Pretraining of a native generator, on data handed to it: by flow matching unless `models.objectives` is told else."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from models.codec import Autoencoder, Codec
from models.generator import NativeGenerator
from models.keys import sample_key
from models.layers import Backbone
from models.networks import network_of
from models.objectives import Objective
from models.paths import FLOW, Parametrisation
from models.text import language_model, text_encoder, word_tokenizer

Batch = tuple[Tensor, list[str]]  # latents (B, C, S, S) and their captions
FLOW_MATCHING = Objective()
NO_CHOICES: Mapping[str, Any] = MappingProxyType({})
_TOKEN = 8
"""Pixels along its side."""


def new_generator(
    vocabulary: Sequence[str],
    size: int,
    width: int,
    depth: int,
    text_depth: int,
    max_tokens: int,
    seed: int,
    parametrisation: Parametrisation = FLOW,
    network: str = "MMDiT",
    choices: Mapping[str, Any] = NO_CHOICES,
    codec: Autoencoder | None = None,
) -> NativeGenerator:
    """An untrained generator of pictures of `size` pixels; its weights depend on `seed` alone.

    It paints latents of `codec`; of an untrained one of ours where there is none. The network has `depth` blocks of
    heads of 32, unless `choices`, its other settings, say something else; the text encoder is as wide and has
    `text_depth` layers. With deep fusion a language model of the network's own depth, width and heads takes its place.

    Raises:
        ValueError: the network is not known, or does not take such settings; the message begins with the field's name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = word_tokenizer(vocabulary)
        own = Codec()  # in any case, so that the other weights do not depend on whose codec it is
        codec = codec or own
        transformer = new_network(network, codec, size, width, depth, choices)
        if transformer.reads_language_model:
            chosen = transformer.config
            sizes = chosen.width, chosen.depth, chosen.heads, chosen.kv_heads or chosen.heads
            encoder = language_model(len(tokenizer), *sizes, max_tokens)
        else:
            encoder = text_encoder(len(tokenizer), width, text_depth, max_tokens)
        return NativeGenerator(transformer, codec, encoder, tokenizer, parametrisation)


def new_network(
    network: str, codec: Autoencoder, size: int, width: int, depth: int, choices: Mapping[str, Any] = NO_CHOICES
) -> Backbone:
    """An untrained network for the latents of pictures of `size` pixels; see `new_generator`.

    Where its `choices` say nothing else, its patches are as many of the codec's cells as make a token of 8 x 8 pixels.
    """
    if size % codec.cell:
        raise ValueError(f"codec: its cells are of {codec.cell} pixels a side, of which {size} are no multiple")
    patch = max(1, _TOKEN // codec.cell)
    sizes = {"width": width, "depth": depth, "heads": width // 32, "patch": patch, **choices}
    text_width = width
    if sizes.get("fused"):
        keys = sizes.get("kv_heads") or sizes["heads"]
        text_width = 2 * sizes["depth"] * keys * (sizes["width"] // max(1, sizes["heads"]))
    latents = {"channels": codec.channels, "size": size // codec.cell}
    return network_of(network)(**latents, text_width=text_width, **sizes)


def pretraining_loss(
    generator: NativeGenerator, batch_at: Callable[[int], Batch], seed: int, objective: Objective = FLOW_MATCHING
) -> Callable[[int], Tensor]:
    """The loss as a function of the step alone, which is what makes a training run resumable bit for bit."""
    return lambda step: objective.loss(generator, *batch_at(step), sample_key(seed, "pretrain", step))
