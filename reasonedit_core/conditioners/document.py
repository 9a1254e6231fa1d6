"""What a conditioner makes of picture and instruction before any network runs: the document that the MLLM then reads.

Inference runs one document at a time and hands the states on; training packs many of them, or caches their states.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..mllm.qwen25vl import VisionFeatures
from ..mllm.vision import MERGE, Patches


@dataclass(frozen=True, eq=False)
class CondDocument:
    """One document of the MLLM's stream whose states condition the denoiser. L tokens; T of them, and fillers, condition.

    ids (L,) int64: each picture's placeholder repeated once per vision token. positions (3, L) int64: M-RoPE. patches: of
    the pictures, in the order of their placeholders. kept: which rows condition, with both ends. fillers: tokens of padding
    that the denoiser is shown behind the kept ones (Step1X-Edit v1.0 and v1.1 fill up their budget), zeros for states.
    place (T, 3) float32: positions of the kept tokens in the DiT, and quoted (T,) bool: quoted characters, whose input
    embeddings the DiT may map; both in Step1X-Edit v1.2 only, else None. shown (L,) bool: false for tokens that the released
    v1.x code hides from its MLLM; None where all are shown, as they are in training.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    patches: tuple[Patches, ...]
    kept: slice
    fillers: int = 0
    place: torch.Tensor | None = None
    quoted: torch.Tensor | None = None
    shown: torch.Tensor | None = None

    @property
    def n_text(self) -> int:
        """Text tokens that the DiT is given, fillers included."""
        return self.kept.stop - self.kept.start + self.fillers

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each picture in patches."""
        return tuple(patches.grid for patches in self.patches)


def unseen(patches: Patches) -> VisionFeatures:
    """Features of width 0 that stand for a picture where only its grid matters: to count and to place its tokens."""
    height, width = (side // MERGE for side in patches.grid)
    return VisionFeatures(torch.empty(height * width, 0), (height, width), patches.resized, patches.key)
