"""The element-wise kernels in Triton: QK norm + rotation + joint write (K1), gate + norm + modulate (K2), guided step (K4).

B batch, N tokens of a stream, L rows of the joint sequence or of the cache, H heads, D head dim, P = D / 2 pairs, C width.
This module is imported when a kernel is first wanted: it needs Triton. What the kernels compute is said in `reference_ops`;
they compute in float32 and round once. Launchers write into tensors that they are given.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference_ops import FP16_MAX, RULES, Heads

HEADS = 8
"""Heads that one program of K1 takes."""

MAX_WIDTH = 16384
"""Widest row of K2: it is held in registers."""

FUSED = {"enable_fp_fusion": True}
"""a * b + c rounds once, as in CUDA C++; said at every launch because Triton changes what it does unasked."""


# --- K1 ---


@triton.jit
def _turned(x_ptr, out_ptr, weight_ptr, cos, sin, x_head, out_head, first, heads, kept, eps, D: tl.constexpr, BD: tl.constexpr,
            BH: tl.constexpr):  # fmt: skip
    """Heads first ... first + BH of one token: norm, rotation, store of `kept` channels. cos and sin (BD / 2) in float32."""
    head = first + tl.arange(0, BH)
    at = tl.arange(0, BD)
    inside = (head < heads)[:, None] & (at < D)[None, :]
    x = tl.load(x_ptr + head[:, None] * x_head + at[None, :], mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=at < D, other=0.0).to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)[:, None] * weight[None, :]
    real, imaginary = tl.split(tl.reshape(x, (BH, BD // 2, 2)))
    turned = tl.join(real * cos[None, :] - imaginary * sin[None, :], imaginary * cos[None, :] + real * sin[None, :])
    turned = tl.reshape(turned, (BH, BD)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head[:, None] * out_head + at[None, :], turned, mask=inside & (at < kept)[None, :])


@triton.jit
def _copied(x_ptr, out_ptr, x_head, out_head, first, heads, kept, BD: tl.constexpr, BH: tl.constexpr):
    head = first + tl.arange(0, BH)
    at = tl.arange(0, BD)
    inside = (head < heads)[:, None] & (at < kept)[None, :]
    x = tl.load(x_ptr + head[:, None] * x_head + at[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + head[:, None] * out_head + at[None, :], x, mask=inside)


@triton.jit(do_not_specialize=["start", "length", "heads", "key_heads"])
def qk_norm_rope_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, rows_ptr, out_q_ptr, out_k_ptr, out_v_ptr,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    cos_batch, cos_row, cos_pair, sin_batch, sin_row, sin_pair,
    out_q_batch, out_q_row, out_q_head, out_k_batch, out_k_row, out_k_head, out_v_batch, out_v_row, out_v_head,
    start, length, heads, key_heads, eps,
    D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, ROWS: tl.constexpr, VALUES: tl.constexpr, COMPACT: tl.constexpr,
):  # fmt: skip
    """One token, and BH heads of q, of k or of v: programs (N, B, blocks of q, then of k, then of v)."""
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    block = tl.program_id(2)
    row = start + token
    if ROWS:
        row = tl.load(rows_ptr + start + token).to(tl.int64)
    # A row outside of the output would be written into other memory; the plain form raises there. The bound of the channels
    # says so, and not a mask of its own, because the interpreter cannot broadcast a single bool.
    kept = tl.where((row >= 0) & (row < length), D, 0)
    q_blocks = tl.cdiv(heads, BH)
    k_blocks = tl.cdiv(key_heads, BH)
    if block < q_blocks + k_blocks:
        pair = tl.arange(0, BD // 2)
        known = pair < kept // 2
        cos = tl.load(cos_ptr + batch * cos_batch + row * cos_row + pair * cos_pair, mask=known, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + batch * sin_batch + row * sin_row + pair * sin_pair, mask=known, other=0.0).to(tl.float32)
        if block < q_blocks:
            place = start + token if COMPACT else row
            _turned(q_ptr + batch * q_batch + token * q_token, out_q_ptr + batch * out_q_batch + place * out_q_row,
                    q_weight_ptr, cos, sin, q_head, out_q_head, block * BH, heads, D if COMPACT else kept, eps, D, BD,
                    BH)  # fmt: skip
        else:
            _turned(k_ptr + batch * k_batch + token * k_token, out_k_ptr + batch * out_k_batch + row * out_k_row,
                    k_weight_ptr, cos, sin, k_head, out_k_head, (block - q_blocks) * BH, key_heads, kept, eps, D, BD,
                    BH)  # fmt: skip
    else:
        if VALUES:
            _copied(v_ptr + batch * v_batch + token * v_token, out_v_ptr + batch * out_v_batch + row * out_v_row, v_head,
                    out_v_head, (block - q_blocks - k_blocks) * BH, key_heads, kept, BD, BH)  # fmt: skip


def qk_norm_rope(
    streams: Sequence[Heads],
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None,
    out: tuple[Tensor, Tensor, Tensor | None],
    eps: float,
    *,
    compact: bool = False,
) -> None:
    """Write the streams, one after the other, into out: q, k and, where it is no None, v, each (B, L, H | Hk, D).

    cos, sin (1 | B, L, D / 2) by row of k; rows (tokens of all streams,): the row of each token, None: in order. compact: q
    is written in order whatever rows says.
    """
    start = 0
    for stream in streams:
        _launch_stream(stream, cos, sin, rows, out, eps, compact, start)
        start += stream.q.shape[1]


def _launch_stream(
    stream: Heads, cos: Tensor, sin: Tensor, rows: Tensor | None, out: tuple[Tensor, Tensor, Tensor | None], eps: float,
    compact: bool, start: int,
) -> None:  # fmt: skip
    q, k, v = stream.q, stream.k, stream.v
    batch, tokens, heads, dim = q.shape
    key_heads, values = k.shape[2], out[2] is not None
    if not tokens or not batch:
        return
    out_v = out[2] if values else out[1]
    blocks = triton.cdiv(heads, HEADS) + (2 if values else 1) * triton.cdiv(key_heads, HEADS)
    qk_norm_rope_kernel[(tokens, batch, blocks)](
        q, k, v, stream.q_weight, stream.k_weight, cos, sin, q if rows is None else rows, out[0], out[1], out_v,
        *_strides(q), *_strides(k), *_strides(v), *_table_strides(cos), *_table_strides(sin),
        *_strides(out[0]), *_strides(out[1]), *_strides(out_v),
        start, out[1].shape[1], heads, key_heads, eps,
        D=dim, BD=triton.next_power_of_2(dim), BH=HEADS, ROWS=rows is not None, VALUES=values, COMPACT=compact,
        num_warps=4, **FUSED,
    )  # fmt: skip


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]


def _table_strides(table: Tensor) -> tuple[int, int, int]:
    return (table.stride(0) if table.shape[0] > 1 else 0, *table.stride()[1:])


# --- K2 ---


@triton.jit(do_not_specialize=["count"])
def gate_norm_modulate_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, rows_ptr, residual_ptr, normed_ptr,
    x_batch, x_token, y_batch, y_token, gate_row, scale_row, shift_row, rows_batch,
    residual_batch, residual_token, normed_batch, normed_token, count, eps, LIMIT,
    C: tl.constexpr, BC: tl.constexpr, GATED: tl.constexpr, NORMED: tl.constexpr, ROWS: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """One token per program: programs (L, B)."""
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BC)
    inside = at < C
    row = tl.where(count > 1, batch, 0)
    if ROWS:
        row = tl.load(rows_ptr + batch * rows_batch + token).to(tl.int64)
    taken = at < tl.where((row >= 0) & (row < count), C, 0)
    x = tl.load(x_ptr + batch * x_batch + token * x_token + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        y = tl.load(y_ptr + batch * y_batch + token * y_token + at, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_row + at, mask=taken, other=0.0).to(tl.float32)
        x += gate * y
        if CLAMP:
            # Not tl.clamp: it may drop a NaN, which must stay to be seen.
            x = tl.where(x > LIMIT, LIMIT, tl.where(x < -LIMIT, -LIMIT, x))
        rounded = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + batch * residual_batch + token * residual_token + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    if NORMED:
        mean = tl.sum(x, axis=0) / C
        centred = tl.where(inside, x - mean, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / C + eps)
        scale = tl.load(scale_ptr + row * scale_row + at, mask=taken, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + row * shift_row + at, mask=taken, other=0.0).to(tl.float32)
        normed = normed * (1.0 + scale) + shift
        place = normed_ptr + batch * normed_batch + token * normed_token + at
        tl.store(place, normed.to(normed_ptr.dtype.element_ty), mask=inside)


def gate_norm_modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    rows: Tensor | None,
    residual: Tensor | None,
    normed: Tensor | None,
    eps: float,
    clamp: bool,
) -> None:
    """Write residual (B, L, C), where y and gate are given, and normed (B, L, C), where scale and shift are."""
    batch, tokens, width = x.shape
    if not tokens or not batch:
        return
    gated, modulated = y is not None, scale is not None
    table = gate if gated else scale
    y, gate, residual = (y, gate, residual) if gated else (x, table, x)
    scale, shift, normed = (scale, shift, normed) if modulated else (table, table, x)
    block = triton.next_power_of_2(width)
    gate_norm_modulate_kernel[(tokens, batch)](
        x, y, gate, scale, shift, x if rows is None else rows, residual, normed,
        *x.stride()[:2], *y.stride()[:2], gate.stride(0), scale.stride(0), shift.stride(0),
        rows.stride(0) if rows is not None and rows.ndim == 2 else 0,
        *residual.stride()[:2], *normed.stride()[:2], table.shape[0], eps, FP16_MAX,
        C=width, BC=block, GATED=gated, NORMED=modulated, ROWS=rows is not None,
        CLAMP=clamp and x.dtype == torch.float16, num_warps=min(16, max(1, block // 512)), **FUSED,
    )  # fmt: skip


# --- K4 ---


# Sigmas are entries of a table: their addresses are aligned to 16 bytes or not from step to step.
@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["sigma_ptr", "next_ptr"])
def guided_step_kernel(
    latents_ptr, cond_ptr, uncond_ptr, sigma_ptr, next_ptr, out_ptr, velocity_ptr,
    latents_batch, latents_token, cond_batch, cond_token, uncond_batch, uncond_token,
    out_batch, out_token, velocity_batch, velocity_token, tokens, scale, power, truncate,
    C: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, GUIDED: tl.constexpr, RULE: tl.constexpr, VELOCITY: tl.constexpr,
):  # fmt: skip
    """BT tokens per program: programs (N / BT, B)."""
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    batch = tl.program_id(1).to(tl.int64)
    at = tl.arange(0, BC)[None, :]
    inside = (token < tokens)[:, None] & (at < C)
    sigma = tl.load(sigma_ptr).to(tl.float32)
    step = tl.load(next_ptr).to(tl.float32) - sigma
    place = cond_ptr + batch * cond_batch + token[:, None] * cond_token + at
    velocity = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if GUIDED:
        cond = velocity
        place = uncond_ptr + batch * uncond_batch + token[:, None] * uncond_token + at
        uncond = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        change = cond - uncond
        if RULE == 1:
            length = tl.sqrt(tl.sum(change * change, axis=1))
            # The bound is infinite once sigma is at most truncate, where nothing is damped.
            bound = tl.where((truncate <= 0.0) | (sigma > truncate), 1.0, float("inf"))
            damped = length > bound
            # length ** power; a NaN is not longer than 1 and stays in `change`.
            change = change / tl.where(damped, tl.exp2(power * tl.log2(tl.where(damped, length, 1.0))), 1.0)[:, None]
        velocity = uncond + scale * change
        if RULE == 2:
            wanted = tl.sqrt(tl.sum(cond * cond, axis=1))
            found = tl.sqrt(tl.sum(velocity * velocity, axis=1))
            # Rows beyond the last token are empty: 0 / 0 there would be harmless, but it would raise under a sanitiser.
            velocity = velocity * (wanted / tl.where(token < tokens, found, 1.0))[:, None]
    place = latents_ptr + batch * latents_batch + token[:, None] * latents_token + at
    latents = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    place = out_ptr + batch * out_batch + token[:, None] * out_token + at
    tl.store(place, (latents + step * velocity).to(out_ptr.dtype.element_ty), mask=inside)
    if VELOCITY:
        place = velocity_ptr + batch * velocity_batch + token[:, None] * velocity_token + at
        tl.store(place, velocity.to(velocity_ptr.dtype.element_ty), mask=inside)


def guided_step(
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    out: Tensor,
    velocity: Tensor | None,
    scale: float,
    rule: str,
    power: float,
    truncate: float,
) -> None:
    """Write out (B, N, C) and, where it is no None, velocity (B, N, C)."""
    batch, tokens, channels = cond.shape
    if not tokens or not batch:
        return
    second = cond if uncond is None else uncond
    kept = out if velocity is None else velocity
    block = triton.next_power_of_2(channels)
    together = max(1, 1024 // block)
    guided_step_kernel[(triton.cdiv(tokens, together), batch)](
        latents, cond, second, sigma, sigma_next, out, kept,
        *latents.stride()[:2], *cond.stride()[:2], *second.stride()[:2], *out.stride()[:2], *kept.stride()[:2],
        tokens, scale, power, truncate,
        C=channels, BC=block, BT=together, GUIDED=uncond is not None, RULE=RULES.index(rule), VELOCITY=velocity is not None,
        num_warps=4, **FUSED,
    )  # fmt: skip
