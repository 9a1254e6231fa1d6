"""The joint attention of Qwen-Image's double-stream blocks, routed through our own kernel dispatch.

A processor for the `Attention` modules of diffusers' `QwenImageTransformer2DModel`: the projections and norms stay those of
the module (so LoRA adapters and streamed blocks work unchanged); the rotation and the attention itself are ours.
Legend: B batch, T text tokens, N picture tokens (target, then references), H heads, D head width.
"""

from __future__ import annotations

import torch
from torch import nn

from ..kernels.dispatch import Run, attention


class QwenAttention:
    """Attention over [text, target, references] in one bidirectional sequence.

    host: attention function of a host application, handed on to the dispatch; None lets the dispatch choose.
    """

    def __init__(self, host: Run | None = None) -> None:
        self.host = host

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Picture stream (B, N, C) and text stream (B, T, C) after attention and output projection.

        The block's arguments keep the names diffusers calls them by. encoder_hidden_states_mask (B, T) bool marks valid
        text; older diffusers send attention_mask (B, T + N) for the whole sequence in its place.
        image_rotary_emb: complex tables (N, D / 2) and (T, D / 2).
        """
        n_text = encoder_hidden_states.shape[1]
        mask = _joint_mask(encoder_hidden_states_mask, attention_mask, hidden_states)
        text, image = project_heads(attn, encoder_hidden_states, hidden_states)
        if image_rotary_emb is not None:
            image_table, text_table = image_rotary_emb
            image[:2] = [rotate(x, image_table) for x in image[:2]]
            text[:2] = [rotate(x, text_table) for x in text[:2]]
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))  # (B, T + N, H, D)
        mixed = attention(q, k, v, mask, host=self.host).flatten(2).to(q.dtype)
        image_out = mixed[:, n_text:].contiguous()
        for layer in attn.to_out:  # projection, then a dropout that is the identity outside training
            image_out = layer(image_out)
        return image_out, attn.to_add_out(mixed[:, :n_text].contiguous())


def project_heads(attn: nn.Module, text: torch.Tensor, image: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Normalised queries and keys, and values, before the rotation: of text (B, T, C) and of pictures (B, N, C), each
    (B, T | N, H, D)."""
    heads = (attn.heads, -1)
    image = [proj(image).unflatten(-1, heads) for proj in (attn.to_q, attn.to_k, attn.to_v)]
    text = [proj(text).unflatten(-1, heads) for proj in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
    image[0], image[1] = attn.norm_q(image[0]), attn.norm_k(image[1])
    text[0], text[1] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
    return text, image


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotary positions: x (B, T, H, D), adjacent channels paired as complex numbers; table (T, D / 2) complex64."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table[:, None]).flatten(-2).to(x.dtype)


def _joint_mask(text_mask: torch.Tensor | None, joint_mask: torch.Tensor | None, image: torch.Tensor) -> torch.Tensor | None:
    """(B, 1, 1, T + N) bool: which keys every query may see. Pictures are always seen."""
    if text_mask is not None:
        seen = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        joint_mask = torch.cat([text_mask.bool(), seen], dim=1)
    return None if joint_mask is None else joint_mask.bool()[:, None, None]
