"""Small ReasonBrain parts with random weights, in the layouts of the real ones: LLaVA, CLIP's text encoder, a UNet of Stable
Diffusion's kind (or a FLUX transformer), autoencoder, scheduler.

Two sizes: TINY shows the wiring (the recipe tiny_brain_cpu, tests), MINI is the miniature's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.files import write_json
from ...reasonedit_core.mini.tokenizer import byte_tokens

KINDS = ("sd", "flux")
CANVAS = 96
NOTICE = "A miniature: it edits drawn miniature scenes only, and says nothing about how well a full-size model edits."

Sizes = Mapping[str, Mapping[str, Any]]
"""Fields of the configuration files, by part: vision, language, text_encoder, unet, transformer, vae, scheduler; settings and
brain: of reasonedit.json and reasonbrain.json."""

TINY: Sizes = {
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    },
    "language": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "text_encoder": {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "unet": {
        "sample_size": 8,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    },
    "transformer": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    },
    "vae": {"block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4, "latent_channels": 4, "scaling_factor": 0.18215},
    "scheduler": {},
    "settings": {"steps": 2, "size_level": 64, "multiple": 16},
    "brain": {"segmenter": "grid"},
}

MINI: Sizes = {
    "vision": {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": CANVAS,
        "patch_size": 16,
    },
    "language": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
    "text_encoder": {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_position_embeddings": 48,
    },
    "unet": {
        "sample_size": CANVAS // 8,
        "in_channels": 8,  # of an editor that is trained already, as InstructPix2Pix is
        "block_out_channels": (48, 80),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    },
    "vae": {
        "block_out_channels": (16, 24, 40, 64),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "latent_channels": 4,
        "sample_size": CANVAS,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    # v-prediction and a last step of pure noise: what the edit does is decided there, where an epsilon loss says least.
    "scheduler": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "settings": {
        "steps": 10,
        "guidance": 1.0,
        "size_level": CANVAS,
        "multiple": 16,
        "latents": "own",
        "pictures": "miniature",
        "notice": NOTICE,
    },
    "brain": {"segmenter": "grid:3", "extractor": "rules", "image_guidance": 1.0},  # the world's scenes are 3 x 3 cells
}

IMAGE, BOS, EOS, PAD = "<image>", "<s>", "</s>", "<pad>"
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"

_KL = {"down": "DownEncoderBlock2D", "up": "UpDecoderBlock2D"}
_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "clip_sample": False}


def write_bases(
    folder: str | Path,
    kind: str = "sd",
    *,
    sizes: Sizes = TINY,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    config: Sizes | None = None,
    merges: Mapping[str, list[tuple[str, str]]] | None = None,
) -> Path:
    """Write all parts that a ReasonBrain is trained around into `folder` and return it. The settings come last.

    kind: sd or flux. dtype: of the weights. config: what differs from `sizes`, by part. merges: of the tokenizers `llava` and
    `text` (pairs of byte symbols, the latter with CLIP's mark of a word's end); without, every byte is a token. ConfigError for
    another kind or part.
    """
    if kind not in KINDS:
        raise ConfigError(f"model.drawn.system: expected one of {', '.join(KINDS)} for ReasonBrain, found {kind!r}.")
    unknown = sorted(set(config or {}) - set(TINY))
    if unknown:
        raise ConfigError(f"model.drawn.config: expected parts out of {', '.join(TINY)}, found {', '.join(unknown)}.")
    folder, merges = Path(folder), merges or {}
    own = {part: {**sizes.get(part, {}), **(config or {}).get(part, {})} for part in TINY}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _write_llava(folder / "llava", own["vision"], own["language"], merges.get("llava", []), dtype)
        width = _write_text(folder, own["text_encoder"], merges.get("text", []), dtype)
        _write_denoiser(folder, kind, own, width, dtype)
        _write_vae(folder / "vae", kind, own["vae"], dtype)
    write_json(folder / "reasonbrain.json", dict(own["brain"]))
    write_json(folder / "reasonedit.json", dict(own["settings"]))
    return folder


def llava_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Ids of LLaVA's tokens: the special ones, the bytes, and what the merges make."""
    names = [BOS, EOS, PAD, IMAGE, *byte_tokens(), *("".join(pair) for pair in merges)]
    return {token: n for n, token in enumerate(dict.fromkeys(names))}


def text_vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Ids of the text encoder's tokens, in CLIP's order: bytes, bytes at a word's end, merges, start, end."""
    letters = [*byte_tokens(), *(f"{token}{WORD_END}" for token in byte_tokens())]
    names = [*letters, *("".join(pair) for pair in merges), START, END]
    return {token: n for n, token in enumerate(dict.fromkeys(names))}


def _write_llava(
    folder: Path, vision: Mapping[str, Any], language: Mapping[str, Any], merges: list, dtype: torch.dtype
) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

    vocabulary = llava_vocabulary(merges)
    words = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in merges]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token=BOS, eos_token=EOS, pad_token=PAD, additional_special_tokens=[IMAGE]
    ).save_pretrained(folder)
    ids = {"bos_token_id": vocabulary[BOS], "eos_token_id": vocabulary[EOS], "pad_token_id": vocabulary[PAD]}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=LlamaConfig(vocab_size=len(vocabulary), **ids, **language),
        image_token_id=vocabulary[IMAGE],
        vision_feature_layer=-2,
        tie_word_embeddings=bool(language.get("tie_word_embeddings")),
    )
    LlavaForConditionalGeneration(config).to(dtype).save_pretrained(folder)
    write_json(folder / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3})


def _write_text(folder: Path, sizes: Mapping[str, Any], merges: list, dtype: torch.dtype) -> int:
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary, place = text_vocabulary(merges), folder / "tokenizer"
    place.mkdir(parents=True, exist_ok=True)
    (place / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (place / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    length = sizes.get("max_position_embeddings", 77)
    told = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "bos_token": START, "eos_token": END}
    write_json(place / "tokenizer_config.json", {**told, "unk_token": END, "pad_token": END})
    ids = {"bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END], "pad_token_id": vocabulary[END]}
    config = CLIPTextConfig(vocab_size=len(vocabulary), **ids, **sizes)
    CLIPTextModel(config).to(dtype).save_pretrained(folder / "text_encoder")
    return sizes["hidden_size"]


def _write_denoiser(folder: Path, kind: str, own: Sizes, width: int, dtype: torch.dtype) -> None:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, UNet2DConditionModel

    if kind == "sd":
        UNet2DConditionModel(**{"cross_attention_dim": width, **own["unet"]}).to(dtype).save_pretrained(folder / "unet")
        DDIMScheduler(**{**_SD, "set_alpha_to_one": False, **own["scheduler"]}).save_pretrained(folder / "scheduler")
        return
    widths = {"joint_attention_dim": width, "pooled_projection_dim": width}
    FluxTransformer2DModel(**{**widths, **own["transformer"]}).to(dtype).save_pretrained(folder / "transformer")
    FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).save_pretrained(folder / "scheduler")


def _write_vae(folder: Path, kind: str, sizes: Mapping[str, Any], dtype: torch.dtype) -> None:
    from diffusers import AutoencoderKL

    blocks = len(sizes["block_out_channels"])
    kinds = {f"{way}_block_types": (name,) * blocks for way, name in _KL.items()}
    shift = {"shift_factor": 0.1159} if kind == "flux" else {}
    AutoencoderKL(**kinds, **shift, **sizes).to(dtype).save_pretrained(folder)
