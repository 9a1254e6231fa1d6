"""Drawn records: a small data set of every kind, made of plain shapes, of which everything that is said is true.

For tests and for the recipe that runs on two CPU cores. The same seed gives the same records and the same pixels. What a
record says (description, score, verdict, second instruction) is computed from the scenes that are drawn.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.files import write_whole
from .drawn_kinds import MAKERS, Lot, Maker
from .drawn_scene import Scene, render
from .drawn_words import LANGUAGES
from .problems import Place, nearest, raise_problems
from .records import FILE_NAME, KINDS, SCHEMA, SPLITS
from .rules import check_record

COUNTS = {"think": 24, "reflect": 25, "edit": 24, "t2i": 24, "understand": 12, "hypothetical": 8}
"""Records of each kind when nothing else is asked for; held-out ones included."""

_LEAST_SIDE = 24
_TRIES = 20_000


@dataclass(slots=True)
class _Split:
    """The scenes that belong to one split. taken: all scenes of the other splits, which must not be drawn here."""

    name: str
    taken: frozenset[Scene]
    used: set[Scene] = field(default_factory=set)

    def claim(self, *scenes: Scene) -> bool:
        """Note the scenes as this split's; False, and nothing noted, if one belongs to another."""
        if self.taken.intersection(scenes):
            return False
        self.used.update(scenes)
        return True


def write_drawn(
    folder: str | Path,
    counts: Mapping[str, int] | None = None,
    seed: int = 0,
    size: int | tuple[int, int] = 96,
    *,
    held_out: float = 0.2,
    languages: Sequence[str] = LANGUAGES,
    references: float = 0.0,
) -> Path:
    """Draw records into `folder`: images/*.png and records.jsonl, whose path is returned.

    counts: records per kind (`COUNTS`), of which the part `held_out` (at least one of two or more) is of split held_out; no
    picture is in both splits. size: the side, or (width, height). references: about the part of the edit records
    whose instruction speaks of a second picture. The record file is written last, so where it is, all is there.
    Raises ConfigError for counts, sizes or languages that cannot be drawn.
    """
    counts = COUNTS if counts is None else counts
    size = (size, size) if isinstance(size, int) else tuple(size)
    _check(counts, size, held_out, languages)
    folder = Path(folder)
    lines, drawn = [], {}
    for value in _values(counts, seed, held_out, languages, references):
        images = value["images"]
        for name, scene in images.items():
            if scene not in drawn:
                drawn[scene] = _write_picture(folder, render(scene, size))
            images[name] = drawn[scene]
        record, problems = check_record(value, Place(str(folder / FILE_NAME), len(lines) + 1))
        raise_problems(problems)
        lines.append(record.to_json())
    return write_whole(folder / FILE_NAME, ("\n".join(lines) + "\n").encode())


def _check(counts: Mapping[str, int], size: tuple[int, int], held_out: float, languages: Sequence[str]) -> None:
    for kind, count in counts.items():
        if kind not in KINDS:
            close = nearest(kind, KINDS)
            hint = f"; did you mean {close}?" if close else "."
            raise ConfigError(f"counts: expected kinds among {', '.join(KINDS)}, found {kind!r}{hint}")
        if not isinstance(count, int) or count < 0:
            raise ConfigError(f"counts[{kind!r}]: expected a number of records, found {count!r}.")
    if not any(counts.values()):
        raise ConfigError("counts: expected at least one record, found none. Ask for some.")
    if len(size) != 2 or min(size) < _LEAST_SIDE:
        raise ConfigError(f"size: expected sides of at least {_LEAST_SIDE} pixels, found {size}.")
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out: expected a part from 0 to below 1, found {held_out}.")
    if not languages or not set(languages) <= set(LANGUAGES):
        raise ConfigError(f"languages: expected some of {', '.join(LANGUAGES)}, found {list(languages)}.")


def _write_picture(folder: Path, pixels: Any) -> dict[str, Any]:
    """Named by its content, so that a picture that several records show is one file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    path = f"images/{digest[:16]}.png"
    if not (folder / path).is_file() or (folder / path).read_bytes() != data:
        write_whole(folder / path, data)
    return {"path": path, "sha256": digest, "size": [pixels.shape[1], pixels.shape[0]]}


def _values(
    counts: Mapping[str, int], seed: int, held_out: float, languages: Sequence[str], references: float
) -> Iterator[dict[str, Any]]:
    """The records as JSON values, with scenes in the place of pictures; split after split."""
    taken: frozenset[Scene] = frozenset()
    for name in SPLITS:
        split = _Split(name, taken)
        for kind in KINDS:
            total = counts.get(kind, 0)
            held = min(total - 1, max(1, round(total * held_out))) if held_out and total > 1 else 0
            for index in range(total - held) if name == "train" else range(total - held, total):
                rng = Random(f"{seed}/{name}/{kind}/{index}")
                lot = Lot(index, languages[index % len(languages)], rng.random(), rng.random() < references)
                value = _draw(MAKERS[kind], rng, lot, split)
                yield {
                    "schema": SCHEMA,
                    "id": f"{kind}-{name}-{index:05d}",
                    "kind": kind,
                    **value,
                    "split": name,
                    "provenance": [{"step": "draw", "model": "reasonedit.drawn@1", "seed": seed}],
                    "license": "Apache-2.0",
                    "source": "drawn",
                }
        taken |= split.used


def _draw(maker: Maker, rng: Random, lot: Lot, split: _Split) -> dict[str, Any]:
    """The first draw that suits and shows nothing of another split."""
    for _ in range(_TRIES):
        value = maker(rng, lot)
        if value is not None and split.claim(*value["images"].values()):
            return value
    raise ConfigError(
        f"expected scenes for {split.name} that no other split shows, found none in {_TRIES} draws. Ask for fewer records."
    )
