"""AutoencoderKLQwenImage on one picture: two-dimensional convolutions in place of a video's.

Its convolutions over time are causal and padded with nothing that came before, so of every kernel only the last slice in time
meets the one frame, and what joins frames in time is never reached. The same results, to rounding, from a third of the work.
The weights are those of the module, so whatever moves, casts or trains them goes on working.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage


def encode_frame(vae: AutoencoderKLQwenImage, pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in -1..1 -> mean latents (B, C, H/f, W/f): the mode of the module's own `encode` on one frame."""
    encoder = vae.encoder
    x = _conv(encoder.conv_in, channels_last(pixels))
    for layer in encoder.down_blocks:
        x = _layer(layer, x)
    x = _middle(encoder.mid_block, x)
    x = _conv(encoder.conv_out, F.silu(_norm(encoder.norm_out, x)))
    return _conv(vae.quant_conv, x).chunk(2, dim=1)[0]


def decode_frame(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> pixels (B, 3, f h, f w), not clamped, as the module's own `decode` clamps them."""
    decoder = vae.decoder
    x = _conv(decoder.conv_in, _conv(vae.post_quant_conv, channels_last(latents)))
    x = _middle(decoder.mid_block, x)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x)
        for upsampler in block.upsamplers or ():
            x = upsampler.resample(x)
    return _conv(decoder.conv_out, F.silu(_norm(decoder.norm_out, x)))


def channels_last(x: Tensor) -> Tensor:
    """Channels together in memory: convolutions of few channels run up to twice as fast so on CPUs."""
    return x.contiguous(memory_format=torch.channels_last)


def _conv(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A causal convolution of a first frame."""
    return F.conv2d(x, conv.weight[:, :, -1], conv.bias, padding=conv.kernel_size[1] // 2)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """The module's own norm over channels, which rounds as the pipeline does; it takes frames."""
    return norm(x[:, :, None])[:, :, 0]


def _resnet(block: Any, x: Tensor) -> Tensor:
    h = _conv(block.conv1, F.silu(_norm(block.norm1, x)))
    h = _conv(block.conv2, F.silu(_norm(block.norm2, h)))
    return h + (x if isinstance(block.conv_shortcut, nn.Identity) else _conv(block.conv_shortcut, x))


def _middle(block: Any, x: Tensor) -> Tensor:
    x = _resnet(block.resnets[0], x)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _resnet(resnet, attention(x[:, :, None])[:, :, 0])
    return x


def _layer(layer: Any, x: Tensor) -> Tensor:
    """A residual or attention block, or a resampling: of a first frame, that of the picture alone."""
    return layer.resample(x) if hasattr(layer, "resample") else _resnet(layer, x)
