"""Key maps between the layouts in which the same weights are published.

Step1X-Edit: the original single file (FLUX names, fused qkv) <-> diffusers names, which are the canonical ones here.
VAE: the FLUX autoencoder file <-> diffusers; the Wan / ComfyUI Qwen-Image VAE file -> diffusers.
All maps are pure: they take a state {key: tensor} and return another, whose tensors are views where they can be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from .errors import CheckpointError

State = dict[str, torch.Tensor]

SCALE_FACTOR = "connector.scale_factor"
SWAPPED = "norm_out.linear"
"""The one module whose output halves are in another order: the original has (shift, scale), diffusers (scale, shift)."""

_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_embed.in_layer",
    "time_in.out_layer": "time_embed.out_layer",
    "vector_in.in_layer": "vec_embed.in_layer",
    "vector_in.out_layer": "vec_embed.out_layer",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": SWAPPED,
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_BLOCKS = {"double": ("transformer_blocks", _DOUBLE), "single": ("single_transformer_blocks", _SINGLE)}
_TOP_BACK = {new: old for old, new in _TOP.items()}
_BLOCKS_BACK = {
    prefix: (kind, {new: (old, i) for old, news in table.items() for i, new in enumerate(news)})
    for kind, (prefix, table) in _BLOCKS.items()
}
_ORIGINAL_BLOCK = re.compile(r"^(double|single)_blocks\.(\d+)\.(.+)$")
_CANONICAL_BLOCK = re.compile(r"^(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)$")
_QK_NORM = re.compile(r"\.norm(_added)?_[qk]$")


# -- Step1X-Edit -------------------------------------------------------------------------------------------------------


def step1x_modules(original: str) -> tuple[str, ...]:
    """Canonical names of the modules that the original module `original` stands for; several where it is fused, () where
    the name is unknown. Connector and text mapping keep their names."""
    if original.startswith("connector.") or original == "text_token_mapping":
        return (original,)
    if original in _TOP:
        return (_TOP[original],)
    match = _ORIGINAL_BLOCK.match(original)
    if not match:
        return ()
    prefix, table = _BLOCKS[match[1]]
    return tuple(f"{prefix}.{match[2]}.{name}" for name in table.get(match[3], ()))


def step1x_original(canonical: str) -> tuple[str, int] | None:
    """(original module, index of the part within it) of a canonical module name; None where there is no counterpart."""
    if canonical.startswith("connector.") or canonical == "text_token_mapping":
        return canonical, 0
    if canonical in _TOP_BACK:
        return _TOP_BACK[canonical], 0
    match = _CANONICAL_BLOCK.match(canonical)
    if not match:
        return None
    kind, table = _BLOCKS_BACK[match[1]]
    if match[3] not in table:
        return None
    old, part = table[match[3]]
    return f"{kind}_blocks.{match[2]}.{old}", part


def step1x_from_original(state: Mapping[str, torch.Tensor]) -> State:
    """Original Step1X-Edit keys -> canonical keys; fused rows split, the last modulation's halves swapped, v1.0's
    `connector.scale_factor` folded. Keys it does not know pass through, so that the loader can name them."""
    result: State = {}
    for key, value in fold_scale_factor(state).items():
        module, _, leaf = key.rpartition(".")
        targets = step1x_modules(module)
        if not targets:
            result[key] = value
            continue
        leaf = "weight" if leaf == "scale" else leaf  # RMSNorm's parameter
        for target, rows in zip(targets, _split_fused(state, module, key, value, len(targets)), strict=True):
            result[f"{target}.{leaf}"] = swap_halves(rows) if target == SWAPPED and rows.ndim else rows
    return result


def step1x_to_original(state: Mapping[str, torch.Tensor]) -> State:
    """Canonical Step1X-Edit keys -> the original single-file keys: the exact inverse, but for a folded scale factor.

    Raises CheckpointError where a part of a fused weight is missing or the weights carry scales (dequantise them first).
    """
    result: State = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition(".")
        if leaf == "weight_scale":
            raise CheckpointError(f"{key}: expected weights without scales, found fp8 with one. Dequantise the state first.")
        place = step1x_original(module)
        if place is None:
            result[key] = value
            continue
        original, part = place
        leaf = "scale" if leaf == "weight" and _QK_NORM.search(module) else leaf
        siblings = step1x_modules(original)
        if len(siblings) == 1:
            result[f"{original}.{leaf}"] = swap_halves(value) if module == SWAPPED else value
        elif part == 0:
            parts = [state.get(f"{one}.{leaf}") for one in siblings]
            missing = [one for one, tensor in zip(siblings, parts, strict=True) if tensor is None]
            if missing:
                raise CheckpointError(f"expected {missing[0]}.{leaf} beside {key} to make {original}.{leaf}, found none.")
            result[f"{original}.{leaf}"] = torch.cat(parts)
    return result


def fold_scale_factor(state: Mapping[str, torch.Tensor]) -> State:
    """v1.0's learned `connector.scale_factor` s multiplies the mean that enters `connector.global_proj_out` by (1 + s);
    here the weight of that Linear is multiplied instead (its bias is not), and the factor is dropped."""
    result = dict(state)
    factor = result.pop(SCALE_FACTOR, None)
    if factor is None:
        return result
    gain = 1 + factor.to(torch.float32).reshape(())
    key = "connector.global_proj_out.weight"
    if key not in result:
        raise CheckpointError(f"expected {key} beside {SCALE_FACTOR}, found none: the file is no whole Step1X-Edit v1.0.")
    weight, scale = result[key], result.get(f"{key}_scale")
    gain = gain.to(weight.device)
    if weight.element_size() == 1:  # a low-bit weight is left as stored; its scale takes the factor
        result[f"{key}_scale"] = gain if scale is None else scale * gain
    else:
        result[key] = weight.to(torch.float32) * gain
    return result


def swap_halves(rows: torch.Tensor) -> torch.Tensor:
    """(2n, ...) -> the second n rows, then the first. Its own inverse."""
    first, second = rows.chunk(2, dim=0)
    return torch.cat([second, first])


def split_rows(rows: torch.Tensor, sizes: Sequence[int], key: str) -> tuple[torch.Tensor, ...]:
    """(sum(sizes), ...) -> one view per size; a scalar (the scale of the whole) is handed to every part."""
    if rows.ndim == 0:
        return (rows,) * len(sizes)
    if rows.shape[0] != sum(sizes) or min(sizes) <= 0:
        raise CheckpointError(f"{key}: expected {sum(sizes)} rows ({' + '.join(map(str, sizes))}), found {rows.shape[0]}.")
    return rows.split(list(sizes))


def _split_fused(state: Mapping, module: str, key: str, value: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    if parts == 1:
        return (value,)
    weight = state.get(f"{module}.weight")
    if weight is None or weight.ndim != 2:
        raise CheckpointError(f"{key}: expected a matrix {module}.weight beside it, found none. The file is not whole.")
    width = weight.shape[1] if parts == 4 else weight.shape[0] // 3
    sizes = [width] * 3 + [weight.shape[0] - 3 * width] * (parts - 3)
    return split_rows(value, sizes, key)


# -- FLUX autoencoder --------------------------------------------------------------------------------------------------

_BFL_MID = {"block_1": "resnets.0", "block_2": "resnets.1", "attn_1": "attentions.0"}
_BFL_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_BFL_STAGE = re.compile(r"^(encoder\.down|decoder\.up)\.(\d+)\.(?:block\.(\d+)\.(.+)|(?:down|up)sample\.conv\.(\w+))$")
_STAGE = re.compile(
    r"^(encoder\.down|decoder\.up)_blocks\.(\d+)\.(?:resnets\.(\d+)\.(.+)|(?:down|up)samplers\.0\.conv\.(\w+))$"
)
_BFL_MID_KEY = re.compile(r"^(encoder|decoder)\.mid\.(block_1|block_2|attn_1)\.(.+)$")
_MID_KEY = re.compile(r"^(encoder|decoder)\.mid_block\.(resnets\.0|resnets\.1|attentions\.0)\.(.+)$")


def flux_vae_from_bfl(state: Mapping[str, torch.Tensor]) -> State:
    """The autoencoder's own layout (`encoder.down.0.block.0...`) -> AutoencoderKL of diffusers; 1x1 convolutions of the
    attention become Linears."""
    stages = 1 + max((int(m[2]) for key in state if (m := _BFL_STAGE.match(key)) and "up" in m[1]), default=0)
    result: State = {}
    for key, value in state.items():
        if match := _BFL_STAGE.match(key):
            half, stage, block, rest, conv = match.groups()
            index = stages - 1 - int(stage) if half == "decoder.up" else int(stage)
            sampler = "downsamplers" if half == "encoder.down" else "upsamplers"
            inner = f"{sampler}.0.conv.{conv}" if conv else f"resnets.{block}.{rest.replace('nin_', 'conv_')}"
            result[f"{half}_blocks.{index}.{inner}"] = value
        elif match := _BFL_MID_KEY.match(key):
            half, part, rest = match.groups()
            name, _, leaf = rest.rpartition(".")
            inner = f"{_BFL_ATTENTION.get(name, name)}.{leaf}" if part == "attn_1" else rest
            flat = part == "attn_1" and value.ndim == 4
            result[f"{half}.mid_block.{_BFL_MID[part]}.{inner}"] = value.flatten(1) if flat else value
        else:
            result[key.replace("coder.norm_out.", "coder.conv_norm_out.")] = value
    return result


def flux_vae_to_bfl(state: Mapping[str, torch.Tensor]) -> State:
    """AutoencoderKL of diffusers -> the autoencoder's own layout: the exact inverse of `flux_vae_from_bfl`."""
    stages = 1 + max((int(m[2]) for key in state if (m := _STAGE.match(key)) and "up" in m[1]), default=0)
    mid = {new: old for old, new in _BFL_MID.items()}
    attention = {new: old for old, new in _BFL_ATTENTION.items()}
    result: State = {}
    for key, value in state.items():
        if match := _STAGE.match(key):
            half, stage, block, rest, conv = match.groups()
            index = stages - 1 - int(stage) if half == "decoder.up" else int(stage)
            sampler = "downsample" if half == "encoder.down" else "upsample"
            inner = f"{sampler}.conv.{conv}" if conv else f"block.{block}.{rest.replace('conv_shortcut', 'nin_shortcut')}"
            result[f"{half}.{index}.{inner}"] = value
        elif match := _MID_KEY.match(key):
            half, part, rest = match.groups()
            name, _, leaf = rest.rpartition(".")
            inner = f"{attention.get(name, name)}.{leaf}" if part == "attentions.0" else rest
            square = part == "attentions.0" and value.ndim == 2
            result[f"{half}.mid.{mid[part]}.{inner}"] = value[:, :, None, None] if square else value
        else:
            result[key.replace("coder.conv_norm_out.", "coder.norm_out.")] = value
    return result


def flux_vae_modern(state: Mapping[str, torch.Tensor]) -> State:
    """Old diffusers files call the attention's projections query, key, value and proj_attn; the present names are given."""
    pattern = re.compile(r"(\.attentions\.0\.)(query|key|value|proj_attn)\.")
    return {pattern.sub(lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.", key): value for key, value in state.items()}


# -- Wan / Qwen-Image VAE ----------------------------------------------------------------------------------------------

_WAN_TOP = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "decoder.conv1": "decoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "decoder.head.0": "decoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.head.2": "decoder.conv_out",
}
_WAN_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_WAN_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
_WAN_KEY = re.compile(r"^(encoder|decoder)\.(downsamples|upsamples|middle)\.(\d+)\.(.+)\.(weight|bias|gamma)$")
_WAN_UPSAMPLER = re.compile(r"^decoder\.upsamples\.(\d+)\.resample\.1\.weight$")


def qwen_vae_from_wan(state: Mapping[str, torch.Tensor]) -> State:
    """The Wan 2.1 VAE layout, in which ComfyUI ships the Qwen-Image VAE -> AutoencoderKLQwenImage of diffusers.

    The encoder keeps its flat numbering; the decoder's flat list becomes stages, each closed by its upsampler.
    """
    samplers = [int(match[1]) for key in state if (match := _WAN_UPSAMPLER.match(key))]
    length = min(samplers, default=10**6) + 1
    result: State = {}
    for key, value in state.items():
        match = _WAN_KEY.match(key)
        if not match:
            module, _, leaf = key.rpartition(".")
            result[f"{_WAN_TOP.get(module, module)}.{leaf}"] = value
            continue
        half, part, index, inner, leaf = match.groups()
        inner = _WAN_RESIDUAL.get(inner, inner.replace("shortcut", "conv_shortcut"))
        if part == "middle":
            place = f"mid_block.{_WAN_MIDDLE.get(index, index)}"
        elif part == "downsamples":
            place = f"down_blocks.{index}"
        else:
            stage, within = divmod(int(index), length)
            place = f"up_blocks.{stage}." + ("upsamplers.0" if within == length - 1 else f"resnets.{within}")
        result[f"{half}.{place}.{inner}.{leaf}"] = value
    return result
