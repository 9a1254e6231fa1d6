"""The products around GELU in a DiT's blocks, with as few passes over what stands between them as a device allows.

B batch, L tokens, C and M widths of the two tensors, W width of the answer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels.linear import QuickLinear, linear_gelu

KERNEL_DEVICES = ("cuda", "meta")
"""Where the weight is taken apart. On CPUs one product stays one product, so that streamed and resident weights agree in every
bit; meta tensors stand for CUDA's."""


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """diffusers' `FeedForward` on x (B, L, C) -> (B, L, C), its GELU computed with the product before it where that can be."""
    first = layer.net[0]
    if type(getattr(first, "proj", None)) is not QuickLinear or getattr(first, "approximate", None) != "tanh":
        return layer(x)
    inner = linear_gelu(first.proj, x)
    for each in layer.net[1:]:
        inner = each(inner)
    return inner


def project_halves(layer: nn.Module, first: Tensor, mlp: nn.Module, x: Tensor) -> Tensor:
    """layer([first, gelu(mlp(x))]) with GELU in its tanh form: first (B, L, C), mlp(x) (B, L, M) -> (B, L, W).

    A plain Linear of one dtype with its inputs becomes two products that add into one result, each with its part of the
    weight. Other layers (quantised, streamed, with adapters or hooks) are called with one tensor, into which GELU writes
    directly and `first` is copied; a `QuickLinear` before them gives it GELU with its own product. Where gradients are
    computed, and in float16, whose partial sums may overflow where the whole does not, the layer is called as well.
    """
    if type(mlp) is QuickLinear:
        return layer(torch.cat([first, linear_gelu(mlp, x)], dim=-1))
    second = mlp(x)
    if splits(layer, first):
        inner = nn.functional.gelu(second, approximate="tanh")
        out = nn.functional.linear(first, layer.weight[:, : first.shape[-1]], layer.bias)
        rest = layer.weight[:, first.shape[-1] :]
        return _add_product(out.flatten(0, 1), inner.flatten(0, 1), rest.T).view(out.shape)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or first.dtype != second.dtype:
        return layer(torch.cat([first, nn.functional.gelu(second, approximate="tanh")], dim=-1))
    both = second.new_empty((*second.shape[:-1], first.shape[-1] + second.shape[-1]))
    left, right = both.split([first.shape[-1], second.shape[-1]], dim=-1)
    left.copy_(first)
    torch.ops.aten.gelu.out(second, approximate="tanh", out=right)
    return layer(both)


def splits(layer: nn.Module, x: Tensor) -> bool:
    """Whether the weight of `layer` can be used behind its back for x: it is a plain Linear that nothing wraps."""
    if x.device.type not in KERNEL_DEVICES or x.dtype == torch.float16 or torch.is_grad_enabled():
        return False
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter:
        return False
    # An attribute `forward` is how diffusers and accelerate put their hooks around a layer.
    if "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    return layer.weight.dtype == x.dtype and layer.weight.device == x.device


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """out + a b, written into out."""
    if torch.compiler.is_compiling():
        return torch.addmm(out, a, b)
    return torch.addmm(out, a, b, out=out)
