"""What an evaluation of a reward found: every number of its report."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from pipeline.assessing.pressure import Pressure
from pipeline.assessing.trials import Invariance
from rewards.evaluation import Evaluation
from rewards.leakage import Leakage
from rewards.metrics.intervals import Estimate
from rewards.shortcuts import Effect, Shortcut
from rewards.tables import Refused


@dataclass(frozen=True)
class Measured:
    """What the reward was measured on: so many pairs and pictures of so many prompts; `cut_off` where the table has
    more."""

    source: str
    pairs: int
    pictures: int
    prompts: int
    cut_off: bool
    refused: tuple[Refused, ...]


@dataclass(frozen=True)
class Provenance:
    """What made the numbers.

    Attributes:
        weights: sha256 of the reward model; "" where the scores are those of a table.
        backbone, loss: their settings; `parameters` of the model.
        training: pairs and steps it learned from.
        judge, template: who labelled the pairs it learned from, and what it was asked; "" where that is not known.
        settings: fingerprint of the run's settings.
        inputs: fingerprints of the run's artifacts.
        versions: of the libraries that trained it.
    """

    weights: str
    backbone: Mapping[str, Any]
    loss: Mapping[str, Any]
    parameters: int
    training: Mapping[str, Any]
    judge: str
    template: str
    settings: str
    inputs: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Assessment:
    """Everything that was found.

    Attributes:
        shortcuts: how the reward moves with the look of pictures.
        effects: what changes of pictures and prompts do to it, and `invariances` what changes of how it is run do; none
            where there is no model to try.
        choosing, tuning: what becomes of the truth under best-of-n and under fine-tuning; None where it was not tried.
        leakage: what of the material it was trained on; None where that is not known.
        notes: what is missing here, and why, one a sentence.
    """

    name: str
    measured: Measured
    evaluation: Evaluation
    shortcuts: tuple[Shortcut, ...]
    effects: tuple[Effect, ...]
    invariances: tuple[Invariance, ...]
    choosing: Pressure | None
    tuning: Pressure | None
    leakage: Leakage | None
    provenance: Provenance
    notes: tuple[str, ...]


def as_json(found: Any) -> Any:
    """`found` as JSON holds it, field by field: no NaN, and every estimate with its `note`."""
    if isinstance(found, Estimate):
        return {**_fields(found), "note": found.note}
    if is_dataclass(found):
        return _fields(found)
    if isinstance(found, Mapping):
        return {str(name): as_json(value) for name, value in found.items()}
    if isinstance(found, tuple | list):
        return [as_json(value) for value in found]
    if isinstance(found, float) and not math.isfinite(found):
        return None
    return found


def _fields(found: Any) -> dict[str, Any]:
    return {field.name: as_json(getattr(found, field.name)) for field in fields(found)}
