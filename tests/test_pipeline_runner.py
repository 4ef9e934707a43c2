"""The runner, with stages of ten lines: what is rerun after a change, a kill, a signal and damage."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pipeline import runner
from pipeline.runner import Context, Interrupted, Stage, Work
from pipeline.settings import Section, UserError
from pipeline.store import Artifact, RunLock
from tests.processes import python

SHARDS = 4


class Config(Section):
    name: str = "x"
    out: str = "runs"
    sample: int = 1
    judge: int = 1
    report: int = 1


class Recorder:
    """Counts the shards that each stage made, and runs `trap` before each."""

    def __init__(self, trap=lambda stage, shard: None):
        self.made = {}
        self.trap = trap

    def stage(self, name, *needs):
        def run(context: Context):
            read = [source.path(shard).read_text() for source in context.inputs.values() for shard in source.names()]
            with context.progress.track(SHARDS, "shards", name) as advance:
                for shard in range(SHARDS):
                    context.check_stop()
                    if not context.artifact.has(f"shard-{shard}.txt"):
                        self.trap(name, shard)
                        context.artifact.write_text(f"shard-{shard}.txt", f"{name} {shard} {read}")
                        self.made[name] = self.made.get(name, 0) + 1
                    advance(loss=0.5)

        return Stage(name, needs, lambda config: {name: getattr(config, name)}, lambda config: Work(10, 1.5), run)

    @property
    def stages(self):
        return (self.stage("sample"), self.stage("judge", "sample"), self.stage("report", "judge"))


def made(config, run_dir, trap=lambda stage, shard: None, only=()):
    recorder = Recorder(trap)
    runner.run(config, recorder.stages, run_dir, only)
    return recorder.made


def results(run_dir):
    files = (path for path in run_dir.rglob("*") if path.is_file() and path.parent != run_dir)
    return {path.relative_to(run_dir).as_posix(): path.read_bytes() for path in files}


def kinds(run_dir):
    return [json.loads(line)["kind"] for line in (run_dir / "events.jsonl").read_text().splitlines()]


def test_a_run_makes_everything_once(tmp_path, capsys):
    assert made(Config(), tmp_path) == {"sample": 4, "judge": 4, "report": 4}
    assert "total" in capsys.readouterr().out
    before = results(tmp_path)
    assert made(Config(), tmp_path) == {}
    assert capsys.readouterr().out.splitlines() == [f"{tmp_path}: nothing left to do"]
    assert results(tmp_path) == before
    assert kinds(tmp_path) == ["run_start", *["stage_start", "stage_end"] * 3, "run_end"]
    assert "judge: 1" in (tmp_path / "config.yaml").read_text()
    assert not (tmp_path / "lock").exists()


def test_fingerprints_chain_through_the_inputs(tmp_path):
    made(Config(), tmp_path)
    manifests = {name: Artifact(tmp_path / name).manifest for name in ("sample", "judge", "report")}
    assert manifests["judge"].inputs == {"sample": manifests["sample"].fingerprint}
    assert manifests["report"].inputs == {"judge": manifests["judge"].fingerprint}
    assert manifests["judge"].extra == {"stage": "judge", "depends": {"judge": 1}}


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ({"sample": 2}, ["sample", "judge", "report"]),
        ({"judge": 2}, ["judge", "report"]),
        ({"report": 2}, ["report"]),
        ({"name": "y"}, []),
    ],
)
def test_a_changed_field_reruns_exactly_its_dependents(tmp_path, change, rerun):
    made(Config(), tmp_path)
    changed = Config(**change)
    assert [
        entry.stage.name for entry in runner.states(changed, Recorder().stages, tmp_path) if entry.state == "run"
    ] == rerun
    assert made(changed, tmp_path) == dict.fromkeys(rerun, SHARDS)


def test_a_flipped_byte_redoes_only_its_shard(tmp_path):
    made(Config(), tmp_path)
    before = results(tmp_path)
    shard = tmp_path / "sample" / "shard-2.txt"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert [entry.state for entry in runner.states(Config(), Recorder().stages, tmp_path)] == [
        "resume",
        "reuse",
        "reuse",
    ]
    assert made(Config(), tmp_path) == {"sample": 1}
    assert results(tmp_path) == before


def test_only_runs_one_stage_and_names_the_missing_one(tmp_path):
    with pytest.raises(UserError, match="run the stage sample first"):
        made(Config(), tmp_path / "run", only=["judge"])
    assert not (tmp_path / "run").exists()
    assert made(Config(), tmp_path / "run", only=["sample"]) == {"sample": 4}
    assert made(Config(), tmp_path / "run", only=["judge"]) == {"judge": 4}
    with pytest.raises(UserError, match="run the stage sample first"):
        made(Config(sample=2), tmp_path / "run", only=["judge"])
    with pytest.raises(UserError, match="unknown stage juge; did you mean judge"):
        made(Config(), tmp_path / "run", only=["juge"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_stops_at_the_next_safe_point_and_the_same_call_goes_on(tmp_path, capsys, number):
    def trap(stage, shard):
        if (stage, shard) == ("judge", 1):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stop:
        made(Config(), tmp_path, trap)
    assert stop.value.code == 75
    assert signal.getsignal(number) is before
    assert "interrupted in judge" in capsys.readouterr().out
    assert not (tmp_path / "lock").exists()
    assert kinds(tmp_path)[-1] == "interrupted"
    assert Artifact(tmp_path / "judge").names() == ["shard-0.txt", "shard-1.txt"]
    assert made(Config(), tmp_path) == {"judge": 2, "report": 4}
    made(Config(), tmp_path / "whole")
    whole = results(tmp_path / "whole")
    assert {name: data for name, data in results(tmp_path).items() if not name.startswith("whole")} == whole


def test_seconds_sum_over_interruptions_of_the_latest_result(tmp_path):
    events = [
        {"kind": "stage_start", "stage": "judge", "fingerprint": "b"},
        {"kind": "stage_end", "stage": "judge", "fingerprint": "b", "seconds": 50.0},
        {"kind": "stage_start", "stage": "judge", "fingerprint": "a"},
        {"kind": "stage_end", "stage": "judge", "fingerprint": "a", "seconds": 100.0},
        {"kind": "stage_start", "stage": "judge", "fingerprint": "b"},
        {"kind": "interrupted", "stage": "judge", "fingerprint": "b", "seconds": 2.0},
        {"kind": "stage_start", "stage": "judge", "fingerprint": "b"},
        {"kind": "stage_end", "stage": "judge", "fingerprint": "b", "seconds": 3.0},
        {"kind": "stage_start", "stage": "report", "fingerprint": "c"},
    ]
    lines = [json.dumps(event) for event in events]
    (tmp_path / "events.jsonl").write_text("\n".join([*lines[:6], '{"kind": "sta', *lines[6:]]))
    assert runner.seconds(tmp_path) == {"judge": 5.0, "report": 0.0}
    assert runner.seconds(tmp_path / "absent") == {}


def test_status_shows_what_stands_and_who_is_there(tmp_path, capsys):
    made(Config(), tmp_path, only=["sample"])
    capsys.readouterr()
    with RunLock(tmp_path):
        found = runner.states(Config(), Recorder().stages, tmp_path)
        runner.print_status(found, tmp_path, runner.Progress().console)
    out = capsys.readouterr().out
    assert [word for word in ("complete", "to do", f"process {os.getpid()}") if word not in out] == []


CHILD = textwrap.dedent(
    """
    import os, signal, sys, types
    sys.path[:0] = [{root!r}, {tests!r}]
    sys.dont_write_bytecode = True
    from pipeline import cli
    how, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    from pipeline.settings import Section
    class Config(Section):
        name: str
        out: str
        sample: int = 1
        judge: int = 1
        report: int = 1
    sys.modules["pipeline.config"] = types.SimpleNamespace(Config=Config)
    if how == "typo":
        sys.modules["pipeline.runner"] = None  # so that importing it, and torch with it, fails
    else:
        import test_pipeline_runner as fakes
        from pipeline import loop
        def trap(stage, shard):
            if (stage, shard) == ("judge", 2):
                os.kill(os.getpid(), signal.Signals[how])
        loop.Config, loop.STAGES = Config, fakes.Recorder(trap).stages
    cli.main()
    """
)


def command(how, *arguments):
    """Run the command line on the fake stages in a process that sends itself the signal `how`."""
    tests = Path(__file__).parent
    asked = ["-c", CHILD.format(root=str(tests.parent), tests=str(tests)), how, *map(str, arguments)]
    if how == "typo":  # what was imported before must not count
        return subprocess.run([sys.executable, *asked], capture_output=True, text=True)
    return python(*asked)


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path):
    settings = tmp_path / "run.yaml"
    settings.write_text(f"name: killed\nout: {tmp_path}\n")
    assert command("SIGKILL", "run", settings).returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / "lock").exists()
    assert not Artifact(tmp_path / "killed" / "judge").manifest
    assert made(Config(), tmp_path / "killed") == {"judge": 2, "report": 4}
    made(Config(), tmp_path / "whole")
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_the_command_line_exits_75_when_terminated(tmp_path):
    settings = tmp_path / "run.yaml"
    settings.write_text(f"name: x\nout: {tmp_path}\n")
    stopped = command("SIGTERM", "run", settings, "report=2")
    assert stopped.returncode == 75, stopped.stderr
    assert "the same command goes on" in stopped.stdout
    assert "Traceback" not in stopped.stderr


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["sampel=2"], "command line: unknown key sampel; did you mean sample?"),
        (["sample"], "command line: 'sample' is no setting; write key.sub=value"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(tmp_path, arguments, line):
    settings = tmp_path / "run.yaml"
    settings.write_text(f"name: x\nout: {tmp_path}\n")
    refused = command("typo", "run", settings, *arguments)
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", line + "\n")
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
