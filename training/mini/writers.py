"""Items of the drawn world as records, one function a kind: the schema of real data, so the whole recipe runs on them.

Everything a record says is computed from scenes, and true. What a picture shows that an editor really made is read from its
pixels, by the judge.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...reasonedit_core.errors import ConfigError, DataError
from ...reasonedit_core.mini.faults import SPOILERS, Fault, plant, spoil
from ...reasonedit_core.mini.items import Item
from ...reasonedit_core.mini.judge import quality, read
from ...reasonedit_core.mini.kinds import CELLS
from ...reasonedit_core.mini.texts import caption, target_description
from ...reasonedit_core.mini.verdicts import Assessment, assess
from ...reasonedit_core.mini.world import SIZE, Scene, render
from ..data.records import SCHEMA

Entry = dict[str, Any]
"""A record as JSON has it."""

Shown = Scene | np.ndarray
"""A scene, which is drawn, or pixels (H, W, 3), uint8."""


class PictureStore:
    """Puts pictures below a folder, each content once, under a name that follows from it.

    Files are not flushed one by one; whoever needs them to outlive a power cut calls `os.sync` before naming them.
    """

    def __init__(self, folder: Path, size: int = SIZE) -> None:
        self.folder, self.size = Path(folder), size
        self._known: dict[Scene, Entry] = {}
        self._folders: set[Path] = set()

    def put(self, picture: Shown) -> Entry:
        """The picture's entry in a record: path, sha256, size. ConfigError where it cannot be written."""
        if not isinstance(picture, Scene):
            return self._write(picture)
        if picture not in self._known:
            self._known[picture] = self._write(render(picture, self.size))
        return self._known[picture]

    def _write(self, pixels: np.ndarray) -> Entry:
        data = encode_png(pixels)
        sha = hashlib.sha256(data).hexdigest()
        path = f"pictures/{sha[:2]}/{sha[:24]}.png"
        file = self.folder / path
        try:
            if not _has_size(file, len(data)):
                if file.parent not in self._folders:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    self._folders.add(file.parent)
                file.write_bytes(data)  # another process may do the same, with the same bytes
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {error.strerror or error}; choose a folder with room.") from error
        return {"path": path, "sha256": sha, "size": [pixels.shape[1], pixels.shape[0]]}


def _has_size(file: Path, size: int) -> bool:
    try:
        return os.stat(file).st_size == size
    except FileNotFoundError:
        return False


def encode_png(pixels: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> a PNG file. Pillow's encoder takes three times as long for pictures this small."""
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # each row begins with its filter: none
    rows[:, 1:] = pixels.reshape(height, 3 * width)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows.tobytes(), 1)), (b"IEND", b""))
    made = [struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


# ---- the kinds -----------------------------------------------------------------------------------------------------------


def think_record(item: Item, store: PictureStore, name: str) -> Entry:
    """A Thinking Pair: canonical steps of an abstract instruction, a clear one as it stands. With its target also an edit."""
    return {**_head(name, "think"), **_asked(item), "think": thought(item), "images": _pair(item, store)}


def edit_record(item: Item, store: PictureStore, name: str, *, instruction: str | None = None) -> Entry:
    """An editing pair. instruction: other words for the same edit; by default the item's own."""
    record = {**_head(name, "edit"), **_asked(item), "images": _pair(item, store)}
    if instruction is not None and instruction != item.instruction:
        record["edit"] = {"instruction_used": instruction}
    return record


def hypothetical_record(item: Item, store: PictureStore, name: str) -> Entry:
    """A record of Reason50K's kind, of an item whose rule has one of its four categories."""
    if item.category is None:
        raise DataError(f"{name}: expected an item of one of Reason50K's categories, found a clear one. Draw another kind.")
    reason = {
        "scenario": item.category,
        "hypothetical": item.instruction,
        "source_caption": caption(item.source, item.language),
        "target_caption": caption(item.target, item.language),
    }
    return {**_head(name, "hypothetical"), **_asked(item), "images": _pair(item, store), "reason50k": reason}


def reflect_record(item: Item, store: PictureStore, name: str, fault: Fault, *, think: bool = True) -> Entry:
    """A Reflection Triple whose generated picture shows the scene of a planted fault, or of none.

    think: the goal is the thought, as after thinking; else the user's words.
    """
    edit = marks(item.source, item.target, fault.shown)
    return _reflected(item, store, name, fault.shown, fault.assessment, edit, 10.0, think)


def reflect_picture_record(item: Item, store: PictureStore, name: str, pixels: np.ndarray, *, think: bool = True) -> Entry:
    """A Reflection Triple about a picture (H, W, 3), uint8, that an editor made, or that was spoiled: read by the judge."""
    reading = read(pixels)
    lost = [cell for cell in CELLS if not reading.readable[cell]]
    cleanness = quality(reading)
    found = assess(item.source, item.target, reading.scene, item.language, spoiled=lost, cleanness=cleanness)
    edit = marks(item.source, item.target, reading.scene, spoiled=lost)
    return _reflected(item, store, name, pixels, found, edit, cleanness, think)


def t2i_record(scene: Scene, store: PictureStore, name: str, caption: str) -> Entry:
    """A scene to be drawn from its caption."""
    return {**_head(name, "t2i"), "images": {"target": store.put(scene)}, "caption": caption}


def understand_record(scene: Scene | None, store: PictureStore, name: str, turns: Iterable[tuple[str, str]]) -> Entry:
    """A conversation about a scene, or about none: (question, answer) turns."""
    told = [{"question": question, "answer": answer} for question, answer in turns]
    images = {} if scene is None else {"images": {"input": store.put(scene)}}
    return {**_head(name, "understand"), **images, "understand": {"turns": told}}


# ---- what goes wrong -----------------------------------------------------------------------------------------------------


def faulty(item: Item, seed: int, verdict: str) -> Fault | None:
    """A planted fault of `item` with this verdict, or the target itself for a success; None where none is found.

    Of failures with readable pixels: nothing done, and another scene. `spoiled` makes the others.
    """
    if verdict == "success":
        return plant(item, seed, "right")
    if verdict == "failed":
        return plant(item, seed, ("none", "unrelated")[seed % 2])
    if verdict != "reflection":
        raise DataError(f"verdict: expected success, reflection or failed, found {verdict!r}. Correct it.")
    for attempt in range(4):
        fault = plant(item, seed + attempt)
        if fault is not None and fault.assessment.verdict == verdict:
            return fault
    return None


def spoiled(shown: Scene, seed: int, size: int = SIZE) -> np.ndarray:
    """A scene as a picture that went bad, uint8."""
    return spoil(render(shown, size), SPOILERS[seed % len(SPOILERS)], seed)


def marks(source: Scene, target: Scene, shown: Scene, *, spoiled: Collection[int] = ()) -> tuple[float, float]:
    """(success, preservation) of an edit that came out as `shown`, as `judge.judge` gives them to its picture.

    spoiled: cells in which nothing can be made out.
    """
    asked, kept = [], [(4, shown.style == target.style)]
    for cell in CELLS:
        holds = cell not in spoiled and shown.look(cell) == target.look(cell)
        (kept if source.look(cell) == target.look(cell) else asked).append((4, holds))
    ground = (8, shown.background == target.background)
    (kept if source.background == target.background else asked).append(ground)
    success = 10 * sum(holds for _, holds in asked) / len(asked)
    return success, max(0.0, 10.0 - sum(weight for weight, holds in kept if not holds))


# ---- shared parts --------------------------------------------------------------------------------------------------------


def thought(item: Item) -> dict[str, Any]:
    """The `think` of a record: single steps, and what they say together."""
    return {"steps": [item.instruction] if item.clear else list(item.steps), "text": item.concrete}


def _head(name: str, kind: str) -> Entry:
    return {"schema": SCHEMA, "id": name, "kind": kind, "source": "miniature world"}


def _asked(item: Item) -> Entry:
    category = item.knowledge if item.knowledge else "compound" if len(item.edits) > 1 else item.edit_kinds[0]
    clarity = "clear" if item.clear else "abstract"
    return {"instruction": {"raw": item.instruction, "class": clarity, "lang": item.language, "category": category}}


def _pair(item: Item, store: PictureStore) -> Entry:
    return {"input": store.put(item.source), "target": store.put(item.target)}


def _reflected(
    item: Item,
    store: PictureStore,
    name: str,
    shown: Shown,
    found: Assessment,
    edit: Sequence[float],
    cleanness: float,
    think: bool,
) -> Entry:
    clean = round(cleanness, 1)
    reflect = {
        "target_description": target_description(item.source, item.target, item.language),
        "scores": {"consistency": found.score, "edit": [round(mark, 1) for mark in edit], "quality": [clean, clean]},
        "findings": {**found.findings, "reason": found.scorer},
        "reason": found.reason,
        "verdict": found.verdict,
        **({"second_instruction": found.instruction} if found.instruction else {}),
    }
    thoughts = {"think": thought(item)} if think else {}
    images = {**_pair(item, store), "generated": store.put(shown)}
    return {**_head(name, "reflect"), **_asked(item), **thoughts, "images": images, "reflect": reflect}
