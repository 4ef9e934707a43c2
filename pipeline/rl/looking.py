"""What a check of a run looks at: prompts, pictures of the policy that would be kept, and how far it is from the base.

The KL is an upper bound, in nats, on that of the policy from the base model. With the policy's velocity v taken for
exact on its own pictures it is (2101.09258, theorem 1, for the rectified flow)

    KL <= integral of (1 - t) / t E|v(x_t, t) - v_base(x_t, t)|^2 dt

from the last time at which the sampler asks for a velocity to the first, summed over latent dimensions. Each picture is
noised to one time of its own, siblings to times spread evenly.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.generator import Conditioning
from models.keys import sample_key
from models.paths import noised
from models.samplers import keyed_noise
from pipeline.judging import told
from pipeline.prompts import PromptRow, PromptSource, draw_key
from pipeline.rl.checks import Seen
from pipeline.rl.rollout import Plan, rollout
from pipeline.rl.trainer import Trainer
from rewards.backbones.base import filled
from rewards.hacking import Measured
from rewards.shortcuts import table

EVALUATED = 768
"""As many prompts as `evaluate` draws by default. Its own number is no input, as changing it shall not train again."""

_SIDE = 64  # pixels: enough to tell how unlike two pictures are


@dataclass(frozen=True)
class Wanted:
    """A picture that every check paints: sibling `sample` of a prompt, the `number`-th of those held out or of those
    that are trained on."""

    prompt: PromptRow
    number: int
    sample: int
    held_out: bool


@dataclass(frozen=True)
class Sight:
    """A picture of a check, uint8 (H, W, 3), and what was measured on it, rounded to 32 bits; NaN where nothing was."""

    wanted: Wanted
    image: np.ndarray
    reward: float
    judge: float


def wanted(source: PromptSource, seed: int, count: int, siblings: int, drawn: Iterable[PromptRow]) -> list[Wanted]:
    """`siblings` pictures of each of `count` held-out prompts, then one each of as many `drawn` to train on."""
    prompts = held_out(source, seed, count)
    trained = of_same_skills(drawn, prompts)
    return [
        *(Wanted(prompt, number, sample, True) for number, prompt in enumerate(prompts) for sample in range(siblings)),
        *(Wanted(prompt, number, 0, False) for number, prompt in enumerate(trained)),
    ]


def held_out(source: PromptSource, seed: int, count: int) -> list[PromptRow]:
    """`count` different prompts that training never draws, even over skills as far as a skill has that many.

    Those that `evaluate` draws by default come last within their skill.
    """
    evaluated = set(source.held_out(draw_key(seed, "evaluate"), EVALUATED))
    skills: dict[str, list[PromptRow]] = {}
    for prompt in dict.fromkeys(source.held_out(draw_key(seed, "watch"), 50 * count)):
        skills.setdefault(prompt.skill, []).append(prompt)
    ordered = (sorted(prompts, key=evaluated.__contains__) for prompts in skills.values())
    return [prompt for prompt in chain.from_iterable(zip_longest(*ordered)) if prompt][:count]


def of_same_skills(prompts: Iterable[PromptRow], like: Sequence[PromptRow]) -> list[PromptRow]:
    """The first different `prompts`, of each skill as many as `like` has, for rewards that differ between skills."""
    missing = Counter(prompt.skill for prompt in like)
    taken: dict[PromptRow, None] = {}
    for prompt in prompts:
        if not missing.total():
            break
        if missing[prompt.skill] and prompt not in taken:
            missing[prompt.skill] -= 1
            taken[prompt] = None
    return list(taken)


@torch.no_grad()
def painted(trainer: Trainer, mine: Sequence[Wanted], seed: int, siblings: int) -> tuple[np.ndarray, list[float]]:
    """Pictures (N, H, W, 3) uint8 by the ODE from noise keyed by seed, prompt and sample, and what those of held-out
    prompts, which come first, say of the KL, which is the mean of that in nats. The policy is `trainer.averaged`."""
    generator, settings = trainer.generator, trainer.settings
    plan = Plan.ode(trainer.times, siblings=1)
    held = sum(one.held_out for one in mine)
    # The first stands in for what other processes have more.
    most, most_held = trainer.most([len(mine), held])
    rows, held_rows = filled(torch.arange(len(mine)), most), filled(torch.arange(held), most_held)
    asked = [mine[row] for row in rows.tolist()]
    ids = [f"{one.prompt.id}/{one.sample}" for one in asked]
    with trainer.averaged():
        with told("finetune"):
            cond = generator.encode([one.prompt.text for one in asked])
        predict = trainer.predict(trainer.plain)
        rolled = rollout(generator, predict, cond, ids, (seed, "watch"), plan, settings.batch)
        # In another order of memory sums would round otherwise than those of pictures read from a file.
        images = np.ascontiguousarray(rolled.images[: len(mine)])
        asked = [mine[row] for row in held_rows.tolist()]
        found = divergences(trainer, rolled.latents[held_rows], cond[held_rows], asked, seed, siblings)
        return images, list(found)[:held]


def divergences(
    trainer: Trainer,
    latents: Tensor,
    cond: Conditioning,
    held: Sequence[Wanted],
    seed: int,
    siblings: int,
) -> Iterator[float]:
    """Of each picture, given as latents, the integrand of the KL at one time, times the length of its range."""
    settings = trainer.settings
    first = trainer.times[0]
    least = min(trainer.times[-2], first / 2)  # a single step asks at the first alone
    keys = [sample_key(seed, "watch", one.prompt.id, one.sample, "noise") for one in held]
    drawn = [(one.sample + sample_key(key, "time") / 2**63) / siblings for key, one in zip(keys, held, strict=True)]
    t = least + (first - least) * torch.tensor(drawn).to(latents)
    x_t = noised(latents, keyed_noise(keys, latents.shape[1:], latents.device), t)
    for rows in torch.arange(len(held), device=t.device).split(settings.batch):
        asked = x_t[rows], t[rows], cond[rows]
        policy = trainer.generator.predict(*asked)
        with trainer.reference():
            away = (policy - trainer.generator.predict(*asked)).double()
        yield from ((first - least) * (1 - t[rows]) / t[rows] * away.square().flatten(1).sum(1)).tolist()


def seen(sights: Sequence[Sight], kl: float, judged: bool) -> Seen:
    """What was measured, of every picture of a check."""
    held, others = ([sight for sight in sights if sight.wanted.held_out is side] for side in (True, False))
    images = [sight.image for sight in held]
    return Seen(
        kl=kl,
        reward=_measured(held, [sight.reward for sight in held]),
        trained=_measured(others, [sight.reward for sight in others]),
        judge=_measured(held, [sight.judge for sight in held]) if judged else None,
        pictures=np.stack([_small(image) for image in images]),
        pixels=table(images),
    )


def _measured(sights: Sequence[Sight], values: Sequence[float]) -> Measured:
    return Measured(np.array(values, dtype=float), np.array([sight.wanted.prompt.id for sight in sights]))


def _small(image: np.ndarray) -> np.ndarray:
    if max(image.shape[:2]) <= _SIDE:
        return image
    shrunk = Image.fromarray(image)
    shrunk.thumbnail((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(shrunk)
