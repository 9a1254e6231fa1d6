"""The attention blocks that the branches and the enhancers are made of.

B batch, T queries, S keys, D width. Masks are (B, S) bool, True = valid.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from ...errors import ConfigError
from ...kernels import attention


class Attention(nn.Module):
    """Multi-head attention of width D; queries and keys may have widths of their own."""

    def __init__(self, width: int, heads: int, query_width: int | None = None, key_width: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(query_width or width, width)
        self.kv = nn.Linear(key_width or width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, query: Tensor, keys: Tensor, keep: Tensor | None = None) -> Tensor:
        """query (B, T, Dq), keys (B, S, Dk), keep (B, S) -> (B, T, D)."""
        q = rearrange(self.q(query), "b t (h d) -> b t h d", h=self.heads)
        k, v = rearrange(self.kv(keys), "b s (n h d) -> n b s h d", n=2, h=self.heads)
        mask = None if keep is None else keep[:, None, None, :]
        return self.out(rearrange(attention(q, k, v, mask), "b t h d -> b t (h d)"))


class CrossAttention(nn.Module):
    """Attention with a norm before its queries and one before its keys; no residual, no feed-forward."""

    def __init__(self, width: int, heads: int, query_width: int, key_width: int) -> None:
        super().__init__()
        self.norm_query = nn.LayerNorm(query_width)
        self.norm_key = nn.LayerNorm(key_width)
        self.attention = Attention(width, heads, query_width, key_width)

    def forward(self, query: Tensor, keys: Tensor, keep: Tensor | None = None) -> Tensor:
        """query (B, T, Dq), keys (B, S, Dk), keep (B, S) -> (B, T, D)."""
        return self.attention(self.norm_query(query), self.norm_key(keys), keep)


class Block(nn.Module):
    """A pre-norm ViT block: 12 D^2 + 13 D parameters."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.ff = feed_forward(width)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """x (B, T, D), keep (B, T) -> (B, T, D)."""
        y = self.norm1(x)
        x = x + self.attention(y, y, keep)
        return x + self.ff(self.norm2(x))


def feed_forward(width: int) -> nn.Sequential:
    """D -> 4 D -> D with GELU."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def sincos_grid(side: int, width: int, like: Tensor) -> Tensor:
    """Fixed positions of a side x side grid, (side^2, width) in the dtype and on the device of `like`.

    A quarter of the channels each: sine and cosine of y, sine and cosine of x, wavelengths from 2 pi to 2e4 pi.
    """
    rates = 1e-4 ** (torch.arange(width // 4, device=like.device, dtype=torch.float32) / (width // 4))
    angles = torch.arange(side, device=like.device, dtype=torch.float32)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (side, width / 2)
    y, x = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    return torch.cat([y, x], dim=-1).flatten(0, 1).to(like.dtype)


def require_valid(keep: Tensor, what: str, remedy: str) -> None:
    """ConfigError when a row of keep (B, N) has no valid entry: attention to nothing would give features of nothing."""
    if torch.compiler.is_compiling() or keep.is_meta:
        return
    empty = (~keep.any(dim=1)).nonzero().flatten().tolist() if keep.shape[1] else list(range(keep.shape[0]))
    if empty:
        raise ConfigError(
            f"expected at least one {what} for each picture, found none for number {empty[0]} of the batch. {remedy}"
        )
