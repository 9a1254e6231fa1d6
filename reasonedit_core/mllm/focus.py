"""Two options of the pass through the language model, after SID and TAME. Interpretation: the paper names both as inspiration
for its training and states neither a place nor a constant. Both were made for decoding; V is states and not sampled words, so
their contrast of logits has nothing to act on here, and what is left of them is this:

token_select   what the instruction and the [IMG] tokens attend to least after the first layers is hidden from the later ones
               (SID, "Self-Introspective Decoding", keeps such tokens for its contrast)
tame_gamma     attention scores grow by 1 + gamma / log tr(QQ^T) and 1 + gamma / log tr(KK^T) (TAME)

B batch, H heads, L tokens of a row, D width of a head, M width of the language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError

NAME = "reasonedit_focus"
"""Of the attention below among those of transformers."""

LOOKED = 2
"""Layers that see every token; the attention of the last of them decides (SID's `fast_v_agg_layer`)."""

OTHER, DROPPABLE, ASKING = 0, 1, 2
"""Roles of a row's tokens: what always stays; what may be hidden (picture, patches, background); instruction and [IMG]."""


@dataclass(frozen=True, slots=True)
class Focus:
    """token_select: share of the droppable tokens hidden behind layer LOOKED. tame_gamma: 0.8 in TAME's code. 0: off."""

    token_select: float = 0.0
    tame_gamma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.token_select <= 1 or self.tame_gamma < 0:
            raise ConfigError(
                f"expected token_select in 0..1 and tame_gamma of at least 0, found {self.token_select} and {self.tame_gamma}."
            )

    def __bool__(self) -> bool:
        return bool(self.token_select or self.tame_gamma)


def use_focus(config: Any, name: str | None = None) -> str:
    """Let the language model of this config attend through `focused_attention`, or as before, by its `name`; -> what it had."""
    before = config._attn_implementation
    if name is None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(NAME, focused_attention)
        # Without a mask function of the same name transformers makes none, and padding would be attended to.
        AttentionMaskInterface.register(NAME, sdpa_mask)
    config._attn_implementation = name or NAME
    return before


def focused_pass(
    language_model: Any, tokens: Tensor, keep: Tensor, positions: Tensor, focus: Focus, roles: Tensor | None
) -> Tensor:
    """The decoder layers over a row: tokens (B, L, M), keep and positions (B, L), roles (B, L) int -> states (B, L, M).

    A loop of our own, as layers of one pass see different masks. Needs `use_focus`. ConfigError without roles where
    tokens are to be selected.
    """
    if focus.token_select and roles is None:
        raise ConfigError("token_select: expected roles of the row's tokens, found none. Hand them to Llava.run.")
    window = getattr(language_model.config, "sliding_window", None)
    mask = _mask(keep, window, tokens.dtype)
    rotary = language_model.rotary_emb(tokens, position_ids=positions)
    for n, layer in enumerate(language_model.layers):
        attended: list[Tensor] | None = [] if focus.token_select and n == LOOKED - 1 else None
        told = {"tame_gamma": focus.tame_gamma, "attended": attended}
        made = layer(tokens, attention_mask=mask, position_ids=positions, position_embeddings=rotary, use_cache=False, **told)
        tokens = made[0] if isinstance(made, tuple) else made
        if attended:
            hidden = least_attended(attended[0], roles, keep, focus.token_select)
            mask = _mask(keep & ~hidden, window, tokens.dtype)
    return language_model.norm(tokens)


def least_attended(attention: Tensor, roles: Tensor, keep: Tensor, share: float) -> Tensor:
    """Which tokens are hidden (B, L) bool: of each row `share` of those that may be, rounded down, the least attended first.

    attention (B, L, L): from each token (second axis) to each, mean over heads; roles, keep (B, L).
    """
    asking = ((roles == ASKING) & keep).to(attention.dtype)
    score = (asking[:, None] @ attention)[:, 0]  # the number of asking tokens is one for a row and changes no order
    may = (roles == DROPPABLE) & keep
    order = score.masked_fill(~may, float("inf")).argsort(dim=1, stable=True)
    count = (may.sum(dim=1) * share).floor().long()
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return may & (rank < count[:, None])


def focused_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    tame_gamma: float = 0.0,
    attended: list[Tensor] | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' form of an attention: query (B, H, L, D), key and value of as many heads or fewer -> (B, L, H, D).

    attended: a list that is given the attention, mean over heads (B, L, L), without a gradient.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    if tame_gamma:
        keep = None if attention_mask is None else _seen(attention_mask)
        query = query * _sharper(query, keep, tame_gamma) * _sharper(key, keep, tame_gamma)
    if attended is not None:
        attended.append(_weights(query, key, attention_mask, scaling))
    causal = attention_mask is None and query.shape[2] > 1
    out = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, is_causal=causal, scale=scaling
    )
    return out.transpose(1, 2).contiguous(), None


@torch.no_grad()
def _weights(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    scores = query.float() @ key.float().transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(dim=-1).mean(dim=1)


def _sharper(x: Tensor, keep: Tensor | None, gamma: float) -> Tensor:
    """1 + gamma / log tr(XX^T) of the valid tokens of x (B, H, L, D), for each row and head: (B, H, 1, 1)."""
    squares = x.float().square().sum(dim=-1)
    if keep is not None:
        squares = squares * keep[:, None]
    # Below e the logarithm would be small or negative and turn the scores around.
    trace = squares.sum(dim=-1).clamp(min=torch.e)
    return (1 + gamma / trace.log()).to(x.dtype)[..., None, None]


def _seen(mask: Tensor) -> Tensor:
    """Which tokens a mask (B, 1, L, L) lets the last one see, (B, L) bool; rows end together, so it sees all that is valid."""
    last = mask[:, 0, -1]
    return last if last.dtype == torch.bool else last >= 0


def _mask(keep: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """What each token may see, as numbers to be added (B, 1, L, L). A token always sees itself: a row of padding that saw
    nothing would be NaN."""
    length = keep.shape[1]
    ones = torch.ones(length, length, dtype=torch.bool, device=keep.device)
    causal = ones.tril() if not window else ones.tril() & ones.triu(1 - window)
    seen = (causal & keep[:, None]) | torch.eye(length, dtype=torch.bool, device=keep.device)
    return torch.zeros(seen.shape, dtype=dtype, device=keep.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
