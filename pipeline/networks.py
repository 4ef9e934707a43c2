"""Settings of the native networks, for pretraining: which one, and what is chosen of its parts."""

from typing import Any, Literal

from pydantic import Field

from models.dit import ConditioningKind, size_of
from models.layers import AttentionKind, MLPKind
from models.positions import Kind, Scaling
from pipeline.settings import Section


class _Network(Section):
    """What all native networks let one choose.

    Attributes:
        attention: `softmax`, or `linear` as in SANA.
        kv_heads: heads of keys and values, which those of queries share; as many as of queries where it is null.
        qk_norm: whether queries and keys are normalised.
        positions: how tokens know where they are, see `models.positions`; `theta` is the longest wavelength of a rotary
            one over 2 pi, `scaling` what becomes of it at another resolution.
    """

    attention: AttentionKind = "softmax"
    kv_heads: int | None = Field(None, ge=1)
    mlp: MLPKind = "relu2"
    qk_norm: bool = True
    positions: Kind = "axial"
    theta: float = Field(100.0, gt=0)
    scaling: Scaling = "interpolate"


class MMDiTNetwork(_Network):
    """Joint attention of text and image.

    Attributes:
        single: how many of the blocks, the last ones, have one stream for both; all of them are as Z-Image's, some as
            FLUX's, none as SD3's.
        parallel: whether those compute attention and MLP side by side, as FLUX's do.
        fused: deep fusion, with a frozen language model in place of the text encoder.
    """

    type: Literal["mmdit"] = "mmdit"
    single: int = Field(0, ge=0)
    parallel: bool = False
    fused: bool = False

    @property
    def network(self) -> str:
        return "MMDiT"

    @property
    def choices(self) -> dict[str, Any]:
        """As `models.pretrain.new_generator` takes them."""
        return self.model_dump(exclude={"type"})


class DiTNetwork(_Network):
    """A DiT under a text.

    Attributes:
        name: of a size, such as DiT-S/2, in place of the job's width and depth.
    """

    type: Literal["dit"]
    name: str | None = None
    conditioning: ConditioningKind = "cross-attention"

    @property
    def network(self) -> str:
        return "DiT"

    @property
    def choices(self) -> dict[str, Any]:
        """As `models.pretrain.new_generator` takes them. Raises ValueError where the size is not known."""
        return self.model_dump(exclude={"type", "name"}) | (size_of(self.name) if self.name else {})


NetworkConfig = MMDiTNetwork | DiTNetwork
"""Told apart by `type`."""
