"""Documents laid behind each other: lists of them in, packs out. Only tensors are put together here; nothing is drawn.

L tokens of a text pack, T text tokens and N picture tokens of an image pack, C channels of a packed latent token, D width of
the states.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ...reasonedit_core.denoisers.packed import FILLER
from ...reasonedit_core.errors import PackingError
from ...reasonedit_core.packing import IGNORED, PADDING, Grid, ImagePack, TextPack
from .transcripts import TextDocument

Balance = Literal["token", "sample", "sqrt"]
"""What a document counts: as many as its tokens, one, or the square root of its tokens."""

PATCH_VALUES = 1176


@dataclass(frozen=True, slots=True, eq=False)
class ImageDocument:
    """One document of the picture stream before it is packed.

    pictures: clean packed latents (n, C) of the target, then of the references; grids: their sizes in tokens. noise: as the
    target. kept: how many states condition it, fillers behind them. states (kept, D): the states themselves, None where they
    come from the text pack. place, quoted (kept + fillers) and quoted_embeds as in `packing.ImagePack`.
    """

    record: str
    pictures: tuple[Tensor, ...]
    grids: tuple[Grid, ...]
    noise: Tensor
    sigma: float
    kept: int
    fillers: int = 0
    weight: float = 1.0
    states: Tensor | None = None
    place: Tensor | None = None
    quoted: Tensor | None = None
    quoted_embeds: Tensor | None = None


def token_weight(n: int, weight: float, balance: Balance) -> float:
    """What each of the n tokens of a document counts that counts `weight` per token, as a whole, or by the root of n."""
    return weight / {"token": 1.0, "sample": float(max(n, 1)), "sqrt": math.sqrt(max(n, 1))}[balance]


def text_pack(
    documents: Sequence[TextDocument], weights: Sequence[float], *, balance: Balance = "token", pad: int = 0
) -> TextPack:
    """The documents as one pack. weights: of each document's record. exports: the kept rows of those that condition, in
    their order here. pad: bring the length to a multiple of this."""
    if not documents:
        raise PackingError("expected at least one document for a text pack, found none.")
    lengths = [len(document) for document in documents]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    labels = torch.cat([document.labels for document in documents])
    counted = [
        torch.full((len(document),), token_weight(document.n_answers, weight, balance))
        for document, weight in zip(documents, weights, strict=True)
    ]
    weight = torch.where(labels != IGNORED, torch.cat(counted), torch.zeros(()))
    patches = [patch for document in documents for patch in document.patches]
    hollow = next((d.record for d in documents for p in d.patches if len(p.values) != p.grid[0] * p.grid[1]), None)
    if hollow is not None:
        raise PackingError(f"record {hollow!r}: expected a document with its patches, found one that was made to be counted.")
    behind = -sum(lengths) % pad if pad else 0
    return TextPack(
        ids=_padded(torch.cat([document.ids for document in documents]), behind, 0),
        positions=_padded(torch.cat([document.positions for document in documents], dim=1), behind, 0),
        doc_id=_padded(_numbers(lengths), behind, PADDING),
        labels=_padded(labels, behind, IGNORED),
        weights=_padded(weight.float(), behind, 0.0),
        patches=torch.cat([patch.values for patch in patches]) if patches else torch.empty(0, PATCH_VALUES),
        grids=tuple(patch.grid for patch in patches),
        exports=tuple(
            (start + document.kept.start, start + document.kept.stop)
            for start, document in zip(starts, documents, strict=True)
            if document.kept is not None
        ),
        records=tuple(document.record for document in documents),
    )


def image_pack(
    documents: Sequence[ImageDocument],
    *,
    exports: Sequence[tuple[int, int]] | None = None,
    balance: Balance = "token",
    pad: int = 0,
) -> ImagePack:
    """The documents as one pack. exports: rows of the text pack's states, one stretch for each document; None: the documents
    carry their states. pad: bring the picture tokens to a multiple of this."""
    if not documents:
        raise PackingError("expected at least one document for an image pack, found none.")
    counts = [sum(len(picture) for picture in document.pictures) for document in documents]
    behind = -sum(counts) % pad if pad else 0
    runs = [(role, len(picture)) for document in documents for role, picture in enumerate(document.pictures)]
    role = torch.cat([torch.full((n,), number) for number, n in runs])
    noise = [_with_rows(d.noise, n - len(d.noise)) for d, n in zip(documents, counts, strict=True)]
    weight = [
        torch.cat([torch.full((len(d.noise),), token_weight(len(d.noise), d.weight, balance)), torch.zeros(n - len(d.noise))])
        for d, n in zip(documents, counts, strict=True)
    ]
    return ImagePack(
        clean=_with_rows(torch.cat([picture for document in documents for picture in document.pictures]), behind),
        noise=_with_rows(torch.cat(noise), behind),
        sigma=torch.tensor([document.sigma for document in documents], dtype=torch.float32),
        image_doc=_padded(_numbers(counts), behind, PADDING),
        role=_padded(role, behind, PADDING),
        loss_weight=_padded(torch.cat(weight).float(), behind, 0.0),
        grids=tuple(document.grids for document in documents),
        records=tuple(document.record for document in documents),
        **_text_half(documents, exports),
    )


def _text_half(documents: Sequence[ImageDocument], exports: Sequence[tuple[int, int]] | None) -> dict[str, Tensor | None]:
    """The text fields of an image pack."""
    lengths = [document.kept + document.fillers for document in documents]
    if exports is None:
        found = [len(document.states) if document.states is not None else None for document in documents]
        ends = [sum(document.kept for document in documents[: number + 1]) for number in range(len(documents))]
        exports = [(end - document.kept, end) for end, document in zip(ends, documents, strict=True)]
        states = torch.cat([document.states for document in documents]) if None not in found else None
    else:
        found, states = [stop - start for start, stop in exports], None
    if found != [document.kept for document in documents]:
        raise PackingError(
            f"expected states for each of {len(documents)} documents ({[d.kept for d in documents]} rows), found {found}. The "
            "text pack or the cache belongs to other documents."
        )
    index = [
        torch.cat([torch.arange(*rows), torch.full((document.fillers,), FILLER)])
        for rows, document in zip(exports, documents, strict=True)
    ]
    places = [document.place for document in documents]
    if len({place is None for place in places}) > 1:
        raise PackingError("expected positions of the text in all documents or in none, found both.")
    # Marked also where nothing happens to be quoted: under FSDP2 every rank must then ask the MLLM for embeddings, or none.
    marked = any(document.quoted is not None for document in documents)
    quoted = [
        torch.zeros(length, dtype=torch.bool) if document.quoted is None else document.quoted
        for document, length in zip(documents, lengths, strict=True)
    ]
    embeds = [document.quoted_embeds for document in documents if document.quoted_embeds is not None]
    return {
        "text_index": torch.cat(index),
        "text_doc": _numbers(lengths),
        "states": states,
        "text_place": None if places[0] is None else torch.cat([place.float() for place in places]),
        "quoted": torch.cat(quoted) if marked else None,
        "quoted_embeds": torch.cat(embeds) if embeds else None,
    }


def _numbers(lengths: Sequence[int]) -> Tensor:
    """0 for the first document's tokens, 1 for the second's, ..."""
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def _padded(values: Tensor, behind: int, value: float) -> Tensor:
    """`values` with `behind` times `value` behind its last axis."""
    return functional.pad(values, (0, behind), value=value) if behind else values


def _with_rows(values: Tensor, behind: int) -> Tensor:
    """`values` (n, C) with rows of zeros behind."""
    return functional.pad(values, (0, 0, 0, behind)) if behind else values
