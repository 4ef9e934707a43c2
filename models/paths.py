"""The Gaussian path between data and noise, and the conversions between what networks predict.

x_t = (1 - t) x0 + t eps, the rectified flow (2209.03003; Stable Diffusion 3, 2403.03206, equation 13): t = 0 is
data, t = 1 is noise. The network predicts the velocity v = eps - x0. All functions are pure and elementwise;
`t` is a float or a tensor (B,) against latents (B, ...).
"""

import torch
from torch import Tensor


def like(t: Tensor | float, x: Tensor) -> Tensor:
    """`t`, a float or (B,), shaped to broadcast over `x` (B, ...)."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def noised(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t on the path from `x0` to `noise`."""
    t = like(t, x0)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """dx_t / dt of the straight path."""
    return noise - x0


def endpoints(x_t: Tensor, v: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
    """The (x0, eps) which the velocity `v` at `x_t` points to: the inverse of `noised` and `velocity`."""
    t = like(t, x_t)
    return x_t - t * v, x_t + (1 - t) * v


def schedule(steps: int, shift: float = 1.0) -> list[float]:
    """`steps` + 1 times from 1 to 0; `shift` > 1 spends more of them near the noise (2403.03206, section 5.3.2)."""
    if steps < 1:
        raise ValueError(f"steps: {steps} is below 1")
    even = [1 - i / steps for i in range(steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]
