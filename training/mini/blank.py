"""A miniature before training: random weights in the released layout, at the sizes of the miniatures.

What differs from the full systems stands in the config files and in `reasonedit.json`, and nowhere else.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.files import write_json
from ...reasonedit_core.mini.builder import build_checkpoint
from ...reasonedit_core.mini.tokenizer import special_token_ids, vocabulary_size, write_tokenizer
from ...reasonedit_core.settings import FILE_NAME
from ...reasonedit_core.weightfiles import read_shapes

log = logging.getLogger(__name__)

BUILDS = {"mini-s": "step1x-v1p2", "mini-q": "qwen-edit-plus"}
"""Miniature -> the system whose released layout it has, as the builder calls it."""

PARTS = ("text_encoder", "transformer", "vae")

CANVAS = 96
SEEN = 84
"""Side in pixels of the picture that the MLLM sees: three vision tokens of 28, one for each cell of a scene, as the DiT has
three latent tokens of 32 (the autoencoders halve a side four times)."""

_WIDTH = 256  # of the MLLM's states

_MLLM: Mapping[str, Any] = {
    "hidden_size": _WIDTH,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "max_window_layers": 5,
    "max_position_embeddings": 8192,
    # Of Qwen's own angles, a step to the right would turn the slowest by 1e-4: three places in a row would look like one.
    "rope_scaling": {"mrope_section": [2, 4, 26], "type": "mrope"},
    "rope_theta": 1000.0,
    "sliding_window": 8192,
    "tie_word_embeddings": True,
    "vision_config": {
        "depth": 4,
        "fullatt_block_indexes": [0, 1, 2, 3],  # a window has at most a few tokens here, so every block sees the whole
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_heads": 4,
        "out_hidden_size": _WIDTH,
    },
}

_TRANSFORMERS: Mapping[str, Mapping[str, Any]] = {
    "mini-s": {
        "attention_head_dim": 64,
        "axes_dims_rope": [16, 24, 24],
        "connector_depth": 1,
        "connector_heads_num": 3,
        "connector_hidden_size": 192,
        "connector_in_channels": _WIDTH,
        "joint_attention_dim": 192,
        "num_attention_heads": 3,
        "num_layers": 2,
        "num_single_layers": 6,
    },
    "mini-q": {
        "attention_head_dim": 64,
        "axes_dims_rope": [16, 24, 24],
        "joint_attention_dim": _WIDTH,
        "num_attention_heads": 3,
        "num_layers": 6,
    },
}

VAES: Mapping[str, Mapping[str, Any]] = {
    "mini-s": {
        "block_out_channels": [16, 16, 32, 64, 96],
        "down_block_types": ["DownEncoderBlock2D"] * 5,
        "up_block_types": ["UpDecoderBlock2D"] * 5,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": CANVAS,
    },
    "mini-q": {
        "base_dim": 16,
        "dim_mult": [1, 1, 2, 3, 4],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True, True],
    },
}

_NOTICE = "A miniature: it edits drawn miniature scenes only, and says nothing about how well a full-size model edits."

_SETTINGS: Mapping[str, Any] = {
    "steps": 8,
    "guidance": 1.0,
    "size_level": CANVAS,
    "conditioner_pixels": [SEEN * SEEN, SEEN * SEEN],
    "reasoner_pixels": [SEEN * SEEN, SEEN * SEEN],
    "dialogue": "own",
    "reply_tokens": 192,
    "scores": [],
    "latents": "own",
    "pictures": "miniature",
    "notice": _NOTICE,
}


def write_blank(
    system: str,
    folder: Path,
    *,
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    seed: int = 0,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write the random checkpoint of `mini-s` or `mini-q` into `folder` and return it.

    vocab, merges: of `tokens.learn_tokens`. overrides: other sizes, by component and field as `build_checkpoint` takes them.
    ConfigError for another system, or for sizes that do not fit together.
    """
    if system not in BUILDS:
        raise ConfigError(f"expected one of {', '.join(BUILDS)}, found {system!r}. Choose one of them.")
    folder = Path(folder)
    config = _merged(sizes(system, len(vocab)), overrides or {})
    std = 1 / math.sqrt(_WIDTH)
    build_checkpoint(BUILDS[system], folder, seed=seed, dtype=torch.bfloat16, std=std, config=config)
    if config["text_encoder"]["tie_word_embeddings"]:
        _drop_head(folder / "text_encoder")
    for place in ("text_encoder", "tokenizer", "processor"):
        if (folder / place / "vocab.json").is_file():
            fast = (folder / place / "tokenizer.json").is_file()
            write_tokenizer(folder / place, fast_file=fast, vocab=vocab, merges=merges)
    write_json(folder / FILE_NAME, settings(system))
    log.info("%s: %s", folder, "; ".join(f"{part} {count:,} parameters" for part, count in count_parameters(folder).items()))
    return folder


def sizes(system: str, ordinary: int) -> dict[str, dict[str, Any]]:
    """What the config files of a miniature state, by component. ordinary: ids that are not special tokens."""
    ids = special_token_ids(ordinary)
    ends = {"bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"]}
    encoder = {
        **_MLLM,
        **ends,
        "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vocab_size": vocabulary_size(ordinary),
    }
    return {
        "text_encoder": encoder,
        # Thoughts and descriptions of a few hundred words repeat the words of their question; Qwen's penalty would punish that.
        "generation": {**ends, "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]], "repetition_penalty": 1.0},
        "transformer": dict(_TRANSFORMERS[system]),
        "vae": dict(VAES[system]),
        "scheduler": {"shift_terminal": None},  # of few steps, one between 0.02 and 0 would be lost
    }


def settings(system: str) -> dict[str, Any]:
    """What the `reasonedit.json` of a miniature states."""
    return {**_SETTINGS, **({"condition_area": SEEN * SEEN} if system == "mini-q" else {})}


def count_parameters(folder: Path) -> dict[str, int]:
    """Parameters of each part of a checkpoint folder, from the headers of its files."""
    return {part: sum(math.prod(shape) for shape in read_shapes(Path(folder) / part).values()) for part in PARTS}


def count_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def _merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts are merged."""
    both = {key: _merged(config[key], overrides[key]) for key in overrides if isinstance(config.get(key), Mapping)}
    return {**config, **overrides, **both}


def _drop_head(folder: Path) -> None:
    """The embedding table is the head too, so the files need not hold it twice."""
    from safetensors.torch import load_file

    from ...reasonedit_core.mini.builder import write_sharded

    files = sorted(folder.glob("model-*.safetensors"))
    state = {key: tensor for file in files for key, tensor in load_file(file).items() if key != "lm_head.weight"}
    write_sharded(folder, "model", state)
