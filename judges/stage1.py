"""BLIP-2's first stage (2301.12597, section 3.2): a Q-Former learns to see, beside a frozen image encoder.

Three losses on the same pictures and texts, told apart by who may attend to whom: in image-text contrast queries and
text do not meet, in image-text matching they all do, in image-grounded text generation text sees the queries and its
own past while queries never see text. The result loads in `transformers.Blip2ForImageTextRetrieval`, and its Q-Former
in `Blip2ForConditionalGeneration`; the words are generated from the tied embeddings, so no other head is needed.

Unlike the paper, a caller may know that a picture follows several texts of its batch: no such pair is a negative.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Blip2ForImageTextRetrieval

from judges.matching import TEMPERATURE, contrastive_features, matching_logits


@dataclass(frozen=True)
class Stage1:
    """The three losses, in nats."""

    itc: Tensor
    itm: Tensor
    itg: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, each weighing the same, as in the paper."""
        return self.itc + self.itm + self.itg


def stage1_losses(
    model: Blip2ForImageTextRetrieval,
    pixels: Tensor,
    ids: Tensor,
    mask: Tensor,
    follows: Tensor,
    ends: tuple[int, int],
    generator: torch.Generator,
) -> Stage1:
    """Losses of pictures (B, C, H, W) and their texts, ids and mask (B, L).

    Args:
        follows: (B, B) bool, whether the picture of the row follows the text of the column; true on the diagonal.
        ends: the tokens that begin and end a generated text.
        generator: draws the hard negatives.
    """
    with torch.no_grad():
        features = model.vision_model(pixel_values=pixels).last_hidden_state
    similarity = similarities(*contrastive_features(model, features, ids, mask))
    itc = contrastive_loss(similarity, follows)
    texts, images = hard_negatives(similarity.detach(), follows, generator)
    rows = torch.arange(len(ids), device=ids.device)
    seen, told = torch.cat([rows, rows, images]), torch.cat([rows, texts, rows])
    logits = matching_logits(model, features[seen], ids[told], mask[told])
    itm = F.cross_entropy(logits, follows[seen, told].long())
    return Stage1(itc, itm, generation_loss(model, features, ids, mask, ends))


def similarities(queries: Tensor, texts: Tensor) -> Tensor:
    """The largest cosine over the queries (B, Q, E) with each text (C, E), in units of the temperature: (B, C)."""
    return torch.einsum("bqe,ce->bcq", queries, texts).amax(-1) / TEMPERATURE


def contrastive_loss(similarity: Tensor, follows: Tensor, smoothing: float = 0.1) -> Tensor:
    """Cross-entropy from pictures to texts and back, similarity and follows (B, B); true partners share alike."""
    both = ((similarity, follows), (similarity.T, follows.T))
    losses = [
        F.cross_entropy(scores, right / right.sum(1, keepdim=True), label_smoothing=smoothing)
        for scores, right in ((s, f.to(s.dtype)) for s, f in both)
    ]
    return sum(losses) / 2


def hard_negatives(similarity: Tensor, follows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each picture a text, and for each text a picture, (B,) each, drawn by similarity among the false ones.

    Where all of a batch match one partner, any is drawn; its label says that it matches.
    """

    def drawn(scores: Tensor, right: Tensor) -> Tensor:
        chance = scores.masked_fill(right & ~right.all(1, keepdim=True), -torch.inf).softmax(1)
        return torch.multinomial(chance.cpu(), 1, generator=generator)[:, 0].to(scores.device)

    return drawn(similarity, follows), drawn(similarity.T, follows.T)


def generation_loss(
    model: Blip2ForImageTextRetrieval, features: Tensor, ids: Tensor, mask: Tensor, ends: tuple[int, int]
) -> Tensor:
    """Next-token cross-entropy of texts, ids and mask (B, L), that see features (B, 1 + N, W) through the queries."""
    begin, end = ends
    queries = model.query_tokens.expand(len(ids), -1, -1)
    given = F.pad(ids, (1, 0), value=begin)
    there = F.pad(mask, (1, 0), value=1).bool()
    out = model.qformer(
        query_embeds=model.embeddings(input_ids=given, query_embeds=queries),
        query_length=queries.shape[1],
        attention_mask=generation_mask(queries.shape[1], there),
        encoder_hidden_states=features,
    ).last_hidden_state[:, queries.shape[1] :]
    logits = out @ model.embeddings.word_embeddings.weight.T
    length = mask.sum(1, keepdim=True)
    target = F.pad(ids, (0, 1)).scatter(1, length, end)
    return F.cross_entropy(logits[there], target[there])


def generation_mask(queries: int, there: Tensor) -> Tensor:
    """The additive mask (B, 1, Q + L, Q + L) of a text (B, L) that is `there` and sees the queries and its own past."""
    length = there.shape[1]
    allowed = torch.zeros(len(there), queries + length, queries + length, dtype=torch.bool, device=there.device)
    allowed[:, :, :queries] = True
    causal = torch.ones(length, length, dtype=torch.bool, device=there.device).tril()
    allowed[:, queries:, queries:] = causal & there[:, None, :]
    return torch.zeros(allowed.shape, device=there.device).masked_fill(~allowed, torch.finfo(torch.float32).min)[
        :, None
    ]
