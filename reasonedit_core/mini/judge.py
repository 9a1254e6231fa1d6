"""The exact judge: reads a scene back from pixels, and says how far a picture is the edit that was asked for.

It sees pixels and the two scenes that an item is made of, never a model's words. Every cell is compared with every sprite of
the world on every background and in every style. Two resolutions: which sprite it is, is decided where every 2x2 pixels are
one, so that the softness of a small VAE does not matter; how well it is drawn, is measured on the pixels themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from ..errors import DataError
from .backgrounds import background
from .kinds import BACKGROUNDS, CELLS, MOST_OBJECTS, STYLES
from .sprites import sprite
from .world import LOOKS, SIZE, Object, Scene, cell_box, cell_side, paint

SIZES = (96, 128)
"""Canvases that are read pixel by pixel; a picture of another size is first scaled to `SIZE`."""

READABLE = 20.0
"""Largest root mean square difference (of 255 levels, 2x2 pixels as one) between a cell and the sprite it is taken for.
Beyond it the cell counts as spoiled."""

CLEAN, SPOILED = 6.0, 40.0
"""Root mean square difference from the scene as drawn at which the quality begins to fall from 10, and at which it is 0."""

_SHORT_LIST = 3  # candidates per cell, and grounds, that are compared pixel by pixel


@dataclass(frozen=True, slots=True)
class Reading:
    """What a picture shows. residuals: per cell, how far its pixels are from the sprite read there (root mean square of 255
    levels); soft: the same where 2x2 pixels are one."""

    scene: Scene
    residuals: tuple[float, ...]
    soft: tuple[float, ...]

    @property
    def readable(self) -> tuple[bool, ...]:
        """Per cell, whether what was read is really there."""
        return tuple(value <= READABLE for value in self.soft)


@dataclass(frozen=True, slots=True)
class Judgement:
    """Marks 0..10. asked, kept: per claim, whether it holds: a cell's number or "background", "style"."""

    success: float
    preservation: float
    quality: float
    asked: tuple[tuple[int | str, bool], ...]
    kept: tuple[tuple[int | str, bool], ...]
    reading: Reading

    @property
    def overall(self) -> float:
        """VIEScore's combination: the square root of min(success, preservation) times quality."""
        return (min(self.success, self.preservation) * self.quality) ** 0.5

    @property
    def done(self) -> bool:
        """All that was asked for is there: the item counts for the success rate."""
        return all(holds for _, holds in self.asked)

    @property
    def exact(self) -> bool:
        """All else is as it was: the item counts for the preservation rate."""
        return all(holds for _, holds in self.kept)


def read(pixels: np.ndarray) -> Reading:
    """The scene that a picture shows, and how well each cell fits it.

    pixels: (H, W, 3), uint8, or float 0..1. DataError for another form. Every picture is read as some scene; what it says of
    an unreadable cell is a guess, and `Reading.readable` tells.
    """
    image = _canvas(pixels)
    size = image.shape[0]
    cells = np.stack([image[cell_box(cell, size)] for cell in CELLS])
    soft = _pool(cells)
    grounds = [(_costs(soft, name, style, size), name, style) for name, style in _grounds(soft, size)]
    grounds.sort(key=lambda each: float(each[0].min(axis=1).sum()))
    found = [_match(cells, soft, costs, name, style, size) for costs, name, style in grounds[:2]]
    return min(found, key=lambda each: each[0])[1]


def judge(source: Scene, target: Scene, pixels: np.ndarray) -> Judgement:
    """How far a picture is `target`, for an edit that was given `source`.

    success: the share of the changes (cells, and the background) that are as in `target`. preservation: 10, less 4 for each
    cell that should not have changed and did, or another style, and less 8 for another background: three faults leave
    nothing, one leaves less than any mild flaw of quality. An unreadable cell is right in neither.
    """
    reading = read(pixels)
    shown, readable = reading.scene, reading.readable
    asked: list[tuple[int | str, bool]] = []
    kept: list[tuple[int | str, bool]] = []
    for cell in CELLS:
        side = kept if source.look(cell) == target.look(cell) else asked
        side.append((cell, readable[cell] and shown.look(cell) == target.look(cell)))
    side = kept if source.background == target.background else asked
    side.append(("background", shown.background == target.background))
    kept.append(("style", shown.style == target.style))
    if not asked:
        raise DataError("judge: expected a target that differs from its source, found the same scene twice. Pass both scenes.")
    success = 10 * sum(holds for _, holds in asked) / len(asked)
    broken = sum(8 if name == "background" else 4 for name, holds in kept if not holds)
    return Judgement(success, max(0.0, 10.0 - broken), quality(reading), tuple(asked), tuple(kept), reading)


def quality(reading: Reading) -> float:
    """0..10: how cleanly the picture is drawn, whatever it shows. The worst cell counts half against the mean of all."""
    mean = float(np.mean(np.square(reading.residuals))) ** 0.5
    found = max(mean, max(reading.residuals) / 2)
    return 10 * min(1.0, max(0.0, (SPOILED - found) / (SPOILED - CLEAN)))


# ---- pixels --------------------------------------------------------------------------------------------------------------


def _canvas(pixels: np.ndarray) -> np.ndarray:
    """(size, size, 3), float32 0..255."""
    image = np.asarray(pixels)
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 1:
        raise DataError(f"picture: expected pixels (height, width, 3), found shape {image.shape}. Convert it to RGB.")
    if image.dtype != np.uint8:
        if not np.issubdtype(image.dtype, np.floating) or not np.isfinite(image).all():
            raise DataError(f"picture: expected uint8, or finite floats in 0..1, found {image.dtype}. Convert it.")
        image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    if image.shape[0] != image.shape[1] or image.shape[0] not in SIZES:
        image = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BOX))
    return image.astype(np.float32)


def _pool(cells: np.ndarray) -> np.ndarray:
    """(..., side, side, C) -> (..., side/2, side/2, C): means of 2x2 pixels."""
    *lead, height, width, channels = cells.shape
    return cells.reshape(*lead, height // 2, 2, width // 2, 2, channels).mean(axis=(-4, -2), dtype=np.float32)


@lru_cache(maxsize=256)
def _ground(name: str, style: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The cells of a ground: (9, side, side, 3), and the same with 2x2 pixels as one."""
    picture = background(name, style, size)
    cells = np.stack([picture[cell_box(cell, size)] for cell in CELLS])
    return cells, _pool(cells)


@lru_cache(maxsize=4)
def _all_grounds(size: int) -> np.ndarray:
    """(backgrounds, styles, 9, side/2 * side/2 * 3)."""
    rows = [[_ground(name, style, size)[1].reshape(len(CELLS), -1) for style in STYLES] for name in BACKGROUNDS]
    return np.array(rows)


def _grounds(soft: np.ndarray, size: int) -> list[tuple[str, int]]:
    """The backgrounds and styles that fit best. Most cells of a scene are empty, so the best-fitting ones decide."""
    gaps = np.square(_all_grounds(size) - soft.reshape(len(CELLS), -1)).mean(axis=3)
    costs = np.sort(gaps, axis=2)[:, :, : len(CELLS) - MOST_OBJECTS].sum(axis=2)
    near = np.argsort(costs, axis=None)[:_SHORT_LIST]
    chosen = [(int(at) // len(STYLES), int(at) % len(STYLES)) for at in near]
    # a style shows in the outlines too, which decides where noise hides the texture
    both = dict.fromkeys([*chosen, *((chosen[0][0], style) for style in STYLES)])
    return [(BACKGROUNDS[name], style) for name, style in both]


# ---- sprites -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Sprites:
    """All sprites of one style with 2x2 pixels as one; n looks, P pixels. paint (n, 3P), cover (n, P), and their products
    paint*cover (n, 3P), cover^2 (n, P), |paint|^2 (n,)."""

    paint: np.ndarray
    cover: np.ndarray
    both: np.ndarray
    square: np.ndarray
    norm: np.ndarray


@lru_cache(maxsize=8)
def _sprites(style: int, side: int) -> _Sprites:
    drawn = [sprite(look.kind, look.state, look.colour, look.size, style, side) for look in LOOKS]
    paint_ = _pool(np.stack([each.paint for each in drawn]))
    cover = _pool(np.stack([each.cover for each in drawn]))
    count = len(LOOKS)
    flat, thin = paint_.reshape(count, -1), cover.reshape(count, -1)
    return _Sprites(flat, thin, (paint_ * cover).reshape(count, -1), thin**2, np.square(flat).sum(axis=1))


@lru_cache(maxsize=256)
def _sizes(name: str, style: int, size: int) -> np.ndarray:
    """(9, n): the squared size of what each sprite changes about each cell of a ground."""
    all_, soft = _sprites(style, cell_side(size)), _ground(name, style, size)[1]
    ground = soft.reshape(len(CELLS), -1)
    return all_.norm - 2 * ground @ all_.both.T + np.square(soft).sum(axis=3).reshape(len(CELLS), -1) @ all_.square.T


def _costs(soft: np.ndarray, name: str, style: int, size: int) -> np.ndarray:
    """(9, n + 1): the squared difference of each cell from each sprite on one ground; the last column: from the bare ground."""
    all_ = _sprites(style, cell_side(size))
    ground = _ground(name, style, size)[1]
    gap = soft - ground
    # |gap - (paint - cover * ground)|^2, multiplied out so that one library of sprites serves every ground
    across = gap.reshape(len(CELLS), -1) @ all_.paint.T - (gap * ground).sum(axis=3).reshape(len(CELLS), -1) @ all_.cover.T
    bare = np.square(gap).reshape(len(CELLS), -1).sum(axis=1, keepdims=True)
    return np.concatenate([bare + _sizes(name, style, size) - 2 * across, bare], axis=1)


def _match(cells: np.ndarray, soft: np.ndarray, costs: np.ndarray, name: str, style: int, size: int) -> tuple[float, Reading]:
    """The best sprite for every cell on one ground, as it would be drawn: (total squared residual, the reading)."""
    grounds = _ground(name, style, size)[0]
    short = np.argpartition(costs, _SHORT_LIST, axis=1)[:, :_SHORT_LIST]
    objects, residuals, softs = [], [], []
    for cell in CELLS:
        looks = [LOOKS[n] if n < len(LOOKS) else None for n in short[cell]]
        ground = grounds[cell]
        drawn = np.stack([paint(ground, look, style) if look else np.rint(ground) for look in looks])
        near = np.sqrt(np.square(soft[cell] - _pool(drawn)).mean(axis=(1, 2, 3)))
        best = int(np.argmin(near))
        softs.append(float(near[best]))
        residuals.append(float(np.sqrt(np.square(cells[cell] - drawn[best]).mean())))
        if looks[best] is not None:
            objects.append(Object(cell, looks[best]))
    return sum(value**2 for value in softs), Reading(Scene(name, tuple(objects), style), tuple(residuals), tuple(softs))


def warm_up(sizes: Sequence[int] = (SIZE,)) -> None:
    """Draw and keep all sprites, which the first `read` would otherwise do."""
    for size in sizes:
        for style in STYLES:
            _sprites(style, cell_side(size))
