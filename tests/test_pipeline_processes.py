"""`--processes`: one command, several processes, one exit code."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from pipeline.store import Artifact
from tests.processes import HOME, python

SPREAD = "import sys; from pipeline.processes import spread; sys.exit(spread(2, [sys.executable, '-c', sys.argv[1]]))"


def spread(code: str) -> subprocess.CompletedProcess[str]:
    """What two processes of `code` say, and how they end together."""
    return subprocess.run([sys.executable, "-c", SPREAD, code], cwd=HOME, capture_output=True, text=True, timeout=60)


def test_each_process_knows_its_rank_and_all_the_same_port():
    names = "'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_PORT'"
    said = f"' '.join(os.environ[name] for name in ({names}))"
    found = spread(f"import os, sys; sys.stdout.write({said} + '\\n')")
    ranks = sorted(line.split() for line in found.stdout.splitlines())
    assert found.returncode == 0
    assert [rank[:4] for rank in ranks] == [["0", "0", "2", "2"], ["1", "1", "2", "2"]]
    assert ranks[0][4] == ranks[1][4]


def test_who_joined_a_group_leaves_it_before_the_end():
    code = """
import os, sys
from pipeline.processes import part
part()
assert "torch" not in sys.modules
from torch import distributed
from pipeline.runner import process_state
assert process_state().num_processes == 2 and distributed.is_initialized()
sys.argv = ["pipeline", "status", f"no-{os.environ['RANK']}.yaml"]
from pipeline.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 2
assert not distributed.is_initialized()
"""
    assert spread(code).returncode == 0


@pytest.mark.parametrize(("ends", "code"), [("sys.exit(2)", 2), ("os.kill(os.getpid(), 9)", 137)])
def test_one_that_fails_ends_the_others(ends, code):
    started = time.monotonic()
    found = spread(f"import os, sys, time\nif os.environ['RANK'] == '1': {ends}\ntime.sleep(50)")
    assert found.returncode == code
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_all_and_they_get_time_to_save(number, tmp_path):
    code = f"""
import os, signal, sys, time
from pathlib import Path
here, rank = Path({str(tmp_path)!r}), os.environ["RANK"]
def stop(number, frame):
    time.sleep(0.5 * int(rank))
    (here / f"saved-{{rank}}").touch()
    sys.exit(75)
signal.signal({int(number)}, stop)
(here / f"ready-{{rank}}").touch()
time.sleep(50)
"""
    running = subprocess.Popen([sys.executable, "-c", SPREAD, code], cwd=HOME)
    _wait(lambda: len(list(tmp_path.glob("ready-*"))) == 2)
    running.send_signal(number)
    assert running.wait(30) == 75
    assert len(list(tmp_path.glob("saved-*"))) == 2


def test_they_end_with_who_started_them(tmp_path):
    code = (
        f"import os, time; from pathlib import Path; Path({str(tmp_path)!r}, str(os.getpid())).touch(); time.sleep(50)"
    )
    running = subprocess.Popen([sys.executable, "-c", SPREAD, code], cwd=HOME)
    _wait(lambda: len(list(tmp_path.iterdir())) == 2)
    running.kill()
    running.wait()
    _wait(lambda: not any(psutil.pid_exists(int(path.name)) for path in tmp_path.iterdir()))


def test_a_stage_in_two_processes_makes_what_one_makes(config_at, folder):
    for name, options in (("alone", []), ("together", ["--processes", "2"])):
        found = python("-m", "pipeline", "sample", config_at(name), *options)
        assert found.returncode == 0, found.stderr
    made = [
        {name: one.sha256 for name, one in Artifact(folder / run / "sample").files.items()}
        for run in ("alone", "together")
    ]
    assert made[0] == made[1]


def test_bad_input_is_told_once(config_at):
    found = python("-m", "pipeline", "sample", config_at("bad"), "sample.promts=3", "--processes", "2")
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1


def _wait(done, seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.05)
