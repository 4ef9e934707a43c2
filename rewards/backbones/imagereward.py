"""BLIP with an MLP on the prompt's first token, grounded on the image: ImageReward's form (2304.05977, section 2.3).

BLIP's text encoder reads the prompt and cross-attends to the image; five linear layers make a scalar of its first
token. What loads is a `BlipForImageTextRetrieval` in transformers' format, whose vision and text encoder it takes.

ImageReward's public weights do not: they are a pickle, which is not read here, under the names of the original BLIP.
They would need its tensors renamed (qkv, projections and layers of both encoders) and saved as safetensors, the
tokenizer of BERT cut to 35 tokens, and the reward shifted and scaled by the constants of its code. Differences to its
training: no dropout in the head, torch's usual initialisation of it, and which layers are frozen is a setting (there
the lower 70 % of both encoders).

Shapes: B images, N tokens and D width of their features, L tokens of a prompt.
"""

import re
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    BlipConfig,
    BlipForImageTextRetrieval,
)

from judges.weights import load_whole
from models.keys import sample_key
from rewards.backbones.base import HEAD, Heads, Parts, mlp
from rewards.backbones.blip import BlipReward
from rewards.backbones.processor import RewardProcessor
from rewards.losses import Scores

WIDTHS = (1024, 128, 64, 16, 1)
"""Of the head's layers; there is no activation between them."""


class ImageReward(BlipReward):
    """A scalar reward from a BLIP and an MLP; the network is a `BlipForImageTextRetrieval` whose heads are not used."""

    kind = "imagereward"

    def __init__(self, network: BlipForImageTextRetrieval, head: nn.Sequential | Heads, processor: RewardProcessor):
        super().__init__()
        self.network, self.head, self.processor = network, head, processor
        self.tokenizer = processor.tokenizer
        self.eval().requires_grad_(False)

    @classmethod
    def from_checkpoint(cls, folder: str | Path, seed: int = 0) -> Self:
        """A BLIP for image-text retrieval, in fp32, with a head that depends on `seed`.

        Raises:
            ValueError: the checkpoint is no BLIP, or lacks weights.
            OSError: `folder` holds no checkpoint.
        """
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "blip":
            raise ValueError(
                f"checkpoint: {folder} holds a {config.model_type} model; the backbone imagereward needs a BLIP, "
                "such as Salesforce/blip-itm-large-coco"
            )
        network = load_whole(BlipForImageTextRetrieval, folder, torch.float32)
        return cls(network, _head(network.config, seed), _processor(folder, network.config))

    @classmethod
    def fresh(cls, folder: str | Path, seed: int) -> Self:
        """A new BLIP made of a BLIP-2: its vision tower, its tokenizer, and a text encoder made of its Q-Former.

        The Q-Former's text branch becomes the text encoder, as BLIP's starts from BERT (2201.12086, section 3.1); its
        cross-attention was learned for the queries. A layer that has none gets a new one, which depends on `seed`.

        Raises:
            ValueError: the Q-Former reads no text.
            OSError: `folder` holds no checkpoint.
        """
        blip2 = Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32)
        config = _blip_config(blip2.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = BlipForImageTextRetrieval(config)
        network.vision_model.load_state_dict(blip2.vision_model.state_dict())
        network.text_encoder.load_state_dict(_text_encoder(blip2), strict=False)
        return cls(network, _head(config, seed), _processor(folder, config))

    def score(self, features: Tensor, tokens: dict[str, Tensor]) -> Scores:
        grounded = self.network.text_encoder(**tokens, encoder_hidden_states=features).last_hidden_state  # (B, L, D)
        return Scores.of_heads(self.head(grounded[:, 0]))

    @property
    def head_count(self) -> int:
        return len(self.head) if isinstance(self.head, Heads) else 1

    def with_heads(self, count: int, seed: int) -> Self:
        self.head = Heads(_head(self.network.config, sample_key(seed, head)) for head in range(count))
        self.head.requires_grad_(False)
        return self

    def shift_heads(self, by: Tensor) -> None:
        self.head.shift(by)

    def parts(self) -> Parts:
        text = self.network.text_encoder
        return Parts((self.network.vision_model,), (text.embeddings,), tuple(text.encoder.layer), (self.head,))

    def networks(self) -> tuple[nn.Module, ...]:
        return self.network.vision_model, self.network.text_encoder

    def _save(self, folder: Path) -> dict[str, Any]:
        super()._save(folder)
        save_file(self.head.state_dict(), folder / HEAD)
        return {"heads": len(self.head)} if isinstance(self.head, Heads) else {}

    @classmethod
    def _load(cls, folder: Path, heads: int = 1) -> Self:
        model = cls.from_checkpoint(folder)
        if heads > 1:
            model.with_heads(heads, seed=0)
        model.head.load_state_dict(load_file(folder / HEAD))
        return model


def _processor(folder: str | Path, config: BlipConfig) -> RewardProcessor:
    return RewardProcessor.from_pretrained(folder, config.text_config.max_position_embeddings)


def _head(config: BlipConfig, seed: int) -> nn.Sequential:
    return mlp((config.text_config.hidden_size, *WIDTHS), seed)


def _blip_config(blip2: Blip2Config) -> BlipConfig:
    """Raises ValueError where the Q-Former reads no text."""
    vision, reader = blip2.vision_config, blip2.qformer_config
    if not reader.use_qformer_text_input:
        raise ValueError("use_qformer_text_input: False; take a BLIP-2 image-text matching model")
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    seen = {name: getattr(vision, name) for name in (*shared, "image_size", "patch_size", "layer_norm_eps")}
    own = ("vocab_size", "max_position_embeddings", "layer_norm_eps", "pad_token_id")
    text = {name: getattr(reader, name) for name in (*shared, *own)}
    text |= {"encoder_hidden_size": vision.hidden_size, "bos_token_id": None, "sep_token_id": None}
    return BlipConfig(text_config=text, vision_config=seen)


def _text_encoder(blip2: Blip2ForImageTextRetrieval) -> dict[str, Tensor]:
    """The text branch of a Q-Former under the names of BLIP's text encoder."""
    found = {f"embeddings.{name}": value for name, value in blip2.embeddings.state_dict().items()}
    for name, value in blip2.qformer.state_dict().items():
        if "_query." not in name:
            name = name.replace("attention.attention.", "attention.self.")
            found[re.sub("^layernorm", "embeddings.LayerNorm", name)] = value
    return found
