"""Attention over a pack by torch's FlexAttention, compiled to one kernel that skips what no query of a block may see.

Shapes: q (B, T, H, D), k and v (B, T, Hk, D) with H a multiple of Hk; blocks of `BLOCK` tokens. Forward and backward on CUDA.
On the CPU torch has a forward only, eager and slow; the dispatch never takes it there, tests call `run` themselves.

Which blocks are needed follows from the documents' borders alone, so the block mask is made without looking at T x T pairs,
once per PackMask, for all layers and heads of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch.nn import functional

from ..packing import PADDING, PackMask
from .mask import Mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KEPT = "block_mask"
"""Where a PackMask keeps the block mask that was made of it."""


def available(device: torch.device) -> str | None:
    """None, or why this machine cannot run it."""
    if device.type != "cuda":
        return f"it needs CUDA, not {device.type} (FlexAttention has no backward there)"
    return _missing()


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask) -> str | None:
    """None, or the reason why this call cannot run."""
    if not isinstance(mask, PackMask):
        return "it takes the mask of a pack (PackMask) only"
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        return f"it takes float16, bfloat16 or float32, alike for q, k and v, got {q.dtype}, {k.dtype}, {v.dtype}"
    if min(q.shape[3], v.shape[3]) < 16:
        return f"it takes a head dim of at least 16, got {q.shape[3]} and {v.shape[3]} for values"
    return None


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask = None) -> torch.Tensor:
    """Attention -> (B, T, H, D) in q's dtype. Rows of padding are zeros."""
    assert isinstance(mask, PackMask)
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q, k, v))
    attend = _kernel() if q.is_cuda and not torch.compiler.is_compiling() else _flex_attention()
    out = attend(q, k, v, block_mask=block_mask(mask), enable_gqa=q.shape[1] != k.shape[1])
    return rearrange(out, "b h t d -> b t h d")


def block_mask(mask: PackMask) -> BlockMask:
    """The block mask of a pack, made at the first call and kept with the mask."""
    kept = vars(mask).get(KEPT)
    if kept is None:
        kept = vars(mask)[KEPT] = build(mask)  # as functools.cached_property does; the dataclass is frozen for callers
    return kept


def build(mask: PackMask) -> BlockMask:
    """Block mask of (T, T) tokens on the device of the documents, one for all heads."""
    from torch.nn.attention.flex_attention import BlockMask

    doc_id, causal, length = mask.doc_id, mask.causal, len(mask.doc_id)

    # Documents are numbered in order and contiguous, padding comes last: a block holds every number from that of its
    # first token to its largest, and nothing but padding where its first token is padding.
    blocks = functional.pad(doc_id, (0, -length % BLOCK), value=PADDING).view(-1, BLOCK)
    first, last = blocks[:, 0], blocks.amax(dim=1)
    some = first != PADDING
    whole = (first == last) & (blocks[:, -1] == first) & some
    seen = (first[:, None] <= last[None]) & (first[None] <= last[:, None]) & some[:, None] & some[None]
    full = seen & whole[:, None] & whole[None]
    if causal:
        seen, full = seen.tril(), full.tril(-1)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        together = (doc_id[query] == doc_id[key]) & (doc_id[query] != PADDING)
        return together & (query >= key) if causal else together

    return BlockMask.from_kv_blocks(
        *_listed(seen & ~full), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(length, length)
    )


def _listed(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(queries, keys) bool of blocks -> how many key blocks each query block wants, and which, those first."""
    order = wanted.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return wanted.sum(dim=1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


@lru_cache(maxsize=1)
@torch.compiler.assume_constant_result
def _missing() -> str | None:
    """What this torch or machine lacks, or None."""
    try:
        from torch.nn.attention import flex_attention
    except ImportError:
        flex_attention = None
    if not hasattr(getattr(flex_attention, "BlockMask", None), "from_kv_blocks"):
        return f"torch {torch.__version__} has no BlockMask.from_kv_blocks"
    if find_spec("triton") is None:
        return "Triton, which compiles it, is not installed"
    return None


def _flex_attention() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@lru_cache(maxsize=1)
def _kernel() -> Callable[..., torch.Tensor]:
    """FlexAttention compiled. A new mask of a known length compiles nothing; from the third length on, none does."""
    return torch.compile(_flex_attention())
