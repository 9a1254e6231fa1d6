"""Keys and values of a forward, kept for later ones that compute only some of its tokens.

B batch, T text tokens, N picture tokens, L = T + N, S = T + n rows that a later forward computes, H heads, D head dim.

What attention is given is kept: keys after their norm and rotation. A rotation depends on a token's place alone, so that
nothing of what is kept has to be made again when other tokens change (RegionE keeps raw keys, and norms and rotates all of them
in every layer of every step). The modules are called as ever, with another `attend`; what they hold (adapters, quantised
weights, hooks) takes part, and nothing of a run stays on them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels import Heads, Mask, qk_norm_rope
from .connector import Attend

Tables = tuple[Tensor, Tensor] | Tensor
"""Rotation tables by row of the joint sequence: cos and sin (L, D) or (B, L, D), or one complex table."""


@dataclass(slots=True, eq=False)
class KeyValues:
    """layers: k and v of each joint attention in the order of the calls, each (B, L, H, D), text first."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def clear(self) -> None:
        """Let go of everything."""
        self.layers.clear()

    def enter(self, attend: Attend, rope: Tables, n_text: int, rows: Tensor | None) -> tuple[Attend, Tables]:
        """The `attend` and the rotation tables for the blocks of one forward.

        rows None: all tokens are computed and their keys and values replace what was kept. rows (n,) int64: the picture
        tokens that are computed beside all `n_text` text tokens; theirs are renewed, and every query sees all L.
        Raises ConfigError where nothing was kept.
        """
        if rows is None:
            self.clear()
            return _Recording(self, attend), rope
        if not self.layers:
            raise ConfigError("rows: expected kept keys and values of the other tokens, found none. Run it whole first.")
        places = torch.cat([torch.arange(n_text, device=rows.device), rows + n_text])
        return _Partial(self, attend, places, rope), _select(rope, places)


class _Recording:
    """Attention that keeps what it is given. Each layer made these tensors for this call alone, so no copy is needed."""

    def __init__(self, store: KeyValues, attend: Attend) -> None:
        self._store, self._attend = store, attend

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        self._store.layers.append((k, v))
        return self._attend(q, k, v, mask)


class _Partial:
    """Attention of some queries to all keys. places (S,): their rows in the joint sequence; rope: of all L rows."""

    def __init__(self, store: KeyValues, attend: Attend, places: Tensor, rope: Tables) -> None:
        self._store, self._attend, self._layer = store, attend, 0
        self.places, self.rope = places, rope

    @property
    def cache(self) -> tuple[Tensor, Tensor]:
        """k and v (B, L, H, D) of the layer that comes next."""
        return self._store.layers[self._layer]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask = None) -> Tensor:
        """q, k, v (B, S, H, D), or q with the cache itself where `fused_heads` has written into it -> (B, S, H, D)."""
        keys, values = self.cache
        self._layer += 1
        if k is not keys:
            keys.index_copy_(1, self.places, k)
            values.index_copy_(1, self.places, v)
        return self._attend(q, keys, values, mask)


def fused_heads(
    image: Heads, rope: Tables, attend: Attend, *, text: Heads | None = None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v for `attend` by the fused op, which writes rows of a cache where `attend` has one."""
    if isinstance(attend, _Partial):
        return qk_norm_rope(image, attend.rope, text=text, rows=attend.places, cache=attend.cache, eps=eps)
    return qk_norm_rope(image, rope, text=text, eps=eps)


def _select(rope: Tables, places: Tensor) -> Tables:
    if isinstance(rope, Tensor):
        return rope.index_select(-2, places)
    return tuple(table.index_select(-2, places) for table in rope)
