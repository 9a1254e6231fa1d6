"""The Step1X-Edit DiT (v1.0, v1.1, v1.2), with the key names of the diffusers release.

B batch, N image tokens (target, then references), T text tokens, L = T + N, C width, H heads, D head dim.

Text stands first in every joint sequence. Step-independent work can be done once and handed in: `prepare_text` for
the prompt, `rope` for the positions. Attention goes through `kernels.attention`; a mask given here is never dropped. What
stands between the matrix products are the fused ops of `kernels` where a kernel computes them, which differ from the released
numerics by rounding only; elsewhere it rounds where the release does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import Timesteps, get_1d_rotary_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, AdaLayerNormZeroSingle
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels import Heads, Mask, attend_with, has_kernel
from ..kernels.dispatch import Run
from .connector import Attend, ConnectorState, Step1XConnector
from .halves import feed_forward, project_halves
from .keyvalues import KeyValues, fused_heads
from .streams import BATCH, SAMPLES, Layout, Packed, last_norm

Rope = tuple[Tensor, Tensor]
"""cos and sin in fp32, each (L, D) or (B, L, D), every angle written twice (pairs are interleaved)."""


@dataclass(frozen=True, slots=True)
class TextState:
    """What of a prompt does not depend on the timestep; valid until the weights change.

    connector: see `ConnectorState`. vector (B, C): the embedded pooled prompt. mapped (B, T, joint_attention_dim):
    mapped MLLM input embeddings of quoted characters, zero elsewhere, or None.
    """

    connector: ConnectorState
    vector: Tensor
    mapped: Tensor | None = None


class Embedder(nn.Module):
    """Linear, SiLU, Linear on one vector per sample."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_channels, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels) -> (B, C)."""
        return self.out_layer(nn.functional.silu(self.in_layer(x)))


class SingleAttention(nn.Module):
    """Projections of one stream: queries and keys are RMS-normalised per head, before the rotation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)

    def split(self, x: Tensor) -> Heads:
        """(B, L, C) -> q, k, v, each (B, L, H, D), before the norms."""
        parts = (_split_heads(layer(x), self.heads) for layer in (self.to_q, self.to_k, self.to_v))
        return Heads(*parts, self.norm_q.weight, self.norm_k.weight)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, C) -> q, k, v, each (B, L, H, D)."""
        q, k, v, *_ = self.split(x)
        return self.norm_q(q), self.norm_k(k), v

    def forward(self, x: Tensor, rope: Rope, mask: Mask, attend: Attend) -> Tensor:
        """(B, L, C) -> (B, L, C), without an output projection."""
        if has_kernel("qk_norm_rope", x):
            return attend(*fused_heads(self.split(x), rope, attend, eps=self.norm_q.eps), mask).flatten(2)
        return _attend(*self.project(x), rope, mask, attend)


class JointAttention(SingleAttention):
    """Two streams with their own projections and norms, one attention over both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.norm_added_q = nn.RMSNorm(width // heads, eps=1e-6)
        self.norm_added_k = nn.RMSNorm(width // heads, eps=1e-6)
        self.add_q_proj = nn.Linear(width, width)
        self.add_k_proj = nn.Linear(width, width)
        self.add_v_proj = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.to_add_out = nn.Linear(width, width)

    def split_text(self, text: Tensor) -> Heads:
        """(B, T, C) -> q, k, v, each (B, T, H, D), before the norms."""
        parts = (_split_heads(layer(text), self.heads) for layer in (self.add_q_proj, self.add_k_proj, self.add_v_proj))
        return Heads(*parts, self.norm_added_q.weight, self.norm_added_k.weight)

    def project_text(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C) -> q, k, v, each (B, T, H, D)."""
        q, k, v, *_ = self.split_text(text)
        return self.norm_added_q(q), self.norm_added_k(k), v

    def forward(  # type: ignore[override]
        self, image: Tensor, text: Tensor, rope: Rope, mask: Mask, attend: Attend, layout: Layout = BATCH
    ) -> tuple[Tensor, Tensor]:
        """image (B, N, C), text (B, T, C) -> their projected attention outputs."""
        if isinstance(layout, Packed) or not has_kernel("qk_norm_rope", image):
            pairs = zip(self.project_text(text), self.project(image), strict=True)
            attended = _attend(*(layout.join(*pair) for pair in pairs), rope, mask, attend)
        else:
            joint = fused_heads(self.split(image), rope, attend, text=self.split_text(text), eps=self.norm_q.eps)
            attended = attend(*joint, mask).flatten(2)
        text_out, image_out = layout.part(attended, text.shape[1])
        return self.to_out[0](image_out), self.to_add_out(text_out)


class DoubleBlock(nn.Module):
    """Joint attention of text and image, then an MLP of each; all gated, shifted and scaled by `temb`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = AdaLayerNormZero(width)
        self.norm1_context = AdaLayerNormZero(width)
        self.attn = JointAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff = FeedForward(dim=width, dim_out=width, activation_fn="gelu-approximate")
        self.norm2_context = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.ff_context = FeedForward(dim=width, dim_out=width, activation_fn="gelu-approximate")

    def forward(
        self, image: Tensor, text: Tensor, temb: Tensor, rope: Rope, mask: Mask, attend: Attend, layout: Layout = BATCH
    ) -> tuple[Tensor, Tensor]:
        """image (B, N, C), text (B, T, C), temb (B, C) -> image, text. In a pack B is 1, and temb has a row per document."""
        shift, scale, gate, shift2, scale2, gate2 = _modulation(self.norm1, temb, 6)
        text_shift, text_scale, text_gate, text_shift2, text_scale2, text_gate2 = _modulation(self.norm1_context, temb, 6)
        image_in = layout.image.normed(self.norm1.norm, image, scale, shift)
        text_in = layout.text.normed(self.norm1_context.norm, text, text_scale, text_shift)
        image_out, text_out = self.attn(image_in, text_in, rope, mask, attend, layout)

        image, inner = layout.image.gated_normed(self.norm2, image, gate, image_out, scale2, shift2)
        image = layout.image.gated(image, gate2, feed_forward(self.ff, inner))

        text, inner = layout.text.gated_normed(self.norm2_context, text, text_gate, text_out, text_scale2, text_shift2)
        # Here and in the single blocks the released code clamps in fp16: an overflow would become inf and then NaN.
        return image, layout.text.gated(text, text_gate2, feed_forward(self.ff_context, inner), clamp=True)


class SingleBlock(nn.Module):
    """Attention and MLP side by side on the joint sequence, with one output projection for both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = AdaLayerNormZeroSingle(width)
        self.attn = SingleAttention(width, heads)
        self.proj_mlp = nn.Linear(width, 4 * width)
        self.proj_out = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, temb: Tensor, rope: Rope, mask: Mask, attend: Attend, layout: Layout = BATCH) -> Tensor:
        """x (B, L, C), temb (B, C) -> (B, L, C). In a pack B is 1, and temb has a row per document."""
        shift, scale, gate = _modulation(self.norm, temb, 3)
        normed = layout.joint.normed(self.norm.norm, x, scale, shift)
        attended = self.attn(normed, rope, mask, attend)
        change = project_halves(self.proj_out, attended, self.proj_mlp, normed)
        return layout.joint.gated(x, gate, change, clamp=True)


class Step1XEditTransformer2DModel(ModelMixin, ConfigMixin, PeftAdapterMixin):
    """The denoiser of Step1X-Edit: packed latents, timestep and MLLM states -> velocity.

    The configuration has the released field names. Sizes that the release fixes in code follow from it: the text
    token mapping goes from connector_in_channels to joint_attention_dim, the pooled head ends at vector_in_dim.
    guidance_embeds is kept for the sake of released configuration files; no version has such an embedding.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["DoubleBlock", "SingleBlock"]
    _repeated_blocks = ["DoubleBlock", "SingleBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        patch_size: int = 1,
        in_channels: int = 64,
        out_channels: int | None = None,
        num_layers: int = 19,
        num_single_layers: int = 38,
        attention_head_dim: int = 128,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        timestep_in_dim: int = 256,
        vector_in_dim: int = 768,
        connector_in_channels: int = 3584,
        connector_hidden_size: int = 4096,
        connector_heads_num: int = 32,
        connector_depth: int = 2,
        guidance_embeds: bool = False,
        axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        enable_text_token_mapping: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(attention_head_dim, axes_dims_rope, connector_hidden_size, connector_heads_num, joint_attention_dim)
        width = num_attention_heads * attention_head_dim
        self.out_channels = out_channels or in_channels
        self.time_proj = Timesteps(timestep_in_dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embed = Embedder(timestep_in_dim, width)
        self.vec_embed = Embedder(vector_in_dim, width)
        self.context_embedder = nn.Linear(joint_attention_dim, width)
        self.x_embedder = nn.Linear(in_channels, width)
        self.connector = Step1XConnector(
            connector_in_channels, connector_hidden_size, connector_heads_num, connector_depth, vector_in_dim
        )
        self.transformer_blocks = nn.ModuleList(DoubleBlock(width, num_attention_heads) for _ in range(num_layers))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(width, num_attention_heads) for _ in range(num_single_layers)
        )
        self.norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(width, patch_size * patch_size * self.out_channels)
        self.text_token_mapping = nn.Linear(connector_in_channels, joint_attention_dim) if enable_text_token_mapping else None
        self.gradient_checkpointing = False

    def prepare_text(
        self,
        encoder_hidden_states: Tensor,
        encoder_mask: Tensor | None = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        host: Run | None = None,
        backend: str = "auto",
    ) -> TextState:
        """The step-independent part of a prompt; `forward` takes it instead of encoder_hidden_states, with equal bits.

        encoder_hidden_states (B, T, M); encoder_mask (B, T): valid tokens, padding to the right.
        text_embeds (B, T, M) and text_mask (B, T): MLLM input embeddings of quoted characters; without
        `text_token_mapping` they are not looked at.
        """
        attend = attend_with(host, backend)
        state = self.connector.prepare(encoder_hidden_states, encoder_mask, attend)
        mapped = None
        if self.text_token_mapping is not None and text_embeds is not None:
            if text_mask is None:
                raise ConfigError("text_embeds came without text_mask; give both (it says which tokens were quoted).")
            mapped = self.text_token_mapping(text_embeds) * text_mask.to(text_embeds.dtype).unsqueeze(-1)
        return TextState(state, self.vec_embed(state.pooled), mapped)

    def rope(self, ids: Tensor) -> Rope:
        """Rotation tables of `join_ids(txt_ids, img_ids)`, (L, 3) or (B, L, 3); they serve every step of a run."""
        return rope_tables(ids, tuple(self.config.axes_dims_rope))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | TextState,
        encoder_mask: Tensor | None = None,
        txt_ids: Tensor | None = None,
        img_ids: Tensor | None = None,
        text_embeds: Tensor | None = None,
        text_mask: Tensor | None = None,
        joint_mask: Tensor | None = None,
        *,
        rope: Rope | None = None,
        host: Run | None = None,
        backend: str = "auto",
        keep: KeyValues | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Velocity of every image token, (B, N, out_channels); the caller keeps those of the target.

        hidden_states (B, N, in_channels): noisy target, then references. timestep (B,) in 0..1.
        encoder_hidden_states (B, T, M) with encoder_mask, text_embeds and text_mask as for `prepare_text`, or what that
        returned. txt_ids (T, 3) or (B, T, 3) and img_ids (N, 3) or (B, N, 3), or `rope`.
        joint_mask (B, 1, 1 | L, L) bool, True where a query may see a key; without it padded text takes part, as in
        v1.0 and v1.1. host, backend: see `kernels.attend_with`.

        keep: takes the keys and values of all blocks. With rows (n,) as well, hidden_states (B, n, in_channels) are these rows
        of the image tokens of an earlier forward, whose keys and values `keep` holds; `rope` is still of all L rows.
        """
        attend = attend_with(host, backend)
        state = self._text_state(encoder_hidden_states, encoder_mask, text_embeds, text_mask, host, backend)
        tokens = self.connector.refine(state.connector, timestep, attend)
        if state.mapped is not None:
            tokens = tokens + state.mapped

        image = self.x_embedder(hidden_states)
        # Times 1000 in the dtype given: a bf16 timestep rounds here, which is part of the released numerics.
        temb = self.time_embed(self.time_proj(timestep * 1000).to(hidden_states.dtype)) + state.vector
        text = self.context_embedder(tokens).expand(image.shape[0], -1, -1)
        if rows is None:
            rope = self._rope(rope, txt_ids, img_ids, text.shape[1] + image.shape[1])
        if keep is not None:
            attend, rope = keep.enter(attend, rope, text.shape[1], rows)

        for block in self.transformer_blocks:
            image, text = self._run(block, image, text, temb, rope, joint_mask, attend)
        joint = torch.cat([text, image], dim=1)
        for block in self.single_transformer_blocks:
            joint = self._run(block, joint, temb, rope, joint_mask, attend)
        return self.proj_out(last_norm(self.norm_out, joint[:, text.shape[1] :], temb, SAMPLES))

    def _run(self, block: nn.Module, *args: object) -> Tensor | tuple[Tensor, Tensor]:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def _text_state(
        self,
        text: Tensor | TextState,
        mask: Tensor | None,
        embeds: Tensor | None,
        embeds_mask: Tensor | None,
        host: Run | None,
        backend: str,
    ) -> TextState:
        if not isinstance(text, TextState):
            return self.prepare_text(text, mask, embeds, embeds_mask, host=host, backend=backend)
        if mask is not None or embeds is not None or embeds_mask is not None:
            raise ConfigError(
                "a prepared TextState came together with masks or embeddings, which it already holds; give them to "
                "prepare_text instead."
            )
        return text

    def _rope(self, rope: Rope | None, txt_ids: Tensor | None, img_ids: Tensor | None, length: int) -> Rope:
        """The tables given or made, checked to be as long as the joint sequence."""
        if rope is None:
            if txt_ids is None or img_ids is None:
                raise ConfigError("positions are missing: give txt_ids and img_ids, or rope.")
            rope = self.rope(join_ids(txt_ids, img_ids))
        if rope[0].shape[-2] != length:
            raise ConfigError(f"positions for {rope[0].shape[-2]} tokens were given, text and image together have {length}.")
        return rope


def join_ids(txt_ids: Tensor, img_ids: Tensor) -> Tensor:
    """Text positions before image positions: (T, 3) | (B, T, 3) and (N, 3) | (B, N, 3) -> (L, 3) | (B, L, 3)."""
    if txt_ids.ndim != img_ids.ndim:
        batch = max(txt_ids, img_ids, key=lambda ids: ids.ndim).shape[0]
        txt_ids, img_ids = (ids.expand(batch, -1, -1) for ids in (txt_ids, img_ids))
    return torch.cat([txt_ids, img_ids], dim=-2)


def rope_tables(ids: Tensor, axes_dims: tuple[int, ...]) -> Rope:
    """ids (..., L, A), axes_dims of length A -> cos, sin (..., L, sum(axes_dims)): angles in fp64, tables in fp32."""
    # Apple's GPUs have no fp64.
    wide = torch.float32 if ids.device.type == "mps" else torch.float64
    tables = [
        get_1d_rotary_pos_embed(dim, ids[..., axis].float().flatten(), 10000.0, use_real=True, freqs_dtype=wide)
        for axis, dim in enumerate(axes_dims)
    ]
    cos, sin = (torch.cat(parts, dim=-1).reshape(*ids.shape[:-1], -1) for parts in zip(*tables, strict=True))
    return cos, sin


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate interleaved pairs of x (B, L, H, D) in fp32 -> x's dtype."""
    cos, sin = (table[..., ::2].unsqueeze(-2) for table in rope)
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the same products and sums in one pass
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, rope: Rope, mask: Mask, attend: Attend) -> Tensor:
    # Under autocast the norms answer in fp32 where the projections give the low precision.
    q, k = (apply_rope(x, rope).to(v.dtype) for x in (q, k))
    return attend(q, k, v, mask).flatten(2)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return rearrange(x, "b l (h d) -> b l h d", h=heads)


def _modulation(norm: AdaLayerNormZero | AdaLayerNormZeroSingle, temb: Tensor, parts: int) -> tuple[Tensor, ...]:
    """temb (B, C) -> shift, scale and gate, once or twice, each (B, C)."""
    return norm.linear(norm.silu(temb)).chunk(parts, dim=1)


def _check_sizes(
    head_dim: int, axes_dims: tuple[int, ...], connector_width: int, connector_heads: int, joint_width: int
) -> None:
    if sum(axes_dims) != head_dim:
        raise ConfigError(
            f"axes_dims_rope {tuple(axes_dims)} sums to {sum(axes_dims)}, attention_head_dim is {head_dim}; "
            "they must be equal. Check the checkpoint's config.json."
        )
    if connector_width % connector_heads:
        raise ConfigError(
            f"connector_hidden_size {connector_width} is not a multiple of connector_heads_num {connector_heads}. "
            "Check the checkpoint's config.json."
        )
    if connector_width != joint_width:
        raise ConfigError(
            f"joint_attention_dim {joint_width} must equal connector_hidden_size {connector_width}: the connector's "
            "tokens are what the DiT embeds. Check the checkpoint's config.json."
        )
