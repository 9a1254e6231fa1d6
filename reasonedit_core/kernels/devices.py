"""Which of our kernels run where: what was asked for, what a device can, and whether a kernel passed its test there."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..errors import ConfigError

log = logging.getLogger(__name__)

VARIABLE = "REASONEDIT_KERNELS"
CHOICES = ("auto", "off", "triton", "nvrtc")

FLOORS = {"triton": (8, 0), "nvrtc": (7, 5)}
"""Lowest compute capability. Below 8.0 Triton has no matrix units for K5, and its element-wise code grows very large."""

_PASSED: dict[tuple[str, str, int], str | None] = {}
"""(operator, backend, card) -> None, or why that kernel is not used on that card."""


@torch.compiler.assume_constant_result
def asked() -> str:
    """What the environment variable REASONEDIT_KERNELS asks for: auto, off, triton or nvrtc."""
    value = os.environ.get(VARIABLE, "").strip().lower() or "auto"
    if value not in CHOICES:
        raise ConfigError(f"{VARIABLE} is {value!r}; expected one of {', '.join(CHOICES)}.")
    return value


def refusal(backend: str, device: torch.device) -> str | None:
    """None, or why kernels of `backend` ("triton" or "nvrtc") cannot run on `device` at all."""
    if asked() not in ("auto", backend):
        return f"{VARIABLE}={asked()}"
    if device.type == "cpu" and backend == "triton" and interpreted():
        return None
    if device.type != "cuda":
        return f"it needs CUDA, not {device.type}"
    if torch.version.hip:
        return "it was made for NVIDIA cards, not for ROCm"
    return _missing(backend, number(device))


def number(device: torch.device) -> int:
    """Which card a CUDA device is."""
    return torch.cuda.current_device() if device.index is None else device.index


@torch.compiler.assume_constant_result
def _missing(backend: str, card: int) -> str | None:
    return _lacking(backend, card)


@lru_cache(maxsize=16)
def _lacking(backend: str, card: int) -> str | None:
    """What card number `card` or this machine lacks, or None."""
    found = torch.cuda.get_device_capability(card)
    floor = FLOORS[backend]
    if found < floor:
        return f"it needs a card of compute capability {floor[0]}.{floor[1]} or newer, found {found[0]}.{found[1]}"
    if backend == "triton":
        return None if find_spec("triton") is not None else "Triton is not installed"
    from . import nvrtc_build

    return nvrtc_build.missing(10 * found[0] + found[1])


def passed(op: str, backend: str, device: torch.device) -> str | None:
    """None, or in words why the kernel failed its test on this card. The test runs once, when first asked for."""
    return None if device.type != "cuda" else _tested(op, backend, number(device))


@torch.compiler.assume_constant_result
def _tested(op: str, backend: str, card: int) -> str | None:
    key = (op, backend, card)
    if key not in _PASSED:
        if torch.cuda.is_current_stream_capturing():
            # Not kept: the next call outside of the capture tests it.
            return "it was not tested yet, and no test can run while a CUDA graph is captured"
        from . import trial

        _PASSED[key] = reason = trial.run(op, backend, torch.device("cuda", card))
        log.info("kernel %s (%s) on cuda:%d: %s", op, backend, card, reason or "passed its test")
    return _PASSED[key]


def interpreted() -> bool:
    """Whether Triton interprets its kernels, which it decides when it is imported: they then run on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on(x: Tensor) -> AbstractContextManager:
    """Makes the card of x the current one, where kernels are launched."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@lru_cache(maxsize=256)
def log_once(text: str) -> None:
    """One line per distinct choice, so that a run of thousands of calls logs each decision once."""
    log.info("%s", text)
