"""How many iterations of `finetune` fit into so many seconds of this machine."""

import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Config
from pipeline.loop import run_loop
from pipeline.settings import load

_FEW, _MORE = 2, 8


def tuned_for(path: str | Path, overrides: Sequence[str], target: float) -> tuple[Config, float]:
    """Tune the generator of a run for about `target` seconds; the settings with that many iterations, and the seconds.

    Two short trainings tell what begins and ends one, and what an iteration takes; one before them compiles.
    """

    def settings(iterations: int) -> Config:
        return load(Config, path, [*overrides, f"finetune.iterations={iterations}"])

    def spent(iterations: int) -> float:
        started = time.perf_counter()
        run_loop(settings(iterations), only=["finetune"])
        return time.perf_counter() - started

    spent(1)
    few, more = spent(_FEW), spent(_MORE)
    each = max((more - few) / (_MORE - _FEW), 1e-3)
    iterations = max(1, round((target - few) / each))
    return settings(iterations), spent(iterations)
