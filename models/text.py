"""The small text side of a native generator: a word-level tokenizer and a BERT encoder, both of transformers."""

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


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
