"""Configurations read off tensor shapes, for single files, which carry none.

Every function: shapes {key: shape} in canonical (diffusers) names -> keyword arguments of the module's class. What no shape
tells is set by a rule that gives the released values at the released sizes; the docstrings state the rules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
Config = dict[str, Any]

FLUX_SCALE = (0.3611, 0.1159)
"""scaling_factor and shift_factor of the FLUX.1 autoencoder."""


def step1x_config(shapes: Shapes) -> Config:
    """Rules: the connector's heads are as wide as the DiT's (128 in the release); rotary axes: see `rope_axes`."""
    get = _Reader(shapes, "Step1X-Edit transformer")
    width, in_channels = get("x_embedder.weight")
    norms = ("transformer_blocks.0.attn.norm_q.weight", "single_transformer_blocks.0.attn.norm_q.weight")
    head_dim = get(norms[0] if norms[0] in shapes else norms[1])[0]
    connector_width = get("connector.S.input_embedder.weight")[0]
    return {
        "in_channels": in_channels,
        "out_channels": get("proj_out.weight")[0],
        "num_layers": count(shapes, r"transformer_blocks\.(\d+)\."),
        "num_single_layers": count(shapes, r"single_transformer_blocks\.(\d+)\."),
        "attention_head_dim": head_dim,
        "num_attention_heads": get.quotient(width, head_dim, "x_embedder rows / head width"),
        "joint_attention_dim": get("context_embedder.weight")[1],
        "timestep_in_dim": get("time_embed.in_layer.weight")[1],
        "vector_in_dim": get("vec_embed.in_layer.weight")[1],
        "connector_in_channels": get("connector.global_proj_out.weight")[1],
        "connector_hidden_size": connector_width,
        "connector_heads_num": get.quotient(connector_width, head_dim, "connector rows / head width"),
        "connector_depth": count(shapes, r"connector\.S\.individual_token_refiner\.blocks\.(\d+)\."),
        "axes_dims_rope": rope_axes(head_dim),
        "enable_text_token_mapping": "text_token_mapping.weight" in shapes,
    }


def qwen_transformer_config(shapes: Shapes) -> Config:
    """Rules: patches of 2 x 2; rotary axes: see `rope_axes`. `zero_cond_t` is no matter of shapes: the caller sets it."""
    get = _Reader(shapes, "Qwen-Image transformer")
    width, in_channels = get("img_in.weight")
    head_dim = get("transformer_blocks.0.attn.norm_q.weight")[0]
    return {
        "patch_size": 2,
        "in_channels": in_channels,
        "out_channels": get.quotient(get("proj_out.weight")[0], 4, "proj_out rows / 4"),
        "num_layers": count(shapes, r"transformer_blocks\.(\d+)\."),
        "attention_head_dim": head_dim,
        "num_attention_heads": get.quotient(width, head_dim, "img_in rows / head width"),
        "joint_attention_dim": get("txt_in.weight")[1],
        "axes_dims_rope": rope_axes(head_dim),
    }


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """(16, 56, 56) at the released head width of 128; in general height and width take the largest even part up to 7/16
    of the head each, and the first axis the rest."""
    side = head_dim * 7 // 16 // 2 * 2
    return head_dim - 2 * side, side, side


def flux_vae_config(shapes: Shapes) -> Config:
    """Rules: 32 norm groups where every width is a multiple of 32 (the release), else half the narrowest width; scale and
    shift of FLUX.1."""
    get = _Reader(shapes, "FLUX autoencoder")
    stages = count(shapes, r"encoder\.down_blocks\.(\d+)\.")
    widths = [get(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(stages)]
    return {
        "in_channels": get("encoder.conv_in.weight")[1],
        "out_channels": get("decoder.conv_out.weight")[0],
        "down_block_types": ["DownEncoderBlock2D"] * stages,
        "up_block_types": ["UpDecoderBlock2D"] * stages,
        "block_out_channels": widths,
        "layers_per_block": count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": get("decoder.conv_in.weight")[1],
        "norm_num_groups": 32 if all(width % 32 == 0 for width in widths) else max(min(widths) // 2, 1),
        "sample_size": 1024,
        "scaling_factor": FLUX_SCALE[0],
        "shift_factor": FLUX_SCALE[1],
        "force_upcast": True,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in shapes,
    }


def qwen_vae_config(shapes: Shapes) -> Config:
    """The encoder's flat list tells widths, depth and which levels halve time. Mean and deviation of the latents are the
    class's defaults, those of the release; they fit 16 channels only."""
    get = _Reader(shapes, "Qwen-Image VAE")
    base = get("encoder.conv_in.weight")[0]
    levels: list[list[int]] = [[]]
    halves_time = []
    for i in range(count(shapes, r"encoder\.down_blocks\.(\d+)\.")):
        if f"encoder.down_blocks.{i}.resample.1.weight" in shapes:
            halves_time.append(f"encoder.down_blocks.{i}.time_conv.weight" in shapes)
            levels.append([])
        else:
            levels[-1].append(get(f"encoder.down_blocks.{i}.conv2.weight")[0])
    widths = [level[-1] for level in levels if level]
    return {
        "base_dim": base,
        "z_dim": get("decoder.conv_in.weight")[1],
        "dim_mult": [get.quotient(width, base, "VAE level width / base width") for width in widths],
        "num_res_blocks": len(levels[0]),
        "temperal_downsample": halves_time,  # spelt so by the class
    }


def count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number that `pattern` (from the start of a key) captures; 0 without a match."""
    compiled = re.compile(pattern)
    return 1 + max((int(match[1]) for key in shapes if (match := compiled.match(key))), default=-1)


class _Reader:
    """Shapes by key, with an error that names the file's kind when one is missing or does not divide."""

    def __init__(self, shapes: Shapes, what: str) -> None:
        self.shapes, self.what = shapes, what

    def __call__(self, key: str) -> tuple[int, ...]:
        if key not in self.shapes:
            raise CheckpointError(f"{self.what}: expected the key {key}, from which sizes are read; found it not.")
        return self.shapes[key]

    def quotient(self, value: int, divisor: int, what: str) -> int:
        if value % divisor:
            raise CheckpointError(f"{self.what}: expected {what} to be whole, found {value} / {divisor}.")
        return value // divisor
