"""The manifest: what a set of records consists of, with a hash that changes when, and only when, the data change.

It holds for every record its id, kind, split, weight and text hash, and for every picture its sha256 and size. The plan of an
epoch and the cache are functions of it; a checkpoint keeps its hash. On disk it is JSONL: a head line, then an entry a line.
Indexing again reads only pictures whose file changed in size or time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...reasonedit_core.errors import DataError
from ...reasonedit_core.files import write_whole
from .pictures import PictureFault, upright_size
from .problems import Problem, raise_problems
from .records import Record, read_records, record_files

SCHEMA = "reasonedit.manifest/1"
FILE_NAME = "manifest.jsonl"
_BATCH = 1024


@dataclass(frozen=True, slots=True)
class PictureEntry:
    """A picture file as it was indexed. path: relative to the manifest; size: (width, height), upright.

    stamp: length in bytes and time of change in nanoseconds.
    """

    path: str
    sha256: str
    size: tuple[int, int]
    stamp: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Entry:
    """One record. file: its JSONL file, relative to the manifest; digest: sha256 of what the record says, pictures apart."""

    id: str
    kind: str
    split: str
    weight: float
    file: str
    line: int
    digest: str
    pictures: Mapping[str, PictureEntry]

    def content(self) -> list[Any]:
        """What counts as the data: not where the files are, nor how a picture file is called."""
        pictures = {name: [each.sha256, *each.size] for name, each in sorted(self.pictures.items())}
        return [self.id, self.kind, self.split, self.weight, self.digest, pictures]


@dataclass(frozen=True)
class Manifest:
    """The entries, ordered by id, so that neither the order of lines nor of files counts."""

    entries: tuple[Entry, ...]

    @cached_property
    def hash(self) -> str:
        """sha256 over the entries' contents, as hex."""
        digest = hashlib.sha256(SCHEMA.encode())
        for entry in self.entries:
            digest.update(json.dumps(entry.content(), ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def by_id(self) -> dict[str, Entry]:
        """The entries by record id."""
        return {entry.id: entry for entry in self.entries}

    def __len__(self) -> int:
        return len(self.entries)

    def select(self, *, splits: Sequence[str] | None = None, kinds: Sequence[str] | None = None) -> Manifest:
        """The part of the named splits and kinds."""
        return Manifest(
            tuple(
                entry
                for entry in self.entries
                if (splits is None or entry.split in splits) and (kinds is None or entry.kind in kinds)
            )
        )

    def lines(self) -> list[str]:
        """What there is, as text."""
        kinds = Counter((entry.split, entry.kind) for entry in self.entries)
        pictures = {each.sha256 for entry in self.entries for each in entry.pictures.values()}
        tables = [f"{split} {kind}: {count}" for (split, kind), count in sorted(kinds.items())]
        return [f"{len(self)} records, {len(pictures)} different pictures, hash {self.hash[:16]}", *tables]

    def save(self, path: str | Path) -> Path:
        """Write it, whole or not at all. Entries name files relative to its folder, so it must stay where it was made."""
        head = json.dumps({"schema": SCHEMA, "hash": self.hash, "records": len(self)})
        rows = [json.dumps(asdict(entry), ensure_ascii=False, separators=(",", ":")) for entry in self.entries]
        return write_whole(path, "\n".join([head, *rows, ""]).encode())

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read a manifest. DataError when it is none, is cut short, or does not have the hash it states."""
        path = Path(path)
        try:
            head, *rows = path.read_text(encoding="utf-8").rstrip("\n").split("\n")  # splitlines knows more line ends
            stated = json.loads(head)
            manifest = cls(tuple(_entry(json.loads(row)) for row in rows))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: expected a manifest, found none ({error}). Run `reasonedit-train index`.") from error
        if not isinstance(stated, dict) or stated.get("schema") != SCHEMA:
            raise DataError(f"{path}: expected schema {SCHEMA}, found {head[:80]}. Run `reasonedit-train index`.")
        if stated.get("hash") != manifest.hash:
            raise DataError(
                f"{path}: expected entries with hash {stated.get('hash')}, found {manifest.hash}; the file was changed or "
                "cut short. Run `reasonedit-train index`."
            )
        return manifest


def _entry(row: dict[str, Any]) -> Entry:
    pictures = {
        name: PictureEntry(each["path"], each["sha256"], tuple(each["size"]), tuple(each["stamp"]))
        for name, each in row.pop("pictures").items()
    }
    return Entry(**row, pictures=pictures)


def index(
    path: str | Path | Sequence[str | Path],
    manifest: str | Path | None = None,
    *,
    records: Sequence[Record] | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Index the records of `path` (see `records.record_files`) into the file `manifest`, and return what it holds.

    manifest: default manifest.jsonl beside the first record file. An index already there saves reading pictures whose file
    has the same length and time. records: those of `path`, if they were read already.
    Raises DataError naming the record for every picture that is missing or is none, and for faulty records.
    """
    place = Path(manifest) if manifest is not None else record_files(path)[0].parent / FILE_NAME
    folder = place.parent
    known = _known(place)
    records = read_records(path) if records is None else records
    entries: list[Entry] = []
    problems: list[Problem] = []
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1)) as pool:
        for start in range(0, len(records), _BATCH):
            batch = records[start : start + _BATCH]
            for entry, faults in pool.map(lambda record: _index_one(record, folder, known), batch):
                entries.append(entry)
                problems += faults
            if on_progress:
                on_progress(len(entries))
    raise_problems(problems)
    made = Manifest(tuple(sorted(entries, key=lambda entry: entry.id)))
    made.save(place)
    return made


def _known(place: Path) -> dict[str, PictureEntry]:
    """The pictures of an earlier index by path. One that cannot be read is as good as none: indexing makes it anew."""
    if not place.is_file():
        return {}
    try:
        earlier = Manifest.load(place)
    except DataError:
        return {}
    return {each.path: each for entry in earlier.entries for each in entry.pictures.values()}


def _index_one(record: Record, folder: Path, known: Mapping[str, PictureEntry]) -> tuple[Entry, list[Problem]]:
    pictures: dict[str, PictureEntry] = {}
    problems: list[Problem] = []
    for name in record.files:
        file = record.picture(name)
        try:
            pictures[name] = _index_picture(file, _relative(file, folder), known)
        except PictureFault as fault:
            where = "edit.mask" if name == "mask" else f"images.{name}"
            expected = "a picture that can be read"
            problems.append(Problem(fault.code, record.source, record.id, where, expected, fault.found, fault.fix))
    file = _relative(Path(record.source.file), folder)
    digest = record_digest(record)
    return Entry(record.id, record.kind, record.split, record.weight, file, record.source.line, digest, pictures), problems


def _index_picture(file: Path, path: str, known: Mapping[str, PictureEntry]) -> PictureEntry:
    size = upright_size(file)
    status = file.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    before = known.get(path)
    if before is not None and before.stamp == stamp and before.size == size:
        return before
    try:
        with open(file, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise PictureFault("unreadable-picture", f"a file that cannot be read ({error})", "check its permissions.") from error
    return PictureEntry(path, sha256, size, stamp)


def record_digest(record: Record) -> str:
    """sha256 of what a record says. Pictures count by their content, which the entry holds, and not by path; nor does what a
    record tells of its origin."""
    said = json.loads(record.to_json())
    for key in ("images", "provenance", "license", "source"):
        said.pop(key, None)
    if said.get("edit"):
        said["edit"].pop("mask", None)
    return hashlib.sha256(json.dumps(said, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def _relative(file: Path, folder: Path) -> str:
    """`file` seen from `folder`, with forward slashes; whole where they have no common root."""
    try:
        return Path(os.path.relpath(file, folder)).as_posix()
    except ValueError:
        return file.resolve().as_posix()


def changed(manifest: Manifest, folder: str | Path) -> Iterator[str]:
    """Ids of the records of which a picture file is gone or has another length or time than when it was indexed."""
    folder = Path(folder)
    for entry in manifest.entries:
        for each in entry.pictures.values():
            try:
                status = (folder / each.path).stat()
            except OSError:
                yield entry.id
                break
            if (status.st_size, status.st_mtime_ns) != each.stamp:
                yield entry.id
                break
