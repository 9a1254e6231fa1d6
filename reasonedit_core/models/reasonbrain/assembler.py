"""The token assembler, eq. 3: T = [IA(E_I(I)), R_V, R_T, E_T(H), Q], and what comes back at Q's places is V.

B batch, L tokens of a row, M the width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .frce import Cues
from .spec import BrainSpec

Part = tuple[Tensor, Tensor]
"""Embeddings (B, L, M) and which of them are valid (B, L) bool."""


class TokenAssembler(nn.Module):
    """Projects the cues into the language model's embedding space: A_v R_V and A_t R_T of eq. 3."""

    def __init__(self, spec: BrainSpec) -> None:
        super().__init__()
        self.visual = nn.Linear(spec.frce, spec.language)
        self.textual = nn.Linear(spec.frce, spec.language)

    def forward(self, cues: Cues) -> tuple[Part, Part]:
        """The two parts of the row that stand between the picture and the instruction."""
        return (self.visual(cues.visual), cues.visual_keep), (self.textual(cues.textual), cues.textual_keep)


def assemble(parts: Sequence[Part]) -> tuple[Tensor, Tensor, Tensor]:
    """Put the parts one after another and close the gaps: rows end together, padding stands on the left.

    -> embeddings (B, L, M), mask (B, L) bool, positions (B, L) int64 counting the valid tokens from 0. L is the number of valid
    tokens of the longest row; a picture's valid tokens are the same alone and in a batch, and the last r are Q in every row.
    """
    dtype = parts[0][0].dtype
    tokens = torch.cat([part.to(dtype) for part, _ in parts], dim=1)
    keep = torch.cat([keep for _, keep in parts], dim=1)
    order = _order(keep)
    keep = keep.gather(1, order)
    tokens = tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[-1]))
    tokens = tokens.masked_fill(~keep[..., None], 0)  # whatever padding holds must not reach a sum of the language model
    return tokens, keep, (keep.cumsum(dim=1) - 1).clamp(min=0)


def assembled(values: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
    """Numbers of the tokens of each part (B, L of the part) in the order that `assemble` puts the parts into: (B, L)."""
    order = _order(torch.cat([keep for _, keep in parts], dim=1))
    return torch.cat(list(values), dim=1).gather(1, order)


def _order(keep: Tensor) -> Tensor:
    """Places of the tokens of the closed rows: a stable sort moves what is invalid to the front and leaves the valid tokens in
    their order; the longest row has no padding."""
    length = int(keep.sum(dim=1).max())
    return keep.to(torch.uint8).argsort(dim=1, stable=True)[:, -length:]
