"""A BLIP-2's yes to "does this figure show ...?" as a scalar reward: VQAScore (2404.01291, section 3).

Queries read the image, and a language model reads their outputs and then the question. The reward is a linear head on
its hidden state where the answer would begin. The head starts as the difference of the output weights of yes and no,
so that the untrained reward is the log-odds, in nats, of yes against no; VQAScore itself is the probability of yes.
What the model knows of counts and places the reward knows from the start.

Shapes: B images, N tokens and D width of their features, Q queries, L tokens of a question, W the language model's
width, M heads.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForConditionalGeneration, PreTrainedTokenizerBase

from judges.blip2 import language_states
from judges.replies import NoAnswer, spellings
from judges.weights import load_whole
from rewards.backbones.base import Parts
from rewards.backbones.blip import Blip2Reward, processor_of
from rewards.backbones.processor import RewardProcessor

TEMPLATE = 'Question: Does this figure show "{}"? Answer:'


class VQANetwork(Blip2ForConditionalGeneration):
    """With a scalar head beside that of the vocabulary."""

    _keep_in_fp32_modules: ClassVar[list[str]] = ["query_tokens", "qformer", "reward_head"]

    def __init__(self, config: Blip2Config):
        """Raises ValueError where the language model is no decoder."""
        if not config.use_decoder_only_language_model:
            raise ValueError("text_config: an encoder-decoder; take a BLIP-2 with a decoder-only language model (OPT)")
        super().__init__(config)
        width = self.language_model.get_output_embeddings().in_features
        self.reward_head = nn.Linear(width, getattr(config, "reward_heads", 1))
        self.post_init()

    def forward(self, features: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Log-odds (B, M) in nats, of each head, from features (B, N, D) and questions (B, L)."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        seen = self.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
        read = language_states(self, self.language_projection(seen), input_ids, attention_mask)  # (B, Q + L, W)
        last = queries.shape[1] + attention_mask.sum(1) - 1
        return self.reward_head(read[torch.arange(len(read), device=read.device), last].float())


class VQAReward(Blip2Reward):
    """A scalar reward from a BLIP-2 that answers questions, with an OPT.

    Args:
        template: the question, with `{}` where the prompt goes.
        length: tokens of the question that every prompt is padded to; None for the tokenizer's length.

    Raises:
        ValueError: the template has no place for the prompt.
    """

    kind = "vqa"

    def __init__(
        self, network: VQANetwork, processor: RewardProcessor, template: str = TEMPLATE, length: int | None = None
    ):
        super().__init__(network, processor)
        if template.count("{}") != 1:
            raise ValueError(f"template: {template!r} must hold {{}} once")
        self.template = template
        if length is not None:
            self.tokenizer.model_max_length = length

    @classmethod
    def from_checkpoint(cls, folder: str | Path, **settings: Any) -> Self:
        """The reward that a `Blip2ForConditionalGeneration` checkpoint already is, in fp32; `settings` are those of the
        constructor.

        Raises:
            ValueError: the checkpoint has no language model to ask, one that is no decoder, or cannot say yes and no
                in a token each.
            OSError: `folder` holds no checkpoint.
        """
        vqa = load_whole(Blip2ForConditionalGeneration, folder).float()
        network = VQANetwork(vqa.config)
        reward = cls(network, _processor(folder, vqa.config), **settings)
        yes, no = (vqa.get_output_embeddings().weight[_token(reward.tokenizer, answer)] for answer in ("yes", "no"))
        head = {"reward_head.weight": (yes - no).unsqueeze(0), "reward_head.bias": torch.zeros(1)}
        network.load_state_dict(vqa.state_dict() | head)
        return reward

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return super().tokens([self.template.format(prompt) for prompt in prompts])

    def parts(self) -> Parts:
        network, decoder = self.network, self.network.language_model.get_decoder()
        top = (decoder.final_layer_norm, decoder.project_out, network.reward_head)
        return Parts(
            tower=(network.vision_model,),
            stem=(network.qformer.layernorm, decoder.embed_tokens, decoder.embed_positions),
            layers=(*network.qformer.encoder.layer, *decoder.layers),
            top=(network.query_tokens, network.language_projection, *(part for part in top if part is not None)),
        )

    def networks(self) -> tuple[nn.Module, ...]:
        return self.network.vision_model, self.network.qformer, self.network.language_model.get_decoder()

    def _save(self, folder: Path) -> dict[str, Any]:
        return {**super()._save(folder), "template": self.template}

    @classmethod
    def _load(cls, folder: Path, **settings: Any) -> Self:
        network = VQANetwork.from_pretrained(folder, dtype=torch.float32)
        return cls(network, _processor(folder, network.config), **settings)


def _processor(folder: str | Path, config: Blip2Config) -> RewardProcessor:
    return processor_of(folder, config, config.text_config.max_position_embeddings)


def _token(tokenizer: PreTrainedTokenizerBase, answer: str) -> int:
    """The token that says `answer`, as the judge spells it."""
    try:
        found = spellings(
            answer, lambda text: tokenizer(text, add_special_tokens=False).input_ids, tokenizer.unk_token_id
        )
    except NoAnswer as reason:
        raise ValueError(f"checkpoint: {reason}") from None
    single = [ids[0] for ids in found if len(ids) == 1]
    if not single:
        raise ValueError(f"checkpoint: its tokenizer has no single token for {answer!r}")
    return single[0]
