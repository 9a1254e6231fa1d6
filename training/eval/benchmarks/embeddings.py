"""What pictures and words differ by in the eyes of CLIP, DINO and LPIPS: the metrics of Reason50K, MagicBrush and Emu Edit.

Every result says which weights it is by; see `training/eval/encoders.py`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from ....reasonedit_core.errors import DataError
from ....reasonedit_core.files import write_whole
from ..encoders import Encoder, PairScorer, Scorer, TextEncoder
from .aggregate import mean_of
from .items import Item, Manifest
from .judge import GROUND_TRUTH, NO_EDIT
from .outputs import OUTPUTS, damage, find_output, seen
from .pixels import read_mask, read_picture

FILE_NAME = "embeddings.jsonl"


@dataclass(frozen=True, slots=True)
class Scorers:
    """The networks and functions that are at hand; what is None is not measured."""

    clip: TextEncoder | None = None
    dino: Encoder | None = None
    lpips: PairScorer | None = None
    aesthetics: Scorer | None = None

    @property
    def there(self) -> dict[str, Any]:
        """Those that are, by their kind."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        return {kind: each for kind, each in found.items() if each is not None}


COSINE = (-1.0, 1.0)

METRICS: Mapping[str, tuple[tuple[str, ...], tuple[float | None, float | None]]] = {
    "clip_t": (("output_text",), COSINE),
    "clip_i": (("gt_img",), COSINE),
    "clip_source": ((), COSINE),
    "clip_dir": (("input_text", "output_text"), COSINE),
    "dino": (("gt_img",), COSINE),
    "dino_source": ((), COSINE),
    "lpips": (("gt_img",), (0.0, None)),
    "lpips_source": ((), (0.0, None)),
    "aesthetics": ((), (None, None)),
    "clip_t_inside": (("output_text", "mask"), COSINE),
    "clip_i_inside": (("gt_img", "mask"), COSINE),
    "dino_inside": (("gt_img", "mask"), COSINE),
    "clip_outside": (("mask",), COSINE),
    "dino_outside": (("mask",), COSINE),
    "lpips_outside": (("mask",), (0.0, None)),
}
"""Metric -> (what an item must have for it, the ends of its scale)."""


def measure_features(
    manifest: Manifest, run: Path, items: Sequence[Item], scorers: Scorers, masks: Mapping[str, Path] = MappingProxyType({})
) -> dict[str, Any]:
    """Means over the run's pictures, each with its n_scored/n and bounds, and the backbones. Kept per item in embeddings.jsonl.

    clip_t: edited and output text; clip_i: edited and target picture; clip_source: edited and source; clip_dir: the direction
    from source to edited against that from input text to output text; dino, dino_source: as clip_i and clip_source; all are
    cosines. lpips, lpips_source: distances to target and source. aesthetics: of the edited picture alone. An item without the
    text or target has none of it. masks: item -> mask, white where the edit may change something: *_inside are of the mask's
    bounding box, cut out of edited and target; *_outside hold the source against itself with what changed outside the mask.

    anchors: the same for the source itself and for the target in the place of the edited picture, which say what a mean is
    worth. damaged: item -> why a picture of it cannot be decoded.
    """
    path, known = run / FILE_NAME, {}
    if path.is_file():
        known = {row["key"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    found, damaged = dict(known), {}

    def means(pictures: Iterable[tuple[Item, Path | None]]) -> dict[str, Any]:
        rows, asked = [], []
        for item, picture in pictures:
            asked.append(item)
            if picture is None:
                continue
            mask = masks.get(item.id)
            try:
                key = _key(manifest, item, picture, scorers, mask)
                if key not in found:
                    _check(manifest, item, picture, mask)
            except DataError as error:
                damaged[item.id] = str(error)
                continue
            if key not in found:
                found[key] = {"key": key, "item": item.id, **features_of(manifest, item, picture, scorers, mask)}
            rows.append(found[key])
        told = {}
        for name, (needs, ends) in METRICS.items():
            values = [row.get(name) for row in rows]
            if any(value is not None for value in values):
                told[name] = mean_of(values, sum(_has(item, needs, masks) for item in asked), *ends)
        return told

    pictured = [(item, find_output(run / OUTPUTS, item)) for item in items]
    told = means(pictured)
    own = [item for item, picture in pictured if picture is not None and item.id not in damaged]
    anchors = {
        NO_EDIT: means((item, manifest.sources(item)[0]) for item in own),
        GROUND_TRUTH: means((item, manifest.picture(item, "gt_img")) for item in own if "gt_img" in item.refs),
    }
    if found.keys() != known.keys():
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.values()).encode())
    backbones = {kind: {"name": each.name, "sha256": each.sha256} for kind, each in scorers.there.items()}
    anchors = {name: each for name, each in anchors.items() if each}
    return {"backbones": backbones, **told, "anchors": anchors, "damaged": damaged}


def _has(item: Item, needs: Sequence[str], masks: Mapping[str, Path]) -> bool:
    return all(item.id in masks if need == "mask" else bool(item.refs.get(need)) for need in needs)


def _check(manifest: Manifest, item: Item, edited: Path, mask: Path | None) -> None:
    """DataError for a picture of the item that cannot be decoded to its end; a network's reader would end the whole run."""
    target = manifest.picture(item, "gt_img")
    for path in (edited, manifest.sources(item)[0], *([target] if target else [])):
        if (why := damage(path)) is not None:
            raise DataError(why)
    if mask is not None:
        read_mask(mask, seen(manifest.sources(item)[0]).size)


def features_of(
    manifest: Manifest, item: Item, edited: Path, scorers: Scorers, mask: Path | None = None
) -> dict[str, float | None]:
    """The metrics of one item; see `measure_features`."""
    source, target = manifest.sources(item)[0], manifest.picture(item, "gt_img")
    before, after = item.refs.get("input_text"), item.refs.get("output_text")
    pictures = [edited, source, *([target] if target else [])]
    told: dict[str, float | None] = {}
    if (clip := scorers.clip) is not None:
        seen = clip.pictures(pictures)
        told["clip_source"] = _cosine(seen[0], seen[1])
        told["clip_i"] = _cosine(seen[0], seen[2]) if target else None
        if after:
            words = clip.words([after, *([before] if before else [])])
            told["clip_t"] = _cosine(seen[0], words[0])
            told["clip_dir"] = _cosine(seen[0] - seen[1], words[0] - words[1]) if before else None
    if (dino := scorers.dino) is not None:
        seen = dino.pictures(pictures)
        told["dino_source"] = _cosine(seen[0], seen[1])
        told["dino"] = _cosine(seen[0], seen[2]) if target else None
    if (lpips := scorers.lpips) is not None:
        told["lpips_source"] = lpips.distance(source, edited)
        told["lpips"] = lpips.distance(target, edited) if target else None
    if scorers.aesthetics is not None:
        told["aesthetics"] = scorers.aesthetics.score(edited)
    return told if mask is None else told | _masked(source, edited, target, mask, after, scorers)


def _masked(
    source: Path, edited: Path, target: Path | None, mask: Path, after: str | None, scorers: Scorers
) -> dict[str, float | None]:
    """The metrics inside and outside a mask. Networks take files, so that what is cut out is written to a folder that goes."""
    one = read_picture(source)
    size = (one.shape[1], one.shape[0])
    two, outside = read_picture(edited, size), read_mask(mask, size)
    rows, columns = (np.flatnonzero((~outside).any(axis=axis)) for axis in (1, 0))
    told: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:

        def kept(name: str, picture: np.ndarray) -> Path:
            path = Path(folder) / f"{name}.png"
            Image.fromarray(np.rint(picture * 255).astype(np.uint8)).save(path)
            return path

        changed = kept("outside", np.where(outside[..., None], two, one))
        for name, encoder in (("clip", scorers.clip), ("dino", scorers.dino)):
            if encoder is not None:
                told[f"{name}_outside"] = _cosine(*encoder.pictures([source, changed]))
        if scorers.lpips is not None:
            told["lpips_outside"] = scorers.lpips.distance(source, changed)
        if not len(rows):
            return told
        box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        inside = kept("inside", two[box])
        if scorers.clip is not None and after:
            told["clip_t_inside"] = _cosine(scorers.clip.pictures([inside])[0], scorers.clip.words([after])[0])
        if target is not None:
            end = kept("target", read_picture(target, size)[box])
            for name, encoder in (("clip_i", scorers.clip), ("dino", scorers.dino)):
                if encoder is not None:
                    told[f"{name}_inside"] = _cosine(*encoder.pictures([inside, end]))
    return told


def _key(manifest: Manifest, item: Item, edited: Path, scorers: Scorers, mask: Path | None = None) -> str:
    target = manifest.picture(item, "gt_img")
    pictures = [seen(path).sha256 for path in (edited, manifest.sources(item)[0], *([target] if target else []))]
    pictures += [] if mask is None else ["mask", seen(mask).sha256]
    texts = [item.refs.get("input_text"), item.refs.get("output_text")]
    told = [pictures, texts, {kind: [each.name, each.sha256] for kind, each in scorers.there.items()}]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    """None where one of them has no direction: an untouched picture has not moved anywhere."""
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return None if length < 1e-9 else float(a @ b) / length
