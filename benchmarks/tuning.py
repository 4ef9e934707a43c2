"""Stages of a run as a user starts them, and how many iterations of `finetune` fit into so many seconds."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, Self

from pipeline.config import Config
from pipeline.loop import run_dir
from pipeline.runner import events
from pipeline.settings import load

PROCESSES = min(2, os.cpu_count() or 1)
"""That share the work of this machine."""


@dataclass(frozen=True)
class Pace:
    """Seconds that begin and end a training, and those of an iteration; checks of the watch within it come on top."""

    start: float
    each: float

    @classmethod
    def of(cls, config: Config) -> Self:
        """That of the last training of a run, by the times at which its watch checked it, which it has to have."""
        told = list(events(run_dir(config)))
        checks = [event for event in told if event["kind"] == "check"]
        checks = checks[max(place for place, check in enumerate(checks) if check["iteration"] == 0) :]
        trained = [event for event in told if event["kind"] == "stage_end" and event["stage"] == "finetune"][-1]
        each = median(
            ((_moment(after) - _moment(before)).total_seconds() - after["seconds"])
            / (after["iteration"] - before["iteration"])
            for before, after in pairwise(checks)
        )
        within = sum(check["seconds"] for check in checks[1:-1])
        return cls(trained["seconds"] - within - each * checks[-1]["iteration"], each)

    def iterations(self, seconds: float) -> int:
        """As many as fit into so many seconds."""
        return max(1, round((seconds - self.start) / self.each))

    def seconds(self, iterations: int) -> float:
        return self.start + self.each * iterations


def _moment(event: dict[str, Any]) -> datetime:
    return datetime.fromisoformat(event["time"])


def pace_of(path: str | Path, overrides: Sequence[str]) -> Pace:
    """That of a run, from a short training after one that compiles."""
    tuned(path, overrides, 1)
    return Pace.of(tuned(path, [*overrides, "finetune.watch.every=2"], 7))


def tuned(path: str | Path, overrides: Sequence[str], iterations: int, *more: str) -> Config:
    """Tune the generator of a run by so many iterations, then do `more` stages; the settings it was done with."""
    return staged(path, [*overrides, f"finetune.iterations={iterations}"], "finetune", *more)


def staged(path: str | Path, overrides: Sequence[str], *stages: str) -> Config:
    """Run stages of a run as far as they do not stand; its settings. Raises CalledProcessError where one fails."""
    only = [word for stage in stages for word in ("--only", stage)]
    command = [sys.executable, "-m", "pipeline", "run", str(path), *overrides, *only, "--processes", str(PROCESSES)]
    subprocess.run(command, check=True)
    return load(Config, path, overrides)
