"""The store: what stands after a finish, a kill, a flipped byte and another fingerprint; and the lock."""

import json
import multiprocessing
import os
import subprocess
import sys

import datasets
import psutil
import pytest
from PIL import Image

from pipeline.settings import UserError
from pipeline.store import Artifact, RunLock, atomic_write_text, fingerprint, hash_path, read_rows, write_rows

FEATURES = datasets.Features({"prompt": datasets.Value("string"), "image": datasets.Image()})


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def finished(tmp_path):
    artifact = Artifact(tmp_path / "sample")
    artifact.begin("a")
    artifact.write_text("one.txt", "1")
    artifact.write_text("model/config.json", "{}")
    artifact.finish({"prompts": "p"}, {"note": 1})
    return artifact


def test_a_finished_artifact_holds_its_files_and_a_manifest(finished):
    assert set(contents(finished.folder)) == {"manifest.json", "one.txt", "model/config.json"}
    assert finished.complete("a")
    assert not finished.complete("b")
    assert finished.manifest.inputs == {"prompts": "p"}
    assert finished.manifest.extra == {"note": 1}
    assert finished.manifest.files["one.txt"].sha256 == hash_path(finished.folder / "one.txt")
    assert {"python", "torch", "datasets"} <= set(finished.manifest.versions)
    assert finished.names() == ["model/config.json", "one.txt"]
    assert finished.path("one.txt").read_text() == "1"


def test_begin_again_keeps_the_files_that_hold(finished):
    flip(finished.folder / "one.txt")
    assert finished.damaged() == ["one.txt"]
    assert not finished.complete("a")
    (finished.folder / "stray.txt").write_text("left by a kill")
    finished.begin("a")
    assert not finished.has("one.txt")
    assert finished.has("model/config.json")
    assert not (finished.folder / "stray.txt").exists()
    assert not finished.complete("a")
    finished.write_text("one.txt", "1")
    finished.finish({"prompts": "p"}, {"note": 1})
    assert finished.complete("a")


def test_an_unfinished_artifact_goes_on_file_by_file(tmp_path):
    artifact = Artifact(tmp_path)
    artifact.begin("a")
    artifact.write_text("one.txt", "1")
    artifact.write_text("two.txt", "2")
    artifact.resume.mkdir()
    (artifact.resume / "step.json").write_text("3")
    flip(tmp_path / "two.txt")
    later = Artifact(tmp_path)
    assert later.fingerprint == "a"
    later.begin("a")
    assert later.names("*.txt") == ["one.txt"]
    assert (later.resume / "step.json").read_text() == "3"
    later.finish({})
    assert set(contents(tmp_path)) == {"manifest.json", "one.txt"}


def test_another_fingerprint_starts_from_nothing(finished):
    finished.begin("b")
    finished.resume.mkdir()
    (finished.resume / "step.json").write_text("3")
    finished.begin("c")
    assert set(contents(finished.folder)) == {"partial.json"}
    assert finished.names() == []


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"fingerprint": "a"}', b"\xff"])
def test_a_damaged_manifest_counts_as_none(finished, damage):
    (finished.folder / "manifest.json").write_bytes(damage)
    assert not finished.complete("a")
    assert finished.fingerprint is None


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    artifact = Artifact(tmp_path)
    artifact.begin("a")
    before = contents(tmp_path)

    def fail(path):
        path.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        artifact.write("one.txt", fail)
    with pytest.raises(RuntimeError):
        artifact.write_folder("model", lambda folder: fail(folder / "config.json"))
    assert contents(tmp_path) == before


def test_only_an_artifact_that_is_begun_can_be_written(finished):
    with pytest.raises(AssertionError):
        finished.write_text("two.txt", "2")
    with pytest.raises(FileNotFoundError):
        finished.path("two.txt")


def test_a_folder_is_committed_file_by_file(tmp_path):
    def save(folder):
        (folder / "deep").mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "deep" / "weights").write_text("w")

    artifact = Artifact(tmp_path)
    artifact.begin("a")
    artifact.write_folder("model", save)
    assert artifact.names() == ["model/config.json", "model/deep/weights"]
    artifact.finish({})
    assert artifact.complete("a")


def write_shards(folder, rank):
    for shard in range(rank, 30, 3):
        Artifact(folder).write_text(f"shard-{shard:05d}.txt", str(shard))
        assert Artifact(folder).has(f"shard-{shard:05d}.txt")


def test_processes_write_into_one_artifact_at_the_same_time(tmp_path):
    Artifact(tmp_path).begin("a")
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=write_shards, args=(tmp_path, rank)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    artifact = Artifact(tmp_path)
    artifact.finish({})
    assert artifact.names() == [f"shard-{shard:05d}.txt" for shard in range(30)]
    assert artifact.complete("a")


def test_a_record_that_another_process_is_just_writing_does_not_count(tmp_path):
    artifact = Artifact(tmp_path)
    artifact.begin("a")
    artifact.write_text("one.txt", "1")
    record = tmp_path / ".parts" / "one.txt.json"
    (tmp_path / ".parts" / ".tmp-1-two.txt.json").write_bytes(record.read_bytes())
    assert artifact.names() == ["one.txt"]


def test_tidy_ends_a_finish_that_was_killed(finished):
    whole = contents(finished.folder)
    for name in ("partial.json", ".parts/one.txt.json", "resume/step.json"):
        atomic_write_text(finished.folder / name, '{"fingerprint": "a"}')
    assert finished.complete("a")
    finished.tidy()
    assert contents(finished.folder) == whole
    finished.begin("a")
    before = contents(finished.folder)
    finished.tidy()
    assert contents(finished.folder) == before


def test_rows_come_back_and_their_bytes_are_deterministic(tmp_path):
    rows = [{"prompt": f"p{i}", "image": Image.new("RGB", (8, 8), (i, 0, 0))} for i in range(4)]
    artifacts = [Artifact(tmp_path / name) for name in ("a", "b")]
    for artifact in artifacts:
        artifact.begin("a")
        write_rows(artifact, "shard-00000.parquet", rows[:3], FEATURES)
        write_rows(artifact, "shard-00001.parquet", rows[3:], FEATURES)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    table = read_rows(artifacts[0])
    assert table.features == FEATURES
    assert table["prompt"][:] == ["p0", "p1", "p2", "p3"]
    assert table[3]["image"].getpixel((0, 0)) == (3, 0, 0)
    assert table[0]["image"].format == "PNG"
    assert read_rows(artifacts[0], "shard-00001.parquet", columns=["prompt"]).column_names == ["prompt"]
    with pytest.raises(FileNotFoundError):
        read_rows(artifacts[0], "pairs-*.parquet")


def test_fingerprint_ignores_the_order_of_keys_and_nothing_else():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"b": [1, 2]}) != fingerprint({"b": [2, 1]})
    with pytest.raises(ValueError, match="JSON"):
        fingerprint({"a": float("nan")})


def test_hash_path_covers_names_and_contents(tmp_path):
    for name in ("a", "b", "c"):
        atomic_write_text(tmp_path / name / "sub" / "x", "1")
    atomic_write_text(tmp_path / "b" / "quality.json", "a note beside the weights")
    assert hash_path(tmp_path / "a") == hash_path(tmp_path / "b")
    atomic_write_text(tmp_path / "b" / "sub" / "x", "2")
    (tmp_path / "c" / "sub" / "x").rename(tmp_path / "c" / "sub" / "y")
    assert len({hash_path(tmp_path / name) for name in ("a", "b", "c")}) == 3
    with pytest.raises(UserError, match="No such file"):
        hash_path(tmp_path / "absent")


def test_a_second_runner_is_refused_and_told_who_is_there(tmp_path):
    with RunLock(tmp_path):
        holder = json.loads((tmp_path / "lock").read_text())
        with pytest.raises(UserError) as refusal:
            RunLock(tmp_path).acquire()
    who = f"process {os.getpid()} on {holder['host']}, since {holder['since']}"
    assert str(refusal.value) == f"{tmp_path} is in use by {who}"
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize(
    ("change", "taken"),
    [({"host": "elsewhere", "started": 0.0}, False), ({"started": 0.0}, True), ({}, False)],
)
def test_a_lock_is_taken_over_only_from_the_dead_of_this_host(tmp_path, caplog, change, taken):
    with RunLock(tmp_path):
        holder = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps(holder | change))
    if taken:
        with RunLock(tmp_path):
            assert "taking over" in caplog.text
    else:
        with pytest.raises(UserError):
            RunLock(tmp_path).acquire()


def test_a_zombie_is_dead(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", ""])
    process = psutil.Process(child.pid)
    started = process.create_time()
    while process.status() != psutil.STATUS_ZOMBIE:
        pass
    with RunLock(tmp_path):
        holder = json.loads((tmp_path / "lock").read_text())
    (tmp_path / "lock").write_text(json.dumps(holder | {"pid": child.pid, "started": started}))
    with RunLock(tmp_path):
        pass
    child.wait()


def test_an_unreadable_lock_is_refused_with_a_remedy(tmp_path):
    (tmp_path / "lock").write_text("")
    with pytest.raises(UserError, match="delete it"):
        RunLock(tmp_path).acquire()


def test_a_lock_leaves_no_empty_folders_behind(tmp_path):
    with RunLock(tmp_path / "runs" / "x"):
        assert (tmp_path / "runs" / "x" / "lock").exists()
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "runs" / "x"):
        (tmp_path / "runs" / "x" / "result").write_text("")
    assert (tmp_path / "runs" / "x" / "result").exists()
