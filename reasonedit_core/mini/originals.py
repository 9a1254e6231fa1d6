"""Turns tensors with diffusers names into the layouts of the original single files.

Deliberately not built on the key maps of `weights`: a checkpoint written here is what those maps are tested against.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

State = dict[str, torch.Tensor]

_DOUBLE = r"transformer_blocks\.(\d+)\."
_SINGLE = r"single_transformer_blocks\.(\d+)\."
_P = r"\.(weight|bias)"

# (pattern of the diffusers key, original key, row): keys that meet in one original key are stacked in order of `row`.
_STEP1X = (
    (r"x_embedder" + _P, r"img_in.\1", 0),
    (r"context_embedder" + _P, r"txt_in.\1", 0),
    (r"time_embed\.(\w+)" + _P, r"time_in.\1.\2", 0),
    (r"vec_embed\.(\w+)" + _P, r"vector_in.\1.\2", 0),
    (r"proj_out" + _P, r"final_layer.linear.\1", 0),
    (_DOUBLE + r"norm1\.linear" + _P, r"double_blocks.\1.img_mod.lin.\2", 0),
    (_DOUBLE + r"norm1_context\.linear" + _P, r"double_blocks.\1.txt_mod.lin.\2", 0),
    (_DOUBLE + r"attn\.to_q" + _P, r"double_blocks.\1.img_attn.qkv.\2", 0),
    (_DOUBLE + r"attn\.to_k" + _P, r"double_blocks.\1.img_attn.qkv.\2", 1),
    (_DOUBLE + r"attn\.to_v" + _P, r"double_blocks.\1.img_attn.qkv.\2", 2),
    (_DOUBLE + r"attn\.add_q_proj" + _P, r"double_blocks.\1.txt_attn.qkv.\2", 0),
    (_DOUBLE + r"attn\.add_k_proj" + _P, r"double_blocks.\1.txt_attn.qkv.\2", 1),
    (_DOUBLE + r"attn\.add_v_proj" + _P, r"double_blocks.\1.txt_attn.qkv.\2", 2),
    (_DOUBLE + r"attn\.norm_q\.weight", r"double_blocks.\1.img_attn.norm.query_norm.scale", 0),
    (_DOUBLE + r"attn\.norm_k\.weight", r"double_blocks.\1.img_attn.norm.key_norm.scale", 0),
    (_DOUBLE + r"attn\.norm_added_q\.weight", r"double_blocks.\1.txt_attn.norm.query_norm.scale", 0),
    (_DOUBLE + r"attn\.norm_added_k\.weight", r"double_blocks.\1.txt_attn.norm.key_norm.scale", 0),
    (_DOUBLE + r"attn\.to_out\.0" + _P, r"double_blocks.\1.img_attn.proj.\2", 0),
    (_DOUBLE + r"attn\.to_add_out" + _P, r"double_blocks.\1.txt_attn.proj.\2", 0),
    (_DOUBLE + r"ff\.net\.0\.proj" + _P, r"double_blocks.\1.img_mlp.0.\2", 0),
    (_DOUBLE + r"ff\.net\.2" + _P, r"double_blocks.\1.img_mlp.2.\2", 0),
    (_DOUBLE + r"ff_context\.net\.0\.proj" + _P, r"double_blocks.\1.txt_mlp.0.\2", 0),
    (_DOUBLE + r"ff_context\.net\.2" + _P, r"double_blocks.\1.txt_mlp.2.\2", 0),
    (_SINGLE + r"norm\.linear" + _P, r"single_blocks.\1.modulation.lin.\2", 0),
    (_SINGLE + r"attn\.to_q" + _P, r"single_blocks.\1.linear1.\2", 0),
    (_SINGLE + r"attn\.to_k" + _P, r"single_blocks.\1.linear1.\2", 1),
    (_SINGLE + r"attn\.to_v" + _P, r"single_blocks.\1.linear1.\2", 2),
    (_SINGLE + r"proj_mlp" + _P, r"single_blocks.\1.linear1.\2", 3),
    (_SINGLE + r"proj_out" + _P, r"single_blocks.\1.linear2.\2", 0),
    (_SINGLE + r"attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale", 0),
    (_SINGLE + r"attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale", 0),
    (r"(connector|text_token_mapping)\.(.+)", r"\1.\2", 0),
)

_FLUX_VAE = (
    (r"(encoder|decoder)\.conv_norm_out\.", r"\1.norm_out."),
    (r"(encoder|decoder)\.mid_block\.resnets\.0\.", r"\1.mid.block_1."),
    (r"(encoder|decoder)\.mid_block\.resnets\.1\.", r"\1.mid.block_2."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.group_norm\.", r"\1.mid.attn_1.norm."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_([qkv])\.", r"\1.mid.attn_1.\2."),
    (r"(encoder|decoder)\.mid_block\.attentions\.0\.to_out\.0\.", r"\1.mid.attn_1.proj_out."),
    (r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r"\1.\2.block.\3."),
    (r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r"\1.\2.\3sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)

_WAN_VAE = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
)
_WAN_RESIDUAL = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}


def step1x_original(state: Mapping[str, torch.Tensor]) -> State:
    """The Step1X transformer with the keys of the original repository (fused qkv, final layer as shift, scale)."""
    rows: dict[str, dict[int, torch.Tensor]] = {}
    for key, tensor in state.items():
        if key.startswith("norm_out.linear."):
            scale, shift = tensor.chunk(2)
            rows["final_layer.adaLN_modulation.1." + key.rpartition(".")[2]] = {0: shift, 1: scale}
            continue
        target, row = _match(key)
        rows.setdefault(target, {})[row] = tensor
    return {key: torch.cat([parts[row] for row in sorted(parts)]) for key, parts in rows.items()}


def _match(key: str) -> tuple[str, int]:
    for pattern, target, row in _STEP1X:
        found = re.fullmatch(pattern, key)
        if found:
            return found.expand(target), row
    raise AssertionError(f"no original name for {key}")


def flux_vae_original(state: Mapping[str, torch.Tensor]) -> State:
    """The FLUX VAE with the keys of `ae.safetensors`: up blocks count from the fine end, attention is 1x1 convs."""
    last = max(int(key.split(".")[2]) for key in state if key.startswith("decoder.up_blocks."))
    out: State = {}
    for key, tensor in state.items():
        name = re.sub(r"(?<=up_blocks\.)\d+", lambda found: str(last - int(found[0])), key)
        for pattern, target in _FLUX_VAE:
            name = re.sub(pattern, target, name)
        is_projection = re.search(r"attn_1\.(q|k|v|proj_out)\.weight$", name)
        out[name] = tensor[:, :, None, None] if is_projection else tensor
    return out


def wan_vae_original(state: Mapping[str, torch.Tensor], *, num_res_blocks: int) -> State:
    """The Qwen-Image VAE with the key names of Wan, as in ComfyUI's file. num_res_blocks: as in the VAE's config."""
    per_level = num_res_blocks + 2  # the decoder's resnets and its upsampler stand in one flat list
    out: State = {}
    for key, tensor in state.items():
        name = key
        up = re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", name)
        if up:
            place = int(up[3]) if up[2] == "resnets" else per_level - 1
            name = f"decoder.upsamples.{int(up[1]) * per_level + place}.{name[up.end() :]}"
        for pattern, target in _WAN_VAE:
            name = re.sub(pattern, target, name)
        # `conv1` inside a residual is another thing than the `conv1` that the first convolution of a side is called.
        inner = re.match(r"(\w+\.(?:downsamples|upsamples|middle)\.\d+)\.(norm1|conv1|norm2|conv2)\.", name)
        if inner:
            name = f"{inner[1]}.{_WAN_RESIDUAL[inner[2]]}.{name[inner.end() :]}"
        out[name.replace(".conv_shortcut.", ".shortcut.")] = tensor
    return out
