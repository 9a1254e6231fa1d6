"""From masks of a picture to the regions of ReasonBrain's region branch.

N masks found, R regions kept, g the side of the vision tower's grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from ..interfaces import Segmenter
from ..types import FoundMasks, Regions

LIMIT = 32
"""Regions of one picture, the background among them."""


def select_regions(
    found: FoundMasks,
    grid: int,
    *,
    limit: int = LIMIT,
    overlap: float = 0.7,
    smallest: float = 0.001,
    largest: float = 0.95,
) -> Regions:
    """The regions worth a token: large and certain ones first, no two alike, and the background.

    smallest, largest: areas (shares of the picture) outside of which a mask is dropped. overlap: of two masks with a larger IoU
    the second is dropped. The background is what no kept mask covers, so a picture in which nothing was found is one region.
    Raises ConfigError for masks that are not (N, H, W).
    """
    masks = found.masks
    if masks.dim() != 3 or min(masks.shape[1:]) < 1:
        raise ConfigError(f"expected masks of shape (N, H, W), found {(*masks.shape,)}. Stack the masks of one picture.")
    flat = masks.flatten(1).bool().float()
    area = flat.mean(dim=1)
    kept: list[int] = []
    if len(masks):
        both = flat @ flat.T
        either = (flat.sum(1)[:, None] + flat.sum(1)[None] - both).clamp(min=1)
        alike = both / either > overlap
        for n in (area * found.iou.to(area)).argsort(descending=True, stable=True).tolist():
            fits = smallest <= float(area[n]) <= largest and not any(alike[n, other] for other in kept)
            if fits and len(kept) < limit - 1:
                kept.append(n)
    chosen = masks[kept].bool()
    background = ~chosen.any(dim=0)
    ones = torch.ones(len(kept), device=masks.device)
    rows = [(chosen, found.iou[kept].to(ones), found.stability[kept].to(ones), 0 * ones)]
    if background.any():
        rows.insert(0, (background[None], *torch.ones(3, 1, device=masks.device)))
    pixels, iou, stability, is_background = (torch.cat(parts) for parts in zip(*rows, strict=True))
    geometry = torch.cat([_boxes(pixels), torch.stack([iou, stability, is_background], dim=1)], dim=1)
    shares = functional.adaptive_avg_pool2d(pixels.float()[None], grid)[0]
    # A region smaller than a token would round to nothing; the token with most of it keeps it.
    shares = torch.where(shares > 0, shares.clamp(min=1 / 255), shares)
    return Regions((shares * 255).round().to(torch.uint8), geometry.float())


def user_masks(masks: Tensor) -> FoundMasks:
    """Masks that a user drew, (N, H, W) in 0..1 or bool, as certain finds. Raises ConfigError where none covers anything."""
    if masks.dim() == 2:
        masks = masks[None]
    drawn = masks > 0.5 if masks.is_floating_point() else masks.bool()
    drawn = drawn[drawn.flatten(1).any(dim=1)] if drawn.dim() == 3 else drawn
    if drawn.dim() != 3 or not len(drawn):
        raise ConfigError(
            f"expected a mask that covers something, found {(*masks.shape,)} without a pixel over 0.5. Draw a mask, or leave "
            "it out and let a segmenter find the regions."
        )
    sure = torch.ones(len(drawn), device=drawn.device)
    return FoundMasks(drawn, sure, sure)


class SegmentedRegions:
    """A `RegionFinder`: what a segmenter finds in each picture, selected."""

    def __init__(self, segmenter: Segmenter) -> None:
        self.segmenter = segmenter

    def regions(self, image: Tensor, grid: int) -> Regions:
        """image (1, 3, H, W) in 0..1 -> at most 32 regions on a grid of grid x grid."""
        return select_regions(self.segmenter.segment(image), grid)


class GivenRegions:
    """A `RegionFinder` that answers with the masks of a user, whatever the picture: a chained edit keeps the places."""

    def __init__(self, masks: Tensor) -> None:
        """masks (N, H, W) or (H, W), in 0..1 or bool. Raises ConfigError where none covers anything."""
        self.found = user_masks(masks)

    def regions(self, image: Tensor, grid: int) -> Regions:
        """The masks and their background as regions, on the picture's device; all of them, whatever their size."""
        made = select_regions(self.found, grid, limit=len(self.found.masks) + 1, overlap=1.0, smallest=0.0, largest=1.0)
        return Regions(made.masks.to(image.device), made.geometry.to(image.device))


class KnownRegions:
    """A `RegionFinder` that answers with regions found before, whatever the picture."""

    def __init__(self, known: Regions) -> None:
        self.known = known

    def regions(self, image: Tensor, grid: int) -> Regions:
        """The regions, on the picture's device. Raises ConfigError where they are of another grid."""
        if self.known.masks.shape[-1] != grid:
            raise ConfigError(
                f"expected regions on a grid of {grid}, found {self.known.masks.shape[-1]}. Find them with the same model."
            )
        return Regions(self.known.masks.to(image.device), self.known.geometry.to(image.device))


class GridSegmenter:
    """A segmenter without a network: boxes of equal size, side x side of them."""

    def __init__(self, side: int = 4) -> None:
        if side < 1:
            raise ConfigError(f"grid segmenter: expected at least one box a side, found {side}.")
        self.side = side
        self.name = f"grid{side}"

    def segment(self, image: Tensor) -> FoundMasks:
        """image (1, 3, H, W) -> side^2 masks that cover it without overlap; fewer where it has fewer rows or columns."""
        height, width = image.shape[-2:]
        rows, columns = (torch.arange(n, device=image.device) * self.side // n for n in (height, width))
        number = rows[:, None] * self.side + columns[None]
        masks = torch.stack([number == n for n in number.unique()])
        sure = torch.ones(len(masks), device=image.device)
        return FoundMasks(masks, sure, sure)


def batch_regions(pictures: Sequence[Regions]) -> tuple[Tensor, Tensor, Tensor]:
    """Regions of several pictures -> masks (B, R, g, g) float in 0..1, geometry (B, R, 8), keep (B, R); padding behind."""
    most = max(len(regions.masks) for regions in pictures)

    def padded(x: Tensor) -> Tensor:
        return functional.pad(x, (0, 0) * (x.dim() - 1) + (0, most - len(x)))

    masks = torch.stack([padded(regions.masks.float() / 255) for regions in pictures])
    geometry = torch.stack([padded(regions.geometry) for regions in pictures])
    keep = torch.stack([padded(torch.ones(len(regions.masks), dtype=torch.bool)) for regions in pictures])
    return masks, geometry, keep.to(masks.device)


def _boxes(pixels: Tensor) -> Tensor:
    """pixels (R, H, W) bool, none empty -> centre x, y, width, height, area, each a share: (R, 5)."""
    height, width = pixels.shape[1:]
    out = []
    for mask in pixels:
        y, x = mask.nonzero(as_tuple=True)
        left, right, top, bottom = x.min() / width, (x.max() + 1) / width, y.min() / height, (y.max() + 1) / height
        out.append(torch.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top, mask.float().mean()]))
    return torch.stack(out)
