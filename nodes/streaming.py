"""Layers that may stay off the device and are brought over for the length of a call.

ComfyUI loads a model in part when it does not fit. That works for layers with its cast hooks: three attributes by which its
patcher tells the layer to bring its weights along (`comfy_cast_weights`, `weight_function`, `bias_function`). transformers
and diffusers build plain layers, so their Linears are given the hooks here, in place, by a change of class: for a plain
Linear the host's own class, for fp8 weights one of ours. Everything else (norms, embeddings, convolutions, buffers) is small
and stays on the device. No comfy is imported here.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ..reasonedit_core.fp8 import Fp8Linear, dequantize_tensor


class StreamedFp8Linear(Fp8Linear):
    """An `Fp8Linear` with cast hooks: half the bytes of bf16 have to travel."""

    comfy_cast_weights = False
    weight_function: list = []
    bias_function: list = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out) in the dtype of x, wherever the weights lie."""
        if not self.comfy_cast_weights:
            return super().forward(x)
        weight, scale = (t.to(x.device, non_blocking=True) for t in (self.weight, self.weight_scale))
        bias = None if self.bias is None else self.bias.to(x.device, x.dtype, non_blocking=True)
        return functional.linear(x, dequantize_tensor(weight, scale, x.dtype), bias)


def make_streamable(module: nn.Module, linear: type[nn.Linear]) -> int:
    """Give the Linears below `module` cast hooks; returns how many got them.

    linear: the host's Linear with hooks, of the same parameters as torch's. A Linear whose weight another layer shares (a
    head tied to the embeddings) stays as it is: moving one would move both.
    """
    owners: dict[int, int] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    changed = 0
    for child in module.modules():
        kind = {nn.Linear: linear, Fp8Linear: StreamedFp8Linear}.get(type(child))
        if kind is None or owners[id(child.weight)] > 1:
            continue
        child.__class__ = kind
        child.weight_function, child.bias_function = [], []
        changed += 1
    return changed


def streams(module: nn.Module) -> bool:
    """Whether this layer may stay off the device."""
    return hasattr(module, "comfy_cast_weights")


def resident_bytes(module: nn.Module) -> int:
    """Bytes below `module` that must be on the device: of every layer without cast hooks."""
    tensors = {id(t): t for layer in module.modules() if not streams(layer) for t in _own(layer)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def settle(module: nn.Module, device: torch.device) -> None:
    """Bring every layer without cast hooks to `device`."""
    for layer in module.modules():
        if not streams(layer) and any(t.device != device for t in _own(layer)):
            # Layer by layer: `.to` of a branch would take the streamed layers in it along.
            layer._apply(lambda t: t.to(device, non_blocking=True), recurse=False)


def _own(layer: nn.Module) -> list[torch.Tensor]:
    return [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
