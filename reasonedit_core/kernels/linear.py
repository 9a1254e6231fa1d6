"""Linears on CPUs that the library behind `torch.nn.functional.linear` does not serve well.

In float32 torch multiplies with MKL, which takes a slow way on processors of other makers than its own: on an AMD EPYC with
AVX-512 oneDNN, which torch ships as well and takes for bfloat16, needs half the time for the same product. torch offers it to
its own compiler as an operator; where that operator is there and passes its test, `hasten` lets the plain Linears of a module
use it. GELU in its tanh form is computed in the same pass.

Nothing else changes: weights, names and classes' ancestry stay, gradients and other dtypes and devices take torch's own way.
Products differ from MKL's by rounding at most.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import devices

MAKERS = ("AuthenticAMD", "HygonGenuine")
"""As a processor names its maker: those that MKL does not know how to use."""

TOLERANCE = 1e-5
"""Of the test, relative to the largest answer."""


class QuickLinear(nn.Linear):
    """An `nn.Linear` in float32 on a CPU whose product oneDNN computes. Made of a Linear by `hasten`, never built."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return _product(x, self.weight, self.bias, "none", "") if self._takes(x) else super().forward(x)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU in its tanh form of the product, in one pass."""
        if self._takes(x):
            return _product(x, self.weight, self.bias, "gelu", "tanh")
        return functional.gelu(super().forward(x), approximate="tanh")

    def _takes(self, x: Tensor) -> bool:
        weight = self.weight
        if not x.dtype == weight.dtype == torch.float32 or not x.device == weight.device == _CPU or x.numel() == 0:
            return False
        return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


_CPU = torch.device("cpu")


def hasten(*modules: nn.Module) -> int:
    """Let the plain float32 Linears below `modules` use oneDNN where that is the quicker way; returns how many do.

    A change of class in place, so names, weights and hooks stay. Only what is a plain `nn.Linear` is changed: quantised and
    streamed layers have ways of their own.
    """
    if lacking() is not None:
        return 0
    changed = 0
    for module in modules:
        for child in module.modules():
            if type(child) is nn.Linear and child.weight.dtype == torch.float32 and child.weight.device == _CPU:
                child.__class__ = QuickLinear
                changed += 1
    return changed


def linear_gelu(layer: nn.Module, x: Tensor) -> Tensor:
    """gelu(layer(x)) in its tanh form, in one pass where `layer` can."""
    # Hooks (of adapters, of what moves weights) hang on the call of a module, which a method of it would pass by.
    if type(layer) is QuickLinear and not layer._forward_hooks and not layer._forward_pre_hooks:
        return layer.gelu(x)
    return functional.gelu(layer(x), approximate="tanh")


def lacking() -> str | None:
    """None, or why Linears keep torch's own way on this machine."""
    return f"{devices.VARIABLE}=off" if devices.asked() == "off" else _lacking()


@lru_cache(maxsize=1)
def _lacking() -> str | None:
    if not torch.backends.mkl.is_available():
        return "torch does not multiply with MKL here"
    maker = _maker()
    if not any(name in maker for name in MAKERS):
        return f"MKL is at home on this processor ({maker or 'of an unknown maker'})"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return f"torch {torch.__version__} does not offer oneDNN's product"
    return _test()


def _maker() -> str:
    """The processor's maker, as it names itself; "" where nothing tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()  # Windows: "AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _test() -> str | None:
    """None, or how the operator differs from torch's own products."""
    rng = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 5, 48, generator=rng), torch.randn(40, 48, generator=rng)
    bias = torch.randn(40, generator=rng)
    try:
        with torch.no_grad():
            for given in (bias, None):
                expected = functional.linear(x, weight, given)
                pairs = (
                    (_product(x, weight, given, "none", ""), expected),
                    (_product(x, weight, given, "gelu", "tanh"), functional.gelu(expected, approximate="tanh")),
                )
                for found, wanted in pairs:
                    if found.shape != wanted.shape or not (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
                        return "oneDNN's product failed its test here"
    except (RuntimeError, TypeError, AttributeError) as error:  # not there, or of another signature
        return f"oneDNN's product cannot be called ({str(error).splitlines()[0]})"
    return None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, after: str, how: str) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, after, [], how)
