"""Masks as callers hand them in: a bool tensor, the mask of a pack of documents, or none."""

from __future__ import annotations

import torch

from ..packing import PackMask

Mask = torch.Tensor | PackMask | None
"""bool tensor broadcastable to (B, H, T, S), True where a query may see a key; PackMask of T = S tokens; None: all see all."""


def as_tensor(mask: Mask) -> torch.Tensor | None:
    """The mask as a bool tensor (1, 1, T, T) where it describes a pack, else as it is.

    torch.compile cannot trace how `PackMask.dense` is made (Python 3.11): read it once outside of what is compiled.
    """
    return mask.dense if isinstance(mask, PackMask) else mask
