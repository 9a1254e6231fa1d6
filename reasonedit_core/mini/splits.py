"""What training may see and what is kept for the test: wordings, combinations of objects, and what a rule is applied to.

Everything is decided by hashes, so nothing has to be stored, and never changes. What is held out is always a new joining of
parts that training has seen apart: a model that starts from nothing cannot know a word or a kind that it never met.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ..errors import DataError
from .dice import digest
from .world import Scene, combination

SPLITS = ("train", "held_out")

HELD_OUT = 0.2
"""Share of wordings, combinations and pairs that is held out."""


def check_split(split: str) -> str:
    """`split`, when it is one. DataError otherwise."""
    if split not in SPLITS:
        raise DataError(f"split: expected {' or '.join(SPLITS)}, found {split!r}. Correct it.")
    return split


def split_of_scene(scene: Scene) -> str:
    """The split that a scene's combination of (kind, colour) belongs to. The scene without objects is for training."""
    pairs = combination(scene)
    held_out = pairs and digest("combination", *(part for pair in pairs for part in pair)) % 1000 < 1000 * HELD_OUT
    return "held_out" if held_out else "train"


def held_out_of(names: Sequence[str], key: str) -> frozenset[str]:
    """The held-out share of `names`, by the order of their hashes: at least one of two or more, never all.

    A name of several parts ("red/small") is held out only while each of its parts is in another name that is kept.
    """
    count = min(len(names) - 1, max(1, round(HELD_OUT * len(names))))
    left = Counter(part for name in names for part in _parts(name))
    held: list[str] = []
    for name in sorted(names, key=lambda name: digest("name", key, name)):
        parts = _parts(name)
        if len(held) < count and all(left[part] > 1 for part in parts):
            held.append(name)
            left.subtract(parts)
    return frozenset(held)


def _parts(name: str) -> list[tuple[int, str]]:
    """The parts of a name with their places; none of a name of one part."""
    parts = name.split("/")
    return list(enumerate(parts)) if len(parts) > 1 else []


def held_out_joinings(rows: int, columns: int, key: str) -> frozenset[tuple[int, int]]:
    """The held-out share of the joinings (row, column), by the order of their hashes.

    Each row and each column keeps at least two joinings for training where it has so many, and a row at least one; the first
    row joined with the first column, the canonical form, is for training too.
    """
    all_ = [(row, column) for row in range(rows) for column in range(columns) if (row, column) != (0, 0)]
    all_.sort(key=lambda at: digest("joining", key, *at))
    held: set[tuple[int, int]] = set()
    in_row, in_column = [columns] * rows, [rows] * columns
    for row, column in all_:
        if len(held) >= round(HELD_OUT * rows * columns):
            break
        if in_row[row] > max(1, min(2, columns - 1)) and in_column[column] > min(2, rows - 1):
            held.add((row, column))
            in_row[row] -= 1
            in_column[column] -= 1
    return frozenset(held)
