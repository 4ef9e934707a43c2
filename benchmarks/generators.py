"""How fast the native networks are beside diffusers' with the same weights: a forward pass and a training step.

    OMP_NUM_THREADS=1 python -m benchmarks.generators [--only DiT-B/4 …] [--eager] [--rounds 5]
        [--device cuda --dtype bfloat16] [--batch 64] [--grid 16] [--blocks 28]

Both networks are asked the same in turn, eager and compiled, `rounds` times after a warm-up, and the first changes from
round to round. Ratios are medians over the rounds, above 1 where ours is faster; in float32 both must predict the same.
A training step is a forward pass, a loss and the backward pass; an optimizer would take the same of both. On a CPU
latents have 8 x 8 patches and the large networks few rows and four of their blocks, unless the options say more; on a
GPU networks are whole, latents have 16 x 16 patches, and 64 are a batch. Floating-point operations are those of
`models.metering`, three times as many with the backward pass, and the matmul rate is measured in the same run.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.stages import matmul_rate
from benchmarks.twins import AS_SD3, dit_twin, mmdit_twin
from models import geometry, metering
from models.dit import DiT, size_of
from models.layers import Backbone
from models.mmdit import MMDiT
from pipeline.progress import quiet_libraries

TOLERANCE = 1e-4
TEXT = 32
"""Tokens of a text."""
LABELS = 1000


@dataclass(frozen=True)
class Entry:
    """A network to be timed, and how many latents are a batch of it on a CPU."""

    kind: type[Backbone]
    settings: Mapping[str, Any]
    batch: int

    def build(self, grid: int, blocks: int) -> Backbone:
        """With noise on its weights, for much of it starts at zero; on latents of `grid` x `grid` patches."""
        depth = min(blocks, self.settings["depth"])
        settings = {**self.settings, "depth": depth, "size": grid * self.settings["patch"]}
        torch.manual_seed(0)
        network = self.kind(**settings).eval()
        for weight in network.parameters():
            weight.data += 0.02 * torch.randn_like(weight)
        return network


def labelled(name: str) -> dict[str, Any]:
    return {**size_of(name), "channels": 4, "classes": LABELS, "time_endpoint": True}


ENTRIES = {
    "DiT-B/4": Entry(DiT, labelled("DiT-B/4"), 4),
    "DiT-XL/2": Entry(DiT, labelled("DiT-XL/2"), 2),
    # Blocks as wide as those of Stable Diffusion 3.5 Medium, and the network that is shipped with its own batch.
    "MM-DiT, 24 x 1536": Entry(
        MMDiT,
        {"channels": 16, "patch": 2, "depth": 24, "width": 1536, "heads": 24, "text_width": 1024, **AS_SD3},
        2,
    ),
    "MM-DiT, 4 x 96": Entry(
        MMDiT, {"channels": 8, "patch": 2, "depth": 4, "width": 96, "heads": 3, "text_width": 96, **AS_SD3}, 64
    ),
}


@dataclass(frozen=True)
class Pair:
    """Two networks and what each is asked; both give latents (B, C, S, S)."""

    ours: Backbone
    theirs: nn.Module
    asked: tuple[Tensor, ...]
    asked_theirs: tuple[Tensor, ...]

    def to(self, device: str, dtype: torch.dtype | None = None) -> "Pair":
        def moved(values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(value.to(device, dtype if value.is_floating_point() else None) for value in values)

        return Pair(
            self.ours.to(device, dtype), self.theirs.to(device, dtype), moved(self.asked), moved(self.asked_theirs)
        )

    @torch.no_grad()
    def difference(self) -> float:
        """The largest, in standard deviations of what they predict."""
        found, expected = self.ours(*self.asked), self.theirs(*self.asked_theirs, return_dict=False)[0]
        return float((found - expected).abs().max() / expected.std())

    def calls(self, compiled: bool) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        ours, theirs = self.ours, self.theirs
        if compiled:
            torch.compiler.reset()
            ours, theirs = (torch.compile(network, dynamic=False) for network in (ours, theirs))
        return lambda: ours(*self.asked), lambda: theirs(*self.asked_theirs, return_dict=False)[0]


def pair_of(entry: Entry, grid: int, blocks: int, batch: int) -> Pair:
    ours = entry.build(grid, blocks)
    random = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, ours.config.channels, ours.config.size, ours.config.size, generator=random)
    steps = torch.randint(0, 1000, (batch,), generator=random)
    if isinstance(ours, DiT):
        labels = torch.randint(0, LABELS, (batch,), generator=random)
        return Pair(ours, dit_twin(ours), (latents, steps / 1000, labels), (latents, steps, labels))
    text = torch.randn(batch, TEXT, ours.config.text_width, generator=random)
    return Pair(ours, mmdit_twin(ours), (latents, steps / 1000, text), (latents, text, text.mean(1), steps.float()))


@torch.no_grad()
def flops(network: Backbone) -> int:
    """Of a call for one latent of the trained size."""
    with torch.device("meta"):
        empty = type(network).from_config(network.config)
    return metering.painted(empty, geometry.asked(empty, 1, (network.config.size,) * 2, TEXT)).flops


def forward(call: Callable[[], Tensor], network: nn.Module) -> None:
    call()


def training(call: Callable[[], Tensor], network: nn.Module) -> None:
    call().float().square().mean().backward()
    network.zero_grad()


WORKS = {"forward": (forward, 1), "training step": (training, 3)}
"""What is timed, and how many times the operations of a forward pass it takes."""


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds: seconds of ours and of theirs, and of the ratios of theirs to ours."""

    ours: float
    theirs: float
    ratio: float
    least: float
    most: float


def timed(works: tuple[Callable[[], None], Callable[[], None]], rounds: int, device: str) -> Timing:
    """Ours and theirs in turn, after a warm-up of each."""

    def seconds(work: Callable[[], None]) -> float:
        _settle(device)
        started = time.perf_counter()
        work()
        _settle(device)
        return time.perf_counter() - started

    for work in works:
        seconds(work), seconds(work)
    found: list[tuple[float, float]] = []
    for turn in range(rounds):
        spent = {one: seconds(works[one]) for one in ((0, 1) if turn % 2 else (1, 0))}
        found.append((spent[0], spent[1]))
    ratios = [theirs / ours for ours, theirs in found]
    ours, theirs = (statistics.median(side) for side in zip(*found, strict=True))
    return Timing(ours, theirs, statistics.median(ratios), min(ratios), max(ratios))


def _settle(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=ENTRIES, default=list(ENTRIES))
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--grid", type=int, help="patches along a side of the latents")
    parser.add_argument("--blocks", type=int, help="of a network, at most")
    asked = parser.parse_args()
    quiet_libraries()
    small, dtype = asked.device == "cpu", getattr(torch, asked.dtype)
    grid, blocks = asked.grid or (8 if small else 16), asked.blocks or (4 if small else 100)
    rate = matmul_rate(1024 if small else 8192, device=asked.device, dtype=dtype)
    table = Table("network", "blocks", "batch", "work", "", "ours/s", "diffusers/s", "ratio", "of matmul")
    for name in asked.only:
        entry = ENTRIES[name]
        batch = asked.batch or (entry.batch if small else 64)
        pair = pair_of(entry, grid, blocks, batch).to(asked.device)
        difference = pair.difference()
        assert difference <= TOLERANCE, f"{name}: predictions differ by {difference} standard deviations"
        pair = pair.to(asked.device, dtype)
        operations = batch * flops(pair.ours)
        for compiled in (False,) if asked.eager else (False, True):
            calls = pair.calls(compiled)
            for work, (run, passes) in WORKS.items():
                works = tuple(
                    lambda run=run, call=call, network=network: run(call, network)
                    for call, network in zip(calls, (pair.ours, pair.theirs), strict=True)
                )
                found = timed(works, asked.rounds, asked.device)
                table.add_row(
                    name,
                    f"{pair.ours.config.depth}",
                    f"{batch}",
                    work,
                    "compiled" if compiled else "eager",
                    f"{batch / found.ours:.4g}",
                    f"{batch / found.theirs:.4g}",
                    f"{found.ratio:.2f} ({found.least:.2f} to {found.most:.2f})",
                    f"{passes * operations / found.ours / rate:.0%}",
                )
    console = Console(width=140)
    console.print(
        f"{asked.dtype} on {asked.device} with {torch.get_num_threads()} threads, latents of {grid} x {grid} patches; "
        f"matmul: {rate / 1e12:.3g}e12 operations a second"
    )
    console.print(table)


if __name__ == "__main__":
    main()
