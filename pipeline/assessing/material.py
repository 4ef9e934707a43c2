"""What a reward is evaluated on: the held-out pairs of its run, or a table of people's preferences."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from judges.images import open_image
from judges.shapes.oracle import gold
from pipeline.pictures import source_of
from pipeline.settings import UserError
from pipeline.store import Artifact, read_rows
from rewards.evaluation import Pairs, TaskName
from rewards.leakage import ImageHash, Leakage, image_hash, leakage
from rewards.readers import ReadPair, opened, read_pairs
from rewards.tables import Refused, Table

OWN, OTHER = "generator", "generator, foreign"
"""What painted the pictures of a run: those that are foreign were painted from another prompt (`sample.foreign`)."""

MOST = 4
"""How far the prompts of the embedded world count."""

_AT_ONCE = 64
_TRAINING = ("steps", "best_step", "train_pairs", "heldout_pairs", "trained_parameters")


@dataclass(frozen=True)
class Picture:
    """One picture, encoded or where it lies, and what is known of it; NaN where it is not known.

    Attributes:
        judge: the judge's margin in nats.
        gold: 1 where it follows its prompt, otherwise 0.
        score: that of the table.
    """

    prompt_id: str
    prompt: str
    skill: str
    model: str
    file: bytes | Path
    judge: float = np.nan
    gold: float = np.nan
    score: float = np.nan

    def image(self) -> np.ndarray:
        """uint8 (H, W, 3)."""
        return open_image(self.file)


@dataclass(frozen=True)
class Learned:
    """What a reward model was trained on: prompts, and the hashes of its pictures by name."""

    prompts: frozenset[str]
    images: Mapping[str, ImageHash]


@dataclass(frozen=True)
class Material:
    """Pictures and pairs of them.

    Attributes:
        source: where they are from, in words.
        task: who labelled the pairs.
        pairs: both places among the pictures, and the label.
        judge, template: who gave the margins; "" where nobody did.
        refused: rows of the table that could not be used.
        cut_off: whether the table has more pairs than were read.
        scored: whether the scores are those of the table.
        digest: of all that was read of a table; "" for a run's own.
    """

    source: str
    task: TaskName
    pictures: tuple[Picture, ...]
    pairs: tuple[tuple[int, int, float], ...]
    judge: str = ""
    template: str = ""
    refused: tuple[Refused, ...] = ()
    cut_off: bool = False
    scored: bool = False
    digest: str = field(default="", repr=False)

    @property
    def own(self) -> bool:
        """Whether it is the run's own, rather than a table."""
        return not self.digest

    def labelled(self) -> Pairs:
        """The pairs as arrays."""
        first, second, label = zip(*self.pairs, strict=True)
        return Pairs(self.task, np.array(first), np.array(second), np.array(label, dtype=float))

    def images(self) -> Iterator[tuple[range, list[np.ndarray]]]:
        """The places of the pictures, and the pictures, a few in memory at a time."""
        for start in range(0, len(self.pictures), _AT_ONCE):
            part = range(start, min(start + _AT_ONCE, len(self.pictures)))
            yield part, [self.pictures[place].image() for place in part]


def of_run(config: Any, inputs: Mapping[str, Artifact]) -> Material:
    """The held-out pairs of a run and all pictures of their prompts.

    Where a judge labelled them its verdicts are known, and gold in the embedded world.
    """
    pairs = [pair for pair in read_rows(inputs["prefer"]) if pair["split"] == "heldout"]
    prompts = {pair["prompt_id"] for pair in pairs}
    judged = "judge" in inputs
    verdicts = _margins(inputs["judge"]) if judged else {}
    pictures, place = [], {}
    for row in _encoded(inputs):
        if row["prompt_id"] not in prompts:
            continue
        file, key = row["image"]["bytes"], (row["prompt_id"], row["sample"])
        # What people wrote prompts for is not known to be of the embedded world.
        follows = gold_of(config, [open_image(file)], [row["prompt"]])[0] if judged else np.nan
        model = "" if not judged else OWN if row["painted"] == row["prompt"] else OTHER
        place[key] = len(pictures)
        named = (row["prompt_id"], row["prompt"], row["skill"], model)
        pictures.append(Picture(*named, file, verdicts.get(key, np.nan), follows))
    return Material(
        source="the held-out pairs of its run",
        task="judge" if judged else "people",
        pictures=tuple(pictures),
        pairs=tuple(
            (place[pair["prompt_id"], pair["sample_a"]], place[pair["prompt_id"], pair["sample_b"]], pair["label"])
            for pair in pairs
        ),
        judge=pairs[0]["judge"],
        template=pairs[0]["template"],
    )


def of_table(reader: str, table: Table, most: int, most_refused: float) -> Material:
    """The first `most` usable pairs of a table.

    Raises:
        UserError: it cannot be read, or holds no usable pair, or more than the share `most_refused` of its rows cannot
            be used; the line names the first of these.
    """
    refused: list[Refused] = []
    pictures: list[Picture] = []
    place: dict[tuple[Any, ...], int] = {}
    pairs, digest, cut_off = [], hashlib.sha256(), False
    try:
        for pair, first, second in opened(read_pairs(reader, table, refused), refused):
            if len(pairs) == most:
                cut_off = True
                break
            places = []
            for shown, image in zip(_sides(pair), (first, second), strict=True):
                pixels = image_hash(image).pixels
                key = (shown.prompt_id, shown.prompt, pixels, repr(shown.score))
                if key not in place:
                    place[key] = len(pictures)
                    pictures.append(shown)
                places.append(place[key])
                digest.update(repr((key, shown.skill, shown.model)).encode())
            digest.update(repr(pair.label).encode())
            pairs.append((*places, pair.label))
    except ValueError as error:
        raise UserError(str(error)) from None
    _check_refused(table, refused, len(pairs), most_refused)
    return Material(
        source=table.source,
        task="people",
        pictures=tuple(pictures),
        pairs=tuple(pairs),
        refused=tuple(refused),
        cut_off=cut_off,
        scored=all(np.isfinite(picture.score) for picture in pictures),
        digest=digest.hexdigest(),
    )


def gold_of(config: Any, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
    """What the oracle of the embedded world says of pictures, 1 or 0; NaN in every other world."""
    if config.prompts.type != "shapes":
        return [np.nan] * len(images)
    return [float(right) for right in gold(images, prompts)]


def learned(inputs: Mapping[str, Artifact]) -> Learned | None:
    """What the reward model of a run was trained on; None where that does not stand."""
    if "prefer" not in inputs:
        return None
    pairs = read_rows(inputs["prefer"], columns=["prompt_id", "prompt", "split"])
    prompts = {pair["prompt_id"]: pair["prompt"] for pair in pairs if pair["split"] == "train"}
    images = {
        f"sample {row['sample']} of {row['prompt']!r}": image_hash(open_image(row["image"]["bytes"]))
        for row in _encoded(inputs)
        if row["prompt_id"] in prompts
    }
    return Learned(frozenset(prompts.values()), images)


def training(reward: Artifact) -> dict[str, Any]:
    """How much the reward model learned from."""
    told = json.loads(reward.path("metrics.json").read_text(encoding="utf-8"))
    return {name: told[name] for name in _TRAINING}


def leaked(known: Learned, material: Material) -> Leakage:
    """What of the material the reward model was trained on."""
    pictures = material.pictures
    images = {
        f"picture {place} of {pictures[place].prompt!r}": image_hash(image)
        for part, shown in material.images()
        for place, image in zip(part, shown, strict=True)
    }
    return leakage(known.prompts, {picture.prompt for picture in pictures}, known.images, images)


def _margins(judge: Artifact) -> dict[tuple[str, int], float]:
    rows = read_rows(judge, columns=["prompt_id", "sample", "margin", "valid"])
    return {(row["prompt_id"], row["sample"]): row["margin"] if row["valid"] else np.nan for row in rows}


def _encoded(inputs: Mapping[str, Artifact]) -> datasets.Dataset:
    """The pictures of a run's pairs, encoded, and what is known of them."""
    return read_rows(*source_of(inputs)).cast_column("image", datasets.Image(decode=False))


def _sides(pair: ReadPair) -> tuple[Picture, Picture]:
    named = (pair.prompt_id, pair.prompt, pair.skill)
    return (
        Picture(*named, pair.model_a, pair.image_a, score=pair.score_a),
        Picture(*named, pair.model_b, pair.image_b, score=pair.score_b),
    )


def _check_refused(table: Table, refused: Sequence[Refused], pairs: int, most: float) -> None:
    """Raises UserError where too many rows cannot be used."""
    if not pairs:
        raise UserError(str(refused[0]) if refused else f"{table.source}: holds no pair")
    rows = len({found.row for found in refused})
    if rows > most * (rows + pairs):
        raise UserError(
            f"{refused[0]}; {rows} of {rows + pairs} rows cannot be used; mend them, or raise "
            f"evaluate_reward.most_refused above {most}"
        )
