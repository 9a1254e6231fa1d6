"""Speaking: prefill once per picture, a preallocated KV cache, several independent replies decoded together.

Rows of a batch are ragged: each has its own length in the cache, its own explicit positions and its own form, so a row that is
fed a literal of ten tokens and one that is fed a single token share a step; what pads the latter is overwritten later.

Prompts are prefilled in segments, cut behind every picture, one row at a time. A segment whose whole past equals one that is
kept is copied instead of computed. As segments have the same borders whether kept or not, the numbers are the same bit for
bit, and a reply never depends on what was asked before. On what is asked in the same call it can depend by rounding: 1e-6 in
float32, enough to change a drawn token in 16 bits.
"""

from __future__ import annotations

import inspect
import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, Interrupted
from .constrain import Reply
from .positions import next_position
from .qwen25vl import MASKS, QwenVL, language_model

if TYPE_CHECKING:
    from ..interfaces import Query
    from ..types import OnText, ShouldStop

log = logging.getLogger(__name__)

MAX_BATCH = 4
PREFIX_TOKENS = 4096
"""Tokens whose keys and values are kept between calls (57 kB each in the 7B model)."""

LITERAL_TOKENS = 64
"""Room for the literals of a form, which come on top of its budget. The cache grows where this is too little."""

Segments = tuple[tuple, ...]
"""Per segment what it holds: token ids, and the keys of pictures. Equal segments after equal pasts have equal KV."""


class KVCache:
    """Keys and values of several rows, preallocated and written in place.

    keys, values: per layer (R, H, S, D). lengths: tokens held per row. Takes the place of a transformers cache in a forward
    pass (`update`, `get_seq_length`), which writes the rows that `aim` named before, behind what they hold.
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
        self._end = 0

    @property
    def size(self) -> int:
        """S, the room per row."""
        return self.keys[0].shape[2]

    def aim(self, rows: Sequence[int], count: int) -> torch.Tensor | None:
        """Choose where the next forward pass of (len(rows), count) tokens writes; returns its mask.

        rows: one row, or all. (B, 1, T, S) bool, or None where plain causal attention (or, for one token, attention to
        everything) is meant.
        """
        assert len(rows) in (1, len(self.lengths))
        self._rows = list(rows)
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
            if len(self._rows) == 1:
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
        """Drop all other rows; the kept ones are renumbered from 0."""
        index = torch.tensor(list(rows), device=self.keys[0].device)
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer].index_select(0, index)
            self.values[layer] = self.values[layer].index_select(0, index)
        self.lengths = [self.lengths[row] for row in rows]

    def _view(self, store: torch.Tensor) -> torch.Tensor:
        first = self._rows[0]  # either a single row or all of them
        return store[first : first + len(self._rows), :, : self._end]

    def _grow(self, needed: int) -> None:
        extra = max(needed - self.size, self.size // 4)
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


@dataclass(slots=True)
class _Row:
    """One query on its way.

    embeds (1, T, D), positions (3, 1, T): prompt and opening; seen (V,) bool: tokens that have occurred; next: position of
    the next token; logits (V,): for the next choice.
    """

    index: int
    query: Query
    reply: Reply
    rng: torch.Generator
    embeds: torch.Tensor
    positions: torch.Tensor
    segments: Segments
    lengths: list[int]
    seen: torch.Tensor
    next: int
    logits: torch.Tensor | None = None


def generate(
    mllm: QwenVL,
    queries: Sequence[Query],
    *,
    min_pixels: int,
    max_pixels: int,
    max_side: int | None = None,
    snap: bool = False,
    on_text: OnText | None = None,
    should_stop: ShouldStop | None = None,
    max_batch: int = MAX_BATCH,
) -> list[str]:
    """One stripped reply per query, in order; each parses in its query's form.

    Pictures are prepared as `QwenVL.vision` does with the same arguments. on_text gets (task, text so far) per token,
    rows of a batch in turn. should_stop is polled per token; True raises Interrupted.
    """
    mllm.require_lm_head()
    replies: dict[int, str] = {}
    with torch.no_grad():
        for first in range(0, len(queries), max_batch):
            batch = list(enumerate(queries))[first : first + max_batch]
            rows = []
            for index, query in batch:
                _poll(should_stop)
                rows.append(_prepare(mllm, index, query, (min_pixels, max_pixels), max_side, snap))
            _run(mllm, rows, replies, on_text, should_stop)
    return [replies[index] for index in range(len(queries))]


def _prepare(mllm: QwenVL, index: int, query: Query, bounds: tuple[int, int], max_side: int | None, snap: bool) -> _Row:
    reply = Reply(query.form, mllm.vocabulary(), query.max_new_tokens)
    shown = [part for part in query.parts if not isinstance(part, str)]
    text = mllm.render(query.system, query.parts, n_images=len(query.images))
    features = [
        mllm.vision(query.images[i], min_pixels=bounds[0], max_pixels=bounds[1], max_side=max_side, snap=snap) for i in shown
    ]
    ids = mllm.expand(mllm.tokenize(text), features) + reply.opening
    limit = mllm.config.get_text_config().max_position_embeddings
    if len(ids) + query.max_new_tokens > limit:
        raise ConfigError(
            f"{query.task}: expected a prompt that leaves room for {query.max_new_tokens} tokens of {limit}, found one of "
            f"{len(ids)}. Shorten the instruction."
        )
    positions = mllm.positions(ids, features)
    segments, lengths = _segments(ids, mllm.image_token_id, [feature.key for feature in features])
    seen = torch.zeros(mllm.config.get_text_config().vocab_size, dtype=torch.bool, device=mllm.device)
    seen[ids] = True
    mllm.counts.generate_calls += 1
    return _Row(
        index=index,
        query=query,
        reply=reply,
        rng=torch.Generator().manual_seed(query.seed),
        embeds=mllm.embed(ids, features),
        positions=positions,
        segments=segments,
        lengths=lengths,
        seen=seen,
        next=next_position(positions),
    )


def _segments(ids: Sequence[int], image_token_id: int, keys: Sequence[str]) -> tuple[Segments, list[int]]:
    """Cut behind the last token of every picture, so that the text before a picture belongs to its segment."""
    segments, lengths, start = [], [], 0
    pictures = iter(keys)
    ends = [i + 1 for i in range(len(ids) - 1) if ids[i] == image_token_id != ids[i + 1]]
    for end in (*ends, len(ids)):
        piece = ids[start:end]
        text = tuple(token for token in piece if token != image_token_id)
        segments.append((text, next(pictures) if len(text) < len(piece) else None))
        lengths.append(end - start)
        start = end
    return tuple(segments), lengths


def _run(
    mllm: QwenVL, rows: list[_Row], replies: dict[int, str], on_text: OnText | None, should_stop: ShouldStop | None
) -> None:
    """Prefill and decode one batch."""
    config = mllm.config.get_text_config()
    size = max(row.embeds.shape[1] + row.query.max_new_tokens for row in rows) + LITERAL_TOKENS
    cache = KVCache(config, len(rows), size, dtype=mllm.dtype, device=mllm.device)
    for at, row in enumerate(rows):
        _prefill(mllm, cache, at, row, should_stop)
    while True:
        _poll(should_stop)
        feeds = [_choose(mllm, row, on_text) for row in rows]
        for row in rows:
            if row.reply.done:
                replies[row.index] = row.reply.text.strip()
        going = [i for i, row in enumerate(rows) if not row.reply.done]
        if not going:
            return
        if len(going) < len(rows):
            cache.keep(going)
            rows, feeds = [rows[i] for i in going], [feeds[i] for i in going]
        _step(mllm, cache, rows, feeds)


def _prefill(mllm: QwenVL, cache: KVCache, at: int, row: _Row, should_stop: ShouldStop | None) -> None:
    store = mllm.prefixes()
    # The last segment is always computed: its last token's logits are needed.
    known, start, layers = store.longest(row.segments[:-1])
    if known:
        cache.copy_in(at, layers, start)
    for length in row.lengths[known:]:
        _poll(should_stop)
        span = slice(start, start + length)
        hidden = _forward(mllm, cache, [at], row.embeds[:, span], row.positions[:, :, span], [length])
        start += length
        store.computed += length
    store.put(row.segments[:-1], row.lengths[:-1], cache, at)
    row.logits = mllm.model.lm_head(hidden[:, -1])[0].float()


def _choose(mllm: QwenVL, row: _Row, on_text: OnText | None) -> list[int]:
    """Let the model choose one token of a row; returns the tokens to feed."""
    logits = row.logits
    if mllm.repetition_penalty != 1 and row.reply.in_text:
        # Not in choices: a score must not depend on which digits the prompt happens to mention.
        logits = penalise(logits, row.seen, mllm.repetition_penalty)
    logits = row.reply.narrow(logits)
    token = pick(logits, temperature=row.query.temperature, top_p=row.query.top_p, rng=row.rng)
    feed = row.reply.take(token)
    row.seen[[token, *feed]] = True
    mllm.counts.new_tokens += max(1, len(feed))
    if on_text is not None:
        on_text(row.query.task, row.reply.text)
    return feed


def _step(mllm: QwenVL, cache: KVCache, rows: list[_Row], feeds: list[list[int]]) -> None:
    """Feed every row its tokens in one forward pass; sets the rows' logits."""
    longest = max(len(feed) for feed in feeds)
    tokens = torch.tensor([feed + [0] * (longest - len(feed)) for feed in feeds], device=mllm.device)
    starts = torch.tensor([row.next for row in rows])
    positions = (starts[:, None] + torch.arange(longest)).expand(3, -1, -1)
    embeds = mllm.model.get_input_embeddings()(tokens)
    counts = [len(feed) for feed in feeds]
    hidden = _forward(mllm, cache, range(len(rows)), embeds, positions, counts)
    last = torch.tensor(counts, device=hidden.device) - 1
    logits = mllm.model.lm_head(hidden[torch.arange(len(rows), device=hidden.device), last]).float()
    for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
        row.logits = logits[i]
        row.next += count


def _forward(
    mllm: QwenVL,
    cache: KVCache,
    rows: Sequence[int],
    embeds: torch.Tensor,
    positions: torch.Tensor,
    counts: Sequence[int],
) -> torch.Tensor:
    """(B, T, D) embeddings at (3, B, T) positions -> hidden states (B, T, D); counts: valid tokens per row."""
    mask = cache.aim(rows, embeds.shape[1])
    model = language_model(mllm.model)
    output = model(
        inputs_embeds=embeds,
        position_ids=positions.to(embeds.device),
        attention_mask=dict.fromkeys(MASKS, mask),
        use_cache=True,
        **{cache_argument(type(model)): cache},
    )
    cache.advance(counts)
    return output.last_hidden_state


@lru_cache
def cache_argument(kind: type[torch.nn.Module]) -> str:
    """What a language model of transformers calls its cache: `cache` since 5.24, where the older name only warns."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def penalise(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """logits (V,) with those of tokens that have occurred, prompt included, made less likely by the factor `penalty`."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def pick(logits: torch.Tensor, *, temperature: float, top_p: float, rng: torch.Generator) -> int:
    """A token id from logits (V,). temperature 0: the most likely one, without a draw.

    top_p: draw from the fewest most likely tokens whose probabilities reach it. The draw is one number of `rng`, a CPU
    generator, so that a seed means the same on every device.
    """
    if temperature <= 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / temperature, dim=-1).sort(descending=True)
    cumulative = probabilities.cumsum(-1).cpu()
    kept = 1 + int((cumulative < min(top_p, 1.0)).sum())
    kept = min(kept, int((probabilities > 0).sum()))
    drawn = torch.rand((), generator=rng) * cumulative[kept - 1]
    return int(order[min(int((cumulative[:kept] <= drawn).sum()), kept - 1)])


def _poll(should_stop: ShouldStop | None) -> None:
    if should_stop is not None and should_stop():
        raise Interrupted("stopped while the reasoner was speaking; what was finished before is kept")
