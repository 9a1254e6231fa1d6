"""The fused element-wise ops: `qk_norm_rope` (K1), `gate_norm_modulate` (K2) and `guided_step` (K4).

B batch, T text tokens, N picture tokens, L = T + N, S rows of a key-value cache, H query heads, Hk key heads, D head dim,
C width or channels, R rows of modulation.

A call goes to the first of `KERNELS` that runs on its device, passed its test there and takes its tensors, else to the plain
form in `reference_ops`, which defines the answer; kernels differ from it by rounding. backend: "auto", or "triton", "nvrtc"
or "reference" by name, where one that cannot run raises with its reason. The environment variable REASONEDIT_KERNELS (auto,
off, triton, nvrtc) narrows what any call may use. On the meta device a kernel's operator stands for it, so that work can be
counted without a card.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import BackendUnavailable, ConfigError
from . import custom_ops, devices
from . import reference_ops as plain
from .reference_ops import RULES, Heads

Rope = tuple[Tensor, Tensor] | Tensor
"""cos and sin, each (L, D) or (B, L, D), every angle written twice (pairs are interleaved); or one complex table (L, D / 2) or
(B, L, D / 2)."""

KERNELS = ("triton", "nvrtc")
"""In order of preference. Both have all three ops."""

OPS = ("qk_norm_rope", "gate_norm_modulate", "guided_step")

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
MAX_WIDTH = 16384
MAX_CHANNELS = 1024


def qk_norm_rope(
    image: Heads,
    rope: Rope,
    *,
    text: Heads | None = None,
    rows: Tensor | None = None,
    cache: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """RMS-normalise queries and keys per head, rotate them, and lay both streams out for attention.

    image: `Heads` of the pictures, or of the whole sequence where it has one stream. text: those of the text, which stands
    first. rows (L,) int32 or int64: the row of each text token, then of each picture token, in the joint sequence; None: in
    order. rope: by row of the joint sequence.

    Without cache: joint q (B, L, H, D), k and v (B, L, Hk, D); rows, if given, names every row once. The v of a single stream
    that stays in order is handed back as it came.
    With cache, k and v (B, S, Hk, D) of a joint sequence of S rows: k and v are written into its rows, q (B, L, H, D) comes
    back without gaps in the order of the tokens, together with the cache. Inference only. Rows that the sequence does not
    have are an error of the caller: the plain form raises, a kernel leaves the cache as it is.
    """
    length = image.q.shape[1] + (0 if text is None else text.q.shape[1])
    cos, sin = _tables(rope)
    _check_heads(image, text, cos, sin, rows, cache, length)
    tensors = [*image, *(text or ()), *(cache or ())]
    if cache is not None and _learns(tensors):
        raise ConfigError("a key-value cache is for inference: call under torch.no_grad().")
    chosen = pick("qk_norm_rope", backend, image.q.device, _heads_refusal(image, text, cache))
    if chosen == "reference":
        table = rope if isinstance(rope, Tensor) else torch.complex(cos, sin)
        if cache is None:
            return plain.qk_norm_rope(image, table, text, rows, eps)
        return plain.qk_norm_rope_cached(image, table, cache, text, rows, eps), *cache
    cos, sin = (x.float() if x.ndim == 3 else x[None].float() for x in (cos, sin))
    image, text = _dense(image), None if text is None else _dense(text)
    if cache is None and text is None and rows is None:
        q, k = custom_ops.qk_norm_rope_pair(image.q, image.k, image.q_weight, image.k_weight, cos, sin, eps, chosen)
        return q, k, image.v
    flat = (*image, *(text or (None,) * 5), cos, sin)
    if cache is None:
        return custom_ops.qk_norm_rope(*flat, rows, eps, chosen)
    return custom_ops.qk_norm_rope_cached(*flat, *cache, rows, eps, chosen), *cache


def gate_norm_modulate(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    eps: float = 1e-6,
    clamp: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """residual = x + gate y, and LayerNorm(residual) (1 + scale) + shift, both (B, L, C) in the dtype of x.

    x and y (B, L, C); gate, scale and shift (R, C). Without y and gate the residual is x itself; without scale and shift there
    is no second answer (None). rows (L,) or (B, L) int32 or int64: the row of modulation each token takes, -1 for none (gate,
    scale and shift are then 0); without rows R is B, a row per sample, or 1. clamp: in float16 the residual stays within the
    finite numbers, as the released DiTs keep it at some places. The LayerNorm has no weights of its own.
    """
    _check_modulation(x, y, gate, scale, shift, rows)
    gated, normed = y is not None, scale is not None
    if not gated and not normed:
        raise ConfigError("gate_norm_modulate has nothing to do: give y and gate, or scale and shift, or all four.")
    tables = [table for table in (gate, scale, shift) if table is not None]
    chosen = pick("gate_norm_modulate", backend, x.device, _modulation_refusal(x, y, tables))
    if chosen == "reference":
        if gated and normed:
            return plain.gate_norm_modulate(x, y, gate, scale, shift, rows, eps, clamp)
        if gated:
            return plain.gate_residual(x, y, gate, rows, clamp), None
        return x, plain.norm_modulate(x, scale, shift, rows, eps)
    x, y, gate, scale, shift = (_flat(z) for z in (x, y, gate, scale, shift))
    if gated and normed:
        return custom_ops.gate_norm_modulate(x, y, gate, scale, shift, rows, eps, clamp, chosen)
    if gated:
        return custom_ops.gate_residual(x, y, gate, rows, clamp, chosen), None
    return x, custom_ops.norm_modulate(x, scale, shift, rows, eps, chosen)


def guided_step(
    latents: Tensor,
    cond: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    uncond: Tensor | None = None,
    scale: float = 1.0,
    rule: str = "plain",
    power: float = 0.4,
    truncate: float = 0.0,
    velocity: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """One Euler step along the guided velocity: latents + (sigma_next - sigma) v, in the dtype of cond; inference only.

    latents, cond and uncond (B, N, C): predictions with and without the condition; without uncond v is cond. sigma and
    sigma_next () float32 on the same device: nothing waits for their values, so a CUDA graph may hold the step. rule: "plain"
    is uncond + scale (cond - uncond); "step1x" and "qwen" are the rules of `flow.combine_step1x` (with power; it holds while
    sigma > truncate, always for truncate <= 0) and `flow.combine_qwen`. velocity: v (B, N, C) is the second answer.
    """
    if rule not in RULES:
        raise ConfigError(f"guidance rule {rule!r} is not known. Choose one of {', '.join(map(repr, RULES))}.")
    tensors = [latents, cond] if uncond is None else [latents, cond, uncond]
    for x in (*tensors, sigma, sigma_next):
        if x.requires_grad:
            raise ConfigError("guided_step computes no gradients, and one of its inputs requires them; detach it first.")
    if any(x.ndim != 3 or x.shape != cond.shape or x.device != cond.device for x in tensors):
        raise ConfigError(
            "guided_step takes latents, cond and uncond of one shape (B, N, C) on one device, "
            f"got {', '.join(f'{tuple(x.shape)} on {x.device}' for x in tensors)}."
        )
    if any(x.ndim or x.device != cond.device or not x.is_floating_point() for x in (sigma, sigma_next)):
        raise ConfigError("guided_step takes sigma and sigma_next as tensors of one number each, on the device of cond.")
    chosen = pick("guided_step", backend, cond.device, _step_refusal(tensors, sigma, sigma_next))
    call = (sigma, sigma_next, float(scale), rule, float(power), float(truncate))
    if chosen == "reference":
        found = plain.guided_step(latents, cond, uncond, *call)
        return found if velocity else found[0]
    latents, cond, uncond = (_flat(x) for x in (latents, cond, uncond))
    if velocity:
        return custom_ops.guided_step_velocity(latents, cond, uncond, *call, chosen)
    return custom_ops.guided_step(latents, cond, uncond, *call, chosen)


# --- the choice ---


def pick(op: str, backend: str, device: torch.device, refused: str | None = None) -> str:
    """The backend of a call to `op` on `device`. refused: why no kernel takes the tensors of this call, or None."""
    if backend == "reference":
        return backend
    if backend != "auto":
        if backend not in KERNELS:
            names = ", ".join(map(repr, ("auto", *KERNELS, "reference")))
            raise ConfigError(f"kernel backend {backend!r} is not known. Choose one of {names}.")
        reason = refused or unable(op, backend, device)
        if reason is not None:
            words = f"kernel backend {backend!r} cannot run this {op}: {reason}."
            raise BackendUnavailable(f"{words} Choose 'auto' or 'reference'.")
        return backend
    if device.type not in ("cuda", "meta"):
        return "reference"
    reasons = []
    for name in KERNELS:
        reason = refused or unable(op, name, device)
        if reason is None:
            _tell(op, device, name, reasons)
            return name
        reasons.append(f"{name}: {reason}")
    _tell(op, device, "plain torch", reasons)
    return "reference"


def has_kernel(op: str, x: Tensor) -> bool:
    """Whether a kernel computes `op` where x is. For callers that have a plain form of their own, which rounds at other places
    and is what runs where there is none."""
    return pick(op, "auto", x.device) != "reference"


def unable(op: str, backend: str, device: torch.device) -> str | None:
    """None, or why `backend` does not compute `op` on `device`."""
    if device.type == "meta":
        asked = devices.asked()
        return None if asked in ("auto", backend) else f"{devices.VARIABLE}={asked}"
    return devices.refusal(backend, device) or devices.passed(op, backend, device)


def explain(device: torch.device) -> list[str]:
    """Per op, what computes it on `device`, and what each kernel says of itself: lines for `reasonedit doctor`."""
    lines = []
    for op in OPS:
        reasons = {name: unable(op, name, device) for name in KERNELS}
        first = next((name for name in KERNELS if reasons[name] is None and device.type == "cuda"), "plain torch")
        lines.append(f"{op} on {device}: {first} would run")
        lines += [f"  {name}: {reason or 'available'}" for name, reason in reasons.items()]
    return lines


def _tell(op: str, device: torch.device, name: str, reasons: list[str]) -> None:
    if not torch.compiler.is_compiling() and device.type != "meta":
        devices.log_once("; ".join([f"{op} on {device}: {name}", *reasons]))


# --- checks: what no form of the op could make sense of ---


def _check_heads(
    image: Heads,
    text: Heads | None,
    cos: Tensor,
    sin: Tensor,
    rows: Tensor | None,
    cache: tuple[Tensor, Tensor] | None,
    length: int,
) -> None:
    batch, _, heads, dim = image.q.shape
    key_heads = image.k.shape[2]
    for stream in (image,) if text is None else (image, text):
        tokens = stream.q.shape[1]
        wanted = [(batch, tokens, heads, dim), (batch, tokens, key_heads, dim), (batch, tokens, key_heads, dim), (dim,), (dim,)]
        if [tuple(x.shape) for x in stream] != wanted or dim % 2:
            raise ConfigError(
                "qk_norm_rope takes q (B, N, H, D), k and v (B, N, Hk, D), weights (D,) with an even D, alike for both "
                f"streams, got {_shapes(stream)}."
            )
    whole = length
    if cache is not None:
        whole = cache[0].shape[1]
        if any(tuple(x.shape) != (batch, whole, key_heads, dim) or x.dtype != image.k.dtype for x in cache):
            raise ConfigError(
                f"qk_norm_rope takes a cache k and v ({batch}, S, {key_heads}, {dim}) of {image.k.dtype}, "
                f"got {', '.join(f'{tuple(x.shape)} of {x.dtype}' for x in cache)}."
            )
    for x in (cos, sin):
        if x.ndim not in (2, 3) or tuple(x.shape[-2:]) != (whole, dim // 2) or (x.ndim == 3 and x.shape[0] not in (1, batch)):
            raise ConfigError(f"rotation tables are for {whole} rows and {dim // 2} pairs, got {tuple(x.shape)} in pairs.")
    if rows is not None and (rows.dtype not in (torch.int32, torch.int64) or tuple(rows.shape) != (length,)):
        raise ConfigError(f"rows are ({length},) int32 or int64, one per token, got {tuple(rows.shape)} {rows.dtype}.")


def _check_modulation(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, rows: Tensor | None
) -> None:
    if (y is None) != (gate is None) or (scale is None) != (shift is None):
        raise ConfigError("gate_norm_modulate takes y with gate, and scale with shift.")
    if x.ndim != 3 or (y is not None and y.shape != x.shape):
        raise ConfigError(f"gate_norm_modulate takes x and y (B, L, C), got {_shapes([x] if y is None else [x, y])}.")
    batch, tokens, width = x.shape
    tables = [table for table in (gate, scale, shift) if table is not None]
    count = tables[0].shape[0] if tables else 0
    if any(table.ndim != 2 or tuple(table.shape) != (count, width) for table in tables):
        raise ConfigError(f"modulation is (R, {width}) with one R, got {_shapes(tables)}.")
    if rows is None:
        if tables and count not in (1, batch):
            raise ConfigError(f"modulation has {count} rows for a batch of {batch}: give rows, or a row per sample, or one.")
    elif rows.dtype not in (torch.int32, torch.int64) or tuple(rows.shape) not in ((tokens,), (batch, tokens)):
        raise ConfigError(f"rows are ({tokens},) or ({batch}, {tokens}) int32 or int64, got {tuple(rows.shape)} {rows.dtype}.")


def _shapes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(str(tuple(x.shape)) for x in tensors)


# --- refusals: what the plain form takes and a kernel does not ---


def _mixed(tensors: list[Tensor]) -> str | None:
    first = tensors[0]
    if first.dtype not in DTYPES:
        return f"it takes float16, bfloat16 or float32, got {first.dtype}"
    for x in tensors:
        if x.dtype != first.dtype or x.device != first.device:
            return f"it takes tensors of one dtype on one device, got {first.dtype} on {first.device}, {x.dtype} on {x.device}"
    return None


def _heads_refusal(image: Heads, text: Heads | None, cache: tuple[Tensor, Tensor] | None) -> str | None:
    streams = (image,) if text is None else (image, text)
    if image.q.shape[3] > MAX_HEAD_DIM:
        return f"it takes a head dim up to {MAX_HEAD_DIM}, got {image.q.shape[3]}"
    if cache is not None and any(x.stride(3) != 1 for x in cache):
        return "it takes a cache whose channels lie side by side"
    values = [x for stream in streams for x in stream[:3]]
    weights = [x for stream in streams for x in stream[3:]]
    return _mixed(values) or _mixed(weights)


def _modulation_refusal(x: Tensor, y: Tensor | None, tables: list[Tensor]) -> str | None:
    if x.shape[2] > MAX_WIDTH:
        return f"it takes a width up to {MAX_WIDTH}, got {x.shape[2]}"
    return _mixed([x] if y is None else [x, y]) or _mixed(tables)


def _step_refusal(tensors: list[Tensor], *sigmas: Tensor) -> str | None:
    if any(x.dtype != torch.float32 for x in sigmas):
        return "it takes sigmas in float32"
    if tensors[1].shape[2] > MAX_CHANNELS:
        return f"it takes up to {MAX_CHANNELS} channels, got {tensors[1].shape[2]}"
    return _mixed(tensors[:1]) or _mixed(tensors[1:])


# --- layout ---


def _tables(rope: Rope) -> tuple[Tensor, Tensor]:
    """cos and sin (..., L, D / 2), views of what was given."""
    if isinstance(rope, Tensor):
        pairs = torch.view_as_real(rope)
        return pairs[..., 0], pairs[..., 1]
    cos, sin = rope
    return cos[..., ::2], sin[..., ::2]


def _flat(x: Tensor | None) -> Tensor | None:
    """With channels side by side, which rows of modulation and of a projection's parts have without a copy."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _dense(stream: Heads) -> Heads:
    return Heads(*map(_flat, stream))


def _learns(tensors: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
