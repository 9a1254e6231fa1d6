"""The config files of the tiny checkpoints: the fields of the released ones, small numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError
from . import layouts
from .tokenizer import special_token_ids, vocabulary_size

Config = dict[str, Any]

DIFFUSERS_VERSION = "0.36.0.dev0"
TRANSFORMERS_VERSION = "4.55.0"

_WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508)
_WAN_MEAN += (0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
_WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743)
_WAN_STD += (3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a checkpoint. shapes: names and shapes of its tensors, or None for a part without weights."""

    config: Config
    shapes: Callable[[Config], layouts.Shapes] | None = None


def components(system: str, dtype: torch.dtype, overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, Component]:
    """The parts of `system` with `overrides` (component -> fields) merged in and checked against each other."""
    dtype_name = str(dtype).removeprefix("torch.")
    parts = {
        "text_encoder": Component(_text_encoder(dtype_name), layouts.qwen25vl_shapes),
        "generation": Component(_generation()),
    }
    if system.startswith("step1x"):
        mapping = system == "step1x-v1p2"
        parts["transformer"] = Component(_step1x_transformer(mapping), layouts.step1x_shapes)
        parts["vae"] = Component(_flux_vae(), layouts.flux_vae_shapes)
        parts["scheduler"] = Component(_scheduler(max_seq_len=4096, max_shift=1.15, shift=3.0, terminal=None))
        parts["model_index"] = Component(_step1x_index(mapping))
    elif system != "qwen2.5-vl":
        parts["transformer"] = Component(_qwen_transformer(system), layouts.qwen_image_shapes)
        parts["vae"] = Component(_qwen_vae(), layouts.qwen_vae_shapes)
        parts["scheduler"] = Component(_scheduler(max_seq_len=8192, max_shift=0.9, shift=1.0, terminal=0.02))
        parts["model_index"] = Component(_qwen_index(system))
    for name, fields in overrides.items():
        if name not in parts:
            raise ConfigError(f"expected overrides for {', '.join(parts)} of {system}; found {name!r}: rename it")
        _merge(parts[name].config, fields, f"{system}: {name}")
    _check(system, parts)
    if system.startswith("qwen-edit"):  # this family was saved by a transformers that writes the language fields twice
        language = {k: v for k, v in parts["text_encoder"].config.items() if k not in _OUTER_FIELDS}
        parts["text_encoder"].config["text_config"] = language | {"model_type": "qwen2_5_vl_text"}
    return parts


def _merge(config: Config, fields: Mapping[str, Any], where: str) -> None:
    for key, value in fields.items():
        if key not in config:
            raise ConfigError(f"{where}: expected a field out of {', '.join(config)}; found {key!r}: rename it")
        if isinstance(config[key], dict) and isinstance(value, Mapping):
            _merge(config[key], value, f"{where}.{key}")
        else:
            config[key] = value


def _check(system: str, parts: Mapping[str, Component]) -> None:
    """Sizes that meet between two components must agree, else the checkpoint would fail far from its cause."""
    mllm = parts["text_encoder"].config
    transformer = parts["transformer"].config if "transformer" in parts else {}
    width = mllm["hidden_size"]
    meeting = {"text_encoder.vision_config.out_hidden_size": mllm["vision_config"]["out_hidden_size"]}
    if system.startswith("step1x"):
        meeting["transformer.connector_in_channels"] = transformer["connector_in_channels"]
    elif transformer:
        meeting["transformer.joint_attention_dim"] = transformer["joint_attention_dim"]
    for field, size in meeting.items():
        if size != width:
            raise ConfigError(f"{system}: expected {field} = text_encoder.hidden_size {width}; found {size}: set both")
    if not transformer:
        return
    head_dim, axes, joint = (transformer[k] for k in ("attention_head_dim", "axes_dims_rope", "joint_attention_dim"))
    if transformer.get("connector_hidden_size", joint) != joint:
        found = f"{transformer['connector_hidden_size']} and {joint}"
        raise ConfigError(f"{system}: expected connector_hidden_size = joint_attention_dim; found {found}: set both")
    if sum(axes) != head_dim:
        found = f"{head_dim} and {axes}"
        raise ConfigError(f"{system}: expected attention_head_dim = sum of axes_dims_rope; found {found}: set both")


_OUTER_FIELDS = {
    "architectures",
    "image_token_id",
    "model_type",
    "transformers_version",
    "video_token_id",
    "vision_config",
    "vision_end_token_id",
    "vision_start_token_id",
    "vision_token_id",
}


def _text_encoder(dtype_name: str) -> Config:
    """Flat, as on the hub: the fields of the language model at the top level."""
    ids = special_token_ids()
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "hidden_act": "silu",
        "hidden_size": 64,
        "image_token_id": ids["<|image_pad|>"],
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 32768,
        "max_window_layers": 2,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": ids["<|endoftext|>"],
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [2, 3, 3], "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "torch_dtype": dtype_name,
        "transformers_version": TRANSFORMERS_VERSION,
        "use_cache": True,
        "use_sliding_window": False,
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": _vision(),
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vocab_size": vocabulary_size(),
    }


def _vision() -> Config:
    return {
        "depth": 2,
        "fullatt_block_indexes": [1],
        "hidden_act": "silu",
        "hidden_size": 32,
        "in_channels": 3,
        "in_chans": 3,
        "intermediate_size": 48,
        "model_type": "qwen2_5_vl",
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    }


def _generation() -> Config:
    ids = special_token_ids()
    return {
        "bos_token_id": ids["<|endoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "repetition_penalty": 1.05,
        "temperature": 1e-06,
        "transformers_version": TRANSFORMERS_VERSION,
    }


def _step1x_transformer(mapping: bool) -> Config:
    return {
        "_class_name": "Step1XEditTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "connector_depth": 2,
        "connector_heads_num": 4,
        "connector_hidden_size": 64,
        "connector_in_channels": 64,
        "enable_text_token_mapping": mapping,
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 64,
        "num_attention_heads": 2,
        "num_layers": 2,
        "num_single_layers": 2,
        "out_channels": 64,
        "patch_size": 1,
        "timestep_in_dim": 256,
        "vector_in_dim": 768,
    }


def _qwen_transformer(system: str) -> Config:
    config = {
        "_class_name": "QwenImageTransformer2DModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attention_head_dim": 16,
        "axes_dims_rope": [4, 6, 6],
        "guidance_embeds": False,
        "in_channels": 64,
        "joint_attention_dim": 64,
        "num_attention_heads": 2,
        "num_layers": 2,
        "out_channels": 16,
        "patch_size": 2,
    }
    return config | ({"zero_cond_t": True} if system == "qwen-edit-2511" else {})


def _flux_vae() -> Config:
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": DIFFUSERS_VERSION,
        "act_fn": "silu",
        "block_out_channels": [8, 8, 8, 8],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "in_channels": 3,
        "latent_channels": 16,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": 1,
        "mid_block_add_attention": True,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def _qwen_vae() -> Config:
    return {
        "_class_name": "AutoencoderKLQwenImage",
        "_diffusers_version": DIFFUSERS_VERSION,
        "attn_scales": [],
        "base_dim": 8,
        "dim_mult": [1, 2, 4, 4],
        "dropout": 0.0,
        "latents_mean": list(_WAN_MEAN),
        "latents_std": list(_WAN_STD),
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],  # spelt so in the released config
        "z_dim": 16,
    }


def _scheduler(*, max_seq_len: int, max_shift: float, shift: float, terminal: float | None) -> Config:
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "invert_sigmas": False,
        "max_image_seq_len": max_seq_len,
        "max_shift": max_shift,
        "num_train_timesteps": 1000,
        "shift": shift,
        "shift_terminal": terminal,
        "stochastic_sampling": False,
        "time_shift_type": "exponential",
        "use_beta_sigmas": False,
        "use_dynamic_shifting": True,
        "use_exponential_sigmas": False,
        "use_karras_sigmas": False,
    }


def _step1x_index(mapping: bool) -> Config:
    return {
        "_class_name": "Step1XEditPipelineV1P2" if mapping else "Step1XEditPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "processor": ["transformers", "Qwen2_5_VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "transformer": ["diffusers", "Step1XEditTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _qwen_index(system: str) -> Config:
    return {
        "_class_name": "QwenImageEditPipeline" if system == "qwen-edit" else "QwenImageEditPlusPipeline",
        "_diffusers_version": DIFFUSERS_VERSION,
        "processor": ["transformers", "Qwen2VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
