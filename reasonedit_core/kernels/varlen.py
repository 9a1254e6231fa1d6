"""Attention over a pack by torch's varlen attention: flash attention that is told where documents begin, and needs no mask.

Shapes: q (1, T, H, D), k and v (1, T, Hk, D) with H a multiple of Hk. The mask of a pack is always block-diagonal or, within
its blocks, causal, which is all that this kernel knows. Forward and backward; CUDA only.
"""

from __future__ import annotations

import inspect
from functools import lru_cache

import torch
from torch.nn import functional

from ..packing import PackMask
from .mask import Mask

FULL, CAUSAL = (-1, -1), (-1, 0)
"""The window of varlen attention: how far a query sees (back, ahead); -1 is without bound."""

MAX_HEAD_DIM = 256


def available(device: torch.device) -> str | None:
    """None, or why this machine cannot run it."""
    if device.type != "cuda":
        return f"it needs CUDA, not {device.type}"
    return _missing(torch.cuda.current_device() if device.index is None else device.index)


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> str | None:
    """None, or the reason why this call cannot run."""
    if not isinstance(mask, PackMask):
        return "it takes the mask of a pack (PackMask) only"
    if q.shape[0] != 1:
        return f"it takes one sequence of packed documents, got a batch of {q.shape[0]}"
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"it takes float16 or bfloat16, alike for q, k and v, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[3] % 8 or q.shape[3] > MAX_HEAD_DIM or v.shape[3] != q.shape[3]:
        return f"it takes one head dim of a multiple of 8 up to {MAX_HEAD_DIM}, got {q.shape[3]} and {v.shape[3]} for values"
    return None


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """Attention -> (1, T, H, D) in q's dtype. Rows of padding are zeros: the kernel never sees them."""
    assert isinstance(mask, PackMask)
    from torch.nn.attention.varlen import varlen_attn

    real, longest = sum(mask.lengths), max(mask.lengths, default=0)
    if not real:
        return torch.zeros_like(q)
    q_, k_, v_ = (x[0, :real] for x in (q, k, v))
    options = {}
    if q.shape[2] != k.shape[2]:
        if _groups(varlen_attn):
            options["enable_gqa"] = True
        else:
            k_, v_ = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (k_, v_))
    window = CAUSAL if mask.causal else FULL
    # One tensor for queries and keys: torch tells by its identity that both are cut alike.
    cuts = mask.cu_seqlens
    out = varlen_attn(q_, k_, v_, cuts, cuts, longest, longest, window_size=window, **options)
    return functional.pad(out, (0, 0, 0, 0, 0, q.shape[1] - real))[None]


@lru_cache(maxsize=8)
@torch.compiler.assume_constant_result
def _missing(index: int) -> str | None:
    """What card number `index` or this torch lacks, or None."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        varlen = None
    if not hasattr(varlen, "varlen_attn"):
        return f"torch {torch.__version__} has no torch.nn.attention.varlen.varlen_attn"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without flash attention"
    found = torch.cuda.get_device_capability(index)
    if found < (8, 0):
        return f"it needs a card of compute capability 8.0 or newer, found {found[0]}.{found[1]}"
    return None


def _groups(varlen_attn: object) -> bool:
    """Whether this torch takes fewer key heads than query heads (2.11 does not); told by an argument."""
    return "enable_gqa" in inspect.signature(varlen_attn).parameters
