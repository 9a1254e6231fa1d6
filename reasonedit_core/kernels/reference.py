"""The obviously right attention: plain torch, one line per step of the formula. Other backends are tested against it.

Shapes: q (B, T, H, D), k and v (B, S, Hk, D) with H a multiple of Hk, mask bool broadcastable to (B, H, T, S) or PackMask.
"""

from __future__ import annotations

import torch

from .mask import Mask, as_tensor


def available(device: torch.device) -> str | None:
    """Always None: the reference runs wherever torch does."""
    return None


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> str | None:
    """Always None: the reference takes every call that passed the checks of the dispatch."""
    return None


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v, accumulated in fp32 or better -> (B, T, H, D) in q's dtype.

    A query that may see no key gets zeros, not NaN: rows of padding must not poison the sum of a gradient.
    """
    mask = as_tensor(mask)
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    k, v = (x.to(wide).repeat_interleave(group, dim=2) for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q.to(wide), k) * q.shape[-1] ** -0.5
    if mask is None:
        weights = logits.softmax(dim=-1)
    else:
        # The lowest finite number, so that a row without keys stays finite (uniform) until it is zeroed below.
        weights = logits.masked_fill(~mask, torch.finfo(wide).min).softmax(dim=-1)
        weights = weights.masked_fill(~mask, 0.0)
    return torch.einsum("bhts,bshd->bthd", weights, v).to(q.dtype)
