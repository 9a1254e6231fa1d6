"""How each kind of object looks in each state. Drawn once per (kind, state, colour, size, style, side) and kept.

What tells two states apart is large: it has to survive a small VAE. Coordinates: see `pen.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np

from .kinds import COLOURS
from .pen import LINE, Colour, Pen

WHITE: Colour = (248, 246, 240)
STEEL: Colour = (120, 126, 134)
WOOD: Colour = (150, 92, 44)
LEAF: Colour = (84, 182, 62)
BROWN: Colour = (122, 78, 38)
ICE: Colour = (168, 220, 246)
WATER: Colour = (84, 158, 226)
GLOW: Colour = (255, 236, 130)
DARK: Colour = (66, 64, 70)

SCALES = {"small": 0.66, "large": 0.94}
LINES = {"small": (0.8, 1.2, 0.8, 1.2), "large": (1.0, 1.7, 1.0, 1.7)}
"""Width of outlines in pixels of a 32 px cell, by style. A small object must not drown in its outline."""

SHADES = (0.0, 0.0, 0.22, 0.22)
"""How much lighter the top left is than the middle, by style; the bottom right is as much darker."""


@dataclass(frozen=True, slots=True, eq=False)
class Sprite:
    """paint: (side, side, 3), colours 0..255 times cover; cover: (side, side, 1) in 0..1. On a ground it gives paint +
    (1 - cover) * ground."""

    paint: np.ndarray
    cover: np.ndarray


@cache
def sprite(kind: str, state: str, colour: str, size: str, style: int, side: int) -> Sprite:
    """The sprite of an object; read-only arrays, float32."""
    own = COLOURS.get(colour, LINE)
    paint = np.zeros((side, side, 3), np.float32)
    cover = np.zeros((side, side, 1), np.float32)
    slope = np.linspace(1, -1, side, dtype=np.float32)
    light = 1 + SHADES[style] * (slope[:, None] + slope[None, :]) / 2 / SCALES[size]
    for layer in _layers(kind, state, size, style, side):
        tone = np.array(layer.colour or own, np.float32) * (light[..., None] if layer.shaded else np.float32(1))
        part = layer.coverage[..., None]
        paint = paint * (1 - part) + np.clip(tone, 0, 255) * part
        cover = cover * (1 - part) + part
    for array in (paint, cover):
        array.setflags(write=False)
    return Sprite(paint, cover)


@cache
def _layers(kind: str, state: str, size: str, style: int, side: int) -> tuple:
    pen = Pen(side, SCALES[size], LINES[size][style] * side / 32)
    _DRAW[kind](pen, state)
    return tuple(pen.layers)


# ---- plain shapes --------------------------------------------------------------------------------------------------------


def _ring(number: int, *radii: float, turn: float = -math.pi / 2) -> list[tuple[float, float]]:
    """`number` points on a circle around the middle, the radii in turn."""
    step = 2 * math.pi / number
    polar = [(radii[n % len(radii)], turn + n * step) for n in range(number)]
    return [(r * math.cos(angle), r * math.sin(angle)) for r, angle in polar]


def _turns(number: int) -> list[float]:
    """`number` angles around the circle."""
    return [n * 2 * math.pi / number for n in range(number)]


def _circle(pen: Pen, state: str) -> None:
    pen.fill(pen.disc(0, 0, 0.82))


def _square(pen: Pen, state: str) -> None:
    pen.fill(pen.box(-0.84, -0.84, 0.84, 0.84))


def _triangle(pen: Pen, state: str) -> None:
    pen.fill(pen.polygon([(0, -0.9), (0.95, 0.8), (-0.95, 0.8)]))


def _star(pen: Pen, state: str) -> None:
    pen.fill(pen.polygon([(x, y + 0.08) for x, y in _ring(10, 1.0, 0.42)]))


def _heart(pen: Pen, state: str) -> None:
    turns = _turns(48)
    xs = [math.sin(t) ** 3 * 0.94 for t in turns]
    ys = [-(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16.5 - 0.1 for t in turns]
    pen.fill(pen.polygon(list(zip(xs, ys, strict=True))))


# ---- things in a colour --------------------------------------------------------------------------------------------------


def _car(pen: Pen, state: str) -> None:
    pen.fill(pen.polygon([(-0.62, 0.05), (-0.36, -0.52), (0.34, -0.52), (0.66, 0.05)]))
    pen.paint(pen.polygon([(-0.4, 0.0), (-0.26, -0.36), (-0.04, -0.36), (-0.04, 0.0)]), (206, 232, 246), shaded=False)
    pen.paint(pen.polygon([(0.06, 0.0), (0.06, -0.36), (0.24, -0.36), (0.42, 0.0)]), (206, 232, 246), shaded=False)
    pen.fill(pen.box(-0.96, -0.04, 0.96, 0.48, 0.16))
    for x in (-0.52, 0.52):
        pen.paint(pen.disc(x, 0.5, 0.27), LINE, shaded=False)
        pen.paint(pen.disc(x, 0.5, 0.11), (190, 190, 194), shaded=False)


def _candle(pen: Pen, state: str) -> None:
    if state == "burnt down":
        pen.fill(np.minimum(pen.ellipse(0, 0.68, 0.94, 0.3), pen.box(-0.4, 0.22, 0.4, 0.8, 0.12)))
        pen.draw((0, 0.22), (0.1, 0.0), width=0.12)
        return
    top = -0.62 if state == "new" else -0.1
    pen.fill(pen.box(-0.4, top, 0.4, 0.96, 0.06))
    pen.draw((0, top), (0, top - 0.24), width=0.12)
    if state == "burning":
        flame = [(0, -1.0), (0.34, -0.5), (0.28, -0.24), (0, -0.14), (-0.28, -0.24), (-0.34, -0.5)]
        pen.fill(pen.polygon(flame), (252, 150, 20))
        pen.paint(pen.ellipse(0, -0.38, 0.14, 0.2), (255, 244, 150), shaded=False)


def _flower(pen: Pen, state: str) -> None:
    if state == "wilted":
        pen.draw((0, 0.96), (-0.04, 0.1), (0.14, -0.5), (0.44, -0.5), (0.56, -0.2), width=0.14, colour=(116, 112, 42))
        pen.fill(pen.polygon([(0.06, -0.3), (1.0, -0.3), (0.98, 0.56), (0.76, 0.4), (0.54, 0.74), (0.32, 0.4), (0.08, 0.56)]))
        pen.fill(pen.ellipse(-0.5, 0.76, 0.46, 0.22))
        return
    pen.draw((0, 0.96), (0, 0.0), width=0.15, colour=(40, 128, 44))
    pen.paint(pen.ellipse(-0.3, 0.62, 0.28, 0.13), (52, 150, 52))
    pen.paint(pen.ellipse(0.3, 0.48, 0.28, 0.13), (52, 150, 52))
    if state == "bud":
        pen.fill(pen.ellipse(0, -0.34, 0.36, 0.54))
        pen.paint(pen.polygon([(-0.36, 0.0), (0, 0.12), (0.36, 0.0), (0.16, 0.34), (-0.16, 0.34)]), (52, 150, 52))
        return
    petals = [pen.disc(x, y - 0.32, 0.32) for x, y in _ring(6, 0.4)]
    pen.fill(np.minimum.reduce([*petals, pen.disc(0, -0.32, 0.52)]))
    pen.fill(pen.disc(0, -0.32, 0.22), (255, 238, 120))


def _balloon(pen: Pen, state: str) -> None:
    if state == "full":
        pen.draw((0, 0.5), (0.1, 0.72), (-0.06, 0.98), width=0.08)
        pen.fill(pen.polygon([(0, 0.42), (0.16, 0.66), (-0.16, 0.66)]))
        pen.fill(pen.ellipse(0, -0.22, 0.66, 0.76))
        pen.paint(pen.ellipse(-0.24, -0.46, 0.12, 0.18), WHITE, shaded=False)
        return
    for points in (
        [(-1.0, -0.16), (-0.6, -0.98), (-0.1, -0.6), (-0.2, 0.0)],
        [(0.06, -0.9), (1.0, -0.8), (0.74, 0.0), (0.3, -0.1)],
        [(-0.92, 0.24), (0.0, 0.14), (-0.1, 0.96), (-0.66, 0.8)],
        [(0.3, 0.1), (1.0, 0.3), (0.7, 1.0), (0.16, 0.74)],
    ):
        pen.fill(pen.polygon(points))


def _cup(pen: Pen, state: str) -> None:
    pen.fill(np.maximum(pen.disc(0.64, 0.14, 0.36), -pen.disc(0.64, 0.14, 0.16)))
    pen.fill(pen.polygon([(-0.78, -0.44), (0.62, -0.44), (0.46, 0.88), (-0.62, 0.88)]))
    pen.fill(pen.ellipse(-0.08, -0.44, 0.74, 0.38), WHITE if state == "empty" else (104, 58, 22), shaded=False)
    if state == "full":
        for x in (-0.4, 0.16):
            pen.draw((x, -0.7), (x + 0.1, -0.84), (x, -0.98), width=0.1, colour=(226, 226, 226))


def _umbrella(pen: Pen, state: str) -> None:
    if state == "closed":
        pen.draw((0, 0.3), (0, 0.8), (0.16, 0.94), (0.3, 0.82), width=0.12)
        right = [(0.3, -0.5), (0.5, 0.3), (0.24, 0.54)]
        pen.fill(pen.polygon([(0, -1.0), *right, (0, 0.38), *((-x, y) for x, y in reversed(right))]))
        return
    pen.draw((0, 0.0), (0, 0.76), (0.15, 0.94), (0.32, 0.82), width=0.12)
    canopy = np.maximum(pen.disc(0, 0.06, 0.97), pen.box(-2, -2, 2, 0.06))
    scallops = np.minimum.reduce([pen.disc(x, 0.12, 0.26) for x in (-0.66, 0.0, 0.66)])
    pen.fill(np.maximum(canopy, -scallops))


# ---- things whose colours are their own ----------------------------------------------------------------------------------


def _traffic_light(pen: Pen, state: str) -> None:
    pen.paint(pen.box(-0.54, -1.0, 0.54, 1.0, 0.18), (206, 206, 210), shaded=False)
    pen.paint(pen.box(-0.48, -0.94, 0.48, 0.94, 0.14), (44, 46, 54))
    for lamp, y, lit in (("red", -0.6, (255, 40, 36)), ("amber", 0.0, (255, 190, 20)), ("green", 0.6, (40, 232, 80))):
        on = lamp == state
        pen.paint(pen.disc(0, y, 0.3 if on else 0.22), lit if on else (82, 84, 92), shaded=False)


def _ice_cube(pen: Pen, state: str) -> None:
    if state == "puddle":
        pen.fill(pen.ellipse(0, 0.56, 0.94, 0.38), WATER)
        pen.paint(pen.ellipse(-0.3, 0.46, 0.3, 0.09), (214, 238, 252), shaded=False)
        return
    top, half = (-0.92, 0.78) if state == "solid" else (-0.36, 0.58)
    if state == "melting":
        pen.fill(pen.ellipse(0, 0.66, 0.97, 0.32), WATER)
    low, middle = top + half * 2, top + half * 0.52
    right = [(half, top + half * 0.4), (half, low - half * 0.3)]
    pen.fill(pen.polygon([(0, top), *right, (0, low), *((-x, y) for x, y in reversed(right))]), ICE)
    lid = [(0, top + 0.1), (half * 0.84, middle - 0.04), (0, middle + half * 0.26), (-half * 0.84, middle - 0.04)]
    pen.paint(pen.polygon(lid), (232, 248, 255))
    pen.draw((0, middle + half * 0.3), (0, low - 0.14), width=0.06, colour=(110, 168, 206))


def _tree(pen: Pen, state: str) -> None:
    pen.fill(pen.box(-0.14, 0.2, 0.14, 0.98), BROWN)
    if state == "winter":
        for branch in ("0 .4 0 -.9", "0 .3 -.66 -.34", "0 .1 .66 -.5", "0 -.24 -.36 -.84", ".3 -.2 .74 -.06"):
            ax, ay, bx, by = map(float, branch.split())
            pen.draw((ax, ay), (bx, by), width=0.15, colour=(112, 74, 42))
        return
    colour = {"spring": (252, 178, 206), "summer": (46, 140, 44), "autumn": (226, 120, 24)}[state]
    parts = [pen.disc(0, -0.48, 0.5), pen.disc(-0.42, -0.1, 0.44), pen.disc(0.42, -0.1, 0.44)]
    pen.fill(np.minimum.reduce(parts), colour)
    if state == "autumn":
        for x in (-0.56, 0.44):
            pen.paint(pen.ellipse(x, 0.86, 0.2, 0.1), colour, shaded=False)


def _leaf(pen: Pen, state: str) -> None:
    stem, right = (0.0, 0.98), [(0.4, -0.56), (0.58, -0.06), (0.44, 0.4)]
    blade = [(0, -0.96), *right, (0, 0.7), *((-x, y) for x, y in reversed(right))]
    if state == "dry":
        crumpled = "0.3 -0.8, 0.34 -0.3, 0.66 0.06, 0.24 0.3, 0.1 0.72, -0.26 0.44, -0.54 0.5, -0.34 0, -0.5 -0.3, -0.06 -0.36"
        blade = [(float(x), float(y)) for x, y in (point.split() for point in crumpled.split(","))]
        pen.draw((0.0, 0.4), stem, width=0.12, colour=BROWN)
        pen.fill(pen.polygon(blade), (158, 104, 54))
        pen.draw((0.1, 0.6), (0.02, 0.0), (0.22, -0.6), width=0.09, colour=(84, 50, 24))
        return
    pen.draw((0, 0.5), stem, width=0.12, colour=(70, 110, 40))
    pen.fill(pen.polygon(blade), LEAF if state == "healthy" else (240, 214, 60))
    if state == "deficient":
        pen.paint(np.maximum(pen.polygon(blade) + 0.04, pen.box(-1, -1, 1, -0.46)), (128, 74, 28))
        for x in (-0.44, 0.44):
            pen.paint(np.maximum(pen.polygon(blade) + 0.04, pen.disc(x * 1.1, 0.04, 0.2)), (128, 74, 28))
    pen.draw((0, 0.6), (0, -0.6), width=0.07, colour=(34, 110, 40) if state == "healthy" else (168, 140, 30))


def _egg(pen: Pen, state: str) -> None:
    shell = (248, 226, 196)
    if state == "whole":
        pen.fill(pen.polygon([(0.66 * math.cos(t) * (1 + 0.22 * math.sin(t)), 0.92 * math.sin(t)) for t in _turns(40)]), shell)
        return
    pen.fill(pen.ellipse(0, 0.54, 0.96, 0.4), WHITE)
    pen.paint(pen.disc(0.06, 0.46, 0.28), (250, 178, 10))
    for side in (-1, 1):
        half = [(0.98, 0.02), (0.92, -0.5), (0.66, -0.86), (0.34, -0.78), (0.1, -0.5), (0.38, -0.4), (0.42, -0.1), (0.68, -0.2)]
        pen.fill(pen.polygon([(side * x, y) for x, y in half]), shell)


def _lamp(pen: Pen, state: str) -> None:
    if state == "on":
        pen.paint(pen.polygon([(-0.7, -0.1), (0.7, -0.1), (0.98, 0.86), (-0.98, 0.86)]), (255, 226, 110), shaded=False)
    pen.draw((0, -0.2), (0, 0.8), width=0.16, colour=STEEL)
    pen.fill(pen.ellipse(0, 0.84, 0.46, 0.14), STEEL)
    shade = pen.polygon([(-0.4, -0.94), (0.4, -0.94), (0.74, -0.08), (-0.74, -0.08)])
    pen.fill(shade, (255, 246, 180) if state == "on" else (128, 88, 76), shaded=state == "off")


def _clock(pen: Pen, state: str) -> None:
    pen.paint(pen.disc(0, 0, 0.96), (150, 30, 40))
    pen.paint(pen.disc(0, 0, 0.8), WHITE, shaded=False)
    angle = int(state) % 12 / 12 * 2 * math.pi
    # one thick hand: a short second one would be lost at this size
    pen.draw((0, 0), (0, -0.66), width=0.12, colour=STEEL)
    pen.draw((0, 0), (0.56 * math.sin(angle), -0.56 * math.cos(angle)), width=0.3)


def _sun(pen: Pen, state: str) -> None:
    pen.paint(pen.polygon(_ring(24, 1.0, 0.66)), (240, 132, 10), shaded=False)
    pen.fill(pen.disc(0, 0, 0.62), (255, 214, 30))


def _moon(pen: Pen, state: str) -> None:
    face = (226, 226, 206)
    if state == "full":
        pen.fill(pen.disc(0, 0, 0.84), face)
        for x, y, r in ((-0.3, -0.26, 0.2), (0.32, 0.1, 0.24), (-0.2, 0.42, 0.15)):
            pen.paint(pen.disc(x, y, r), (176, 176, 162), shaded=False)
        return
    pen.fill(np.maximum(pen.disc(-0.08, 0, 0.86), -pen.disc(0.34, -0.14, 0.72)), face)


def _seesaw(pen: Pen, state: str) -> None:
    drop = {"left": 0.5, "level": 0.0, "right": -0.5}[state]
    pen.fill(pen.polygon([(0, 0.06), (0.46, 0.9), (-0.46, 0.9)]), (176, 182, 190))
    pen.fill(pen.stroke((-0.94, drop), (0.94, -drop), width=0.34), (240, 96, 50))


_FONT = {
    "0": "01110100011000110001100011000101110", "1": "00100011000010000100001000010001110",
    "2": "01110100010000100110010001000011111", "3": "11110000010000101110000010000111110",
    "4": "00010001100101010010111110001000010", "5": "11111100001111000001000011000101110",
    "6": "01110100001111010001100011000101110", "7": "11111000010001000100010000100001000",
    "8": "01110100011000101110100011000101110", "9": "01110100011000101111000010000101110",
    "G": "01110100011000010111100011000101110", "O": "01110100011000110001100011000101110",
    "N": "10001110011010110011100011000110001", "U": "10001100011000110001100011000101110",
    "P": "11110100011000111110100001000010000", "K": "10001100101010011000101001001010001",
}  # fmt: skip
"""Letters of 5 x 7 dots, row by row."""


def _sign(pen: Pen, state: str) -> None:
    pen.draw((0, 0.4), (0, 0.98), width=0.16, colour=BROWN)
    pen.fill(pen.box(-0.98, -0.94, 0.98, 0.62, 0.12), (250, 244, 214), shaded=False)
    wide = 0.15 if len(state) == 1 else 0.138
    left = -wide * (2.5 if len(state) == 1 else 5.5)
    dots = [(n * 6 + dot % 5, dot // 5) for n, letter in enumerate(state) for dot in range(35) if _FONT[letter][dot] == "1"]
    figures = [pen.box(left + wide * x, -0.7 + 0.155 * y, left + wide * (x + 1), -0.7 + 0.155 * (y + 1)) for x, y in dots]
    pen.paint(np.minimum.reduce(figures) - 0.012, LINE, shaded=False)


_DRAW: dict[str, Callable[[Pen, str], None]] = {
    "circle": _circle, "square": _square, "triangle": _triangle, "star": _star, "heart": _heart,
    "car": _car, "candle": _candle, "flower": _flower, "balloon": _balloon, "cup": _cup, "umbrella": _umbrella,
    "traffic light": _traffic_light, "ice cube": _ice_cube, "tree": _tree, "leaf": _leaf, "egg": _egg, "lamp": _lamp,
    "clock": _clock, "sun": _sun, "moon": _moon, "seesaw": _seesaw, "sign": _sign,
}  # fmt: skip
