"""A history in a PNG file: its words, its pictures and latents; and back. How they lie in the file: the core's `tracefile`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..reasonedit_core.errors import ConfigError
from ..reasonedit_core.tracefile import CHUNK, KEY, damaged, pack, unpack, unpacked
from ..reasonedit_core.types import Decision, Edited, Reflection, Scores
from .sockets import History, HistoryRound, Verdict

__all__ = ["CHUNK", "KEY", "VERSION", "decode", "encode", "from_record", "to_record"]

VERSION = 1


def encode(picture: Image.Image, history: History, texts: Mapping[str, str]) -> bytes:
    """The bytes of a PNG with `history` in it. texts: further text entries (prompt, workflow)."""
    return pack(picture, *to_record(history), texts)


def decode(path: Path) -> History:
    """The history in a PNG file. DataError where there is none, or where it is damaged."""
    record, tensors = unpack(path)
    try:
        return from_record(record, tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise damaged(path, error) from error


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
    source = unpacked(tensors["source"])
    history = []
    for n, entry in enumerate(record["rounds"]):
        image = unpacked(tensors[f"{n}.image"])
        generated = unpacked(tensors[f"{n}.generated"]) if f"{n}.generated" in tensors else image
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
    return small.contiguous() if torch.equal(unpacked(small), picture) else picture.clone(memory_format=torch.contiguous_format)
