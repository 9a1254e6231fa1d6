"""Scenes of the miniature world: values, and their pixels.

A scene is a background, a style and objects on a 3x3 grid. Its pixels follow from it alone; no model takes part. The canvas
is square; 96 and 128 pixels are in use. Every cell is a square of a third of the canvas, so that at 96 pixels an object
lies on one latent token of 32 px.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np

from ..errors import DataError
from .backgrounds import background
from .kinds import BACKGROUNDS, CELLS, KINDS, STYLES
from .sprites import sprite

SIZE = 96
"""Pixels of the canvas's sides, unless something else is asked for."""

LEAST_SIZE = 48


@dataclass(frozen=True, slots=True, order=True)
class Look:
    """What an object is, apart from where it is. colour: "" where the kind has its own; state: "" where it has none.

    The state of a sign is its text.
    """

    kind: str
    colour: str = ""
    size: str = "large"
    state: str = ""

    def __post_init__(self) -> None:
        if self not in _LOOKS:
            kind = KINDS.get(self.kind)
            if kind is None:
                raise DataError(f"object: expected a kind of {', '.join(KINDS)}, found {self.kind!r}. Correct the kind.")
            for name, allowed in (("colour", kind.colours), ("size", kind.sizes), ("state", kind.states)):
                if getattr(self, name) not in allowed:
                    raise DataError(
                        f"{self.kind}: expected {name} of {', '.join(map(repr, allowed))}, found {getattr(self, name)!r}. "
                        f"Correct the {name}."
                    )


@dataclass(frozen=True, slots=True, order=True)
class Object:
    """One object in one cell."""

    cell: int
    look: Look

    @property
    def kind(self) -> str:
        """The kind of its look."""
        return self.look.kind

    @property
    def colour(self) -> str:
        """The colour of its look."""
        return self.look.colour

    @property
    def size(self) -> str:
        """The size of its look."""
        return self.look.size

    @property
    def state(self) -> str:
        """The state of its look."""
        return self.look.state


@dataclass(frozen=True, slots=True)
class Scene:
    """objects: ordered by cell, at most one in each. DataError for what the world does not have."""

    background: str
    objects: tuple[Object, ...] = ()
    style: int = 0

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            names = ", ".join(BACKGROUNDS)
            raise DataError(f"scene: expected a background of {names}, found {self.background!r}. Correct it.")
        if self.style not in STYLES:
            raise DataError(f"scene: expected a style from 0 to {STYLES[-1]}, found {self.style!r}. Correct it.")
        cells = [each.cell for each in self.objects]
        if any(cell not in CELLS for cell in cells) or any(a >= b for a, b in zip(cells, cells[1:], strict=False)):
            raise DataError(f"scene: expected objects in different cells 0 to 8, in order, found cells {cells}. Sort them.")

    @property
    def label(self) -> str | None:
        """The text on the scene's sign, if there is exactly one."""
        texts = [each.state for each in self.objects if each.kind == "sign"]
        return texts[0] if len(texts) == 1 else None

    def at(self, cell: int) -> Object | None:
        """The object in a cell."""
        for each in self.objects:
            if each.cell == cell:
                return each
        return None

    def look(self, cell: int) -> Look | None:
        """What stands in a cell."""
        found = self.at(cell)
        return found.look if found else None

    def empty(self) -> tuple[int, ...]:
        """The cells without an object."""
        taken = {each.cell for each in self.objects}
        return tuple(cell for cell in CELLS if cell not in taken)

    def of(self, kind: str) -> tuple[Object, ...]:
        """The objects of a kind."""
        return tuple(each for each in self.objects if each.kind == kind)

    def put(self, cell: int, look: Look | None) -> Scene:
        """The scene with `look` in the cell, in place of what was there; None empties it."""
        kept = [each for each in self.objects if each.cell != cell]
        return replace(self, objects=tuple(sorted([*kept, *([Object(cell, look)] if look else [])])))


def scene_of(background: str, objects: Iterable[Object] = (), style: int = 0) -> Scene:
    """A scene of objects in any order."""
    return Scene(background, tuple(sorted(objects)), style)


def _all_looks() -> Iterator[Look]:
    for name, kind in KINDS.items():
        for colour, size, state in product(kind.colours, kind.sizes, kind.states):
            look = object.__new__(Look)  # they are what Look() is checked against
            for key, value in (("kind", name), ("colour", colour), ("size", size), ("state", state)):
                object.__setattr__(look, key, value)
            yield look


LOOKS: tuple[Look, ...] = tuple(_all_looks())
"""Everything that an object can look like, in a fixed order."""

_LOOKS = frozenset(LOOKS)


def combination(scene: Scene) -> tuple[tuple[str, str], ...]:
    """The scene's (kind, colour) pairs in order: what is kept apart between training and held-out scenes."""
    return tuple(sorted((each.kind, each.colour) for each in scene.objects))


# ---- pixels --------------------------------------------------------------------------------------------------------------


def cell_side(size: int) -> int:
    """Pixels of a cell's side; what the grid leaves over of the canvas lies around it."""
    return size // 3


def cell_box(cell: int, size: int) -> tuple[slice, slice]:
    """The rows and columns of a cell."""
    side = cell_side(size)
    margin = (size - 3 * side) // 2
    top, left = margin + cell // 3 * side, margin + cell % 3 * side
    return slice(top, top + side), slice(left, left + side)


def render(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Pixels (size, size, 3), uint8. The same scene gives the same pixels, always."""
    if size < LEAST_SIZE:
        raise DataError(f"canvas: expected at least {LEAST_SIZE} pixels, found {size}. Draw larger and scale down.")
    if not scene.objects:
        return _empty(scene.background, scene.style, size).copy()
    ground = background(scene.background, scene.style, size)
    pixels = _empty(scene.background, scene.style, size).copy()
    for each in scene.objects:
        rows, columns = cell_box(each.cell, size)
        pixels[rows, columns] = paint(ground[rows, columns], each.look, scene.style)
    return pixels


def paint(ground: np.ndarray, look: Look, style: int) -> np.ndarray:
    """`look` on the ground of a cell, (side, side, 3) float: uint8 pixels."""
    drawn = sprite(look.kind, look.state, look.colour, look.size, style, ground.shape[0])
    return np.rint(np.clip(drawn.paint + (1 - drawn.cover) * ground, 0, 255)).astype(np.uint8)


@lru_cache(maxsize=256)
def _empty(name: str, style: int, size: int) -> np.ndarray:
    return np.rint(background(name, style, size)).astype(np.uint8)
