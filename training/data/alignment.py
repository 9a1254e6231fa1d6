"""Do the unchanged parts of two pictures lie on each other?

A pair whose target was cropped or resized another way than its input teaches the editor to shift and zoom: the drift that
users of edit models complain of most. The pictures are compared tile by tile with phase correlation at low resolution. Edited
tiles disagree with each other or match nothing; the tiles that stayed agree on one shift that grows evenly from the middle,
and that is the misalignment.

H, W: sides of the grey pictures; n: tiles, of t x t pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LEAST_TILE = 32
_REACH = 0.25  # part of a tile that a shift may have: beyond it, too little of the content is in both tiles
_PEAK, _CLEAR = 0.12, 1.6  # least height of a correlation peak (1: perfect), and least ratio to the next one
_TEXTURE = 2.0  # least standard deviation of a tile, in grey values
_FLOOR, _STEP = 0.35, 0.02  # how far from the common motion a tile may lie: pixels, and part of its distance from the middle
_AGREE, _LEAST, _SPREAD = 0.5, 6, 0.5  # agreeing tiles: part of the textured ones, number, part of each side they span


@dataclass(frozen=True, slots=True)
class Alignment:
    """How the second picture lies on the first: content at p went to p + shift + zoom * (p - middle).

    shift: (dx, dy) as parts of width and height; zoom: (x, y), 0.01 for 1 % larger. agreeing of textured tiles say so.
    """

    shift: tuple[float, float]
    zoom: tuple[float, float]
    agreeing: int
    textured: int

    def pixels(self, width: int, height: int) -> tuple[float, float]:
        """The shift of the middle in pixels of a picture of this size."""
        return self.shift[0] * width, self.shift[1] * height

    def drift(self, width: int, height: int) -> float:
        """The largest displacement inside a picture of this size, along x or y, in pixels."""
        return max(
            (abs(shift) + abs(zoom) / 2) * side
            for shift, zoom, side in zip(self.shift, self.zoom, (width, height), strict=True)
        )


def align(first: np.ndarray, second: np.ndarray) -> Alignment | None:
    """Compare two grey pictures (H, W), uint8, of equal size. None where the pictures do not tell.

    They do not tell when they are too small, have little texture, or were changed nearly everywhere.
    """
    if first.shape != second.shape or min(first.shape) < LEAST_TILE * 2:
        return None
    first, second = first.astype(np.float32), second.astype(np.float32)
    height, width = first.shape
    dy, dx = _coarse(first, second)
    part_a, part_b = _overlap(first, dy, dx), _overlap(second, -dy, -dx)
    if min(part_a.shape) < LEAST_TILE * 2:
        return None
    moves, places, textured = _tile_moves(part_a, part_b)
    if len(moves) < _LEAST:
        return None
    # places are those in the first picture, relative to its middle
    places = places + (max(0, -dy), max(0, -dx)) - (height / 2, width / 2)
    moves = moves + (dy, dx)
    agree = _consensus(moves, places)
    spread = np.ptp(places[agree], axis=0) / (np.ptp(places, axis=0) + 1e-9) if agree.sum() else np.zeros(2)
    if agree.sum() < max(_LEAST, _AGREE * textured) or spread.min() < _SPREAD:
        return None
    (shift_y, zoom_y), (shift_x, zoom_x) = (_line(places[agree, axis], moves[agree, axis]) for axis in (0, 1))
    return Alignment((shift_x / width, shift_y / height), (zoom_x, zoom_y), int(agree.sum()), textured)


def _coarse(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """A large common shift in whole pixels, as far as the whole pictures show one clearly; else (0, 0)."""
    window = np.outer(np.hanning(first.shape[0]), np.hanning(first.shape[1])).astype(np.float32)
    surface = _correlate(((first - first.mean()) * window)[None], ((second - second.mean()) * window)[None])[0]
    height, width = surface.shape
    y, x = np.unravel_index(surface.argmax(), surface.shape)
    dy, dx = (int(y) + height // 2) % height - height // 2, (int(x) + width // 2) % width - width // 2
    # The whole pictures hold the edit too, which lowers the peak: it counts when it stands out by itself.
    clear = surface[y, x] > max(_PEAK / 3, 2 * _CLEAR * _next_peak(surface[None], np.array([y]), np.array([x]))[0])
    return (dy, dx) if clear and abs(dy) < height / 4 and abs(dx) < width / 4 else (0, 0)


def _overlap(picture: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """The part of `picture` that is still inside after a move by (dy, dx)."""
    height, width = picture.shape
    return picture[max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]


def _tile_moves(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(n, 2) moves (dy, dx) of the tiles that tell one, (n, 2) their middles, and how many tiles have texture."""
    tile = max(LEAST_TILE, 1 << int(np.log2(min(first.shape) / 3)))
    ys, xs = (np.unique(np.linspace(0, side - tile, max(2, 2 * side // tile - 1)).round().astype(int)) for side in first.shape)
    corners = np.array([(y, x) for y in ys for x in xs])
    stacks = []
    for picture in (first, second):
        stack = np.stack([picture[y : y + tile, x : x + tile] for y, x in corners])
        stacks.append(stack - stack.mean(axis=(1, 2), keepdims=True))
    textured = (stacks[0].std(axis=(1, 2)) > _TEXTURE) & (stacks[1].std(axis=(1, 2)) > _TEXTURE)
    if not textured.any():
        return np.zeros((0, 2)), np.zeros((0, 2)), 0
    window = np.outer(np.hanning(tile), np.hanning(tile)).astype(np.float32)
    surface = _correlate(stacks[0][textured] * window, stacks[1][textured] * window)
    reach = int(tile * _REACH)
    centred = np.fft.fftshift(surface, axes=(1, 2))
    middle = tile // 2
    near = centred[:, middle - reach : middle + reach + 1, middle - reach : middle + reach + 1]
    peak = near.reshape(len(near), -1).argmax(axis=1)
    y, x = peak // near.shape[2] + middle - reach, peak % near.shape[2] + middle - reach
    height = centred[np.arange(len(y)), y, x]
    good = (height > _PEAK) & (height > _CLEAR * _next_peak(centred, y, x))
    moves = np.stack([_subpixel(centred, y, x, 0) - middle, _subpixel(centred, y, x, 1) - middle], axis=1)
    places = corners[textured] + (tile - 1) / 2
    return moves[good], places[good], int(textured.sum())


def _correlate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(n, H, W) twice -> phase correlation (n, H, W), 1 at d where second(x) = first(x - d). Fine detail counts for less."""
    height, width = first.shape[1:]
    cross = np.fft.rfft2(second) * np.conj(np.fft.rfft2(first))
    size = np.abs(cross)
    # Frequencies with less power than a noise of one grey value tell nothing: they are damped, not blown up to length one.
    cross /= size + 0.14 * height * width
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    weight = np.exp(-(fy**2 + fx**2) / (2 * 0.18**2))
    weight[0, 0] = 0
    total = np.fft.irfft2(weight, s=(height, width))[0, 0]
    return np.fft.irfft2(cross * weight, s=(height, width)) / total


def _next_peak(surface: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The highest value of each surface (n, H, W) outside the surroundings of (y, x)."""
    rest = surface.copy()
    radius = 4
    for index, (row, column) in enumerate(zip(y, x, strict=True)):
        rows = np.arange(row - radius, row + radius + 1) % surface.shape[1]
        columns = np.arange(column - radius, column + radius + 1) % surface.shape[2]
        rest[index][np.ix_(rows, columns)] = 0
    return rest.reshape(len(rest), -1).max(axis=1)


def _subpixel(surface: np.ndarray, y: np.ndarray, x: np.ndarray, axis: int) -> np.ndarray:
    """The peak's place along `axis` by a parabola through it and its two neighbours, on the logarithm (the peak is a bell)."""
    index, place = np.arange(len(y)), (y, x)[axis]
    step = np.array([(1, 0), (0, 1)][axis])

    def value(sign: int) -> np.ndarray:
        return np.log(np.maximum(surface[index, y + sign * step[0], x + sign * step[1]], 1e-6))

    before, peak, after = value(-1), value(0), value(1)
    bend = before - 2 * peak + after
    return place + np.where(bend < 0, np.clip((before - after) / np.where(bend < 0, 2 * bend, 1), -0.5, 0.5), 0)


def _consensus(moves: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Which tiles (n,) follow the commonest even motion, move = shift + zoom * place; every pair of tiles proposes one."""
    one, two = np.triu_indices(len(moves), 1)
    if len(one) > 4000:  # evenly thinned out: enough proposals, and the same each time
        one, two = one[:: len(one) // 4000 + 1], two[:: len(two) // 4000 + 1]
    apart = places[two] - places[one]
    zoom = ((moves[two] - moves[one]) * apart).sum(axis=1) / np.maximum((apart**2).sum(axis=1), 1)
    zoom = np.append(zoom, np.zeros(len(moves)))  # and each tile one without zoom
    one = np.append(one, np.arange(len(moves)))
    shift = moves[one] - zoom[:, None] * places[one]
    rest = np.abs(moves[None] - shift[:, None] - zoom[:, None, None] * places[None]).max(axis=2)
    allowed = _FLOOR + _STEP * np.abs(zoom[:, None]) * np.abs(places).max()
    votes = rest < np.maximum(allowed, 0.5)
    return votes[votes.sum(axis=1).argmax()]


def _line(place: np.ndarray, move: np.ndarray) -> tuple[float, float]:
    """Least squares: (shift at 0, zoom)."""
    zoom, shift = np.polyfit(place, move, 1)
    return float(shift), float(zoom)
