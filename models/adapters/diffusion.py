"""What families trained on diffusion share: their path brought to the flow's, and the timesteps they were trained at.

A variance-preserving path (DDPM, 2006.11239) is alpha x0 + sigma eps with alpha^2 + sigma^2 = 1. Divided by
alpha + sigma it is the flow's, at the time t = sigma / (alpha + sigma), as `models.paths` says; the other way round
alpha = (1 - t) / |(1 - t, t)| and sigma = t / |(1 - t, t)|. A timestep of training, which is what the network is told,
thus has its time on the flow.

Euler's step of the flow then is DDIM's with eta 0 (2010.02502, equation 13). All paths end at the data: a scheduler's
`set_alpha_to_one: false`, by which DDIM stops at the noise of timestep 0, is left out. Noise levels that are not spaced
in timesteps (Karras', exponential, beta, Lu's) are refused.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal, Self, get_args

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from models.adapters.base import DiffusersGenerator
from models.adapters.options import Options
from models.generator import Conditioning
from models.paths import Point, Prediction, ends_on_path, shifted, velocity

Spacing = Literal["leading", "linspace", "trailing"]
_NOT_IN_TIMESTEPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
_PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}


@dataclass(frozen=True)
class Timesteps:
    """Those of training, 0 to T - 1, as a scheduler's config tells, and where they are on the flow.

    Attributes:
        times: of the flow, rising, float32 (T,).
        prediction: what the network predicts there.
        spacing, offset: which of them a sampler of few steps takes (2305.08891, table 2).
    """

    times: Tensor
    prediction: Prediction
    spacing: Spacing
    offset: int

    @classmethod
    def of(cls, scheduler: SchedulerMixin) -> Self:
        """Raises ValueError, beginning with `scheduler`, where what it tells cannot be brought to the flow."""
        config, name = scheduler.config, type(scheduler).__name__
        if "beta_schedule" not in config:
            raise ValueError(f"scheduler: {name} is not one of a diffusion with betas, as the network's should be")
        prediction, spacing = config.get("prediction_type", "epsilon"), config.get("timestep_spacing", "leading")
        for value, known in ((prediction, _PREDICTIONS), (spacing, get_args(Spacing))):
            if value not in known:
                raise ValueError(f"scheduler: {value} is none of {', '.join(known)}, which are known here")
        for clip in ("clip_sample", "thresholding"):
            if config.get(clip):
                raise ValueError(
                    f"scheduler: {clip} would clip latents, which are not bounded; set it to false in "
                    "scheduler/scheduler_config.json"
                )
        for spaced in _NOT_IN_TIMESTEPS:
            if config.get(spaced):
                raise ValueError(
                    f"scheduler: {spaced} spaces noise levels in another way than timesteps; set it to false in "
                    "scheduler/scheduler_config.json"
                )
        signal = scheduler.alphas_cumprod.double()
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        times = (sigma / (alpha + sigma)).float()
        if times[-1] == 1 and prediction == "epsilon":
            raise ValueError(
                "scheduler: eps tells nothing of the picture where there is noise alone; rescale_betas_zero_snr wants "
                "prediction_type v_prediction"
            )
        return cls(times, _PREDICTIONS[prediction], spacing, config.get("steps_offset", 0))

    def __len__(self) -> int:
        return len(self.times)

    def spaced(self, steps: int) -> np.ndarray:
        """`steps` of them, falling.

        Leading and trailing ones are those of diffusers' DDIM, even ones those of its DPM-Solver, which leaves out 0.
        """
        if not 1 <= steps <= len(self):
            raise ValueError(f"steps: {steps} is not between 1 and the {len(self)} timesteps of training")
        match self.spacing:
            case "leading":
                found = np.arange(steps) * (len(self) // steps) + self.offset
            case "linspace":
                found = np.linspace(0, len(self) - 1, steps + 1).round()[1:]
            case "trailing":
                found = np.round(len(self) - np.arange(steps)[::-1] * (len(self) / steps)) - 1
        return np.minimum(found, len(self) - 1)[::-1]

    def path(self, steps: int, shift: float) -> list[float]:
        """The flow's times of `steps` timesteps, and 0; a `shift` other than 1 moves what lies between them and T.

        Raises ValueError where two steps would be at one timestep.
        """
        found = self.spaced(steps)
        if shift != 1:
            found = np.array([len(self) * shifted((k + 1) / len(self), shift) - 1 for k in found]).clip(min=0)
        if (different := len(np.unique(found))) < steps:
            raise ValueError(f"steps: {steps} with this spacing are at {different} timesteps; take fewer")
        return [*np.interp(found, np.arange(len(self)), self.times.numpy()).tolist(), 0.0]

    def at(self, t: Tensor) -> Tensor:
        """The timesteps of the flow's times (B,), between two of training where a time is, and never beyond them."""
        times = self.times.to(t.device)
        upper = torch.searchsorted(times, t.contiguous()).clamp(1, len(self) - 1)
        below, above = times[upper - 1], times[upper]
        return (upper - 1 + (t - below) / (above - below)).clamp(0, len(self) - 1)


def preserving(t: Tensor) -> Point:
    """The variance-preserving path where the flow is at `t`; rates are in the angle whose cosine is alpha."""
    r = torch.hypot(1 - t, t)
    alpha, sigma = (1 - t) / r, t / r
    return Point(alpha, sigma, -sigma, alpha)


class DiffusionGenerator(DiffusersGenerator):
    """A pipeline whose network was trained on a variance-preserving path.

    A family's `asked` gives what the network predicts of latents on that path, at timesteps of training.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    vp = True

    def __init__(self, pipe: DiffusionPipeline, options: Options):
        super().__init__(pipe, options)
        self.timesteps = Timesteps.of(pipe.scheduler)

    @property
    def default_resolution(self) -> int:
        return self.transformer.config.sample_size * self.cell

    @property
    def cell(self) -> int:
        return 2 ** (len(self.codec.config.block_out_channels) - 1)

    @abstractmethod
    def asked(self, network: nn.Module, x_t: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        """What `network` predicts at `x_t` (B, C, H, W) and `times` (B,) of its own path: (B, C or 2 C, H, W).

        The times are timesteps of training, which need not be whole.
        """

    def _unguided(self, network: nn.Module, x_t: Tensor, t: float | Tensor, cond: Conditioning) -> Tensor:
        times = torch.as_tensor(t, dtype=torch.float32, device=x_t.device).expand(len(x_t))
        point = preserving(times).like(x_t)
        x = x_t * (point.alpha + point.sigma)
        predicted = self._predicted(network, x, self.timesteps.at(times), cond)
        # The other half of a network that has learned its variance too is that variance.
        return velocity(*ends_on_path(self.timesteps.prediction, predicted[:, : x.shape[1]], x, point))

    def times(self, steps: int, shift: float) -> list[float]:
        """The flow's times of as many timesteps as there are steps, spaced as the scheduler's config says; and 0."""
        return self.timesteps.path(steps, shift)
