"""What the converters share: the sample as a layout names it, and how files, captions and tables are found and read."""

from __future__ import annotations

import csv
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import DataError
from ..pictures import SUFFIXES, exists, is_picture


@dataclass(frozen=True, slots=True)
class Source:
    """Where a data set is. file: the config or table that was named, if one was; images, controls: folder names given by the
    user, which win over what the layout's own rules find."""

    folder: Path
    file: Path | None = None
    images: str | None = None
    controls: tuple[str, ...] = ()

    def files(self, *suffixes: str) -> list[Path]:
        """The named file when it has one of the suffixes, else all such files of the folder, by name."""
        if self.file is not None:
            return [self.file] if self.file.suffix.lower() in suffixes else []
        return sorted(path for path in self.folder.iterdir() if path.is_file() and path.suffix.lower() in suffixes)


@dataclass(frozen=True, slots=True)
class Found:
    """One training pair. inputs: the picture that is edited, then references; none for text to image."""

    key: str
    where: str
    target: Path
    inputs: tuple[Path, ...]
    text: str
    mask: Path | None = None
    weight: float = 1.0
    split: str | None = None
    category: str | None = None


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that cannot be used, and why."""

    where: str
    reason: str


_TARGET = re.compile(r"(images?|img|pictures?|targets?|outputs?|after|edited|results?|train)(_?(images?|img|dir|directory))?$")
_CONTROL = re.compile(
    r"(controls?|conditions?|conditioning|sources?|inputs?|before|references?|ref|originals?)"
    r"(_?(images?|img|dir|directory|path))?(?:[_-]?\d+)?$"
)


def target_folder(source: Source) -> Path | None:
    """The folder of the pictures that should come out: the user's, a subfolder with a usual name, or the folder itself."""
    if source.images is not None:
        return _given(source, source.images)
    found = [each for each in _subfolders(source.folder) if _TARGET.match(each.name.lower()) and pictures_in(each)]
    if len(found) > 1:
        names = ", ".join(each.name for each in found)
        raise DataError(f"{source.folder}: expected one folder of target pictures, found {names}. Name it (images).")
    return found[0] if found else source.folder if pictures_in(source.folder) else None


def control_folders(source: Source) -> list[Path]:
    """The folders of the pictures that go in, in order."""
    if source.controls:
        return [_given(source, name) for name in source.controls]
    target = target_folder(source)
    found = [each for each in _subfolders(source.folder) if _CONTROL.match(each.name.lower()) and pictures_in(each)]
    return [each for each in found if each != target]


def _given(source: Source, name: str) -> Path:
    path = source.folder / name
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder of pictures, found none. Check the name.")
    return path


def _subfolders(folder: Path) -> list[Path]:
    return sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))


def pictures_in(folder: Path) -> dict[str, Path]:
    """The pictures directly in a folder, by name without suffix."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.stem: path for path in paths if path.is_file() and is_picture(path)}


def numbered(controls: Mapping[str, Path], stem: str) -> list[Path]:
    """The control pictures of `stem`: the one of its name, or those with a number after it, by the number."""
    found = []
    for name, path in controls.items():
        match = re.fullmatch(re.escape(stem) + r"_(\d+)", name)
        if match:
            found.append((int(match[1]), path))
    return [controls[stem]] if stem in controls else [path for _, path in sorted(found)]


def caption_beside(picture: Path, extension: str = ".txt") -> str | None:
    """The text of the caption file beside a picture; None when there is none."""
    path = picture.with_suffix("." + extension.lstrip("."))
    if not exists(path):
        return None
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: expected text in UTF-8, found {error}. Save the file as UTF-8.") from error


def resolve(name: Any, *folders: Path) -> Path | None:
    """The file that a table means by `name`, looked for in `folders` in turn.

    A whole path from another machine is looked for by its ends, the longest first: a/b/c.png, b/c.png, c.png.
    """
    if not isinstance(name, str) or not name.strip():
        return None
    plain = name.strip().replace("\\", "/")
    whole = plain.startswith("/") or re.match(r"[A-Za-z]:/", plain) is not None
    if whole and exists(Path(plain)):
        return Path(plain)
    parts = [part for part in plain.split("/") if part not in ("", ".") and not part.endswith(":")]
    for start in range(len(parts)) if whole else (0,):
        for folder in folders:
            path = folder.joinpath(*parts[start:])
            if exists(path):
                return path
    return None


def with_suffix(name: str, *folders: Path) -> Path | None:
    """`resolve`, also for names that lack the suffix of a picture."""
    found = resolve(name, *folders)
    return found or next((path for suffix in SUFFIXES if (path := resolve(name + suffix, *folders))), None)


# ---- tables --------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> Any:
    """A JSON file. DataError when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected JSON, found text that is none ({error}). Repair the file.") from error


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file. DataError when it is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected TOML, found text that is none ({error}). Repair the file.") from error


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | Skipped]]:
    """The rows of a CSV, JSON (a list of objects) or JSONL file, with their places; what is no row comes as Skipped."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        yield from _csv(path)
    elif suffix == ".json":
        value = read_json(path)
        for number, row in enumerate(value if isinstance(value, list) else [], 1):
            where = f"{path.name}[{number}]"
            yield where, row if isinstance(row, dict) else Skipped(where, "not a JSON object")
    elif suffix == ".jsonl":
        yield from _json_lines(path)
    elif suffix == ".parquet":
        yield from _parquet(path)


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream)
            for row in reader:
                yield f"{path.name}:{reader.line_num}", {key: value for key, value in row.items() if key is not None and value}
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a table in UTF-8, found {error}. Save the file as UTF-8.") from error


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | Skipped]]:
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{path.name}:{number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                row = Skipped(where, f"not a JSON object ({error})")
            yield where, row if isinstance(row, dict | Skipped) else Skipped(where, "not a JSON object")


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from pyarrow import parquet  # optional: only sets in this format need it
    except ImportError as error:
        raise DataError(
            f"{path}: expected a table that can be read here, found Parquet, which needs pyarrow. `pip install pyarrow`, or "
            "export the table as JSONL."
        ) from error
    number = 0
    for batch in parquet.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            number += 1
            yield f"{path.name}[{number}]", row


def first_row(path: Path) -> dict[str, Any]:
    """The first usable row of a table, for recognising a layout; {} when there is none."""
    try:
        return next((row for _, row in rows(path) if isinstance(row, dict)), {})
    except (DataError, OSError, ValueError):
        return {}


def as_list(value: Any) -> list[Any]:
    """A list, a list written as JSON in a table cell, or one value -> list; nothing -> []."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            return [value]
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def find_all(names: Iterable[Any], *folders: Path) -> tuple[list[Path], list[str]]:
    """(the files that were found, the names that were not)."""
    found, absent = [], []
    for name in names:
        path = resolve(name, *folders)
        if path is None:
            absent.append(str(name))
        else:
            found.append(path)
    return found, absent


def number_keys(row: Mapping[str, Any], name: str) -> list[Any]:
    """The values of `name`, else of name_0, name_1, ... by number."""
    if row.get(name):
        return as_list(row[name])
    found = [(int(match[1]), value) for key, value in row.items() if (match := re.fullmatch(name + r"_(\d+)", key)) and value]
    return [value for _, value in sorted(found, key=lambda entry: entry[0])]
