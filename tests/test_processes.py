"""The children that tests fork do what processes of their own would."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from tests.processes import HOME, launched, python

LONELY = """
import os, torch
print(len(os.listdir(f"/proc/{os.getppid()}/task")), torch.distributed.is_initialized(), torch.get_num_threads())
x = torch.ones(512, 512, requires_grad=True)
(x @ x).sum().backward()
print(float(x.grad.mean()), torch.get_num_threads())
"""


@pytest.mark.parametrize("threads", ["1", "2"])
def test_they_are_forked_from_what_has_one_thread_and_have_as_many_as_they_are_told(threads):
    done = python("-c", LONELY, env={"OMP_NUM_THREADS": threads})
    assert done.stdout.split() == ["1", "False", threads, "1024.0", threads], done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("code", "returned", "said"),
    [
        ("pass", 0, ""),
        ("import sys; sys.exit(75)", 75, ""),
        ("import sys; sys.exit('no')", 1, "no\n"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
        ("import os; os._exit(3)", 3, ""),
    ],
)
def test_they_end_as_processes_do(code, returned, said):
    done = python("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (returned, "", said)


def test_what_is_raised_is_told_as_it_would_be(tmp_path):
    script = tmp_path / "raising.py"
    script.write_text("import sys\nprint(__name__, sys.argv[1:], sys.path[0])\nraise ValueError('wrong')\n")
    done = python(script, "one", "two words")
    assert done.returncode == 1
    assert done.stdout == f"__main__ ['one', 'two words'] {tmp_path}\n"
    assert done.stderr.startswith("Traceback (most recent call last):")
    assert done.stderr.endswith("ValueError: wrong\n")


def test_they_start_where_and_with_what_they_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv("OURS", "1")
    code = "import os; print(os.getcwd(), os.environ['OURS'], os.environ['THEIRS'])"
    assert python("-c", code, cwd=tmp_path, env={"THEIRS": "2"}).stdout.split() == [str(tmp_path), "1", "2"]
    assert "THEIRS" not in os.environ


def test_one_that_takes_too_long_is_killed():
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    with pytest.raises(subprocess.TimeoutExpired) as found:
        python("-c", code, timeout=1.0)
    assert not psutil.pid_exists(int(found.value.output))


RANKS = r"""
import torch
from pipeline.runner import process_state
process = process_state()
place = torch.tensor([process.process_index, process.local_process_index])
torch.distributed.all_reduce(place)
print(f"{process.num_processes} {process.device.type} {place.tolist()}\n", end="")
"""


def test_ranks_are_told_of_each_other(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = launched(3, script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["3 cpu [3, 3]"] * 3


def test_when_a_rank_fails_the_others_end(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text("import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit(7)\ntime.sleep(600)\n")
    assert launched(2, script).returncode == 7


def test_the_command_line_answers_as_a_process_of_its_own_does(config_at, folder):
    asked = "-m", "pipeline", "reward", str(config_at("unread", prompts={"type": "file", "train": "a", "eval": "b"}))
    fresh = subprocess.run([sys.executable, *asked], cwd=HOME, capture_output=True, text=True, check=False)
    forked = python(*asked)
    assert fresh.returncode == forked.returncode == 2
    assert fresh.stdout == forked.stdout == ""
    assert fresh.stderr == forked.stderr
    assert fresh.stderr.count("\n") == 1
    assert not (folder / "unread").exists()
