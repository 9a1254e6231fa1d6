"""The visual branch of FRCE, eq. 1: local features of patches and global features of SAM's regions.

B batch, N tokens of the vision tower (g x g), P patches, R regions, D the width of FRCE.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ...errors import ConfigError
from .attend import Block, require_valid, sincos_grid
from .spec import GEOMETRY, BrainSpec, Switches


class PatchBranch(nn.Module):
    """R_local = E_P(P(E_I(I))), eq. 1 left. P embeds the tokens of several depths of the vision tower, E_P encodes them."""

    def __init__(self, spec: BrainSpec) -> None:
        super().__init__()
        self.grid, self.merge = spec.grid, spec.merge
        self.embed = nn.Linear(len(spec.taps) * spec.vision * spec.merge**2, spec.frce)
        self.blocks = nn.ModuleList(Block(spec.frce, spec.frce_heads) for _ in range(spec.patch_blocks))
        self.norm = nn.LayerNorm(spec.frce)

    def forward(self, taps: Tensor) -> Tensor:
        """taps (B, N, len(taps) * d_v), rows of the grid one after another -> R_local (B, P, D), P = N / merge^2."""
        taps = rearrange(taps, "b (h p w q) c -> b (h w) (p q c)", h=self.grid // self.merge, p=self.merge, q=self.merge)
        x = self.embed(taps)
        x = x + sincos_grid(self.grid // self.merge, x.shape[-1], x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class RegionBranch(nn.Module):
    """R_global = E_R(SAM(E_I(I))), eq. 1 right.

    SAM takes pixels, so SAM(E_I(I)) is read as the mean of E_I(I) over each of SAM's masks, with the mask's geometry beside it.
    Regions have no positions but their geometry: their order says nothing.
    """

    def __init__(self, spec: BrainSpec) -> None:
        super().__init__()
        self.embed = nn.Linear(spec.vision + GEOMETRY, spec.frce)
        self.blocks = nn.ModuleList(Block(spec.frce, spec.frce_heads) for _ in range(spec.region_blocks))
        self.norm = nn.LayerNorm(spec.frce)

    def forward(self, image: Tensor, masks: Tensor, geometry: Tensor, keep: Tensor) -> Tensor:
        """image E_I(I) (B, N, d_v), masks (B, R, g, g) in 0..1, geometry (B, R, 8), keep (B, R) -> R_global (B, R, D).

        Raises ConfigError where a picture has no valid region.
        """
        require_valid(keep, "valid region", "Give masks that cover something, or use the grid segmenter.")
        weights = masks.flatten(2).to(image) * keep[..., None]
        mean = (weights @ image) / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6)
        x = self.embed(torch.cat([mean, geometry.to(image)], dim=-1))
        for block in self.blocks:
            x = block(x, keep)
        return self.norm(x)


class VisualBranch(nn.Module):
    """R_V = [R_local ; R_global] (text below eq. 1), told apart by learned type embeddings and projected once more."""

    def __init__(self, spec: BrainSpec, switches: Switches) -> None:
        super().__init__()
        if not switches.cues:
            raise ConfigError("expected a patch branch or a region branch, found both off. Build no FRCE at all then.")
        self.patches = PatchBranch(spec) if switches.patch_branch else None
        self.regions = RegionBranch(spec) if switches.region_branch else None
        self.types = nn.Parameter(torch.randn(2, spec.frce) * 0.02)
        self.out = nn.Linear(spec.frce, spec.frce)

    def forward(
        self, taps: Tensor, image: Tensor, masks: Tensor | None, geometry: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Features as in the branches -> R_V (B, P + R, D) and its mask (B, P + R); a branch that is off adds no tokens."""
        parts, keeps = [], []
        if self.patches is not None:
            parts.append(self.patches(taps) + self.types[0])
            keeps.append(torch.ones(parts[0].shape[:2], dtype=torch.bool, device=taps.device))
        if self.regions is not None:
            if masks is None or geometry is None or keep is None:
                raise ConfigError("expected masks, geometry and validity of regions, found none. Segment the picture first.")
            parts.append(self.regions(image, masks, geometry, keep) + self.types[1])
            keeps.append(keep)
        return self.out(torch.cat(parts, dim=1)), torch.cat(keeps, dim=1)
