"""BLIP-2's image-text matching head as a scalar reward (2301.12597, section 3.1).

Queries cross-attend to the image and self-attend to the prompt in one Q-Former; ImageReward (2304.05977,
section 2.3) puts a scalar head on the same kind of fused features of BLIP. Here the head is linear and starts
as the difference of the two rows of the ITM head, so that the untrained reward is the log-odds, in nats, that
image and prompt match.

Shapes: B images, N tokens and D width of their features, Q queries, W their width, L tokens of a prompt, M heads.
"""

from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForImageTextRetrieval,
    Blip2PreTrainedModel,
    Blip2QFormerModel,
    Blip2VisionModel,
)
from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

from rewards.backbones.base import Parts
from rewards.backbones.blip import Blip2Reward, processor_of
from rewards.backbones.processor import RewardProcessor

_ITM_ONLY = ("itm_head.", "vision_projection.", "text_projection.")


class QFormerNetwork(Blip2PreTrainedModel):
    """The weights of a `Blip2ForImageTextRetrieval`, with a scalar head."""

    main_input_name = "pixel_values"
    _keep_in_fp32_modules: ClassVar[list[str]] = ["query_tokens", "qformer", "reward_head"]
    _supports_flash_attn = False

    def __init__(self, config: Blip2Config):
        """Raises ValueError where the Q-Former of `config` reads no text."""
        super().__init__(config)
        reader = config.qformer_config
        if not reader.use_qformer_text_input:
            raise ValueError("use_qformer_text_input: False; take a BLIP-2 image-text matching model")
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, reader.hidden_size))
        self.embeddings = Blip2TextEmbeddings(reader)
        self.qformer = Blip2QFormerModel._from_config(reader)
        self.reward_head = nn.Linear(reader.hidden_size, getattr(config, "reward_heads", 1))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.word_embeddings = value

    def forward(self, features: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Log-odds (B, M) in nats, of each head, from features (B, N, D) and prompts (B, L)."""
        queries = self.query_tokens.expand(len(features), -1, -1)  # (B, Q, W)
        count = queries.shape[1]
        fused = self.qformer(
            query_embeds=self.embeddings(input_ids=input_ids, query_embeds=queries),  # (B, Q + L, W)
            query_length=count,
            attention_mask=torch.cat([attention_mask.new_ones(len(features), count), attention_mask], dim=1),
            encoder_hidden_states=features,
        ).last_hidden_state
        return self.reward_head(fused[:, :count].mean(dim=1))


class QFormerReward(Blip2Reward):
    """A scalar reward from a BLIP-2 Q-Former that reads image and prompt."""

    kind = "qformer"

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> Self:
        """The reward that a `Blip2ForImageTextRetrieval` checkpoint already is, in fp32.

        Raises:
            ValueError: the checkpoint's Q-Former reads no text.
            OSError: `folder` holds no checkpoint.
        """
        itm = Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32)
        state = {name: value for name, value in itm.state_dict().items() if not name.startswith(_ITM_ONLY)}
        for part, (mismatch, match) in itm.itm_head.named_parameters():
            state[f"reward_head.{part}"] = (match - mismatch).unsqueeze(0)
        network = QFormerNetwork(itm.config)
        network.load_state_dict(state)
        return cls(network, _processor(folder, itm.config))

    def parts(self) -> Parts:
        network = self.network
        return Parts(
            tower=(network.vision_model,),
            stem=(network.embeddings, network.qformer.layernorm),
            layers=tuple(network.qformer.encoder.layer),
            top=(network.query_tokens, network.reward_head),
        )

    def networks(self) -> tuple[nn.Module, ...]:
        return self.network.vision_model, self.network.qformer

    @classmethod
    def _load(cls, folder: Path) -> Self:
        network = QFormerNetwork.from_pretrained(folder, dtype=torch.float32)
        return cls(network, _processor(folder, network.config))


def _processor(folder: str | Path, config: Blip2Config) -> RewardProcessor:
    return processor_of(folder, config, config.qformer_config.max_position_embeddings)
