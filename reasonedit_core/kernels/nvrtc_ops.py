"""Launches the CUDA C++ kernels of `nvrtc_source`. Same functions as `triton_ops`: they write into tensors that they are given.

The structures mirror those of the source: members of 8 bytes, in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from . import nvrtc_build
from .nvrtc_source import COMMON, HALF, KERNELS
from .reference_ops import RULES, Heads

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

_INT, _POINTER, _DOUBLE = ctypes.c_longlong, ctypes.c_void_p, ctypes.c_double


class _Heads(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("batch", _INT), ("row", _INT), ("head", _INT)]


class _Tokens(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("batch", _INT), ("token", _INT)]


class _Modulation(ctypes.Structure):
    _fields_ = [("data", _POINTER), ("row", _INT)]


class _HeadArguments(ctypes.Structure):
    _fields_ = [
        *((name, _Heads) for name in ("q", "k", "v", "out_q", "out_k", "out_v")),
        ("q_weight", _POINTER),
        ("k_weight", _POINTER),
        ("cos", _Heads),
        ("sin", _Heads),
        ("rows", _POINTER),
        *((name, _INT) for name in ("row_bytes", "start", "length", "heads", "key_heads", "values", "compact")),
        ("eps", _DOUBLE),
    ]


class _ModulationArguments(ctypes.Structure):
    _fields_ = [
        *((name, _Tokens) for name in ("x", "y", "residual", "normed")),
        *((name, _Modulation) for name in ("gate", "scale", "shift")),
        ("rows", _POINTER),
        *((name, _INT) for name in ("row_bytes", "rows_batch", "count")),
        ("eps", _DOUBLE),
    ]


class _StepArguments(ctypes.Structure):
    _fields_ = [
        *((name, _Tokens) for name in ("latents", "cond", "uncond", "out", "velocity")),
        ("sigma", _POINTER),
        ("sigma_next", _POINTER),
        ("tokens", _INT),
        *((name, _DOUBLE) for name in ("scale", "power", "truncate")),
    ]


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
    """As `triton_ops.qk_norm_rope`; cos and sin in float32, tensors of one dtype, weights of one dtype."""
    start = 0
    for stream in streams:
        batch, tokens, heads, dim = stream.q.shape
        if batch and tokens:
            values = out[2] is not None
            written = (out[0], out[1], out[2] if values else out[1])
            # Four channels per access where rows allow it, else two: a pair is turned together.
            chunk = 2 if dim % 4 else 4
            moved = [*stream[:3], *written]
            macros = {"HEAD_DIM": dim, "CHUNK": chunk, "ALIGNED": int(_aligned(moved, chunk))}
            arguments = _HeadArguments(
                *map(_heads, moved), stream.q_weight.data_ptr(), stream.k_weight.data_ptr(), _table(cos), _table(sin),
                *_rows(rows), start, out[1].shape[1], heads, stream.k.shape[2], values, compact, eps,
            )  # fmt: skip
            launch("qk_norm_rope", stream.q, stream.q_weight, macros, (tokens, batch), 256, arguments)
        start += tokens


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
    """As `triton_ops.gate_norm_modulate`; x and y of one dtype, modulation of one dtype."""
    batch, tokens, width = x.shape
    if not batch or not tokens:
        return
    tables = [table for table in (gate, scale, shift) if table is not None]
    moved = [z if z is not None else x for z in (x, y, residual, normed)]
    chunk = 16 // x.element_size()
    # Without whole chunks in a row, or at odd addresses, every element is a chunk.
    if width % chunk or not _aligned([*moved, *tables], chunk):
        chunk = 1
    threads = min(1024, max(32, -(-width // chunk // 32) * 32))
    macros = {
        "WIDTH": width,
        "CHUNK": chunk,
        "ALIGNED": 1,
        "THREADS": threads,
        "GATED": int(y is not None),
        "NORMED": int(scale is not None),
        "CLAMP": int(clamp and x.dtype == torch.float16),
    }
    arguments = _ModulationArguments(
        *(_Tokens(z.data_ptr(), *z.stride()[:2]) for z in moved),
        *(_Modulation(z.data_ptr(), z.stride(0)) for z in (tables[0] if z is None else z for z in (gate, scale, shift))),
        *_rows(rows), rows.stride(0) if rows is not None and rows.ndim == 2 else 0, tables[0].shape[0], eps,
    )  # fmt: skip
    launch("gate_norm_modulate", x, tables[0], macros, (tokens, batch), threads, arguments)


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
    """As `triton_ops.guided_step`; sigmas in float32."""
    batch, tokens, channels = cond.shape
    if not batch or not tokens:
        return
    macros = {
        "CHANNELS": channels,
        "ALIGNED": 0,
        "GUIDED": int(uncond is not None),
        "RULE": RULES.index(rule),
        "VELOCITY": int(velocity is not None),
    }
    moved = (latents, cond, cond if uncond is None else uncond, out, out if velocity is None else velocity)
    arguments = _StepArguments(
        *(_Tokens(z.data_ptr(), *z.stride()[:2]) for z in moved),
        sigma.data_ptr(), sigma_next.data_ptr(), tokens, scale, power, truncate,
    )  # fmt: skip
    launch("guided_step", cond, latents, macros, (-(-tokens // 4), batch), 128, arguments)


def launch(
    name: str,
    values: Tensor,
    weights: Tensor,
    macros: dict[str, int],
    grid: tuple[int, int],
    threads: int,
    arguments: ctypes.Structure,
) -> None:
    """Compile kernel `name` for the dtypes of these tensors, unless that was done, and run it on their card."""
    options = compile_options(values.dtype, weights.dtype, macros)
    nvrtc_build.kernel(name, program(name), options, values.device.index)(grid, threads, arguments)


def program(name: str, half: str = HALF) -> str:
    """The whole source of one kernel."""
    return half + COMMON + KERNELS[name]


def compile_options(values: torch.dtype, weights: torch.dtype, macros: dict[str, int]) -> tuple[str, ...]:
    """Macros of a compilation as the compiler's options."""
    named = {"KIND": KINDS[values], "WEIGHT_KIND": KINDS[weights], **macros}
    return tuple(f"-D{name}={value}" for name, value in named.items())


def _aligned(tensors: Iterable[Tensor], chunk: int) -> bool:
    """Whether every row of every tensor begins where `chunk` elements can be read at once."""
    for x in tensors:
        if x.data_ptr() % (chunk * x.element_size()) or any(step % chunk for step in x.stride()[:-1]):
            return False
    return True


def _heads(x: Tensor) -> _Heads:
    return _Heads(x.data_ptr(), *x.stride()[:3])


def _table(x: Tensor) -> _Heads:
    return _Heads(x.data_ptr(), x.stride(0) if x.shape[0] > 1 else 0, *x.stride()[1:])


def _rows(rows: Tensor | None) -> tuple[int, int]:
    return (0, 0) if rows is None else (rows.data_ptr(), rows.element_size())
