"""Which of two attention backends is faster on this card, timed once per class of shapes and remembered for the process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from . import devices

log = logging.getLogger(__name__)

REPEATS = 5
MARGIN = 0.98
"""A challenger must be faster by this factor: near a tie the library's kernel is kept."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a timing found. reason: None where the challenger is taken, else in words why not. text: both times."""

    reason: str | None
    text: str


_FOUND: dict[tuple, Finding] = {}
"""By names, card, dtype and class of shapes; see `slower`."""

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def slower(name: str, ours: Run, other: str, theirs: Run, inputs: tuple[Tensor, Tensor, Tensor]) -> str | None:
    """None where `ours` was faster than `theirs` on tensors like these, else in words why it is not taken."""
    q, k, _ = inputs
    lengths = _class(q.shape[1]), _class(k.shape[1])
    key = (name, other, devices.number(q.device), str(q.dtype), q.shape[0], *lengths, *q.shape[2:], k.shape[2])
    if torch.compiler.is_compiling():
        return _known(key)
    if key not in _FOUND:
        if torch.cuda.is_current_stream_capturing():
            return _known(key)
        _FOUND[key] = _compare(name, ours, other, theirs, inputs)
    return _FOUND[key].reason


def explain(device: torch.device) -> list[str]:
    """One line per class of shapes that was timed on this card in this process, for `kernels.explain`."""
    card = devices.number(device)
    return [f"  timed: {found.text}, {key[3].removeprefix('torch.')}" for key, found in _FOUND.items() if key[2] == card]


@torch.compiler.assume_constant_result
def _known(key: tuple) -> str | None:
    if key in _FOUND:
        return _FOUND[key].reason
    return "it was not timed yet for these shapes, and nothing is timed while a graph is made"


def _class(length: int) -> int:
    """Lengths of one class lie within a quarter of each other."""
    step = max(1, 2 ** (length.bit_length() - 3))
    return -(-length // step) * step


@torch.no_grad()
def _compare(name: str, ours: Run, other: str, theirs: Run, inputs: tuple[Tensor, Tensor, Tensor]) -> Finding:
    times: dict[str, list[float]] = {name: [], other: []}
    try:
        for turn in range(REPEATS + 2):
            for who, run in ((name, ours), (other, theirs)):
                taken = _milliseconds(run, inputs)
                if turn > 1:  # the first turns compile and choose algorithms
                    times[who].append(taken)
    except Exception as error:
        reason = f"timing it failed ({type(error).__name__}: {error})"
        return Finding(reason, f"{name} against {other} (q {tuple(inputs[0].shape)}): {reason}")
    mine, its = (median(times[who]) for who in (name, other))
    text = f"{name} took {mine:.3f} ms where {other} took {its:.3f} ms (q {tuple(inputs[0].shape)}, k {tuple(inputs[1].shape)})"
    log.info("attention timed on %s: %s", inputs[0].device, text)
    faster = mine < MARGIN * its
    return Finding(None if faster else text, f"{text}: {name if faster else other} is taken")


def _milliseconds(run: Run, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run(*inputs)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
