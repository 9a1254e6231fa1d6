"""The journal: one line of JSON per finished question, appended and flushed by one writer. A restart reads it and asks no more.

A line counts when it is whole, its line end included. A run that is killed while it writes leaves a torn last line; that one
is dropped and its question asked again.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import ConfigError, DataError

FILE_NAME = "journal.jsonl"

DONE, REJECTED = STATUSES = ("done", "rejected")


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished question, or piece of work.

    key: see `runner.key_of`; item: for whom it was asked first; value: what was answered, None where it was rejected; reason,
    note: why it was, as a code and in words; prompt: its name and version; seconds: of all attempts, pauses left out; time: of
    the end, in UTC. tokens_in, tokens_out: of all attempts, as far as the annotator states them. raw: the last answer of a
    question that was rejected because it could not be read.
    """

    key: str
    step: str
    item: str
    status: str
    value: dict[str, Any] | None = None
    reason: str | None = None
    note: str | None = None
    prompt: str | None = None
    model: str | None = None
    endpoint: str | None = None
    seed: int | None = None
    temperature: float | None = None
    attempts: int = 1
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    time: str = ""
    raw: str | None = None

    @property
    def done(self) -> bool:
        """There is an answer."""
        return self.status == DONE

    def line(self) -> bytes:
        """The entry as it stands in the journal."""
        told = {name: value for name, value in asdict(self).items() if value is not None}
        return json.dumps(told, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


_NAMES = {each.name for each in fields(Entry)}


@dataclass(slots=True)
class Contents:
    """What a journal holds. length: bytes of its whole lines; torn: bytes after them, which count for nothing."""

    entries: dict[str, Entry] = field(default_factory=dict)
    length: int = 0
    torn: int = 0


def read_journal(path: Path) -> Contents:
    """The entries of a journal by key, the later of two with one key; none where there is no file.

    DataError for a line before the last that is no entry: no kill leaves such a one.
    """
    found = Contents()
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return found
    except OSError as error:
        raise DataError(f"{path}: expected a journal that can be read, found {error}. Check the path.") from error
    lines = data.split(b"\n")
    found.torn = len(lines.pop())
    for number, line in enumerate(lines, 1):
        try:
            entry = entry_of(line.decode())
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number == len(lines):  # the file system may keep the length of a write and lose what was in it
                found.torn += len(line) + 1
                break
            raise DataError(
                f"{path}:{number}: expected an entry of the journal, found {line[:80]!r} ({error}). Remove this line; its "
                "question will be asked again."
            ) from error
        found.entries[entry.key] = entry
        found.length += len(line) + 1
    return found


def entry_of(line: str) -> Entry:
    """The entry of a line. ValueError, TypeError, KeyError where it is none."""
    told = json.loads(line)
    if not isinstance(told, dict) or not set(told) <= _NAMES:
        raise ValueError("not the keys of an entry")
    entry = Entry(**told)
    if entry.status not in STATUSES or (entry.value is None) == entry.done:
        raise ValueError(f"status {entry.status!r} with value {str(entry.value)[:20]}")
    return entry


class Journal:
    """A journal that is open for one run. Entries are added by one thread; another process is kept out.

    Raises ConfigError where the file cannot be opened or another run holds it, DataError where it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror or error}; choose another folder with --out.") from error
        try:
            self._lock()
            contents = read_journal(path)
            os.ftruncate(self._file, contents.length)
            os.lseek(self._file, contents.length, os.SEEK_SET)
            _flush_folder(path.parent)
        except BaseException:
            os.close(self._file)
            raise
        self.entries, self.dropped, self._end = contents.entries, contents.torn, contents.length

    def add(self, entry: Entry) -> None:
        """Append an entry. It is on the disk when this returns. ConfigError where there is no room; nothing is left then."""
        try:
            _append(self._file, entry.line())
        except OSError as error:
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
            raise ConfigError(f"cannot write {self.path}: {error.strerror or error}; make room and start again.") from error
        self._end = os.lseek(self._file, 0, os.SEEK_CUR)
        self.entries[entry.key] = entry

    def close(self) -> None:
        """Let another run have it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: two runs in one folder are not kept apart there
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"{self.path}: expected no other run in this folder, found one that is at work. Wait for it, or choose another "
                "--out."
            ) from error


def _append(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
    os.fsync(file)


def _flush_folder(folder: Path) -> None:
    """A new file is found after a power cut only when its folder was flushed too."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
