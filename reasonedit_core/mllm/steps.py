"""One forward pass of the decoder for several rows: as the cache is filled, or over fixed addresses, as a CUDA graph.

A pass over fixed addresses attends to the whole cache under a mask, so that its shapes depend on the numbers of rows and
tokens alone. On CUDA such a pass is recorded once per pair of these numbers and replayed after that: a decoding step then costs
the time to stream the weights, and not the time to start some thousand kernels. The same code runs anywhere without recording.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from .cache import KVCache
from .lean import LeanDecoder, lean_refusal
from .qwen25vl import MASKS

if TYPE_CHECKING:
    from .qwen25vl import QwenVL

log = logging.getLogger(__name__)

MODES = ("auto", "plain", "lean", "static", "graph")
"""How steps are made. plain: over the filled part of the cache; lean: the same without transformers' forward; static: over
fixed addresses; graph: the same, recorded; auto: graph where that is possible, else lean, else plain."""

WIDTHS = (1, 2, 4, 8, 16)
"""Tokens per row of a pass over fixed addresses; a pass is padded to the next one, a longer one is made plainly."""

SIZE_STEP = 256
"""The cache of fixed addresses has a multiple of this many places, so that few prompts make it grow."""

TOLERANCE = 2e-2
"""Largest difference of a replayed pass from the plain one, relative to the largest state, at which the graph is believed."""


@lru_cache
def cache_argument(kind: type[torch.nn.Module]) -> str:
    """What a language model of transformers calls its cache: `cache` since 5.24, where the older name only warns."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def run_model(
    model: Any, cache: KVCache, embeds: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """(B, T, D) embeddings at (3, B, T) positions -> hidden states (B, T, D). The cache was aimed, mask is what that gave."""
    output = model(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=dict.fromkeys(MASKS, mask),
        use_cache=True,
        **{cache_argument(type(model)): cache},
    )
    return output.last_hidden_state


def forward(
    model: Any,
    cache: KVCache,
    rows: Sequence[int],
    embeds: torch.Tensor,
    positions: torch.Tensor,
    counts: Sequence[int],
) -> torch.Tensor:
    """A plain pass over what the rows hold: see `run_model`. counts: tokens per row that are no padding."""
    mask = cache.aim(rows, embeds.shape[1])
    hidden = run_model(model, cache, embeds, positions.to(embeds.device), mask)
    cache.advance(counts)
    return hidden


def refusal(model: Any, device: torch.device) -> str | None:
    """Why passes through `model` cannot be recorded; None when they can."""
    if device.type != "cuda":
        return f"no CUDA device: the weights are on {device}"
    away = next((name for name, tensor in model.named_parameters() if tensor.device != device), None)
    if away is not None:
        return f"not all weights are on {device}: {away} is elsewhere"
    for name, module in model.named_modules():
        if module is not model and (module._forward_pre_hooks or module._forward_hooks):
            return f"{name} has hooks, which a graph would leave out (offloading by blocks works with such)"
    return None


class FixedSteps:
    """Passes over a cache of fixed addresses. record: as CUDA graphs.

    fallback: why a pass was not recorded though it should have been, or "".
    """

    def __init__(self, model: Any, cache: KVCache, *, record: bool) -> None:
        self.model, self.cache, self.record = model, cache, record
        self.fallback = ""
        rows, device = cache.keys[0].shape[0], cache.keys[0].device
        self._tokens = torch.zeros((rows, WIDTHS[-1]), dtype=torch.long, device=device)
        self._places, self._slots = torch.zeros_like(self._tokens), torch.zeros_like(self._tokens)
        self._index = torch.arange(rows, device=device)[:, None]
        self._graphs: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}
        self._made_at = (cache.grown, addresses(model))
        self._pool: Any = None

    @property
    def stale(self) -> bool:
        """Whether weights or cache have moved since the first pass: graphs hold their addresses."""
        return self._made_at != (self.cache.grown, addresses(self.model))

    def step(self, feeds: Sequence[Sequence[int]], places: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """Feed each row its tokens, the first at its place; hidden states (B, T, D), T at least the longest feed.

        counts: tokens per row that stay in the cache; what was fed beyond is overwritten by the next pass. The states of a
        replayed pass lie where the next one writes its own.
        """
        longest = max(len(feed) for feed in feeds)
        width = next((width for width in WIDTHS if width >= longest), longest)
        lengths = self.cache.lengths
        if width > WIDTHS[-1] or max(lengths) + width > self.cache.size:
            hidden = plain_step(self.model, self.cache, feeds, places, counts)
            if self.cache.grown != self._made_at[0]:  # it lies elsewhere now
                self._graphs.clear()
                self._made_at = (self.cache.grown, self._made_at[1])
            return hidden
        rows = len(feeds)
        ahead = torch.arange(width)
        self._tokens[:rows, :width] = padded(feeds, width).to(self._tokens.device)
        self._places[:rows, :width] = (torch.tensor(places)[:, None] + ahead).to(self._tokens.device)
        self._slots[:rows, :width] = (torch.tensor(lengths)[:, None] + ahead).to(self._tokens.device)
        hidden = self._replay(rows, width) if self.record and not self.fallback else self._pass(rows, width)
        for row, count in enumerate(counts):
            lengths[row] += count
        return hidden

    def _pass(self, rows: int, width: int) -> torch.Tensor:
        mask = self.cache.aim_whole(self._index[:rows], self._slots[:rows, :width])
        embeds = self.model.embed_tokens(self._tokens[:rows, :width])
        positions = self._places[:rows, :width].expand(3, -1, -1)
        return run_model(self.model, self.cache, embeds, positions, mask)

    def _replay(self, rows: int, width: int) -> torch.Tensor:
        key = (rows, width)
        if key not in self._graphs:
            plain = self._pass(rows, width)  # writes what the graph will write, and warms up what is made at a first call
            try:
                self._graphs[key] = self._recorded(rows, width)
                graph, hidden = self._graphs[key]
                graph.replay()
                off = float((hidden.float() - plain.float()).abs().max() / plain.float().abs().max().clamp_min(1e-6))
            except RuntimeError as error:
                self._give_up(f"recording failed: {str(error).splitlines()[0]}")
                return self._pass(rows, width)
            if not off <= TOLERANCE:
                self._give_up(f"a replayed pass differs from the plain one by {off:.1e} of the largest state")
            return plain
        graph, hidden = self._graphs[key]
        graph.replay()
        return hidden

    def _recorded(self, rows: int, width: int) -> tuple[Any, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=self._pool):
            hidden = self._pass(rows, width)
        self._pool = self._pool or graph.pool()
        return graph, hidden

    def _give_up(self, why: str) -> None:
        self.fallback = why
        self._graphs.clear()
        log.warning("the MLLM decodes without CUDA graphs: %s", why)


class PlainSteps:
    """Passes over the filled part of a cache. lean: who makes them instead of transformers, or None."""

    def __init__(self, model: Any, cache: KVCache, lean: LeanDecoder | None = None) -> None:
        self.model, self.cache, self.lean = model, cache, lean

    def step(self, feeds: Sequence[Sequence[int]], places: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """See `FixedSteps`."""
        if self.lean is not None:
            longest = max(len(feed) for feed in feeds)
            mask = self.cache.aim(range(len(feeds)), longest)
            at = torch.tensor(places)[:, None] + torch.arange(longest)
            hidden = self.lean(self.cache, padded(feeds, longest), at, mask)
            self.cache.advance(counts)
            return hidden
        return plain_step(self.model, self.cache, feeds, places, counts)


def plain_step(
    model: Any, cache: KVCache, feeds: Sequence[Sequence[int]], places: Sequence[int], counts: Sequence[int]
) -> torch.Tensor:
    """A plain pass: see `FixedSteps.step`."""
    longest = max(len(feed) for feed in feeds)
    embeds = model.embed_tokens(padded(feeds, longest).to(cache.keys[0].device))
    positions = (torch.tensor(places)[:, None] + torch.arange(longest)).expand(3, -1, -1)
    return forward(model, cache, range(len(feeds)), embeds, positions, counts)


def padded(feeds: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    """Tokens (B, width) long, zeros behind each feed."""
    return torch.tensor([[*feed, *[0] * (width - len(feed))] for feed in feeds])


def addresses(model: Any) -> int:
    """A number for where all weights lie: another one when any of them has moved."""
    return hash(tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())))


class Stepping:
    """Chooses how an MLLM's steps are made, and keeps the cache of fixed addresses with its graphs between calls.

    mode: one of MODES. declined: why `auto` is not to record graphs, "" where it may: weights that move between calls have
    every graph made anew, and leave cache and graphs behind on the device. `reason` says what became of it, for people.
    """

    def __init__(self, mode: str = "auto") -> None:
        self.mode, self.declined, self.reason = mode, "", ""
        self._kept: FixedSteps | None = None

    def open(self, mllm: QwenVL, model: Any, rows: int, size: int, most: int) -> PlainSteps | FixedSteps:
        """A cache of `rows` empty rows with `size` places each, and who makes its steps. most: rows of the largest batch."""
        config = mllm.config.get_text_config()
        why = refusal(model, mllm.device) if self.mode in ("auto", "graph") else f"{self.mode} steps were asked for"
        if self.mode == "auto":
            why = why or self.declined or None
        if self.mode in ("plain", "lean") or (self.mode == "auto" and why is not None):
            slow = lean_refusal(model, mllm.device) if self.mode != "plain" else None
            lean = LeanDecoder(model) if self.mode != "plain" and slow is None else None
            self._tell(f"{'plain' if lean is None else 'lean'} steps: {why}" + (f"; not lean: {slow}" if slow else ""))
            return PlainSteps(model, KVCache(config, rows, size, dtype=mllm.dtype, device=mllm.device), lean)
        size = -(-(size + WIDTHS[-1]) // SIZE_STEP) * SIZE_STEP
        kept = self._kept
        if kept is not None and (kept.stale or kept.cache.size < size or kept.cache.keys[0].shape[0] < rows):
            kept = None
        if kept is None or kept.cache.keys[0].device != mllm.device or kept.cache.keys[0].dtype != mllm.dtype:
            self._kept = None  # the old cache is given back before the new one is made
            cache = KVCache(config, max(rows, most), size, dtype=mllm.dtype, device=mllm.device)
            kept = self._kept = FixedSteps(model, cache, record=why is None)
        kept.cache.restart(rows)
        self._tell("steps as CUDA graphs" if why is None and not kept.fallback else f"static steps: {kept.fallback or why}")
        return kept

    def release(self) -> None:
        """Give back cache and graphs."""
        self._kept = None

    def _tell(self, reason: str) -> None:
        if reason != self.reason:
            self.reason = reason
            log.info("the MLLM makes %s", reason)
