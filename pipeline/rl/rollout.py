"""Rolling out groups of sibling pictures, whose paths part at the start or inside a short stochastic window.

In the second case the K siblings of a prompt share their first noise and the deterministic steps before the
window, so a group costs w + K (T - w) network calls for a window that starts at step w of T, and within a group
rewards differ by the window's noise alone (MixGRPO, 2507.21802). They may part little by little, at several steps of
the window (BranchGRPO, 2509.06040).

Shapes: P prompts, K siblings, M inputs of a step: as many as the paths that have parted by then.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from torch import Tensor

from models.keys import sample_key
from models.samplers import SAMPLERS, SOLVERS, euler, keyed_noise, log_prob, ode

if TYPE_CHECKING:
    from models.generator import Conditioning, Generator

Times = tuple[float, ...]
Predict = Callable[[Tensor, float, "Conditioning"], Tensor]


@dataclass(frozen=True)
class Plan:
    """How to roll out: over `times` that fall to 0; `sampler` draws `window` steps, from step `start`, with `eta`.

    With no `window` all steps are the ODE's, by `sampler` where that is a way to solve it, and each sibling starts from
    noise of its own. `fans` tells into how many each path parts at the steps of the window, from its first on; siblings
    that do not part there start from noise of their own. Where it is None, all part at the first. Of the step `kept`
    the latents before it are kept.
    """

    times: Times
    sampler: str
    eta: float
    start: int
    window: int
    siblings: int
    fans: tuple[int, ...] | None = None
    first: int = 0
    kept: int | None = None

    @classmethod
    def ode(cls, times: Times, siblings: int, kept: int | None = None, solver: str = "ode") -> Self:
        """With no stochastic step."""
        return cls(times, solver, 0.0, 0, 0, siblings, kept=kept)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def numbers(self) -> range:
        """Of the siblings, within their group."""
        return range(self.first, self.first + self.siblings)

    @property
    def divisible(self) -> bool:
        """Whether some of a group's siblings can be rolled out without the others."""
        return not self.fans

    def fan(self, step: int) -> int:
        """Into how many each path parts at the step of this number."""
        fans, place = self._fans, step - self.start
        return fans[place] if 0 <= place < len(fans) else 1

    @property
    def starts(self) -> int:
        """From how many noises the siblings of a prompt start."""
        return self.siblings // math.prod(self._fans)

    @property
    def shares_start(self) -> bool:
        return bool(self._fans) and self.starts == 1

    @property
    def _fans(self) -> tuple[int, ...]:
        if self.fans is None:
            return (self.siblings,) if self.window else ()
        return self.fans


@dataclass(frozen=True)
class Transition:
    """Stochastic steps from t to s: `x_t` (M, ...) to its F successors `x_s` (M, F, ...).

    `prompt` (M,) is the index of each input's prompt. Under the policy that drew, `mean` (M, ...) is the Gaussian's
    mean and `old` (M, F) the log-probability; `features` (M, 2, W) are what the base makes of `x_t`, where they were
    asked for.
    """

    t: float
    s: float
    x_t: Tensor
    x_s: Tensor
    prompt: Tensor
    mean: Tensor
    old: Tensor
    features: Tensor | None = None


@dataclass(frozen=True)
class Rollout:
    """Pictures uint8 (P K, H, W, 3), siblings side by side, their latents, the stochastic steps to them, and how they
    were planned. `numbers` are of each prompt's siblings, within their group. `kept` are the latents before the step
    that the plan names, (P K, ...) where there is no window."""

    images: np.ndarray
    latents: Tensor
    transitions: tuple[Transition, ...]
    plan: Plan
    numbers: tuple[range, ...]
    kept: Tensor | None = None


def _expanded(x: Tensor, count: int) -> Tensor:
    return x.repeat_interleave(count, 0)


@torch.no_grad()
def rollout(
    generator: "Generator",
    predict: Predict,
    cond: "Conditioning",
    ids: Sequence[str],
    seed: Sequence[str | int],
    plan: Plan,
    batch: int,
    features: Predict | None = None,
) -> Rollout:
    """Roll out K siblings for each of P prompts, named by `ids`; `seed` and the ids key all noise.

    `batch` is of the network's calls, and of pictures that are decoded at a time.
    `features` is asked about the latents before each stochastic step, as `predict` is before every step.
    """
    device = cond.device
    shape = generator.latent_shape
    prompts = torch.arange(len(ids), device=device)
    if plan.shares_start:
        keys = [sample_key(*seed, i, "start") for i in ids]
    else:
        keys = [sample_key(*seed, i, k, "start") for i in ids for k in range(plan.first, plan.first + plan.starts)]
    x, owner, width = keyed_noise(keys, shape, device), _expanded(prompts, plan.starts), plan.starts
    x = generator.prior_std(plan.times[0]) * x
    solver = SOLVERS.get(plan.sampler, euler)
    transitions, kept, last = [], None, None

    def asked(network: Predict, x: Tensor, t: float) -> Tensor:
        return torch.cat([network(x[i : i + batch], t, cond[owner[i : i + batch]]) for i in range(0, len(x), batch)])

    for step, (t, s) in enumerate(pairwise(plan.times)):
        kept = x if step == plan.kept else kept
        v, last = solver(partial(asked, predict), x, t, s, last)
        if not plan.start <= step < plan.start + plan.window:
            x = ode(x, v, t, s).x
            continue
        fan = plan.fan(step)
        width *= fan
        noise = keyed_noise(
            [sample_key(*seed, i, k, step) for i in ids for k in range(plan.first, plan.first + width)], shape, device
        )
        drawn = SAMPLERS[plan.sampler](_expanded(x, fan), _expanded(v, fan), t, s, plan.eta, noise)
        old = log_prob(drawn.x, drawn.mean, drawn.std).unflatten(0, (len(x), fan))
        mean = drawn.mean[::fan].clone()
        seen = asked(features, x, t) if features else None
        transitions.append(Transition(t, s, x, drawn.x.unflatten(0, (len(x), fan)), owner, mean, old, seen))
        x, owner = drawn.x, _expanded(owner, fan)
    assert width == plan.siblings, f"{plan}: not all siblings have parted"
    return Rollout(generator.decode(x, batch), x, tuple(transitions), plan, (plan.numbers,) * len(ids), kept)


def joined(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts by one plan, whatever their siblings' numbers, as one; their prompts are counted on."""
    if len(parts) == 1:
        return parts[0]
    plan = parts[0].plan
    sizes = [len(part.latents) // plan.siblings for part in parts]
    firsts = [sum(sizes[:place]) for place in range(len(parts))]

    def rows(values: Sequence[Tensor | None]) -> Tensor | None:
        return None if values[0] is None else torch.cat(values)

    return Rollout(
        np.concatenate([part.images for part in parts]),
        rows([part.latents for part in parts]),
        tuple(
            Transition(
                same[0].t,
                same[0].s,
                rows([each.x_t for each in same]),
                rows([each.x_s for each in same]),
                rows([each.prompt + first for each, first in zip(same, firsts, strict=True)]),
                rows([each.mean for each in same]),
                rows([each.old for each in same]),
                rows([each.features for each in same]),
            )
            for same in zip(*(part.transitions for part in parts), strict=True)
        ),
        plan,
        tuple(chain.from_iterable(part.numbers for part in parts)),
        rows([part.kept for part in parts]),
    )
