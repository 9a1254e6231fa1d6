"""FLUX.1-dev as ReasonBrain's denoiser: the source's latents beside the noisy ones, residuals behind `x_embedder`.

B batch, N latent tokens of an h x w grid (pixels / 16), C their channels (64), T context tokens. One pass: the guidance is
distilled into the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import CheckpointError, ConfigError
from ..types import Conditioning, Counts, LatentImage
from .stock import load_stock
from .unet import residual_map

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


class ResidualLinear(nn.Linear):
    """A Linear that adds whatever channels follow its own to its output (see `unet.ResidualConv`)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, N, in + out or in) -> (B, N, out)."""
        out = super().forward(x[..., : self.in_features])
        return out if x.shape[-1] == self.in_features else out + x[..., self.in_features :]


@torch.no_grad()
def widen_flux(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Give `x_embedder` the source's channels (64 -> 128, the layout of FLUX's control models; weights zero), in place.

    A transformer that has them already keeps its weights. CheckpointError for another number of channels.
    """
    old, channels = transformer.x_embedder, transformer.out_channels
    if old.in_features not in (channels, 2 * channels):
        raise CheckpointError(
            f"expected a FLUX transformer of {channels} or {2 * channels} input channels, found {old.in_features}. Fill models "
            "are of another kind; name FLUX.1-dev."
        )
    new = ResidualLinear(2 * channels, old.out_features).to(old.weight)
    new.weight.zero_()
    new.weight[:, : old.in_features] = old.weight
    new.bias.copy_(old.bias)
    transformer.x_embedder = new
    transformer.register_to_config(in_channels=2 * channels, out_channels=channels)
    return transformer


def load_flux(
    path: str | Path, *, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu"
) -> FluxTransformer2DModel:
    """A FLUX transformer from a local diffusers folder, widened. Raises CheckpointError."""
    return widen_flux(load_stock(path, "FluxTransformer2DModel", "the transformer folder", dtype)).to(device)


class FluxDenoiser:
    """One velocity prediction (noise - latents). guidance: of the distilled model, 3.5 in its own pipeline."""

    kind: Literal["velocity"] = "velocity"

    def __init__(self, transformer: FluxTransformer2DModel, *, guidance: float = 3.5, counts: Counts | None = None) -> None:
        if not isinstance(transformer.x_embedder, ResidualLinear):
            raise ConfigError("expected a widened FLUX transformer, found a plain one. Call widen_flux, or use load_flux.")
        self.transformer = transformer
        self.guidance = guidance
        self.counts = counts or Counts()

    def __call__(
        self,
        latents: Tensor,
        t: Tensor,
        conditioning: Conditioning,
        *,
        grid: tuple[int, int],
        references: Sequence[LatentImage] = (),
        keep: Any = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """latents (B, N, C) packed, t (B,) in 0..1, 1 = noise -> velocity (B, N, C).

        conditioning: tokens (B, T, 4096), pooled (B, 768) of the CLIP text encoder, and the source's packed latents as
        `reference` (B, N, C) or as the one of `references`. A mask (B, T) hides tokens from attention. ConfigError where one
        of them is missing or of another size.
        """
        if keep is not None or rows is not None:
            raise ConfigError("expected no region for ReasonBrain's FLUX, found one. Edit the whole picture.")
        source = conditioning.reference
        if source is None and len(references) == 1:
            source = references[0].tokens.expand(latents.shape[0], -1, -1)
        if source is None or source.shape != latents.shape or grid[0] * grid[1] != latents.shape[1]:
            found = "none" if source is None else str((*source.shape,))
            raise ConfigError(
                f"expected packed source latents of shape {(*latents.shape,)} on a grid of {grid[0]} x {grid[1]}, found {found}"
                ". Encode the picture at the size that is generated."
            )
        if conditioning.pooled is None:
            raise ConfigError("expected a pooled text vector for FLUX, found none. Hand in CLIP's pooled states of the text.")
        parts = [latents, source.to(latents)]
        added = residual_map(conditioning, grid, latents.dtype)
        if added is not None:
            parts.append(added.flatten(2).transpose(1, 2))
        self.counts.denoiser_forwards += 1
        guidance = torch.full_like(t, self.guidance) if self.transformer.config.guidance_embeds else None
        joint = None
        if conditioning.mask is not None:  # FLUX has no argument for it; its attention has, over text and then latents
            seen = functional.pad(conditioning.mask, (0, latents.shape[1]), value=True)
            joint = {"attention_mask": seen[:, None, None]}
        return self.transformer(
            hidden_states=torch.cat(parts, dim=-1),
            encoder_hidden_states=conditioning.tokens.to(latents),
            pooled_projections=conditioning.pooled.to(latents),
            timestep=t.to(latents),
            img_ids=_positions(grid).to(latents),
            txt_ids=latents.new_zeros(conditioning.tokens.shape[1], 3),
            guidance=guidance,
            joint_attention_kwargs=joint,
        ).sample


def _positions(grid: tuple[int, int]) -> Tensor:
    """(N, 3): 0, y, x of each latent token."""
    ids = torch.zeros(*grid, 3)
    ids[..., 1] = torch.arange(grid[0])[:, None]
    ids[..., 2] = torch.arange(grid[1])[None]
    return ids.flatten(0, 1)
