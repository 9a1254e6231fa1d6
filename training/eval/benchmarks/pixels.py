"""What two pictures differ by, without any model: L1, PSNR, SSIM, and how far one is shifted against the other.

Pictures are float64 (H, W, 3) in 0..1 of one size. masks are bool (H, W), True where a pixel counts.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ....reasonedit_core.errors import DataError

NO_OP = 0.01
"""An L1 up to this is no edit: what a VAE and a JPEG do to a picture stays below it on most pictures."""

_SIGMA, _RADIUS = 1.5, 5  # Wang et al. 2004: an 11 x 11 Gaussian window of this spread
_C1, _C2 = 0.01**2, 0.03**2


def read_picture(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """A picture file, upright, transparency on white. size: (width, height) that it is brought to, bicubic.

    DataError for a file that is no picture.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, SyntaxError, ValueError) as error:
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


def shift(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(right, down): by how many pixels b's contents lie to the right of and below a's, by phase correlation of the grey
    pictures, to a fraction of a pixel. Unrelated pictures give any number."""
    _check(a, b, None)
    height, width = a.shape[:2]
    window = np.hanning(height)[:, None] * np.hanning(width)[None, :]
    one, two = (np.fft.fft2((grey - grey.mean()) * window) for grey in (a.mean(axis=2), b.mean(axis=2)))
    cross = two * one.conj()
    peaks = np.fft.ifft2(cross / np.maximum(np.abs(cross), 1e-12)).real
    down, right = np.unravel_index(int(peaks.argmax()), peaks.shape)
    return _fine(peaks[down, :], int(right)), _fine(peaks[:, right], int(down))


def compare(a: np.ndarray, b: np.ndarray, mask: np.ndarray | None = None) -> dict[str, float | None]:
    """All of them: l1, psnr (None for equal pictures, which have none), ssim (None where no window lies inside), shift (pixels,
    length, of the whole pictures). With a mask, ssim is of the pixels whose whole window counts: what lies beyond the mask
    would be seen through its border else."""
    decibels, whole = psnr(a, b, mask), None if mask is None else _shrunk(mask)
    right, down = shift(a, b)
    return {
        "l1": round(l1(a, b, mask), 6),
        "psnr": round(decibels, 4) if math.isfinite(decibels) else None,
        "ssim": round(ssim(a, b, whole), 6) if _inside(a, whole) else None,
        "shift": round(math.hypot(right, down), 3),
    }


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
