"""Layouts of trainers that read folders: musubi-tuner (control_directory, JSONL, TOML) and ai-toolkit (control_path, YAML).

Both hold the target picture with its caption in one folder and the pictures that go in, under the same name, in others.
musubi numbers several of them (name_0, name_1) in one folder; ai-toolkit has a folder for each.
Sources: kohya-ss/musubi-tuner docs/dataset_config.md; the dataset keys of ostris/ai-toolkit's configurations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import DataError
from .common import (
    Found,
    Skipped,
    Source,
    as_list,
    caption_beside,
    control_folders,
    find_all,
    first_row,
    number_keys,
    numbered,
    pictures_in,
    read_toml,
    resolve,
    rows,
    target_folder,
)

# ---- musubi-tuner --------------------------------------------------------------------------------------------------------


def recognise_musubi(source: Source) -> str | None:
    """Why this is a musubi-tuner set; None when it is not."""
    for path in source.files(".toml"):
        sets = _toml_sets(path)
        if sets:
            return f"{path.name} has [[datasets]] with {' and '.join(key for key in _MUSUBI_KEYS if key in sets[0])}"
    for path in source.files(".jsonl"):
        row = first_row(path)
        if "image_path" in row or "image_path_0" in row:
            return f"{path.name} has rows with image_path"
    if source.file is None:
        controls = control_folders(source)
        target = target_folder(source)
        if len(controls) == 1 and target is not None:
            return f"target pictures in {_name(target, source)}, the pictures that go in in {_name(controls[0], source)}"
        others = [each for each in source.folder.iterdir() if each.is_dir() and each != target and pictures_in(each)]
        if target is not None and not controls and not others:
            captioned = sum(caption_beside(path) is not None for path in pictures_in(target).values())
            return f"{captioned} pictures with captions and no others: text to image" if captioned else None
    return None


_MUSUBI_KEYS = ("image_directory", "image_jsonl_file", "control_directory", "video_directory", "video_jsonl_file")


def read_musubi(source: Source) -> Iterator[Found | Skipped]:
    """The pairs of a musubi-tuner set, from its TOML, else its JSONL, else its folders."""
    configs = [path for path in source.files(".toml") if _toml_sets(path)]
    tables = [path for path in source.files(".jsonl") if {"image_path", "image_path_0"} & set(first_row(path))]
    if configs:
        for path in configs:
            for entry in _toml_sets(path):
                yield from _musubi_set(entry, path)
    elif tables:
        for path in tables:
            yield from _musubi_rows(path, source.folder)
    else:
        target = target_folder(source)
        if target is None:
            raise DataError(f"{source.folder}: expected a folder of target pictures, found none. Name it (images).")
        yield from _same_names(target, control_folders(source), ".txt")


def _toml_sets(path: Path) -> list[dict[str, Any]]:
    try:
        value = read_toml(path)
    except DataError:
        return []
    general = value.get("general")
    sets = value.get("datasets")
    sets = sets if isinstance(sets, list) else []
    merged = [{**(general if isinstance(general, dict) else {}), **entry} for entry in sets if isinstance(entry, dict)]
    return [entry for entry in merged if any(key in entry for key in _MUSUBI_KEYS)]


def _musubi_set(entry: Mapping[str, Any], config: Path) -> Iterator[Found | Skipped]:
    weight = float(entry.get("num_repeats", 1))
    if "image_jsonl_file" in entry:
        table = resolve(entry["image_jsonl_file"], config.parent)
        if table is None:
            yield Skipped(config.name, f"image_jsonl_file {entry['image_jsonl_file']!r} is not there")
            return
        yield from _musubi_rows(table, config.parent, weight)
    elif "image_directory" in entry:
        names = [entry["image_directory"], *as_list(entry.get("control_directory"))]
        folders = [_folder(name, config.parent) for name in names]
        for name, folder in zip(names, folders, strict=True):
            if folder is None:
                yield Skipped(config.name, f"folder {name!r} is not there")
        if None not in folders:
            yield from _same_names(folders[0], folders[1:], str(entry.get("caption_extension", ".txt")), weight)
    else:
        yield Skipped(config.name, "a video data set")


def _musubi_rows(path: Path, folder: Path, weight: float = 1.0) -> Iterator[Found | Skipped]:
    for where, row in rows(path):
        if isinstance(row, Skipped):
            yield row
            continue
        targets, absent = find_all(number_keys(row, "image_path"), path.parent, folder)
        inputs, missing = find_all(number_keys(row, "control_path"), path.parent, folder)
        if absent or missing or len(targets) != 1:
            yield Skipped(where, _absent([*absent, *missing]) if absent or missing else f"{len(targets)} target pictures")
            continue
        text = str(row.get("caption") or "")
        yield Found(f"{path.stem}-{targets[0].stem}", where, targets[0], tuple(inputs), text, weight=weight)


# ---- ai-toolkit ----------------------------------------------------------------------------------------------------------


def recognise_aitoolkit(source: Source) -> str | None:
    """Why this is an ai-toolkit set; None when it is not."""
    for path in source.files(".yaml", ".yml"):
        sets = _yaml_sets(path)
        if sets:
            return f"{path.name} has datasets with folder_path"
    if source.file is None:
        controls = control_folders(source)
        target = target_folder(source)
        if len(controls) > 1 and target is not None:
            names = ", ".join(_name(each, source) for each in controls)
            return f"target pictures in {_name(target, source)}, and several folders of pictures that go in: {names}"
    return None


def read_aitoolkit(source: Source) -> Iterator[Found | Skipped]:
    """The pairs of an ai-toolkit set, from its YAML, else its folders."""
    configs = [path for path in source.files(".yaml", ".yml") if _yaml_sets(path)]
    if not configs:
        target = target_folder(source)
        if target is None:
            raise DataError(f"{source.folder}: expected a folder of target pictures, found none. Name it (images).")
        yield from _same_names(target, control_folders(source), ".txt")
    for path in configs:
        for entry in _yaml_sets(path):
            yield from _aitoolkit_set(entry, path)


def _aitoolkit_set(entry: Mapping[str, Any], config: Path) -> Iterator[Found | Skipped]:
    names = [entry["folder_path"], *number_keys(entry, "control_path")]
    folders = [_folder(name, config.parent) for name in names]
    mask = _folder(entry.get("mask_path"), config.parent)
    for name, folder in zip(names, folders, strict=True):
        if folder is None:
            yield Skipped(config.name, f"folder {name!r} is not there")
    if None in folders:
        return
    weight, extension = float(entry.get("num_repeats", 1)), str(entry.get("caption_ext", "txt"))
    default = entry.get("default_caption") or None
    for each in _same_names(folders[0], folders[1:], extension, weight, default, mask):
        trigger = entry.get("trigger_word")
        if isinstance(each, Found) and isinstance(trigger, str):
            each = replace(each, text=each.text.replace("[trigger]", trigger))
        yield each


def _yaml_sets(path: Path) -> list[dict[str, Any]]:
    """The image sets of an ai-toolkit configuration: config.process[].datasets[], with the process's trigger word."""
    import yaml  # comes with huggingface_hub

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    sets = []
    config = value.get("config") if isinstance(value, dict) else None
    for process in as_list(config.get("process") if isinstance(config, dict) else None):
        if isinstance(process, dict):
            for entry in as_list(process.get("datasets")):
                if isinstance(entry, dict) and "folder_path" in entry:
                    sets.append({"trigger_word": process.get("trigger_word"), **entry})
    return sets


# ---- both ----------------------------------------------------------------------------------------------------------------


def _same_names(
    target: Path,
    controls: Sequence[Path],
    extension: str,
    weight: float = 1.0,
    default: str | None = None,
    masks: Path | None = None,
) -> Iterator[Found | Skipped]:
    """Every target picture with its caption and the pictures of its name in each control folder."""
    indexed = [pictures_in(folder) for folder in controls]
    mask_of = pictures_in(masks) if masks else {}
    used: set[Path] = set()
    for stem, picture in pictures_in(target).items():
        where = f"{target.name}/{picture.name}"
        per_folder = [numbered(index, stem) for index in indexed]
        used.update(path for paths in per_folder for path in paths)
        text = caption_beside(picture, extension)
        lacking = [folder.name for folder, paths in zip(controls, per_folder, strict=True) if not paths]
        if lacking:
            yield Skipped(where, f"no picture named {stem} or {stem}_0 in {', '.join(lacking)}")
        elif text is None and default is None:
            yield Skipped(where, f"no caption {stem}.{extension.lstrip('.')} beside it")
        else:
            inputs = tuple(path for paths in per_folder for path in paths)
            yield Found(f"{target.name}-{stem}", where, picture, inputs, text or default or "", mask_of.get(stem), weight)
    for folder, index in zip(controls, indexed, strict=True):
        for path in index.values():
            if path not in used:
                yield Skipped(f"{folder.name}/{path.name}", f"no target picture of its name in {target.name}")


def _folder(name: Any, base: Path) -> Path | None:
    """A folder that a configuration names; a whole path from another machine is looked for by its ends beside the file."""
    if not isinstance(name, str) or not name.strip():
        return None
    path = Path(name.strip().replace("\\", "/"))
    if (base / path).is_dir():
        return base / path
    parts = [part for part in path.parts if part not in ("/", ".")]
    return next((each for start in range(len(parts)) if (each := base.joinpath(*parts[start:])).is_dir()), None)


def _absent(names: Sequence[str]) -> str:
    return f"picture {', '.join(repr(name) for name in names)} is not there"


def _name(folder: Path, source: Source) -> str:
    return folder.name if folder != source.folder else "the folder itself"
