"""Attention by torch's `scaled_dot_product_attention`, which picks a cuDNN, flash, memory-efficient or plain kernel.

Shapes: q (B, T, H, D), k and v (B, S, Hk, D) with H a multiple of Hk, mask bool broadcastable to (B, H, T, S) or PackMask.

No order of those kernels is forced here: since 2.11, the lowest version that we take, torch asks cuDNN first on cards of
compute capability 9.0 and 10.0 (TORCH_CUDNN_SDPA_DEPRIORITIZED=1 takes that back) and flash first on others, which is the order
that is wanted, and a user's own settings (`torch.backends.cuda.enable_cudnn_sdp`, `sdpa_kernel`) stay in force.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange

from .mask import Mask, as_tensor


def available(device: torch.device) -> str | None:
    """Always None: SDPA is part of torch and has a plain fallback on every device."""
    return None


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> str | None:
    """None, or the reason why this call cannot run."""
    if not q.is_floating_point():
        return f"it takes floating-point queries, got {q.dtype}"
    return None


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """Attention -> (B, T, H, D) in q's dtype."""
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q, k, v))
    mask = as_tensor(mask)
    group = q.shape[1] // k.shape[1]
    if group > 1 and mask is not None:
        # Flash takes no mask and the memory-efficient kernel no groups: a grouped call with a mask would fall to the
        # plain kernel, which makes the whole (T, S) matrix. Repeated heads reach the memory-efficient one.
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        group = 1
    if mask is not None and mask.ndim < 4:
        mask = mask[(None,) * (4 - mask.ndim)]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=group > 1)
    return rearrange(out, "b h t d -> b t h d")
