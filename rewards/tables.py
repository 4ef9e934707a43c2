"""The rows of tables that people have: files, folders of files and hub datasets, one row at a time.

No script of a dataset is run and no archive is unpacked. A broken row is a `ValueError` in its place; a table that
cannot be read at all raises one.
"""

import difflib
import functools
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
import pyarrow.parquet

SUFFIXES = (".parquet", ".jsonl", ".json")

_SPACE = re.compile(r"\s*")
_ROWS_AT_ONCE = 16
_MOST_BYTES = 256_000_000
_LONGEST_NAME = 120
_BROKEN = (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError, zlib.error, lzma.LZMAError)
"""What reading a member of a damaged, encrypted or unknown kind of zip file raises."""


@dataclass(frozen=True)
class Refused:
    """A row, numbered from 1 through the files of `source`, that cannot be used, and why."""

    source: str
    row: int
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: row {self.row}: {self.reason}"


@dataclass(frozen=True)
class Table:
    """Where rows and their pictures are.

    Attributes:
        path: a file, a folder of files, or the id of a hub dataset, `owner/name`.
        split: which files of a folder, or which split of a hub dataset; a file is read whatever its name.
        config: the configuration of a hub dataset that has several.
        revision: the commit, tag or branch of a hub dataset; None for the newest.
    """

    path: str
    split: str = "test"
    config: str | None = None
    revision: str | None = None

    @functools.cached_property
    def source(self) -> str:
        """Its name in messages and in the provenance of pairs."""
        return Path(self.path).name if Path(self.path).is_file() else f"{self.path}[{self.split}]"

    def rows(self, required: Sequence[Sequence[str]], optional: Collection[str] = ()) -> Iterator[dict | ValueError]:
        """The rows, of which only the columns named here need be there: one of each of `required`.

        Raises:
            ValueError: there is no table, it cannot be read, or it lacks a column; the message names the table.
        """
        wanted = {*optional, *(name for names in required for name in names)}
        if self.on_hub:
            yield from self._checked(_hub(self), required)
            return
        for path in self.files():
            try:
                yield from self._checked(_READERS[path.suffix](path, wanted), required)
            except OSError as error:
                raise ValueError(f"{path}: {error.strerror or error}") from None
            except pyarrow.ArrowInvalid as error:
                raise ValueError(f"{path}: broken Parquet: {error}") from None
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None

    def picture(self, value: Any) -> bytes | Path:
        """What a cell says of a picture: its bytes, or where it lies.

        A cell holds bytes, a path, the struct of both that `datasets` writes, or a list of one of these. A path is
        looked for from the folder of the table, in the folder there that is named like the split or the file, beside
        the table, and in zip files that are named like the folder in the path, or like the split or the file.

        Raises:
            ValueError: there is no picture.
        """
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return value
        if not isinstance(value, str) or not value:
            raise ValueError("is missing" if value in (None, "", b"", []) else f"{type(value).__name__} is no picture")
        return self._found(value)

    def _found(self, name: str) -> bytes | Path:
        if self.on_hub:
            raise ValueError(f"{_short(name)} is a file on the hub; download the dataset and give its folder")
        named = PurePosixPath(name)
        for path in (self._folder / name, self._folder / self._split / name, self._folder / named.name):
            # Path.is_file raises for names that are too long to be one, such as a picture in base64.
            if os.path.isfile(path):
                return path
        for folder in (named.parent, PurePosixPath(self._split)):
            archive = self._folder / f"{folder}.zip"
            if os.path.isfile(archive) and (data := _member(archive, named.name)) is not None:
                return data
        raise ValueError(f"{_short(name)} is not there")

    @functools.cached_property
    def on_hub(self) -> bool:
        """Whether `path` names a dataset of the hub, and nothing that is here."""
        named = self.path.count("/") == 1 and not self.path.startswith((".", "/", "~"))
        return named and not Path(self.path).exists() and not self.path.endswith(SUFFIXES)

    @functools.cached_property
    def _folder(self) -> Path:
        return Path(self.path) if Path(self.path).is_dir() else Path(self.path).parent

    @functools.cached_property
    def _split(self) -> str:
        return self.split if Path(self.path).is_dir() else Path(self.path).stem

    def files(self) -> list[Path]:
        """The files of the table: the one at `path`, or those of the split in the folder and in those within it.

        Raises:
            ValueError: there is none, or it is of another kind.
        """
        path = Path(self.path)
        if not path.is_dir():
            if path.suffix not in SUFFIXES:
                raise ValueError(f"{path}: tables are read from {', '.join(SUFFIXES)}, not {path.suffix or 'this'}")
            return [path]
        inside = sorted(file for file in [*path.glob("*"), *path.glob("*/*.parquet")] if file.suffix in SUFFIXES)
        names = (self.split, f"metadata-{self.split}")
        if found := [file for file in inside if file.stem in names or file.stem.startswith(f"{self.split}-")]:
            return found
        others = ", ".join(file.name for file in inside) or "no table"
        raise ValueError(f"{path}: has no table {self.split}{{{','.join(SUFFIXES)}}}; there is {others}")

    def _checked(self, rows: Iterator[Any], required: Sequence[Sequence[str]]) -> Iterator[dict | ValueError]:
        """The rows, after the columns of the first that is one were looked at."""
        known = False
        for row in rows:
            if isinstance(row, dict):
                if not known:
                    self._require(required, row)
                    known = True
                yield row
            else:
                yield row if isinstance(row, ValueError) else ValueError(f"is no row but {type(row).__name__}")

    def _require(self, required: Sequence[Sequence[str]], names: Collection[str]) -> None:
        for wanted in required:
            if not any(name in names for name in wanted):
                near = next((n for name in wanted for n in difflib.get_close_matches(name, names, n=1)), None)
                hint = f"did you mean {near!r}?" if near else f"it has {', '.join(names)}"
                raise ValueError(f"{self.source}: no column {' or '.join(map(repr, wanted))}; {hint}")


def _parquet(path: Path, wanted: Collection[str]) -> Iterator[Any]:
    with pyarrow.parquet.ParquetFile(path) as table:
        names = table.schema_arrow.names
        # Columns that nobody asked for are read empty: they are named where one that was asked for is missing.
        unread = dict.fromkeys(name for name in names if name not in wanted)
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[name for name in names if name in wanted]):
            for row in batch.to_pylist():
                yield {**row, **unread}


def _lines(path: Path, wanted: Collection[str]) -> Iterator[Any]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    yield ValueError(f"broken JSON: {error}")


def _array(path: Path, wanted: Collection[str]) -> Iterator[Any]:
    """The items of a JSON array, decoded one by one: what they take up as objects is many times their text."""
    text = path.read_text(encoding="utf-8")
    decoder, place = json.JSONDecoder(), _after(text, 0)
    if text[place : place + 1] != "[":
        raise ValueError(f"{path}: is no JSON array of rows")
    place = _after(text, place + 1)
    while text[place : place + 1] != "]":
        try:
            item, place = decoder.raw_decode(text, place)
        except ValueError as error:
            raise ValueError(f"{path}: broken JSON: {error}") from None
        yield item
        place = _after(text, place)
        if text[place : place + 1] == ",":
            place = _after(text, place + 1)


def _after(text: str, place: int) -> int:
    """The first place from `place` on that is no white space."""
    return _SPACE.match(text, place).end()


_READERS: dict[str, Callable[[Path, Collection[str]], Iterator[Any]]] = {
    ".parquet": _parquet,
    ".jsonl": _lines,
    ".json": _array,
}


def _hub(table: Table) -> Iterator[Any]:
    # datasets takes a second to import; tables in files do not wait for it.
    import datasets

    try:
        rows = datasets.load_dataset(
            table.path, table.config, split=table.split, revision=table.revision, streaming=True
        )
        # Of CSV files datasets knows no features before it reads them; they hold no pictures to decode.
        yield from rows.decode(False) if rows.features else rows
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise ValueError(
            f"{table.path}: needs a script, and no script of a dataset is run; download its files "
            f"(hf download --repo-type dataset {table.path} --local-dir FOLDER) and give the folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{table.path}: {' '.join(str(error).split())}") from None


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}\N{HORIZONTAL ELLIPSIS}"


@functools.lru_cache(maxsize=4)
def _members(archive: Path) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """An open zip file, and its members by name without their folders."""
    try:
        opened = zipfile.ZipFile(archive)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{archive}: broken zip file: {error}") from None
    return opened, {PurePosixPath(info.filename).name: info for info in opened.infolist()}


def _member(archive: Path, name: str) -> bytes | None:
    opened, members = _members(archive)
    if name not in members:
        return None
    if members[name].file_size > _MOST_BYTES:
        raise ValueError(f"{name} in {archive.name} is larger than {_MOST_BYTES // 1_000_000} MB")
    try:
        return opened.read(members[name])
    except _BROKEN as error:
        raise ValueError(f"{name} in {archive.name} cannot be read: {error}") from None
