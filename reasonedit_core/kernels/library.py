"""Our kernels as torch operators of the namespace `reasonedit`: torch.compile, counters and fake tensors see one node each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "reasonedit"

_OWNED: dict[str, object] = {}
"""The operators that this copy of the package made: torch drops an operator with the object that made it."""


def declare(
    name: str,
    schema: str,
    body: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    mutates: Sequence[str] = (),
    keep: Callable[..., None] | None = None,
    gradient: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> Callable[..., Any]:
    """The operator `reasonedit::name`; body and fake take the arguments of its schema by position.

    fake: answers tensors of the right shapes and strides without values. keep, gradient: setup_context and backward of
    `torch.library.register_autograd`. flops: what `FlopCounterMode` counts. Where a second copy of the package is loaded into
    a process (ComfyUI gives the folder a name of its own) the operator of the first serves both.
    """
    known = getattr(torch.ops, NAMESPACE)
    if hasattr(known, name):
        return getattr(known, name).default
    made = torch.library.custom_op(f"{NAMESPACE}::{name}", body, mutates_args=mutates, schema=schema)
    made.register_fake(fake)
    if gradient is not None:
        made.register_autograd(gradient, setup_context=keep)
    _OWNED[name] = made
    operator = getattr(known, name)
    if flops is not None:
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(operator)(flops)
    return operator.default


def recomputed(function: Callable[..., Any], inputs: Sequence[Any], grads: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradients of `function`'s float inputs, one per input (None where it is no float tensor), by running it once more."""
    with torch.enable_grad():
        leaves = [_leaf(x) for x in inputs]
        outputs = function(*leaves)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    return [next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in leaves]


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
