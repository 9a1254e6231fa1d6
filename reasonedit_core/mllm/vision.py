"""Pictures to the patches that the vision tower of Qwen2.5-VL reads.

Written in torch so that no image processor of transformers (and with it torchvision) is needed at run time. The pixels equal
those of the processor that the released pipelines get from `AutoProcessor` (the torchvision-backed one: bicubic with
antialias on 8-bit pixels, then rescale and normalise in one step).
"""

from __future__ import annotations

import hashlib
import math
import weakref
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image
from torch.nn import functional

from ..errors import ConfigError

PATCH = 14
MERGE = 2
TEMPORAL = 2
CELL = PATCH * MERGE
"""Side in pixels of what becomes one token."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

MAX_ASPECT = 200
SNAP_PIXELS = (4 * CELL**2, 16384 * CELL**2)
"""Bounds of the first resize of `snap`, as `qwen_vl_utils` has them."""


@dataclass(frozen=True, slots=True)
class Patches:
    """One picture, ready for the vision tower.

    values: (n, 1176) float32, n = height * width of the patch grid, ordered by merged cell; grid: (height, width) in
    patches; resized: (H, W) in pixels; key: names picture and size, equal for equal pixels.
    """

    values: torch.Tensor
    grid: tuple[int, int]
    resized: tuple[int, int]
    key: str


def smart_resize(
    height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int = CELL, at_least_one: bool = False
) -> tuple[int, int]:
    """(height, width) as multiples of `factor` whose area lies within the bounds, near the given aspect ratio.

    at_least_one: round a side up to one `factor` before the area is looked at, as `qwen_vl_utils` does and the processor
    does not. Raises ConfigError beyond an aspect ratio of 200, which the vision tower was never shown.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ConfigError(
            f"the picture is {width}x{height}: expected an aspect ratio of at most {MAX_ASPECT}:1, "
            f"found {max(height, width) / min(height, width):.0f}:1. Crop it."
        )
    if not 0 < min_pixels <= max_pixels:
        raise ConfigError(f"pixel bounds: expected 0 < min <= max, found min {min_pixels}, max {max_pixels}.")
    floor = factor if at_least_one else 0
    rows, columns = (max(floor, round(side / factor) * factor) for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return tuple(max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width))
    if rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def to_bytes(image: torch.Tensor) -> torch.Tensor:
    """(1, 3, H, W) in 0..1 -> (1, 3, H, W) uint8 on the CPU. Exact for pictures that came from 8-bit files."""
    if image.ndim != 4 or image.shape[:2] != (1, 3) or 0 in image.shape:
        raise ConfigError(f"expected a picture of shape (1, 3, height, width), found {tuple(image.shape)}.")
    return image.detach().float().mul(255).round().clamp(0, 255).to("cpu", torch.uint8)


def prepare(
    image: torch.Tensor, *, min_pixels: int, max_pixels: int, max_side: int | None = None, snap: bool = False
) -> tuple[torch.Tensor, tuple[int, int], str]:
    """What is shown to the tower, before the resize that fits it: picture (1, 3, h, w) uint8, size (H, W), key.

    max_side: shrink a longer side to this first. snap: then resize to multiples of 28 with Pillow, whatever the bounds
    (the released reasoner and the v1.1 conditioner do so, and the processor resizes a second time).
    """
    pixels = to_bytes(image)
    if max_side is not None and max(pixels.shape[-2:]) > max_side:
        pixels = _thumbnail(pixels, max_side)
    if snap:
        low, high = SNAP_PIXELS
        size = smart_resize(*pixels.shape[-2:], min_pixels=low, max_pixels=high, at_least_one=True)
        pixels = _from_pil(_to_pil(pixels).resize(size[::-1], Image.Resampling.BICUBIC))
    size = smart_resize(*pixels.shape[-2:], min_pixels=min_pixels, max_pixels=max_pixels)
    content = hashlib.blake2b(np.ascontiguousarray(pixels.numpy()).data, digest_size=16)
    height, width = pixels.shape[-2:]
    return pixels, size, f"{content.hexdigest()}:{width}x{height}:{size[1]}x{size[0]}"


class Shown:
    """The keys of pictures that were prepared, by tensor: resizing and hashing one costs more than all that follows from its
    key. A tensor that was written to since, or another one, is not known. kept: how many are."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._keys: OrderedDict[tuple, tuple[weakref.ref[torch.Tensor], str]] = OrderedDict()

    def key_of(self, image: torch.Tensor, how: tuple) -> str | None:
        """The key that was noted for this tensor, prepared as `how` says."""
        noted, key = self._keys.get(_name(image, how), (None, None))
        return key if noted is not None and noted() is image else None

    def note(self, image: torch.Tensor, how: tuple, key: str) -> None:
        """Remember a key."""
        if image.is_inference():  # such tensors do not count how often they were written to
            return
        self._keys[_name(image, how)] = (weakref.ref(image), key)
        while len(self._keys) > self._kept:
            self._keys.popitem(last=False)


def _name(image: torch.Tensor, how: tuple) -> tuple:
    return (id(image), 0 if image.is_inference() else image._version, *how)


def patchify(pixels: torch.Tensor, size: tuple[int, int], key: str = "") -> Patches:
    """Resize, normalise and cut. pixels: (1, 3, h, w) uint8; size: (H, W), multiples of 28."""
    if tuple(pixels.shape[-2:]) != tuple(size):
        # On uint8 and the CPU, torch resizes with Pillow's fixed-point arithmetic; floats would differ by up to 1/255.
        pixels = functional.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
    # (x - 255 mean) / (255 std) in this order: the processor fuses rescale and normalise, and rounding follows the order.
    mean, std = (torch.tensor(v).mul(255.0).view(1, 3, 1, 1) for v in (MEAN, STD))
    values = pixels.float().sub_(mean).div_(std)
    cells = rearrange(values, "1 c (gh mh ph) (gw mw pw) -> (gh gw mh mw) c ph pw", mh=MERGE, mw=MERGE, ph=PATCH, pw=PATCH)
    flat = repeat(cells, "n c ph pw -> n (c t ph pw)", t=TEMPORAL)
    return Patches(flat, (size[0] // PATCH, size[1] // PATCH), (size[0], size[1]), key)


def preprocess(
    image: torch.Tensor, *, min_pixels: int, max_pixels: int, max_side: int | None = None, snap: bool = False
) -> Patches:
    """(1, 3, H, W) in 0..1 -> Patches. The arguments are those of `prepare`."""
    return patchify(*prepare(image, min_pixels=min_pixels, max_pixels=max_pixels, max_side=max_side, snap=snap))


def _thumbnail(pixels: torch.Tensor, max_side: int) -> torch.Tensor:
    # Pillow itself: its box reduction before the bicubic filter is part of what the reasoner was shown.
    picture = _to_pil(pixels)
    picture.thumbnail((max_side, max_side))
    return _from_pil(picture)


def _to_pil(pixels: torch.Tensor) -> Image.Image:
    return Image.fromarray(rearrange(pixels, "1 c h w -> h w c").contiguous().numpy())


def _from_pil(picture: Image.Image) -> torch.Tensor:
    return rearrange(torch.from_numpy(np.array(picture)), "h w c -> 1 c h w").contiguous()
