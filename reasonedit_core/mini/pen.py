"""Drawing with signed distances: smooth edges at any size, without a drawing library, the same on every machine.

A sprite is drawn in a cell of `side` pixels whose coordinates run from -1 to 1, y downwards. A figure is the array (side,
side) of distances from its edge in these coordinates, negative inside; two figures are united by `numpy.minimum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Colour = tuple[int, int, int]
LINE: Colour = (38, 34, 42)
"""Colour of outlines."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One coat of paint. colour: None for the object's own. coverage: (side, side) in 0..1. shaded: takes part in the shade."""

    colour: Colour | None
    coverage: np.ndarray
    shaded: bool = True


@dataclass(slots=True)
class Pen:
    """Draws the coats of one sprite. scale: the object's size within its cell; line: width of outlines in pixels."""

    side: int
    scale: float
    line: float
    layers: list[Layer] = field(default_factory=list)
    _x: np.ndarray = field(init=False)  # (1, side) and (side, 1): the coordinates of the pixels' centres
    _y: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        steps = ((np.arange(self.side) + 0.5) / self.side * 2 - 1) / self.scale
        self._x, self._y = steps[None, :], steps[:, None]

    @property
    def pixel(self) -> float:
        """The width of a pixel in coordinates."""
        return 2 / self.side / self.scale

    # ---- figures ---------------------------------------------------------------------------------------------------------

    def disc(self, x: float, y: float, r: float) -> np.ndarray:
        """A circle."""
        return np.hypot(self._x - x, self._y - y) - r

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> np.ndarray:
        """An ellipse; the distance is right near the edge, which is where it counts."""
        u, v = (self._x - x) / rx, (self._y - y) / ry
        k = np.hypot(u, v)
        slope = np.hypot(u / rx, v / ry)
        return np.where(k < 1e-6, -min(rx, ry), k * (k - 1) / np.maximum(slope, 1e-6))

    def box(self, left: float, top: float, right: float, bottom: float, corner: float = 0.0) -> np.ndarray:
        """A rectangle, with round corners of this radius."""
        dx = abs(self._x - (left + right) / 2) - (right - left) / 2 + corner
        dy = abs(self._y - (top + bottom) / 2) - (bottom - top) / 2 + corner
        outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
        return outside + np.minimum(np.maximum(dx, dy), 0) - corner

    def polygon(self, points: Sequence[tuple[float, float]]) -> np.ndarray:
        """A closed polygon of any shape that does not cross itself."""
        x, y = np.broadcast_arrays(self._x, self._y)
        nearest = np.full(x.shape, np.inf)
        inside = np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(points, [*points[1:], points[0]], strict=True):
            ex, ey, wx, wy = bx - ax, by - ay, x - ax, y - ay
            t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, (wx - ex * t) ** 2 + (wy - ey * t) ** 2)
            crosses = (ay <= y) != (by <= y)
            side = ex * wy - ey * wx
            inside ^= crosses & ((side > 0) == (ey > 0))
        return np.where(inside, -1, 1) * np.sqrt(nearest)

    def stroke(self, *points: tuple[float, float], width: float) -> np.ndarray:
        """A line through the points with round ends."""
        nearest = np.full((self.side, self.side), np.inf)
        for (ax, ay), (bx, by) in zip(points, points[1:], strict=False):
            ex, ey, wx, wy = bx - ax, by - ay, self._x - ax, self._y - ay
            t = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, np.hypot(wx - ex * t, wy - ey * t))
        return nearest - width / 2

    # ---- paint -----------------------------------------------------------------------------------------------------------

    def paint(self, figure: np.ndarray, colour: Colour | None = None, *, shaded: bool = True) -> None:
        """Fill a figure without an outline. colour None: the object's own."""
        coverage = np.clip(0.5 - figure / self.pixel, 0, 1).astype(np.float32)
        self.layers.append(Layer(colour, coverage, shaded))

    def fill(self, figure: np.ndarray, colour: Colour | None = None, *, shaded: bool = True) -> None:
        """Fill a figure and outline it; the outline lies inside, so that a style never makes an object larger."""
        self.paint(figure, LINE, shaded=False)
        self.paint(figure + self.line * self.pixel, colour, shaded=shaded)

    def draw(self, *points: tuple[float, float], width: float, colour: Colour = LINE) -> None:
        """A line through the points, of a width in coordinates but never under a pixel."""
        self.paint(self.stroke(*points, width=max(width, 1.2 * self.pixel)), colour, shaded=False)
