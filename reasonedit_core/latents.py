"""Packed latents and the VAEs behind one seam: pixels -1..1 <-> normalised latents.

Packing puts each 2x2 block of latents into one token, channels ordered (c, row, column) as FLUX and Qwen-Image do.
`encode` returns the posterior's moments, which can be kept; a sample is drawn from them anew for every edit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange

from .errors import ConfigError
from .frames import decode_frame, encode_frame
from .types import LatentImage

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage

Moments = tuple[torch.Tensor, torch.Tensor | None]
"""Mean and log variance (1, C, h, w), un-normalised; the second is None where the mode is used."""


def pack(latents: torch.Tensor) -> torch.Tensor:
    """(B, C, h, w) with even h, w -> (B, h/2 * w/2, 4 C)."""
    return rearrange(latents, "b c (h ph) (w pw) -> b (h w) (c ph pw)", ph=2, pw=2)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, height * width, 4 C) on a token grid of height x width -> (B, C, 2 height, 2 width)."""
    if tokens.shape[1] != height * width:
        raise ConfigError(
            f"{tokens.shape[1]} latent tokens do not fill a grid of {height} x {width}. Pass latents of the same picture size."
        )
    return rearrange(tokens, "b (h w) (c ph pw) -> b c (h ph) (w pw)", h=height, w=width, ph=2, pw=2)


def pack_image(latents: torch.Tensor) -> LatentImage:
    """Normalised latents (1, C, h, w) as the token picture a denoiser takes as reference."""
    return LatentImage(pack(latents), latents.shape[2] // 2, latents.shape[3] // 2)


def draw_normal(
    shape: tuple[int, ...], rng: torch.Generator, *, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """Standard normal values drawn on the generator's device in `dtype`, then moved: the released way, so seeds agree."""
    return torch.randn(shape, generator=rng, device=rng.device, dtype=dtype).to(device)


class KLCodec:
    """The FLUX autoencoder of Step1X-Edit: 8 pixels per latent, the posterior is sampled, one shift and one scale.

    patch: pixels of a latent token on each side.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self.channels: int = vae.config.latent_channels
        self.patch: int = 2 * 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, pixels: torch.Tensor) -> Moments:
        """pixels (1, 3, H, W) in -1..1 -> mean and log variance (1, C, H/8, W/8)."""
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return posterior.mean, posterior.logvar

    def sample(self, moments: Moments, rng: torch.Generator) -> torch.Tensor:
        """Normalised latents (1, C, h, w); draws mean.numel() values from `rng`, in the VAE's dtype."""
        mean, logvar = moments
        noise = draw_normal(tuple(mean.shape), rng, dtype=mean.dtype, device=mean.device)
        z = mean + torch.exp(0.5 * logvar) * noise
        return (z - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (1, C, h, w) -> pixels (1, 3, 8 h, 8 w), about -1..1, not clamped."""
        latents = latents.to(self.vae.device, self.vae.dtype)
        z = latents / self.vae.config.scaling_factor + self.vae.config.shift_factor
        return self.vae.decode(z, return_dict=False)[0]


class SDCodec:
    """The autoencoder of SD 1.5 and 2.1: 8 pixels per latent, one scale, no packing; for ReasonBrain's UNets.

    The source's latents (`source`) are the mode without the scale, as in InstructPix2Pix; those that are generated have it.
    patch: pixels of a latent on each side, which is a token here.
    """

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae
        self.channels: int = vae.config.latent_channels
        self.patch: int = 2 ** (len(vae.config.block_out_channels) - 1)

    def encode(self, pixels: torch.Tensor) -> Moments:
        """pixels (B, 3, H, W) in -1..1 -> mean and log variance (B, C, H/8, W/8)."""
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return posterior.mean, posterior.logvar

    def sample(self, moments: Moments, rng: torch.Generator) -> torch.Tensor:
        """Scaled latents (B, C, h, w), what training aims at; draws mean.numel() values from `rng`."""
        mean, logvar = moments
        noise = draw_normal(tuple(mean.shape), rng, dtype=mean.dtype, device=mean.device)
        return (mean + torch.exp(0.5 * logvar) * noise) * self.vae.config.scaling_factor

    def source(self, moments: Moments) -> torch.Tensor:
        """What the UNet sees of a source: the mode, without the scale (B, C, h, w)."""
        return moments[0]

    def source_of(self, latents: torch.Tensor) -> torch.Tensor:
        """The same from scaled latents (B, C, h, w), of a picture that was generated."""
        return latents / self.vae.config.scaling_factor

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Scaled latents (B, C, h, w) -> pixels (B, 3, 8 h, 8 w), about -1..1, not clamped."""
        latents = latents.to(self.vae.device, self.vae.dtype)
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, h * w, C), contiguous, so that traces can be saved."""
        return rearrange(latents, "b c h w -> b (h w) c").contiguous()

    def unpack(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, h * w, C) -> (B, C, h, w)."""
        return rearrange(tokens, "b (h w) c -> b c h w", h=height, w=width)


class FluxCodec(KLCodec):
    """FLUX's autoencoder for ReasonBrain: the source is the mode, normalised as what is generated; packed 2 x 2."""

    def source(self, moments: Moments) -> torch.Tensor:
        """The normalised mode (B, C, h, w)."""
        return (moments[0] - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    def source_of(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents are what the transformer sees."""
        return latents

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, 2 h, 2 w) -> (B, h * w, 4 C)."""
        return pack(latents)

    def unpack(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, h * w, 4 C) -> (B, C, 2 h, 2 w)."""
        return unpack(tokens, height, width)


class QwenCodec:
    """The autoencoder of Qwen-Image: a video VAE used on one frame, the mode is used, a mean and a deviation per channel.

    patch: pixels of a latent token on each side. In float32 the frame takes the shorter way of `frames.py`; in half precision
    the module's own, whose rounding is part of the released results.
    """

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        self.vae = vae
        self.channels: int = vae.config.z_dim
        self.patch: int = 2 * 2 ** len(vae.config.temperal_downsample)

    def encode(self, pixels: torch.Tensor) -> Moments:
        """pixels (1, 3, H, W) in -1..1 -> the mode (1, C, H/8, W/8) and None."""
        pixels = pixels.to(self.vae.device, self.vae.dtype)
        if self.vae.dtype == torch.float32:
            return encode_frame(self.vae, pixels), None
        return self.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0], None

    def sample(self, moments: Moments, rng: torch.Generator) -> torch.Tensor:
        """Normalised latents (1, C, h, w). Nothing is drawn from `rng`."""
        mode = moments[0]
        mean, std = self._statistics(mode)
        return (mode - mean) / std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents (1, C, h, w) -> pixels (1, 3, 8 h, 8 w), about -1..1, not clamped."""
        latents = latents.to(self.vae.device, self.vae.dtype)
        mean, std = self._statistics(latents)
        # Division by the reciprocal, not a product: the last bit is that of the released pipeline.
        z = latents / (1.0 / std) + mean
        if self.vae.dtype == torch.float32:
            return decode_frame(self.vae, z)
        return self.vae.decode(z[:, :, None], return_dict=False)[0][:, :, 0]

    def _statistics(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of the latent channels, each (1, C, 1, 1), in the dtype and on the device of `like`."""
        shape = (1, self.channels, 1, 1)
        mean = torch.tensor(self.vae.config.latents_mean).view(shape).to(like.device, like.dtype)
        std = torch.tensor(self.vae.config.latents_std).view(shape).to(like.device, like.dtype)
        return mean, std
