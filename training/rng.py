"""The state of the global generators: kept in checkpoints, and put back after validation and sampling.

Training itself draws from counter-based generators (noise.py); LoRA dropout is the one consumer of the global ones.
"""

from __future__ import annotations

import base64
import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_rank(seed: int, rank: int) -> None:
    """Seed python, numpy and torch (all devices) with numbers of this rank's own, drawn from `seed` by sha256."""
    digest = hashlib.sha256(f"rank {rank} of run {seed}".encode()).digest()
    value = int.from_bytes(digest[:8], "little")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def capture() -> dict[str, Any]:
    """The states of python, numpy, torch on the CPU and on this process' CUDA device, as JSON values."""
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(place), int(has_gauss), float(cached)],
        "torch": _text(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = _text(torch.cuda.get_rng_state())
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` gave. A CUDA state is left alone where there is no CUDA."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, place, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    torch.set_rng_state(_tensor(state["torch"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(state["cuda"]))


@contextmanager
def isolated() -> Iterator[None]:
    """Whatever is drawn from the global generators inside leaves no trace outside, also when an error leaves the block."""
    state = capture()
    try:
        yield
    finally:
        restore(state)


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """torch's deterministic algorithms inside the block, if `on`. cuBLAS reads its variable once, so it must not have been
    used before in this process for this to hold there."""
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
