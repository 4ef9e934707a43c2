"""A BLIP-2 that matches pictures and texts (2301.12597, section 3.2): no question, one number."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, Blip2ForImageTextRetrieval, PreTrainedTokenizerBase
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from judges.base import Sample, Verdict, bare_verdict, only_image
from judges.weights import load_whole

TEMPERATURE = 0.07
"""Of the contrastive loss at its start; the published checkpoints do not hold what it became."""


class MatchingJudge:
    """Scores by one of the two heads of `Blip2ForImageTextRetrieval`.

    `itm`, image-text matching, reads picture and text together: the margin is its log-odds. `itc`, image-text
    contrast, compares them apart: the margin is the largest cosine over the queries in units of `TEMPERATURE`, good for
    ranking, and a probability only after calibration.
    """

    def __init__(
        self,
        model: Blip2ForImageTextRetrieval,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BlipImageProcessorPil,
        head: Literal["itm", "itc"] = "itm",
        id: str = "blip2",
        batch: int = 64,
    ):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.image_processor, self.head, self.batch = image_processor, head, batch
        self.id, self.template = f"{head}({id})", "{}"

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str = "cpu", **settings) -> "MatchingJudge":
        """Load from a local folder or a hub id; `settings` are those of the constructor.

        Raises:
            ValueError: the checkpoint has no heads to match with.
        """
        return cls(
            load_whole(Blip2ForImageTextRetrieval, folder).to(device),
            AutoTokenizer.from_pretrained(folder),
            BlipImageProcessorPil.from_pretrained(folder),
            **{"id": str(folder), **settings},
        )

    @torch.inference_mode()
    def score(self, images: Sequence[Sample], prompts: Sequence[str]) -> list[Verdict]:
        limit = self.model.config.qformer_config.max_position_embeddings
        excess = {prompt: len(self.tokenizer(prompt).input_ids) - limit for prompt in dict.fromkeys(prompts)}
        fit = [row for row, prompt in enumerate(prompts) if excess[prompt] <= 0]
        margins = {}
        for start in range(0, len(fit), self.batch):
            rows = fit[start : start + self.batch]
            found = self._margins([only_image(images[r]) for r in rows], [prompts[r] for r in rows])
            margins.update(zip(rows, found, strict=True))
        return [bare_verdict(self, margins.get(row, math.nan), excess[prompt]) for row, prompt in enumerate(prompts)]

    def _margins(self, images: Sequence, prompts: Sequence[str]) -> list[float]:
        pixels = self.image_processor(images, return_tensors="pt").pixel_values
        features = self.model.vision_model(pixels.to(self.model.device, self.model.dtype)).last_hidden_state
        told = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(self.model.device)
        if self.head == "itm":
            logits = matching_logits(self.model, features, told.input_ids, told.attention_mask)
            return (logits[:, 1] - logits[:, 0]).tolist()
        seen, read = contrastive_features(self.model, features, told.input_ids, told.attention_mask)
        return ((seen @ read[:, :, None]).amax((1, 2)) / TEMPERATURE).tolist()


def matching_logits(model: Blip2ForImageTextRetrieval, features: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The image-text-matching logits (B, 2) of features (B, 1 + N, W) and texts (B, L), averaged over the queries."""
    queries = model.query_tokens.expand(len(features), -1, -1)
    seen = torch.cat([torch.ones(queries.shape[:2], dtype=mask.dtype, device=mask.device), mask], 1)
    out = model.qformer(
        query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
        query_length=queries.shape[1],
        attention_mask=seen,
        encoder_hidden_states=features,
    ).last_hidden_state
    return model.itm_head(out[:, : queries.shape[1]]).mean(1)


def contrastive_features(
    model: Blip2ForImageTextRetrieval, features: Tensor, ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Unit vectors of queries (B, Q, E) that saw features (B, 1 + N, W), and of texts (B, L) by themselves (B, E)."""
    queries = model.query_tokens.expand(len(features), -1, -1)
    seen = model.qformer(query_embeds=queries, encoder_hidden_states=features).last_hidden_state
    told = model.qformer(query_embeds=model.embeddings(input_ids=ids), query_length=0, attention_mask=mask)
    return (
        F.normalize(model.vision_projection(seen), dim=-1),
        F.normalize(model.text_projection(told.last_hidden_state[:, 0]), dim=-1),
    )
