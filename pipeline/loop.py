"""The whole loop as one call: settings in, a finished run directory and its summary out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import summary
from pipeline.config import Config
from pipeline.runner import process_state, run
from pipeline.settings import load
from pipeline.stages import STAGES


def run_dir(config: Config) -> Path:
    """Where the run lives."""
    return Path(config.out) / config.name


def run_loop(
    config: Config | str | Path, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> dict[str, Any] | None:
    """Bring the run of `config`, a file or settings, up to date; the numbers of its summary once all stages stand.

    Raises:
        UserError: bad input.
        Interrupted: a signal was seen; the same call goes on.
    """
    settings = config if isinstance(config, Config) else load(Config, config, overrides)
    folder = run_dir(settings)
    run(settings, STAGES, folder, only)
    if only or not process_state().is_main_process:
        return None
    summary.write(folder)
    numbers = summary.summary(folder)
    console = Console()
    summary.print_table(numbers, console)
    for made in (folder / "summary.json", folder / "report" / "index.html"):
        console.print(str(made), highlight=False, soft_wrap=True)
    return numbers
