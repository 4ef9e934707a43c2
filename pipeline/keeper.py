"""Runs a command until it ends, or until our standard input does; then ends all its processes.

The other end of standard input is held by whoever started us. When they die, of whatever, the system closes it: so no
server outlives the run that it was started for. Standard library only, for it is run by its path.
"""

import select
import signal
import subprocess
import sys
import time
from os import killpg
from types import FrameType

PATIENCE = 10.0
"""Seconds that the command gets to end of itself."""
_LINGERING = 2.0
"""Seconds that its children get after it."""
_LOOK = 0.2


def keep(command: list[str]) -> int:
    """Run `command` in a process group of its own; its exit status."""
    kept = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        while kept.poll() is None and not select.select([sys.stdin], [], [], _LOOK)[0]:
            pass
    finally:
        _end(kept)
    return kept.wait()


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _end(kept: subprocess.Popen) -> None:
    """End the whole group: kindly, then not."""
    try:
        killpg(kept.pid, signal.SIGTERM)
        try:
            kept.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            killpg(kept.pid, signal.SIGKILL)
        until = time.monotonic() + _LINGERING
        while time.monotonic() < until:
            killpg(kept.pid, 0)
            time.sleep(_LOOK / 10)
        killpg(kept.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
