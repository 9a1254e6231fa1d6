"""Explicit 3-D rotary positions (M-RoPE) of Qwen2.5-VL.

Positions are always computed here and handed to the model. Left to itself the model of transformers 5 falls back to 1-D
positions for pictures unless it is given token types, with no exception and a worse result.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ConfigError

HIDDEN_POSITION = 1
"""Where released code puts tokens that its attention mask hides: the value that transformers fills padding with."""


def rope_positions(
    ids: Sequence[int] | torch.Tensor,
    grids: Sequence[Sequence[int]],
    *,
    image_token_id: int,
    merge: int = 2,
    hidden: Sequence[bool] | torch.Tensor | None = None,
) -> torch.Tensor:
    """(3, 1, T) int64: temporal, vertical and horizontal position of every token.

    ids: T token ids with every picture's placeholder already repeated once per token. grids: per picture, in order,
    (height, width) or (1, height, width) in patches, `merge` of which make one token side. hidden: (T,) true for tokens
    that are left out of the count and get position 1 (the released conditioners hide token id 0, a lone `!`).

    Text advances all axes by one; a picture holds the temporal axis, spreads the other two over its grid, and the text
    after it goes on from the largest position so far.
    """
    ids = torch.as_tensor(ids, dtype=torch.long).flatten()
    shown = torch.ones_like(ids, dtype=torch.bool)
    if hidden is not None:
        shown = ~torch.as_tensor(hidden, dtype=torch.bool, device=ids.device).flatten()
    tokens = ids[shown].tolist()
    positions = torch.full((3, 1, len(ids)), HIDDEN_POSITION, dtype=torch.long)
    pieces, at, start, pending = [], 0, 0, list(grids)
    while at < len(tokens):
        if tokens[at] == image_token_id:
            if not pending:
                raise ConfigError(f"expected {len(grids)} pictures in the prompt, found a further placeholder at token {at}.")
            height, width = (side // merge for side in pending.pop(0)[-2:])
            block = tokens[at : at + height * width]
            if block != [image_token_id] * (height * width):
                raise ConfigError(
                    f"expected {height * width} placeholder tokens for a {height}x{width} picture at token {at}, found "
                    f"{block.count(image_token_id)}. Repeat the placeholder once per token (QwenVL.expand)."
                )
            rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            pieces.append(torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1) + start)
            at, start = at + height * width, start + max(height, width)
        else:
            end = next((i for i in range(at, len(tokens)) if tokens[i] == image_token_id), len(tokens))
            pieces.append(torch.arange(start, start + end - at).expand(3, -1))
            at, start = end, start + end - at
    if pending:
        raise ConfigError(f"expected {len(grids)} pictures in the prompt, found placeholders for {len(grids) - len(pending)}.")
    if pieces:
        positions[:, 0, shown.cpu()] = torch.cat(pieces, dim=1)
    return positions


def next_position(positions: torch.Tensor) -> int:
    """The position of the token that follows. positions: (3, 1, T)."""
    return int(positions.max()) + 1 if positions.numel() else 0
