"""Which tokens of the target are edited: from what they are heading for, or from a mask.

N tokens of the target, on a grid of (height, width); C channels of a packed latent token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..latents import pack, unpack
from ..types import LatentImage

Grid = tuple[int, int]
"""(height, width) in tokens."""


def found_tokens(
    estimate: Tensor, source: LatentImage, grid: Grid, *, threshold: float, erode: int = 1, dilate: int = 2
) -> Tensor:
    """(N,) bool: where `estimate` (1, N, C), the final latents as one step sees them, is not what `source` shows.

    A token is edited where the cosine of the two is at most `threshold`; what is found is cleaned up. RegionE's rule. A source
    on another grid (Qwen-Image references have sizes of their own) is compared as its latents are, resized.
    """
    wanted = _on_grid(source, grid).to(estimate.device, torch.float32)
    likeness = functional.cosine_similarity(estimate.float(), wanted, dim=-1)[0]
    return cleaned((likeness <= threshold).view(grid), erode, dilate).flatten()


def masked_tokens(mask: Tensor, grid: Grid) -> Tensor:
    """(N,) bool on the CPU: where any pixel of mask (1, 1, H, W), over the same picture in any size, is at least 0.5."""
    covered = functional.adaptive_max_pool2d(mask.detach().to("cpu", torch.float32), grid)
    return (covered[0, 0] >= 0.5).flatten()


def cleaned(edited: Tensor, erode: int, dilate: int) -> Tensor:
    """edited (height, width) bool, eroded by a cross `erode` times, then grown by a square of `dilate` tokens on each side.

    The first removes specks; the second takes back what it cost at the edges, and more. Beyond its border the picture goes on.
    """
    grown = edited[None, None].float()
    for _ in range(erode):
        # The least over the cross is the lesser of the least over its two bars.
        bars = ((3, 1), (1, 3))
        shrunk = [-functional.max_pool2d(-grown, bar, stride=1, padding=(bar[0] // 2, bar[1] // 2)) for bar in bars]
        grown = torch.minimum(*shrunk)
    if dilate:
        grown = functional.max_pool2d(grown, 2 * dilate + 1, stride=1, padding=dilate)
    return grown[0, 0] > 0.5


def _on_grid(source: LatentImage, grid: Grid) -> Tensor:
    """The tokens of `source`, (1, N, C), on `grid`."""
    if (source.height, source.width) == tuple(grid):
        return source.tokens
    size = (2 * grid[0], 2 * grid[1])
    latents = unpack(source.tokens.float(), source.height, source.width)
    return pack(functional.interpolate(latents, size, mode="bilinear", antialias=True, align_corners=False))
