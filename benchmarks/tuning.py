"""Stages of a run as a user starts them, and how many iterations of `finetune` fit into so many seconds."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.settings import load

PROCESSES = min(2, os.cpu_count() or 1)
"""That share the work of this machine."""

_FEW, _MORE = 2, 8


@dataclass(frozen=True)
class Pace:
    """Seconds that begin and end a training, and those of an iteration; checks of the watch within it come on top."""

    start: float
    each: float

    def iterations(self, seconds: float) -> int:
        """As many as fit into so many seconds."""
        return max(1, round((seconds - self.start) / self.each))

    def seconds(self, iterations: int) -> float:
        return self.start + self.each * iterations


def pace_of(path: str | Path, overrides: Sequence[str]) -> Pace:
    """That of a run, from two short trainings after one that compiles."""

    def spent(iterations: int) -> float:
        started = time.perf_counter()
        tuned(path, overrides, iterations)
        return time.perf_counter() - started

    spent(1)
    few, more = spent(_FEW), spent(_MORE)
    each = max((more - few) / (_MORE - _FEW), 1e-3)
    return Pace(max(0.0, few - _FEW * each), each)


def tuned(path: str | Path, overrides: Sequence[str], iterations: int, *more: str) -> Config:
    """Tune the generator of a run by so many iterations, then do `more` stages; the settings it was done with."""
    return staged(path, [*overrides, f"finetune.iterations={iterations}"], "finetune", *more)


def staged(path: str | Path, overrides: Sequence[str], *stages: str) -> Config:
    """Run stages of a run as far as they do not stand; its settings. Raises CalledProcessError where one fails."""
    only = [word for stage in stages for word in ("--only", stage)]
    command = [sys.executable, "-m", "pipeline", "run", str(path), *overrides, *only, "--processes", str(PROCESSES)]
    subprocess.run(command, check=True)
    return load(Config, path, overrides)
