"""Interval attention in Triton (K5): every query sees one interval of keys. Forward and backward, no mask of queries by keys.

B batch, T queries, S keys, H query heads, Hk key heads (H is a multiple of Hk), D head dim. A query sees the keys from its lo
up to, not including, its hi: documents in a pack, causal text, bidirectional runs in it, and queries gathered out of any of
these. This module is imported when the kernel is first wanted: it needs Triton.

Tiles of BM queries by BN keys. A tile of queries visits the tiles of keys from the smallest lo to the largest hi of its rows;
where all of its rows see a whole tile no mask is made. A query that sees nothing gets zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(2**30)
"""Beyond every key: where an interval that is empty begins, and where one of a row that is not there ends."""


SIZES = ("T", "S", "H", "GROUP")
"""Arguments that no code is made anew for: what a card's first test compiled serves all calls of its head dim."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Queries and keys per tile, warps and pipeline stages of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _dot(a, b, UPCAST: tl.constexpr):
    # The interpreter multiplies the bits of bfloat16; there, and only there, operands are widened.
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        return tl.dot(a, b)


@triton.jit
def _bounds(lo, hi, real, S, BN: tl.constexpr):
    """Keys that some row sees [first, last), and within it the whole tiles that every row sees [inner, outer)."""
    empty = hi <= lo
    first = tl.min(tl.where(empty, NEVER, lo), axis=0) // BN * BN
    last = tl.minimum(tl.max(tl.where(empty, 0, hi), axis=0), S)
    inner = tl.cdiv(tl.max(tl.where(real, lo, 0), axis=0), BN) * BN
    outer = tl.minimum(tl.min(tl.where(real, hi, NEVER), axis=0), S) // BN * BN
    first = tl.minimum(first, last)
    none = outer <= inner
    return first, last, tl.where(none, first, inner), tl.where(none, first, outer)


@triton.jit
def _rows(lo_ptr, hi_ptr, row, T, S, INTERVALS: tl.constexpr):
    if INTERVALS:
        lo = tl.load(lo_ptr + row, mask=row < T, other=0)
        hi = tl.load(hi_ptr + row, mask=row < T, other=0)
        return tl.maximum(lo, 0), tl.minimum(hi, S)
    else:
        return row * 0, tl.where(row < T, S, 0)


@triton.jit
def _block(x_ptr, row, x_row, rows, at, D: tl.constexpr):
    """Rows of x with D channels, (rows, BD), zeros where there are none."""
    inside = (row < rows)[:, None] & (at < D)[None, :]
    return tl.load(x_ptr + row[:, None] * x_row + at[None, :], mask=inside, other=0.0)


@triton.jit
def _scores(q, k, key, lo, hi, scale, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    scores = _dot(q, tl.trans(k), UPCAST) * scale
    if MASKED:
        seen = (key[None, :] >= lo[:, None]) & (key[None, :] < hi[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _start(tile, before, first, inner, outer, BN: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return first + tile * BN + tl.where(tile < before, 0, outer - inner)
    else:
        return inner + tile * BN


@triton.jit
def _gather(q, top, total, acc, k_ptr, v_ptr, k_row, v_row, first, last, inner, outer, lo, hi, S, scale, at, D: tl.constexpr,
            BN: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Softmax over tiles of keys, added to what was found before: largest score, sum, weighted values.

    MASKED: over the tiles of [first, last) without those of [inner, outer), in one loop, which is half the code of two.
    """
    before = (inner - first) // BN
    for tile in range(0, before + tl.cdiv(last - outer, BN) if MASKED else (outer - inner) // BN):
        key = _start(tile, before, first, inner, outer, BN, MASKED) + tl.arange(0, BN)
        k = _block(k_ptr, key, k_row, S, at, D)
        scores = _scores(q, k, key, lo, hi, scale, MASKED, UPCAST)
        higher = tl.maximum(top, tl.max(scores, axis=1))
        # A row that has seen no key yet would compute inf - inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weight, axis=1)
        v = _block(v_ptr, key, v_row, S, at, D)
        acc = acc * fade[:, None] + _dot(weight.to(v.dtype), v, UPCAST)
        top = higher
    return top, total, acc


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, lo_ptr, hi_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    T, S, H, GROUP, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INTERVALS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head: programs (T / BM, H, B). lse (B, H, T) float32, to base 2, -inf where nothing is seen."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    at = tl.arange(0, BD)
    k_ptr += batch * k_batch + head // GROUP * k_head
    v_ptr += batch * v_batch + head // GROUP * v_head
    q = _block(q_ptr + batch * q_batch + head * q_head, row, q_row, T, at, D)
    lo, hi = _rows(lo_ptr, hi_ptr, row, T, S, INTERVALS)
    first, last, inner, outer = _bounds(lo, hi, row < T, S, BN)

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    factor = scale * LOG2_E
    top, total, acc = _gather(q, top, total, acc, k_ptr, v_ptr, k_row, v_row, first, last, inner, outer, lo, hi, S, factor, at,
                              D, BN, False, UPCAST)  # fmt: skip
    top, total, acc = _gather(q, top, total, acc, k_ptr, v_ptr, k_row, v_row, first, last, inner, outer, lo, hi, S, factor, at,
                              D, BN, True, UPCAST)  # fmt: skip

    some = total != 0.0  # a NaN is something, and stays to be seen
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    lse = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    place = out_ptr + batch * out_batch + head * out_head + row[:, None] * out_row + at[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=(row < T)[:, None] & (at < D)[None, :])
    tl.store(lse_ptr + (batch * H + head) * T + row, lse, mask=row < T)


@triton.jit
def _towards_q(q, grad, share, lse, acc, k_ptr, v_ptr, k_row, v_row, first, last, inner, outer, lo, hi, S, scale, at,
               D: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):  # fmt: skip
    """Gradient of queries from tiles of keys, which are those of `_gather`."""
    before = (inner - first) // BN
    for tile in range(0, before + tl.cdiv(last - outer, BN) if MASKED else (outer - inner) // BN):
        key = _start(tile, before, first, inner, outer, BN, MASKED) + tl.arange(0, BN)
        k = _block(k_ptr, key, k_row, S, at, D)
        v = _block(v_ptr, key, v_row, S, at, D)
        weight = tl.exp2(_scores(q, k, key, lo, hi, scale, MASKED, UPCAST) - lse[:, None])
        slope = weight * (_dot(grad, tl.trans(v), UPCAST) - share[:, None])
        acc += _dot(slope.to(k.dtype), k, UPCAST)
    return acc


@triton.jit(do_not_specialize=SIZES)
def backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, grad_ptr, lse_ptr, share_ptr, grad_q_ptr, lo_ptr, hi_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, out_batch, out_row, out_head,
    grad_batch, grad_row, grad_head, gq_batch, gq_row, gq_head,
    T, S, H, GROUP, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INTERVALS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of queries: programs (T / BM, H, B). Also share (B, H, T) = sum of out grad, for the other kernel."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    at = tl.arange(0, BD)
    k_ptr += batch * k_batch + head // GROUP * k_head
    v_ptr += batch * v_batch + head // GROUP * v_head
    q = _block(q_ptr + batch * q_batch + head * q_head, row, q_row, T, at, D)
    out = _block(out_ptr + batch * out_batch + head * out_head, row, out_row, T, at, D)
    grad = _block(grad_ptr + batch * grad_batch + head * grad_head, row, grad_row, T, at, D)
    line = (batch * H + head) * T + row
    share = tl.sum(out.to(tl.float32) * grad.to(tl.float32), axis=1)
    tl.store(share_ptr + line, share, mask=row < T)
    lse = tl.load(lse_ptr + line, mask=row < T, other=float("-inf"))
    # Rows that see nothing: exp2(-inf - inf) is 0, exp2(-inf + inf) would be NaN.
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    lo, hi = _rows(lo_ptr, hi_ptr, row, T, S, INTERVALS)
    first, last, inner, outer = _bounds(lo, hi, row < T, S, BN)

    acc = tl.zeros((BM, BD), tl.float32)
    factor = scale * LOG2_E
    acc = _towards_q(q, grad, share, lse, acc, k_ptr, v_ptr, k_row, v_row, first, last, inner, outer, lo, hi, S, factor, at,
                     D, BN, False, UPCAST)  # fmt: skip
    acc = _towards_q(q, grad, share, lse, acc, k_ptr, v_ptr, k_row, v_row, first, last, inner, outer, lo, hi, S, factor, at,
                     D, BN, True, UPCAST)  # fmt: skip
    place = grad_q_ptr + batch * gq_batch + head * gq_head + row[:, None] * gq_row + at[None, :]
    tl.store(place, (acc * scale).to(grad_q_ptr.dtype.element_ty), mask=(row < T)[:, None] & (at < D)[None, :])


@triton.jit(do_not_specialize=SIZES)
def backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, share_ptr, grad_k_ptr, grad_v_ptr, lo_ptr, hi_ptr, seen_ptr,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, grad_batch, grad_row, grad_head,
    gk_batch, gk_row, gk_head, gv_batch, gv_row, gv_head,
    T, S, H, GROUP, scale,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, INTERVALS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values, over all query heads of their group: programs (S / BN, Hk, B).

    seen (2, S / BN): the first query that sees a key of this tile, and the one behind the last.
    """
    tile = tl.program_id(0)
    key = tile * BN + tl.arange(0, BN)
    key_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    at = tl.arange(0, BD)
    k = _block(k_ptr + batch * k_batch + key_head * k_head, key, k_row, S, at, D)
    v = _block(v_ptr + batch * v_batch + key_head * v_head, key, v_row, S, at, D)
    first = 0
    last = T
    if INTERVALS:
        first = tl.load(seen_ptr + tile) // BM * BM
        last = tl.minimum(tl.load(seen_ptr + tl.num_programs(0) + tile), T)
    grad_k = tl.zeros((BN, BD), tl.float32)
    grad_v = tl.zeros((BN, BD), tl.float32)
    for member in range(0, GROUP):
        head = key_head * GROUP + member
        own_q = q_ptr + batch * q_batch + head * q_head
        own_grad = grad_ptr + batch * grad_batch + head * grad_head
        for start in range(first, last, BM):
            row = start + tl.arange(0, BM)
            line = (batch * H + head) * T + row
            q = _block(own_q, row, q_row, T, at, D)
            grad = _block(own_grad, row, grad_row, T, at, D)
            lse = tl.load(lse_ptr + line, mask=row < T, other=float("-inf"))
            lse = tl.where(lse == float("-inf"), float("inf"), lse)
            share = tl.load(share_ptr + line, mask=row < T, other=0.0)
            lo, hi = _rows(lo_ptr, hi_ptr, row, T, S, INTERVALS)
            # Keys by queries, so that neither product below needs a transposed tile of weights.
            scores = _dot(k, tl.trans(q), UPCAST) * (scale * LOG2_E)
            seen = (key[:, None] >= lo[None, :]) & (key[:, None] < hi[None, :])
            weight = tl.exp2(tl.where(seen, scores, float("-inf")) - lse[None, :])
            grad_v += _dot(weight.to(grad.dtype), grad, UPCAST)
            slope = weight * (_dot(v, tl.trans(grad), UPCAST) - share[None, :])
            grad_k += _dot(slope.to(q.dtype), q, UPCAST)
    inside = (key < S)[:, None] & (at < D)[None, :]
    place = grad_k_ptr + batch * gk_batch + key_head * gk_head + key[:, None] * gk_row + at[None, :]
    tl.store(place, (grad_k * scale).to(grad_k_ptr.dtype.element_ty), mask=inside)
    place = grad_v_ptr + batch * gv_batch + key_head * gv_head + key[:, None] * gv_row + at[None, :]
    tl.store(place, grad_v.to(grad_v_ptr.dtype.element_ty), mask=inside)


def tiles(purpose: str, dim: int) -> Tiles:
    """Tiles of "forward", "queries" or "keys" for 16-bit operands of head dim `dim`.

    They fit the 99 KB of shared memory of sm_86, 89 and 120 and compile without spills worth mention; nothing was timed.
    """
    warps = 8 if dim > 64 else 4
    return Tiles(128, 64, warps, 2) if purpose == "forward" else Tiles(64, 64, warps, 2)


def _common(q: Tensor, intervals: tuple[Tensor, Tensor] | None, sizes: Tiles, upcast: bool) -> dict[str, object]:
    """Compile-time arguments of all three kernels."""
    dim = q.shape[3]
    return {
        "D": dim,
        "BD": max(16, triton.next_power_of_2(dim)),
        "BM": sizes.queries,
        "BN": sizes.keys,
        "INTERVALS": intervals is not None,
        "UPCAST": upcast,
        "num_warps": sizes.warps,
        "num_stages": sizes.stages,
        "enable_fp_fusion": True,
    }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intervals: tuple[Tensor, Tensor] | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    *,
    sizes: Tiles | None = None,
    upcast: bool = False,
) -> None:
    """Write out (B, T, H, D) and lse (B, H, T) float32. q (B, T, H, D); k and v (B, S, Hk, D); intervals: lo and hi, each
    (T,) int32, or None where every query sees every key."""
    batch, queries, heads, dim = q.shape
    if not q.numel():
        return
    sizes = sizes or tiles("forward", dim)
    lo, hi = intervals or (lse, lse)
    forward_kernel[(triton.cdiv(queries, sizes.queries), heads, batch)](
        q, k, v, out, lse, lo, hi, *_strides(q), *_strides(k), *_strides(v), *_strides(out),
        queries, k.shape[1], heads, heads // k.shape[2], scale, **_common(q, intervals, sizes, upcast),
    )  # fmt: skip


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad: Tensor,
    intervals: tuple[Tensor, Tensor] | None,
    seen: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    share: Tensor,
    scale: float,
    *,
    sizes: tuple[Tiles, Tiles] | None = None,
    upcast: bool = False,
) -> None:
    """Write grads, of the shapes of q, k and v, and share (B, H, T) float32, which is scratch.

    seen (2, key tiles) int32: the first query that sees a key of a tile, and the one behind the last (`seen_by`); with
    intervals only. sizes: of the kernel for queries and the one for keys.
    """
    batch, queries, heads, dim = q.shape
    keys, key_heads = k.shape[1:3]
    if not keys or not batch:
        return
    for_queries, for_keys = sizes or (tiles("queries", dim), tiles("keys", dim))
    lo, hi = intervals or (lse, lse)
    assert intervals is None or seen.shape[1] == triton.cdiv(keys, for_keys.keys)
    if queries:
        backward_queries_kernel[(triton.cdiv(queries, for_queries.queries), heads, batch)](
            q, k, v, out, grad, lse, share, grads[0], lo, hi, *_strides(q), *_strides(k), *_strides(v), *_strides(out),
            *_strides(grad), *_strides(grads[0]), queries, keys, heads, heads // key_heads, scale,
            **_common(q, intervals, for_queries, upcast),
        )  # fmt: skip
    backward_keys_kernel[(triton.cdiv(keys, for_keys.keys), key_heads, batch)](
        q, k, v, grad, lse, share, grads[1], grads[2], lo, hi, lo if seen is None else seen, *_strides(q), *_strides(k),
        *_strides(v), *_strides(grad), *_strides(grads[1]), *_strides(grads[2]),
        queries, keys, heads, heads // key_heads, scale,
        **_common(q, intervals, for_keys, upcast),
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]
