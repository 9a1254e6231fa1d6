"""The attention that a user chose, for a whole network: which names there are, whether one can run, and calls on it.

B batch, T queries, S keys, H heads, Hk key heads, D head dim. `auto` is the dispatch as it is. A named backend goes past the
host and takes every call of the network. Some backends take no bool mask: to those a masked call is given sample by sample,
without the keys that no query sees, which leaves no mask or intervals. So guidance in one batch, where the shorter text is
padded, runs on them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ..errors import BackendUnavailable, ConfigError
from . import dispatch
from .mask import Intervals, Mask

AUTO = "auto"

Part = tuple[Tensor | None, Intervals | None]
"""Of one sample: the keys that any query sees, (n,) int64 or None for all; and which of them each query sees."""


def attend_with(host: dispatch.Run | None = None, backend: str = AUTO) -> Callable[[Tensor, Tensor, Tensor, Mask], Tensor]:
    """Attention (q (B, T, H, D), k, v (B, S, Hk, D), mask) -> (B, T, H, D) for one forward: by the host or the dispatch with
    "auto", else by the named backend alone."""
    return partial(dispatch.attention, host=host) if backend == AUTO else Named(backend)


def names() -> tuple[str, ...]:
    """What a user may choose for a network whose tokens are not packed: "auto" and backends that take such calls."""
    probe = torch.empty(1, 1, 1, 16, dtype=torch.float16, device="meta")
    return AUTO, *(one.name for one in dispatch.BACKENDS if one.supports(probe, probe, probe, None) is None)


def check(name: str, device: torch.device, dtype: torch.dtype, head_dims: Iterable[int] = (64,)) -> None:
    """Refuse a choice that no call of the network could run on: before the weights are loaded with the head dim of any
    network, then with its own. Raises ConfigError for a name that is not known, BackendUnavailable with the backend's words."""
    if name == AUTO:
        return
    known = ", ".join(names())
    backend = next((one for one in dispatch.BACKENDS if one.name == name), None)
    if backend is None:
        raise ConfigError(f"attention: expected one of {known}, found {name!r}. Choose one of these.")
    for dim in head_dims:
        probe = torch.empty(1, 1, 1, dim, dtype=dtype, device=device)
        reason = backend.refusal(probe, probe, probe)
        if reason is not None:
            raise BackendUnavailable(
                f"attention: expected a backend that can run the DiT on {device.type}, found {name!r}, which cannot: {reason}. "
                f"Choose another of {known}."
            )


class Named:
    """Calls on one backend. Lives for one forward, whose few masks are looked at once each."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._looked_at: list[tuple[Tensor, list[Part]]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        """q (B, T, H, D), k, v (B, S, Hk, D) -> (B, T, H, D)."""
        if not isinstance(mask, Tensor) or not self._takes_only_unmasked(q, k, v, mask):
            return dispatch.attention(q, k, v, mask, backend=self.backend)
        outs = []
        for sample, (keys, intervals) in enumerate(self._parts(mask, len(q))):
            one, *pair = (x[sample : sample + 1] for x in (q, k, v))
            pair = pair if keys is None else [x.index_select(1, keys) for x in pair]
            if intervals is not None and len(intervals.lo) != q.shape[1]:  # a mask for all queries alike that hides all keys
                intervals = intervals.take(intervals.lo.new_zeros(q.shape[1], dtype=torch.int64))
            outs.append(dispatch.attention(one, *pair, intervals, backend=self.backend))
        return torch.cat(outs)

    def _takes_only_unmasked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> bool:
        backend = next((one for one in dispatch.BACKENDS if one.name == self.backend), None)
        return backend is not None and backend.supports(q, k, v, mask) is not None and backend.supports(q, k, v, None) is None

    def _parts(self, mask: Tensor, batch: int) -> list[Part]:
        # Values are read, for which a device is waited: once per forward and mask, not in every layer.
        for known, parts in self._looked_at:
            if known is mask and len(parts) == batch:
                return parts
        four = mask[(None,) * (4 - mask.ndim)]
        if four.shape[1] != 1:
            raise BackendUnavailable(
                f"attention backend {self.backend!r}: expected a mask that all heads share, found {tuple(mask.shape)}. "
                "Choose auto."
            )
        parts = [self._part(seen) for seen in four[:, 0].expand(batch, -1, -1)]
        self._looked_at.append((mask, parts))
        return parts

    def _part(self, seen: Tensor) -> Part:
        """seen (T | 1, S) bool of one sample."""
        used = seen.any(0)
        keys = None if bool(used.all()) or not bool(used.any()) else used.nonzero()[:, 0]
        seen = seen if keys is None else seen.index_select(1, keys)
        if bool(seen.all()):
            return keys, None
        lo = seen.int().argmax(1).to(torch.int32)
        intervals = Intervals(lo, lo + seen.sum(1, dtype=torch.int32), seen.shape[1])
        if not torch.equal(intervals.dense[0, 0], seen):
            raise BackendUnavailable(
                f"attention backend {self.backend!r}: expected a mask in which each query sees one run of keys, found one with "
                "gaps. Choose auto."
            )
        return keys, intervals
