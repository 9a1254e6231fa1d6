"""Attention by other packages, for who has one installed and asks for it by name; `auto` never takes it.

    flash    flash-attn, version 3 (`flash_attn_interface`) before version 2 (`flash_attn`); exact, forward and backward
    sage     SageAttention (`sageattention`): queries and keys in 8 bits; forward only
    kitchen  comfy-kitchen (`comfy_kitchen`), which ComfyUI brings along: all products in 8 bits; forward only

Shapes: q (B, T, H, D), k and v (B, S, Hk, D) with H a multiple of Hk; no mask. CUDA. A package is imported when it is first
asked about, and tested once on each card against the plain form: one built for other cards may answer zeros, and no error.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from . import devices
from .mask import Mask

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Package:
    """One package. functions: (module, function), the first that is there is taken. call: (function, q, k, v) -> (B, T, H, D).
    heads: the largest head dim. floor: the lowest compute capability. learns: whether it has a backward pass. lacks: None, or
    what the package says against a card."""

    title: str
    functions: tuple[tuple[str, str], ...]
    call: Callable[[Callable[..., Any], Tensor, Tensor, Tensor], Tensor]
    heads: int
    floor: tuple[int, int]
    learns: bool = False
    lacks: Callable[[torch.device], str | None] | None = None


def _flash(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = function(q, k, v)
    return out[0] if isinstance(out, tuple) else out  # some releases of version 3 answer the log-sum-exp along with it


def _sage(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Version 1 takes the mean off its keys in place, and an edit with a region keeps them for later steps.
    return function(q, k.clone(), v, tensor_layout="NHD", is_causal=False)


def _kitchen(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return function(*(x.transpose(1, 2).contiguous() for x in (q, k, v))).transpose(1, 2)


def _kitchen_lacks(device: torch.device) -> str | None:
    try:
        able = importlib.import_module("comfy_kitchen").int8_attention_is_available(device)
    except Exception as error:
        return f"comfy-kitchen does not answer whether it can run there ({_words(error)})"
    return None if able else "this comfy-kitchen has no compiled kernels for it"


PACKAGES: dict[str, Package] = {
    "flash": Package(
        "flash-attn",
        (("flash_attn_interface", "flash_attn_func"), ("flash_attn", "flash_attn_func")),
        _flash,
        heads=256,
        floor=(8, 0),
        learns=True,
    ),
    "sage": Package("SageAttention", (("sageattention", "sageattn"),), _sage, heads=128, floor=(8, 0)),
    "kitchen": Package(
        "comfy-kitchen", (("comfy_kitchen", "int8_attention"),), _kitchen, heads=256, floor=(7, 5), lacks=_kitchen_lacks
    ),
}


def available(name: str, device: torch.device) -> str | None:
    """None, or why the package `name` cannot run on `device`."""
    if device.type != "cuda":
        return f"it needs CUDA, not {device.type}"
    return missing(name) or _unfit(name, devices.number(device)) or devices.passed("attention", name, device)


def supports(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str | None:
    """None, or the reason why this call cannot run."""
    package = PACKAGES[name]
    if mask is not None:
        return f"it takes no mask, got {type(mask).__name__}"
    if q.dtype not in HALVES or not q.dtype == k.dtype == v.dtype:
        return f"it takes float16 or bfloat16, alike for q, k and v, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[3] > package.heads or q.shape[3] % 8 or v.shape[3] != q.shape[3]:
        return f"it takes one head dim of a multiple of 8 up to {package.heads}, got {q.shape[3]} and {v.shape[3]} for values"
    if not package.learns and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "it has no backward pass"
    return None


def declines(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> str:
    """Why `auto` leaves every call to the next backend."""
    return "chosen by name only"


def run(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
    """Attention -> (B, T, H, D) in q's dtype."""
    function = _function(name)
    assert mask is None and not isinstance(function, str)
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    with devices.on(q):
        return _outside(PACKAGES[name].call, function, q, k, v).to(q.dtype)


@torch.compiler.disable
def _outside(call: Callable[..., Tensor], function: Callable[..., Any], *tensors: Tensor) -> Tensor:
    # Not every release of every package can be traced; a break in the graph costs little beside an attention.
    return call(function, *tensors)


@torch.compiler.assume_constant_result
def missing(name: str) -> str | None:
    """None, or in words what of the package is not there."""
    found = _function(name)
    return found if isinstance(found, str) else None


@lru_cache(maxsize=8)
def _function(name: str) -> Callable[..., Any] | str:
    """The package's function, or what is wrong with every place where it could be."""
    package, reasons = PACKAGES[name], []
    for module, function in package.functions:
        try:
            found = getattr(importlib.import_module(module), function, None)
        except ModuleNotFoundError as error:
            reasons.append(f"{package.title} is not installed" if error.name == module else f"{module}: {_words(error)}")
            continue
        except Exception as error:  # built for another torch, say, which shows when it is imported
            reasons.append(f"{module} cannot be imported ({_words(error)})")
            continue
        if callable(found):
            return found
        reasons.append(f"this {package.title} has no {module}.{function}")
    return "; ".join(dict.fromkeys(reasons))


@torch.compiler.assume_constant_result
def _unfit(name: str, card: int) -> str | None:
    package, found = PACKAGES[name], torch.cuda.get_device_capability(card)
    if found < package.floor:
        wanted = ".".join(map(str, package.floor))
        return f"it needs a card of compute capability {wanted} or newer, found {found[0]}.{found[1]}"
    return package.lacks(torch.device("cuda", card)) if package.lacks is not None else None


def _words(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def bound(name: str) -> dict[str, Callable[..., Any]]:
    """What a row of the dispatch needs of a package."""
    return {
        "available": partial(available, name),
        "supports": partial(supports, name),
        "run": partial(run, name),
        "passes": partial(declines, name),
    }
