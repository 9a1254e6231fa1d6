"""What pictures and words differ by in the eyes of CLIP, DINO and LPIPS: the metrics of Reason50K, MagicBrush and Emu Edit.

Every result says which weights it is by; see `training/eval/encoders.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ....reasonedit_core.files import write_whole
from ...data.label.annotators import shown
from ..encoders import Encoder, PairScorer, Scorer, TextEncoder
from .items import Item, Manifest
from .judge import GROUND_TRUTH, NO_EDIT
from .outputs import OUTPUTS, find_output

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


NAMES = (*("clip_t", "clip_i", "clip_source", "clip_dir", "dino", "dino_source", "lpips", "lpips_source", "aesthetics"),)


def measure_features(manifest: Manifest, run: Path, items: Sequence[Item], scorers: Scorers) -> dict[str, Any]:
    """Means over the run's pictures, each with its n, and the backbones. Kept per item in embeddings.jsonl of the run.

    clip_t: edited and output text; clip_i: edited and target picture; clip_source: edited and source; clip_dir: the direction
    from source to edited against that from input text to output text; dino, dino_source: as clip_i and clip_source; all are
    cosines. lpips, lpips_source: distances to target and source. aesthetics: of the edited picture alone. An item without the
    text or target has none of it. anchors: the same for the source itself and for the target in the place of the edited
    picture, which say what a mean is worth.
    """
    path, known = run / FILE_NAME, {}
    if path.is_file():
        known = {row["key"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    seen = dict(known)

    def means(pictures: Iterable[tuple[Item, Path | None]]) -> dict[str, Any]:
        rows = []
        for item, picture in pictures:
            if picture is None:
                continue
            key = _key(manifest, item, picture, scorers)
            if key not in seen:
                seen[key] = {"key": key, "item": item.id, **features_of(manifest, item, picture, scorers)}
            rows.append(seen[key])
        values = {name: [row[name] for row in rows if row.get(name) is not None] for name in NAMES}
        return {name: {"n": len(each), "mean": sum(each) / len(each)} for name, each in values.items() if each}

    pictured = [(item, find_output(run / OUTPUTS, item)) for item in items]
    told = means(pictured)
    own = [item for item, picture in pictured if picture is not None]
    anchors = {
        NO_EDIT: means((item, manifest.sources(item)[0]) for item in own),
        GROUND_TRUTH: means((item, manifest.picture(item, "gt_img")) for item in own),
    }
    if seen.keys() != known.keys():
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in seen.values()).encode())
    backbones = {kind: {"name": each.name, "sha256": each.sha256} for kind, each in scorers.there.items()}
    return {"backbones": backbones, **told, "anchors": {name: found for name, found in anchors.items() if found}}


def features_of(manifest: Manifest, item: Item, edited: Path, scorers: Scorers) -> dict[str, float | None]:
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
    return told


def _key(manifest: Manifest, item: Item, edited: Path, scorers: Scorers) -> str:
    target = manifest.picture(item, "gt_img")
    pictures = [shown(path).sha256 for path in (edited, manifest.sources(item)[0], *([target] if target else []))]
    texts = [item.refs.get("input_text"), item.refs.get("output_text")]
    told = [pictures, texts, {kind: [each.name, each.sha256] for kind, each in scorers.there.items()}]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    """None where one of them has no direction: an untouched picture has not moved anywhere."""
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return None if length < 1e-9 else float(a @ b) / length
