"""The sizes of ReasonEdit-Q: which pictures Qwen-Image-Edit and Qwen-Image-Edit-Plus show to which part, and how large.

All sizes follow one rule, area and aspect ratio rounded to multiples of 32 (`images.qwen_size`). What differs is the area:
the VAE sees every picture at the generated area; the MLLM sees the VAE's picture (Edit) or a small one (EditPlus).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import images
from .errors import ConfigError
from .generator import PATCH, Plan, Size


@dataclass(frozen=True, slots=True)
class QwenGeometry:
    """Implements `generator.Geometry`.

    plus: the EditPlus pipeline (2509, 2511), which takes several pictures; otherwise Edit, which takes one.
    condition_area: pixels of each picture that the MLLM sees under EditPlus. multiple: what VAE and output sides are
    rounded to, as to the pixels of a latent token, `patch` (`Codec.patch`).
    """

    plus: bool
    condition_area: int = 384 * 384
    multiple: int = 32
    patch: int = PATCH
    source_sized: bool = False

    def plan(self, sizes: Sequence[Size], level: int, *, keep: bool = False, released: bool = False) -> Plan:
        """sizes: (width, height) of the edited picture, then of the references. level: square root of the generated area.

        The output has the shape of the edited picture; under `released` that of the last picture, as in the released
        EditPlus pipeline. keep: the edited picture is a generated one and is edited at its own size.
        """
        if len(sizes) > 1 and not self.plus:
            raise ConfigError(
                f"Qwen-Image-Edit (the original release) edits one picture, without references; found {len(sizes) - 1}. "
                "Leave them out, or use a Qwen-Image-Edit-2509 or -2511 checkpoint."
            )
        multiple = math.lcm(self.multiple, self.patch)
        vae = [images.qwen_size(*size, level * level, multiple) for size in sizes]
        if keep:
            vae[0] = sizes[0]
        if not self.plus:
            return Plan(vae[0], tuple(vae), tuple(vae), self.patch)
        mllm = tuple(images.qwen_size(*size, self.condition_area) for size in sizes)
        return Plan(vae[-1] if released else vae[0], tuple(vae), mllm, self.patch)

    def to_vae(self, picture: torch.Tensor, size: Size) -> torch.Tensor:
        """(1, 3, H, W) in 0..1 -> the same at `size` by Lanczos through 8 bits, as diffusers' image processor does."""
        return images.resize_lanczos_pil(picture, *size)

    def to_mllm(self, picture: torch.Tensor, size: Size) -> torch.Tensor:
        """The same resize; what the MLLM sees is made from the picture as given, not from the VAE's."""
        return images.resize_lanczos_pil(picture, *size)
