"""Artifacts on disk: what a stage leaves behind, committed file by file, the manifest last.

    sample/
      manifest.json         fingerprint, inputs, versions, sha256 and bytes of every file
      shard-00000.parquet

A file is written under a temporary name beside its place, flushed, and renamed, so it is whole or absent.
While the artifact is incomplete, `partial.json` holds its fingerprint and `.parts/` one record per finished
file, so that ranks which write different files share nothing. `resume/` is free space for the stage's own
checkpoints. `finish` folds the records into the manifest and removes all three.

No file of an artifact holds a wall-clock time: the same work gives the same bytes.
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import datasets
import psutil
import pyarrow.parquet
from pydantic import ValidationError

from pipeline.settings import Section, UserError

_MANIFEST = "manifest.json"
_NOTES = ("README.md", "quality.json", "pretrain.yaml")
_PARTIAL = "partial.json"
_PARTS = ".parts"
_RESUME = "resume"
_TEMPORARY = ".tmp-"
_VERSIONED = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "diffusers")

_log = logging.getLogger(__name__)

S = TypeVar("S", bound=Section)


class Record(Section):
    """What is known of one finished file: the sha256 of its contents in hexadecimal and its size in bytes."""

    sha256: str
    bytes: int


class Claim(Section):
    """`partial.json`: for which work an unfinished artifact is being made."""

    fingerprint: str


class Manifest(Section):
    """`manifest.json`: what a finished artifact is made of and from."""

    fingerprint: str
    inputs: dict[str, str]
    versions: dict[str, str]
    files: dict[str, Record]
    extra: dict[str, Any]


class Holder(Section):
    """`lock`: the process that runs in a directory. `started` is in epoch seconds, `since` in ISO 8601."""

    host: str
    pid: int
    started: float
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class Artifact:
    """The folder of one stage's result.

    One process calls `begin` and `finish`; between them any process may `write` files of its own.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def resume(self) -> Path:
        """Where the stage may keep checkpoints of its own until `finish`; it creates the folder itself."""
        return self.folder / _RESUME

    @property
    def manifest(self) -> Manifest | None:
        """The manifest; None while the artifact is incomplete."""
        return _read(Manifest, self.folder / _MANIFEST)

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the work that the folder holds, finished or not."""
        claim = self.manifest or _read(Claim, self.folder / _PARTIAL)
        return claim.fingerprint if claim else None

    @property
    def files(self) -> dict[str, Record]:
        """The finished files by name, sorted."""
        if manifest := self.manifest:
            return manifest.files
        parts = self.folder / _PARTS
        names = [name for name in _files(parts) if not name.rpartition("/")[2].startswith(_TEMPORARY)]
        records = {name.removesuffix(".json"): _read(Record, parts / name) for name in names}
        return {name: record for name, record in sorted(records.items()) if record}

    def begin(self, fingerprint: str) -> None:
        """Open the artifact for the work named `fingerprint`.

        Files of that same work whose hashes hold stay, with its `resume/`. Everything else goes.
        """
        same = self.fingerprint == fingerprint
        kept = {name: record for name, record in self.files.items() if same and self._holds(name, record)}
        self.folder.mkdir(parents=True, exist_ok=True)
        if not same:
            # The claim goes first: were the files to go first, a kill could leave it standing over others.
            _unlink(self.folder / _PARTIAL)
            _unlink(self.folder / _MANIFEST)
        self._prune({*kept, *(f"{_PARTS}/{name}.json" for name in kept), _PARTIAL, _MANIFEST}, same)
        for name, record in kept.items():
            atomic_write_text(self._part(name), _pretty(record.model_dump()))
        atomic_write_text(self.folder / _PARTIAL, _pretty({"fingerprint": fingerprint}))
        _unlink(self.folder / _MANIFEST)

    def has(self, name: str) -> bool:
        """Whether file `name` is finished. `begin` checked its hash."""
        manifest = self.manifest
        record = manifest.files.get(name) if manifest else _read(Record, self._part(name))
        return record is not None and (self.folder / name).is_file()

    def names(self, pattern: str = "*") -> list[str]:
        """The finished files that match the shell `pattern`, sorted."""
        return sorted(name for name in self.files if fnmatch.fnmatchcase(name, pattern))

    def path(self, name: str) -> Path:
        """Where file `name` stands.

        Raises:
            FileNotFoundError: it is not finished.
        """
        if not self.has(name):
            raise FileNotFoundError(f"{self.folder / name} is not finished")
        return self.folder / name

    def write(self, name: str, writer: Callable[[Path], object]) -> None:
        """Commit the file that `writer` puts at the path it is given; that path has the suffix of `name`."""
        path = self.folder / name
        with _temporary(path) as temporary:
            writer(temporary)
            self._commit(temporary, name)

    def write_folder(self, name: str, writer: Callable[[Path], object]) -> None:
        """Commit every file that `writer` puts into the folder it is given, as `name/...`."""
        with _temporary(self.folder / name) as temporary:
            temporary.mkdir()
            writer(temporary)
            for part in _files(temporary):
                self._commit(temporary / part, f"{name}/{part}")

    def write_text(self, name: str, text: str) -> None:
        """Commit `text` in UTF-8."""
        self.write(name, lambda path: path.write_bytes(text.encode()))

    def finish(self, inputs: Mapping[str, str], extra: Mapping[str, Any] | None = None) -> None:
        """Declare the artifact complete.

        Args:
            inputs: fingerprint of each artifact it was made from.
            extra: JSON-able facts to keep in the manifest under `extra`.
        """
        claim = _read(Claim, self.folder / _PARTIAL)
        assert claim, f"{self.folder}: finish() without begin()"
        manifest = Manifest(
            fingerprint=claim.fingerprint,
            inputs=dict(inputs),
            versions=_versions(),
            files=self.files,
            extra=dict(extra or {}),
        )
        atomic_write_text(self.folder / _MANIFEST, _pretty(manifest.model_dump()))
        self.tidy()

    def tidy(self) -> None:
        """Remove what only an incomplete artifact needs. A kill inside `finish` may leave it."""
        if self.manifest:
            shutil.rmtree(self.folder / _PARTS, ignore_errors=True)
            shutil.rmtree(self.resume, ignore_errors=True)
            _unlink(self.folder / _PARTIAL)

    def check_free(self) -> None:
        """Raises UserError where `begin` would remove what is no artifact's."""
        if not self.fingerprint and self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise UserError(f"{self.folder} is not empty; name another folder by --to")

    def complete(self, fingerprint: str) -> bool:
        """Whether the manifest stands, is of this fingerprint, and every hash holds."""
        manifest = self.manifest
        return manifest is not None and manifest.fingerprint == fingerprint and not self.damaged()

    def damaged(self) -> list[str]:
        """The finished files that are missing by now or whose hash does not hold."""
        return [name for name, record in self.files.items() if not self._holds(name, record)]

    def _part(self, name: str) -> Path:
        return self.folder / _PARTS / f"{name}.json"

    def _holds(self, name: str, record: Record) -> bool:
        path = self.folder / name
        return path.is_file() and path.stat().st_size == record.bytes and hash_path(path) == record.sha256

    def _commit(self, temporary: Path, name: str) -> None:
        assert _read(Claim, self.folder / _PARTIAL), f"{self.folder}: write() outside begin() and finish()"
        path = self.folder / name
        record = Record(sha256=hash_path(temporary), bytes=temporary.stat().st_size)
        path.parent.mkdir(parents=True, exist_ok=True)
        _publish(temporary, path)
        atomic_write_text(self._part(name), _pretty(record.model_dump()))

    def _prune(self, keep: set[str], resume: bool) -> None:
        for name in _files(self.folder):
            if name not in keep and not (resume and name.startswith(f"{_RESUME}/")):
                (self.folder / name).unlink()
        for folder in sorted((path for path in self.folder.rglob("*") if path.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()


def write_rows(artifact: Artifact, name: str, rows: list[dict[str, Any]], features: datasets.Features) -> None:
    """Commit `rows` as the Parquet file `name`, with its `features` inside; PIL images are stored as PNG."""
    table = datasets.Dataset.from_list(rows, features=features)
    artifact.write(name, table.to_parquet)


def read_rows(
    artifact: Artifact, pattern: str = "shard-*.parquet", columns: Sequence[str] | None = None
) -> datasets.Dataset:
    """The rows of all finished files that match `pattern`, in the order of their names, held in memory.

    Read shard by shard, or only the `columns` needed, where the images of all shards would not fit.

    Raises:
        FileNotFoundError: no finished file matches.
    """
    shards = []
    for name, record in artifact.files.items():
        if fnmatch.fnmatchcase(name, pattern):
            table = pyarrow.parquet.read_table(artifact.folder / name, columns=columns and list(columns))
            # Left to itself, Dataset would hash the whole table for its fingerprint.
            shards.append(datasets.Dataset(table, fingerprint=record.sha256))
    if not shards:
        raise FileNotFoundError(f"{artifact.folder} has no finished {pattern}")
    return datasets.concatenate_datasets(shards)


def fingerprint(payload: Mapping[str, Any]) -> str:
    """sha256 of `payload` as canonical JSON: sorted keys, no spaces, no NaN."""
    text = json.dumps(payload, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_path(path: str | Path) -> str:
    """sha256 of a file, or of a folder's relative file names and their contents, except notes that nothing loads.

    Raises:
        UserError: nothing stands at `path`.
    """
    path = Path(path)
    if path.is_dir():
        return fingerprint({name: hash_path(path / name) for name in _files(path) if Path(name).name not in _NOTES})
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Replace the file at `path`: after a kill there are the old bytes or the new ones, never a mixture."""
    path = Path(path)
    with _temporary(path) as temporary:
        temporary.write_bytes(data)
        _publish(temporary, path)


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write_bytes` in UTF-8."""
    atomic_write_bytes(path, text.encode())


class RunLock:
    """One runner per run directory: a `lock` file that names its host, its process and since when.

    A holder that died on this host is taken over with a warning. One on another host cannot be looked at,
    so its lock stands until someone deletes it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "lock"
        self._created: list[Path] = []

    def acquire(self) -> None:
        """Take the lock, or fail at once.

        Raises:
            UserError: another runner holds it.
        """
        self._created = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        with _only_process(self.folder):
            if self.path.exists():
                self._take_over()
            holder = Holder(
                host=socket.gethostname(),
                pid=os.getpid(),
                started=psutil.Process().create_time(),
                since=datetime.now(UTC).isoformat(timespec="seconds"),
            )
            with self.path.open("x", encoding="utf-8") as file:
                file.write(_pretty(holder.model_dump()))

    def release(self) -> None:
        """Give the lock back; folders that `acquire` had to make go too, if nothing was put into them."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in self._created:
                folder.rmdir()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _take_over(self) -> None:
        holder = lock_holder(self.folder)
        if holder is None:
            raise UserError(f"{self.path} is unreadable; delete it if nothing runs in {self.folder}")
        if holder.host != socket.gethostname():
            raise UserError(f"{self.folder} is in use by {holder}; if that one is gone, delete {self.path}")
        if _alive(holder):
            raise UserError(f"{self.folder} is in use by {holder}")
        _log.warning("taking over %s from %s, which is dead", self.folder, holder)
        self.path.unlink()


def lock_holder(folder: str | Path) -> Holder | None:
    """Who runs in the directory `folder`, or died there; None when nobody."""
    return _read(Holder, Path(folder) / "lock")


def _alive(holder: Holder) -> bool:
    """Whether the holder's process still runs, and is the one that took the lock rather than a later one
    of the same number. A zombie counts as dead: in a container nobody may ever reap it."""
    try:
        process = psutil.Process(holder.pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - holder.started) < 1
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """No other process of this host is in the block for `folder`: two may not take over one dead lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A free name beside `path`, of the same suffix; whatever is left there is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    try:
        yield temporary
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path) -> None:
    """Move a file to its place so that it survives a power cut."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _unlink(path: Path) -> None:
    if path.exists():
        path.unlink()
        _sync_folder(path.parent)


def _files(folder: Path) -> list[str]:
    """The relative POSIX names of all files below `folder`, sorted; none where there is no folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _read(kind: type[S], path: Path) -> S | None:
    """The `kind` of section in the JSON file `path`; None where it is absent or damaged."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def _pretty(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def _versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed
