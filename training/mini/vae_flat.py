"""The two VAEs as units of training: pictures to mean latents and back, without the parts that single pictures do not use.

The parameters are those of the models themselves; of `FlatQwen` the slices that no single frame meets get no gradient
(`frames.py` says why). f: pixels per latent on each side.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...reasonedit_core.frames import channels_last, decode_frame, encode_frame

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage


class FlatKL(nn.Module):
    """AutoencoderKL without quant convolutions."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1..1 -> mean latents (B, C, H/f, W/f)."""
        return self.vae.encoder(channels_last(pixels)).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, f h, f w), not clamped."""
        return self.vae.decoder(channels_last(latents))

    def fix_deviation(self, deviation: float) -> None:
        """Make the posterior's deviation a constant; as `encode` leaves it out, no gradient changes it."""
        _constant_half(self.vae.encoder.conv_out, deviation)


class FlatQwen(nn.Module):
    """AutoencoderKLQwenImage on single frames."""

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        super().__init__()
        self.vae = vae
        self._first_frames()

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1..1 -> mean latents (B, C, H/f, W/f)."""
        return encode_frame(self.vae, pixels)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, f h, f w), not clamped."""
        return decode_frame(self.vae, latents)

    def fix_deviation(self, deviation: float) -> None:
        """Make the posterior's deviation a constant; as `encode` leaves it out, no gradient changes it."""
        _constant_half(self.vae.quant_conv, deviation)

    @torch.no_grad()
    def _first_frames(self) -> None:
        """Kernels' slices for frames that came before, and what joins frames in time: zero, as nothing is learned there. The
        slice that is left gets the scale of a kernel of its own size."""
        for name, module in self.vae.named_modules():
            if isinstance(module, nn.Conv3d):
                if name.endswith("time_conv"):
                    module.weight.zero_()
                    module.bias.zero_()
                elif module.kernel_size[0] > 1:
                    module.weight[:, :, :-1] = 0
                    module.weight.mul_(math.sqrt(module.kernel_size[0]))
                    module.bias.mul_(math.sqrt(module.kernel_size[0]))


@torch.no_grad()
def _constant_half(conv: nn.Module, deviation: float) -> None:
    half = conv.weight.shape[0] // 2
    conv.weight[half:] = 0
    conv.bias[half:] = 2 * math.log(deviation)
