"""A picture file as `check`, `index` and the converters see it: opened, decoded, upright, without torch."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
MAX_PIXELS = 100_000_000
MAX_ASPECT = 200
"""What `reasonedit_core.images` takes; a test keeps the numbers equal, so that what passes here also loads there."""

GREY_SIDE = 512
"""Long side of the grey picture that pairs are compared at."""

_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """What a decoded file is. size: (width, height), upright; grey: uint8 (h, w), long side at most GREY_SIDE.

    turned: an EXIF tag turns it; alpha: it has a transparent pixel; frames: how many it has.
    """

    size: tuple[int, int]
    sha256: str
    grey: np.ndarray
    turned: bool
    alpha: bool
    frames: int


class PictureFault(Exception):
    """A file that no picture can be made of. code: one of problems.CODES; found, fix: for the message."""

    def __init__(self, code: str, found: str, fix: str) -> None:
        super().__init__(found)
        self.code, self.found, self.fix = code, found, fix


def probe(path: Path) -> Probe:
    """Read and decode the whole file. PictureFault when it is absent, damaged, or of a size that cannot be taken."""
    data = _read(path)
    image = _open(data, path)
    check_size(*image.size)
    try:
        frames = getattr(image, "n_frames", 1)
        image.load()
        turned = image.getexif().get(_ORIENTATION, 1) in range(2, 9)
        upright = ImageOps.exif_transpose(image) if turned else image
        alpha = False
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            alpha = upright.getchannel("A").getextrema()[0] < 255
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, (255, 255, 255, 255)), upright)
        grey = _grey(upright)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _damaged(path, error) from error
    return Probe(upright.size, hashlib.sha256(data).hexdigest(), grey, turned, alpha, frames)


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) after the EXIF turn, from the file's head alone. PictureFault as for `probe`, damage inside excepted."""
    if not exists(path):
        raise absent(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                turned = image.getexif().get(_ORIENTATION, 1) in range(5, 9)
                width, height = image.size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _damaged(path, error) from error
    check_size(width, height)
    return (height, width) if turned else (width, height)


def check_size(width: int, height: int) -> None:
    """PictureFault for a picture that no system can take."""
    if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
        fix = f"scale or crop it to at most {MAX_PIXELS // 10**6} million pixels and {MAX_ASPECT}:1."
        raise PictureFault("picture-size", f"{width} x {height}", fix)


def exists(path: Path) -> bool:
    """There is such a file; no error for a name that the file system does not take."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_picture(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _read(path: Path) -> bytes:
    if not exists(path):
        raise absent(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path, error) from error


def _open(data: bytes, path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            # Our own limit speaks more clearly than Pillow's warning about large files.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        found = f"a file of {len(data)} bytes that is no picture"
        raise PictureFault("unreadable-picture", found, "export it as PNG, JPEG or WebP.") from error
    except Image.DecompressionBombError as error:
        raise PictureFault("picture-size", str(error), f"scale it to {MAX_PIXELS // 10**6} million pixels at most.") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise _damaged(path, error) from error


def _grey(image: Image.Image) -> np.ndarray:
    if image.mode == "F" or image.mode.startswith("I"):  # deep greyscale: Pillow's convert would clip it at 255
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 65535:
            raise ValueError(f"greyscale values {low:g}..{high:g}, which are not in 0..65535")
        full = (1.0 if high <= 1 else 255.0 if high <= 255 else 65535.0) if image.mode == "F" else 65535.0
        image = Image.fromarray(np.rint(values * (255 / full)).astype(np.uint8))
    image = image.convert("L")
    scale = GREY_SIDE / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BOX)
    return np.asarray(image).copy()


def absent(path: Path) -> PictureFault:
    """What to say of a file that is not there."""
    if len(path.name) < 256 and path.is_dir():  # longer names are errors of their own to the file system
        return PictureFault("missing-picture", f"a folder at {path}", "name a file.")
    near = next((each for each in _siblings(path) if each.name.lower() == path.name.lower() or each.stem == path.stem), None)
    fix = "put the file there, or correct the path (it is relative to the JSONL file)."
    return PictureFault("missing-picture", f"nothing at {path}", f"did you mean {near.name}?" if near else fix)


def _siblings(path: Path) -> list[Path]:
    try:
        return [each for each in path.parent.iterdir() if is_picture(each)]
    except OSError:
        return []


def _damaged(path: Path, error: Exception) -> PictureFault:
    return PictureFault("unreadable-picture", f"a file that cannot be decoded ({error})", "copy or export the picture again.")
