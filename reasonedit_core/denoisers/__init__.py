"""Networks behind the `Denoiser` seam, and the batching of conditionings that they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ..types import Conditioning


def join_conditionings(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditionings of batch 1 as one of batch 2; the shorter text is padded at its end with zeros and masked.

    positions become (2, T, 3). The mask stays None when nothing had to be padded and neither had one.
    """
    import torch

    from ..types import Conditioning

    pair = (first, second)
    length = max(c.tokens.shape[1] for c in pair)

    def batch(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        if any(tensor is None for tensor in tensors):
            return None
        return torch.cat([_pad(tensor, length) for tensor in tensors])

    masks = [c.mask for c in pair]
    if any(mask is not None for mask in masks) or any(c.tokens.shape[1] < length for c in pair):
        masks = [
            torch.ones(c.tokens.shape[:2], dtype=torch.bool, device=c.tokens.device) if c.mask is None else c.mask for c in pair
        ]
    return Conditioning(
        tokens=batch([c.tokens for c in pair]),
        mask=batch(masks),
        positions=batch([None if c.positions is None else c.positions[None] for c in pair]),
        text_embeds=batch([c.text_embeds for c in pair]),
        text_mask=batch([c.text_mask for c in pair]),
    )


def _pad(tensor: torch.Tensor, length: int) -> torch.Tensor:
    """(1, T, ...) -> (1, length, ...): zeros (False in a mask) at the end."""
    import torch

    missing = tensor.new_zeros(1, length - tensor.shape[1], *tensor.shape[2:])
    return torch.cat([tensor, missing], dim=1)
