"""Speaking: prefill once per picture, a preallocated KV cache, several independent replies decoded together.

A greedy reply is guessed ahead from the words before it (`lookup`): the guess is fed along with the token that is due, and as
far as the model's choices agree with it they cost no pass of their own. Chosen is what would be chosen without it.

Rows of a batch are ragged: each has its own length in the cache, its own explicit positions and its own form, so a row that is
fed a literal of ten tokens and one that is fed a single token share a step; what pads the latter is overwritten later.

Prompts are prefilled in segments, cut behind every picture, one row at a time. A segment whose whole past equals one that is
kept is copied instead of computed. As segments have the same borders whether kept or not, the numbers are the same bit for
bit, and a reply never depends on what was asked before. On what is asked in the same call it can depend by rounding: 1e-6 in
float32, enough to change a drawn token in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError, Interrupted
from .cache import KVCache, Segments
from .constrain import Reply
from .lookup import WIDEST, Lookup
from .positions import next_position
from .qwen25vl import QwenVL, language_model
from .steps import FixedSteps, PlainSteps, forward

if TYPE_CHECKING:
    from ..interfaces import Query
    from ..types import OnText, ShouldStop

MAX_BATCH = 4
PIECE = 256
"""Tokens of a segment that are read at once behind others on a CPU, where attention computes what a mask then hides."""

LITERAL_TOKENS = 64
"""Room for the literals of a form, which come on top of its budget. The cache grows where this is too little."""


@dataclass(slots=True)
class _Row:
    """One query on its way.

    embeds (1, T, D), positions (3, 1, T): prompt and opening; seen (V,) bool: tokens that have occurred; next: position of
    the next token; ahead: the tokens that were fed as a guess; logits (1 + len(ahead), V): for the next choice, and for those
    behind each of them. lookup: None where replies are drawn by chance.
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
    lookup: Lookup | None
    ahead: list[int] = field(default_factory=list)
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
        lookup=Lookup(ids, mllm.vocabulary().controls) if mllm.guesses and query.temperature <= 0 else None,
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
    size = max(row.embeds.shape[1] + row.query.max_new_tokens for row in rows) + LITERAL_TOKENS + WIDEST
    steps = mllm.stepping().open(mllm, language_model(mllm.model), len(rows), size, MAX_BATCH)
    cache = steps.cache
    for at, row in enumerate(rows):
        _prefill(mllm, cache, at, row, should_stop)
    while True:
        _poll(should_stop)
        feeds = [_advance(mllm, cache, at, row, on_text, should_stop) for at, row in enumerate(rows)]
        for row in rows:
            if row.reply.done:
                replies[row.index] = row.reply.text.strip()
        going = [i for i, row in enumerate(rows) if not row.reply.done]
        if not going:
            return
        if len(going) < len(rows):
            cache.keep(going)
            rows, feeds = [rows[i] for i in going], [feeds[i] for i in going]
        _step(mllm, steps, rows, feeds)


def _prefill(mllm: QwenVL, cache: KVCache, at: int, row: _Row, should_stop: ShouldStop | None) -> None:
    store = mllm.prefixes()
    # The last segment is always computed: its last token's logits are needed.
    known, start, layers = store.longest(row.segments[:-1])
    if known:
        cache.copy_in(at, layers, start)
    model = language_model(mllm.model)
    for length in row.lengths[known:]:
        for piece in _pieces(start, length, mllm.device):
            _poll(should_stop)
            span = slice(start, start + piece)
            hidden = forward(model, cache, [at], row.embeds[:, span], row.positions[:, :, span], [piece])
            start += piece
        store.computed += length
    store.put(row.segments[:-1], row.lengths[:-1], cache, at)
    row.logits = mllm.model.lm_head(hidden[:, -1]).float()


def _pieces(start: int, length: int, device: torch.device) -> list[int]:
    """How a segment is cut for reading. It depends on nothing but its place, so that kept and computed segments are alike."""
    if start == 0 or device.type != "cpu":
        return [length]
    return [min(PIECE, length - at) for at in range(0, length, PIECE)]


def _advance(
    mllm: QwenVL, cache: KVCache, at: int, row: _Row, on_text: OnText | None, should_stop: ShouldStop | None
) -> list[int]:
    """Let the model choose tokens of a row for as long as their logits are there; returns the tokens to feed."""
    held = 0
    while True:
        feed = _choose(mllm, row, row.logits[held], on_text)
        if row.lookup is not None:
            row.lookup.extend(feed)
        if row.reply.done:
            return []
        fed = 0
        while fed < len(feed) and held + fed < len(row.ahead) and row.ahead[held + fed] == feed[fed]:
            fed += 1
        held += fed
        if fed < len(feed):
            break
        _poll(should_stop)
    if row.lookup is not None:
        row.lookup.learn(len(row.ahead), held)
    cache.lengths[at] += held
    row.next += held
    return feed[fed:]


def _choose(mllm: QwenVL, row: _Row, logits: torch.Tensor, on_text: OnText | None) -> list[int]:
    """Let the model choose one token of a row from logits (V,); returns the tokens to feed."""
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


def _step(mllm: QwenVL, steps: PlainSteps | FixedSteps, rows: list[_Row], feeds: list[list[int]]) -> None:
    """Feed every row its tokens, and behind them what is guessed to follow, in one forward pass; sets the rows' logits."""
    for row in rows:
        # In a choice the next tokens are few and their literals free; what is drawn by chance is hardly ever guessed.
        speaks = row.lookup is not None and row.reply.in_text
        row.ahead = row.lookup.guess() if speaks else []
    pushed = [[*feed, *row.ahead] for row, feed in zip(rows, feeds, strict=True)]
    hidden = steps.step(pushed, [row.next for row in rows], [len(feed) for feed in feeds])
    asked = [(i, len(feed) - 1 + k) for i, feed in enumerate(feeds) for k in range(len(rows[i].ahead) + 1)]
    at, places = torch.tensor(asked, device=hidden.device).unbind(1)
    logits = mllm.model.lm_head(hidden[at, places]).float().split([len(row.ahead) + 1 for row in rows])
    for row, feed, found in zip(rows, feeds, logits, strict=True):
        row.logits = found
        row.next += len(feed)


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
