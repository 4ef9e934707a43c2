"""Processes of tests: what `python` and `accelerate launch` would start, without the ten seconds of imports in each.

They are forked from a server, one for each process of pytest, which imports and forks and nothing else: before a fork
there are no threads, no process group and nothing that a test has made. What children share and processes of their own
would not: the seed of Python's hashes, and what was in the environment when the server started for modules that read it
when they are imported. They end without what is registered `atexit`.
"""

import gc
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

HOME = Path(__file__).parent.parent
SETTING = "pipeline.__main__"
"""Puts into the environment what libraries read when they are imported, and is therefore imported before them."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        SETTING,
        "torch._dynamo",
        "tests.sharded",
        "pipeline.loop",
        "pipeline.report.view",
        "pipeline.rl.watch",
        "rewards.train",
        "judges.blip2",
        "scipy.io",
        __name__,
    ]
)


def python(
    *arguments: str | Path, cwd: Path = HOME, timeout: float = 600.0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Do what `python *arguments` does: a script, `-m` and a module, or `-c` and code, each with its own arguments.

    Args:
        env: what the process has in its environment besides what is in ours.

    Raises:
        TimeoutExpired: it did not end in so many seconds, and was killed.
    """
    return _ended([{}], arguments, cwd, timeout, env)


def launched(
    processes: int, *arguments: str | Path, timeout: float = 600.0, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Do what `accelerate launch --config_file configs/accelerate/cpu2.yaml --num_processes … *arguments` does.

    As there, all end when one fails. See `python`.
    """
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    every = {
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_USE_CPU": "true",
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(processes),
    }
    ranks = [{**every, "LOCAL_RANK": str(rank), "RANK": str(rank)} for rank in range(processes)]
    return _ended(ranks, arguments, HOME, timeout, env)


def _ended(
    told: Sequence[Mapping[str, str]],
    arguments: Sequence[str | Path],
    cwd: Path,
    timeout: float,
    env: Mapping[str, str] | None,
) -> subprocess.CompletedProcess[str]:
    """A process for each of `told`, which is added to its environment; all say what they say to the same files."""
    _start()
    words = [str(argument) for argument in arguments]
    ours = {"OMP_NUM_THREADS": str(torch.get_num_threads()), **os.environ, **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("stdout", "stderr")]
        for path in said:
            path.touch()
        children = [_CONTEXT.Process(target=_child, args=(words, {**ours, **one}, cwd, said)) for one in told]
        for child in children:
            child.start()
        try:
            code = _code(children, time.monotonic() + timeout)
        finally:
            for child in children:
                child.kill()
                child.join()
        out, err = (path.read_text(errors="replace") for path in said)
    if code is None:
        raise subprocess.TimeoutExpired(words, timeout, out, err)
    return subprocess.CompletedProcess(words, code, out, err)


def _start() -> None:
    """The server, unless it runs; it must find our code, and no library may start threads of its own in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HOME), *filter(None, sys.path)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("JE_ARROW_MALLOC_CONF", "background_thread:false")
        multiprocessing.forkserver.ensure_running()


def _code(children: Sequence[multiprocessing.Process], until: float) -> int | None:
    """Of the first that fails, 0 when all have ended well, None where that takes too long."""
    running = {child.sentinel: child for child in children}
    while running:
        ready = wait(list(running), max(0.0, until - time.monotonic()))
        if not ready:
            return None
        for sentinel in ready:
            child = running.pop(sentinel)
            child.join()
            if child.exitcode:
                return child.exitcode
    return 0


def _child(arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, said: Sequence[Path]) -> None:
    for stream, path in zip((1, 2), said, strict=True):
        with path.open("ab") as file:
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # it was read when the server imported torch
    sys.modules.pop(SETTING, None)
    gc.freeze()  # what the server imported lives to the end
    try:
        _run(*arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def _run(first: str, *rest: str) -> None:
    """As the interpreter does."""
    if first == "-c":
        code, *rest = rest
        sys.argv, sys.path[:0] = [first, *rest], [""]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv, sys.path[:0] = [*rest], [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = [first, *rest], [str(Path(first).resolve().parent)]
        runpy.run_path(first, run_name="__main__")
