"""Layouts that are a table of pictures and words: DiffSynth-Studio, Step1X-Edit's fork of kohya's scripts, MagicBrush, ImgEdit.

Sources: DiffSynth-Studio's metadata files (columns image, prompt, edit_image); stepfun-ai/Step1X-Edit
(library/data_configs/step1x_edit.toml and its metadata: target name -> caption, ref_image_path); the released folders of
MagicBrush (edit_sessions.json, and the columns of its table); PKU-YuanGroup/ImgEdit README, "Data Format".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import DataError
from .common import (
    Found,
    Skipped,
    Source,
    as_list,
    find_all,
    first_row,
    read_json,
    read_toml,
    resolve,
    rows,
    target_folder,
    with_suffix,
)

# ---- DiffSynth-Studio ----------------------------------------------------------------------------------------------------

_EDIT_COLUMNS = ("edit_image", "kontext_images", "step1x_reference_image")


def recognise_diffsynth(source: Source) -> str | None:
    """Why this is a DiffSynth-Studio set; None when it is not."""
    found = [path for path in source.files(".csv", ".json", ".jsonl") if {"image", "prompt"} <= set(first_row(path))]
    return f"{found[0].name} has the columns image and prompt" if found else None


def read_diffsynth(source: Source) -> Iterator[Found | Skipped]:
    """The rows of the metadata file. Several such files are a choice that the user has to make."""
    found = [path for path in source.files(".csv", ".json", ".jsonl") if {"image", "prompt"} <= set(first_row(path))]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{source.folder}: expected one metadata file, found {names}. Name the one to convert.")
    for path in found:
        for where, row in rows(path):
            if isinstance(row, Skipped):
                yield row
                continue
            names = next((as_list(row[column]) for column in _EDIT_COLUMNS if row.get(column)), [])
            yield _pair(where, path.stem, row.get("image"), names, row.get("prompt"), path.parent)


# ---- Step1X-Edit's fork of kohya's scripts -------------------------------------------------------------------------------


def recognise_kohya(source: Source) -> str | None:
    """Why this is a Step1X-Edit (kohya) set; None when it is not."""
    for path in source.files(".toml"):
        if _subsets(path):
            return f"{path.name} has [[datasets.subsets]] with metadata_file"
    found = [path for path in source.files(".json") if _is_kohya(path)]
    return f"{found[0].name} names a ref_image_path for each target picture" if found else None


def read_kohya(source: Source) -> Iterator[Found | Skipped]:
    """The pairs of the metadata files, from the TOML that names them, else of the folder."""
    configs = [path for path in source.files(".toml") if _subsets(path)]
    for config in configs:
        for subset in _subsets(config):
            path = resolve(subset["metadata_file"], config.parent)
            if path is None:
                yield Skipped(config.name, f"metadata_file {subset['metadata_file']!r} is not there")
                continue
            folders = [config.parent / str(subset.get("image_dir", "")), path.parent, config.parent]
            yield from _kohya(path, folders, float(subset.get("num_repeats", 1)))
    if configs:
        return
    for path in source.files(".json"):
        if _is_kohya(path):
            target = target_folder(source)
            folders = [*([target] if target else []), path.parent, source.folder]
            yield from _kohya(path, folders, 1.0)


def _subsets(path: Path) -> list[dict[str, Any]]:
    try:
        sets = read_toml(path).get("datasets")
    except DataError:
        return []
    sets = [entry for entry in sets if isinstance(entry, dict)] if isinstance(sets, list) else []
    found = [subset for entry in sets for subset in as_list(entry.get("subsets")) if isinstance(subset, dict)]
    return [subset for subset in found if isinstance(subset.get("metadata_file"), str)]


def _is_kohya(path: Path) -> bool:
    try:
        value = read_json(path)
    except DataError:
        return False
    entries = list(value.values())[:20] if isinstance(value, dict) else []
    return any(isinstance(entry, dict) and "ref_image_path" in entry for entry in entries)


def _kohya(path: Path, folders: list[Path], weight: float) -> Iterator[Found | Skipped]:
    value = read_json(path)
    for name, entry in value.items() if isinstance(value, dict) else ():
        where = f"{path.name}: {name}"
        if not isinstance(entry, dict):
            yield Skipped(where, "not a JSON object")
            continue
        target = with_suffix(name, *folders)
        inputs, absent = find_all(as_list(entry.get("ref_image_path")), *folders)
        if target is None or absent:
            yield Skipped(where, _missing([*absent, *([name] if target is None else [])]))
        elif not inputs:
            yield Skipped(where, "no ref_image_path")
        else:
            text = str(entry.get("caption") or "")
            yield Found(f"{path.stem}-{Path(name).stem}", where, target, tuple(inputs), text, weight=weight)


# ---- MagicBrush ----------------------------------------------------------------------------------------------------------

_HELD_OUT = ("dev", "test", "val", "validation")


def recognise_magicbrush(source: Source) -> str | None:
    """Why this is MagicBrush; None when it is not."""
    if any(_sessions(path) for path in source.files(".json")):
        return "edit_sessions.json holds turns with input, output and instruction"
    found = [path for path in source.files(".csv", ".jsonl", ".json", ".parquet") if _MAGIC_COLUMNS <= set(first_row(path))]
    return f"{found[0].name} has the columns source_img, target_img and instruction" if found else None


_MAGIC_COLUMNS = {"source_img", "target_img", "instruction"}


def read_magicbrush(source: Source) -> Iterator[Found | Skipped]:
    """One pair a turn: each turn's input is the picture the turn before has left."""
    split = "held_out" if source.folder.name.lower() in _HELD_OUT else None
    for path in source.files(".json"):
        for session, turns in (_sessions(path) or {}).items():
            folders = [path.parent / "images" / session, path.parent / "images", path.parent]
            for number, turn in enumerate(turns, 1):
                where = f"{path.name}: {session}, turn {number}"
                if not isinstance(turn, dict):
                    yield Skipped(where, "not a JSON object")
                    continue
                found = _pair(where, "", turn.get("output"), [turn.get("input")], turn.get("instruction"), *folders)
                if isinstance(found, Found):
                    mask = resolve(turn.get("mask"), *folders)
                    found = _named(found, f"{session}-{number}", mask, split)
                yield found
    for path in source.files(".csv", ".jsonl", ".json", ".parquet"):
        if _MAGIC_COLUMNS <= set(first_row(path)):
            yield from _magic_rows(path, split)


def _sessions(path: Path) -> dict[str, list[Any]] | None:
    try:
        value = read_json(path)
    except DataError:
        return None
    if not isinstance(value, dict) or not value:
        return None
    sessions = {key: turns for key, turns in value.items() if isinstance(turns, list)}
    turn = next((turns[0] for turns in sessions.values() if turns), None)
    return sessions if isinstance(turn, dict) and {"input", "output", "instruction"} <= set(turn) else None


def _magic_rows(path: Path, split: str | None) -> Iterator[Found | Skipped]:
    for where, row in rows(path):
        if isinstance(row, Skipped):
            yield row
            continue
        if isinstance(row.get("source_img"), dict):
            yield Skipped(where, "the pictures are inside the table; save them as files first")
            continue
        folders = [path.parent, path.parent / "images", path.parent / "images" / str(row.get("img_id"))]
        found = _pair(where, "", row.get("target_img"), [row.get("source_img")], row.get("instruction"), *folders)
        if isinstance(found, Found):
            key = f"{row.get('img_id', path.stem)}-{row.get('turn_index', where)}"
            found = _named(found, key, resolve(row.get("mask_img"), *folders), split)
        yield found


def _named(found: Found, key: str, mask: Path | None, split: str | None) -> Found:
    return Found(key, found.where, found.target, found.inputs, found.text, mask, split=split)


# ---- ImgEdit -------------------------------------------------------------------------------------------------------------


def recognise_imgedit(source: Source) -> str | None:
    """Why this is ImgEdit or a set of its form; None when it is not."""
    for path in source.files(".json", ".jsonl", ".parquet"):
        row = first_row(path)
        turns = as_list(row.get("data"))
        if {"input_images", "output_images"} <= set(turns[0] if turns and isinstance(turns[0], dict) else row):
            return f"{path.name} has {'turns' if turns else 'rows'} with input_images and output_images"
    return None


def read_imgedit(source: Source) -> Iterator[Found | Skipped]:
    """The rows, and of a row with turns each turn."""
    for path in source.files(".json", ".jsonl", ".parquet"):
        category = re.sub(r"_?part_?\d+$", "", path.stem) or None
        for where, row in rows(path):
            if isinstance(row, Skipped):
                yield row
                continue
            turns = as_list(row.get("data")) or [row]
            for number, turn in enumerate(turns, 1):
                place = where if len(turns) == 1 else f"{where}, turn {number}"
                yield _imgedit_turn(turn, place, path, category, number if len(turns) > 1 else None)


def _imgedit_turn(turn: Any, where: str, path: Path, category: str | None, number: int | None) -> Found | Skipped:
    if not isinstance(turn, Mapping):
        return Skipped(where, "not a JSON object")
    outputs = as_list(turn.get("output_images"))
    if len(outputs) != 1:
        return Skipped(where, f"{len(outputs)} target pictures")
    folders = [path.parent, path.parent.parent]
    found = _pair(where, path.stem, outputs[0], as_list(turn.get("input_images")), turn.get("prompt"), *folders)
    if isinstance(found, Skipped):
        return found
    key = f"{path.stem}-{found.target.parent.name}-{found.target.stem}" + (f"-{number}" if number else "")
    return Found(key, where, found.target, found.inputs, found.text, category=category)


# ---- all -----------------------------------------------------------------------------------------------------------------


def _pair(where: str, prefix: str, target: Any, inputs: list[Any], text: Any, *folders: Path) -> Found | Skipped:
    """A pair from the names in a table, or what of it is not there."""
    path = resolve(target, *folders)
    found, absent = find_all(inputs, *folders)
    if path is None or absent:
        return Skipped(where, _missing([*absent, *([str(target)] if path is None else [])]))
    return Found(f"{prefix}-{path.stem}", where, path, tuple(found), str(text or "").strip())


def _missing(names: list[str]) -> str:
    return f"picture {', '.join(repr(name) for name in names)} is not there"
