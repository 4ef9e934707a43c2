"""From latents back to the noise that the flow's ODE paints them from.

Euler's step from t to s < t is x_s = x_t + (s - t) v(x_t, t). Backwards x_t is unknown on both sides: DDIM inversion
(2010.02502, section 4.3) puts x_s into the velocity, and each further iteration the x_t found so far, which converges
on the x_t from which the step leads to x_s (fixed-point inversion, 2309.04907).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor


def invert(
    predict: Callable[[Tensor, float], Tensor], latents: Tensor, times: Sequence[float], iterations: int = 3
) -> Tensor:
    """The latents (B, ...) at `times[0]` from which Euler's steps over `times`, which fall to 0, lead to `latents`.

    `predict(x_t, t)` is the velocity; it is asked `iterations` times a step.
    """
    x_s = latents
    for t, s in reversed(list(pairwise(times))):
        x_t = x_s
        for _ in range(iterations):
            x_t = x_s - (s - t) * predict(x_t, t)
        x_s = x_t
    return x_s
