"""EditWorld's pairs as items of `reasonedit-data reason50k`, which writes their instructions anew and scores them.

Source of the layout: YangLing0818/EditWorld, `tools/` and the README. A data set is train.json (a list of entries) or folders
with an img_txt.json (name -> entry) beside its pictures. The keys of an entry are theirs, misspelt ones too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import DataError

KEYS = {
    "instruction": "instuction",
    "source_caption": "original_caption",
    "target_caption": "target_cation",
    "before": "original_img_path",
    "after": "target_img_path",
}
"""Ours -> theirs; `key_words` is not used, as the annotator names the objects anew."""


@dataclass(frozen=True, slots=True)
class EditWorldPair:
    """One entry. before, after: its pictures; name: where it stands."""

    name: str
    instruction: str
    source_caption: str
    target_caption: str
    before: Path
    after: Path


def read_editworld(path: Path, limit: int | None = None) -> list[EditWorldPair]:
    """The entries of a data set: train.json itself, or a folder with one, or with img_txt.json files below it.

    Entries whose pictures are not there are left out, as their own tool does; DataError where none is left, and for an entry
    without one of KEYS.
    """
    pairs: list[EditWorldPair] = []
    for file in _files(path):
        for name, entry in _entries(file):
            found = _pair(file, f"{_short(file, path)}:{name}", entry)
            if found is not None:
                pairs.append(found)
    if not pairs:
        raise DataError(
            f"{path}: expected EditWorld's train.json, or folders with img_txt.json and its pictures, found no pair whose two "
            "pictures are there. Name the folder that its README calls datasets/editworld."
        )
    return pairs[:limit]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return [path / "train.json"] if (path / "train.json").is_file() else sorted(path.rglob("img_txt.json"))


def _short(file: Path, path: Path) -> str:
    return file.name if path.is_file() else file.parent.relative_to(path).as_posix()


def _entries(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: expected JSON, found none ({error}). Get the file again.") from error
    pairs = told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ()
    for name, entry in pairs:
        if not isinstance(entry, Mapping):
            raise DataError(f"{file}: {name}: expected an entry with {', '.join(KEYS.values())}, found {str(entry)[:60]!r}.")
        yield str(name), entry


def _pair(file: Path, name: str, entry: Mapping[str, Any]) -> EditWorldPair | None:
    missing = [theirs for theirs in KEYS.values() if not isinstance(entry.get(theirs), str) or not entry[theirs].strip()]
    if missing:
        raise DataError(f"{file}: {name}: expected text under {', '.join(missing)}, found none. Get the file again.")
    told = {ours: entry[theirs].strip() for ours, theirs in KEYS.items()}
    before, after = (_picture(file, told.pop(key)) for key in ("before", "after"))
    return EditWorldPair(name, **told, before=before, after=after) if before and after else None


def _picture(file: Path, name: str) -> Path | None:
    """A picture as an entry names it: from the folder above, from beside its file, or by the end of its path in a folder that
    was moved since."""
    parts = Path(name.replace("\\", "/")).parts
    if ".." in parts:
        return None
    for root in (file.parent, *file.parents):
        for tail in range(len(parts)):
            path = root.joinpath(*parts[tail:]) if not Path(*parts[tail:]).is_absolute() else Path(*parts)
            if path.is_file():
                return path
        if root.name == "datasets":
            break
    return None
