"""Pictures: files <-> tensors, resizes, and the sizes that the systems generate at.

A picture is a float tensor (1, 3, H, W) in 0..1 whose values are k/255. PIL is used at the edges and for the two resizes whose
exact result belongs to the released systems.
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from .errors import ConfigError, DataError
from .files import write_whole

MAX_PIXELS = 100_000_000
MAX_ASPECT = 200

_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture from a file. rgb (1, 3, H, W) in 0..1; alpha (1, 1, H, W) in 0..1, or None when the file has none.

    note: what was done to the file's pixels, in words for the user; empty when nothing was.
    """

    rgb: torch.Tensor
    alpha: torch.Tensor | None = None
    note: str = ""


def load_image(path: str | Path) -> Picture:
    """Read a picture file of any common mode: upright by its EXIF tag, transparency laid on white and kept as alpha."""
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing"
        raise ConfigError(f"Expected a picture file at {path}, found {kind}. Check the path.")
    try:
        with warnings.catch_warnings():
            # Our own limit below speaks more clearly than Pillow's warning about large files.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path)
            check_size(image.width, image.height, name=str(path))
            image.load()
    except Image.DecompressionBombError as error:
        raise ConfigError(
            f"{path}: the picture has more than {MAX_PIXELS // 10**6} million pixels ({error}). Scale it down first."
        ) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: expected a picture (PNG, JPEG, WebP, TIFF, BMP, GIF), found a file that is none of them "
            f"({path.stat().st_size} bytes). Export it in one of these formats."
        ) from error
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DataError(
            f"{path}: the picture cannot be decoded ({error}); the file is probably cut short or damaged. "
            "Copy or download it again."
        ) from error
    return _normalise(image, path)


def check_size(width: int, height: int, *, name: str = "the picture") -> None:
    """Raise ConfigError for a picture that no system can take: empty, over 100 million pixels, or longer than 200:1."""
    if min(width, height) < 1:
        raise ConfigError(f"{name}: expected at least 1 x 1 pixel, found {width} x {height}.")
    if width * height > MAX_PIXELS:
        raise ConfigError(
            f"{name}: {width} x {height} is {width * height / 1e6:.0f} million pixels; at most {MAX_PIXELS // 10**6} million "
            "can be taken. Scale it down first: edits are made at about one million pixels."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ConfigError(
            f"{name}: {width} x {height} is longer than {MAX_ASPECT}:1, which the vision encoder cannot see. "
            "Crop it or cut it into pieces."
        )


def _normalise(image: Image.Image, path: Path) -> Picture:
    """The decoded image -> upright 8-bit RGB and alpha, with a note of what was done."""
    notes = []
    if getattr(image, "n_frames", 1) > 1:
        notes.append(f"first of {image.n_frames} frames")
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    if orientation in range(2, 9):
        notes.append(f"turned upright (EXIF orientation {orientation})")
        image = ImageOps.exif_transpose(image)
    mode = image.mode
    if mode == "F" or mode.startswith("I"):
        notes.append(f"{mode} greyscale scaled to 8 bits")
        image = _deep_to_8bit(image, path)
    elif mode not in ("RGB", "RGBA"):
        notes.append(f"converted from {mode}")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = _from_array(np.asarray(image.getchannel("A"))[..., None])
        if int(alpha.min() * 255) < 255:
            notes.append("transparency laid on white")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return Picture(from_pil(image), alpha, "; ".join(notes))


def _deep_to_8bit(image: Image.Image, path: Path) -> Image.Image:
    """16-bit, 32-bit and float greyscale -> L. Pillow's own convert would clip at 255 instead of scaling."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)) or low < 0 or high > 65535:
        raise DataError(
            f"{path}: expected greyscale values in 0..65535 (or 0..1 as float), found {low:g}..{high:g} in mode "
            f"{image.mode}. Convert it to 8 or 16 bits per channel."
        )
    if image.mode == "F":
        full = 1.0 if high <= 1 else 255.0 if high <= 255 else 65535.0
    else:
        full = 65535.0
    return Image.fromarray(np.rint(values * (255.0 / full)).astype(np.uint8))


def _from_array(array: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, C) -> (1, C, H, W) in 0..1. Division in float32, as the released pipelines do."""
    return torch.from_numpy(array.copy()).permute(2, 0, 1)[None].float().contiguous() / 255.0


def from_pil(image: Image.Image) -> torch.Tensor:
    """PIL image -> (1, 3, H, W) in 0..1; whatever alpha it has is dropped (see `load_image`)."""
    return _from_array(np.asarray(image.convert("RGB")))


def to_pil(picture: torch.Tensor) -> Image.Image:
    """(1, 3, H, W) in 0..1 -> RGB image, rounded to 8 bits."""
    array = picture[0].detach().clamp(0, 1).permute(1, 2, 0).cpu().float().numpy()
    return Image.fromarray((array * 255).round().astype(np.uint8))


def quantize(pixels: torch.Tensor) -> torch.Tensor:
    """VAE output (1, 3, H, W) in -1..1 -> picture (1, 3, H, W) with values k/255, rounded as the released pipelines do.

    The map to 0..1 is made in the dtype of `pixels` (bfloat16 there loses bits; so does the release), the rest in float32.
    """
    picture = (pixels * 0.5 + 0.5).clamp(0, 1).float()
    return (picture * 255).round() / 255.0


def save_png(picture: torch.Tensor, path: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write (1, 3, H, W) in 0..1 as PNG, whole or not at all. metadata: text entries; other values are stored as JSON."""
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    buffer = io.BytesIO()
    to_pil(picture).save(buffer, format="PNG", pnginfo=info)
    write_whole(path, buffer.getvalue())


def resize_lanczos_pil(picture: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """(1, 3, H, W) -> (1, 3, height, width) through 8 bits and PIL's Lanczos filter, on the picture's device."""
    return _resize_pil(picture, width, height, Image.Resampling.LANCZOS)


def resize_bicubic_pil(picture: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """(1, 3, H, W) -> (1, 3, height, width) through 8 bits and PIL's bicubic filter, on the picture's device."""
    return _resize_pil(picture, width, height, Image.Resampling.BICUBIC)


def _resize_pil(picture: torch.Tensor, width: int, height: int, filter: Image.Resampling) -> torch.Tensor:
    if picture.shape[-2:] == (height, width):
        return picture
    return from_pil(to_pil(picture).resize((width, height), filter)).to(picture.device)


def resize_bilinear(picture: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """(1, 3, H, W) -> (1, 3, height, width), torch's bilinear with antialias in float32."""
    # Contiguous, as in the release: a convolution rounds otherwise on other memory layouts.
    picture = picture.float().contiguous()
    return torch.nn.functional.interpolate(picture, (height, width), mode="bilinear", antialias=True)


def step1x_size(width: int, height: int, level: int, multiple: int = 16) -> tuple[int, int]:
    """(width, height) that Step1X-Edit generates at: area about level squared, sides floored to `multiple`.

    The longer side is rounded up first and the other follows from it; small pictures are enlarged too.
    """
    ratio = width / height
    if width > height:
        new_width = math.ceil(math.sqrt(level * level * ratio))
        new_height = math.ceil(new_width / ratio)
    else:
        new_height = math.ceil(math.sqrt(level * level / ratio))
        new_width = math.ceil(new_height * ratio)
    return _at_least(new_width // multiple * multiple, multiple), _at_least(new_height // multiple * multiple, multiple)


def qwen_size(width: int, height: int, area: int, multiple: int = 32) -> tuple[int, int]:
    """(width, height) of about `area` pixels with the sides rounded to `multiple`, as the Qwen-Image-Edit pipelines do."""
    ratio = width / height
    new_width = math.sqrt(area * ratio)
    new_height = new_width / ratio
    return (
        _at_least(round(new_width / multiple) * multiple, multiple),
        _at_least(round(new_height / multiple) * multiple, multiple),
    )


def _at_least(side: int, multiple: int) -> int:
    """A very long picture at a small size would get a side of 0, on which the released code stops with an error."""
    return max(side, multiple)
