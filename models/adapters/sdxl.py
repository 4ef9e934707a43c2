"""Stable Diffusion XL (2307.01952): a U-Net on the tokens of two CLIPs, their pooled text, and the picture's size.

Pictures are told to be whole and of the size that is painted (section 2.2). Left out: the refiner, the watermark, and
the image prompts and skipped layers that the pipeline also takes.
"""

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from models.adapters.unet import UNetGenerator
from models.generator import Conditioning


class SDXLGenerator(UNetGenerator):
    """Guidance 5, as in the pipeline."""

    pipeline = StableDiffusionXLPipeline
    text_parts = ("text_encoder", "text_encoder_2")
    scale = 5.0

    def encoded(self, prompts: list[str]) -> Conditioning:
        """No prompt at all is zeros, where the pipeline's config says so."""
        tokens, _, pooled, _ = self.pipe.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        cond = Conditioning(tokens, {"pooled": pooled})
        empty = self.pipe.config.force_zeros_for_empty_prompt and not any(prompts)
        return cond.map(torch.zeros_like) if empty else cond

    def added(self, cond: Conditioning) -> dict[str, Tensor]:
        size = [float(pixels) for pixels in (self.height, self.width, 0, 0, self.height, self.width)]
        sizes = torch.tensor(size, device=cond.device).expand(len(cond), -1)
        return {"text_embeds": cond.more["pooled"], "time_ids": sizes}
