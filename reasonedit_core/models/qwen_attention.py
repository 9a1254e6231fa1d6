"""The joint attention of Qwen-Image's double-stream blocks, over the `Attention` modules of diffusers.

The projections and norms stay those of the module (so LoRA adapters and streamed blocks work unchanged); the rotation and the
attention itself are ours.
Legend: B batch, T text tokens, N picture tokens (target, then references), L = T + N, H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import nn

from ..kernels import Heads, Mask, has_kernel
from .connector import Attend
from .keyvalues import fused_heads
from .streams import Layout, Packed


def joint_attention(
    attn: nn.Module, image: torch.Tensor, text: torch.Tensor, rope: torch.Tensor, mask: Mask, attend: Attend, layout: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """image (B, N, C) and text (B, T, C) after attention over both and the output projections.

    rope: complex table (L, D / 2) in the order of the joint sequence. Without a kernel for it norm and rotation round where
    diffusers rounds.
    """
    if isinstance(layout, Packed) or not has_kernel("qk_norm_rope", image):
        q, k, v = (layout.join(*pair) for pair in zip(*project_heads(attn, text, image), strict=True))
        # Under autocast the norms answer in fp32 where the projections give the low precision.
        q, k = (rotate(x, rope).to(v.dtype) for x in (q, k))
    else:
        text_heads, image_heads = split_heads(attn, text, image)
        q, k, v = fused_heads(image_heads, rope, attend, text=text_heads, eps=attn.norm_q.eps)
    text_out, image_out = layout.part(attend(q, k, v, mask).flatten(2), text.shape[1])
    for layer in attn.to_out:  # projection, then a dropout that is the identity outside training
        image_out = layer(image_out)
    return image_out, attn.to_add_out(text_out)


def split_heads(attn: nn.Module, text: torch.Tensor, image: torch.Tensor) -> tuple[Heads, Heads]:
    """Queries, keys and values before the norms: of text (B, T, C) and of pictures (B, N, C), each (B, T | N, H, D)."""
    heads = (attn.heads, -1)
    added = [proj(text).unflatten(-1, heads) for proj in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
    own = [proj(image).unflatten(-1, heads) for proj in (attn.to_q, attn.to_k, attn.to_v)]
    text_weights = attn.norm_added_q.weight, attn.norm_added_k.weight
    return Heads(*added, *text_weights), Heads(*own, attn.norm_q.weight, attn.norm_k.weight)


def project_heads(attn: nn.Module, text: torch.Tensor, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same with normalised queries and keys."""
    (text_q, text_k, text_v, *_), (q, k, v, *_) = split_heads(attn, text, image)
    return [attn.norm_added_q(text_q), attn.norm_added_k(text_k), text_v], [attn.norm_q(q), attn.norm_k(k), v]


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotary positions: x (B, T, H, D), adjacent channels paired as complex numbers; table (T, D / 2) complex64."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).to(x.dtype)
