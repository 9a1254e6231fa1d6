"""The SD denoisers of ReasonBrain (eq. A2): a UNet that sees the source's latents and takes residuals behind its first layer.

B batch, h x w latents (pixels / 8), c channels behind `conv_in`, g the grid of the residual map, T context tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..errors import CheckpointError, ConfigError
from ..types import Conditioning, Counts, LatentImage
from .stock import load_stock

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

NOISY = 4
"""Channels of SD's latents; the widened input holds those of the source behind them."""


class ResidualConv(nn.Conv2d):
    """A convolution that adds whatever channels follow its own to its output.

    So a residual reaches the place behind `conv_in` through the UNet's one input: no hook, no state between calls, safe under
    compilation and checkpointing, and the weights keep their names.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (B, in + c or in, h, w) -> (B, c, h, w)."""
        out = super().forward(x[:, : self.in_channels])
        return out if x.shape[1] == self.in_channels else out + x[:, self.in_channels :]


@torch.no_grad()
def widen_unet(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Give `conv_in` the source's four channels (weights zero, so that nothing changes at first), in place.

    A UNet of 8 channels (trained before) keeps its weights. CheckpointError for any other number.
    """
    old = unet.conv_in
    if old.in_channels not in (NOISY, 2 * NOISY):
        raise CheckpointError(
            f"expected a UNet of {NOISY} input channels (SD 1.5, SD 2.1) or of {2 * NOISY} (trained for editing), found "
            f"{old.in_channels}. Inpainting and depth models are of another kind; name the base model."
        )
    new = ResidualConv(2 * NOISY, old.out_channels, old.kernel_size, padding=old.padding).to(old.weight)
    new.weight.zero_()
    new.weight[:, : old.in_channels] = old.weight
    new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=2 * NOISY)
    return unet


def load_unet(
    path: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> UNet2DConditionModel:
    """A UNet from a local diffusers folder (`unet/` of a pipeline), widened. Raises CheckpointError."""
    return widen_unet(load_stock(path, "UNet2DConditionModel", "the unet folder of an SD pipeline", dtype)).to(device)


class UNetDenoiser:
    """One prediction of the UNet, noise or v as its scheduler's `prediction_type` says.

    timesteps: length of the schedule it was trained on. Gradients follow the caller's mode, so that training uses it too.
    """

    kind: Literal["epsilon"] = "epsilon"

    def __init__(self, unet: UNet2DConditionModel, *, timesteps: int = 1000, counts: Counts | None = None) -> None:
        if not isinstance(unet.conv_in, ResidualConv):
            raise ConfigError("expected a widened UNet, found a plain one. Call widen_unet, or load it with load_unet.")
        self.unet = unet
        self.timesteps = timesteps
        self.counts = counts or Counts()

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """latents (B, 4, h, w), timesteps (B,) of 0..T-1, source's latents as `conditioning.reference` (B, 4, h, w)."""
        source = conditioning.reference
        if source is None or source.shape != latents.shape:
            found = "none" if source is None else str((*source.shape,))
            raise ConfigError(
                f"expected source latents of shape {(*latents.shape,)} as the conditioning's reference, found {found}. Encode "
                "the picture at the size that is generated."
            )
        parts = [latents, source.to(latents)]
        added = residual_map(conditioning, latents.shape[-2:], latents.dtype)
        if added is not None:
            parts.append(added)
        self.counts.denoiser_forwards += 1
        return self.unet(
            torch.cat(parts, dim=1),
            timesteps,
            encoder_hidden_states=conditioning.tokens.to(latents),
            encoder_attention_mask=conditioning.mask,
        ).sample

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
        """The seam's form: latents (B, h w, 4), t (B,) in 0..1 -> (B, h w, 4); the source is the conditioning's reference."""
        if references or keep is not None or rows is not None:
            raise ConfigError("expected neither references nor regions for a UNet, found some. Only a DiT takes them.")
        height, width = grid
        unpacked = rearrange(latents, "b (h w) c -> b c h w", h=height, w=width)
        steps = (t * self.timesteps).round().long().clamp(max=self.timesteps - 1)
        return rearrange(self.predict(unpacked, steps, conditioning), "b c h w -> b (h w) c")


def residual_map(conditioning: Conditioning, size: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """Map and vector of a conditioning as one sum (B, c, h, w): the map resized, the vector everywhere. None without either."""
    added = None
    for part in conditioning.residual or ():
        part = part.to(dtype)
        if part.dim() == 2:
            part = part[:, :, None, None].expand(-1, -1, *size)
        else:
            part = functional.interpolate(part, tuple(size), mode="bilinear", align_corners=False)
        added = part if added is None else added + part
    return added
