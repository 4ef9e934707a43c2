"""BLIP-2's image-text matching head as a scalar reward (2301.12597, section 3.1).

Queries cross-attend to the image and self-attend to the prompt in one Q-Former; ImageReward (2304.05977,
section 2.3) puts a scalar head on the same kind of fused features of BLIP. Here the head is linear and starts
as the difference of the two rows of the ITM head, so that the untrained reward is the log-odds, in nats, that
image and prompt match. The vision tower stays frozen: its features can be computed once per image.

Shapes: B images, N tokens and D width of their features, Q queries, W their width, L tokens of a prompt.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2PreTrainedModel,
    Blip2QFormerModel,
    Blip2VisionModel,
    BlipImageProcessorPil,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

_ITM_ONLY = ("itm_head.", "vision_projection.", "text_projection.")
_UNSET_LENGTH = 1_000_000  # transformers puts about 1e30 where a tokenizer was saved without a length


class QFormerReward(Blip2PreTrainedModel):
    """A scalar reward of images and prompts: a sequence classifier with one label, without dropout."""

    main_input_name = "pixel_values"
    _keep_in_fp32_modules: ClassVar[list[str]] = ["query_tokens", "qformer", "reward_head"]
    _supports_flash_attn = False

    def __init__(self, config: Blip2Config):
        """Raises ValueError where the Q-Former of `config` reads no text."""
        super().__init__(config)
        reader = config.qformer_config
        if not reader.use_qformer_text_input:
            raise ValueError("use_qformer_text_input: False; take a BLIP-2 image-text matching model")
        config.num_labels = 1
        # The Q-Former's attention calls dropout as a function: what switches off dropout modules misses it.
        reader.hidden_dropout_prob = reader.attention_probs_dropout_prob = 0.0
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, reader.hidden_size))
        self.embeddings = Blip2TextEmbeddings(reader)
        self.qformer = Blip2QFormerModel._from_config(reader)
        self.reward_head = nn.Linear(reader.hidden_size, 1)
        self.post_init()
        self.vision_model.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Self:
        """As in transformers, whose loading makes every parameter trainable again."""
        model = super().from_pretrained(*args, **kwargs)
        model.vision_model.requires_grad_(False)
        return model

    @classmethod
    def from_itm(cls, folder: str | Path) -> Self:
        """The reward that a `Blip2ForImageTextRetrieval` checkpoint already is, in fp32.

        Raises:
            ValueError: the checkpoint's Q-Former reads no text.
            OSError: `folder` holds no checkpoint.
        """
        itm = Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32)
        state = {name: value for name, value in itm.state_dict().items() if not name.startswith(_ITM_ONLY)}
        for part, (mismatch, match) in itm.itm_head.named_parameters():
            state[f"reward_head.{part}"] = (match - mismatch).unsqueeze(0)
        reward = cls(itm.config)
        reward.load_state_dict(state)
        return reward.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Image features (B, N, D) of pixels (B, 3, H, W) that a `RewardProcessor` normalised."""
        return self.vision_model(pixel_values=pixel_values).last_hidden_state

    def reward(self, features: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Log-odds (B,) in nats from features (B, N, D) and prompts (B, L)."""
        queries = self.query_tokens.expand(len(features), -1, -1)  # (B, Q, W)
        count = queries.shape[1]
        fused = self.qformer(
            query_embeds=self.embeddings(input_ids=input_ids, query_embeds=queries),  # (B, Q + L, W)
            query_length=count,
            attention_mask=torch.cat([attention_mask.new_ones(len(features), count), attention_mask], dim=1),
            encoder_hidden_states=features,
        ).last_hidden_state
        return self.reward_head(fused[:, :count].mean(dim=1)).squeeze(-1)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """Rewards as logits (B, 1), from pixels or from the features that `encode_images` made of them."""
        features = self.encode_images(pixel_values) if image_features is None else image_features
        return SequenceClassifierOutput(logits=self.reward(features, input_ids, attention_mask).unsqueeze(-1))


def filled(rows: Tensor, size: int) -> Tensor:
    """`rows` (n, ...) brought to (size, ...) by repeating the first.

    Matrix products round differently for different numbers of rows; at one size, a row's result is its own.
    """
    return torch.cat([rows, rows[:1].expand(size - len(rows), *rows.shape[1:])])


@dataclass(frozen=True)
class RewardProcessor:
    """What a `QFormerReward` reads, made from images and prompts.

    Every prompt is padded to the tokenizer's full length, so that a score does not depend on its batch-mates.
    The image processor is always the PIL one: it resizes the same with and without torchvision.
    """

    tokenizer: PreTrainedTokenizerBase
    image_processor: BlipImageProcessorPil

    @classmethod
    def from_pretrained(cls, folder: str | Path, length: int | None = None) -> Self:
        """The processor saved beside a model.

        Args:
            length: tokens that every prompt is padded to. None takes the tokenizer's own or, where it was
                saved without one, what the positions of the model in `folder` leave beside its queries.
        """
        tokenizer = AutoTokenizer.from_pretrained(folder)
        if length is None and tokenizer.model_max_length > _UNSET_LENGTH:
            config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
            length = config["qformer_config"]["max_position_embeddings"] - config["num_query_tokens"]
        if length is not None:
            tokenizer.model_max_length = length
        return cls(tokenizer, BlipImageProcessorPil.from_pretrained(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write both parts into `folder`, beside the model."""
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)

    def pixels(self, images: Sequence[np.ndarray | Image.Image]) -> Tensor:
        """Pixels (B, 3, H, W) in fp32 of RGB images, PIL or uint8 (H, W, 3)."""
        return self.image_processor(list(images), return_tensors="pt").pixel_values

    def tokens(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask, both (B, L) int64.

        Raises:
            ValueError: a prompt is longer than L tokens; half a prompt would be judged in silence.
        """
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, padding_side="right", return_tensors=None
        )
        for prompt, ids in zip(prompts, tokens["input_ids"], strict=True):
            if len(ids) > length:
                raise ValueError(f"prompt: {len(ids)} tokens, the reward model reads {length}: {prompt[:80]!r}")
        return torch.tensor(tokens["input_ids"]), torch.tensor(tokens["attention_mask"])
