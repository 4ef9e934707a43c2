"""The pictures that a run's preference pairs are about."""

import io
from collections.abc import Iterable, Mapping

import datasets
import numpy as np
from PIL import Image

from judges.images import open_image
from pipeline.store import Artifact, read_rows

TABLE_PICTURES = "pictures-*.parquet"
"""The files of `prefer` that hold the pictures of people's pairs."""

FEATURES = datasets.Features(
    {
        "prompt_id": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "skill": datasets.Value("string"),
        "sample": datasets.Value("int32"),
        "image": datasets.Image(),
    }
)


class Pictures:
    """Pictures by prompt id and sample number, held as they were encoded and decoded whenever one is asked for."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self._encoded = rows.data.column("image")
        self._place = {key: row for row, key in enumerate(zip(rows["prompt_id"], rows["sample"], strict=True))}

    def __call__(self, prompt_id: str, sample: int) -> np.ndarray:
        """The picture, uint8 (H, W, 3)."""
        return open_image(self._encoded[self._place[prompt_id, sample]].as_py()["bytes"])

    def one_of_each_size(self) -> list[tuple[str, int]]:
        """The first picture of every width and height, by the headers of all."""
        first: dict[tuple[int, int], tuple[str, int]] = {}
        for key, row in self._place.items():
            with Image.open(io.BytesIO(self._encoded[row].as_py()["bytes"])) as image:
                first.setdefault(image.size, key)
        return list(first.values())

    def of(self, keys: Iterable[tuple[str, int]]) -> list[np.ndarray]:
        """Several of them, in order."""
        return [self(*key) for key in keys]


def source_of(inputs: Mapping[str, Artifact]) -> tuple[Artifact, str]:
    """Where the pictures of the pairs are, with the pattern of their files: in `sample`, or in `prefer` if people's."""
    return (inputs["sample"], "shard-*.parquet") if "sample" in inputs else (inputs["prefer"], TABLE_PICTURES)


def pictures_of(inputs: Mapping[str, Artifact]) -> Pictures:
    """The pictures of the pairs, in memory; `inputs` are the artifacts of a stage that needs `sample` and `prefer`."""
    artifact, pattern = source_of(inputs)
    return Pictures(read_rows(artifact, pattern, ["prompt_id", "sample", "image"]))
