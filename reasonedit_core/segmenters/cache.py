"""Regions kept on the disk, so that a picture is segmented once: on the grid of the vision tower, under 600 bytes a region."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..files import write_whole
from ..interfaces import Segmenter
from ..types import Regions
from ..weightfiles import read_state
from .regions import select_regions

SUFFIX = ".safetensors"


class CachedRegions:
    """A `RegionFinder` over a folder. segmenter: finds what is not there yet; without one only what is there is given.

    A file's name is that of the picture's pixels, the grid and the segmenter.
    """

    def __init__(self, folder: str | Path, segmenter: Segmenter | None = None) -> None:
        self.folder, self.segmenter = Path(folder), segmenter

    def regions(self, image: Tensor, grid: int) -> Regions:
        """image (1, 3, H, W) in 0..1 -> regions on a grid of grid x grid, on the picture's device.

        Raises ConfigError where nothing is kept of this picture and nobody can find it, or where several segmenters have.
        """
        stem = f"{picture_digest(image)}-{grid}"
        if self.segmenter is None:
            found = sorted(self.folder.glob(f"{stem}-*{SUFFIX}"))
            if len(found) != 1:
                raise ConfigError(
                    f"{self.folder}: expected the regions of this picture ({stem}), found {len(found)} files of them. Segment "
                    "it first, or name a segmenter beside the cache."
                )
            return read_regions(found[0], image.device)
        file = self.folder / f"{stem}-{self.segmenter.name}{SUFFIX}"
        if not file.is_file():
            write_regions(file, select_regions(self.segmenter.segment(image), grid))
        return read_regions(file, image.device)


def picture_digest(image: Tensor) -> str:
    """sha256 of a picture's 8-bit pixels and size: the same wherever it lies, whatever the last bits of its floats."""
    pixels = (image.detach().to("cpu", torch.float32).clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
    return hashlib.sha256(repr((*pixels.shape,)).encode() + pixels.numpy().tobytes()).hexdigest()


def write_regions(path: str | Path, regions: Regions) -> Path:
    """Write masks (uint8) and geometry (float32) as one safetensors file."""
    from safetensors.torch import save

    tensors = {"masks": regions.masks, "geometry": regions.geometry}
    return write_whole(path, save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def read_regions(path: str | Path, device: torch.device | str = "cpu") -> Regions:
    """What `write_regions` wrote. Raises CheckpointError for another file."""
    state = read_state(Path(path))
    masks, geometry = state.get("masks"), state.get("geometry")
    fits = masks is not None and geometry is not None and masks.dim() == 3 and geometry.shape == (len(masks), 8)
    if not fits or masks.dtype != torch.uint8 or not len(masks):
        found = ", ".join(f"{name} {(*tensor.shape,)}" for name, tensor in state.items()) or "nothing"
        raise CheckpointError(f"{path}: expected masks (R, g, g) uint8 and geometry (R, 8), found {found}. Segment it again.")
    return Regions(masks.to(device), geometry.to(device))
