"""Checks of what is painted: the sampler without its noise, and noise that belongs to its sample."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from accelerate.utils import gather_object
from torch import Tensor

from models.paths import endpoints, noised
from models.samplers import SAMPLERS, ode
from pipeline.doctoring.check import Check
from pipeline.doctoring.subject import Recorded, Subject, flat
from pipeline.prompts import PromptRow

ODE, KEYED = "eta 0 is the ODE", "noise keyed by sample"


@torch.no_grad()
def without_noise(subject: Subject) -> Check:
    """Without noise a step of the algorithm's sampler stays on the straight path that the velocity points along.

    Walked on the generator's own velocities, with the truth of each step from `models.paths` alone.
    """
    plan, cond, noise = subject.plan, subject.cond(), subject.noise(len(subject.prompts))
    x, worst = noise, 0.0
    for t, s in pairwise(plan.times):
        v = subject.generator.predict(x, t, cond)
        straight = noised(*endpoints(x, v, t), s)
        for step in (ode, SAMPLERS.get(plan.sampler, ode)):
            worst = max(worst, float((step(x, v, t, s, 0.0, noise).x - straight).abs().max()))
        x = straight
    return Check.at_most(
        ODE,
        worst,
        1e-4,
        f"models.samplers.{plan.sampler} or ode takes the wrong step: look at its dt and its times",
        f"largest distance of a {plan.sampler} step from the flow's",
    )


def keyed_noise(subject: Subject) -> Check:
    """Painted in another batch and order, every sample is what it was, and so is every input of the loss."""
    settings = subject.settings
    first = _by_prompt(subject, subject.prompts, settings.batch)
    other = _by_prompt(subject, subject.prompts[::-1], max(1, settings.group_size - 1))
    away = [(flat([first[id]]) - flat([other[id]])).norm() / flat([first[id]]).norm() for id in first]
    return Check.at_most(
        KEYED,
        float(torch.stack(away).max()),
        1e-2,
        "the same sample differs with its batch: draw its noise by models.samplers.keyed_noise from a key of its own",
        "largest difference of a sample from itself, of its size",
    )


def _by_prompt(subject: Subject, prompts: Sequence[PromptRow], batch: int) -> dict[str, Tensor]:
    """The pictures of each prompt's group, and the latents that the loss was asked of, from all processes."""
    recorded = Recorded(subject.made())
    done = subject.trainer(algorithm=recorded, batch=batch).iterate(prompts)
    owners = [prompt.id for prompt in done.prompts]
    found = []
    for place, name in enumerate(dict.fromkeys(owners)):
        images = [torch.from_numpy(done.images[row]) / 255 for row, owner in enumerate(owners) if owner == name]
        inputs = [examples.x_t[examples.prompt == place] for examples, _ in recorded.asked]
        found.append((name, flat(images + inputs)))
    return dict(gather_object(found))
