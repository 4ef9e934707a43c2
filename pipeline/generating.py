"""Which generator paints in a run, and how a diffusers pipeline is loaded and asked."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

import models
from models import adapters
from pipeline.judging import checkpoint_id, told
from pipeline.settings import Section
from pipeline.store import fingerprint

if TYPE_CHECKING:
    from models.generator import Generator
    from models.guidance import Guidance

Dtype = Literal["float32", "bfloat16", "float16"]
Pixels = Annotated[int, Field(ge=1)]


class GuidanceConfig(Section):
    """Classifier-free guidance, whose weight may change along the path (`models.guidance`). A number is its scale."""

    scale: float = Field(ge=1)
    schedule: Literal["constant", "interval", "linear", "cosine", "clamp-linear"] = "constant"
    low: float = Field(0.0, ge=0, le=1)
    high: float = Field(1.0, ge=0, le=1)
    least: float = Field(1.0, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _number_is_scale(cls, given: Any) -> Any:
        return {"scale": given} if isinstance(given, int | float) else given

    @model_validator(mode="after")
    def _weighs(self) -> Self:
        self.build()
        return self

    def build(self) -> "Guidance":
        return models.Guidance(**self.model_dump())


class GeneratorConfig(Section):
    """Which generator, and for a pipeline of diffusers how it is loaded and asked. Null is the family's own.

    Attributes:
        checkpoint: a folder of ours, or a pipeline of diffusers in a folder or, by its id, on the hub.
        resolution: pixels along a side of a picture, or [height, width].
        guidance: the scale of classifier-free guidance, 1 for none, or its schedule too.
        embedded_guidance: the scale that a distilled network is told.
        negative: the prompt that guidance moves away from.
        max_tokens: to which prompts are cut and padded, where the family leaves the choice.
        dtype: of the network's weights; those that learn are float32, and `finetune.dtype` is what it computes in.
        text_dtype, codec_dtype: of the text encoders' weights, and of the codec's.
        offload: text encoders and codec wait in main memory while they are not used.
        cached_prompts: so many prompts are kept in main memory as what they were encoded to.
        cache: a folder where all of them are kept, for later stages and runs too.
        revision, variant: of a hub id, and of the weight files (`fp16`).
    """

    checkpoint: str
    resolution: Pixels | tuple[Pixels, Pixels] | None = None
    guidance: GuidanceConfig | None = None
    embedded_guidance: float | None = Field(None, gt=0)
    negative: str = ""
    max_tokens: int | None = Field(None, ge=1)
    dtype: Dtype = "float32"
    text_dtype: Dtype = "float32"
    codec_dtype: Dtype = "float32"
    offload: bool = True
    cached_prompts: int = Field(512, ge=1)
    cache: str | None = None
    revision: str | None = None
    variant: str | None = None

    @property
    def ours(self) -> bool:
        """Whether the checkpoint is a folder of ours, rather than a pipeline of diffusers."""
        folder = Path(self.checkpoint)
        return folder.is_dir() and not (folder / "model_index.json").is_file()

    def depends(self) -> str | dict[str, Any]:
        """What pictures depend on: the checkpoint and, where there are any, the settings that differ from its own."""
        unseen = {"checkpoint", "offload", "cached_prompts", "cache"}
        settings = self.model_dump(mode="json", exclude=unseen, exclude_defaults=True)
        identity = checkpoint_id(self.checkpoint)
        return {"checkpoint": identity, **settings} if settings else identity

    def build(self, device: str, lora: Path | None = None, waits: bool = False) -> "Generator":
        """The generator on `device`, with the adapter, or the whole network, in the folder `lora` if given; or where it
        `waits`, in main memory.

        Raises:
            UserError: a setting does not suit it, or a part of it is missing.
        """
        with told("generator"):
            return models.load_generator(self.checkpoint, lora, device, self._options(), waits)

    def tuned(self, base: "Generator", lora: Path) -> "Generator":
        """A second generator beside `base`, which these settings built, with the adapter, or the whole network, in the
        folder `lora`; it is where `base` is, whose text encoders and codec it shares.

        Raises:
            UserError: the adapter does not suit it.
        """
        with told("generator"):
            return models.tuned(base, lora)

    def _options(self) -> "adapters.Options":
        settings = self.model_dump(exclude={"checkpoint", "guidance", "cache"})
        guidance = self.guidance and self.guidance.build()
        return adapters.Options(guidance=guidance, cache=self._prompts_folder(), **settings)

    def _prompts_folder(self) -> str | None:
        """Where prompts are kept as what the text encoders of this very checkpoint make of them."""
        if self.cache is None:
            return None
        weights = {name: getattr(self, name) for name in ("revision", "variant")}
        return str(Path(self.cache) / fingerprint({"checkpoint": checkpoint_id(self.checkpoint), **weights})[:16])
