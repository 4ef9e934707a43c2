"""The verb `plan`: what a run would do, how long it takes and how much memory, from its settings alone."""

from pathlib import Path
from typing import Any

from rich.console import Console

from models.geometry import Unknown
from pipeline import forecast
from pipeline.progress import quiet_libraries
from pipeline.runner import print_plan, process_state, states
from pipeline.settings import UserError
from pipeline.stages import STAGES


def plan(
    config: Any, run_dir: Path, memory: float | None = None, rate: float | None = None, processes: int | None = None
) -> None:
    """Print the stages with their time, and what each holds in memory, on the main process; change nothing.

    Args:
        memory: GiB, and rate: 1e12 matmul operations a second, of another device to plan for.
        processes: of the launch to plan for; those of this one where it is None.

    Raises:
        UserError: a stage takes more memory than there is.
    """
    process = process_state()
    if not process.is_main_process:
        return
    quiet_libraries()
    console, processes = Console(), processes or process.num_processes
    print_plan(states(config, STAGES, run_dir), console, rate and rate * 1e12, processes)
    room = round(memory * forecast.GIB) if memory else forecast.device_memory(processes)
    try:
        found = forecast.needs(config, processes, room)
    except Unknown as error:
        console.print(f"memory: not known, as {error}", markup=False, highlight=False, soft_wrap=True)
        return
    forecast.print_needs(found, room, console)
    for need in found:
        if need.total > room:
            raise UserError(forecast.refusal(config, need, room, processes))
