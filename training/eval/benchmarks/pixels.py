"""What two pictures differ by, without any model: L1, PSNR, SSIM, and how far one is shifted against the other.

Pictures are float64 (H, W, 3) in 0..1 of one size. masks are bool (H, W), True where a pixel counts.
"""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import numpy as np

from ....reasonedit_core.errors import DataError

BLOCK = 16
"""Side of the squares that a change is looked for in; they overlap by half."""

NO_OP_BLOCK, NO_OP_TONE = 0.09, 0.04
"""`largest_change` up to these is no edit. Storing four photographs and a drawing as JPEG of quality 50 gave 0.075 and 0.020 at
most, of quality 30 0.084 and 0.027; scaling them to nine tenths and back 0.063 and 0.004; a VAE's round trip was not measured.
The mean over the whole picture would not do: a red square of 60 pixels in 512 x 512 changes it by 0.007."""

_SIGMA, _RADIUS = 1.5, 5  # Wang et al. 2004: an 11 x 11 Gaussian window of this spread
_C1, _C2 = 0.01**2, 0.03**2
_FURTHEST = 4  # a shift outside a mask is looked for up to this part of the sides
_SMALL = 256  # side at which SmartEdit's script takes its MSE

UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)
"""What Pillow raises for damaged files, DecompressionBombError apart, which is known only where Pillow is imported."""


def read_picture(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """A picture file, upright, transparency on white. size: (width, height) that it is brought to, bicubic.

    DataError for a file that is no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (*UNDECODABLE, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: expected a picture, found a file that cannot be decoded ({error}). Export it again."
        ) from error
    flat = Image.alpha_composite(Image.new("RGBA", upright.size, (255, 255, 255, 255)), upright).convert("RGB")
    if size is not None and flat.size != size:
        flat = flat.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(flat, dtype=np.float64) / 255


def read_mask(path: Path, size: tuple[int, int]) -> np.ndarray:
    """A mask file, white where an edit may change the picture -> (H, W), True where it may not, at `size` (width, height).

    Grey counts as white from the middle on. DataError for a file that is no picture, and for one that is white all over.
    """
    white = read_picture(path, size).mean(axis=2) >= 0.5
    if white.all():
        raise DataError(f"{path}: expected a mask with black in it, where nothing may change, found white alone. Draw it anew.")
    return ~white


def l1(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Mean absolute difference, 0..1."""
    _check(a, b, mask)
    return float(np.abs(a - b)[_where(a, mask)].mean())


def psnr(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal to noise in dB, of a peak of 1; infinite for equal pictures."""
    _check(a, b, mask)
    error = float(((a - b) ** 2)[_where(a, mask)].mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Structural similarity of Wang et al. 2004, -1..1: Gaussian window, mean over channels and over the pixels whose window
    lies inside the picture; with a mask over those of them that count. Pictures are 11 pixels wide and high at least."""
    _check(a, b, mask)
    if min(a.shape[:2]) <= 2 * _RADIUS:
        raise DataError(
            f"expected pictures of {2 * _RADIUS + 1} pixels and more, found {a.shape[1]} x {a.shape[0]}. Scale them."
        )
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    both = _blur(a * b) - mean_a * mean_b
    value = (2 * mean_a * mean_b + _C1) * (2 * both + _C2) / ((mean_a**2 + mean_b**2 + _C1) * (var_a + var_b + _C2))
    inner = None if mask is None else mask[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS]
    if inner is not None and not inner.any():
        raise DataError("expected a mask with pixels away from the border, found none there. Leave out SSIM for it.")
    return float(value[_where(value, inner)].mean())


def largest_change(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(block, tone): of all squares of BLOCK pixels the largest mean absolute difference, and the largest difference of the
    means of a channel. The first sees a small edit, the second a slight change of all the light, and neither sees noise."""
    _check(a, b, None)
    difference = a - b
    return float(_block_means(np.abs(difference).mean(axis=2)).max()), float(np.abs(_block_means(difference)).max())


def no_op(block: float, tone: float) -> bool:
    """Whether changes of `largest_change` are no edit."""
    return block <= NO_OP_BLOCK and tone <= NO_OP_TONE


def mse_small(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float | None:
    """Mean squared difference where the mask counts, of both brought to 256 x 256; None where nothing of the mask is left."""
    from PIL import Image

    _check(a, b, mask)
    size = (_SMALL, _SMALL)
    small = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST), bool)
    if not small.any():
        return None
    pair = [Image.fromarray(np.rint(each * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC) for each in (a, b)]
    one, two = (np.asarray(each, dtype=np.float64) / 255 for each in pair)
    return float(((one - two) ** 2)[small].mean())


def shift(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> tuple[float, float]:
    """(right, down): by how many pixels b's contents lie to the right of and below a's, by phase correlation of the grey
    pictures, to a fraction of a pixel. With a mask of what counts in both, by their normalised correlation (Padfield 2012), up
    to a quarter of the sides: phase correlation would see the mask's border, which never moves. Unrelated pictures give any
    number."""
    _check(a, b, mask)
    if mask is not None:
        return _masked_shift(a.mean(axis=2), b.mean(axis=2), mask)
    height, width = a.shape[:2]
    window = np.hanning(height)[:, None] * np.hanning(width)[None, :]
    one, two = (np.fft.fft2((grey - grey.mean()) * window) for grey in (a.mean(axis=2), b.mean(axis=2)))
    cross = two * one.conj()
    peaks = np.fft.ifft2(cross / np.maximum(np.abs(cross), 1e-12)).real
    down, right = np.unravel_index(int(peaks.argmax()), peaks.shape)
    return _fine(peaks[down, :], int(right)), _fine(peaks[:, right], int(down))


def compare(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float | None]:
    """All of them: l1, psnr (None for equal pictures, which have none), ssim (None where no window lies inside), shift (pixels,
    length). With a mask, ssim is of the pixels whose whole window counts: what lies beyond the mask would be seen through its
    border else."""
    whole = None if mask is None else _shrunk(mask)
    if np.array_equal(a, b):  # the anchors are; nothing needs to be computed
        _check(a, b, mask)
        return {"l1": 0.0, "psnr": None, "ssim": 1.0 if _inside(a, whole) else None, "shift": 0.0}
    decibels = psnr(a, b, mask)
    right, down = shift(a, b, mask)
    return {
        "l1": round(l1(a, b, mask), 6),
        "psnr": round(decibels, 4) if math.isfinite(decibels) else None,
        "ssim": round(ssim(a, b, whole), 6) if _inside(a, whole) else None,
        "shift": round(math.hypot(right, down), 3),
    }


def _block_means(x: np.ndarray) -> np.ndarray:
    """Means over all squares of two by two half blocks; the last half block of a side takes what is left over."""
    count = np.ones(x.shape)
    for axis in (0, 1):
        starts = np.arange(max(1, x.shape[axis] // (BLOCK // 2))) * (BLOCK // 2)
        x, count = (np.add.reduceat(each, starts, axis) for each in (x, count))
        if len(starts) > 1:
            low, high = (np.arange(len(starts) - 1) + at for at in (0, 1))
            x, count = (each.take(low, axis) + each.take(high, axis) for each in (x, count))
    return x / count


def _masked_shift(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> tuple[float, float]:
    """Of grey pictures (H, W); (0, 0) where what counts is flat."""
    reach = [side // _FURTHEST for side in mask.shape]
    size = tuple(side + most for side, most in zip(mask.shape, reach, strict=True))  # so that nothing wraps round within reach
    counts = mask.astype(np.float64)
    one, two = ((grey - grey[mask].mean()) * counts for grey in (a, b))
    of_mask, of_one, of_two, of_one2, of_two2 = (np.fft.rfft2(x, size) for x in (counts, one, two, one**2, two**2))

    def over(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.fft.irfft2(p.conj() * q, size)

    number = np.maximum(over(of_mask, of_mask), 1.0)
    sum_one, sum_two = over(of_one, of_mask), over(of_mask, of_two)
    spread_one = np.maximum(over(of_one2, of_mask) - sum_one**2 / number, 0)
    spread_two = np.maximum(over(of_mask, of_two2) - sum_two**2 / number, 0)
    spread = np.sqrt(spread_one * spread_two)
    near = [np.minimum(np.arange(n), n - np.arange(n)) <= most for n, most in zip(size, reach, strict=True)]
    good = near[0][:, None] & near[1][None, :] & (number >= mask.sum() / 2) & (spread > 1e-9 * mask.sum())
    if not good.any():
        return 0.0, 0.0
    found = np.where(good, (over(of_one, of_two) - sum_one * sum_two / number) / np.where(good, spread, 1), -1.0)
    down, right = np.unravel_index(int(found.argmax()), found.shape)
    return _fine(found[down, :], int(right)), _fine(found[:, right], int(down))


def _shrunk(mask: np.ndarray) -> np.ndarray:
    """The pixels around which all that SSIM's window covers is in the mask; beyond the picture nothing is missing."""
    for axis in (0, 1):
        wide = np.pad(mask, [(_RADIUS, _RADIUS) if each == axis else (0, 0) for each in (0, 1)], constant_values=True)
        mask = np.all([wide.take(range(at, at + mask.shape[axis]), axis=axis) for at in range(2 * _RADIUS + 1)], axis=0)
    return mask


def _inside(a: np.ndarray, mask: np.ndarray | None) -> bool:
    """There is a pixel that counts and whose window lies inside the picture."""
    whole = min(a.shape[:2]) > 2 * _RADIUS
    return whole and (mask is None or bool(mask[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS].any()))


def _fine(line: np.ndarray, at: int) -> float:
    """The top of the parabola through a peak and its two neighbours, as a signed shift."""
    size = len(line)
    before, peak, after = line[at - 1], line[at], line[(at + 1) % size]
    bend = before - 2 * peak + after
    found = at + (0.5 * (before - after) / bend if bend < 0 else 0.0)
    return float(found - size if found > size / 2 else found)


def _blur(x: np.ndarray) -> np.ndarray:
    """A Gaussian along both sides; only where the window is whole."""
    line = np.exp(-0.5 * (np.arange(-_RADIUS, _RADIUS + 1) / _SIGMA) ** 2)
    line /= line.sum()
    for axis in (0, 1):
        size = x.shape[axis] - 2 * _RADIUS
        x = sum(weight * x.take(np.arange(at, at + size), axis=axis) for at, weight in enumerate(line))
    return x


def _where(a: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    return np.ones(a.shape[:2], bool) if mask is None else mask


def _check(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None) -> None:
    if a.shape != b.shape or a.ndim != 3 or (mask is not None and mask.shape != a.shape[:2]):
        found = f"{a.shape}, {b.shape}" + ("" if mask is None else f" and a mask {mask.shape}")
        raise DataError(f"expected two pictures of one size, found {found}. Bring them to one size.")
    if mask is not None and not mask.any():
        raise DataError("expected a mask with pixels in it, found an empty one. Leave it out.")
