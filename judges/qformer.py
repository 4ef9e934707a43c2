"""Training a BLIP-2 judge from scratch, on data handed to it: a chain of short tasks, each on the last one's weights.

`vision` teaches a small ViT a dense task on its patches, since nothing pretrained is at hand, and freezes it.
`matching` is image-text matching from the paper's first stage (2301.12597, section 3.2), through a Q-Former that reads
the text, with hard negatives; `judges.stage1` has the whole stage. `answering` is its second stage (section 3.3): the
Q-Former without text feeds a language model, which describes pictures and answers questions; the language model is
trained as well, since it is new, or reads texts alone first and is frozen.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    OPTConfig,
    PreTrainedTokenizerBase,
)

from judges.blip2 import language_logits
from judges.matching import matching_logits

IGNORED = -100


def small_config(
    tokenizer: PreTrainedTokenizerBase, size: int, patch: int, width: int, queries: int, with_text: bool
) -> Blip2Config:
    """A BLIP-2 of 4 vision, 3 Q-Former and 3 language layers, heads of 32, no dropout.

    `initializer_range` is given for the vision tower because its default, 1e-10, expects pretrained weights.
    """
    heads, hidden = width // 32, 3 * width
    vision = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=4,
        num_attention_heads=heads,
        image_size=size,
        patch_size=patch,
        initializer_range=0.02,
    )
    qformer = Blip2QFormerConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=3,
        num_attention_heads=heads,
        cross_attention_frequency=1,
        encoder_hidden_size=width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        use_qformer_text_input=with_text,
    )
    text = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=hidden,
        num_hidden_layers=3,
        num_attention_heads=heads,
        max_position_embeddings=128,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=qformer.to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=queries,
        image_text_hidden_size=width,
        image_token_index=None if with_text else tokenizer.convert_tokens_to_ids("<image>"),
    )


class DenseHead(nn.Module):
    """Reads, from one token a patch (B, N, W), two classes a patch and the way to its object's centre."""

    def __init__(self, width: int, shapes: int, colours: int):
        super().__init__()
        self.sizes = (shapes, colours, 2)
        self.out = nn.Linear(width, sum(self.sizes))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.out(tokens).split(self.sizes, -1)


def dense_loss(head: DenseHead, tokens: Tensor, shape: Tensor, colour: Tensor, offset: Tensor) -> Tensor:
    """Cross-entropy of `shape` and `colour` (B, N) plus the squared error of `offset` (B, N, 2) where it is not NaN."""
    shapes, colours, offsets = head(tokens)
    there = ~offset.isnan()
    away = F.mse_loss(offsets[there], offset[there]) if there.any() else offsets.sum() * 0
    return (
        F.cross_entropy(shapes.flatten(0, 1), shape.flatten())
        + F.cross_entropy(colours.flatten(0, 1), colour.flatten())
        + away
    )


def matching_loss(
    model: Blip2ForImageTextRetrieval, pixels: Tensor, ids: Tensor, mask: Tensor, label: Tensor
) -> Tensor:
    """Binary cross-entropy of T texts to a picture: pixels (B, C, H, W), ids and mask (B, T, L), label (B, T)."""
    with torch.no_grad():
        features = model.vision_model(pixel_values=pixels).last_hidden_state
    features = features.repeat_interleave(ids.shape[1], 0)
    logits = matching_logits(model, features, ids.flatten(0, 1), mask.flatten(0, 1))
    return F.cross_entropy(logits, label.flatten().long())


def answering_loss(
    model: Blip2ForConditionalGeneration, pixels: Tensor, index: Tensor, ids: Tensor, target: Tensor
) -> Tensor:
    """Next-token cross-entropy, each sequence weighing the same.

    pixels (B, C, H, W); row r of ids and target (R, L) is about picture `index[r]`; `target` holds the token that
    must follow, or IGNORED.
    """
    with torch.no_grad():
        features = model.vision_model(pixel_values=pixels).last_hidden_state
    out = model.qformer(
        query_embeds=model.query_tokens.expand(len(features), -1, -1), encoder_hidden_states=features
    ).last_hidden_state
    prefixes = model.language_projection(out)[index]
    mask = ids != model.config.text_config.pad_token_id
    logits = language_logits(model, prefixes, ids, mask)[:, prefixes.shape[1] :]
    losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="none")
    counted = (target != IGNORED).float()
    return ((losses.view_as(target) * counted).sum(1) / counted.sum(1)).mean()


def reading_loss(model: Blip2ForConditionalGeneration, ids: Tensor) -> Tensor:
    """Next-token cross-entropy of texts (R, L) that the language model reads without a picture."""
    there = ids != model.config.text_config.pad_token_id
    logits = model.language_model(input_ids=ids, attention_mask=there, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits[there[:, 1:]], ids[:, 1:][there[:, 1:]])


def sequences(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]], length: int
) -> tuple[Tensor, Tensor]:
    """Pairs of (given, to say) as ids and targets (R, L) for `answering_loss`; an end token closes each.

    L is that of the longest. Raises ValueError where it is above `length`.
    """
    ids = torch.full((len(texts), length), tokenizer.pad_token_id)
    target = torch.full((len(texts), length), IGNORED)
    givens = tokenizer([given for given, _ in texts], add_special_tokens=False).input_ids
    said = tokenizer([say for _, say in texts], add_special_tokens=False).input_ids
    for row, (given, say) in enumerate(zip(givens, said, strict=True)):
        whole = [*given, *say, tokenizer.eos_token_id]
        if len(whole) > length:
            raise ValueError(f"length: {len(whole)} tokens do not fit into {length}: {texts[row]}")
        ids[row, : len(whole)] = torch.tensor(whole)
        target[row, len(given) - 1 : len(whole) - 1] = torch.tensor(whole[len(given) :])
    longest = int((ids != tokenizer.pad_token_id).sum(1).max())
    return ids[:, :longest], target[:, :longest]


def inherit(model: Blip2ForConditionalGeneration, teacher: Blip2ForImageTextRetrieval) -> None:
    """Start `model` from the vision tower, queries and Q-Former of the first stage; its text layers are dropped."""
    model.vision_model.load_state_dict(teacher.vision_model.state_dict())
    model.query_tokens.data.copy_(teacher.query_tokens.data)
    model.qformer.load_state_dict(
        {k: v for k, v in teacher.qformer.state_dict().items() if k in model.qformer.state_dict()}
    )
