"""Fine-grained reasoning cue extraction (FRCE): eqs. 1 and 2 together."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from .spec import BrainSpec, Switches
from .textual import TextualBranch
from .visual import VisualBranch


@dataclass(frozen=True, slots=True)
class Features:
    """What the frozen encoders say of a batch of pictures and instructions.

    image: E_I(I) (B, N, d_v), the layer that LLaVA reads. taps: (B, N, taps * d_v). text: E_T(H) (B, L, d_t) of the diffusion
    text encoder, with text_keep (B, L). masks (B, R, g, g) in 0..1, geometry (B, R, 8), region_keep (B, R): None where the
    region branch is off. objects (B, O, d_t) one vector per name, object_keep (B, O). All keeps: True = valid.
    """

    image: Tensor
    taps: Tensor
    text: Tensor
    text_keep: Tensor
    objects: Tensor | None = None
    object_keep: Tensor | None = None
    masks: Tensor | None = None
    geometry: Tensor | None = None
    region_keep: Tensor | None = None

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Features:
        """The same on `device`; floating point tensors in `dtype`."""
        moved = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                moved[field.name] = value.to(device, dtype if value.is_floating_point() else None)
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Cues:
    """visual: R_V (B, V, D) with visual_keep (B, V); textual: R_T (B, O, D) with textual_keep (B, O)."""

    visual: Tensor
    visual_keep: Tensor
    textual: Tensor
    textual_keep: Tensor


class FRCE(nn.Module):
    """Visual and textual cues: 82M parameters in the 7B preset, 41M in the 3B preset (Tab. A4)."""

    def __init__(self, spec: BrainSpec, switches: Switches | None = None) -> None:
        super().__init__()
        switches = switches or Switches()
        self.visual = VisualBranch(spec, switches)
        self.textual = TextualBranch(spec, switches)

    def forward(self, features: Features) -> Cues:
        """ConfigError where a picture has no valid region (with a region branch) or no object."""
        visual, visual_keep = self.visual(
            features.taps, features.image, features.masks, features.geometry, features.region_keep
        )
        textual = self.textual(features.objects, features.object_keep, visual, visual_keep)
        return Cues(visual, visual_keep, textual, features.object_keep)
