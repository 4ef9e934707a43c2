"""Who runs it: settings, stages, and the runner that brings a run directory up to date."""

from pathlib import Path
from typing import Any

__all__ = ["run", "run_stage"]


def run(config: str | Path, *overrides: str) -> dict[str, Any] | None:
    """Run the whole loop of a YAML file with `key.sub=value` overrides; the numbers of `summary.json`.

    What `python -m pipeline run` does; see `pipeline.loop.run_loop` for errors. Stages are imported at the call, so
    that a misspelt setting on the command line answers at once.
    """
    from pipeline.loop import run_loop

    return run_loop(config, overrides)


def run_stage(config: str | Path, stage: str, *overrides: str) -> None:
    """Run one stage, as `python -m pipeline STAGE` does; its inputs must stand."""
    from pipeline.loop import run_loop

    run_loop(config, overrides, [stage])
