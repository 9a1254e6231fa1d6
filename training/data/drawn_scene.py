"""Scenes of plain shapes on a 3x3 grid: values, the changes that can be made to them, how two differ, and their pixels.

Small on purpose: it feeds tests and the CPU recipe, and knows nothing of records or words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "cross")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (244, 140, 6),
    "yellow": (236, 208, 32),
    "green": (46, 160, 67),
    "blue": (33, 102, 220),
    "purple": (134, 58, 188),
}
BACKGROUNDS = {"white": (250, 250, 248), "grey": (186, 190, 194), "pink": (246, 212, 222), "dark blue": (22, 28, 66)}
CELLS = range(9)
"""Cells by rows: 0 is the top left, 4 the centre, 8 the bottom right."""

_FINE = 4  # each pixel is the mean of 4 x 4 points, which makes smooth edges that are the same on every machine


@dataclass(frozen=True, slots=True, order=True)
class Thing:
    """One shape in one cell."""

    cell: int
    shape: str
    colour: str


@dataclass(frozen=True, slots=True)
class Scene:
    """A background and things, ordered by cell, at most one in each."""

    background: str
    things: tuple[Thing, ...] = ()

    def at(self, cell: int) -> Thing | None:
        """The thing in a cell."""
        return next((thing for thing in self.things if thing.cell == cell), None)

    def empty(self) -> list[int]:
        """The cells without a thing."""
        return [cell for cell in CELLS if self.at(cell) is None]

    def put(self, thing: Thing) -> Scene:
        """The scene with `thing` in its cell, in place of what was there."""
        return replace(self, things=tuple(sorted([*(each for each in self.things if each.cell != thing.cell), thing])))

    def without(self, cell: int) -> Scene:
        """The scene with an empty cell."""
        return replace(self, things=tuple(each for each in self.things if each.cell != cell))


@dataclass(frozen=True, slots=True)
class Recolour:
    """The thing in `cell` gets `colour`."""

    cell: int
    colour: str


@dataclass(frozen=True, slots=True)
class Add:
    """`thing` comes into its cell, which is empty."""

    thing: Thing


@dataclass(frozen=True, slots=True)
class Remove:
    """The thing in `cell` goes."""

    cell: int


@dataclass(frozen=True, slots=True)
class Move:
    """The thing in `cell` goes to the empty cell `to`."""

    cell: int
    to: int


@dataclass(frozen=True, slots=True)
class Background:
    """The background becomes `name`."""

    name: str


Change = Recolour | Add | Remove | Move | Background


def apply(scene: Scene, *changes: Change) -> Scene:
    """The scene after the changes, one after the other. ValueError when one does not fit the scene."""
    for change in changes:
        match change:
            case Background(name):
                scene = replace(scene, background=name)
            case Add(thing) if scene.at(thing.cell) is None:
                scene = scene.put(thing)
            case Recolour(cell, colour) if (thing := scene.at(cell)) is not None:
                scene = scene.put(replace(thing, colour=colour))
            case Remove(cell) if scene.at(cell) is not None:
                scene = scene.without(cell)
            case Move(cell, to) if (thing := scene.at(cell)) is not None and scene.at(to) is None:
                scene = scene.without(cell).put(replace(thing, cell=to))
            case _:
                raise ValueError(f"{change} does not fit {scene}")
    return scene


def touched(change: Change) -> tuple[int, ...]:
    """The cells that a change is about."""
    match change:
        case Move(cell, to):
            return (to, cell)
        case Add(thing):
            return (thing.cell,)
        case Recolour(cell, _) | Remove(cell):
            return (cell,)
    return ()


@dataclass(frozen=True, slots=True)
class Difference:
    """How a picture departs from the wanted one.

    missing: wanted things that are nowhere; wrong: cells that show something else, for a misplaced thing the one it is in;
    background: it is another one.
    """

    missing: tuple[Thing, ...]
    wrong: tuple[int, ...]
    background: bool

    @property
    def conflicts(self) -> int:
        """Claims of a description that the picture refutes."""
        return len(self.wrong) + self.background


def compare(wanted: Scene, shown: Scene) -> Difference:
    """What a description of `wanted` gets wrong about `shown`. A misplaced thing is one fault, not two."""
    missing = [thing for thing in wanted.things if shown.at(thing.cell) is None]
    wrong = [thing.cell for thing in wanted.things if shown.at(thing.cell) not in (None, thing)]
    for extra in (thing for thing in shown.things if wanted.at(thing.cell) is None):
        wrong.append(extra.cell)
        twin = next((thing for thing in missing if (thing.shape, thing.colour) == (extra.shape, extra.colour)), None)
        if twin:
            missing.remove(twin)
    return Difference(tuple(missing), tuple(sorted(wrong)), wanted.background != shown.background)


def render(scene: Scene, size: tuple[int, int]) -> np.ndarray:
    """Pixels (height, width, 3), uint8, of a scene; size: (width, height), at least 24 each."""
    width, height = size
    picture = np.empty((height, width, 3), dtype=np.float32)
    picture[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        row, column = divmod(thing.cell, 3)
        top, bottom = row * height // 3, (row + 1) * height // 3
        left, right = column * width // 3, (column + 1) * width // 3
        cover = _cover(thing.shape, bottom - top, right - left)[..., None]
        part = picture[top:bottom, left:right]
        part += cover * (np.array(COLOURS[thing.colour], dtype=np.float32) - part)
    return np.rint(picture).astype(np.uint8)


def _cover(shape: str, height: int, width: int) -> np.ndarray:
    """How much of each pixel (height, width) the shape covers, in steps of 1/16."""
    y = ((np.arange(height * _FINE) + 0.5) / _FINE - height / 2)[:, None]
    x = ((np.arange(width * _FINE) + 0.5) / _FINE - width / 2)[None]
    r = 0.4 * min(height, width)
    inside = {
        "circle": x**2 + y**2 <= r**2,
        "square": np.maximum(abs(x), abs(y)) <= 0.85 * r,
        "triangle": (y <= 0.8 * r) & (abs(x) <= (y + r) * 0.58),
        "diamond": abs(x) + abs(y) <= 1.1 * r,
        "cross": (np.minimum(abs(x), abs(y)) <= 0.28 * r) & (np.maximum(abs(x), abs(y)) <= r),
    }[shape]
    return inside.reshape(height, _FINE, width, _FINE).mean(axis=(1, 3), dtype=np.float32)


def unique(scene: Scene, thing: Thing) -> bool:
    """No other thing of the scene has this shape and colour."""
    return [(each.shape, each.colour) for each in scene.things].count((thing.shape, thing.colour)) == 1


def only_one(scene: Scene, shape: str) -> Thing | None:
    """The thing of this shape, if there is exactly one."""
    found: Sequence[Thing] = [thing for thing in scene.things if thing.shape == shape]
    return found[0] if len(found) == 1 else None
