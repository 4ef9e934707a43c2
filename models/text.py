"""The small text side of a native generator: a word-level tokenizer and a model of transformers.

The model is a BERT encoder, whose last hidden states are the text; or for deep fusion (2505.10046) a causal language
model, of which every layer's keys and values are. Shapes: B batch, L tokens, Y layers, G heads of keys, D their
dimension.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
)


def word_tokenizer(vocabulary: Sequence[str], extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a word of `vocabulary`, punctuation apart; `extra` are further special tokens."""
    special = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", *extra]
    ids = {word: index for index, word in enumerate(dict.fromkeys([*special, *vocabulary]))}
    core = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        additional_special_tokens=list(extra),
    )


def text_encoder(vocabulary_size: int, width: int, depth: int, max_tokens: int) -> BertModel:
    """A bidirectional encoder with heads of 32 and no dropout."""
    config = BertConfig(
        vocab_size=vocabulary_size,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
        max_position_embeddings=max_tokens,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return BertModel(config, add_pooling_layer=False)


def language_model(
    vocabulary_size: int, width: int, depth: int, heads: int, key_heads: int, max_tokens: int
) -> Qwen3Model:
    """A causal model with normalised queries and keys, so that its keys are of the scale of the image's."""
    config = Qwen3Config(
        vocab_size=vocabulary_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=width // heads,
        max_position_embeddings=max_tokens,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3Model(config)


def load_encoder(folder: str | Path) -> PreTrainedModel:
    """The text model in a folder."""
    if AutoConfig.from_pretrained(folder).model_type == "bert":
        return BertModel.from_pretrained(folder, add_pooling_layer=False)
    return AutoModel.from_pretrained(folder)


def memory(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """What a causal language model keeps of `ids` (B, L): all layers' keys and values, a row a token (B, L, Y 2 G D).

    The keys know their places. `models.mmdit.MMDiT` takes the rows apart again.
    """
    cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    kept = torch.stack([torch.stack([layer.keys, layer.values]) for layer in cache.layers])  # (Y, 2, B, G, L, D)
    return kept.permute(2, 4, 0, 1, 3, 5).flatten(2)


def memory_width(model: PreTrainedModel) -> int:
    """Of a row of `memory`; 0 where the model is no causal one."""
    config = model.config
    if config.model_type == "bert":
        return 0
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def reading_loss(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean cross-entropy, in nats, of each token after the first by those before it; the head is the embedding's."""
    hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    logits = hidden @ model.get_input_embeddings().weight.T
    return F.cross_entropy(logits[mask[:, 1:].bool()], ids[:, 1:][mask[:, 1:].bool()])
