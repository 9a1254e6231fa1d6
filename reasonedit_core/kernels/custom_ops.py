"""The fused element-wise ops as torch operators. `ops` checks calls and chooses the backend; callers use that.

B batch, L tokens, S rows of a cache, H query heads, Hk key heads, D head dim, C width or channels, R rows of modulation.
Every operator takes the backend by name: "triton", "nvrtc", or "reference", which is the plain form. Gradients run the plain
form once more. A kernel reads and writes each tensor once. Answers are contiguous, whatever the strides of the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import devices
from . import reference_ops as plain
from .library import declare, recomputed
from .reference_ops import Heads


def _module(backend: str) -> ModuleType:
    if backend == "triton":
        from . import triton_ops

        return triton_ops
    from . import nvrtc_ops

    return nvrtc_ops


# --- K1 ---

_STREAMS = (
    "Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor? text_q, Tensor? text_k, Tensor? text_v, "
    "Tensor? text_q_weight, Tensor? text_k_weight, Tensor cos, Tensor sin"
)


def _streams(tensors: Sequence[Tensor | None]) -> tuple[Heads, Heads | None]:
    """Pictures and text, out of the first ten arguments."""
    return Heads(*tensors[:5]), None if tensors[5] is None else Heads(*tensors[5:10])


def _longer(x: Tensor, text: Tensor | None) -> Tensor:
    """Room for the rows of x (B, N, ...) and of the text."""
    return x.new_empty((x.shape[0], x.shape[1] + (0 if text is None else text.shape[1]), *x.shape[2:]))


def _joint(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, cos, sin, rows, eps, backend = args
    image, text = _streams(tensors)
    if backend == "reference":
        q, k, v = plain.qk_norm_rope(image, torch.complex(cos, sin), text, rows, eps)
        # An operator may not hand back what it was given.
        return q, k, v.clone(memory_format=torch.contiguous_format) if v is image.v else v
    out = _joint_like(*args)
    with devices.on(image.q):
        _module(backend).qk_norm_rope([image] if text is None else [text, image], cos, sin, rows, out, eps)
    return out


def _joint_like(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(_longer(x, args[5]) for x in args[:3])


def _keep_joint(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _joint_gradient(ctx: Any, *grads: Tensor) -> tuple:
    def again(*x: Any) -> tuple:
        image, text = _streams(x)
        return plain.qk_norm_rope(image, torch.complex(x[10], x[11]), text, x[12], ctx.eps)

    return (*_without_tables(recomputed(again, ctx.saved_tensors, grads), 10), None, None)


def _pair(*args: Any) -> tuple[Tensor, Tensor]:
    q, k, q_weight, k_weight, cos, sin, eps, backend = args
    stream = Heads(q, k, k, q_weight, k_weight)
    if backend == "reference":
        return plain.qk_norm_rope(stream, torch.complex(cos, sin), eps=eps)[:2]
    out = _pair_like(*args)
    with devices.on(q):
        _module(backend).qk_norm_rope([stream], cos, sin, None, (*out, None), eps)
    return out


def _pair_like(*args: Any) -> tuple[Tensor, Tensor]:
    return tuple(x.new_empty(x.shape) for x in args[:2])


def _pair_gradient(ctx: Any, *grads: Tensor) -> tuple:
    def again(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> tuple:
        table = torch.complex(cos, sin)
        return plain.norm_rope(q, q_weight, table, ctx.eps), plain.norm_rope(k, k_weight, table, ctx.eps)

    return (*_without_tables(recomputed(again, ctx.saved_tensors, grads), 4), None, None)


def _without_tables(found: list[Tensor | None], start: int) -> list[Tensor | None]:
    """The two rotation tables are positions, which nothing is learned from."""
    return [None if start <= number < start + 2 else grad for number, grad in enumerate(found)]


def _cached(*args: Any) -> Tensor:
    *tensors, cos, sin, cache_k, cache_v, rows, eps, backend = args
    image, text = _streams(tensors)
    if backend == "reference":
        return plain.qk_norm_rope_cached(image, torch.complex(cos, sin), (cache_k, cache_v), text, rows, eps)
    out = _cached_like(*args)
    streams = [image] if text is None else [text, image]
    with devices.on(image.q):
        _module(backend).qk_norm_rope(streams, cos, sin, rows, (out, cache_k, cache_v), eps, compact=True)
    return out


def _cached_like(*args: Any) -> Tensor:
    return _longer(args[0], args[5])


qk_norm_rope = declare(
    "qk_norm_rope",
    f"({_STREAMS}, Tensor? rows, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    _joint,
    _joint_like,
    keep=_keep_joint,
    gradient=_joint_gradient,
)
qk_norm_rope_pair = declare(
    "qk_norm_rope_pair",
    "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, float eps, str backend) "
    "-> (Tensor, Tensor)",
    _pair,
    _pair_like,
    keep=_keep_joint,
    gradient=_pair_gradient,
)
qk_norm_rope_cached = declare(
    "qk_norm_rope_cached",
    f"({_STREAMS}, Tensor(a!) cache_k, Tensor(b!) cache_v, Tensor? rows, float eps, str backend) -> Tensor",
    _cached,
    _cached_like,
    mutates=("cache_k", "cache_v"),
)


# --- K2 ---


def _like_first(*args: Any) -> Tensor:
    return args[0].new_empty(args[0].shape)


def _like_first_twice(*args: Any) -> tuple[Tensor, Tensor]:
    return _like_first(*args), _like_first(*args)


def _gated_normed(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, rows, eps, clamp, backend = args
    if backend == "reference":
        return plain.gate_norm_modulate(*tensors, rows, eps, clamp)
    out = _like_first_twice(*args)
    with devices.on(out[0]):
        _module(backend).gate_norm_modulate(*tensors, rows, *out, eps, clamp)
    return out


def _keep_gated_normed(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.eps, ctx.clamp, _ = inputs
    ctx.save_for_backward(*tensors)


def _gated_normed_gradient(ctx: Any, *grads: Tensor) -> tuple:
    def again(*x: Any) -> tuple:
        return plain.gate_norm_modulate(*x, ctx.eps, ctx.clamp)

    return (*recomputed(again, ctx.saved_tensors, grads), None, None, None)


def _gated(*args: Any) -> Tensor:
    *tensors, rows, clamp, backend = args
    if backend == "reference":
        return plain.gate_residual(*tensors, rows, clamp)
    out = _like_first(*args)
    with devices.on(out):
        _module(backend).gate_norm_modulate(*tensors, None, None, rows, out, None, 0.0, clamp)
    return out


def _keep_gated(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.clamp, _ = inputs
    ctx.save_for_backward(*tensors)


def _gated_gradient(ctx: Any, grad: Tensor) -> tuple:
    return (*recomputed(lambda *x: plain.gate_residual(*x, ctx.clamp), ctx.saved_tensors, [grad]), None, None)


def _normed(*args: Any) -> Tensor:
    x, scale, shift, rows, eps, backend = args
    if backend == "reference":
        return plain.norm_modulate(x, scale, shift, rows, eps)
    out = _like_first(x)
    with devices.on(out):
        _module(backend).gate_norm_modulate(x, None, None, scale, shift, rows, None, out, eps, False)
    return out


def _keep_normed(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.eps, _ = inputs
    ctx.save_for_backward(*tensors)


def _normed_gradient(ctx: Any, grad: Tensor) -> tuple:
    return (*recomputed(lambda *x: plain.norm_modulate(*x, ctx.eps), ctx.saved_tensors, [grad]), None, None)


gate_norm_modulate = declare(
    "gate_norm_modulate",
    "(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, Tensor? rows, float eps, bool clamp, str backend) "
    "-> (Tensor, Tensor)",
    _gated_normed,
    _like_first_twice,
    keep=_keep_gated_normed,
    gradient=_gated_normed_gradient,
)
gate_residual = declare(
    "gate_residual",
    "(Tensor x, Tensor y, Tensor gate, Tensor? rows, bool clamp, str backend) -> Tensor",
    _gated,
    _like_first,
    keep=_keep_gated,
    gradient=_gated_gradient,
)
norm_modulate = declare(
    "norm_modulate",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? rows, float eps, str backend) -> Tensor",
    _normed,
    _like_first,
    keep=_keep_normed,
    gradient=_normed_gradient,
)


# --- K4 ---

_STEP = (
    "(Tensor latents, Tensor cond, Tensor? uncond, Tensor sigma, Tensor sigma_next, float scale, str rule, float power, "
    "float truncate, str backend) -> "
)


def _step(*args: Any) -> Tensor:
    *tensors, scale, rule, power, truncate, backend = args
    if backend == "reference":
        return plain.guided_step(*args[:-1])[0]
    out = _step_like(*args)
    with devices.on(out):
        _module(backend).guided_step(*tensors, out, None, scale, rule, power, truncate)
    return out


def _step_like(*args: Any) -> Tensor:
    return args[1].new_empty(args[1].shape)


def _step_velocity(*args: Any) -> tuple[Tensor, Tensor]:
    *tensors, scale, rule, power, truncate, backend = args
    if backend == "reference":
        out, velocity = plain.guided_step(*args[:-1])
        return out, velocity.clone() if args[2] is None else velocity  # not what the operator was given
    out = _step_velocity_like(*args)
    with devices.on(out[0]):
        _module(backend).guided_step(*tensors, *out, scale, rule, power, truncate)
    return out


def _step_velocity_like(*args: Any) -> tuple[Tensor, Tensor]:
    return _step_like(*args), _step_like(*args)


guided_step = declare("guided_step", _STEP + "Tensor", _step, _step_like)
guided_step_velocity = declare("guided_step_velocity", _STEP + "(Tensor, Tensor)", _step_velocity, _step_velocity_like)
