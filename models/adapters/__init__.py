"""Generators that are diffusers pipelines, one file a family: the only place that imports one.

Names are imported when they are first used, and with them the pipeline's own file.
"""

import lazy_loader as lazy

FAMILIES = {
    "DiTPipeline": "DiTGenerator",
    "Flux2KleinPipeline": "Flux2KleinGenerator",
    "Flux2Pipeline": "Flux2Generator",
    "FluxPipeline": "FluxGenerator",
    "PixArtAlphaPipeline": "PixArtAlphaGenerator",
    "PixArtSigmaPipeline": "PixArtGenerator",
    "QwenImagePipeline": "QwenImageGenerator",
    "SanaPipeline": "SanaGenerator",
    "StableDiffusion3Pipeline": "SD3Generator",
    "StableDiffusionPipeline": "SD15Generator",
    "StableDiffusionXLPipeline": "SDXLGenerator",
    "ZImagePipeline": "ZImageGenerator",
}
"""The adapter of a pipeline, by the `_class_name` in its model_index.json."""

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "base": ["DiffusersGenerator"],
        "dit": ["DiTGenerator"],
        "flux": ["FluxGenerator"],
        "flux2": ["Flux2Generator", "Flux2KleinGenerator"],
        "options": ["Options"],
        "pixart": ["PixArtAlphaGenerator", "PixArtGenerator"],
        "qwen_image": ["QwenImageGenerator"],
        "sana": ["SanaGenerator"],
        "sd15": ["SD15Generator"],
        "sd3": ["SD3Generator"],
        "sdxl": ["SDXLGenerator"],
        "z_image": ["ZImageGenerator"],
    },
)
