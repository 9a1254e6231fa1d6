"""How the pictures of a run differ, pixel by pixel, from their sources and from the benchmark's targets; kept in pixels.jsonl.

The same is measured of two anchors, which say what a mean is worth: the source itself in the place of the edited picture
("no-edit"), and the target ("ground-truth").
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ....reasonedit_core.errors import DataError
from ....reasonedit_core.files import write_whole
from ...data.label.annotators import Shown as Picture
from . import pixels
from .aggregate import mean_of
from .items import Item, Manifest
from .judge import GROUND_TRUTH, NO_EDIT
from .outputs import OUTPUTS, find_all, find_output, seen

PIXELS = "pixels.jsonl"
VERSION = 2
"""Of the rows; those of another are measured anew."""

PARTS: Mapping[str, tuple[str, ...]] = {
    "to_source": ("l1", "psnr", "ssim", "shift", "block", "tone"),
    "to_target": ("l1", "psnr", "ssim"),
    "outside": ("l1", "psnr", "ssim", "shift", "mse_256"),
    "inside": ("l1",),
}
"""What is measured: against the source; against the target, where there is one; against the source where the mask is black
(nothing may change), and where it is white."""


@dataclass(slots=True)
class Measured:
    """rows: item -> its row; anchors: anchor -> item -> row; damaged: item -> why there is none; of: part -> number of items
    that it applies to, with and without a picture."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    anchors: dict[str, dict[str, dict[str, Any]]] = field(default_factory=lambda: {NO_EDIT: {}, GROUND_TRUTH: {}})
    damaged: dict[str, str] = field(default_factory=dict)
    of: dict[str, int] = field(default_factory=dict)


def masks_of(manifest: Manifest, items: Sequence[Item], folder: Path | None) -> dict[str, Path]:
    """item -> its mask, in `folder` or else in the benchmark. ConfigError where no item has one in `folder`."""
    own = {item.id: path for item in items if (path := manifest.picture(item, "mask")) is not None}
    return {**own, **(find_all(folder, items).found if folder else {})}


def measure(manifest: Manifest, run: Path, items: Sequence[Item], masks: Path | None = None) -> Measured:
    """Measure what is not in pixels.jsonl, or is of other pictures than are there now. All are brought to the source's size.

    masks: a folder, see `masks_of`. A picture or mask that cannot be used costs its own item only, which is told as damaged.
    """
    path, known = run / PIXELS, _known(run / PIXELS)
    masked = masks_of(manifest, items, masks)
    targets = sum("gt_img" in item.refs for item in items)
    told = Measured(of={"to_source": len(items), "to_target": targets, "outside": len(masked), "inside": len(masked)})
    found: dict[tuple[str, str | None], dict[str, Any]] = {}
    for item in items:
        edited = find_output(run / OUTPUTS, item)
        if edited is None:
            continue
        try:
            for anchor, row in _of_item(manifest, item, edited, masked.get(item.id), known).items():
                found[item.id, anchor] = row
                (told.rows if anchor is None else told.anchors[anchor])[item.id] = row
        except DataError as error:
            told.damaged[item.id] = str(error)
    if {**known, **found} != known:
        lines = [json.dumps(row, ensure_ascii=False) for row in {**known, **found}.values()]
        write_whole(path, "".join(line + "\n" for line in lines).encode())
    return told


def pixel_means(told: Measured) -> dict[str, Any] | None:
    """n: pictures; no_op_rate of them, with its bounds; per part and metric a row of `aggregate.mean_of`, for PSNR with
    `infinite`, the number of equal pictures, which have none; anchors: the same. None without a picture."""
    rows = list(told.rows.values())
    if not rows:
        return None
    still = sum(pixels.no_op(row["to_source"]["block"], row["to_source"]["tone"]) for row in rows)
    own = {"n": len(rows), "no_op_below": [pixels.NO_OP_BLOCK, pixels.NO_OP_TONE], "no_op_rate": still / len(rows)}
    anchors = {}
    for anchor, found in told.anchors.items():
        if found:
            of = {part: sum(part in row for row in told.rows.values()) for part in PARTS}
            anchors[anchor] = _parts(list(found.values()), of)
    return {**own, **_parts(rows, told.of), "anchors": anchors}


def _parts(rows: Sequence[Mapping[str, Any]], of: Mapping[str, int]) -> dict[str, Any]:
    told = {}
    for part, names in PARTS.items():
        own = [row[part] for row in rows if part in row]
        if own:
            told[part] = {name: mean_of([row[name] for row in own], of[part]) for name in names}
            told[part].get("psnr", {})["infinite"] = sum(row.get("psnr", 0) is None for row in own)
    return told


def _known(path: Path) -> dict[tuple[str, str | None], dict[str, Any]]:
    if not path.is_file():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(row["item"], row["anchor"]): row for row in rows if row.get("version") == VERSION}


def _of_item(
    manifest: Manifest, item: Item, edited: Path, mask: Path | None, known: Mapping[tuple[str, str | None], dict[str, Any]]
) -> dict[str | None, dict[str, Any]]:
    """anchor -> row, None for the run's own picture."""
    target = manifest.picture(item, "gt_img")
    source, end = seen(manifest.sources(item)[0]), None if target is None else seen(target)
    where = None if mask is None else seen(mask)
    shown = {None: seen(edited), NO_EDIT: source, **({GROUND_TRUTH: end} if end else {})}
    told = {}
    for anchor, picture in shown.items():
        of = {"source": source.sha256, "edited": picture.sha256}
        of |= {"target": end and end.sha256, "mask": where and where.sha256}
        row = known.get((item.id, anchor))
        if row is None or any(row.get(name) != sha for name, sha in of.items()):
            head = {"item": item.id, "anchor": anchor, "version": VERSION, **of, "size": list(picture.size)}
            row = {**head, **_differences(source, picture, end, where)}
        told[anchor] = row
    return told


def _differences(source: Picture, edited: Picture, target: Picture | None, mask: Picture | None) -> dict[str, Any]:
    one = pixels.read_picture(source.path)
    two = one if edited.sha256 == source.sha256 else pixels.read_picture(edited.path, source.size)
    block, tone = pixels.largest_change(one, two)
    told = {"to_source": {**pixels.compare(one, two), "block": round(block, 6), "tone": round(tone, 6)}}
    if target is not None:
        end = two if target.sha256 == edited.sha256 else pixels.read_picture(target.path, source.size)
        found = pixels.compare(end, two)
        told["to_target"] = {name: found[name] for name in PARTS["to_target"]}
    if mask is not None:
        outside = pixels.read_mask(mask.path, source.size)
        small = pixels.mse_small(one, two, outside)
        told["outside"] = {**pixels.compare(one, two, outside), "mse_256": None if small is None else round(small, 8)}
        if not outside.all():
            told["inside"] = {"l1": round(pixels.l1(one, two, ~outside), 6)}
    return told
