"""Judges of one number: a picture and a text are encoded apart and compared, without a question.

What loads is a `CLIPModel` in transformers' format: OpenAI's and LAION's CLIP for CLIPScore, PickScore (2305.01569,
`yuvalkirstain/PickScore_v1`), and HPSv2 (2306.09341) where its open_clip weights were converted to one. What does not:
ImageReward (2304.05977), a BLIP with a head of its own, and HPSv3, a Qwen2-VL with one; transformers knows neither.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, CLIPModel, PreTrainedTokenizerBase
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from judges.base import Sample, Verdict, bare_verdict, only_image
from judges.weights import load_whole

Kind = Literal["clipscore", "preference"]

TEMPLATES: dict[Kind, str] = {"clipscore": "A photo depicts {}", "preference": "{}"}
WEIGHT = 2.5
"""Of a cosine in CLIPScore (2104.08718, section 3), which stretches it to about 0 to 1."""


class ClipJudge:
    """Scores by the cosine between a picture's and a prompt's embedding.

    `clipscore` is 2.5 max(cosine, 0) of a prompt after "A photo depicts" (2104.08718). `preference` is exp(s) cosine
    with the s that the model learned, the number that PickScore and HPSv2 were trained on: differences between two
    pictures of one prompt are the log-odds, in nats, that people prefer the first. Either is a margin good for
    ranking, and a probability only after calibration.

    Each picture and each text is encoded once a call. A text of more tokens than the encoder reads (77) is not cut:
    its verdict is invalid.

    Args:
        template: the text for a prompt, with `{}` where it goes; by default that of `TEMPLATES`.
        batch: pictures, or texts, encoded at once.

    Raises:
        ValueError: there is no such kind, or the template has no place for the prompt.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: CLIPImageProcessorPil,
        kind: Kind = "clipscore",
        template: str | None = None,
        id: str = "clip",
        batch: int = 64,
    ):
        if kind not in TEMPLATES:
            raise ValueError(f"kind: {kind!r} is none of {', '.join(TEMPLATES)}")
        self.template = TEMPLATES[kind] if template is None else template
        if self.template.count("{}") != 1:
            raise ValueError(f"template: {self.template!r} must hold {{}} once")
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.image_processor, self.kind, self.batch = image_processor, kind, batch
        self.id = f"{kind}({id})"

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str = "cpu",
        dtype: str | torch.dtype = "auto",
        processor: str | Path | None = None,
        **settings,
    ) -> "ClipJudge":
        """Load from a local folder or a hub id; `settings` are those of the constructor.

        Args:
            processor: where tokenizer and image processor are, if not beside the weights.

        Raises:
            ValueError: the checkpoint is no CLIP.
        """
        config = AutoConfig.from_pretrained(folder)
        if config.model_type != "clip":
            raise ValueError(
                f"checkpoint: {folder} holds a {config.model_type} model; a ClipJudge needs a CLIPModel in "
                "transformers' format, such as PickScore"
            )
        return cls(
            load_whole(CLIPModel, folder, dtype).to(device),
            AutoTokenizer.from_pretrained(processor or folder),
            CLIPImageProcessorPil.from_pretrained(processor or folder),
            **{"id": str(folder), **settings},
        )

    @torch.inference_mode()
    def score(self, images: Sequence[Sample], prompts: Sequence[str]) -> list[Verdict]:
        """One verdict for each picture and its prompt. Raises ValueError for a sample of several pictures."""
        limit = self.model.config.text_config.max_position_embeddings
        excess = {p: len(self.tokenizer(self.template.format(p)).input_ids) - limit for p in dict.fromkeys(prompts)}
        fit = [row for row, prompt in enumerate(prompts) if excess[prompt] <= 0]
        seen = self._encoded(self._look, [only_image(images[row]) for row in fit])
        place = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts[row] for row in fit))}
        read = self._encoded(self._tell, list(place))[[place[prompts[row]] for row in fit]]
        margins = dict(zip(fit, self._margins((seen * read).sum(1)), strict=True))
        return [bare_verdict(self, margins.get(row, math.nan), excess[prompt]) for row, prompt in enumerate(prompts)]

    def _encoded(self, encode: Callable[[Sequence], Tensor], items: Sequence) -> Tensor:
        """Unit vectors (N, E) in single precision."""
        found = [encode(items[start : start + self.batch]) for start in range(0, len(items), self.batch)]
        return F.normalize(torch.cat(found).float(), dim=-1).cpu() if found else torch.empty(0, 0)

    def _look(self, images: Sequence[np.ndarray]) -> Tensor:
        pixels = self.image_processor(list(images), return_tensors="pt").pixel_values
        return self.model.get_image_features(pixels.to(self.model.device, self.model.dtype)).pooler_output

    def _tell(self, prompts: Sequence[str]) -> Tensor:
        """Padded on the right: text is read causally up to its end, so a text does not depend on its batch-mates."""
        texts = [self.template.format(prompt) for prompt in prompts]
        told = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.model.device)
        return self.model.get_text_features(told.input_ids, told.attention_mask).pooler_output

    def _margins(self, cosines: Tensor) -> list[float]:
        if self.kind == "clipscore":
            return (WEIGHT * cosines.clamp(min=0)).tolist()
        return (self.model.logit_scale.exp().item() * cosines).tolist()
