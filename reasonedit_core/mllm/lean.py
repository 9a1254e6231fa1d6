"""A pass of a few tokens through the decoder's own layers, without what transformers' forward puts around them.

On a CPU that costs more than the arithmetic of a small step. The weights, the norms and the activations are those of the
model's modules, adapters on them included; behind a prompt the three axes of M-RoPE agree, so the rotation is the plain one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from .cache import KVCache

_LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


def lean_refusal(model: Any, device: torch.device) -> str | None:
    """Why passes through `model` are left to transformers; None when they need not be."""
    if device.type != "cpu":
        return f"the weights are on {device}"
    if getattr(model.config, "_attn_implementation", None) != "sdpa" or model.training:
        return "the attention is not torch's own, or the model is being trained"
    for number, layer in enumerate(model.layers):
        attention = getattr(layer, "self_attn", None)
        parts = {name for name, part in attention.named_children() if next(part.parameters(), None) is not None}
        if not all(hasattr(layer, name) for name in _LAYER) or parts != _ATTENTION:
            return f"layer {number} is built in another way"
        if getattr(attention, "sliding_window", None) is not None:
            return f"layer {number} sees a window only"
    for name, module in model.named_modules():
        if module is not model and (module._forward_pre_hooks or module._forward_hooks):
            return f"{name} has hooks"
    return None


class LeanDecoder:
    """Passes of Qwen2.5-VL's language model. model: one that `lean_refusal` has nothing against."""

    def __init__(self, model: Any) -> None:
        config = model.config
        self.model, self.heads, self.kv_heads = model, config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def __call__(self, cache: KVCache, tokens: torch.Tensor, places: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """tokens (B, T) at places (B, T), behind what the rows of the aimed cache hold -> hidden states (B, T, C).

        mask: (B, 1, T, S) bool of `KVCache.aim`, or None where all may be seen.
        """
        model = self.model
        states = model.embed_tokens(tokens)
        told = {"inputs_embeds": states}
        _tell(model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs, model, told)
        rope = self._rope(places, states.dtype)
        if mask is not None:  # query heads that share keys stand as further queries, each group under the same mask
            mask = mask.repeat(1, 1, self.heads // self.kv_heads, 1)
        for number, layer in enumerate(model.layers):
            states = states + self._attend(layer.self_attn, layer.input_layernorm(states), rope, mask, cache, number)
            states = states + layer.mlp(layer.post_attention_layernorm(states))
        states = model.norm(states)
        _tell(model._forward_hooks, model._forward_hooks_with_kwargs, model, told, states)
        return states

    def _rope(self, places: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        rotary = self.model.rotary_emb
        angles = places[..., None].float() * rotary.inv_freq.float()
        angles = torch.cat([angles, angles], dim=-1)[:, None]  # (B, 1, T, D)
        scale = rotary.attention_scaling
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

    def _attend(self, module: Any, x: torch.Tensor, rope, mask: torch.Tensor | None, cache: KVCache, layer: int):
        batch, length, _ = x.shape
        group = self.heads // self.kv_heads
        q = _rotated(module.q_proj(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2), rope)
        k = _rotated(module.k_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2), rope)
        v = module.v_proj(x).view(batch, length, self.kv_heads, self.head_dim).transpose(1, 2)
        keys, values = cache.update(k, v, layer)
        q = q.reshape(batch, self.kv_heads, group * length, self.head_dim)
        mixed = functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=getattr(module, "scaling", None))
        mixed = mixed.view(batch, self.heads, length, self.head_dim).transpose(1, 2)
        return module.o_proj(mixed.reshape(batch, length, -1))


def _rotated(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of x (B, H, T, D), halves paired."""
    cos, sin = rope
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def _tell(hooks: Any, with_kwargs: Any, model: Any, told: dict[str, Any], *made: torch.Tensor) -> None:
    """Hooks on the model as a whole watch passes (they count them, and take their time); what they return is not looked at."""
    for number, hook in hooks.items():
        hook(model, (), told, *made) if number in with_kwargs else hook(model, (), *made)
