"""How a diffusers pipeline is loaded and asked."""

from dataclasses import dataclass

from models.guidance import Guidance


@dataclass(frozen=True)
class Options:
    """Settings of an adapter; None stands for the family's own.

    Attributes:
        resolution: of pictures, in pixels, or (height, width).
        guidance: classifier-free guidance.
        embedded_guidance: the scale that a distilled network is told, where the family's takes one.
        negative: the prompt that guidance moves away from.
        max_tokens: to which prompts are cut and padded, where the family's text encoder has no fixed length.
        dtype: of the network's weights; text_dtype: of the text encoders'; codec_dtype: of the codec's.
        offload: text encoders and codec wait in main memory while they are not used.
        cached_prompts: so many prompts' conditionings are kept in main memory.
        cache: a folder that keeps all of them; it must be that of the same text encoders' weights.
        revision, variant: of a hub id, and of the weight files (`fp16`).
    """

    resolution: int | tuple[int, int] | None = None
    guidance: Guidance | None = None
    embedded_guidance: float | None = None
    negative: str = ""
    max_tokens: int | None = None
    dtype: str = "float32"
    text_dtype: str = "float32"
    codec_dtype: str = "float32"
    offload: bool = True
    cached_prompts: int = 512
    cache: str | None = None
    revision: str | None = None
    variant: str | None = None
