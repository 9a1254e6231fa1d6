"""The grounds that scenes stand on. Each is a framed picture (size, size, 3); a style adds a soft texture to it."""

from __future__ import annotations

from functools import cache

import numpy as np

_PLAIN = {"white": (244, 244, 240), "grey": (164, 168, 176), "pink": (244, 200, 214)}
_SKY = {
    "day": ((104, 176, 240), (206, 232, 250)),
    "dusk": ((176, 96, 132), (255, 190, 130)),
    "night": ((34, 40, 92), (74, 84, 150)),
}
_STARS = (
    (0.08, 0.05),
    (0.38, 0.1),
    (0.72, 0.04),
    (0.95, 0.3),
    (0.3, 0.37),
    (0.64, 0.36),
    (0.04, 0.64),
    (0.36, 0.7),
    (0.7, 0.62),
)

FRAME = 1 / 48
"""Width of the line around every picture, as a share of its side: 2 pixels of 96. A cell at a side or in a corner is known by
it, so that what a place is called can be learnt from what is seen there."""

_LINE, _LINE_AT_NIGHT = (60, 54, 58), (232, 224, 200)

TEXTURE = 5.0
"""How many levels (of 255) a texture goes up and down; its waves are half a cell long, which no VAE smooths away."""


@cache
def background(name: str, style: int, size: int) -> np.ndarray:
    """Pixels (size, size, 3), float32 0..255, read-only. Styles 0..3: smooth, waves across, waves along, both."""
    at = ((np.arange(size, dtype=np.float32) + 0.5) / size).astype(np.float32)
    y, x = at[:, None, None], at[None, :, None]
    ground = np.broadcast_to(_ground(name, x, y), (size, size, 3)).astype(np.float32)
    wave = np.cos(at * np.float32(12 * np.pi))
    if style & 1:
        ground = ground + TEXTURE * wave[:, None, None]
    if style & 2:
        ground = ground + TEXTURE * wave[None, :, None]
    rim = np.minimum(at, 1 - at) < FRAME
    line = np.array(_LINE_AT_NIGHT if name == "night" else _LINE, np.float32)
    ground = np.where((rim[:, None] | rim[None, :])[..., None], line, np.clip(ground, 0, 255))
    ground.setflags(write=False)
    return ground


def _ground(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if name in _PLAIN:
        return np.array(_PLAIN[name], np.float32)[None, None]
    if name in _SKY:
        top, bottom = (np.array(colour, np.float32) for colour in _SKY[name])
        sky = top + (bottom - top) * y
        if name == "night":
            for sx, sy in _STARS:
                spark = np.exp(-((x - sx) ** 2 + (y - sy) ** 2) / (2 * 0.011**2))
                sky = sky + (np.float32(235) - sky) * spark * np.float32(0.9)
        return sky
    if name == "grass":
        blades = np.cos(x * 18 * np.pi) * np.cos(y * 12 * np.pi + np.floor(x * 18) * np.pi)
        return np.array((122, 196, 84), np.float32) + blades * np.array((8, 10, 6), np.float32)
    assert name == "table"
    planks = np.where(np.minimum(y % (1 / 3), 1 / 3 - y % (1 / 3)) < 0.013, np.float32(-34), np.float32(0))
    grain = 6 * np.sin(y * 60 + 2 * np.sin(x * 9))
    return np.array((206, 158, 104), np.float32) + planks + grain
