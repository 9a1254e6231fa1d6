"""Edited pictures in a run's folder, named as each benchmark's own scripts look for them; taking in somebody else's pictures,
and handing ours out."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ....reasonedit_core.errors import ConfigError, DataError
from ....reasonedit_core.files import write_whole
from ...data.label.annotators import Shown, shown
from ...data.pictures import PictureFault
from .items import Item, Manifest
from .pixels import read_picture

OUTPUTS = "outputs"
"""Folder of a run with the pictures in the official layout."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def official_name(item: Item) -> str:
    """Path of the edited picture in the official result layout, without its suffix, with slashes.

    GEdit: fullset/<task_type>/<lang>/<key>; ImgEdit: <key>; KRIS: <category>/<id>; RISE: images/<category>/<index>;
    Reason50K (ours): <category>/<id>.
    """
    last = item.id.rpartition("/")[2]
    name = {
        "gedit": f"fullset/{item.group}/{item.lang}/{last}",
        "imgedit": item.id,
        "kris": f"{item.group}/{last}",
        "rise": f"images/{item.group}/{item.id}",
        "reason50k": f"{item.group}/{item.id}",
    }[item.bench]
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or "\0" in name:
        raise DataError(f"{item.id}: expected an id that names a file, found one that leads elsewhere. Correct the manifest.")
    return name


def find_output(folder: Path, item: Item) -> Path | None:
    """The edited picture of an item in a folder of the official layout, None where there is none."""
    base = folder / official_name(item)
    return next((path for suffix in SUFFIXES if (path := base.with_name(base.name + suffix)).is_file()), None)


def keep_output(run: Path, item: Item, png: bytes) -> Path:
    """Store an edited picture of a run."""
    name = official_name(item)
    return write_whole(run / OUTPUTS / f"{name}.png", png)


@dataclass(frozen=True, slots=True)
class Taken:
    """What of a manifest was found: pictures and the ids of items without one."""

    found: Mapping[str, Path]
    missing: tuple[str, ...]


def find_all(folder: Path, items: Sequence[Item]) -> Taken:
    """Which items have a picture. ConfigError where none has: then the folder is another layout's."""
    found = {item.id: path for item in items if (path := find_output(folder, item)) is not None}
    if not found:
        example = f"{official_name(items[0])}.png"
        raise ConfigError(
            f"{folder}: expected pictures in the layout of {items[0].bench}, such as {example}, found none of {len(items)}. "
            "Name the folder that holds them."
        )
    return Taken(found, tuple(item.id for item in items if item.id not in found))


def export_official(manifest: Manifest, run: Path, out: Path) -> Taken:
    """Write a run's pictures to `out` for the official scripts, as PNG, which they look for. GEdit: the source lies beside
    each, without which its script passes an item over in silence. One that cannot be decoded is missing."""
    taken = find_all(run / OUTPUTS, manifest.items)
    found = {}
    for item in manifest.items:
        if item.id not in taken.found:
            continue
        path = out / official_name(item)
        try:
            data = as_png(taken.found[item.id])
            source = as_png(manifest.sources(item)[0]) if item.bench == "gedit" else None
        except DataError:
            continue
        found[item.id] = write_whole(path.with_name(f"{path.name}.png"), data)
        if source is not None:
            write_whole(path.with_name(f"{path.name}_SRCIMG.png"), source)
    return Taken(found, tuple(item.id for item in manifest.items if item.id not in found))


def seen(path: Path) -> Shown:
    """A picture file with its hash and size. DataError where it is none."""
    try:
        return shown(path)
    except PictureFault as fault:
        raise DataError(f"{path}: expected a picture, found {fault.found}. {fault.fix.capitalize()}") from fault


def damage(path: Path) -> str | None:
    """Why a file is no picture that can be decoded to its end; None for one that can."""
    try:
        seen(path)
        read_picture(path)
    except DataError as error:
        return str(error)
    return None


def damaged_outputs(run: Path, items: Sequence[Item]) -> dict[str, str]:
    """item -> why its picture in the run is none. Every picture is decoded."""
    paths = {item.id: path for item in items if (path := find_output(run / OUTPUTS, item)) is not None}
    return {name: why for name, path in paths.items() if (why := damage(path)) is not None}


def as_png(path: Path) -> bytes:
    """A picture file as PNG, upright. DataError for one that cannot be decoded to its end."""
    from PIL import Image, ImageOps

    if (why := damage(path)) is not None:
        raise DataError(why)
    with Image.open(path) as image:
        if image.format == "PNG":
            return path.read_bytes()
        buffer = io.BytesIO()
        ImageOps.exif_transpose(image).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()
