"""The verb `doctor`: looks for the silent bugs of a fine-tuning run before it starts, a line for each.

Nothing is written into the run: it works on copies, with a few prompts and siblings, in a folder that is dropped.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console

from pipeline.doctoring import forecast, learning, policy, reward, sampling
from pipeline.doctoring.check import Check
from pipeline.doctoring.subject import Subject, examined
from pipeline.launch import Servers
from pipeline.progress import Progress, quiet_libraries
from pipeline.runner import Context, process_state
from pipeline.store import Artifact

CHECKS: tuple[Callable[[Subject], Check], ...] = (
    policy.importance_ratio,
    policy.kl_to_base,
    learning.same_on_all_processes,
    learning.accumulation,
    sampling.without_noise,
    policy.adapter_off,
    policy.merged_twin,
    reward.repeatable,
    sampling.keyed_noise,
    policy.low_precision,
    learning.save_load_continue,
)


AS_THE_RUN = policy.importance_ratio, policy.low_precision
"""Those on weights of the run's own dtype; the others take float32."""

_NO_ROOM = (
    "there is no room on this device for float32 weights beside the run's, in whose rounding hides what these look "
    "for; take a larger device"
)
_SHARDED = (
    "what is sharded is examined as it is, and in the rounding of such weights hides what these look for; add "
    "generator.dtype=float32"
)


def doctor(config: Any, as_json: bool = False) -> bool:
    """Print a line for each check, or all as JSON; whether none is red.

    Raises:
        UserError: something that the settings name cannot be used.
        judges.base.Unavailable: the judge is the reward, and nobody answers.
    """
    quiet_libraries()
    process = process_state()
    shown, silent = Progress(visible=process.is_main_process and not as_json), Progress(visible=False)
    found: list[Check] = []
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        shown.say(line)

    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        context = Context(config, Artifact(Path(folder) / "finetune"), {}, process, silent)
        with Servers(Path(folder), "doctor", shown.say):
            for check in _all(context, note):
                found.append(check)
                _print(check, shown.console)
    healthy = [all(check.ok is not False for check in found)]
    broadcast_object_list(healthy)
    if as_json and process.is_main_process:
        told = {"healthy": healthy[0], "notes": notes, "checks": [_finite(asdict(check)) for check in found]}
        print(json.dumps(told, indent=2, allow_nan=False))
    return healthy[0]


def _all(context: Context, note: Callable[[str], None]) -> Iterator[Check]:
    """The memory of all stages, and if there is enough of it, what takes the run's own parts to find out."""
    first = forecast.stages(context.config, context.accelerator.num_processes)
    yield first
    if first.ok is not False:
        yield from diagnosed(examined(context.config, context, note))


def diagnosed(subject: Subject) -> Iterator[Check]:
    """Every check, in order. Every process must take all."""
    for check in CHECKS:
        if subject.exact or check in AS_THE_RUN:
            yield check(subject)
            torch.cuda.empty_cache()
    if not subject.exact:
        yield Check.skipped("checks in float32", _SHARDED if subject.sharded else _NO_ROOM)
    found = forecast.measured(subject)
    yield forecast.memory(subject, found)
    yield forecast.seconds(subject, found)


def _print(check: Check, console: Console) -> None:
    word, colour = {True: ("green", "green"), False: ("red", "red"), None: ("-", "dim")}[check.ok]
    number = "" if check.measured is None else f"{check.measured:.3g}"
    bound = "" if check.bound is None else f" (bound {check.bound:.3g})"
    remedy = f": {check.remedy}" if check.remedy else ""
    console.print(f"{word:<6}", style=colour, end="", highlight=False)
    line = f"{check.name:<25}{number:<9} {check.about}{bound}{remedy}"
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()
    }
