"""A vLLM server of a run's own: started when a judge is built, waited for, stopped when the stage ends.

It listens on 127.0.0.1, on a free port, under a name that nobody else knows, and what it says goes to a log. `keeper`
stands between, so that it ends with us even where we are killed.

Whoever runs a stage opens `Servers` around it, and a model's settings call `start`. They find each other by a context
variable: otherwise all judges would have to hand `Servers` on, for the sake of one model.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, Token
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from pydantic import Field, field_validator

from pipeline.progress import duration
from pipeline.settings import Section, UserError

KEEPER = Path(__file__).with_name("keeper.py")

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What a server is told besides our own environment, unless that says otherwise."""

SPEED = {
    "--api-server-count",
    "--async-scheduling",
    "--cpu-offload-gb",
    "--data-parallel-size",
    "--disable-log-stats",
    "--distributed-executor-backend",
    "--enable-prefix-caching",
    "--enforce-eager",
    "--gpu-memory-utilization",
    "--kv-cache-memory-bytes",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--mm-processor-cache-gb",
    "--no-async-scheduling",
    "--no-enable-prefix-caching",
    "--no-enforce-eager",
    "--pipeline-parallel-size",
    "--tensor-parallel-size",
    "--uvicorn-log-level",
}
"""Arguments that change how fast a server answers, not what."""

_OURS = ("--model", "--served-model-name", "--host", "--port", "--uds")
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What `accelerate launch` tells our processes, which a server would take for its own."""
_LOOK_SECONDS = 0.5
_SAY_SECONDS = 20.0
_ERROR = re.compile(r"\b(\w*error:|value error,) (?!.*See root cause above)\S.*", re.IGNORECASE)
_WORDS = 300
"""Characters."""


class Serve(Section):
    """A vLLM server that the run starts for its judge.

    Attributes:
        checkpoint: a local folder or a hub id.
        python: that of the environment vLLM is installed in.
        arguments: more for the server, each as `--name=value`.
        start_seconds: how long it may take to start.
    """

    checkpoint: str
    python: str = Field(".venv-vllm/bin/python", validate_default=True)
    arguments: tuple[str, ...] = ()
    start_seconds: float = Field(900.0, gt=0)

    @field_validator("python")
    @classmethod
    def _runs(cls, python: str) -> str:
        if shutil.which(python) is None:
            raise ValueError("there is no such program; `make vllm` makes .venv-vllm/bin/python")
        return python

    @field_validator("arguments")
    @classmethod
    def _are_named(cls, arguments: tuple[str, ...]) -> tuple[str, ...]:
        for argument in arguments:
            name = argument.partition("=")[0]
            if not name.startswith("--") or " " in name:
                raise ValueError(f"{argument!r} is no argument of vLLM's server; write --name=value")
            if name in _OURS:
                raise ValueError(f"{name} is chosen by the run; leave it out")
        return arguments

    @property
    def telling(self) -> list[str]:
        """The arguments that may change a verdict."""
        return [argument for argument in self.arguments if argument.partition("=")[0] not in SPEED]


@dataclass(frozen=True)
class Address:
    """Where a server is, and the name under which it serves its model."""

    url: str
    model: str


Started = Callable[[], Address]


class Servers:
    """The servers of a stage: a context, in which `start` starts them, and on leaving which all are stopped.

    Args:
        folder: where their logs go.
        stage: names the logs.
        say: shows a line to the user.
        stopping: whether the run was asked to stop. Nobody waits for a server then, and its address is worth nothing.
        once: of several processes, lets one start a server and tells all of them its address.
    """

    def __init__(
        self,
        folder: Path,
        stage: str,
        say: Callable[[str], None],
        stopping: Callable[[], bool] = lambda: False,
        once: Callable[[Started], Address] = lambda started: started(),
    ) -> None:
        self.folder, self.stage, self.say, self.stopping, self.once = folder, stage, say, stopping, once
        self._up: dict[tuple[Serve, tuple[str, ...]], Address] = {}
        self._held = contextlib.ExitStack()
        self._token: Token | None = None

    def __enter__(self) -> "Servers":
        self._token = _servers.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _servers.reset(self._token)
        self._held.close()

    def start(self, serve: Serve, arguments: Sequence[str]) -> Address:
        """See `start`."""
        key = serve, tuple(arguments)
        if key not in self._up:
            log = self.folder / f"{self.stage}-server-{len(self._up)}.log"
            up = launched(serve, arguments, log, self.say, self.stopping)
            self._up[key] = self.once(lambda: self._held.enter_context(up))
        return self._up[key]


_servers: ContextVar[Servers | None] = ContextVar("servers", default=None)


def start(serve: Serve, arguments: Sequence[str]) -> Address:
    """The address of a server that is up, the same for the same settings, until the open `Servers` are left.

    Args:
        serve: its settings.
        arguments: more for it, which those of the settings overrule.

    Raises:
        UserError: it does not come up, or nobody is there to stop it.
    """
    servers = _servers.get()
    if servers is None:
        raise UserError("judge.model.serve: no server is started here; start one yourself and give its urls")
    return servers.start(serve, arguments)


@contextlib.contextmanager
def launched(
    serve: Serve, arguments: Sequence[str], log: Path, say: Callable[[str], None], stopping: Callable[[], bool]
) -> Iterator[Address]:
    """A server that is up during the block; see `Servers` for the arguments.

    Raises:
        UserError: it ended, or was not up in time.
    """
    name = f"{Path(serve.checkpoint).name}-{secrets.token_hex(4)}"
    port = _free_port()
    address = Address(f"http://127.0.0.1:{port}/v1", name)
    log.parent.mkdir(parents=True, exist_ok=True)
    kept = [sys.executable, "-I", str(KEEPER), *_command(serve, name, port, arguments)]
    with log.open("wb") as file:
        keeper = subprocess.Popen(
            kept, stdin=subprocess.PIPE, stdout=file, stderr=file, env=_environment(), start_new_session=True
        )
    try:
        say(f"judge: vLLM starts to serve {serve.checkpoint}; what it says is in {log}")
        _wait(keeper, address, serve.start_seconds, log, say, stopping)
        yield address
    finally:
        keeper.stdin.close()
        keeper.wait()


def _wait(
    keeper: subprocess.Popen,
    address: Address,
    most: float,
    log: Path,
    say: Callable[[str], None],
    stopping: Callable[[], bool],
) -> None:
    """Return when the server is up, or the run is to stop."""
    started = said = time.monotonic()
    while not stopping():
        if keeper.poll() is not None:
            raise UserError(f"judge.model.serve: the server ended: {last_words(log)}; see {log}")
        if _is_up(address):
            return say(f"judge: served after {duration(time.monotonic() - started)}")
        now = time.monotonic()
        if now - started > most:
            raise UserError(
                f"judge.model.serve.start_seconds: no server within {most:g} s, which last said: {last_words(log)}; "
                f"see {log}, or give it longer"
            )
        if now - said > _SAY_SECONDS:
            said = now
            say(f"judge: not served yet, {duration(now - started)} of {duration(most)}")
        time.sleep(_LOOK_SECONDS)
    return None


def last_words(log: Path) -> str:
    """The last line of a log that names an error, or else the last line; the beginning of it."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [found.group() for line in lines if (found := _ERROR.search(line))]
    return (errors or lines or ["nothing"])[-1][:_WORDS].rstrip()


def _command(serve: Serve, name: str, port: int, arguments: Sequence[str]) -> list[str]:
    """A judge reads much and writes a token or two: eager, for graphs that are captured first would not pay."""
    return [
        serve.python,
        "-P",  # or Python would look for modules in the working directory, which has a `models` of ours
        "-m",
        "vllm.entrypoints.openai.api_server",
        f"--model={serve.checkpoint}",
        f"--served-model-name={name}",
        "--host=127.0.0.1",
        f"--port={port}",
        "--enforce-eager",
        "--disable-uvicorn-access-log",
        *arguments,
        *serve.arguments,
    ]


def _environment() -> dict[str, str]:
    return {**ENVIRONMENT, **{name: value for name, value in os.environ.items() if name not in _LAUNCH}}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _is_up(address: Address) -> bool:
    """Whether it answers, and is ours: another may have taken the port."""
    try:
        with _DIRECT.open(f"{address.url}/models", timeout=2) as reply:
            return address.model.encode() in reply.read()
    except (OSError, HTTPException):
        return False
