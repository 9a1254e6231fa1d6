"""A history in a PNG file: its words as a text entry, its pictures and latents in a chunk of our own; and back.

    iTXt `reasonedit`   JSON, readable by anyone: goal, instructions, verdicts, scores
    reTr                zlib of a safetensors file: source, pictures, latents, so that a run can be continued bit for bit

`reTr` is an ancillary private chunk: other readers skip it. It is no text entry, as Pillow refuses large ones.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load, save

from ..reasonedit_core.errors import ConfigError, DataError
from ..reasonedit_core.types import Decision, Edited, Reflection, Scores
from .sockets import History, HistoryRound, Verdict

VERSION = 1
KEY = "reasonedit"
CHUNK = b"reTr"
LARGEST = 2 << 30
"""Bytes of pictures and latents that a file may unpack to."""


def encode(picture: Image.Image, history: History, texts: Mapping[str, str]) -> bytes:
    """The bytes of a PNG with `history` in it. texts: further text entries (prompt, workflow)."""
    record, tensors = to_record(history)
    info = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        info.add_text(key, value)
    info.add_itxt(KEY, json.dumps(record, ensure_ascii=False, allow_nan=False))
    info.add(CHUNK, zlib.compress(save(tensors), 3))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info, compress_level=4)
    return buffer.getvalue()


def decode(path: Path) -> History:
    """The history in a PNG file. DataError where there is none, or where it is damaged."""
    try:
        with Image.open(path) as image:
            image.load()
            text = getattr(image, "text", {}).get(KEY)
            packed = next((chunk[1] for chunk in getattr(image, "private_chunks", ()) if chunk[0] == CHUNK), None)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: expected a PNG file, found: {error}. Choose another file.") from error
    if text is None or packed is None:
        raise DataError(
            f"{path}: expected a picture saved by Save Trace, found one without a trace. Choose the file that Save Trace "
            "wrote; programs that save a picture anew drop what is in it."
        )
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(packed, LARGEST)
        if unpacker.unconsumed_tail:
            raise ValueError(f"more than {LARGEST} bytes")
        return from_record(json.loads(text), load(raw))
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error, RuntimeError) as error:
        raise DataError(f"{path}: expected a whole trace, found a damaged one ({error!r}). Save it again.") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise DataError(f"{path}: expected a whole trace, found a damaged one ({error}). Save it again.") from error


def to_record(history: History) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(words, tensors) of a history that holds at least one round."""
    if not history:
        raise ConfigError("history: expected at least one round, found none. Wire it from a Loop Close node.")
    tensors = {"source": _small(history[-1].verdict.source)}
    rounds = []
    for n, made in enumerate(history):
        tensors[f"{n}.image"] = _small(made.edited.image)
        if made.edited.generated is not made.edited.image:
            tensors[f"{n}.generated"] = _small(made.edited.generated)
        if made.edited.latents is not None:
            tensors[f"{n}.latents"] = made.edited.latents.detach().cpu().clone()
        verdict = made.verdict
        rounds.append(
            {
                "instruction": made.instruction,
                "input_index": made.input_index,
                "rethink": made.rethink,
                "goal": verdict.goal,
                "original": verdict.original,
                "target": verdict.target,
                "seconds": verdict.seconds,
                "reflection": None if verdict.reflection is None else _told(verdict.reflection),
                "problem": verdict.problem,
            }
        )
    return {"version": VERSION, "rounds": rounds}, tensors


def from_record(record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> History:
    """The history of `to_record`'s two parts."""
    if record["version"] > VERSION:
        raise ValueError(f"version {record['version']} of a newer pack; update this one")
    source = _large(tensors["source"])
    history = []
    for n, entry in enumerate(record["rounds"]):
        image = _large(tensors[f"{n}.image"])
        generated = _large(tensors[f"{n}.generated"]) if f"{n}.generated" in tensors else image
        verdict = Verdict(
            None if entry["reflection"] is None else _reflection(entry["reflection"]),
            entry["goal"],
            entry["original"],
            entry["target"],
            source,
            entry["seconds"],
            entry["problem"],
        )
        edited = Edited(image, generated, tensors.get(f"{n}.latents"))
        history.append(HistoryRound(entry["instruction"], entry["input_index"], edited, verdict, entry["rethink"]))
    return tuple(history)


def _told(reflection: Reflection) -> dict[str, Any]:
    """`asked` is written only where it says something, so that older versions of this pack read the other files."""
    entry = asdict(reflection)
    if reflection.scores.asked:
        del entry["scores"]["asked"]
    return entry


def _reflection(entry: Mapping[str, Any]) -> Reflection:
    scores = dict(entry["scores"])
    for name in ("edit", "quality"):
        scores[name] = None if scores[name] is None else tuple(scores[name])
    return Reflection(Decision(entry["decision"]), entry["reason"], entry["instruction"], Scores(**scores), entry["raw"])


def _small(picture: torch.Tensor) -> torch.Tensor:
    """A picture in 8 bits where that loses nothing, which is so for all that was ever an 8-bit file."""
    picture = picture.detach().cpu()
    small = (picture * 255).round().clamp(0, 255).to(torch.uint8)
    return small.contiguous() if torch.equal(_large(small), picture) else picture.clone(memory_format=torch.contiguous_format)


def _large(stored: torch.Tensor) -> torch.Tensor:
    return stored.to(torch.float32) / 255 if stored.dtype == torch.uint8 else stored
