"""The two streams of a DiT, text and pictures, and the joint sequence in which they attend: as a batch, or packed.

B batch, T text tokens, N picture tokens, L = T + N, C width, R rows of modulation.

A block is written once. What differs between a batch and a pack is which modulation a token takes and where a token stands
in the joint sequence: in a batch each sample has one modulation and text stands first; in a pack (B = 1) modulation is
computed once per document, and documents stand one after the other, each with its text first.

Modulation of a batch is the fused op `gate_norm_modulate` where a kernel computes it; elsewhere it rounds where the released
code rounds. Tokens of a pack are taken apart by the documents' lengths and put together again. A gather by document number
would do the same, but it keeps a modulation per token for the backward pass and sums the gradients of a modulation in the
weights' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import gate_norm_modulate, has_kernel
from ..packing import PADDING, PackMask

FP16_MAX = 65504.0


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Modulation of a batch: x (B, L, C), scale, shift and gate (R, C).

    rows (B, L) int: the row that each token takes, where a sample has more than one; None: R is B or 1.
    """

    rows: Tensor | None = None

    def modulate(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x (1 + scale) + shift."""
        return x * (1 + self._per_token(scale)) + self._per_token(shift)

    def normed(self, norm: nn.LayerNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """norm(x) (1 + scale) + shift; norm has no weights of its own."""
        if has_kernel("gate_norm_modulate", x):
            return gate_norm_modulate(x, scale=scale, shift=shift, rows=self.rows, eps=norm.eps)[1]
        if self._alike(x, scale):
            return nn.functional.layer_norm(x, x.shape[-1:], 1 + scale[0], shift[0], norm.eps)
        return self.modulate(norm(x), scale, shift)

    def gated_normed(
        self, norm: nn.LayerNorm, x: Tensor, gate: Tensor, change: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x + gate change, and its `normed`."""
        if has_kernel("gate_norm_modulate", x):
            return gate_norm_modulate(x, change, gate, scale, shift, rows=self.rows, eps=norm.eps)
        x = self.gated(x, gate, change)
        return x, self.normed(norm, x, scale, shift)

    def gated(self, x: Tensor, gate: Tensor, change: Tensor, *, clamp: bool = False) -> Tensor:
        """x + gate change; with clamp an fp16 overflow stays a number. One sample meets as many rows of gate as there are."""
        if not has_kernel("gate_norm_modulate", x):
            if self._alike(x, gate):
                return torch.addcmul(x, gate[:, None], change)
            return _clamped(x + self._per_token(gate) * change, clamp)
        if self.rows is None and len(gate) > len(x):
            x, change = (z.expand(len(gate), -1, -1) for z in (x, change))
        return gate_norm_modulate(x, change, gate, rows=self.rows, clamp=clamp)[0]

    def _alike(self, x: Tensor, table: Tensor) -> bool:
        """Whether one row serves all tokens of float32, where it is one pass with one rounding less. In low precisions the
        roundings between are part of the released numerics; gradients are left as they were."""
        return len(table) == 1 and self.rows is None and x.dtype == table.dtype == torch.float32 and not torch.is_grad_enabled()

    def _per_token(self, table: Tensor) -> Tensor:
        """(R, C) as it meets tokens (B, L, C)."""
        return table[:, None] if self.rows is None else table[self.rows]


@dataclass(frozen=True, slots=True)
class Spans:
    """Modulation of a packed stream: x (1, L, C), scale, shift and gate (R, C).

    lengths: tokens of each span, L in all; rows: the row of modulation that each takes, None for padding, which stays as it
    is.
    """

    lengths: tuple[int, ...]
    rows: tuple[int | None, ...]

    def modulate(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """x (1 + scale) + shift, with the row of each token's span."""
        parts = zip(x.split(self.lengths, dim=1), self.rows, strict=True)
        return glue([part if row is None else part * (1 + scale[row]) + shift[row] for part, row in parts])

    def normed(self, norm: nn.LayerNorm, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """norm(x), modulated."""
        return self.modulate(norm(x), scale, shift)

    def gated_normed(
        self, norm: nn.LayerNorm, x: Tensor, gate: Tensor, change: Tensor, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """x + gate change, and its `normed`."""
        x = self.gated(x, gate, change)
        return x, self.normed(norm, x, scale, shift)

    def gated(self, x: Tensor, gate: Tensor, change: Tensor, *, clamp: bool = False) -> Tensor:
        """x + gate change, with the row of each token's span; clamp: see `Samples`."""
        parts = zip(x.split(self.lengths, dim=1), change.split(self.lengths, dim=1), self.rows, strict=True)
        return _clamped(glue([part if row is None else part + gate[row] * added for part, added, row in parts]), clamp)


def _clamped(x: Tensor, clamp: bool) -> Tensor:
    return x.clamp(-FP16_MAX, FP16_MAX) if clamp and x.dtype == torch.float16 else x


Modulated = Samples | Spans

SAMPLES = Samples()


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """B samples: text (B, T, C), pictures (B, N, C), joint (B, L, C) with text first.

    n_documents: B, where the pictures have further rows of modulation behind those of the samples; None: they have none.
    """

    n_documents: int | None = None
    text: Samples = SAMPLES
    image: Samples = SAMPLES
    joint: Samples = SAMPLES

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """(B, T, ...) and (B, N, ...) -> (B, L, ...)."""
        return torch.cat([text, image], dim=1)

    def part(self, joint: Tensor, n_text: int) -> tuple[Tensor, Tensor]:
        """(B, L, ...) -> (B, T, ...), (B, N, ...), dense: a Linear would copy them anyway and add its bias in another pass."""
        return joint[:, :n_text].contiguous(), joint[:, n_text:].contiguous()


@dataclass(frozen=True, slots=True)
class Packed:
    """Documents in one sequence: text (1, T, C), pictures (1, N, C), joint (1, L, C) in the order of documents.

    text_lengths, image_lengths: tokens of each document and, last, of the padding. mask: who sees whom in the joint
    sequence; None where a single document fills it.
    """

    text_lengths: tuple[int, ...]
    image_lengths: tuple[int, ...]
    text: Spans
    image: Spans
    joint: Spans
    mask: PackMask | None

    @property
    def n_documents(self) -> int:
        """Documents of the pack."""
        return len(self.text_lengths) - 1

    @property
    def image_documents(self) -> Spans:
        """Spans of the picture stream with one modulation per document, whatever `image` says."""
        return Spans(self.image_lengths, self.joint.rows)

    def join(self, text: Tensor, image: Tensor) -> Tensor:
        """(1, T, ...), (1, N, ...) -> (1, L, ...): each document's text before its pictures, padding at the end."""
        pairs = zip(text.split(self.text_lengths, dim=1), image.split(self.image_lengths, dim=1), strict=True)
        return glue([part for pair in pairs for part in pair])

    def part(self, joint: Tensor, n_text: int) -> tuple[Tensor, Tensor]:
        """(1, L, ...) -> (1, T, ...), (1, N, ...): the inverse of `join`."""
        pairs = zip(self.text_lengths, self.image_lengths, strict=True)
        parts = joint.split([length for pair in pairs for length in pair], dim=1)
        return glue(parts[::2]), glue(parts[1::2])


BATCH = Batch()

Layout = Batch | Packed


def pack_layout(
    text_lengths: Sequence[int],
    image_lengths: Sequence[int],
    *,
    padding: tuple[int, int] = (0, 0),
    image: Spans | None = None,
    device: torch.device | None = None,
) -> Packed:
    """The layout of documents of these lengths, with `padding` tokens of text and of pictures behind them.

    image: spans of the picture stream where a document has more than one modulation (its own padding included).
    """
    text_lengths, image_lengths = (*text_lengths, padding[0]), (*image_lengths, padding[1])
    joint_lengths = tuple(text + picture for text, picture in zip(text_lengths, image_lengths, strict=True))
    rows = (*range(len(joint_lengths) - 1), None)
    mask = None
    if len(joint_lengths) > 2 or joint_lengths[-1]:
        mask = PackMask(document_numbers(joint_lengths[:-1], device, padding=joint_lengths[-1]))
    return Packed(
        text_lengths,
        image_lengths,
        Spans(text_lengths, rows),
        image or Spans(image_lengths, rows),
        Spans(joint_lengths, rows),
        mask,
    )


def document_numbers(lengths: Sequence[int], device: torch.device | None = None, *, padding: int = 0) -> Tensor:
    """(L,) int64: the number of each token's document, documents having these lengths, then -1 for padding."""
    numbers = torch.tensor([*range(len(lengths)), PADDING]).repeat_interleave(torch.tensor([*lengths, padding]))
    return numbers.to(device)


def glue(parts: Sequence[Tensor]) -> Tensor:
    """Parts (1, n, ...) one after the other; empty ones are left out, and a single one is not copied."""
    full = [part for part in parts if part.shape[1]]
    if len(full) == 1:
        return full[0]
    return torch.cat(full or list(parts), dim=1)


def last_norm(norm: nn.Module, x: Tensor, temb: Tensor, spans: Modulated) -> Tensor:
    """diffusers' `AdaLayerNormContinuous` on a stream: x (B, N, C), temb (R, C)."""
    scale, shift = norm.linear(norm.silu(temb).to(x.dtype)).chunk(2, dim=1)
    return spans.normed(norm.norm, x, scale, shift)
