"""Masks as callers hand them in: a bool tensor, the mask of a pack of documents, an interval of keys per query, or none."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import ConfigError
from ..packing import PackMask

KEPT = "intervals"
"""Where a PackMask keeps the intervals that were made of it."""


@dataclass(frozen=True, eq=False)
class Intervals:
    """Query i of T sees the keys lo[i] up to, not including, hi[i], of `keys` keys: (T,) int32 each; none where hi <= lo.

    Says packed documents, causal text, bidirectional runs in it, and any choice of queries out of these (`take`).
    """

    lo: Tensor
    hi: Tensor
    keys: int

    def __post_init__(self) -> None:
        for name in ("lo", "hi"):
            x = getattr(self, name)
            if x.ndim != 1 or x.dtype != torch.int32 or x.shape != self.lo.shape or x.device != self.lo.device:
                raise ConfigError(
                    f"intervals are lo and hi (T,) int32 on one device; {name} is {tuple(x.shape)} {x.dtype} on {x.device}, lo "
                    f"{tuple(self.lo.shape)} on {self.lo.device}."
                )

    @cached_property
    def dense(self) -> Tensor:
        """(1, 1, T, keys) bool, True where a query (row) may see a key (column)."""
        key = torch.arange(self.keys, device=self.lo.device)
        return ((key >= self.lo[:, None]) & (key < self.hi[:, None]))[None, None]

    def take(self, index: Tensor) -> Intervals:
        """The same for a choice of queries, (n,) int64; all keys stay."""
        return Intervals(self.lo[index], self.hi[index], self.keys)

    def seen_by(self, size: int) -> Tensor:
        """(2, n) int32, for n tiles of `size` keys: the first query that may see a key of the tile, and the one behind the last
        (0 and 0 for none). May name too many queries, by less than `size` at either end. Made once per size, without waiting
        for the device."""
        kept = vars(self).setdefault("_seen_by", {})  # as functools.cached_property does; the dataclass is frozen for callers
        if size not in kept:
            kept[size] = self._seen_by_tiles(size)
        return kept[size]

    def _seen_by_tiles(self, size: int) -> Tensor:
        device, never = self.lo.device, 2**30
        queries = torch.arange(0, len(self.lo), size, device=device, dtype=torch.int32)
        starts = torch.arange(0, self.keys, size, device=device, dtype=torch.int32)
        # Compared tile by tile: queries by keys would be a thousand times as many pairs.
        padding = (0, -len(self.lo) % size)
        empty = self.hi <= self.lo
        lo = torch.nn.functional.pad(self.lo.masked_fill(empty, never), padding, value=never).view(-1, size)
        hi = torch.nn.functional.pad(self.hi.masked_fill(empty, 0), padding).view(-1, size)
        if not len(queries) or not len(starts):
            return torch.zeros(2, len(starts), dtype=torch.int32, device=device)
        sees = (lo.amin(1)[:, None] < starts + size) & (hi.amax(1)[:, None] > starts)
        first = torch.where(sees, queries[:, None], never).amin(0)
        last = torch.where(sees, queries[:, None] + size, 0).amax(0).clamp(max=len(self.lo))
        return torch.stack([torch.where(last > 0, first, 0), last]).to(torch.int32)


Mask = torch.Tensor | PackMask | Intervals | None
"""bool tensor broadcastable to (B, H, T, S), True where a query may see a key; PackMask of T = S tokens; Intervals of T queries
and S keys; None: all see all."""


def as_tensor(mask: Mask) -> torch.Tensor | None:
    """The mask as a bool tensor (1, 1, T, S) where it is a PackMask or intervals, else as it is.

    torch.compile cannot trace how `PackMask.dense` is made (Python 3.11): read it once outside of what is compiled.
    """
    return mask.dense if isinstance(mask, (PackMask, Intervals)) else mask


def intervals_of(mask: PackMask) -> Intervals:
    """The intervals of a pack, made at the first call and kept with the mask."""
    kept = vars(mask).get(KEPT)
    if kept is None:
        kept = vars(mask)[KEPT] = _intervals(mask)
    return kept


def _intervals(mask: PackMask) -> Intervals:
    # Padding is document -1: it takes the start of the first document for both ends, which is an empty interval.
    lo, hi = mask.cu_seqlens[mask.doc_id.clamp(min=0)], mask.cu_seqlens[mask.doc_id + 1]
    if mask.causal:
        hi = torch.minimum(hi, torch.arange(1, len(hi) + 1, device=hi.device, dtype=torch.int32))
    return Intervals(lo, hi, len(mask.doc_id))
