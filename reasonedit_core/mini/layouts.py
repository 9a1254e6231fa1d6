"""Names and shapes of every tensor in the released checkpoints, as functions of their config files.

Written out by hand and not read from module classes, so that a checkpoint of any size can be built without transformers
or diffusers, with the same names under every version of them, and serves as an independent check of our own modules.
Every function: config (the dict that config.json holds) -> {key: shape}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shapes = dict[str, tuple[int, ...]]
Config = Mapping[str, Any]

POOLED_DIM = 768  # fixed in the released connector, whatever vector_in_dim says


def _linear(key: str, out_dim: int, in_dim: int, *, bias: bool = True) -> Shapes:
    return {f"{key}.weight": (out_dim, in_dim)} | ({f"{key}.bias": (out_dim,)} if bias else {})


def _conv(key: str, out_dim: int, in_dim: int, *kernel: int) -> Shapes:
    return {f"{key}.weight": (out_dim, in_dim, *kernel), f"{key}.bias": (out_dim,)}


def _norm(key: str, dim: int) -> Shapes:
    return {f"{key}.weight": (dim,), f"{key}.bias": (dim,)}


def _joint_attention(key: str, dim: int, head_dim: int) -> Shapes:
    """Projections of both streams of a double block, shared by Step1X and Qwen-Image."""
    shapes: Shapes = {}
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"):
        shapes |= _linear(f"{key}.{name}", dim, dim)
    return shapes | {f"{key}.norm_{n}.weight": (head_dim,) for n in ("q", "k", "added_q", "added_k")}


def _feed_forward(key: str, dim: int) -> Shapes:
    return _linear(f"{key}.net.0.proj", 4 * dim, dim) | _linear(f"{key}.net.2", dim, 4 * dim)


def connector_shapes(config: Config) -> Shapes:
    """The Step1X connector, from the `connector_*` fields of the transformer's config."""
    d_in, dim = config["connector_in_channels"], config["connector_hidden_size"]
    shapes = (
        _linear("S.input_embedder", dim, d_in)
        | _linear("S.t_embedder.mlp.0", dim, 256)
        | _linear("S.t_embedder.mlp.2", dim, dim)
        | _linear("S.c_embedder.linear_1", dim, d_in)
        | _linear("S.c_embedder.linear_2", dim, dim)
    )
    for i in range(config["connector_depth"]):
        block = f"S.individual_token_refiner.blocks.{i}"
        shapes |= (
            _norm(f"{block}.norm1", dim)
            | _linear(f"{block}.self_attn_qkv", 3 * dim, dim)
            | _linear(f"{block}.self_attn_proj", dim, dim)
            | _norm(f"{block}.norm2", dim)
            | _linear(f"{block}.mlp.fc1", 4 * dim, dim)
            | _linear(f"{block}.mlp.fc2", dim, 4 * dim)
            | _linear(f"{block}.adaLN_modulation.1", 2 * dim, dim)
        )
    return shapes | _linear("global_proj_out", POOLED_DIM, d_in)


def step1x_shapes(config: Config) -> Shapes:
    """`Step1XEditTransformer2DModel`, diffusers names; with text_token_mapping when the config enables it."""
    head_dim = config["attention_head_dim"]
    dim = head_dim * config["num_attention_heads"]
    shapes = (
        _linear("time_embed.in_layer", dim, config["timestep_in_dim"])
        | _linear("time_embed.out_layer", dim, dim)
        | _linear("vec_embed.in_layer", dim, config["vector_in_dim"])
        | _linear("vec_embed.out_layer", dim, dim)
        | _linear("context_embedder", dim, config["joint_attention_dim"])
        | _linear("x_embedder", dim, config["in_channels"])
        | {f"connector.{key}": shape for key, shape in connector_shapes(config).items()}
    )
    for i in range(config["num_layers"]):
        block = f"transformer_blocks.{i}"
        shapes |= (
            _linear(f"{block}.norm1.linear", 6 * dim, dim)
            | _linear(f"{block}.norm1_context.linear", 6 * dim, dim)
            | _joint_attention(f"{block}.attn", dim, head_dim)
            | _feed_forward(f"{block}.ff", dim)
            | _feed_forward(f"{block}.ff_context", dim)
        )
    for i in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{i}"
        shapes |= _linear(f"{block}.norm.linear", 3 * dim, dim) | _linear(f"{block}.proj_mlp", 4 * dim, dim)
        shapes |= _linear(f"{block}.proj_out", dim, 5 * dim)
        for name in ("to_q", "to_k", "to_v"):
            shapes |= _linear(f"{block}.attn.{name}", dim, dim)
        shapes |= {f"{block}.attn.norm_q.weight": (head_dim,), f"{block}.attn.norm_k.weight": (head_dim,)}
    shapes |= _linear("norm_out.linear", 2 * dim, dim) | _linear("proj_out", config["out_channels"], dim)
    if config["enable_text_token_mapping"]:
        shapes |= _linear("text_token_mapping", config["joint_attention_dim"], config["connector_in_channels"])
    return shapes


def qwen_image_shapes(config: Config) -> Shapes:
    """`QwenImageTransformer2DModel`; ComfyUI's single files have the same names."""
    head_dim, joint = config["attention_head_dim"], config["joint_attention_dim"]
    dim = head_dim * config["num_attention_heads"]
    shapes = (
        _linear("time_text_embed.timestep_embedder.linear_1", dim, 256)
        | _linear("time_text_embed.timestep_embedder.linear_2", dim, dim)
        | {"txt_norm.weight": (joint,)}
        | _linear("img_in", dim, config["in_channels"])
        | _linear("txt_in", dim, joint)
    )
    for i in range(config["num_layers"]):
        block = f"transformer_blocks.{i}"
        shapes |= _linear(f"{block}.img_mod.1", 6 * dim, dim) | _linear(f"{block}.txt_mod.1", 6 * dim, dim)
        shapes |= _joint_attention(f"{block}.attn", dim, head_dim)
        shapes |= _feed_forward(f"{block}.img_mlp", dim) | _feed_forward(f"{block}.txt_mlp", dim)
    patch = config["patch_size"] ** 2 * config["out_channels"]
    return shapes | _linear("norm_out.linear", 2 * dim, dim) | _linear("proj_out", patch, dim)


def qwen25vl_shapes(config: Config) -> Shapes:
    """Qwen2.5-VL with the names of the hub (`visual.*`, `model.*`, `lm_head.weight`), from the flat config."""
    return _vision_shapes(config["vision_config"]) | _language_shapes(config)


def _vision_shapes(config: Config) -> Shapes:
    dim, ff, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    merged = dim * config["spatial_merge_size"] ** 2
    kernel = (config["temporal_patch_size"], patch, patch)
    shapes: Shapes = {"visual.patch_embed.proj.weight": (dim, config["in_chans"], *kernel)}
    for i in range(config["depth"]):
        block = f"visual.blocks.{i}"
        shapes |= {f"{block}.norm1.weight": (dim,), f"{block}.norm2.weight": (dim,)}
        shapes |= _linear(f"{block}.attn.qkv", 3 * dim, dim) | _linear(f"{block}.attn.proj", dim, dim)
        shapes |= _linear(f"{block}.mlp.gate_proj", ff, dim) | _linear(f"{block}.mlp.up_proj", ff, dim)
        shapes |= _linear(f"{block}.mlp.down_proj", dim, ff)
    shapes["visual.merger.ln_q.weight"] = (dim,)
    return (
        shapes
        | _linear("visual.merger.mlp.0", merged, merged)
        | _linear("visual.merger.mlp.2", config["out_hidden_size"], merged)
    )


def _language_shapes(config: Config) -> Shapes:
    dim, ff, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv_dim = dim // heads * config["num_key_value_heads"]
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], dim)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= (
            _linear(f"{layer}.self_attn.q_proj", dim, dim)
            | _linear(f"{layer}.self_attn.k_proj", kv_dim, dim)
            | _linear(f"{layer}.self_attn.v_proj", kv_dim, dim)
            | _linear(f"{layer}.self_attn.o_proj", dim, dim, bias=False)
            | _linear(f"{layer}.mlp.gate_proj", ff, dim, bias=False)
            | _linear(f"{layer}.mlp.up_proj", ff, dim, bias=False)
            | _linear(f"{layer}.mlp.down_proj", dim, ff, bias=False)
            | {f"{layer}.input_layernorm.weight": (dim,), f"{layer}.post_attention_layernorm.weight": (dim,)}
        )
    return shapes | {"model.norm.weight": (dim,), "lm_head.weight": (config["vocab_size"], dim)}


def flux_vae_shapes(config: Config) -> Shapes:
    """`AutoencoderKL` as FLUX.1 has it: no quant convs, attention in the middle block."""
    channels, layers, z = config["block_out_channels"], config["layers_per_block"], config["latent_channels"]
    last = len(channels) - 1
    shapes = _conv("encoder.conv_in", channels[0], config["in_channels"], 3, 3)
    d_in = channels[0]
    for i, d_out in enumerate(channels):
        for j in range(layers):
            shapes |= _kl_resnet(f"encoder.down_blocks.{i}.resnets.{j}", d_out, d_in if j == 0 else d_out)
        if i < last:
            shapes |= _conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", d_out, d_out, 3, 3)
        d_in = d_out
    shapes |= _kl_middle("encoder", d_in) | _norm("encoder.conv_norm_out", d_in)
    shapes |= _conv("encoder.conv_out", 2 * z, d_in, 3, 3) | _conv("decoder.conv_in", d_in, z, 3, 3)
    shapes |= _kl_middle("decoder", d_in)
    for i, d_out in enumerate(reversed(channels)):
        for j in range(layers + 1):
            shapes |= _kl_resnet(f"decoder.up_blocks.{i}.resnets.{j}", d_out, d_in if j == 0 else d_out)
        if i < last:
            shapes |= _conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", d_out, d_out, 3, 3)
        d_in = d_out
    return shapes | _norm("decoder.conv_norm_out", d_in) | _conv("decoder.conv_out", config["out_channels"], d_in, 3, 3)


def _kl_resnet(key: str, d_out: int, d_in: int) -> Shapes:
    shapes = _norm(f"{key}.norm1", d_in) | _conv(f"{key}.conv1", d_out, d_in, 3, 3)
    shapes |= _norm(f"{key}.norm2", d_out) | _conv(f"{key}.conv2", d_out, d_out, 3, 3)
    return shapes if d_in == d_out else shapes | _conv(f"{key}.conv_shortcut", d_out, d_in, 1, 1)


def _kl_middle(side: str, dim: int) -> Shapes:
    shapes = _norm(f"{side}.mid_block.attentions.0.group_norm", dim)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes |= _linear(f"{side}.mid_block.attentions.0.{name}", dim, dim)
    for i in range(2):
        shapes |= _kl_resnet(f"{side}.mid_block.resnets.{i}", dim, dim)
    return shapes


def qwen_vae_shapes(config: Config) -> Shapes:
    """`AutoencoderKLQwenImage`: the causal 3-D VAE of Wan 2.1, diffusers names; no attention outside the middle."""
    base, mults, res, z = config["base_dim"], config["dim_mult"], config["num_res_blocks"], config["z_dim"]
    dims = [base * m for m in mults]
    shapes = _conv("encoder.conv_in", base, 3, 3, 3, 3)
    index, d_in = 0, base
    for i, d_out in enumerate(dims):
        for _ in range(res):
            shapes |= _wan_resnet(f"encoder.down_blocks.{index}", d_out, d_in)
            index, d_in = index + 1, d_out
        if i < len(dims) - 1:
            shapes |= _conv(f"encoder.down_blocks.{index}.resample.1", d_out, d_out, 3, 3)
            if config["temperal_downsample"][i]:
                shapes |= _conv(f"encoder.down_blocks.{index}.time_conv", d_out, d_out, 3, 1, 1)
            index += 1
    shapes |= _wan_middle("encoder", d_in) | {"encoder.norm_out.gamma": (d_in, 1, 1, 1)}
    shapes |= _conv("encoder.conv_out", 2 * z, d_in, 3, 3, 3)
    shapes |= _conv("quant_conv", 2 * z, 2 * z, 1, 1, 1) | _conv("post_quant_conv", z, z, 1, 1, 1)
    shapes |= _conv("decoder.conv_in", d_in, z, 3, 3, 3) | _wan_middle("decoder", d_in)
    upsample_time = config["temperal_downsample"][::-1]
    for i, d_out in enumerate(reversed(dims)):
        for j in range(res + 1):
            shapes |= _wan_resnet(f"decoder.up_blocks.{i}.resnets.{j}", d_out, d_in)
            d_in = d_out
        if i < len(dims) - 1:
            up = f"decoder.up_blocks.{i}.upsamplers.0"
            shapes |= _conv(f"{up}.resample.1", d_out // 2, d_out, 3, 3)
            if upsample_time[i]:
                shapes |= _conv(f"{up}.time_conv", 2 * d_out, d_out, 3, 1, 1)
            d_in = d_out // 2
    return shapes | {"decoder.norm_out.gamma": (d_in, 1, 1, 1)} | _conv("decoder.conv_out", 3, d_in, 3, 3, 3)


def _wan_resnet(key: str, d_out: int, d_in: int) -> Shapes:
    shapes = {f"{key}.norm1.gamma": (d_in, 1, 1, 1), f"{key}.norm2.gamma": (d_out, 1, 1, 1)}
    shapes |= _conv(f"{key}.conv1", d_out, d_in, 3, 3, 3) | _conv(f"{key}.conv2", d_out, d_out, 3, 3, 3)
    return shapes if d_in == d_out else shapes | _conv(f"{key}.conv_shortcut", d_out, d_in, 1, 1, 1)


def _wan_middle(side: str, dim: int) -> Shapes:
    middle = f"{side}.mid_block"
    shapes = {f"{middle}.attentions.0.norm.gamma": (dim, 1, 1)}
    shapes |= _conv(f"{middle}.attentions.0.to_qkv", 3 * dim, dim, 1, 1)
    shapes |= _conv(f"{middle}.attentions.0.proj", dim, dim, 1, 1)
    return shapes | _wan_resnet(f"{middle}.resnets.0", dim, dim) | _wan_resnet(f"{middle}.resnets.1", dim, dim)
