"""How fast each stage's work runs on this machine, and what share of its matmul rate that is.

    python -m benchmarks.stages configs/shapes.yaml [--images 256] [--repeats 3]

Each kind of work runs `repeats` times after a warm-up; the fastest counts. Floating-point operations are counted by
torch.utils.flop_counter, the matmul rate is that of a 1024 x 1024 fp32 product in the same process.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from models.generator import sample
from pipeline.config import Config
from pipeline.progress import quiet_libraries
from pipeline.prompts import draw_key
from pipeline.rl.grpo import GRPO
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state
from pipeline.settings import load
from rewards.reward import ModelReward


@dataclass(frozen=True)
class Timing:
    """`images` pictures took `seconds`, with `operations` floating-point operations."""

    work: str
    images: int
    seconds: float
    operations: int


def timed(work: str, images: int, function: Callable[[], object], repeats: int) -> Timing:
    """The fastest of `repeats` calls, after one that counts operations."""
    with FlopCounterMode(display=False) as counter:
        function()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return Timing(work, images, min(seconds), counter.get_total_flops())


def matmul_rate(size: int = 1024, repeats: int = 30, device: str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of a square product, which is done when a number of it is here."""
    matrix = torch.randn(size, size, device=device, dtype=dtype)

    def multiply() -> float:
        return float((matrix @ matrix)[0, 0])

    return max(2 * size**3 / timed("matmul", 1, multiply, 1).seconds for _ in range(repeats))


def timings(config: Config, images: int, repeats: int) -> list[Timing]:
    """The work of the stages sample, judge, finetune (its reward, and one iteration) on `images` pictures."""
    process_state()
    generator = config.generator.build("cpu")
    judge = config.judge.build("cpu")
    reward = ModelReward(config.reward.untrained(config.seed))
    texts = [row.text for row in config.prompts.held_out(0, images)]
    keys = list(range(images))
    settings = config.sample

    def paint() -> list[np.ndarray]:
        return list(sample(generator, texts, keys, settings.steps, settings.shift, settings.batch))

    pictures = paint()
    found = [
        timed("sample", images, paint, repeats),
        timed("judge", images, lambda: judge.score(pictures, texts), repeats),
        timed("reward", images, lambda: reward(pictures, texts), repeats),
    ]
    tuning = config.finetune
    trainer = Trainer(generator, reward, GRPO(tuning.algorithm), tuning, config.seed, Accelerator())
    prompts = config.prompts.draw(draw_key(config.seed, "benchmark"), tuning.groups)
    rolled = tuning.groups * tuning.group_size
    return [*found, timed("finetune iteration", rolled, lambda: trainer.iterate(prompts), repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    quiet_libraries()
    rate = matmul_rate()
    table = Table("work", "images", "seconds", "images/s", "GFLOP/s", "of matmul")
    for one in timings(load(Config, asked.config), asked.images, asked.repeats):
        speed = one.operations / one.seconds
        table.add_row(
            one.work,
            f"{one.images}",
            f"{one.seconds:.2f}",
            f"{one.images / one.seconds:.0f}",
            f"{speed / 1e9:.1f}",
            f"{speed / rate:.0%}",
        )
    console = Console()
    console.print(f"matmul: {rate / 1e9:.0f} GFLOP/s in fp32 with {torch.get_num_threads()} threads")
    console.print(table)


if __name__ == "__main__":
    main()
