"""A server that a run starts: up in time or a reason, shared, and gone with the run whatever ends it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from pipeline import launch, runner
from pipeline.judging import QuestionsJudge
from pipeline.launch import SPEED, Serve, Servers, last_words, start
from pipeline.runner import Interrupted, Stage, Work
from pipeline.settings import Section, SettingsError, UserError, load
from tests.processes import launched

HOME = Path(__file__).parent.parent


def paths() -> str:
    """Where another process finds our code, and the server that is not vLLM's."""
    return os.pathsep.join([str(HOME), os.environ["PYTHONPATH"]])


SERVER = """
import argparse, http.server, json, os, signal, subprocess, sys, time

parser = argparse.ArgumentParser()
for name in ("--model", "--served-model-name", "--host", "--port", "--mood", "--pids"):
    parser.add_argument(name)
told, _ = parser.parse_known_args()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(told.pids, "a") as file:
    file.write(f"{os.getpid()} {child.pid} ")
if told.mood == "broken":
    print("reading")
    sys.exit("ValueError: head size 7 is not supported")
if told.mood == "slow":
    print("thinking", flush=True)
    time.sleep(600)
if told.mood == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        served = {"data": [{"id": told.served_model_name, "told": sys.argv[1:], "environment": dict(os.environ)}]}
        body = json.dumps(served).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


http.server.HTTPServer((told.host, int(told.port)), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """What makes settings of a server that is not vLLM's, has a child, and writes both their ids to `pids`."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(SERVER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setattr(launch, "_LOOK_SECONDS", 0.02)

    def serve(mood: str = "kind", **settings) -> Serve:
        told = (f"--mood={mood}", f"--pids={tmp_path / 'pids'}")
        return Serve(checkpoint="some/judge", python=sys.executable, arguments=told, **settings)

    return serve


def pids(folder: Path) -> list[int]:
    return [int(pid) for pid in (folder / "pids").read_text().split()]


def alive(folder: Path) -> list[int]:
    """Those of the server's processes that are more than entries in a table."""
    return [pid for pid in pids(folder) if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def soon(condition, seconds: float = 10.0) -> bool:
    until = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < until:
        time.sleep(0.02)
    return bool(found)


def ask(address) -> dict:
    with urllib.request.urlopen(f"{address.url}/models") as reply:
        return json.load(reply)["data"][0]


def test_a_server_is_up_in_the_context_and_gone_after_it(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "9")
    lines = []
    with Servers(tmp_path / "run", "judge", lines.append):
        address = start(fake(), ["--dtype=float32"])
        served = ask(address)
        assert len(alive(tmp_path)) == 2
    assert address.url.startswith("http://127.0.0.1:")
    assert served["id"] == address.model != "some/judge"
    assert served["told"].index("--dtype=float32") < served["told"].index("--mood=kind")
    assert "--model=some/judge" in served["told"]
    assert "RANK" not in served["environment"]
    assert served["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "9"
    assert served["environment"]["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert alive(tmp_path) == []
    assert (tmp_path / "run" / "judge-server-0.log").exists()
    assert lines[-1].startswith("judge: served after")


def test_equal_settings_share_a_server_and_others_do_not(fake, tmp_path):
    with Servers(tmp_path, "judge", str):
        one, same = start(fake(), []), start(fake(), [])
        other = start(fake(), ["--dtype=float32"])
        assert len(alive(tmp_path)) == 4
    assert one == same
    assert one.url != other.url
    assert alive(tmp_path) == []


def test_a_server_that_ends_is_explained_by_its_log(fake, tmp_path):
    log = tmp_path / "judge-server-0.log"
    with Servers(tmp_path, "judge", str), pytest.raises(UserError) as caught:
        start(fake("broken"), [])
    assert str(caught.value) == (
        f"judge.model.serve: the server ended: ValueError: head size 7 is not supported; see {log}"
    )
    assert alive(tmp_path) == []


def test_a_server_that_is_late_is_stopped(fake, tmp_path):
    with Servers(tmp_path, "judge", str):
        with pytest.raises(UserError, match=r"serve\.start_seconds: no server within 1 s, which last said: thinking"):
            start(fake("slow", start_seconds=1.0), [])
        assert alive(tmp_path) == []


def test_nobody_waits_for_a_server_when_the_run_is_to_stop(fake, tmp_path):
    begun = time.monotonic()
    with Servers(tmp_path, "judge", str, (tmp_path / "pids").exists):
        start(fake("slow"), [])
    assert time.monotonic() - begun < 10
    assert alive(tmp_path) == []


def test_a_server_that_will_not_stop_is_killed(fake, tmp_path, monkeypatch):
    quick = tmp_path / "keeper.py"
    kept = launch.KEEPER.read_text()
    assert "PATIENCE = 10.0" in kept
    quick.write_text(kept.replace("PATIENCE = 10.0", "PATIENCE = 0.3"))
    monkeypatch.setattr(launch, "KEEPER", quick)
    with Servers(tmp_path, "judge", str):
        start(fake("stubborn"), [])
    assert alive(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_when_the_run_is_killed(fake, tmp_path, number):
    run = tmp_path / "run.py"
    run.write_text(
        "import signal, time\nfrom pathlib import Path\nfrom pipeline.launch import Serve, Servers, start\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        f"with Servers(Path({str(tmp_path)!r}), 'judge', print):\n"
        f"    start(Serve.model_validate_json({fake().model_dump_json()!r}), [])\n"
        "    print('up', flush=True)\n    time.sleep(600)\n"
    )
    env = {**os.environ, "PYTHONPATH": paths()}
    child = subprocess.Popen([sys.executable, str(run)], stdout=subprocess.PIPE, text=True, env=env)
    assert any(line == "up\n" for line in child.stdout)
    assert len(alive(tmp_path)) == 2
    child.send_signal(number)
    child.wait(60)
    assert soon(lambda: not alive(tmp_path))


def test_a_lone_server_process_that_dies_takes_its_children_along(fake, tmp_path):
    with Servers(tmp_path, "judge", str):
        start(fake(), [])
        server, _ = pids(tmp_path)
        os.kill(server, signal.SIGKILL)
        assert soon(lambda: not alive(tmp_path))


TWO = """
import sys
from pathlib import Path
from pipeline.launch import Serve, start
from pipeline.runner import Stage, Work, run
from pipeline.settings import Section

SERVE, FOLDER = Serve.model_validate_json(sys.argv[1]), Path(sys.argv[2])

def judge(context):
    address = start(SERVE, [])
    (FOLDER / f"rank-{context.accelerator.process_index}").write_text(address.url)

run(Section(), [Stage("judge", (), lambda config: {}, lambda config: Work(), judge)], FOLDER / "run")
"""


def test_of_two_processes_one_starts_the_server_and_both_know_it(fake, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    done = launched(2, script, fake().model_dump_json(), tmp_path, env={"PYTHONPATH": paths()})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rank-0").read_text() == (tmp_path / "rank-1").read_text()
    assert len(pids(tmp_path)) == 2
    assert alive(tmp_path) == []


def test_a_run_that_waits_for_a_server_can_be_interrupted(fake, tmp_path):
    asked = []
    stage = Stage("judge", (), lambda _: {}, lambda _: Work(), lambda _: asked.append(start(fake("slow"), [])))

    def interrupt() -> None:
        if soon((tmp_path / "pids").exists):
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    with pytest.raises(Interrupted):
        runner.run(Section(), [stage], tmp_path / "run")
    assert not asked
    assert alive(tmp_path) == []


def test_without_anybody_to_stop_it_none_is_started(fake, tmp_path):
    with pytest.raises(UserError, match="no server is started here"):
        start(fake(), [])
    assert not (tmp_path / "pids").exists()


def test_the_last_words_are_the_cause(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "INFO fine\n(EngineCore pid=3) ERROR 11-21 [core.py:1] ValueError: no memory\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\nbye\n\n"
    )
    assert last_words(log) == "ValueError: no memory"
    log.write_text("api_server.py: error: unrecognized arguments: --foo\n")
    assert last_words(log) == "error: unrecognized arguments: --foo"
    log.write_text("ValidationError: 1 validation error for ModelConfig\n  Value error, max_model_len is too large\n")
    assert last_words(log) == "Value error, max_model_len is too large"
    log.write_text("one\ntwo\n\n")
    assert last_words(log) == "two"


JUDGE = "type: questions\nquestions: {type: whole}\nmodel: {type: server, %s}\n"


def refusal(folder: Path, model: str) -> str:
    path = folder / "judge.yaml"
    path.write_text(JUDGE % model)
    with pytest.raises(SettingsError) as caught:
        load(QuestionsJudge, path)
    return str(caught.value).removeprefix(f"{path}: ")


def test_a_judge_is_served_by_somebody_or_by_us(tmp_path):
    ours = f"serve: {{checkpoint: a/b, python: {sys.executable}"
    either = "model: give either urls"
    assert refusal(tmp_path, "reasoning: 0").startswith(either)
    assert refusal(tmp_path, f"urls: [http://x/v1], model: m, {ours}}}").startswith(either)
    assert refusal(tmp_path, "urls: [http://x/v1]").startswith("model: give model")
    assert refusal(tmp_path, f"model: m, {ours}}}").startswith("model: give model")
    assert refusal(tmp_path, "serve: {checkpoint: a/b, python: no/such}") == (
        "model.serve.python: there is no such program; `make vllm` makes .venv-vllm/bin/python, not 'no/such'"
    )
    assert "'-tp 2' is no argument" in refusal(tmp_path, f"{ours}, arguments: [-tp 2]}}")
    assert "--port is chosen by the run" in refusal(tmp_path, f"{ours}, arguments: [--port=80]}}")


def test_verdicts_depend_on_the_weights_and_not_on_who_serves_them(tmp_path, judge_folder):
    def depends(**settings) -> dict:
        serve = {"checkpoint": str(judge_folder / "vqa"), "python": sys.executable, **settings}
        path = tmp_path / "judge.yaml"
        path.write_text(JUDGE % f"serve: {json.dumps(serve)}")
        return load(QuestionsJudge, path).depends()

    moved = tmp_path / "moved"
    moved.symlink_to(judge_folder / "vqa")
    plain = depends()
    assert depends(checkpoint=str(moved), start_seconds=7.0, arguments=["--max-num-seqs=4"]) == plain
    assert "--max-num-seqs" in SPEED
    assert depends(checkpoint=str(judge_folder / "itm")) != plain
    assert depends(arguments=["--dtype=bfloat16"]) != plain
