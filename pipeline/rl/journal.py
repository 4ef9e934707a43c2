"""What a run of fine-tuning tells as it goes: a line of JSON for every iteration, and curves for trackers.

The lines lie beside the checkpoints until the run ends, and `log.jsonl` in the artifact is a link to them, so that they
can be followed from the start. A run that goes on cuts off what its checkpoint knows nothing of. Trackers write outside
of the artifact: their files hold times of day.
"""

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import Accelerator

from pipeline.store import Artifact

NAME = "log.jsonl"


def missing(trackers: Sequence[str]) -> list[str]:
    """Those whose package is not installed."""
    return [tracker for tracker in trackers if importlib.util.find_spec(tracker) is None]


class Journal:
    """Goes on behind `done` iterations. Every process may have one; the main process writes.

    Args:
        name: of the run, for trackers.
    """

    def __init__(self, artifact: Artifact, accelerator: Accelerator, name: str, done: int):
        self.artifact, self.accelerator = artifact, accelerator
        self.path = artifact.resume / NAME
        if accelerator.log_with:
            # What follows the checkpoint is told once more.
            accelerator.init_trackers(name, init_kwargs={"tensorboard": {"purge_step": done}})
        if not accelerator.is_main_process:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.exists() else []
        self.path.write_text("".join(lines[:done]), encoding="utf-8")
        link = artifact.folder / NAME
        link.unlink(missing_ok=True)
        link.symlink_to(self.path.relative_to(artifact.folder))

    def tell(self, iteration: int, numbers: Mapping[str, float | None]) -> None:
        """One line; what is not finite is null in it, and is no point of a curve."""
        known = {name: value for name, value in numbers.items() if value is not None and math.isfinite(value)}
        self.accelerator.log(known, step=iteration)
        if self.accelerator.is_main_process:
            line = json.dumps({"iteration": iteration, **{name: known.get(name) for name in numbers}})
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def settle(self) -> None:
        """Bring the lines to the disk; before a checkpoint of what they tell."""
        if self.accelerator.is_main_process:
            handle = os.open(self.path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    def write(self) -> None:
        """Commit the lines, which takes the place of the link, and end the trackers."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.is_main_process:
            self.artifact.write_text(NAME, self.path.read_text(encoding="utf-8"))


def folder(run: Path) -> Path:
    """Where trackers of the run in the folder `run` leave their files."""
    return run / "trackers"
