"""Rolling out groups of sibling pictures, whose paths part at the start or inside a short stochastic window.

In the second case the K siblings of a prompt share their first noise and the deterministic steps before the
window, so a group costs w + K (T - w) network calls for a window that starts at step w of T, and within a group
rewards differ by the window's noise alone (MixGRPO, 2507.21802; BranchGRPO, 2509.06040).

Shapes: P prompts, K siblings, M = P inputs at the first step of the window and P K at the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from models.keys import sample_key
from models.paths import schedule
from models.samplers import SAMPLERS, keyed_noise, log_prob, ode

if TYPE_CHECKING:
    from models.generator import Conditioning, Generator

Predict = Callable[[Tensor, float, "Conditioning"], Tensor]


@dataclass(frozen=True)
class Plan:
    """How to roll out: `steps` in all, of which `window` from step `start` are drawn by `sampler` with `eta`.

    With no `window` all steps are the ODE's, and each sibling starts from noise of its own.
    """

    steps: int
    shift: float
    sampler: str
    eta: float
    start: int
    window: int
    siblings: int


@dataclass(frozen=True)
class Transition:
    """Stochastic steps from t to s: `x_t` (M, ...) to its F = K or 1 successors `x_s` (M, F, ...).

    `prompt` (M,) is the index of each input's prompt; `old` (M, F) the log-probability under the policy that drew.
    """

    t: float
    s: float
    x_t: Tensor
    x_s: Tensor
    prompt: Tensor
    old: Tensor


@dataclass(frozen=True)
class Rollout:
    """Pictures uint8 (P K, H, W, 3), siblings side by side, their latents, and the stochastic steps to them."""

    images: np.ndarray
    latents: Tensor
    transitions: tuple[Transition, ...]


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
) -> Rollout:
    """Roll out K siblings for each of P prompts, named by `ids`; `seed` and the ids key all noise."""
    times = schedule(plan.steps, plan.shift)
    device = cond.tokens.device
    shape = generator.latent_shape
    prompts = torch.arange(len(ids), device=device)
    if plan.window:
        x, owner = keyed_noise([sample_key(*seed, i, "start") for i in ids], shape, device), prompts
    else:
        keys = [sample_key(*seed, i, k, "start") for i in ids for k in range(plan.siblings)]
        x, owner = keyed_noise(keys, shape, device), _expanded(prompts, plan.siblings)
    transitions = []
    for step, (t, s) in enumerate(pairwise(times)):
        v = torch.cat([predict(x[i : i + batch], t, cond[owner[i : i + batch]]) for i in range(0, len(x), batch)])
        if not plan.start <= step < plan.start + plan.window:
            x = ode(x, v, t, s).x
            continue
        fan = plan.siblings if len(x) == len(ids) else 1
        keys = [sample_key(*seed, i, k, step) for i in ids for k in range(plan.siblings)]
        noise = keyed_noise(keys, shape, device)
        drawn = SAMPLERS[plan.sampler](_expanded(x, fan), _expanded(v, fan), t, s, plan.eta, noise)
        old = log_prob(drawn.x, drawn.mean, drawn.std).unflatten(0, (len(x), fan))
        transitions.append(Transition(t, s, x, drawn.x.unflatten(0, (len(x), fan)), owner, old))
        x, owner = drawn.x, _expanded(owner, fan)
    return Rollout(generator.decode(x), x, tuple(transitions))
