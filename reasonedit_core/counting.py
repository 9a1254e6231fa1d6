"""Counted work: bytes of element-wise traffic, operators and floating-point operations of a call. Nothing is measured.

`count(fn)` runs `fn` under dispatch modes and adds up what reaches torch's dispatcher. With modules and inputs on the meta
device this takes seconds at full size, on any machine, and every machine gets the same numbers. Three classes of operators:

matrix products  operators that torch has a FLOP formula for (mm, addmm, bmm, ...): FLOPs and bytes, each summed apart.
attention        opaque, whichever kernel would run: the FLOPs of scaled_dot_product_attention, no bytes.
all others       element-wise: every tensor that is read plus every tensor that is written, weights, tables and indices
                 included, one that is changed in place twice. A tensor counts numel x itemsize, at most its storage, so that
                 broadcast views are not over-counted. Views and allocations (`SKIPPED`) move nothing.

The bytes are an upper bound of the traffic to memory: what one kernel leaves in a cache for the next counts twice.
`types.Counts` is something else: how often the costly calls of a run were made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .errors import ConfigError

SKIPPED = frozenset(
    f"aten::{name}"
    for name in ("detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "arange")
)
"""Operators that move no bytes though they are no views by their schema."""

SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True, slots=True)
class Work:
    """What a call costs.

    flops: of matrix products and attention together; attention_flops: of attention alone. elementwise_bytes, kernels: bytes
    and number of the operators that are neither. matmul_bytes, matmuls: of the matrix products; attentions: calls.
    bytes_by_op, calls_by_op: the element-wise operators by name (`aten::mul`), the heaviest first.
    """

    flops: int
    attention_flops: int
    elementwise_bytes: int
    kernels: int
    matmul_bytes: int
    matmuls: int
    attentions: int
    bytes_by_op: Mapping[str, int] = field(default_factory=dict)
    calls_by_op: Mapping[str, int] = field(default_factory=dict)

    @property
    def custom_ops(self) -> tuple[str, ...]:
        """Names of the element-wise operators that are not torch's own."""
        return tuple(name for name in self.calls_by_op if not name.startswith(("aten::", "prims::")))

    def record(self) -> dict[str, Any]:
        """The totals as plain numbers, for JSON."""
        return {
            "flops": self.flops,
            "elementwise_bytes": self.elementwise_bytes,
            "kernels": self.kernels,
            "matmul_bytes": self.matmul_bytes,
            "attention_flops": self.attention_flops,
            "custom_ops": list(self.custom_ops),
        }


def count(fn: Callable[[], object]) -> Work:
    """Run `fn` without gradients and return its work.

    fn should compute on meta tensors: elsewhere it really computes, and a fused attention may count as its parts. Raises
    ConfigError for an attention operator without a FLOP formula, whose work would go uncounted.
    """
    tally = _Tally()
    with torch.no_grad(), _Attention(tally), _Operators(tally):
        fn()
    bytes_by_op = dict(tally.bytes.most_common())
    return Work(
        flops=tally.matmul_flops + tally.attention_flops,
        attention_flops=tally.attention_flops,
        elementwise_bytes=sum(bytes_by_op.values()),
        kernels=sum(tally.calls.values()),
        matmul_bytes=tally.matmul_bytes,
        matmuls=tally.matmuls,
        attentions=tally.attentions,
        bytes_by_op=bytes_by_op,
        calls_by_op={name: tally.calls[name] for name in bytes_by_op},
    )


def tensor_bytes(x: Tensor) -> int:
    """numel x itemsize, at most the bytes of the storage behind it."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


class _Tally:
    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.matmul_flops = self.matmul_bytes = self.matmuls = 0
        self.attention_flops = self.attentions = 0

    def attend(self, flops: int) -> None:
        self.attention_flops += flops
        self.attentions += 1


class _Attention(TorchFunctionMode):
    """Stands in for scaled_dot_product_attention, which else falls apart into products and a softmax on the meta device."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args[:3]) :]))
        if q.device.type != "meta":
            return func(*args, **kwargs)
        self.tally.attend(_sdpa_flops(q, k, v))
        # The fused kernels answer (B, T, H, D) seen as (B, H, T, D), so that joining the heads again is a view.
        return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2)


class _Operators(TorchDispatchMode):
    """Adds up what reaches the dispatcher."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()
        self.tally = tally

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name
        if func.is_view or name in SKIPPED:
            return out
        flops, tally = _flops(func, args, kwargs, out), self.tally
        if "attention" in name or "attn" in name:
            if flops is None:
                raise ConfigError(f"{name}: expected an attention operator with a FLOP formula, found none; register one.")
            tally.attend(flops)
            return out
        moved = _moved(func, args, kwargs, out)
        if flops is not None:
            tally.matmul_flops += flops
            tally.matmul_bytes += moved
            tally.matmuls += 1
        else:
            tally.bytes[name] += moved
            tally.calls[name] += 1
        return out


def _moved(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """Bytes read and written. What is written in place is in the arguments already and counts once more."""
    read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    places = zip(func._schema.arguments, [*args, *[None] * len(func._schema.arguments)], strict=False)
    changed = [
        x
        for place, value in places
        if place.alias_info is not None and place.alias_info.is_write
        for x in tree_leaves(kwargs.get(place.name, value))
        if isinstance(x, Tensor)
    ]
    made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and all(x is not y for y in changed)]
    return sum(map(tensor_bytes, (*read, *changed, *made)))


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int | None:
    """By torch's formula for the operator; None where it has none."""
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(func._overloadpacket)
    return None if formula is None else formula(*args, **kwargs, out_val=out)


def _sdpa_flops(q: Tensor, k: Tensor, v: Tensor) -> int:
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(q.shape, k.shape, v.shape)
