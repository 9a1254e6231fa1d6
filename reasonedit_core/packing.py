"""Packs: several documents in one sequence, none of which sees another.

L tokens of a pack of documents (MLLM stream), T text tokens, N picture tokens of a pack of pictures (DiT stream), D width of
the MLLM's states, C channels of a packed latent token.

The MLLM stream and the DiT stream are packed apart and joined by a gather: a document of the second names the rows of the
first whose states condition it. Documents are contiguous and stand in the order of their numbers; -1 marks padding, which
sees nothing and is seen by nothing. One description of who sees whom (`PackMask`) serves every attention backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import PackingError

IGNORED = -100
"""Label of a token that no loss is asked of; the number torch's cross entropy ignores."""

PADDING = -1
"""Document number of a padding token."""

Grid = tuple[int, int]
"""(height, width) of a picture in tokens."""


@dataclass(frozen=True, eq=False)
class PackMask:
    """Who sees whom in a packed sequence: tokens of one document see each other, with `causal` only backwards.

    doc_id (L,) int64: documents 0, 1, ... in order and contiguous, then padding (-1).
    """

    doc_id: Tensor
    causal: bool = False

    def __post_init__(self) -> None:
        check_documents(self.doc_id)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each document; padding is not counted."""
        return document_lengths(self.doc_id)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Where documents begin and the last one ends: (documents + 1,) int32 on the device of doc_id."""
        ends = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return ends.to(self.doc_id.device)

    @cached_property
    def dense(self) -> Tensor:
        """(1, 1, L, L) bool, True where a query (row) may see a key (column)."""
        seen = (self.doc_id[:, None] == self.doc_id[None, :]) & (self.doc_id != PADDING)[:, None]
        return (seen.tril() if self.causal else seen)[None, None]


@dataclass(frozen=True, eq=False)
class TextPack:
    """Documents of the MLLM stream: chat transcripts with their pictures.

    ids (L,): token ids, a picture's placeholder repeated once per vision token. positions (3, L): M-RoPE, starting anew in
    every document. doc_id (L,): see `PackMask`. labels (L,): the token that this token itself is, where a loss is asked of
    predicting it, else -100 (the shift by one happens inside the MLLM unit, never across documents). weights (L,) float32:
    what a token's loss counts, read where labels is not -100. patches (P, 1176): patch values of all pictures, in the order
    of their placeholders. grids: (height, width) of each picture in patches (not in tokens). exports: (start, stop) rows
    whose states condition a document of the picture stream, in the order in which that stream counts them.
    records: the record id of each document.
    """

    ids: Tensor
    positions: Tensor
    doc_id: Tensor
    labels: Tensor
    weights: Tensor
    patches: Tensor
    grids: tuple[Grid, ...] = ()
    exports: tuple[tuple[int, int], ...] = ()
    records: tuple[str, ...] = ()

    @property
    def n_answers(self) -> int:
        """Tokens that a loss is asked of."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True, eq=False)
class ImagePack:
    """Documents of the DiT stream, each [text | noisy target | clean references].

    Text: text_index (T,) int64 rows of the MLLM's states, -1 for a token of zeros that the DiT sees (Step1X-Edit v1.0 and
    v1.1 fill up to 640); text_doc (T,) their documents (contiguous, in order, no padding needed). states (S, D): the cached
    states that text_index counts in; None when they come from a TextPack of the same step. text_place (T, 3) float32:
    positions of the text tokens in the DiT where they are not simply 0, 1, 2, ... (Step1X-Edit v1.2), else None. quoted (T,)
    bool with quoted_embeds (n, D): input embeddings of quoted characters where the system maps them (Step1X-Edit v1.2), else
    None; the steps fill the embeddings in where the MLLM is at hand.

    Pictures: clean (N, C) normalised packed latents; noise (N, C), zero on references; sigma (documents,) float32 in 0..1,
    1 = noise; image_doc (N,); role (N,) int64: 0 target, 1 the first reference, ...; grids: per document (height, width) in
    tokens of the target, then of each reference; loss_weight (N,) float32, zero on references and padding. Padding has
    document and role -1. records: the record id of each document.
    """

    text_index: Tensor
    text_doc: Tensor
    clean: Tensor
    noise: Tensor
    sigma: Tensor
    image_doc: Tensor
    role: Tensor
    loss_weight: Tensor
    grids: tuple[tuple[Grid, ...], ...]
    states: Tensor | None = None
    text_place: Tensor | None = None
    quoted: Tensor | None = None
    quoted_embeds: Tensor | None = None
    records: tuple[str, ...] = ()

    @property
    def n_documents(self) -> int:
        """Documents of this pack."""
        return len(self.grids)

    @property
    def n_targets(self) -> int:
        """Target tokens: what the flow-matching loss is a mean over."""
        return int((self.role == 0).sum())

    def noisy(self) -> Tensor:
        """(N, C): targets at their document's sigma, references as they are. x_t = (1 - sigma) clean + sigma noise."""
        sigma = self.sigma[self.image_doc][:, None].to(self.clean)
        mixed = (1 - sigma) * self.clean + sigma * self.noise
        return torch.where((self.role == 0)[:, None], mixed, self.clean)

    def velocity(self) -> Tensor:
        """(N, C) what the DiT shall predict on targets: noise - clean. Zero on references."""
        return torch.where((self.role == 0)[:, None], self.noise - self.clean, torch.zeros_like(self.clean))


def document_lengths(doc_id: Tensor) -> tuple[int, ...]:
    """Tokens of each document of doc_id (L,), padding not counted."""
    real = doc_id[doc_id != PADDING]
    return tuple(torch.bincount(real).tolist()) if len(real) else ()


def check_documents(doc_id: Tensor) -> None:
    """Raise PackingError unless doc_id (L,) counts 0, 1, ... in order, then only padding."""
    if doc_id.ndim != 1:
        raise PackingError(f"expected document numbers (L,), found a tensor of shape {tuple(doc_id.shape)}.")
    real = doc_id[doc_id != PADDING]
    steps = real.diff()
    ordered = not len(real) or (int(real[0]) == 0 and bool(((steps == 0) | (steps == 1)).all()))
    if not ordered or bool((doc_id[: len(real)] == PADDING).any()):
        raise PackingError(
            f"expected documents numbered 0, 1, ... in order, each in one piece, and padding (-1) only behind them; found "
            f"{doc_id.tolist()[:12]}{' ...' if len(doc_id) > 12 else ''}."
        )
