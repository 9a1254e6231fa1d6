"""Reads the benchmarks as their authors hand them out, and writes a manifest with the pictures beside it.

Each reader yields `Found`: an item, and the bytes of the pictures that it names. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import ConfigError, DataError
from ....reasonedit_core.files import write_many
from ...data.records import FILE_NAME as RECORDS
from ...data.records import read_records
from .items import COUNTS, Item, count_remarks, write_manifest

AT_ONCE = 64
"""Pictures that are flushed together."""


@dataclass(frozen=True, slots=True)
class Found:
    """An item whose sources, and refs of PICTURES, are still those of the official layout: (name, bytes)."""

    item: Item
    sources: tuple[tuple[str, bytes], ...]
    pictures: Mapping[str, tuple[str, bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was written. remarks: what is not as published."""

    manifest: Path
    items: int
    remarks: list[str]


def prepare(bench: str, source: Path, out: Path, images: Path | None = None) -> Prepared:
    """Write `out`/manifest.jsonl and the pictures. images: where they lie, if not where the official layout has them.

    Raises ConfigError where the layout is not found, DataError for an entry without what it must have.
    """
    if not source.exists():
        raise ConfigError(f"--src: expected the files of {bench}, found nothing at {source}. Correct the path.")
    items, waiting = [], {}
    for found in READERS[bench](source, images):
        if not found.item.instruction.strip() or not found.sources:
            raise DataError(
                f"{source}: {found.item.id}: expected an instruction and a picture, found none. Get the files again."
            )
        names = [_keep(out, waiting, *each) for each in found.sources]
        refs = {**found.item.refs, **{name: _keep(out, waiting, *each) for name, each in found.pictures.items()}}
        items.append(replace(found.item, sources=tuple(names), refs=refs))
        if len(waiting) >= AT_ONCE:
            write_many(waiting.items())
            waiting.clear()
    write_many(waiting.items())
    if not items:
        raise DataError(f"{source}: expected items of {bench}, found none. Name the folder as the authors hand it out.")
    return Prepared(write_manifest(out, items), len(items), count_remarks(items))


def _keep(out: Path, waiting: dict[Path, bytes], name: str, data: bytes) -> str:
    suffix = Path(name).suffix.lower()
    sha = hashlib.sha256(data).hexdigest()
    told = f"pictures/{sha[:2]}/{sha[:24]}{suffix if suffix in ('.jpg', '.jpeg', '.png', '.webp') else '.png'}"
    if not (out / told).is_file():
        waiting[out / told] = data
    return told


# ---- one reader per layout -----------------------------------------------------------------------------------------------


def _read_gedit(source: Path, images: Path | None) -> Iterator[Found]:
    """Rows of stepfun-ai/GEdit-Bench: its parquet files, or metadata.jsonl beside pictures with the same field names."""
    for row, folder in _gedit_rows(source):
        lang, group, key = (_text(row, name, source) for name in ("instruction_language", "task_type", "key"))
        item = Item(
            "gedit",
            f"{lang}/{group}/{key}",
            group,
            _text(row, "instruction", source),
            (),
            lang,
            flags={"intersection": bool(row.get("Intersection_exist", False))},
        )
        picture = row["input_image"]
        if isinstance(picture, Mapping):  # a picture of a parquet file: its bytes, and a path that may be empty
            yield Found(item, ((picture.get("path") or "a.png", picture["bytes"]),))
        else:
            yield Found(item, (_picture(images or folder, picture, item.id),))


def _gedit_rows(source: Path) -> Iterator[tuple[Mapping[str, Any], Path]]:
    tables = [source] if source.suffix == ".parquet" else sorted(source.rglob("*.parquet"))
    if not tables:
        path = source if source.is_file() else source / "metadata.jsonl"
        yield from ((row, path.parent) for row in _lines(path, "the parquet files of GEdit-Bench or a metadata.jsonl"))
        return
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError(f"{tables[0]}: expected pyarrow to read it with, found none. pip install pyarrow.") from error
    for table in tables:
        for batch in parquet.ParquetFile(table).iter_batches(batch_size=16):
            yield from ((row, source) for row in batch.to_pylist())


def _read_imgedit(source: Path, images: Path | None) -> Iterator[Found]:
    """Basic/basic_edit.json: key -> id (the picture), prompt, edit_type."""
    path = _file(source, "basic_edit.json", "Basic/basic_edit.json")
    told = _json(path)
    roots = (
        [images] if images else [path.parent, path.parent / "images", path.parent.parent, source if source.is_dir() else None]
    )
    for key, row in told.items():
        item = Item("imgedit", key, _text(row, "edit_type", path), _text(row, "prompt", path), ())
        name = _text(row, "id", path)
        root = next((each for each in roots if each and (each / name).is_file()), roots[0])
        yield Found(item, (_picture(root, name, key),))


def _read_kris(source: Path, images: Path | None) -> Iterator[Found]:
    """<category>/annotation.json (id -> ori_img, gt_img, ins_en, explain_en), or one list with id and type as well."""
    flat = source if source.is_file() else source / "final_data.json"
    if flat.is_file():
        rows = [(_text(row, "type", flat), str(row["id"]), row, flat) for row in _json(flat)]
    else:
        paths = [path for path in sorted(source.glob("*/annotation.json")) if path.parent.name in COUNTS["kris"]]
        if not paths:
            raise ConfigError(f"{source}: expected <category>/annotation.json or final_data.json of KRIS, found neither.")
        rows = [(path.parent.name, name, row, path) for path in paths for name, row in _numbered(_json(path))]
    for group, name, row, path in rows:
        item = Item("kris", f"{group}/{name}", group, _text(row, "ins_en", path), (), refs=_texts(row, explain="explain_en"))
        root = images / group if images else path.parent if path.name == "annotation.json" else path.parent / group
        originals = [row["ori_img"]] if isinstance(row["ori_img"], str) else row["ori_img"]
        target = {"gt_img": _picture(root, row["gt_img"], item.id)} if row.get("gt_img") else {}
        yield Found(item, tuple(_picture(root, each, item.id) for each in originals), target)


def _read_rise(source: Path, images: Path | None) -> Iterator[Found]:
    """data/data_total.json of the repository, or a JSON of the full set: index, category, instruction, image, references."""
    path = _file(source, "data_total.json", "data/data_total.json", "datav2_total_w_subtask.json")
    for row in _json(path):
        group = _text(row, "category", path)
        free = row.get("consistency_free")
        # A field may be there and hold NaN, which is no yes (the official script takes it for one).
        flags = {"consistency_free": bool(free) and free == free}
        texts = _texts(row, subtask="subtask", reference="reference", output_text="reference_txt")
        item = Item("rise", _text(row, "index", path), group, _text(row, "instruction", path), (), refs=texts, flags=flags)
        root = images or path.parent
        shown = {"reference_img": _picture(root, row["reference_img"], item.id)} if _given(row.get("reference_img")) else {}
        yield Found(item, (_picture(root, _text(row, "image", path), item.id),), shown)


def _read_reason50k(source: Path, images: Path | None) -> Iterator[Found]:
    """Our own layout, as none was found public: reason50k.jsonl with id, category, instruction, image, and where they are
    known input_text, output_text, target, mask; or what `reasonedit-data reason50k` wrote, whose held-out part is taken."""
    records = source if source.name == RECORDS else source / RECORDS
    if records.is_file():
        yield from _held_out(records)
        return
    path = source if source.is_file() else source / "reason50k.jsonl"
    for row in _lines(path, "reason50k.jsonl"):
        group, root = _text(row, "category", path), images or path.parent
        texts = _texts(row, input_text="input_text", output_text="output_text")
        item = Item("reason50k", _text(row, "id", path), group, _text(row, "instruction", path), (), refs=texts)
        names = {"gt_img": "target", "mask": "mask"}
        shown = {ours: _picture(root, row[theirs], item.id) for ours, theirs in names.items() if row.get(theirs)}
        yield Found(item, (_picture(root, _text(row, "image", path), item.id),), shown)


def _held_out(path: Path) -> Iterator[Found]:
    for record in read_records(path, splits=("held_out",), kinds=("hypothetical",)):
        said = record.reason50k
        texts = {"input_text": said.source_caption, "output_text": said.target_caption}
        refs = {name: text for name, text in texts.items() if text}
        item = Item("reason50k", record.id, said.scenario, said.hypothetical, (), record.lang, refs)
        before, after = (_picture_of(record.picture(name), record.id) for name in ("input", "target"))
        yield Found(item, (before,), {"gt_img": after})


READERS: Mapping[str, Callable[[Path, Path | None], Iterator[Found]]] = {
    "gedit": _read_gedit,
    "imgedit": _read_imgedit,
    "kris": _read_kris,
    "rise": _read_rise,
    "reason50k": _read_reason50k,
}


# ---- files ---------------------------------------------------------------------------------------------------------------


def _file(source: Path, *names: str) -> Path:
    if source.is_file():
        return source
    for name in names:
        if (source / name).is_file():
            return source / name
    raise ConfigError(f"{source}: expected {' or '.join(names)} in it, found none. Name the folder as the authors hand it out.")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: expected JSON, found none ({error}). Get the file again.") from error


def _lines(path: Path, what: str) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"{path}: expected {what}, found nothing. Name the folder or the file.")
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: expected JSON, found {line[:60]!r} ({error}). Correct the line.") from error


def _numbered(told: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if isinstance(told, dict):
        return list(told.items())
    return [(str(row.get("id", number)), row) for number, row in enumerate(told, 1)]


def _given(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(row: Mapping[str, Any], **names: str) -> dict[str, str]:
    return {ours: row[theirs] for ours, theirs in names.items() if _given(row.get(theirs))}


def _text(row: Mapping[str, Any], name: str, path: Path) -> str:
    value = row.get(name)
    if not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{path}: expected {name!r} in every entry, found {value!r} in {str(row)[:120]}. Get the file again.")
    return str(value)


def _picture(folder: Path, name: str, item: str) -> tuple[str, bytes]:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{item}: expected a picture below {folder}, found {name!r}, which leads out of it. Correct the entry.")
    return _picture_of(path, item, name)


def _picture_of(path: Path, item: str, name: str | None = None) -> tuple[str, bytes]:
    try:
        return name or path.name, path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{item}: expected the picture {name or path.name!r} in {path.parent}, found none ({error.strerror}). Name its "
            "folder with --images."
        ) from error
