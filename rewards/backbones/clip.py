"""Dual encoders: exp(s) times the cosine of a picture's and a prompt's embedding, with the s that CLIP learned.

The form of PickScore (2305.01569, equation 1) and HPSv2 (2306.09341, section 4), on CLIP or SigLIP: differences between
two pictures of one prompt are the log-odds, in nats, that the first is preferred. A `CLIPModel` in transformers' format
loads as it is, PickScore among them; HPSv2's own weights are open_clip's and need to be converted to one. SigLIP's
bias is left out, since it is the same for both pictures of a pair.

Shapes: B images, N tokens and D width of their features, E width of the embeddings, L tokens of a prompt, M heads.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

from judges.weights import load_whole
from rewards.backbones.base import HEAD, Parts, Picture, RewardModel, spread
from rewards.backbones.processor import RewardProcessor
from rewards.losses import Scores

KINDS = {"clip": CLIPModel, "siglip": SiglipModel}
FRESH_SCALE = 10.0
"""exp(s) of a new model, SigLIP's (2303.15343, section 3.1)."""


class ClipReward(RewardModel):
    """The reward is scaled cosine similarity."""

    kind = "clip"

    def __init__(self, network: CLIPModel | SiglipModel, processor: RewardProcessor):
        super().__init__()
        self.network, self.processor = network, processor
        self.tokenizer = processor.tokenizer
        self.siglip = isinstance(network, SiglipModel)
        self.heads: nn.Parameter | None = None  # (M, E, E)
        self.levels: nn.Parameter | None = None  # (M,)
        self.eval().requires_grad_(False)

    @classmethod
    def from_checkpoint(cls, folder: str | Path, processor: str | Path | None = None) -> Self:
        """A CLIP or SigLIP from a local folder or a hub id, in fp32.

        Args:
            processor: where tokenizer and image processor are, if not beside the weights.

        Raises:
            ValueError: the checkpoint is neither, or lacks weights.
            OSError: `folder` holds no checkpoint.
        """
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in KINDS:
            raise ValueError(
                f"checkpoint: {folder} holds a {config.model_type} model; the backbone clip needs a CLIPModel or a "
                "SiglipModel in transformers' format, such as PickScore"
            )
        network = load_whole(KINDS[config.model_type], folder, torch.float32)
        length = network.config.text_config.max_position_embeddings
        return cls(network, RewardProcessor.from_pretrained(processor or folder, length))

    @classmethod
    def fresh(cls, folder: str | Path, seed: int) -> Self:
        """A new SigLIP around the vision tower of a BLIP-2, whose tokenizer and image processor it takes.

        Its attention pooling and its text encoder, as deep and wide as the Q-Former, are new and depend on `seed`.

        Raises:
            OSError: `folder` holds no checkpoint.
        """
        blip2 = Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32)
        processor = RewardProcessor.from_pretrained(folder, blip2.config.qformer_config.max_position_embeddings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = SiglipModel(_siglip_config(blip2.config, processor.tokenizer.model_max_length))
        network.logit_scale.data.fill_(math.log(FRESH_SCALE))
        network.vision_model.load_state_dict(_siglip_vision(blip2.vision_model), strict=False)
        return cls(network, processor)

    def pixels(self, images: Sequence[Picture]) -> Tensor:
        return self.processor.pixels(images, self.network.config.vision_config.image_size)

    def read(self, pictures: Tensor) -> Tensor:
        return self.processor.read(pictures)

    def look(self, pixels: Tensor) -> Tensor:
        """CLIP's pooled features (B, D), or SigLIP's (B, N, D) before its attention pooling, which is a new layer."""
        seen = self.network.vision_model(pixel_values=pixels)
        return seen.last_hidden_state if self.siglip else seen.pooler_output

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """SigLIP was trained on padding without a mask."""
        tokens = self.processor.tokens(prompts)
        return {"input_ids": tokens["input_ids"]} if self.siglip else tokens

    def score(self, features: Tensor, tokens: dict[str, Tensor]) -> Scores:
        told = self.network.text_model(**tokens).pooler_output
        if self.siglip:
            seen = self.network.vision_model.head(features)  # (B, E)
        else:
            seen, told = self.network.visual_projection(features), self.network.text_projection(told)
        told = F.normalize(told, dim=-1)
        if self.heads is None:
            return Scores(self.network.logit_scale.exp() * (F.normalize(seen, dim=-1) * told).sum(-1))
        seen = F.normalize(torch.einsum("mef,bf->bme", self.heads, seen), dim=-1)
        cosine = torch.einsum("bme,be->bm", seen, told)
        return Scores.of_heads(self.network.logit_scale.exp() * cosine + self.levels)

    @property
    def head_count(self) -> int:
        return 1 if self.heads is None else len(self.heads)

    def with_heads(self, count: int, seed: int) -> Self:
        """Each sees the picture's embedding through a matrix of its own, which starts near the identity."""
        width = self.network.config.projection_dim if not self.siglip else self.network.config.vision_config.hidden_size
        eye = torch.eye(width, device=self.device)
        self.heads = nn.Parameter(spread(eye, count, seed), requires_grad=False)
        self.levels = nn.Parameter(eye.new_zeros(count), requires_grad=False)
        return self

    @torch.no_grad()
    def shift_heads(self, by: Tensor) -> None:
        self.levels += by

    def parts(self) -> Parts:
        vision, text = self.network.vision_model, self.network.text_model
        if self.siglip:
            before, after = (), (vision.head, text.head)
        else:
            before, after = (vision.pre_layrnorm,), (self.network.visual_projection, self.network.text_projection)
        heads = () if self.heads is None else (self.heads,)
        return Parts(
            tower=(vision.embeddings, *before, vision.encoder, vision.post_layernorm),
            stem=(text.embeddings,),
            layers=tuple(text.encoder.layers),
            top=(text.final_layer_norm, *after, self.network.logit_scale, *heads),
        )

    def networks(self) -> tuple[nn.Module, ...]:
        return self.network.vision_model, self.network.text_model

    def _save(self, folder: Path) -> dict[str, Any]:
        self.network.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        if self.heads is None:
            return {}
        save_file({"heads": self.heads.data, "levels": self.levels.data}, folder / HEAD)
        return {"heads": len(self.heads)}

    @classmethod
    def _load(cls, folder: Path, heads: int = 1) -> Self:
        model = cls.from_checkpoint(folder)
        if heads > 1:
            for part, value in load_file(folder / HEAD).items():
                setattr(model, part, nn.Parameter(value, requires_grad=False))
        return model


def _siglip_config(blip2: Blip2Config, length: int) -> SiglipConfig:
    vision, reader = blip2.vision_config, blip2.qformer_config
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    seen = {name: getattr(vision, name) for name in (*shared, "image_size", "patch_size", "layer_norm_eps")}
    read = {name: getattr(reader, name) for name in shared}
    ids = {"vocab_size": reader.vocab_size, "pad_token_id": reader.pad_token_id}
    ids |= {"bos_token_id": None, "eos_token_id": None}
    text = {**read, **ids, "max_position_embeddings": length, "projection_size": vision.hidden_size}
    return SiglipConfig(text_config=text, vision_config=seen)


def _siglip_vision(tower: nn.Module) -> dict[str, Tensor]:
    """The weights of BLIP-2's vision tower under SigLIP's names; the class token, which SigLIP has not, is left out."""
    found = {}
    for name, value in tower.state_dict().items():
        name = name.replace("self_attn.projection.", "self_attn.out_proj.")
        if name == "embeddings.position_embedding":
            found[f"{name}.weight"] = value[0, 1:]
        elif ".qkv." in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                found[name.replace("qkv", f"{part}_proj")] = rows
        elif name != "embeddings.class_embedding":
            found[name] = value
    return found
