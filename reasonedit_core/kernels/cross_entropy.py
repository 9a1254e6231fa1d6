"""Cross entropy behind a linear head, without ever holding the logits of all rows: 152k columns are 0.6 MB per row in float32.

A rows that a loss is asked of, D width of the states, V vocabulary.

torch 2.15 has a `linear_cross_entropy` of its own. It is not called: it answers in the dtype of the states, and bfloat16 keeps
a loss of 10 to the nearest 1/16 only; and in older releases it makes all logits where losses are wanted row by row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

LOGITS = 2**25
"""Logits held at a time. A chunk peaks at about 16 bytes per logit in 16 bits: itself, in float32, softmax, both gradients."""


def linear_cross_entropy(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(states weight^T)[targets], row by row.

    states (A, D), weight (V, D), targets (A,) int64 -> (A,) float32 (float64 for float64).
    """
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
