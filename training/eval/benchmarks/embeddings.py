"""What pictures and words differ by in the eyes of CLIP and DINO: the metrics of Reason50K, MagicBrush and Emu Edit.

Backbones are transformers folders that the user names; nothing is downloaded, and every result says which weights it is by
(two CLIPs give two different scales). Features are rows of unit length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ....reasonedit_core.errors import CheckpointError
from ....reasonedit_core.files import write_whole
from ...data.label.annotators import shown
from .items import Item, Manifest
from .outputs import OUTPUTS, find_output

FILE_NAME = "embeddings.jsonl"


class Encoder(Protocol):
    """name, sha256: of the folder and its weights, for every result."""

    name: str
    sha256: str

    def pictures(self, paths: Sequence[Path]) -> np.ndarray:
        """(N, D), unit rows."""
        ...


class TextEncoder(Encoder, Protocol):
    """One that reads words as well."""

    def words(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D), unit rows. What is longer than the model reads is cut off at its end."""
        ...


class Clip:
    """A CLIP folder. Raises CheckpointError where it is none."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.name, self.sha256, self._device = folder.resolve().name, digest_of(folder), device
        self._model = _loaded(CLIPModel, folder).to(device).eval()
        self._processor = _loaded(CLIPProcessor, folder)

    def pictures(self, paths: Sequence[Path]) -> np.ndarray:
        """(N, D), unit rows."""
        inputs = self._processor(images=_opened(paths), return_tensors="pt").to(self._device)
        return _unit(self._call(self._model.get_image_features, inputs))

    def words(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D), unit rows."""
        inputs = self._processor(text=list(texts), padding=True, truncation=True, return_tensors="pt").to(self._device)
        return _unit(self._call(self._model.get_text_features, inputs))

    def _call(self, function: Any, inputs: Any) -> np.ndarray:
        import torch

        with torch.inference_mode():
            found = function(**inputs)
        # transformers 4 gives the projected features, 5 an output that holds them
        return (found if isinstance(found, torch.Tensor) else found.pooler_output).float().cpu().numpy()


class Dino:
    """A DINO or DINOv2 folder; the feature is the class token after the last norm. Raises CheckpointError where it is none."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.name, self.sha256, self._device = folder.resolve().name, digest_of(folder), device
        self._model = _loaded(AutoModel, folder).to(device).eval()
        self._processor = _loaded(AutoImageProcessor, folder)

    def pictures(self, paths: Sequence[Path]) -> np.ndarray:
        """(N, D), unit rows."""
        import torch

        inputs = self._processor(images=_opened(paths), return_tensors="pt").to(self._device)
        with torch.inference_mode():
            found = self._model(**inputs).last_hidden_state[:, 0]
        return _unit(found.float().cpu().numpy())


def digest_of(folder: Path) -> str:
    """sha256 over the names and contents of a folder's weights and settings. CheckpointError where it has no weights."""
    weights = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".json", ".bin", ".txt")]
    if not any(path.suffix in (".safetensors", ".bin") for path in weights):
        raise CheckpointError(
            f"{folder}: expected a transformers folder with weights, found none. Name one that lies on this disk."
        )
    digest = hashlib.sha256()
    for path in weights:
        with open(path, "rb") as stream:
            digest.update(f"{path.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def measure_features(
    manifest: Manifest, run: Path, items: Sequence[Item], clip: TextEncoder | None, dino: Encoder | None
) -> dict[str, Any]:
    """Means over the run's pictures, each with its n, and the backbones. Kept per item in embeddings.jsonl of the run.

    clip_t: edited and output text; clip_i: edited and target picture; clip_source: edited and source; clip_dir: the direction
    from source to edited against that from input text to output text; dino, dino_source: as clip_i and clip_source. All are
    cosines; an item without the text or target has none of it.
    """
    path, known = run / FILE_NAME, {}
    if path.is_file():
        known = {row["key"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
    rows, seen = [], dict(known)
    for item in items:
        edited = find_output(run / OUTPUTS, item)
        if edited is None:
            continue
        key = _key(manifest, item, edited, clip, dino)
        if key not in seen:
            seen[key] = {"key": key, "item": item.id, **features_of(manifest, item, edited, clip, dino)}
        rows.append(seen[key])
    if seen.keys() != known.keys():
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in seen.values()).encode())
    names = ("clip_t", "clip_i", "clip_source", "clip_dir", "dino", "dino_source")
    told: dict[str, Any] = {}
    for name in names:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            told[name] = {"n": len(values), "mean": sum(values) / len(values)}
    backbones = {kind: {"name": each.name, "sha256": each.sha256} for kind, each in (("clip", clip), ("dino", dino)) if each}
    return {"backbones": backbones, **told}


def features_of(
    manifest: Manifest, item: Item, edited: Path, clip: TextEncoder | None, dino: Encoder | None
) -> dict[str, float | None]:
    """The metrics of one item; see `measure_features`."""
    source, target = manifest.sources(item)[0], manifest.picture(item, "gt_img")
    before, after = item.refs.get("input_text"), item.refs.get("output_text")
    pictures = [edited, source, *([target] if target else [])]
    told: dict[str, float | None] = {}
    if clip is not None:
        seen = clip.pictures(pictures)
        told["clip_source"] = _cosine(seen[0], seen[1])
        told["clip_i"] = _cosine(seen[0], seen[2]) if target else None
        if after:
            words = clip.words([after, *([before] if before else [])])
            told["clip_t"] = _cosine(seen[0], words[0])
            told["clip_dir"] = _cosine(seen[0] - seen[1], words[0] - words[1]) if before else None
    if dino is not None:
        seen = dino.pictures(pictures)
        told["dino_source"] = _cosine(seen[0], seen[1])
        told["dino"] = _cosine(seen[0], seen[2]) if target else None
    return told


def _key(manifest: Manifest, item: Item, edited: Path, clip: Encoder | None, dino: Encoder | None) -> str:
    target = manifest.picture(item, "gt_img")
    pictures = [shown(path).sha256 for path in (edited, manifest.sources(item)[0], *([target] if target else []))]
    texts = [item.refs.get("input_text"), item.refs.get("output_text")]
    told = [pictures, texts, clip.sha256 if clip else None, dino.sha256 if dino else None]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _cosine(a: np.ndarray, b: np.ndarray) -> float | None:
    """None where one of them has no direction: an untouched picture has not moved anywhere."""
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return None if length < 1e-9 else float(a @ b) / length


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _opened(paths: Sequence[Path]) -> list[Any]:
    from PIL import Image

    from .pixels import read_picture

    return [Image.fromarray(np.rint(read_picture(path) * 255).astype(np.uint8)) for path in paths]


def _loaded(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder}: expected a folder that {kind.__name__} reads, found another ({first}). Name one."
        ) from error
