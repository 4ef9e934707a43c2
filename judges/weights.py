"""The weights of a checkpoint, entire or not at all."""

from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel

M = TypeVar("M", bound=PreTrainedModel)


def load_whole(kind: type[M], folder: str | Path, dtype: str | torch.dtype = "auto") -> M:
    """A model of which the checkpoint holds every weight; otherwise ValueError, as new weights would score as well."""
    model, report = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"checkpoint: {folder} lacks {missing[0]}; use one that was saved by {kind.__name__}")
    return model
