"""The obviously right form of the fused element-wise ops: plain torch, differentiable. It defines what the kernels must answer.

B batch, T text tokens, N picture tokens, L = T + N, S rows of a key-value cache, H query heads, Hk key heads, D head dim,
C width or channels, R rows of modulation. Everything is computed in float32 (float64 for float64) and rounded once.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FP16_MAX = 65504.0

RULES = ("plain", "step1x", "qwen")
"""How two predictions are combined: not damped; Step1X-Edit's rule; Qwen-Image's rule."""

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
"""`dtype.to_complex` says the same, but torch.compile cannot trace it."""


class Heads(NamedTuple):
    """One stream before norm and rotation: q (B, N, H, D), k and v (B, N, Hk, D), weights (D,) of the RMS norms of q and k."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_weight: Tensor
    k_weight: Tensor


def widened(x: Tensor) -> torch.dtype:
    """The dtype that x is computed in."""
    return torch.promote_types(x.dtype, torch.float32)


def norm_rope(x: Tensor, weight: Tensor, table: Tensor, eps: float) -> Tensor:
    """RMS norm per head, then rotation: x (B, N, H, D), weight (D,), table (N, D / 2) or (B, N, D / 2) complex."""
    wide = widened(x)
    normed = functional.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps)
    pairs = torch.view_as_complex(normed.unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table.unsqueeze(-2).to(_COMPLEX[wide])).flatten(-2).to(x.dtype)


def qk_norm_rope(
    image: Heads, table: Tensor, text: Heads | None = None, rows: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor]:
    """Joint q (B, L, H, D), k and v (B, L, Hk, D); table (L, D / 2) or (B, L, D / 2) complex, by joint row.

    rows (L,): the joint row of each text token, then of each picture token, every row once; None: text first.
    """
    q, k, v = _streams(image, table, text, rows, eps)
    if rows is None:
        return q, k, v
    return tuple(torch.empty_like(x).index_copy(1, rows.long(), x) for x in (q, k, v))


def qk_norm_rope_cached(
    image: Heads,
    table: Tensor,
    cache: tuple[Tensor, Tensor],
    text: Heads | None = None,
    rows: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """The same for some rows of a joint sequence of S: k and v are written into the rows of the cache (B, S, Hk, D), q
    (B, L, H, D) comes back without gaps, text first. table (S, D / 2) or (B, S, D / 2)."""
    q, k, v = _streams(image, table, text, rows, eps)
    if rows is None:
        cache[0][:, : k.shape[1]], cache[1][:, : v.shape[1]] = k, v
    else:
        cache[0].index_copy_(1, rows.long(), k)
        cache[1].index_copy_(1, rows.long(), v)
    return q


def _streams(image: Heads, table: Tensor, text: Heads | None, rows: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of all tokens, text first."""
    length = image.q.shape[1] + (0 if text is None else text.q.shape[1])
    table = table[..., :length, :] if rows is None else table.index_select(-2, rows.long())
    parts, start = [], 0
    for stream in (image,) if text is None else (text, image):
        own = slice(start, start + stream.q.shape[1])
        pairs = ((stream.q, stream.q_weight), (stream.k, stream.k_weight))
        turned = [norm_rope(x, weight, table[..., own, :], eps) for x, weight in pairs]
        parts.append((*turned, stream.v))
        start = own.stop
    return parts[0] if len(parts) == 1 else tuple(torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor | None = None, clamp: bool = False) -> Tensor:
    """x + gate y; x and y (B, L, C), gate and rows as in `gate_norm_modulate`."""
    wide = widened(x)
    out = x.to(wide) + per_token(gate, rows, wide) * y.to(wide)
    if clamp and x.dtype == torch.float16:
        out = out.clamp(-FP16_MAX, FP16_MAX)
    return out.to(x.dtype)


def norm_modulate(x: Tensor, scale: Tensor, shift: Tensor, rows: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift; x (B, L, C), scale, shift and rows as in `gate_norm_modulate`."""
    wide = widened(x)
    normed = functional.layer_norm(x.to(wide), x.shape[-1:], eps=eps)
    return (normed * (1 + per_token(scale, rows, wide)) + per_token(shift, rows, wide)).to(x.dtype)


def gate_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    clamp: bool = False,
) -> tuple[Tensor, Tensor]:
    """The residual x + gate y and its norm, modulated. x and y (B, L, C); gate, scale and shift (R, C).

    rows (L,) or (B, L): the row of modulation that a token takes, -1 for none (gate, scale and shift are then 0); None: R is B
    or 1, a row per sample. clamp: in float16 the residual stays within the finite numbers. The norm is that of the rounded
    residual, so that fused and unfused answers are equal.
    """
    residual = gate_residual(x, y, gate, rows, clamp)
    return residual, norm_modulate(residual, scale, shift, rows, eps)


def per_token(table: Tensor, rows: Tensor | None, wide: torch.dtype) -> Tensor:
    """Modulation (R, C) as it meets tokens (B, L, C): (R, 1, C) without rows, else (1 | B, L, C) with zeros for -1."""
    table = table.to(wide)
    if rows is None:
        return table[:, None]
    taken = _Taken.apply(table, rows.long())
    return taken if rows.ndim == 2 else taken[None]


class _Taken(torch.autograd.Function):
    """table[rows] with zeros for -1. Its gradient is summed by a matrix product: an index gradient on CUDA would add the many
    tokens of a document one after the other."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.n_rows = len(table)
        return torch.where((rows >= 0)[..., None], table[rows.clamp(min=0)], table.new_zeros(()))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        numbers = torch.arange(ctx.n_rows, device=rows.device)
        picks = (numbers[:, None] == rows.flatten()).to(grad.dtype)
        with _full_precision(grad.device):
            return picks @ grad.flatten(0, -2), None


def _full_precision(device: torch.device) -> AbstractContextManager:
    """Without autocast, which would take a matrix product in the low precision."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def guided_step(
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    scale: float = 1.0,
    rule: str = "plain",
    power: float = 0.4,
    truncate: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Latents after one Euler step (B, N, C), and the velocity (B, N, C) that it followed, both in the dtype of `cond`.

    latents, cond and uncond (B, N, C); without uncond the velocity is cond. sigma and sigma_next () float32. Rules:
    plain: uncond + scale (cond - uncond). step1x: while sigma > truncate (truncate <= 0: always) a token's difference that is
    longer than 1 is divided by length ** power. qwen: the combined velocity gets the length of the conditional one, per token.
    """
    wide = widened(cond)
    velocity = cond.to(wide)
    if uncond is not None:
        velocity = _combined(velocity, uncond.to(wide), sigma, scale, rule, power, truncate)
    out = latents.to(wide) + (sigma_next - sigma).to(wide) * velocity
    return out.to(cond.dtype), velocity.to(cond.dtype)


def _combined(cond: Tensor, uncond: Tensor, sigma: Tensor, scale: float, rule: str, power: float, truncate: float) -> Tensor:
    change = cond - uncond
    if rule == "step1x":
        length = change.norm(dim=-1, keepdim=True)
        damped = length > 1
        if truncate > 0:
            damped = damped & (sigma > truncate)
        change = change / torch.where(damped, length**power, torch.ones_like(length))
    combined = uncond + scale * change
    if rule == "qwen":
        combined = combined * (cond.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
    return combined
