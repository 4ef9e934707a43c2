"""This command in several processes of this machine that work together (`--processes`).

What `accelerate launch` does, which several machines take; here bad input stays one line, exit codes stay ours, and who
is interrupted gets the time to save. Standard library only: who waits for others need not hold torch.
"""

import contextlib
import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType

LAUNCHED = "WORLD_SIZE"
"""In the environment of a process that is one of several."""

PATIENCE = 30.0
"""Seconds that the others get to end after one was interrupted; after another failure they get none."""
_INTERRUPTED = 75
_LOOK = 0.05
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


def spread(count: int, command: Sequence[str]) -> int:
    """Run `command` in `count` processes; the exit code of the first that fails, or 0.

    Signals go on to all of them. They share the cores, and end when we do, of whatever (on Linux).
    """
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    every = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        **os.environ,
        LAUNCHED: str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    children: list[subprocess.Popen] = []
    with _forwarding(children):
        for rank in map(str, range(count)):
            env = {**every, "RANK": rank, "LOCAL_RANK": rank}
            children.append(subprocess.Popen(command, env=env, preexec_fn=_end_with_parent))
        return _ended(children)


def part() -> None:
    """Leave the group of processes, if this one joined one: threads that still serve it can abort one that ends."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _ended(children: Sequence[subprocess.Popen]) -> int:
    """Once all have ended, the others of a failed one by force: they would wait for it forever."""
    code, until = 0, math.inf
    while running := [child for child in children if child.poll() is None]:
        if not code and (code := _failure(children)):
            until = time.monotonic() + (PATIENCE if code == _INTERRUPTED else 0.0)
        if time.monotonic() >= until:
            for child in running:
                child.kill()
        time.sleep(_LOOK)
    code = code or _failure(children)
    return code if code >= 0 else 128 - code


def _failure(children: Sequence[subprocess.Popen]) -> int:
    return next((child.returncode for child in children if child.returncode), 0)


@contextlib.contextmanager
def _forwarding(children: Sequence[subprocess.Popen]) -> Iterator[None]:
    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """In a child: a signal as if it was asked to stop, when its parent dies."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
