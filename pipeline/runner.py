"""Runs stages in order, and only those whose result does not already stand.

A stage's fingerprint covers its name, what it `depends` on and the fingerprints of its inputs, so a changed
setting reaches exactly the stages after it. Stages write file by file, so one that was interrupted, killed
or damaged redoes only what is missing.

Every process of `accelerate launch` calls `run`; the main one locks, prints, records and commits.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.table import Table

from pipeline.launch import Address, Servers, Started
from pipeline.progress import Progress, duration, quiet_libraries
from pipeline.settings import Section, UserError, dump, suggest
from pipeline.store import Artifact, RunLock, atomic_write_text, fingerprint, lock_holder

REFERENCE_SPEED = 100e9
"""The machine that `Work.seconds` is quoted for: fp32 matmul operations a second."""

_EVENTS = "events.jsonl"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

T = TypeVar("T")


class Interrupted(SystemExit):
    """The run was asked to stop, by a signal or because it cannot go on now, and did, resumably: exit code 75.

    Not an `Exception`, so that a stage which handles its errors does not swallow it.
    """

    def __init__(self) -> None:
        super().__init__(75)


@dataclass(frozen=True)
class Work:
    """What a stage expects to do: images to make or look at, and seconds on the reference machine, if it did as many
    operations a second in `dtype`; None where nothing tells. `unknown` names what is not in them."""

    images: int = 0
    seconds: float | None = 0.0
    dtype: str = "float32"
    unknown: tuple[str, ...] = ()

    @classmethod
    def of(cls, images: int, parts: Mapping[str, float | None], dtype: str = "float32") -> "Work":
        """Of the seconds of its parts, by name, of which some may be None."""
        known = sum(seconds for seconds in parts.values() if seconds)
        unknown = tuple(name for name, seconds in parts.items() if seconds is None)
        return cls(images, None if unknown and not known else float(known), dtype, unknown)


@dataclass(frozen=True)
class Stage:
    """One arrow of the pipeline.

    Attributes:
        name: names the stage and the folder of its artifact.
        needs: the earlier stages whose artifacts it reads.
        depends: JSON-able, all that its result depends on besides its inputs: its slice of the config,
            hashes of checkpoints, a version number of its code.
        work: the work expected, for the plan.
        run: writes to `context.artifact` what is not there yet.
        wanted: whether a config has a use for it; a stage that is not wanted is none of the run's, and nobody's need.
        check: raises UserError where this machine cannot do the work; asked before any is done.
    """

    name: str
    needs: tuple[str, ...]
    depends: Callable[[Any], dict[str, Any]]
    work: Callable[[Any], Work]
    run: Callable[["Context"], None]
    wanted: Callable[[Any], bool] = lambda config: True
    check: Callable[[Any], None] = lambda config: None


@dataclass(frozen=True)
class StageState:
    """Where a stage stands in a run directory: its result is reused, resumed or made."""

    stage: Stage
    fingerprint: str
    state: Literal["reuse", "resume", "run"]
    config: Any

    @cached_property
    def work(self) -> Work:
        return self.stage.work(self.config)


class StopFlag:
    """Raised by SIGINT, SIGTERM and SIGUSR1 while `listening`, or by a stage that cannot go on now."""

    def __init__(self) -> None:
        self.raised = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the signals during the block, which must be in the main thread."""
        previous = {number: signal.signal(number, self._catch) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if not self.raised:
            # print() is not reentrant, and the signal may have arrived inside one.
            os.write(2, f"{signal.Signals(number).name}: stopping at the next safe point\n".encode())
        self.raised = True


def process_state() -> PartialState:
    """Which process this is, of how many, on which device.

    PartialState takes the processes of a launch on CPUs for lone ones unless it is told that it is on CPUs.

    Raises:
        UserError: `accelerate launch` was asked for several processes, and has quietly started one.
    """
    if {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys() and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "accelerate launch: several processes were asked for, and one was started; on CPUs launch with "
            "--config_file configs/accelerate/cpu2.yaml, in which num_processes is theirs"
        )
    asked = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    return PartialState(cpu=asked or not torch.accelerator.is_available())


@dataclass(frozen=True)
class Context:
    """What a stage is given.

    Attributes:
        config: the root config.
        artifact: its own artifact, begun.
        inputs: the finished artifacts of the stages it needs.
        accelerator: which process this is, of how many, on which device.
        progress: `progress.track(total, unit, description)` yields `advance(n=1, **shown)`.
        stop: whether a signal was seen.
    """

    config: Any
    artifact: Artifact
    inputs: Mapping[str, Artifact]
    accelerator: PartialState = field(default_factory=process_state)
    progress: Progress = field(default_factory=Progress)
    stop: StopFlag = field(default_factory=StopFlag)

    @property
    def run_dir(self) -> Path:
        """The run directory that holds the artifacts."""
        return self.artifact.folder.parent

    def ask_to_stop(self, reason: str) -> None:
        """Make the next `check_stop` of every process stop the run, resumably, and say why."""
        self.event("stopped", reason=reason)
        self.progress.say(reason)
        self.stop.raised = True

    def check_stop(self) -> None:
        """Call where the stage could go on later; with several processes all must call it equally often.

        Raises:
            Interrupted: a signal was seen by any process, or one asked to stop.
        """
        stop = self.stop.raised
        if self.accelerator.num_processes > 1:
            votes = torch.tensor(int(stop), device=self.accelerator.device)
            torch.distributed.all_reduce(votes)
            stop = bool(votes)
        if stop:
            raise Interrupted

    def event(self, kind: str, **fields: Any) -> None:
        """Append a line to the run's events: the time, `kind` and the JSON-able `fields`."""
        if self.accelerator.is_main_process:
            _append_event(self.run_dir, kind, **fields)

    def log(self, line: str) -> None:
        """Print one line."""
        self.progress.say(line)


def run(config: Section, stages: Sequence[Stage], run_dir: str | Path, only: Sequence[str] = ()) -> None:
    """Bring the artifacts in `run_dir` up to date with `config`: all of them, or those of the stages `only`.

    Raises:
        UserError: another runner is there, a stage is unknown, or an input of a stage in `only` is missing.
        Interrupted: a signal was seen; the same call goes on where this one stopped.
    """
    run_dir = Path(run_dir)
    process = process_state()
    progress = Progress(visible=process.is_main_process)
    stop = StopFlag()
    with stop.listening(), _locked(process, run_dir):
        todo = _on_main(process, lambda: _prepare(config, stages, run_dir, only, progress))
        if todo:
            quiet_libraries()
        for stage in _wanted(config, stages):
            if stage.name in todo:
                inputs = {name: Artifact(run_dir / name) for name in stage.needs}
                artifact = Artifact(run_dir / stage.name)
                context = Context(config, artifact, inputs, process, progress, stop)
                once = partial(_started, context)
                with Servers(run_dir, stage.name, progress.say, lambda: stop.raised, once):
                    _run_stage(stage, todo[stage.name], context)
        if todo and process.is_main_process:
            _append_event(run_dir, "run_end")


def states(config: Section, stages: Sequence[Stage], run_dir: str | Path) -> list[StageState]:
    """Where each stage stands, every hash verified; changes nothing.

    Raises:
        UserError: `config` names a file that is not there.
    """
    digests: dict[str, str] = {}
    found = []
    for stage in _wanted(config, stages):
        inputs = {name: digests[name] for name in stage.needs}
        digest = fingerprint({"stage": stage.name, "depends": stage.depends(config), "inputs": inputs})
        digests[stage.name] = digest
        artifact = Artifact(Path(run_dir) / stage.name)
        begun = "resume" if artifact.fingerprint == digest else "run"
        state = "reuse" if artifact.complete(digest) else begun
        found.append(StageState(stage, digest, state, config))
    return found


def seconds(run_dir: str | Path) -> dict[str, float]:
    """Seconds spent on the latest result of each stage, summed over interruptions; kills are not counted."""
    latest: dict[str, str] = {}
    spent: dict[tuple[str, str], float] = {}
    ended: set[tuple[str, str]] = set()
    for event in events(Path(run_dir)):
        match event:
            case {"kind": "stage_start", "stage": stage, "fingerprint": digest}:
                latest[stage] = digest
                if (stage, digest) in ended:  # made once more, after others
                    ended.discard((stage, digest))
                    spent[stage, digest] = 0.0
            case {
                "kind": "stage_end" | "interrupted",
                "stage": stage,
                "fingerprint": digest,
                "seconds": more,
            }:
                spent[stage, digest] = spent.get((stage, digest), 0.0) + more
                if event["kind"] == "stage_end":
                    ended.add((stage, digest))
    return {stage: spent.get((stage, digest), 0.0) for stage, digest in latest.items()}


def print_plan(
    found: Sequence[StageState], console: Console, speed: float | None = None, processes: int | None = None
) -> None:
    """Show what a run would do and how long it may take here; measures this machine for 0.2 seconds a dtype.

    Args:
        speed: that of another machine, matmul operations a second, to plan for.
        processes: of another launch, to plan for.
    """
    process = process_state()
    processes = processes or process.num_processes
    todo = [entry for entry in found if entry.state != "reuse"]

    def seconds(work: Work) -> float | None:
        if not work.seconds:
            return work.seconds
        rate = speed or _speed(process.device, work.dtype)
        return work.seconds * REFERENCE_SPEED / rate / processes

    table = Table("stage", "state", "images", "time", show_footer=True)
    for column in table.columns[2:]:
        column.justify = "right"
    for entry in found:
        work = entry.work if entry in todo else Work()
        table.add_row(entry.stage.name, entry.state, _count(work.images), _about(seconds(work), work.unknown))
    unknown = {entry.stage.name: entry.work.unknown for entry in todo if entry.work.unknown}
    known = [length for entry in todo if (length := seconds(entry.work)) is not None]
    table.columns[0].footer = "total"
    table.columns[2].footer = _count(sum(entry.work.images for entry in todo))
    table.columns[3].footer = _about(sum(known) if known or not todo else None, unknown)
    console.print(table)
    if unknown:
        told = "; ".join(f"{stage}: {', '.join(names)}" for stage, names in unknown.items())
        console.print(f"time not known (?): {told}", markup=False, highlight=False, soft_wrap=True)


def print_status(found: Sequence[StageState], run_dir: str | Path, console: Console) -> None:
    """Show what stands in `run_dir`, the seconds spent on it, and who is at work there."""
    spent = seconds(run_dir)
    words = {"reuse": "complete", "resume": "incomplete", "run": "to do"}
    table = Table("stage", "state", "files", "spent")
    for column in table.columns[2:]:
        column.justify = "right"
    for entry in found:
        name = entry.stage.name
        files = len(Artifact(Path(run_dir) / name).files) if entry.state != "run" else 0
        took = duration(spent[name]) if name in spent and entry.state != "run" else ""
        table.add_row(name, words[entry.state], _count(files), took)
    console.print(table)
    if holder := lock_holder(run_dir):
        console.print(f"{run_dir} is held by {holder}", markup=False, highlight=False, soft_wrap=True)


def _wanted(config: Section, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that `config` has a use for, which need no others."""
    unwanted = {stage.name for stage in stages if not stage.wanted(config)}
    kept = [stage for stage in stages if stage.name not in unwanted]
    return [replace(stage, needs=tuple(need for need in stage.needs if need not in unwanted)) for stage in kept]


def _prepare(
    config: Section, stages: Sequence[Stage], run_dir: Path, only: Sequence[str], progress: Progress
) -> dict[str, str]:
    """Write the resolved config and show the plan; the stages to run with their fingerprints."""
    names = [stage.name for stage in stages]
    for name in only:
        if name not in names:
            raise UserError(f"unknown stage {name}; {suggest(name, names)}")
    found = states(config, stages, run_dir)
    for name in only:
        if name not in [entry.stage.name for entry in found]:
            raise UserError(f"{name}: these settings have no use for this stage; leave it out")
    chosen = [entry for entry in found if not only or entry.stage.name in only]
    todo = {entry.stage.name: entry.fingerprint for entry in chosen if entry.state != "reuse"}
    standing = {entry.stage.name for entry in found if entry.state == "reuse"}
    for entry in chosen:
        for need in entry.stage.needs:
            if entry.stage.name in todo and need not in todo and need not in standing:
                raise UserError(
                    f"{entry.stage.name} needs the result of {need}, which is not complete in {run_dir} "
                    f"for these settings; run the stage {need} first"
                )
    for entry in chosen:
        if entry.stage.name in todo:
            entry.stage.check(config)
    atomic_write_text(run_dir / "config.yaml", dump(config))
    for name in standing:
        Artifact(run_dir / name).tidy()
    if todo:
        print_plan(chosen, progress.console)
        _append_event(run_dir, "run_start", stages=list(todo))
    else:
        progress.say(f"{run_dir}: nothing left to do")
    return todo


def _run_stage(stage: Stage, digest: str, context: Context) -> None:
    process, artifact = context.accelerator, context.artifact
    if process.is_main_process:
        artifact.begin(digest)
    process.wait_for_everyone()
    context.event("stage_start", stage=stage.name, fingerprint=digest, processes=process.num_processes)
    started = time.monotonic()
    try:
        context.check_stop()
        stage.run(context)
    except Interrupted:
        took = time.monotonic() - started
        context.event("interrupted", stage=stage.name, fingerprint=digest, seconds=took)
        context.log(f"interrupted in {stage.name} after {duration(took)}; the same command goes on from here")
        raise
    process.wait_for_everyone()
    if process.is_main_process:
        inputs = {name: str(source.fingerprint) for name, source in context.inputs.items()}
        artifact.finish(inputs, extra={"stage": stage.name, "depends": stage.depends(context.config)})
    process.wait_for_everyone()
    took = time.monotonic() - started
    context.event("stage_end", stage=stage.name, fingerprint=digest, seconds=took)
    context.log(f"{stage.name}: done in {duration(took)}")


def _started(context: Context, started: Started) -> Address:
    """The server that the main process starts; no process goes on to ask it where the run is to stop."""
    address = _on_main(context.accelerator, started)
    context.check_stop()
    return address


@contextlib.contextmanager
def _locked(process: PartialState, run_dir: Path) -> Iterator[None]:
    lock = RunLock(run_dir)
    _on_main(process, lock.acquire)
    try:
        yield
    finally:
        if process.is_main_process:
            lock.release()


def _on_main(process: PartialState, function: Callable[[], T]) -> T:
    """What `function` returns on the main process, on every process; its UserError ends them all."""
    outcome: list[Any] = [None]
    if process.is_main_process:
        try:
            outcome = [function()]
        except UserError as error:
            outcome = [error]
    if process.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        # The main process tells the user; the others leave with the same exit code.
        raise outcome[0] if process.is_main_process else SystemExit(2)
    return outcome[0]


def _append_event(run_dir: Path, kind: str, **fields: Any) -> None:
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    with (run_dir / _EVENTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": now, "kind": kind, **fields}) + "\n")


def events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The events of a run so far, without lines that a power cut left torn."""
    path = run_dir / _EVENTS
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


@cache
def _speed(device: torch.device, dtype: str) -> float:
    """Matmul operations a second of `device` in `dtype`: the fastest of the products of 0.2 seconds."""
    size = 1024
    matrix = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
    fastest, started = float("inf"), time.perf_counter()
    while (begun := time.perf_counter()) - started < 0.2:
        float((matrix @ matrix)[0, 0])
        fastest = min(fastest, time.perf_counter() - begun)
    return 2 * size**3 / fastest


def _count(number: int) -> str:
    return f"{number:,}" if number else ""


def _about(length: float | None, unknown: Sized = ()) -> str:
    """With a question mark for what is `unknown`."""
    known = [f"~{duration(length)}"] if length else []
    return " + ".join(known + (["?"] if unknown else []))
