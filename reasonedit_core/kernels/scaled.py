"""Products of fp8 weights with activations brought to fp8 on the way: the matrix units then multiply in 8 bits.

M rows, K in, N out. Each row of the activations gets a scale of its own, measured at every call; the weight keeps the scale or
scales that it was loaded with. Rounding to three mantissa bits makes each activation wrong by up to 1/16, a product of random
numbers by about 3 % of its length: a choice of speed over exactness, and never made for the user.

torch's own product with scales does the work (`torch.nn.functional.scaled_mm`, in older releases `torch._scaled_mm`): cards of
compute capability 8.9 and newer. It is tested on each card, with numbers that 8 bits hold, before it is used there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from . import devices

FP8, FP8_MAX = torch.float8_e4m3fn, 448.0
FLOOR = (8, 9)
"""Lowest compute capability that multiplies in 8-bit floating point."""

STEP = 16
"""The kernels take K and N that are multiples of this."""

DTYPES = (torch.bfloat16, torch.float16)
"""Of activations. In float32 nobody asks for the rounding to 8 bits."""

OP = "product in fp8"
WAYS = ("scaled_mm", "_scaled_mm")
"""torch's functions, the public one first: its form of scales is newer and may differ from release to release."""


def refusal(device: torch.device) -> str | None:
    """None, or why no product can be made in fp8 on `device`. Costly probes remember their answer."""
    return _way(device)[1]


def unable(x: Tensor, weight: Tensor) -> str | None:
    """None, or why this very call, x (..., K) and weight (N, K), cannot be made in fp8. Looks at no values."""
    if torch.is_grad_enabled() and x.requires_grad:
        return "gradients are wanted, which a rounding to 8 bits has none of"
    if x.dtype not in DTYPES:
        return f"it takes float16 or bfloat16, got {x.dtype}"
    if weight.dtype != FP8:
        return f"it takes weights in {FP8}, got {weight.dtype}"
    if weight.shape[0] % STEP or weight.shape[1] % STEP:
        return f"it takes multiples of {STEP} in and out, got {weight.shape[1]} and {weight.shape[0]}"
    if not x.numel():
        return "there is nothing to multiply"
    return refusal(x.device)


def product(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, *, way: str | None = None) -> Tensor:
    """x (..., K), weight (N, K) float8_e4m3fn, weight_scale () or (N,) float32, bias (N,) or None -> (..., N) in x's dtype.

    Sums run in float32 and are rounded once to bfloat16, the one type that every release answers with scales by row.
    """
    rows, scales = quantize_rows(x.reshape(-1, x.shape[-1]))
    columns = weight_scale.to(torch.float32).reshape(1, -1).expand(1, len(weight)).contiguous()
    bias = None if bias is None else bias.to(torch.bfloat16)
    out = _CALLS[way or _way(x.device)[0]](rows, weight.t(), scales, columns, bias)
    return out.to(x.dtype).view(*x.shape[:-1], len(weight))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, K) -> float8_e4m3fn (M, K) and float32 scales (M, 1) with x ~ stored * scale: the largest of a row becomes 448."""
    peak = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True, dtype=torch.float32)
    # A row of zeros keeps them. Below, its scale must not be a zero that is divided by.
    scale = (peak / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    # In float32: in 16 bits the quotient may round beyond the largest number, which float8 turns into NaN.
    return (x / scale).to(FP8), scale


def _public(rows: Tensor, columns: Tensor, scales: Tensor, column_scales: Tensor, bias: Tensor | None) -> Tensor:
    by_row = functional.ScalingType.RowWise
    options = {"bias": bias, "output_dtype": torch.bfloat16, "use_fast_accum": rows.is_cuda}
    return functional.scaled_mm(rows, columns, scales, by_row, column_scales, by_row, **options)


def _private(rows: Tensor, columns: Tensor, scales: Tensor, column_scales: Tensor, bias: Tensor | None) -> Tensor:
    options = {"bias": bias, "out_dtype": torch.bfloat16, "use_fast_accum": rows.is_cuda}
    return torch._scaled_mm(rows, columns, scale_a=scales, scale_b=column_scales, **options)


_CALLS: dict[str, Callable[..., Tensor]] = {"scaled_mm": _public, "_scaled_mm": _private}


def _way(device: torch.device) -> tuple[str | None, str | None]:
    """(torch's function that is taken on `device`, None), or (None, why there is none)."""
    if devices.asked() == "off":
        return None, f"{devices.VARIABLE}=off"
    if device.type != "cuda":
        return None, f"it needs CUDA, not {device.type}"
    reason = _card(devices.number(device))
    if reason is not None:
        return None, reason
    reasons = []
    for way in WAYS:
        reason = _absent(way) or devices.passed(OP, way, device)
        if reason is None:
            return way, None
        reasons.append(f"{way}: {reason}")
    return None, "; ".join(reasons)


@torch.compiler.assume_constant_result
def _card(index: int) -> str | None:
    if torch.version.hip:
        return "it was made for NVIDIA cards, not for ROCm"
    found = torch.cuda.get_device_capability(index)
    if found < FLOOR:
        return f"it needs a card of compute capability {FLOOR[0]}.{FLOOR[1]} or newer, found {found[0]}.{found[1]}"
    return None


@torch.compiler.assume_constant_result
def _absent(way: str) -> str | None:
    if way == "scaled_mm":
        there = hasattr(functional, "scaled_mm") and hasattr(getattr(functional, "ScalingType", None), "RowWise")
        return None if there else f"torch {torch.__version__} has no torch.nn.functional.scaled_mm with scales by row"
    return None if hasattr(torch, "_scaled_mm") else f"torch {torch.__version__} has no torch._scaled_mm"
