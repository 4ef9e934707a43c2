"""A paper model of images an hour and bytes moved against the number of GPUs, and what of it can be checked on a CPU.

    python -m benchmarks.scale configs/sd35_medium.yaml [key.sub=value …] [--rate 400] [--gpus 1 8 64 512]
    python -m benchmarks.scale configs/tiny/sd35.yaml [key.sub=value …] --measure 1 2 4

The first line loads nothing: operations are counted on the meta device (`pipeline.forecast`). The second trains a few
iterations on so many processes with a thread each, and shows what the model says of them when it knows the seconds of
one process alone; the machine should be idle. The formula and what it leaves out are in docs/scale.md.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from models.paths import schedule
from pipeline import forecast
from pipeline.config import Config
from pipeline.progress import quiet_libraries
from pipeline.prompts import draw_key
from pipeline.rl import algorithm_of
from pipeline.rl.rollout import Plan
from pipeline.rl.shares import share_of
from pipeline.rl.trainer import Trainer
from pipeline.runner import process_state
from pipeline.settings import UserError, load
from rewards.rules import RuleReward

TWO = Path(__file__).parent.parent / "configs" / "accelerate" / "cpu2.yaml"
_DRAWN = 64
"""Iterations over which the start of the window is averaged."""

_NUMBER, _REWARD, _PICKLE = 4, 8, 200
"""Bytes of a gradient, of what a term says of a picture, and of an object around what a process says of its own."""


@dataclass(frozen=True)
class Link:
    """Between processes: seconds until a message arrives, and bytes a second of each process."""

    latency: float
    rate: float


@dataclass(frozen=True)
class Machine:
    """Seconds of a network call for one picture, of one with its backward pass, of decoding and rating a picture, and
    of what each process does in an iteration however little its share is; links within a node of so many processes
    (`local`) and `between` nodes."""

    call: float
    lesson: float
    picture: float
    fixed: float
    local: Link
    between: Link
    node: int

    def link(self, processes: int) -> Link:
        """The slowest that a ring of so many goes over."""
        return self.local if processes <= self.node else self.between


@dataclass(frozen=True)
class Tuning:
    """An iteration: groups of siblings painted in `steps`, of which they share `shared` on average; each picture is
    learned from at `learned` steps, and `trained` numbers get a gradient in each of the `updates`."""

    groups: int
    siblings: int
    shared: float
    steps: int
    learned: int
    updates: int
    trained: int
    terms: int
    whole: bool = False

    @property
    def images(self) -> int:
        return self.groups * self.siblings

    def calls(self, siblings: int) -> float:
        """Of the network, to roll out so many siblings of a group."""
        return self.shared + siblings * (self.steps - self.shared)

    def lessons(self, siblings: int) -> int:
        """Inputs that are learned from: the first step of a window is one for all that share it."""
        first = 1 if self.shared else siblings
        return first + siblings * (self.learned - 1)


@dataclass(frozen=True)
class Iteration:
    """Seconds of it, bytes that a process sends, and pictures of the busiest one."""

    seconds: float
    bytes: float
    pictures: int


def iteration(tuning: Tuning, machine: Machine, processes: int) -> Iteration:
    """On so many processes. Raises UserError where they cannot share it out, as a run would."""
    size = tuning.groups, tuning.siblings, processes
    shares = [share_of(*size, rank, tuning.whole) for rank in range(processes)]
    work = []
    for groups, siblings in {(len(share.group_numbers), len(share.siblings)) for share in shares}:
        calls, lessons = tuning.calls(siblings) * machine.call, tuning.lessons(siblings) * machine.lesson
        work.append(groups * (calls + lessons + siblings * machine.picture))
    others, link = processes - 1, machine.link(processes)
    gradients = tuning.updates * _NUMBER * tuning.trained * 2 * others / processes
    rewards = others * (_PICKLE + _REWARD * tuning.terms * tuning.images / processes)
    messages = (2 * tuning.updates + 1) * others
    moved = messages * link.latency + (gradients + rewards) / link.rate
    most = max(len(share.group_numbers) * len(share.siblings) for share in shares)
    return Iteration(max(work) + machine.fixed + moved, gradients + rewards, most)


def shards_in_turns(images: int, shard: int, processes: int) -> int:
    """Pictures of the busiest process of a data stage, which takes every N-th shard."""
    return max(
        sum(min(shard, images - start) for start in range(first * shard, images, processes * shard))
        for first in range(min(processes, math.ceil(images / shard)))
    )


def shared_steps(plan: Plan) -> int:
    """Whose network call is one for all siblings. Raises UserError where they part little by little."""
    if plan.fans and plan.fans != (plan.siblings,):
        raise UserError("finetune.algorithm.fans: this model knows siblings that part at one step; leave it out")
    return plan.start + 1 if plan.shares_start else 0


def tuning_of(config: Config) -> Tuning:
    """What the settings of a run make of an iteration."""
    settings = config.finetune.trained
    algorithm, times = algorithm_of(config.finetune.algorithm), tuple(schedule(settings.steps, settings.shift))
    plans = [algorithm.rollout_plan(config.seed, i, times, settings.group_size) for i in range(_DRAWN)]
    shared = sum(map(shared_steps, plans)) / _DRAWN
    told = config.finetune.algorithm.model_dump()
    return Tuning(
        groups=settings.groups,
        siblings=settings.group_size,
        shared=shared,
        steps=settings.steps,
        learned=plans[0].window or told.get("draws") or settings.steps,
        updates=settings.updates,
        trained=forecast.Painter(config).trained,
        terms=len(config.finetune.mixture.terms),
        whole=algorithm.whole_groups or not plans[0].divisible,
    )


def show(config: Config, machine: Machine, counts: list[int]) -> Table:
    """A row for each number of GPUs. What is ideal is so many times the images an hour of one."""
    tuning, settings = tuning_of(config), config.sample
    images = settings.prompts * settings.images_per_prompt
    table = Table(
        "GPUs", "finetune: busiest", "s", "images/h", "of ideal", "GB moved", "sample: busiest", "images/h", ""
    )
    for column in table.columns:
        column.justify = "right"
    alone = iteration(tuning, machine, 1).seconds
    for count in counts:
        found, most = iteration(tuning, machine, count), shards_in_turns(images, settings.shard, count)
        painting = most * (settings.calls * machine.call + machine.picture)
        table.add_row(
            f"{count}",
            f"{found.pictures}",
            f"{found.seconds:.1f}",
            f"{3600 * tuning.images / found.seconds:,.0f}",
            f"{alone / count / found.seconds:.0%}",
            f"{count * found.bytes / 1e9:.2f}",
            f"{most}",
            f"{3600 * images / painting:,.0f}",
            f"{images / count / most:.0%}",
        )
    return table


def spent(path: str, overrides: list[str], iterations: int, out: Path) -> None:
    """Train on the processes that this is one of, by a rule; the main one writes the seconds of an iteration."""
    torch.set_num_threads(1)
    config = load(Config, path, overrides)
    process = process_state()
    settings = config.finetune.trained
    trainer = Trainer(
        config.generator.build(str(process.device)),
        RuleReward("brightness"),
        algorithm_of(config.finetune.algorithm),
        settings.model_copy(update={"compile": False}),
        config.seed,
        Accelerator(mixed_precision="no"),
    )

    def iterate(number: int) -> None:
        trainer.iterate(config.prompts.draw(draw_key(config.seed, "scale", number), settings.groups))

    iterate(0)
    process.wait_for_everyone()
    started = time.perf_counter()
    for number in range(iterations):
        iterate(1 + number)
    process.wait_for_everyone()
    if process.is_main_process:
        out.write_text(json.dumps((time.perf_counter() - started) / iterations))


def measured(path: str, overrides: list[str], iterations: int, processes: int) -> float:
    """Seconds of an iteration on so many processes of this machine, with a thread each."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        launch = ["accelerate.commands.launch", "--config_file", str(TWO), "--num_processes", str(processes)]
        worker = ["benchmarks.scale", path, *overrides, "--iterations", str(iterations), "--worker", str(out)]
        alone = [sys.executable, "-m", *worker]
        together = [sys.executable, "-m", *launch, "-m", *worker]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(alone if processes == 1 else together, env=env, check=True)
        return json.loads(out.read_text())


def compared(path: str, overrides: list[str], iterations: int, counts: list[int]) -> Table:
    """Seconds measured, and those of the model that knows what one process takes and how many cores there are."""
    config = load(Config, path, overrides)
    tuning, cores = tuning_of(config), len(psutil.Process().cpu_affinity())
    call, lesson = (forecast.call_seconds(config, 1e9, learning) for learning in (False, True))
    free = Link(0.0, math.inf)
    machine = Machine(call, lesson, 0.0, 0.0, free, free, max(counts))
    alone = measured(path, overrides, iterations, 1)
    slower = alone / iteration(tuning, machine, 1).seconds
    machine = replace(machine, call=slower * call, lesson=slower * lesson)
    table = Table("processes", "images/h", "s measured", "s by the model", title=f"{cores} cores, a thread a process")
    for count in counts:
        seconds = alone if count == 1 else measured(path, overrides, iterations, count)
        expected = iteration(tuning, machine, count).seconds * max(1.0, count / cores)
        table.add_row(f"{count}", f"{3600 * tuning.images / seconds:,.0f}", f"{seconds:.2f}", f"{expected:.2f}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--gpus", type=int, nargs="*", default=[1, 8, 64, 512])
    parser.add_argument("--rate", type=float, default=400.0, help="matmul rate of one, in 1e12 operations a second")
    parser.add_argument("--picture", type=float, default=0.1, help="seconds to decode and to rate one")
    parser.add_argument("--fixed", type=float, default=2.0, help="seconds of an iteration that are not shared out")
    parser.add_argument("--local", type=float, default=200.0, help="GB/s between GPUs of a node")
    parser.add_argument("--between", type=float, default=25.0, help="GB/s of each GPU between nodes")
    parser.add_argument("--latency", type=float, default=10.0, help="microseconds of a message")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node")
    parser.add_argument("--measure", type=int, nargs="*", help="check it on so many processes of this machine")
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    quiet_libraries()
    if asked.worker:
        return spent(asked.config, asked.overrides, asked.iterations, asked.worker)
    console = Console(width=140)
    if asked.measure:
        return console.print(compared(asked.config, asked.overrides, asked.iterations, asked.measure))
    config = load(Config, asked.config, asked.overrides)
    call, lesson = (forecast.call_seconds(config, 1e12 * asked.rate, learning) for learning in (False, True))
    local, between = (Link(1e-6 * asked.latency, 1e9 * rate) for rate in (asked.local, asked.between))
    machine = Machine(call, lesson, asked.picture, asked.fixed, local, between, asked.node)
    console.print(show(config, machine, asked.gpus))
    return None


if __name__ == "__main__":
    main()
