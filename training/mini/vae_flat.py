"""The two VAEs as units of training: pictures to mean latents and back, without the parts that single pictures do not use.

`FlatQwen` computes AutoencoderKLQwenImage on one frame. Its convolutions over time are causal and padded with nothing that
came before, so of every kernel only the last slice in time meets the frame: a convolution of the picture, many times faster
than that of a video. The parameters are those of the model itself; slices that no single frame meets get no gradient.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage


class FlatKL(nn.Module):
    """AutoencoderKL without quant convolutions."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in -1..1 -> mean latents (B, C, H/8, W/8)."""
        return self.vae.encoder(_rows(pixels)).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, 8 h, 8 w), not clamped."""
        return self.vae.decoder(_rows(latents))

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
        """Pixels (B, 3, H, W) in -1..1 -> mean latents (B, C, H/8, W/8)."""
        encoder = self.vae.encoder
        x = _conv(encoder.conv_in, _rows(pixels))
        for layer in encoder.down_blocks:
            x = _layer(layer, x)
        x = _middle(encoder.mid_block, x)
        x = _conv(encoder.conv_out, F.silu(_norm(encoder.norm_out, x)))
        return _conv(self.vae.quant_conv, x).chunk(2, dim=1)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pixels (B, 3, 8 h, 8 w), not clamped."""
        decoder = self.vae.decoder
        x = _conv(decoder.conv_in, _conv(self.vae.post_quant_conv, _rows(latents)))
        x = _middle(decoder.mid_block, x)
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = _resnet(resnet, x)
            for upsampler in block.upsamplers or ():
                x = _resample(upsampler, x)
        return _conv(decoder.conv_out, F.silu(_norm(decoder.norm_out, x)))

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


def _rows(x: Tensor) -> Tensor:
    """The same, channels together in memory: convolutions of few channels run up to twice as fast so on CPUs."""
    return x.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _constant_half(conv: nn.Module, deviation: float) -> None:
    half = conv.weight.shape[0] // 2
    conv.weight[half:] = 0
    conv.bias[half:] = 2 * math.log(deviation)


def _conv(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A causal convolution of a first frame."""
    return F.conv2d(x, conv.weight[:, :, -1], conv.bias, padding=conv.kernel_size[1] // 2)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """The VAE's norm over channels, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + 1e-12)
    return x * scale.to(x.dtype) * norm.gamma.view(1, -1, 1, 1).to(x.dtype)


def _resnet(block: Any, x: Tensor) -> Tensor:
    h = _conv(block.conv1, F.silu(_norm(block.norm1, x)))
    h = _conv(block.conv2, F.silu(_norm(block.norm2, h)))
    return h + (x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x))


def _middle(block: Any, x: Tensor) -> Tensor:
    x = _resnet(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _resnet(resnet, attention(x[:, :, None])[:, :, 0])
    return x


def _resample(layer: Any, x: Tensor) -> Tensor:
    """A first frame is never joined with another in time: what is left is the resampling of the picture."""
    return layer.resample(x)


def _layer(layer: Any, x: Tensor) -> Tensor:
    return _resample(layer, x) if hasattr(layer, "resample") else _resnet(layer, x)
