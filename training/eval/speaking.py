"""The reasoner's replies in batches: as `mllm.decode` gives them, for many runs at once.

B rows of a batch, P tokens of a prompt rounded up, S slots of the cache, H heads, D width of a head.

The prompts of a batch are padded to P and prefilled; then every row is fed one token a step, into slot P + step, whether it
chose the token or a form prescribes it. So all rows of a step write at the same place and see as many slots, of which the
padding of their own prompts is masked: what a row says does not depend on the others (`batching`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from ...reasonedit_core.errors import ConfigError, ReasonEditError
from ...reasonedit_core.mllm.constrain import Reply
from ...reasonedit_core.mllm.decode import penalise, pick
from ...reasonedit_core.mllm.positions import next_position
from ...reasonedit_core.mllm.qwen25vl import MASKS, language_model
from ...reasonedit_core.mllm.steps import cache_argument
from .batching import Eyes, padded, roof, slabs
from .strands import Answer, ask

if TYPE_CHECKING:
    from ...reasonedit_core.interfaces import Query
    from ...reasonedit_core.mllm.qwen25vl import QwenVL
    from ...reasonedit_core.types import OnText, ShouldStop

ROWS, PREFILL_ROWS = 32, 4
"""Rows that are decoded and that are prefilled together."""

KEPT_SHARE = 0.75
"""When no more than this share of the rows goes on, the others are dropped from the cache."""

PROMPT, GROWTH = 64, 32
"""Prompts are rounded up to a multiple of the one, so that batches fill; the cache grows by as many slots as the other."""


class AskingSpeaker:
    """A `Speaker` in strands. kind: of its requests, one per MLLM."""

    def __init__(self, kind: str = "speak") -> None:
        self.kind = kind

    def answer(
        self, queries: Sequence[Query], *, on_text: OnText | None = None, should_stop: ShouldStop | None = None
    ) -> list[str]:
        """Raw replies, one per query, in order. The time counts under the queries' tasks."""
        return ask(self.kind, queries, [query.task for query in queries])


@dataclass(slots=True, eq=False)
class _Row:
    """One query on its way. embeds (1, T, D), positions (3, 1, T); next: position of the next token; fed: tokens that the form
    prescribes and that are still to be fed; steps: tokens fed so far."""

    query: Query
    reply: Reply
    rng: torch.Generator
    embeds: torch.Tensor
    positions: torch.Tensor
    seen: torch.Tensor
    next: int
    fed: deque[int] = field(default_factory=deque)
    steps: int = 0

    @property
    def length(self) -> int:
        """T, the tokens of the prompt."""
        return self.embeds.shape[1]


class BatchSpeaker:
    """Answers queries with `mllm`. The arguments are those of `reasoners.qwen.QwenSpeaker`, which it answers like."""

    def __init__(
        self,
        mllm: QwenVL,
        eyes: Eyes,
        *,
        min_pixels: int,
        max_pixels: int,
        max_side: int | None = None,
        snap: bool = True,
    ) -> None:
        mllm.require_lm_head()
        self.mllm, self.eyes = mllm, eyes
        self.bounds = {"min_pixels": min_pixels, "max_pixels": max_pixels, "max_side": max_side, "snap": snap}
        self._layers = _Layers(mllm)

    def serve(self, queries: Sequence[Query]) -> list[Answer]:
        """One stripped reply per query, in order. A prompt that does not fit is the error of its own run."""
        answers: list[Answer] = [Answer()] * len(queries)
        rows: dict[int, _Row] = {}
        keys: list[Hashable] = []
        with torch.no_grad():
            for index, query in enumerate(queries):
                clock = time.perf_counter()
                try:
                    rows[index] = self._prepare(query)
                    keys.append((query.form, roof(rows[index].length, PROMPT)))
                except ReasonEditError as error:
                    keys.append(None)
                    answers[index] = Answer(error=error)
                else:
                    answers[index] = Answer(seconds=time.perf_counter() - clock)
            for slab in slabs(keys, ROWS):
                if keys[slab[0]] is None:
                    continue
                clock = time.perf_counter()
                self._speak([rows[index] for index in slab])
                seconds = time.perf_counter() - clock
                total = sum(rows[index].steps for index in slab)
                for index in slab:
                    share = seconds * rows[index].steps / total
                    answers[index] = Answer(rows[index].reply.text.strip(), answers[index].seconds + share)
        return answers

    def _prepare(self, query: Query) -> _Row:
        mllm = self.mllm
        config = mllm.config.get_text_config()
        reply = Reply(query.form, mllm.vocabulary(), query.max_new_tokens)
        text = mllm.render(query.system, query.parts, n_images=len(query.images))
        features = [self.eyes.look(query.images[i], **self.bounds) for i in query.parts if not isinstance(i, str)]
        ids = mllm.expand(mllm.tokenize(text), features) + reply.opening
        if len(ids) + query.max_new_tokens > config.max_position_embeddings:
            raise ConfigError(
                f"{query.task}: expected a prompt that leaves room for {query.max_new_tokens} tokens of "
                f"{config.max_position_embeddings}, found one of {len(ids)}. Shorten the instruction."
            )
        positions = mllm.positions(ids, features)
        seen = torch.zeros(config.vocab_size, dtype=torch.bool, device=mllm.device)
        seen[ids] = True
        mllm.counts.generate_calls += 1
        rng = torch.Generator().manual_seed(query.seed)
        return _Row(query, reply, rng, mllm.embed(ids, features), positions, seen, next_position(positions))

    def _speak(self, rows: list[_Row]) -> None:
        """Prefill and decode rows of one key to their ends."""
        layers, length = self._layers, roof(rows[0].length, PROMPT)
        cache = _Cache(layers, [row.length for row in rows], length)
        logits = [one for first in range(0, len(rows), PREFILL_ROWS) for one in layers.prefill(rows, first, length, cache)]
        while True:
            tokens = [self._next(row, logits[at]) for at, row in enumerate(rows)]
            going = [at for at, row in enumerate(rows) if not row.reply.done]
            if not going:
                return
            if len(going) <= KEPT_SHARE * len(rows):
                cache.keep(going)
                rows, tokens = [rows[at] for at in going], [tokens[at] for at in going]
            logits = layers.step(tokens, [row.next + row.steps - 1 for row in rows], cache)

    def _next(self, row: _Row, logits: torch.Tensor) -> int:
        """The token to feed to a row: one that its form prescribes, else one that it chooses. 0 when it has ended."""
        if row.reply.done:
            return 0
        if not row.fed:
            if self.mllm.repetition_penalty != 1 and row.reply.in_text:
                logits = penalise(logits, row.seen, self.mllm.repetition_penalty)
            logits = row.reply.narrow(logits)
            token = pick(logits, temperature=row.query.temperature, top_p=row.query.top_p, rng=row.rng)
            row.fed.extend(row.reply.take(token))
            row.seen[[token, *row.fed]] = True
            self.mllm.counts.new_tokens += max(1, len(row.fed))
            row.steps += not row.fed
        if not row.fed:  # the reply has ended
            return 0
        row.steps += 1
        return row.fed.popleft()


class _Cache:
    """Keys and values per layer, (B, H, S, D): the prompts in the first P slots, then what was fed since.

    Of B rows, only real ones: attention treats each by itself, so that their number changes nothing.
    """

    def __init__(self, layers: _Layers, lengths: list[int], prompt: int) -> None:
        shape = (len(lengths), layers.kv_heads, prompt + GROWTH, layers.head_dim)
        self.keys = [torch.zeros(shape, dtype=layers.dtype, device=layers.device) for _ in range(layers.count)]
        self.values = [torch.zeros_like(keys) for keys in self.keys]
        slots = torch.arange(prompt + GROWTH, device=layers.device)
        self._end = prompt
        self._shown = slots < torch.tensor(lengths, device=layers.device)[:, None]

    @property
    def rows(self) -> int:
        """B."""
        return len(self._shown)

    def open_slot(self) -> tuple[int, torch.Tensor]:
        """The next slot, and the mask (B, 1, 1, S) of what may be seen with it."""
        slot, self._end = self._end, self._end + 1
        if slot >= self._shown.shape[1]:
            self._shown = functional.pad(self._shown, (0, GROWTH))
            for stores in (self.keys, self.values):
                stores[:] = [functional.pad(store, (0, 0, 0, GROWTH)) for store in stores]
        self._shown[:, slot] = True
        return slot, self._shown[:, None, None]

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows; the kept ones are renumbered from 0."""
        index = torch.tensor(rows, device=self._shown.device)
        self._shown = self._shown[index]
        for stores in (self.keys, self.values):
            stores[:] = [store[index] for store in stores]


class _Collector:
    """In the place of a transformers cache: takes the keys and values of one prefill to rows of ours."""

    def __init__(self, cache: _Cache, first: int, count: int) -> None:
        self._cache, self._rows, self._count = cache, slice(first, first + count), count

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, cache_kwargs: object = None, **more: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep (B, H, P, D) of one layer; the pass itself goes on with them. cache_kwargs, more: as in `KVCache.update`."""
        length = key.shape[2]
        self._cache.keys[layer][self._rows, :, :length] = key[: self._count]
        self._cache.values[layer][self._rows, :, :length] = value[: self._count]
        return key, value

    def get_seq_length(self, layer: int = 0) -> int:
        """Nothing came before."""
        return 0


class _Layers:
    """The decoder of the MLLM, one token of each row at a time. Prompts go through transformers' own forward."""

    def __init__(self, mllm: QwenVL) -> None:
        self.mllm, self.model = mllm, language_model(mllm.model)
        config = mllm.config.get_text_config()
        self.count = config.num_hidden_layers
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and cache."""
        return self.mllm.dtype

    @property
    def device(self) -> torch.device:
        """Of weights and cache."""
        return self.mllm.device

    def prefill(self, rows: Sequence[_Row], first: int, length: int, cache: _Cache) -> list[torch.Tensor]:
        """Run the prompts of up to PREFILL_ROWS rows from `first`; per row the logits (V,) behind its prompt."""
        part = list(rows[first : first + PREFILL_ROWS])
        filled = part + part[:1] * (PREFILL_ROWS - len(part))
        output = self.model(
            inputs_embeds=torch.cat([padded(row.embeds, length, 1) for row in filled]),
            position_ids=torch.cat([padded(row.positions, length, 2) for row in filled], dim=1).to(self.device),
            attention_mask=dict.fromkeys(MASKS),
            use_cache=True,
            **{cache_argument(type(self.model)): _Collector(cache, first, len(part))},
        )
        last = torch.tensor([row.length - 1 for row in filled], device=self.device)
        states = output.last_hidden_state[torch.arange(PREFILL_ROWS, device=self.device), last]
        return list(self.mllm.model.lm_head(states).float()[: len(part)])

    def step(self, tokens: list[int], places: list[int], cache: _Cache) -> torch.Tensor:
        """Feed one token to every row of the cache, at the positions `places`; logits (ROWS, V), real rows first."""
        idle = [0] * (ROWS - len(tokens))
        slot, mask = cache.open_slot()
        states = self.model.embed_tokens(torch.tensor(tokens + idle, device=self.device))
        rope = self._rope(torch.tensor(places + idle, device=self.device), states.dtype)
        for at, layer in enumerate(self.model.layers):
            states = states + self._attend(layer.self_attn, layer.input_layernorm(states), rope, mask, slot, cache, at)
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        return self.mllm.model.lm_head(self.model.norm(states)).float()

    def _rope(self, places: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """cos, sin (B, 1, D). Behind the prompt the three axes of M-RoPE agree, so it is plain rotary embedding."""
        rotary = self.model.rotary_emb
        angles = places[:, None].float() * rotary.inv_freq.float()
        angles = torch.cat([angles, angles], dim=-1)[:, None]
        scale = rotary.attention_scaling
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def _attend(self, module: Any, x: torch.Tensor, rope, mask: torch.Tensor, slot: int, cache: _Cache, layer: int):
        """Attention of one layer for x (ROWS, C): writes keys and values of the real rows at `slot`; (ROWS, C)."""
        real = cache.rows
        q = _rotated(module.q_proj(x).view(ROWS, self.heads, self.head_dim), rope)[:real]
        k = _rotated(module.k_proj(x).view(ROWS, self.kv_heads, self.head_dim), rope)[:real]
        cache.keys[layer][:, :, slot] = k
        cache.values[layer][:, :, slot] = module.v_proj(x).view(ROWS, self.kv_heads, self.head_dim)[:real]
        # The heads that share keys stand as queries of one head, which no mask tells apart: nothing need be repeated.
        q = q.reshape(real, self.kv_heads, self.heads // self.kv_heads, self.head_dim)
        mixed = functional.scaled_dot_product_attention(q, cache.keys[layer], cache.values[layer], attn_mask=mask)
        return module.o_proj(padded(mixed.reshape(real, -1), ROWS, 0))


def _rotated(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of x (B, H, D), halves paired."""
    cos, sin = rope
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin
