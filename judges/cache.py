"""A VQA that asks nothing twice: answers kept in SQLite under the content of picture and question.

The key holds all that an answer depends on: every picture's shape and pixels, the question's text, choices and
expected answer, and the id and template of the model. One file may serve several models and processes of one host;
SQLite's write-ahead log needs shared memory, so it must not lie on a network drive that several hosts write to.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import numpy as np

from judges.base import VQA, Answer, Question, Sample, images_of

_APPLICATION = 0x53414C31
"""SQLite's application_id: which program a file belongs to. Another layout of the table takes another number."""

_SCHEMA = f"""
PRAGMA journal_mode = WAL;
BEGIN;
CREATE TABLE answers (key BLOB PRIMARY KEY, answer BLOB, checksum INTEGER) WITHOUT ROWID;
PRAGMA application_id = {_APPLICATION};
COMMIT;
"""

_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR)
"""What SQLite says of a file that is not as it was written; it has no other reason to call a statement wrong."""

_BUSY_SECONDS = 60.0

_log = logging.getLogger(__name__)

T = TypeVar("T")


class CachedVQA:
    """`vqa`, asked only what the SQLite file at `path` does not answer yet, in one call, each distinct thing once.

    Answers are those of `vqa`, and so are id, template and number of pictures. Only valid answers are kept: what
    failed is asked again next time. A damaged file is set aside under another name, with a warning, and begun anew.

    Raises:
        ValueError: the file is an SQLite database of something else.
    """

    def __init__(self, vqa: VQA, path: str | Path):
        self.vqa = vqa
        self.id, self.template, self.most_images = vqa.id, vqa.template, vqa.most_images
        self._store = _Store(Path(path))

    def ask(self, samples: Sequence[Sample], questions: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        digests = [_digest(sample) for sample in samples]
        keys = [
            [self._key(digest, question) for question in asked]
            for digest, asked in zip(digests, questions, strict=True)
        ]
        found = self._store.load(set(itertools.chain(*keys)))
        missing: dict[str, tuple[Sample, dict[bytes, Question]]] = {}  # by the content of the sample
        for sample, digest, asked, places in zip(samples, digests, questions, keys, strict=True):
            for question, key in zip(asked, places, strict=True):
                if key not in found:
                    missing.setdefault(digest, (sample, {}))[1][key] = question
        new = self._ask_inner(missing.values()) if missing else {}
        self._store.save({key: answer for key, answer in new.items() if answer.valid})
        answers = found | new
        return [[answers[key] for key in places] for places in keys]

    def _ask_inner(self, missing: Iterable[tuple[Sample, Mapping[bytes, Question]]]) -> dict[bytes, Answer]:
        samples, asked = zip(*missing, strict=True)
        answered = self.vqa.ask(samples, [list(wanted.values()) for wanted in asked])
        return {
            key: answer
            for wanted, answers in zip(asked, answered, strict=True)
            for key, answer in zip(wanted, answers, strict=True)
        }

    def _key(self, digest: str, question: Question) -> bytes:
        parts = [digest, self.id, self.template, question.text, question.choices, question.expected, question.scale]
        return hashlib.sha256(json.dumps(parts).encode()).digest()


def _digest(sample: Sample) -> str:
    """The content of a sample: type, shape and pixels of every picture."""
    digest = hashlib.sha256()
    for image in images_of(sample):
        digest.update(json.dumps([str(image.dtype), image.shape]).encode())
        digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


class _Unfit(Exception):
    """There is nothing at the path that can be read: no file, or an empty one."""


class _Damaged(_Unfit):
    """What is at the path is not what was written."""


class _Store:
    """Answers by key in one SQLite file.

    A connection lives for one transaction, under a shared lock on a file beside the database; whoever creates or
    replaces the database holds that lock alone. So no file is renamed while a connection has it open, which would
    let its write-ahead log be mixed up with that of the successor.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.load(())

    def load(self, keys: Iterable[bytes]) -> dict[bytes, Answer]:
        """The answers to those of the keys that are there."""

        def read(database: sqlite3.Connection) -> dict[bytes, Answer]:
            found = {}
            for key in keys:
                row = database.execute("SELECT answer, checksum FROM answers WHERE key = ?", (key,)).fetchone()
                if row is None:
                    continue
                answer, checksum = row
                if checksum != _checksum(key, answer):
                    raise _Damaged("an answer does not match its checksum")
                found[key] = Answer(**json.loads(answer))
            return found

        return self._run(read)

    def save(self, answers: Mapping[bytes, Answer]) -> None:
        """Keep valid answers; where another process was faster, its answer stays."""
        texts = {key: json.dumps(asdict(answer), default=float).encode() for key, answer in answers.items()}
        rows = [(key, text, _checksum(key, text)) for key, text in texts.items()]
        if rows:
            self._run(lambda database: database.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?, ?)", rows))

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """`work` on the database in one transaction, if need be on a new one."""
        with self._locked(fcntl.LOCK_SH):
            seen = self._inode()
            try:
                return self._transaction(work)
            except _Unfit as error:
                unfit = error
        with self._locked(fcntl.LOCK_EX):
            if isinstance(unfit, _Damaged) and seen == self._inode():  # otherwise another process was faster
                self._set_aside(unfit)
            self._create()
            return self._transaction(work)

    def _transaction(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if not self.path.exists():
            raise _Unfit(f"{self.path} is not there")
        try:
            with self._connected() as database, database:
                if not self._is_ours(database):
                    raise _Unfit(f"{self.path} is empty")
                return work(database)
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF not in _DAMAGE:  # the low byte is the primary code
                raise
            raise _Damaged(str(error)) from error
        except UnicodeDecodeError as error:  # the message would quote names that the file no longer spells
            raise _Damaged("its names are not readable") from error

    def _create(self) -> None:
        with self._connected() as database:
            if not self._is_ours(database):
                database.executescript(_SCHEMA)

    def _is_ours(self, database: sqlite3.Connection) -> bool:
        """False for a database without anything in it; ValueError for one of another program."""
        (owner,) = database.execute("PRAGMA application_id").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if owner != _APPLICATION and (owner or tables):
            raise ValueError(f"cache: {self.path} is an SQLite database of something else; name another file")
        return owner == _APPLICATION

    def _set_aside(self, damage: _Damaged) -> None:
        aside = next(
            place
            for number in itertools.count(1)
            if not (place := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists()
        )
        for suffix in ("-shm", "-wal", ""):
            with contextlib.suppress(FileNotFoundError):
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")
        _log.warning(
            "%s is damaged (%s). It is now %s, and its answers are asked for again.", self.path, damage, aside.name
        )

    def _connected(self) -> contextlib.closing[sqlite3.Connection]:
        return contextlib.closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS))

    def _inode(self) -> int | None:
        return self.path.stat().st_ino if self.path.exists() else None

    @contextlib.contextmanager
    def _locked(self, mode: int) -> Iterator[None]:
        with open(f"{self.path}.lock", "w") as lock:
            fcntl.flock(lock, mode)
            yield


def _checksum(key: bytes, answer: bytes) -> int:
    """SQLite itself has none for its pages. Takes a damaged `answer` of any type."""
    return zlib.crc32(repr((key, answer)).encode())
