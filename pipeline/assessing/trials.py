"""What is tried on a reward model: changes of pictures and prompts, and of how it is run."""

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from judges.probes import probes
from models.keys import sample_key
from pipeline.assessing.material import Material
from rewards.metrics.correlation import siblings
from rewards.metrics.intervals import Estimate, share
from rewards.reward import ModelReward
from rewards.shortcuts import Effect, Shortcut, effects, shortcuts, spread, table


@dataclass(frozen=True)
class Drawn:
    """Some pictures of the material, with the prompts as the model reads them."""

    images: list[np.ndarray]
    prompts: list[str]
    prompt_ids: np.ndarray


@dataclass(frozen=True)
class Invariance:
    """What a change of how the model is run does to its rewards.

    Attributes:
        largest: change of a reward, in standard deviations of the reward among pictures of one prompt.
        flipped: the share of pairs of siblings that it then orders otherwise.
    """

    name: str
    largest: float
    flipped: Estimate


@dataclass(frozen=True)
class Cost:
    """Of scoring, on this machine.

    Attributes:
        peak_bytes: of the accelerator's memory, or of the process where there is none.
    """

    device: str
    batch: int
    images_per_second: float
    peak_bytes: int


def draw(material: Material, read: Sequence[str], most: int) -> Drawn:
    """At most so many pictures, of as many prompts as there are: first one of each, then a second one."""
    seen: dict[str, int] = {}
    order = []
    for place, picture in enumerate(material.pictures):
        turn = seen[picture.prompt_id] = seen.get(picture.prompt_id, -1) + 1
        order.append((turn, sample_key("tried", picture.prompt_id), place))
    places = sorted(place for _, _, place in sorted(order)[:most])
    return Drawn(
        [material.pictures[place].image() for place in places],
        [read[place] for place in places],
        np.array([material.pictures[place].prompt_id for place in places]),
    )


def looks(reward: np.ndarray, gold: np.ndarray, material: Material) -> tuple[Shortcut, ...]:
    """How the rewards (N,) move with what pictures look like; given gold (N,) where it is known."""
    found = np.concatenate([table(images) for _, images in material.images()])
    prompts = np.array([picture.prompt_id for picture in material.pictures])
    return shortcuts(reward, found, prompts, gold if np.isfinite(gold).any() else None)


def changes(reward: ModelReward, drawn: Drawn, most: int) -> tuple[Effect, ...]:
    """What changes of the picture or the prompt do to the rewards; prompts count to `most`."""
    return effects(reward, drawn.images, drawn.prompts, probes(most))


def invariances(reward: ModelReward, drawn: Drawn) -> tuple[Invariance, ...]:
    """Whether rewards depend on the size of a batch, on batch-mates, or on the precision of products."""

    def again(batch: int, backwards: bool = False) -> np.ndarray:
        step = -1 if backwards else 1
        # Another object: what was read of prompts before may be of another precision.
        fresh = ModelReward(reward.model, batch)
        return fresh.scores(drawn.images[::step], drawn.prompts[::step]).mean.double().numpy()[::step]

    before = again(reward.batch)
    found = {"one picture at a time": again(1), "other batch-mates": again(reward.batch, backwards=True)}
    with torch.autocast(reward.model.device.type, dtype=torch.bfloat16):
        found["products in bfloat16"] = again(reward.batch)
    return tuple(_invariance(name, before, after, drawn.prompt_ids) for name, after in found.items())


def cost(reward: ModelReward, drawn: Drawn) -> Cost:
    """The best of three passes over the pictures, prompts being known."""
    reward.scores(drawn.images, drawn.prompts)
    fastest = min(_seconds(reward, drawn) for _ in range(3))
    device = reward.model.device
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else 1024 * _peak_kilobytes()
    name = torch.cuda.get_device_name(device) if on_gpu else str(device)
    return Cost(name, reward.batch, len(drawn.images) / fastest, peak)


def _peak_kilobytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _seconds(reward: ModelReward, drawn: Drawn) -> float:
    begun = time.perf_counter()
    reward.scores(drawn.images, drawn.prompts)
    return time.perf_counter() - begun


def _invariance(name: str, before: np.ndarray, after: np.ndarray, prompts: np.ndarray) -> Invariance:
    first, second = siblings(prompts)
    first, second = first[first < second], second[first < second]
    flipped = np.sign(before[first] - before[second]) != np.sign(after[first] - after[second])
    apart, largest = spread(before, prompts), np.abs(after - before).max()
    return Invariance(name, float(largest / apart) if apart else 0.0, share(flipped, prompts[first]))
