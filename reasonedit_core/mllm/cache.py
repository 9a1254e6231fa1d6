"""Keys and values of what was read: of the rows that are being answered, and of prompt heads that may come again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

PREFIX_TOKENS = 4096
"""Tokens whose keys and values are kept between calls (57 kB each in the 7B model)."""

Segments = tuple[tuple, ...]
"""Per segment what it holds: token ids, and the keys of pictures. Equal segments after equal pasts have equal KV."""


class KVCache:
    """Keys and values of several rows, preallocated and written in place.

    keys, values: per layer (R, H, S, D). lengths: tokens held per row in use, at most R of them. Takes the place of a
    transformers cache in a forward pass (`update`, `get_seq_length`), which writes the rows that `aim` or `aim_whole` named
    before, behind what they hold. Addresses stay the same until the cache grows, which `grown` counts.
    """

    def __init__(self, config: Any, rows: int, size: int, *, dtype: torch.dtype, device: torch.device) -> None:
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (rows, heads, size, head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros_like(layer) for layer in self.keys]
        self.lengths = [0] * rows
        self._rows: list[int] = []
        self._index = self._slots = torch.empty(0)
        self._end = self.grown = 0
        self._whole = False

    @property
    def size(self) -> int:
        """S, the room per row."""
        return self.keys[0].shape[2]

    def restart(self, rows: int) -> None:
        """Use the first `rows` rows from anew. What they held stays behind masks until it is overwritten."""
        assert rows <= self.keys[0].shape[0]
        self.lengths = [0] * rows

    def reserve(self, size: int) -> None:
        """Grow to at least `size` tokens per row."""
        if size > self.size:
            self._grow(size)

    def aim_whole(self, index: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Like `aim`, with shapes and addresses that depend on the numbers of rows and tokens alone; returns the mask.

        index (B, 1) long: the rows 0 .. B-1; slots (B, T) long: where they write, below S, on the device. The pass attends to
        all S places under a mask (B, 1, T, S). Nothing here waits for the device.
        """
        self._whole, self._rows = True, list(range(len(index)))
        self._index, self._slots, self._end = index, slots, self.size
        return torch.arange(self.size, device=slots.device) <= slots[:, None, :, None]

    def aim(self, rows: Sequence[int], count: int) -> torch.Tensor | None:
        """Choose where the next forward pass of (len(rows), count) tokens writes; returns its mask.

        rows: one row, or all. (B, 1, T, S) bool, or None where plain causal attention (or, for one token, attention to
        everything) is meant.
        """
        assert len(rows) in (1, len(self.lengths))
        self._whole, self._rows = False, list(rows)
        starts = torch.tensor([self.lengths[row] for row in rows])
        self._slots = starts[:, None] + torch.arange(count)
        self._end = int(self._slots.max()) + 1
        if self._end > self.size:
            self._grow(self._end)
        device = self.keys[0].device
        same = bool((starts == starts[0]).all())
        mask = None
        if not same or (count > 1 and starts[0] > 0):
            mask = torch.arange(self._end) <= self._slots[:, None, :, None]
            mask = mask.to(device)
        self._index = torch.tensor(self._rows, device=device)[:, None]
        self._slots = self._slots.to(device)
        return mask

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, cache_kwargs: object = None, **more: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (B, H, T, D) of one layer; returns what the rows hold, (B, H, end, D).

        cache_kwargs, more: what transformers' own caches are told besides (`kwargs` since 5.24); not needed here.
        """
        for store, new in ((self.keys[layer], key), (self.values[layer], value)):
            if len(self._rows) == 1 and not self._whole:
                self._view(store)[:, :, -new.shape[2] :] = new
            else:
                # Where embeddings are trained, they are float32 and autocast makes keys of the frozen layers in less.
                store[self._index, :, self._slots] = new.transpose(1, 2).to(store.dtype)
        return self._view(self.keys[layer]), self._view(self.values[layer])

    def get_seq_length(self, layer: int = 0) -> int:
        """Length before this pass, which transformers asks for; its own positions from it are not used."""
        return self.lengths[self._rows[0]] if self._rows else 0

    def advance(self, counts: Sequence[int]) -> None:
        """Keep the first counts[i] tokens of what row i was given; the rest is padding and gets overwritten."""
        for row, count in zip(self._rows, counts, strict=True):
            self.lengths[row] += count

    def copy_out(self, row: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer the first `length` keys and values of a row, (H, length, D) each."""
        pairs = zip(self.keys, self.values, strict=True)
        return [(keys[row, :, :length].clone(), values[row, :, :length].clone()) for keys, values in pairs]

    def copy_in(self, row: int, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], length: int) -> None:
        """Fill the head of a row with the first `length` tokens of what `copy_out` gave."""
        for keys, values, (key, value) in zip(self.keys, self.values, layers, strict=True):
            keys[row, :, :length] = key[:, :length]
            values[row, :, :length] = value[:, :length]
        self.lengths[row] = length

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows; the kept ones are renumbered from 0, in place. rows: ascending."""
        for to, row in enumerate(rows):
            for store in (*self.keys, *self.values) if to != row else ():
                store[to].copy_(store[row])
        self.lengths = [self.lengths[row] for row in rows]

    def _view(self, store: torch.Tensor) -> torch.Tensor:
        first = self._rows[0]  # either a single row or all of them
        return store[first : first + len(self._rows), :, : self._end]

    def _grow(self, needed: int) -> None:
        extra = max(needed - self.size, self.size // 4)
        self.grown += 1
        for stores in (self.keys, self.values):
            for layer, store in enumerate(stores):
                stores[layer] = torch.nn.functional.pad(store, (0, 0, 0, extra))


class PrefixStore:
    """KV of prompt heads, kept over calls; the least recently used go first. computed counts tokens that were prefilled."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.computed = 0
        self._entries: OrderedDict[Segments, tuple[list[int], list]] = OrderedDict()

    def longest(self, segments: Segments) -> tuple[int, int, list]:
        """(number of leading segments that are kept, their tokens, their KV per layer)."""
        best: tuple[int, int, list] = (0, 0, [])
        found = None
        for kept, (lengths, layers) in self._entries.items():
            shared = next((i for i, (a, b) in enumerate(zip(kept, segments, strict=False)) if a != b), None)
            shared = min(len(kept), len(segments)) if shared is None else shared
            if shared > best[0]:
                best, found = (shared, sum(lengths[:shared]), layers), kept
        if found is not None:
            self._entries.move_to_end(found)
        return best

    def put(self, segments: Segments, lengths: list[int], cache: KVCache, row: int) -> None:
        """Keep the head of a row. Heads that it contains are dropped, and the oldest ones beyond the room."""
        total = sum(lengths)
        if not segments or total > PREFIX_TOKENS or any(k[: len(segments)] == segments for k in self._entries):
            return
        for kept in [k for k in self._entries if segments[: len(k)] == k]:
            del self._entries[kept]
        while self._entries and total + sum(sum(held) for held, _ in self._entries.values()) > PREFIX_TOKENS:
            self._entries.popitem(last=False)
        self._entries[segments] = (lengths, cache.copy_out(row, total))
