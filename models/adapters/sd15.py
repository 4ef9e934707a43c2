"""Stable Diffusion 1 and 2 (2112.10752): a U-Net on the tokens of one CLIP.

Left out: the safety checker, image prompts and skipped layers that the pipeline also takes.
"""

from typing import ClassVar

from diffusers import StableDiffusionPipeline

from models.adapters.unet import UNetGenerator
from models.generator import Conditioning


class SD15Generator(UNetGenerator):
    """Guidance 7.5, as in the pipeline; DDPO (2305.13301, appendix) trains and samples with 5."""

    pipeline = StableDiffusionPipeline
    loading: ClassVar = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    scale = 7.5

    def encoded(self, prompts: list[str]) -> Conditioning:
        tokens, _ = self.pipe.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return Conditioning(tokens)
