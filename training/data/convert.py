"""Bring data that people have into records: `convert("musubi", folder, out)`. Pictures stay where they are unless copied."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...reasonedit_core.errors import ConfigError, DataError
from ...reasonedit_core.files import write_whole
from .converters import folders, tables
from .converters.common import Found, Skipped, Source
from .pictures import PictureFault, upright_size
from .problems import Place, nearest
from .records import FILE_NAME, REFERENCES, SCHEMA, guess_language
from .rules import check_record


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout: how it is recognised (why, or None) and how it is read."""

    recognise: Callable[[Source], str | None]
    read: Callable[[Source], Iterator[Found | Skipped]]
    what: str


LAYOUTS: dict[str, Layout] = {
    "magicbrush": Layout(tables.recognise_magicbrush, tables.read_magicbrush, "edit_sessions.json and images/ID/"),
    "imgedit": Layout(tables.recognise_imgedit, tables.read_imgedit, "rows with input_images, output_images and prompt"),
    "kohya": Layout(tables.recognise_kohya, tables.read_kohya, "JSON: target name -> caption and ref_image_path (Step1X-Edit)"),
    "diffsynth": Layout(tables.recognise_diffsynth, tables.read_diffsynth, "CSV or JSON with image, prompt, edit_image"),
    "ai-toolkit": Layout(folders.recognise_aitoolkit, folders.read_aitoolkit, "YAML, or a folder and several control folders"),
    "musubi": Layout(folders.recognise_musubi, folders.read_musubi, "TOML, JSONL with control_path, or one control folder"),
}
"""By name, the most telling first: `auto` takes the first that recognises the folder."""

AUTO = "auto"
_UNFIT = re.compile(r"[^\w.-]+")  # what no id is made of


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a conversion. why: how the layout was recognised; skipped: what could not be used, with the reason."""

    layout: str
    why: str
    path: Path
    written: int
    kinds: dict[str, int]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()

    def lines(self, most: int = 20) -> list[str]:
        """The report as text: what was not used by reason, with the first places of each."""
        kinds = ", ".join(f"{kind} {count}" for kind, count in self.kinds.items())
        out = [f"layout {self.layout}: {self.why}", f"{self.path}: {self.written} records ({kinds})", *self.notes]
        if self.skipped:
            out.append(f"not used: {len(self.skipped)}")
            out += [f"  {each.where}: {each.reason}" for each in self.skipped[:most]]
        if len(self.skipped) > most:
            out.append(f"  ... and {len(self.skipped) - most} more")
        return out


def convert(
    layout: str,
    folder: str | Path,
    out: str | Path,
    *,
    images: str | None = None,
    controls: Sequence[str] = (),
    copy: bool = False,
    overwrite: bool = False,
    split: str | None = None,
    license: str | None = None,
    origin: str | None = None,
) -> Report:
    """Write the data of `folder` as records to `out` (a folder, or a .jsonl file) and say what could not be used.

    layout: a name of LAYOUTS, or `auto`. folder: the data set, or the config or table in it. images, controls: names of the
    folders of target pictures and of pictures that go in, where they have unusual names. copy: pictures are copied to
    images/ beside the records, else the records point to where they are. split: for all records, over what the data say.
    license, origin: noted in every record. Pairs become `edit`, pictures without an input `t2i`; a set with several turns
    gives a record a turn.

    Raises DataError when the layout is not recognised or nothing can be used, ConfigError for a name that is no layout and
    for a record file that is already there and may not be overwritten.
    """
    source = _source(Path(folder), images, tuple(controls))
    layout, why = _choose(layout, source)
    path = Path(out) if Path(out).suffix.lower() == ".jsonl" else Path(out) / FILE_NAME
    if path.exists() and not overwrite:
        raise ConfigError(f"{path}: expected no file yet, found one. Choose another folder, or allow overwriting.")
    name = source.folder.resolve().name
    writer = _Writer(path, layout, copy, split, license, origin or f"{layout}:{name}", name)
    skipped = writer.write_all(LAYOUTS[layout].read(source))
    if not writer.lines:
        reasons = "; ".join(f"{each.where}: {each.reason}" for each in skipped[:3]) or "nothing of this layout in it"
        raise DataError(f"{folder}: expected data of layout {layout}, found none that can be used ({reasons}).")
    write_whole(path, ("\n".join(writer.lines) + "\n").encode())
    notes = ()
    if writer.uneven:
        ids = ", ".join(writer.uneven[:3])
        notes = (f"{len(writer.uneven)} pairs have pictures of different shapes ({ids}): `check` will name each.",)
    return Report(layout, why, path, len(writer.lines), dict(writer.kinds), tuple(skipped), notes)


def recognise(folder: str | Path, *, images: str | None = None, controls: Sequence[str] = ()) -> tuple[str, str]:
    """(layout, why) of a folder or table. DataError when it is none of LAYOUTS."""
    return _choose(AUTO, _source(Path(folder), images, tuple(controls)))


def _source(path: Path, images: str | None, controls: tuple[str, ...]) -> Source:
    if path.is_file():
        return Source(path.parent, path, images, controls)
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder of data or a table, found nothing. Check the path.")
    return Source(path, None, images, controls)


def _choose(layout: str, source: Source) -> tuple[str, str]:
    if layout != AUTO:
        if layout not in LAYOUTS:
            close = nearest(layout, [*LAYOUTS, AUTO])
            hint = f" Did you mean {close}?" if close else ""
            raise ConfigError(f"layout: expected one of {', '.join([*LAYOUTS, AUTO])}, found {layout!r}.{hint}")
        return layout, LAYOUTS[layout].recognise(source) or "as asked for"
    for name, entry in LAYOUTS.items():
        why = entry.recognise(source)
        if why:
            return name, why
    known = "; ".join(f"{name}: {entry.what}" for name, entry in LAYOUTS.items())
    raise DataError(
        f"{source.file or source.folder}: expected a known layout, found none. Looked for {known}. "
        "Name the layout, or the folders of target pictures (images) and of pictures that go in (controls)."
    )


@dataclass(slots=True)
class _Writer:
    """Turns what a layout names into lines. name: the set's, for ids; uneven: ids of pairs whose shapes differ."""

    path: Path
    layout: str
    copy: bool
    split: str | None
    license: str | None
    origin: str
    name: str
    lines: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    uneven: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)

    def write_all(self, items: Iterable[Found | Skipped]) -> list[Skipped]:
        """Add a line for each item that can be used; the others are returned."""
        skipped = []
        for item in items:
            reason = item if isinstance(item, Skipped) else self._write(item)
            if reason is not None:
                skipped.append(reason)
        return skipped

    def _write(self, item: Found) -> Skipped | None:
        if len(item.inputs) > 1 + len(REFERENCES):
            return Skipped(item.where, f"{len(item.inputs)} pictures go in; a record holds {1 + len(REFERENCES)}")
        name = self._id(item.key)
        try:
            files = {key: self._picture(path, name, key) for key, path in _pictures(item).items()}
        except PictureFault as fault:
            return Skipped(item.where, f"{fault.found}: {fault.fix}")
        kind = "edit" if item.inputs else "t2i"
        mask = files.pop("mask", None)
        value: dict[str, Any] = {"schema": SCHEMA, "id": name, "kind": kind, "images": files, "weight": item.weight}
        if item.inputs:
            value["instruction"] = {"raw": item.text, "lang": guess_language(item.text)}
            if item.category:
                value["instruction"]["category"] = item.category
        else:
            value["caption"] = item.text
        if mask:
            value["edit"] = {"mask": mask}
        value |= {"split": self.split or item.split or "train", "source": self.origin}
        value["provenance"] = [{"step": "convert", "note": item.where}]
        if self.license:
            value["license"] = self.license
        record, problems = check_record(value, Place(str(self.path), len(self.lines) + 1))
        if record is None:
            faults = (f"{each.field}: expected {each.expected}, found {each.found}" for each in problems)
            return Skipped(item.where, "; ".join(faults))
        self.ids.add(name)
        self.lines.append(record.to_json())
        self.kinds[kind] += 1
        sizes = [files[key]["size"] for key in ("input", "target") if key in files]
        if len(sizes) == 2 and abs(sizes[0][0] * sizes[1][1] / (sizes[0][1] * sizes[1][0]) - 1) > 0.01:
            self.uneven.append(name)
        return None

    def _id(self, key: str) -> str:
        """An id from the layout's own names; the second of a name gets a number."""
        name = f"{self.layout}-{_UNFIT.sub('-', f'{self.name}-{key}').strip('-')}"[:180]
        number, unique = 1, name
        while unique in self.ids:
            number += 1
            unique = f"{name}-{number}"
        return unique

    def _picture(self, path: Path, name: str, key: str) -> dict[str, Any]:
        size = upright_size(path)
        if not self.copy:
            try:
                where = Path(os.path.relpath(path.resolve(), self.path.parent.resolve())).as_posix()
            except ValueError as error:
                fix = "write the records to the drive of the pictures, or copy the pictures."
                raise PictureFault("bad-path", f"{path} on another drive than {self.path}", fix) from error
            return {"path": where, "size": list(size)}
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PictureFault("unreadable-picture", f"{path} ({error})", "check its permissions.") from error
        where = f"images/{name}.{key}{path.suffix.lower()}"
        write_whole(self.path.parent / where, data)
        return {"path": where, "size": list(size), "sha256": hashlib.sha256(data).hexdigest()}


def _pictures(item: Found) -> dict[str, Path]:
    names = ("input", *REFERENCES)
    found = dict(zip(names, item.inputs, strict=False))
    found["target"] = item.target
    if item.mask is not None:
        found["mask"] = item.mask
    return found
