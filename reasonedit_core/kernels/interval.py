"""Attention where every query sees one interval of keys, by our own Triton kernels: backend `interval` of the dispatch.

Shapes: q (B, T, H, D), k and v (B, S, Hk, D) with H a multiple of Hk; no mask, the mask of a pack, or `Intervals`. Forward and
backward; CUDA. It makes no mask of queries by keys and is not compiled anew for another mask. Without a mask it computes what
torch's attention computes, so `auto` takes it there only where a timing on that device found it faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..packing import PackMask
from . import devices, sdpa, timing
from .library import declare
from .mask import Intervals, Mask, intervals_of

MAX_HEAD_DIM = 128
KEYS = 64
"""Keys per tile of the backward kernel for keys."""

FEW = 64
"""Queries below which it is not worth a timing."""

_REACH = 2**31


def available(device: torch.device) -> str | None:
    """None, or why this machine cannot run it."""
    if device.type == "meta":
        return None
    return devices.refusal("triton", device) or devices.passed("interval", "triton", device)


def supports(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str | None:
    """None, or the reason why this call cannot run."""
    if isinstance(mask, Tensor):
        return "it takes no mask, the mask of a pack (PackMask) or intervals, got a bool tensor"
    if q.dtype not in (torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"it takes float16 or bfloat16, alike for q, k and v, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[3] > MAX_HEAD_DIM or v.shape[3] != q.shape[3]:
        return f"it takes one head dim up to {MAX_HEAD_DIM}, got {q.shape[3]} and {v.shape[3]} for values"
    if any(x.shape[1] * x.stride(1) >= _REACH for x in (q, k, v)):
        return "its offsets within a sequence are 32 bits wide, and this one is longer"
    if _learns(q, k, v) and devices.refusal("triton", q.device) is None:
        # Tested apart: who only edits pictures need not wait until it is compiled.
        return devices.passed("interval backward", "triton", q.device)
    return None


def passes(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str | None:
    """None, or why `auto` leaves a call that it may be able to run to the next backend."""
    if q.device.type != "cuda":
        return "chosen by name only, except on CUDA"
    if mask is not None:
        return None
    if q.shape[1] < FEW:
        return f"without a mask it is not timed for fewer than {FEW} queries, which leave its tiles empty"
    if _learns(q, k, v):
        return "without a mask it is timed for inference only"
    return available(q.device) or timing.slower("interval", run, "sdpa", sdpa.run, (q, k, v))


def run(q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """Attention -> (B, T, H, D) in q's dtype. Rows that see nothing are zeros."""
    intervals = intervals_of(mask) if isinstance(mask, PackMask) else mask
    assert intervals is None or isinstance(intervals, Intervals)
    lo, hi, seen = (None, None, None) if intervals is None else (intervals.lo, intervals.hi, None)
    if intervals is not None and _learns(q, k, v) and not torch.compiler.is_compiling():
        seen = intervals.seen_by(KEYS)  # kept with the intervals; the backward pass makes it anew where it is not given
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    return _FORWARD(q, k, v, lo, hi, seen, q.shape[3] ** -0.5)[0]


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    from . import triton_attention

    q, k, v, lo, hi, _, scale = args
    out, lse = _forward_like(*args)
    with devices.on(q):
        intervals = None if lo is None else (lo, hi)
        triton_attention.forward(q, k, v, intervals, out, lse, scale, upcast=devices.interpreted())
    return out, lse


def _forward_like(*args: Any) -> tuple[Tensor, Tensor]:
    q = args[0]
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=torch.float32)


def _backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from . import triton_attention

    q, k, v, out, lse, grad, lo, hi, seen, scale = args
    if lo is not None and seen is None:
        seen = Intervals(lo, hi, k.shape[1]).seen_by(KEYS)
    grads = _backward_like(*args)
    grad = grad if grad.stride(3) == 1 else grad.contiguous()
    with devices.on(q):
        intervals = None if lo is None else (lo, hi)
        triton_attention.backward(
            q, k, v, out, lse, grad, intervals, seen, grads, torch.empty_like(lse), scale, upcast=devices.interpreted()
        )
    return grads


def _backward_like(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in args[:3])


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, lo, hi, seen, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, lo, hi, seen)


def _gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    q, k, v, out, lse, lo, hi, seen = ctx.saved_tensors
    grads = _BACKWARD(q, k, v, out, lse, grad, lo, hi, seen, ctx.scale)
    return (*grads, None, None, None, None)


def _flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Counted as torch counts its own attention, whatever the intervals leave out."""
    from torch.utils.flop_counter import sdpa_flop_count

    (b, t, h, d), s, d_v = q_shape, k_shape[1], v_shape[3]
    return sdpa_flop_count((b, h, t, d), (b, h, s, d), (b, h, s, d_v))


def _backward_flops(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, **kwargs: Any) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    (b, t, h, d), s, d_v = q_shape, k_shape[1], v_shape[3]
    return sdpa_backward_flop_count((b, h, t, d_v), (b, h, t, d), (b, h, s, d), (b, h, s, d_v))


_INTERVALS = "Tensor? lo, Tensor? hi, Tensor? seen, float scale"

_FORWARD = declare(
    "interval_attention",
    f"(Tensor q, Tensor k, Tensor v, {_INTERVALS}) -> (Tensor, Tensor)",
    _forward,
    _forward_like,
    keep=_keep,
    gradient=_gradient,
    flops=_flops,
)
_BACKWARD = declare(
    "interval_attention_backward",
    f"(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor grad, {_INTERVALS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_like,
    flops=_backward_flops,
)
