"""A training loop whose every step is a function of its number, and the state that lets it go on bit for bit.

State is safetensors and JSON, written to a temporary folder and renamed, so that a folder that stands is whole.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer


class Muon(Optimizer):
    """Momentum, orthogonalised, for hidden matrices (Jordan et al., 2024), scaled to AdamW's step (2502.16982).

    torch.optim.Muon does the same in bfloat16, which a CPU without such units takes several times longer for; this
    one stays in the matrices' own precision and takes those of one shape together.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append(parameter)
            for shape, parameters in shapes.items():
                for parameter in parameters:
                    self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                gradients = [p.grad for p in parameters]
                buffers = [self.state[p]["momentum_buffer"] for p in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, buffers, group["momentum"])
                updates = orthogonalised(torch.stack(nesterov)) * (0.2 * max(shape) ** 0.5 * group["lr"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(parameters, list(updates))


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Matrices (K, M, N) with their singular values brought near 1 by Newton and Schulz's quintic iteration."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / wide.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if wide is matrices else x.mT


def hybrid_optimizers(
    modules: Mapping[str, nn.Module], matrix_lr: float, lr: float, decay: float = 0.01
) -> list[Optimizer]:
    """Muon on the hidden matrices, AdamW on embeddings, modulations, inputs, outputs and vectors."""
    matrices, others = [], []
    for module in modules.values():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                hidden = parameter.ndim == 2 and any(part in name for part in ("blocks.", "layer.", "layers."))
                apart = any(part in name for part in ("embed", "modulation"))
                (matrices if hidden and not apart else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    if not matrices:
        return [adam]
    return [Muon(matrices, matrix_lr, weight_decay=decay), adam]


def trapezoid(step: int, steps: int, warmup: int, decay: int) -> float:
    """Factor on the learning rate: linear up over `warmup` steps, flat, linear to 0 over the last `decay`."""
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / max(1, decay))


def save_state(folder: Path, modules: Mapping[str, nn.Module], optimizers: Iterable[Optimizer], extra: dict) -> None:
    """Write what a resumed run needs; `extra` is JSON (step counters and the like)."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name, module in modules.items():
        save_file(_trained(module), temporary / f"{name}.safetensors")
    for index, optimizer in enumerate(optimizers):
        flat = {
            f"{key}.{name}": torch.as_tensor(value).contiguous()
            for key, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        save_file(flat, temporary / f"optimizer-{index}.safetensors")
    (temporary / "extra.json").write_text(json.dumps(extra))
    for path in temporary.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def load_state(folder: Path, modules: Mapping[str, nn.Module], optimizers: Iterable[Optimizer]) -> dict:
    """Put back what `save_state` wrote; gives `extra`."""
    for name, module in modules.items():
        module.load_state_dict(load_file(folder / f"{name}.safetensors"), strict=False)
    for index, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        state["state"] = {}
        for key, value in load_file(folder / f"optimizer-{index}.safetensors").items():
            parameter, name = key.split(".", 1)
            state["state"].setdefault(int(parameter), {})[name] = value
        optimizer.load_state_dict(state)
    return json.loads((folder / "extra.json").read_text())


def _trained(module: nn.Module) -> dict[str, Tensor]:
    """What training changes of a module: its trainable parameters, tied ones once."""
    return {name: p.detach().contiguous() for name, p in module.named_parameters() if p.requires_grad}


class Average(nn.Module):
    """Exponential moving average of the trainable parameters of `modules`, with diffusers' warm-up of the decay."""

    def __init__(self, modules: Mapping[str, nn.Module], decay: float):
        super().__init__()
        self.decay = decay
        self.sources = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
        self.shadow = nn.ParameterList(nn.Parameter(p.detach().clone()) for p in self.sources)

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow), self.sources, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the trained weights; a second call undoes it."""
        for shadow, source in zip(self.shadow, self.sources, strict=True):
            kept = source.clone()
            source.copy_(shadow)
            shadow.copy_(kept)


def steps_done(folder: Path) -> int:
    """How many steps the state in `folder` has behind it; 0 where there is none."""
    return json.loads((folder / "extra.json").read_text())["step"] if folder.is_dir() else 0


def train(
    loss_at: Callable[[int], Tensor],
    modules: Mapping[str, nn.Module],
    optimizers: list[Optimizer],
    steps: int,
    factor: Callable[[int], float],
    folder: Path,
    average: Average | None = None,
    save_every: int = 100,
    clip: float = 1.0,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Minimise `loss_at(step)` for `steps` steps, going on from `folder` where an earlier call was cut off.

    `factor(step)` scales every learning rate. Raises FloatingPointError where the loss is not finite.
    """
    state = {**modules, "average": average} if average is not None else modules
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    if (first := steps_done(folder)) > 0:
        load_state(folder, state, optimizers)
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    for step in range(first, steps):
        for optimizer, lrs in zip(optimizers, rates, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor(step)
        loss = loss_at(step)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower the learning rate")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if average is not None:
            average.update(step)
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save_state(folder, state, optimizers, {"step": step + 1})
        on_step(step, loss.item())
