"""Attention over a pack by torch's SDPA, document by document: documents of about one length are laid side by side as a batch.

Shapes: q (1, T, H, D), k and v (1, T, Hk, D) with H a multiple of Hk. Work and memory grow with the squares of the documents'
lengths, where a dense mask makes them grow with the square of the pack's. Forward and backward, every device and dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..packing import PackMask
from .mask import Mask

STEP = 32
"""Documents are padded to a multiple of this, and batched with those of the same multiple."""

LOW, LONGEST = (torch.bfloat16, torch.float16), 1024
"""Where matrix products are written out on the CPU: dtypes, and documents up to this length."""

KEPT = "batches"
"""Where a PackMask keeps the batches that were made of it."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Documents side by side. rows (documents, n): the pack's rows, padding as row 0; real (documents, 1, 1, n): which are
    none; None where all are. back (T,): for each row of the pack its place in `rows`, documents * n for rows of others."""

    rows: Tensor
    real: Tensor | None
    back: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Batches:
    """All documents of a pack. back (T,): for each row of the pack its place among the batches' rows laid end to end; padding
    has the place behind the last."""

    batches: tuple[Batch, ...]
    back: Tensor


def available(device: torch.device) -> str | None:
    """Always None: SDPA is part of torch and has a plain fallback on every device."""
    return None


def supports(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str | None:
    """None, or the reason why this call cannot run."""
    if not isinstance(mask, PackMask):
        return "it takes the mask of a pack (PackMask) only"
    if q.shape[0] != 1:
        return f"it takes one sequence of packed documents, got a batch of {q.shape[0]}"
    if not q.is_floating_point():
        return f"it takes floating-point queries, got {q.dtype}"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """Attention -> (1, T, H, D) in q's dtype. Rows of padding are zeros."""
    assert isinstance(mask, PackMask)
    made = batches_of(mask)
    outs = [q.new_zeros(1, *q.shape[2:3], v.shape[3])]
    for batch in reversed(made.batches):
        q_, k_, v_ = (_Laid.apply(x[0], batch.rows, batch.back).transpose(1, 2) for x in (q, k, v))
        # Padding stands behind a document, so a causal query never sees it.
        seen = None if mask.causal else batch.real
        if _by_products(q_, k_, v_):
            out = _products(q_, k_, v_, seen, mask.causal)
        else:
            out = F.scaled_dot_product_attention(
                q_, k_, v_, attn_mask=seen, is_causal=mask.causal, enable_gqa=q.shape[2] != k.shape[2]
            )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs[::-1]).index_select(0, made.back)[None]


class _Laid(torch.autograd.Function):
    """Rows (T, H, D) of a pack laid side by side, (documents, n, H, D). Every row of a document is taken once, and what is
    taken for padding gets no gradient, so backward takes rows as well where torch's would add up."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, rows.flatten()).unflatten(0, rows.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        flat = grad.flatten(0, 1)
        return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])]).index_select(0, back), None, None


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether to write the matrix products out. On the CPU in low precision the backward of torch's fused kernel takes four
    times as long as theirs (measured at 100 to 150 tokens); their scores are rounded before the softmax, and kept."""
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return trained and q.device.type == "cpu" and q.dtype in LOW and q.shape[2] <= LONGEST


def _products(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, causal: bool) -> Tensor:
    """Attention of (B, H, n, D), (B, Hk, n, D): scores, softmax, sum, as products of matrices."""
    (batch, heads, length, dim), group = q.shape, q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    q, k, v = (x.reshape(batch * heads, length, -1) for x in (q * dim**-0.5, k, v))
    scores = torch.bmm(q, k.transpose(1, 2))
    never = torch.finfo(scores.dtype).min
    if causal:
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = scores + scores.new_zeros(length, length).masked_fill(later, never)
    elif seen is not None:
        hidden = torch.zeros(seen.shape, dtype=scores.dtype, device=q.device).masked_fill(~seen, never)
        scores = (scores.unflatten(0, (batch, heads)) + hidden).flatten(0, 1)
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (batch, heads))


def batches_of(mask: PackMask) -> Batches:
    """The batches of a pack, made at the first call and kept with the mask."""
    kept = vars(mask).get(KEPT)
    if kept is None:
        kept = vars(mask)[KEPT] = _batches(mask)
    return kept


def _batches(mask: PackMask) -> Batches:
    device = mask.doc_id.device
    classes: dict[int, list[tuple[int, int]]] = {}
    start = 0
    for length in mask.lengths:
        classes.setdefault(-(-length // STEP), []).append((start, length))
        start += length
    batches, place = [], 0
    back = torch.empty(len(mask.doc_id), dtype=torch.long)
    for group in classes.values():
        longest = max(length for _, length in group)
        steps = torch.arange(longest)
        starts, lengths = torch.tensor(group).T[:, :, None]
        real = steps < lengths
        rows = torch.where(real, starts + steps, 0)
        own = torch.full_like(back, real.numel())
        own[rows[real]] = torch.arange(real.numel()).view_as(real)[real]
        back[rows[real]] = own[rows[real]] + place
        place += real.numel()
        shown = None if bool(real.all()) else real[:, None, None].to(device)
        batches.append(Batch(rows.to(device), shown, own.to(device)))
    back[start:] = place
    return Batches(tuple(batches), back.to(device))
