"""How the noise behind a picture is looked for."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

import models
from pipeline.settings import Section

if TYPE_CHECKING:
    from models.inversion import Inversion


class InvertConfig(Section):
    """The method, and the steps that it goes back and that pictures are painted in; see `models.inversion`.

    The weaker the guidance (`generator.guidance`), the better any of them works.

    Attributes:
        iterations: network calls a step of `fixed-point`.
        keep, start, length: how much of each of which steps `easyinv` keeps.
        gamma: how much `bdia` corrects.
    """

    method: Literal["ddim", "fixed-point", "easyinv", "bdia"] = "fixed-point"
    steps: int = Field(30, ge=1)
    shift: float = Field(1.0, gt=0)
    iterations: int = Field(5, ge=1)
    keep: float = Field(0.5, gt=0, le=1)
    start: float = Field(0.05, ge=0, le=1)
    length: float = Field(0.2, ge=0, le=1)
    gamma: float = Field(1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _has_steps_enough(self) -> Self:
        self.build()
        if self.method == "bdia" and self.steps < 2:
            raise ValueError(f"steps: bdia takes two or more, not {self.steps}")
        return self

    def build(self) -> "Inversion":
        return models.Inversion(**self.model_dump(exclude={"steps", "shift"}))
