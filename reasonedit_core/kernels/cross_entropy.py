"""Cross entropy behind a linear head, without ever holding the logits of all rows: 152k columns are 0.6 MB per row in float32.

A rows that a loss is asked of, D width of the states, V vocabulary.

torch 2.14 has a `linear_cross_entropy` in chunks of its own. In float32 and float64 its losses and gradients are the chunked
ones here to rounding, in the same time and a third of the memory (measured on a CPU: 51 against 272 MiB of a frozen head, 149
against 431 of a trained one), so it is taken. Elsewhere the rows are chunked here: in 16 bits torch's answers in the dtype of
the states, and bfloat16 keeps a loss of 10 to the nearest 1/16 only; under autocast it stays in the dtype of the states; heads
that are no plain matrix it does not take; and older releases make all logits where losses are wanted row by row, or lack it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from . import devices

LOGITS = 2**25
"""Logits held at a time. A chunk peaks at about 16 bytes per logit in 16 bits: itself, in float32, softmax, both gradients."""

OWN_DTYPES = (torch.float32, torch.float64)
OWN_DEVICES = ("cpu", "cuda")
"""Where torch's own is taken; on the meta device, where work is counted, its products would not show."""

TOLERANCE = 1e-5
"""Of the test of torch's own, relative to the largest answer."""


def linear_cross_entropy(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(states weight^T)[targets], row by row.

    states (A, D), weight (V, D), targets (A,) int64 -> (A,) float32 (float64 for float64).
    """
    if _takes(states, weight) and lacking() is None:
        return _own(states, weight, targets, max(1, LOGITS // len(weight)))
    return head_cross_entropy(lambda rows: functional.linear(rows, weight), states, targets, columns=len(weight))


def head_cross_entropy(
    head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, targets: torch.Tensor, *, columns: int
) -> torch.Tensor:
    """The same for any head (n, D) -> (n, columns), as one with quantised weights or a LoRA.

    Rows go through the head in chunks of at most `LOGITS` logits; backward computes them anew, chunk by chunk.
    """
    rows = max(1, LOGITS // columns)

    def chunk(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = head(part)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return functional.cross_entropy(logits.to(wide), wanted, reduction="none")

    parts = zip(states.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(chunk, part, wanted, use_reentrant=False) for part, wanted in parts])


def explain() -> str:
    """Which of the two would run, for `reasonedit doctor`."""
    reason = lacking()
    if reason is not None:
        return f"cross entropy of a linear head: in chunks of rows; torch's own: {reason}"
    return "cross entropy of a linear head: torch's own in float32 and float64, in chunks of rows in 16 bits and other heads"


def lacking() -> str | None:
    """None, or why torch's own is not taken at all."""
    return f"{devices.VARIABLE}=off" if devices.asked() == "off" else _lacking()


def _takes(states: torch.Tensor, weight: torch.Tensor) -> bool:
    kind = states.device.type
    alike = states.dtype == weight.dtype and states.device == weight.device
    return alike and states.dtype in OWN_DTYPES and kind in OWN_DEVICES and not torch.is_autocast_enabled(kind)


def _own(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    return functional.linear_cross_entropy(states, weight, targets, reduction="none", options=options)


@lru_cache(maxsize=1)
@torch.compiler.assume_constant_result
def _lacking() -> str | None:
    if not hasattr(functional, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy"
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has no torch.nn.LinearCrossEntropyOptions, and makes all logits at once"
    return _test()


def _test() -> str | None:
    """None, or how torch's own differs from the chunked form: losses by row, and both gradients."""
    answers = []
    try:
        # Under inference_mode, where the first call may come from, no gradient could be taken.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False), warnings.catch_warnings():
            warnings.simplefilter("error")  # torch warns where it leaves the chunks for all logits at once
            rng = torch.Generator().manual_seed(0)
            draws = [torch.randn(*shape, generator=rng) for shape in ((5, 6), (11, 6))]
            targets, scale = torch.randint(11, (5,), generator=rng), torch.rand(5, generator=rng)
            for run in (_own, _chunked):
                states, weight = (x.clone().requires_grad_() for x in draws)
                loss = run(states, weight, targets, 2)
                answers.append([loss.detach(), *torch.autograd.grad((loss * scale).sum(), (states, weight))])
    except Exception as error:
        return f"it cannot be called ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    for found, wanted in zip(*answers, strict=True):
        if found.shape != wanted.shape or not (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
            return "it failed its test here"
    return None


def _chunked(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
    return head_cross_entropy(lambda part: functional.linear(part, weight), states, targets, columns=LOGITS // rows)
