"""Loads Qwen2.5-VL from every layout it is found in, into one transformers model and one copy of the weights.

Layouts: a stock folder (config flat as up to transformers 4.5x, or nested), the text_encoder/ of a diffusers pipeline, the
pipeline's own folder, and ComfyUI's single files (16 bit or fp8, with or without lm_head).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..fp8 import dequantize
from ..types import Counts
from ..weightfiles import read_json, read_state
from .qwen25vl import QwenVL

log = logging.getLogger(__name__)

HEADS = {2048: (16, 2), 3584: (28, 4), 5120: (40, 8), 8192: (64, 8)}
"""Hidden size -> (heads, KV heads) of the published Qwen2.5-VL (3B, 7B, 32B, 72B): what shapes alone do not tell."""

TIED = {2048}
"""Hidden sizes whose lm_head is the embedding table (3B)."""

VISION_SIZE = 1280
"""Width of the vision tower of all published sizes; its heads and windows are constants then."""

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
LM_HEAD = "lm_head.weight"
EMBEDDINGS = "model.language_model.embed_tokens.weight"

# Legacy names (hub, ComfyUI) and those of nested models -> the names that transformers has in memory since 4.52.
_RENAMES = (
    (re.compile(r"^(?:.*\.)?(lm_head\.weight)$"), r"\1"),
    (re.compile(r"^(?:.*\.)?visual\."), "model.visual."),
    (re.compile(r"^(?:.*\.)?language_model\.(?:model\.)?"), "model.language_model."),
    (re.compile(r"^(?:.*\.)?model\.(?=embed_tokens\.|layers\.|norm\.)"), "model.language_model."),
)
_IGNORED = re.compile(r"(^|\.)(scaled_fp8|.*inv_freq|logit_scale)$")

_LANGUAGE_FIELDS = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "sliding_window",
    "use_sliding_window",
    "vocab_size",
)


def load_mllm(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    need_lm_head: bool = True,
    tokenizer_path: str | Path | None = None,
    counts: Counts | None = None,
) -> QwenVL:
    """Load `path`: a folder or a single file, see the head of this module.

    need_lm_head: False leaves lm_head out even where the file holds it (conditioning needs none of it).
    tokenizer_path: folder of the tokenizer; needed for single files, and for folders that hold none.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"expected a Qwen2.5-VL folder or .safetensors file, found nothing at {path}.")
    folder = _model_folder(path) if path.is_dir() else None
    tokenizer_folder = find_tokenizer(folder, tokenizer_path, path)
    tokenizer = load_tokenizer(tokenizer_folder)
    state = rename_keys(dequantize(read_state(folder or path), dtype))
    if folder is not None:
        raw = read_json(folder / "config.json")
    else:
        raw = infer_config(state, tokenizer_folder, path)
    config = make_config(raw, tokenizer)
    _take_lm_head(state, config, need_lm_head, path)
    model = build(config, state, dtype=dtype, device=torch.device(device), source=path)
    return QwenVL(
        model,
        tokenizer,
        counts=counts,
        bounds=read_bounds(folder, tokenizer_folder),
        repetition_penalty=read_penalty(folder, tokenizer_folder),
    )


def rename_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Any known key layout -> the names of the transformers model in memory (`model.visual.*`, `model.language_model.*`)."""
    renamed = {}
    for key, tensor in state.items():
        for pattern, target in _RENAMES:
            new, matched = pattern.subn(target, key)
            if matched:
                key = new
                break
        renamed[key] = tensor
    return renamed


def find_tokenizer(folder: Path | None, given: str | Path | None, source: Path) -> Path:
    """The folder of the tokenizer: the given one, the model's own, or tokenizer/ or processor/ beside it."""
    if given is not None:
        places = [Path(given), Path(given) / "tokenizer", Path(given) / "processor", Path(given) / "text_encoder"]
    elif folder is not None:
        places = [folder, folder.parent / "tokenizer", folder.parent / "processor"]
    else:
        places = [source.parent]
    for place in places:
        if any((place / name).is_file() for name in TOKENIZER_FILES):
            return place
    looked = ", ".join(str(place) for place in places)
    raise CheckpointError(
        f"{source}: expected a tokenizer (tokenizer.json, or vocab.json with merges.txt), found none in {looked}. Copy "
        "the tokenizer files of any Qwen2.5-VL (its folder, a pipeline's tokenizer/ or processor/, or ComfyUI's "
        "comfy/text_encoders/qwen25_tokenizer) into a folder tokenizer/ of the weights, or name their folder (tokenizer_path)."
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer alone: processors are not loaded, as those of transformers 5 need torchvision."""
    from transformers import Qwen2TokenizerFast

    try:
        tokenizer = Qwen2TokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({error}). Download it again.") from error
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = _legacy_template(folder)
    for token in ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"):
        if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1:
            raise CheckpointError(
                f"{folder}: expected the tokenizer of a Qwen2.5-VL, found one that does not know {token}. Give another folder."
            )
    return tokenizer


def _legacy_template(folder: Path) -> str | None:
    path = folder / "chat_template.json"
    return read_json(path).get("chat_template") if path.is_file() else None


def read_bounds(*folders: Path | None) -> tuple[int, int] | None:
    """(min, max) pixels of the first preprocessor_config.json in the folders or a processor/ beside them."""
    for folder in folders:
        for place in () if folder is None else (folder, folder.parent / "processor"):
            path = place / "preprocessor_config.json"
            if path.is_file():
                config = read_json(path)
                size = config.get("size") or {}
                low = config.get("min_pixels") or size.get("shortest_edge")
                high = config.get("max_pixels") or size.get("longest_edge")
                if low and high:
                    return int(low), int(high)
    return None


def read_penalty(*folders: Path | None) -> float:
    """repetition_penalty of the first generation_config.json in the folders; 1 (none) without one."""
    for folder in folders:
        if folder is not None and (folder / "generation_config.json").is_file():
            return float(read_json(folder / "generation_config.json").get("repetition_penalty") or 1.0)
    return 1.0


def make_config(raw: Mapping[str, Any], tokenizer: Any) -> Any:
    """Qwen2_5_VLConfig of the running transformers from a config.json of any version."""
    from transformers import Qwen2_5_VLConfig

    nested = raw.get("text_config") or {}
    text = {name: source[name] for source in (raw, nested) for name in _LANGUAGE_FIELDS if source.get(name) is not None}
    if "hidden_size" not in text or "vision_config" not in raw:
        raise CheckpointError(
            f"expected the config.json of a Qwen2.5-VL, found one of model_type {raw.get('model_type')!r} without "
            "hidden_size or vision_config. Give the folder of a Qwen2.5-VL."
        )
    ropes = [s.get(name) or {} for s in (nested, raw) for name in ("rope_scaling", "rope_parameters")]
    sections = next((rope["mrope_section"] for rope in ropes if "mrope_section" in rope), [16, 24, 24])
    thetas = [nested.get("rope_theta"), raw.get("rope_theta"), *(rope.get("rope_theta") for rope in ropes)]
    text["rope_scaling"] = {"type": "mrope", "mrope_section": list(sections)}
    text["rope_theta"] = next((theta for theta in thetas if theta), 1e6)
    tied = raw.get("tie_word_embeddings", nested.get("tie_word_embeddings", False))
    vision = {k: v for k, v in raw["vision_config"].items() if k not in ("model_type", "torch_dtype", "dtype")}
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    ids = {f"{kind}_token_id": tokenizer.convert_tokens_to_ids(token) for kind, token in names.items()}
    ids |= {f"vision_{end}_token_id": tokenizer.convert_tokens_to_ids(f"<|vision_{end}|>") for end in ("start", "end")}
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=bool(tied), attn_implementation="sdpa", **ids
    )


def infer_config(state: Mapping[str, torch.Tensor], tokenizer_folder: Path, source: Path) -> dict[str, Any]:
    """The config of a single file, from its shapes (renamed keys).

    A config.json beside the tokenizer is used when it agrees with the shapes; sizes that were never published need one.
    """
    needed = (EMBEDDINGS, "model.visual.patch_embed.proj.weight", "model.visual.merger.mlp.2.weight")
    for key in (*needed, "model.language_model.layers.0.mlp.gate_proj.weight"):
        if key not in state:
            raise CheckpointError(
                f"{source}: expected a Qwen2.5-VL text encoder with its vision tower, found no {key}. Text-only and GGUF "
                "files cannot condition on pictures; use the full safetensors file."
            )
    vocab, hidden = state[EMBEDDINGS].shape
    vision_hidden = state["model.visual.patch_embed.proj.weight"].shape[0]
    beside = tokenizer_folder / "config.json"
    if beside.is_file():
        raw = read_json(beside)
        text = {**raw, **(raw.get("text_config") or {})}
        if text.get("hidden_size") == hidden and (raw.get("vision_config") or {}).get("hidden_size") == vision_hidden:
            return raw
    if hidden not in HEADS or vision_hidden != VISION_SIZE:
        raise CheckpointError(
            f"{source}: expected the sizes of a published Qwen2.5-VL (hidden size {', '.join(map(str, HEADS))}, vision "
            f"{VISION_SIZE}), found {hidden} and {vision_hidden}. Put its config.json beside its tokenizer."
        )
    heads, kv_heads = HEADS[hidden]
    return {
        "hidden_size": hidden,
        "intermediate_size": state["model.language_model.layers.0.mlp.gate_proj.weight"].shape[0],
        "max_position_embeddings": 128000,
        "num_attention_heads": heads,
        "num_hidden_layers": _depth(state, "model.language_model.layers."),
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": [16, 24, 24]},
        "rope_theta": 1e6,
        "tie_word_embeddings": hidden in TIED,
        "vision_config": {
            "depth": _depth(state, "model.visual.blocks."),
            "fullatt_block_indexes": [7, 15, 23, 31],
            "hidden_size": vision_hidden,
            "intermediate_size": state["model.visual.blocks.0.mlp.gate_proj.weight"].shape[0],
            "num_heads": 16,
            "out_hidden_size": state["model.visual.merger.mlp.2.weight"].shape[0],
            "window_size": 112,
        },
        "vocab_size": vocab,
    }


def build(config: Any, state: dict[str, torch.Tensor], *, dtype: torch.dtype, device: torch.device, source: Path) -> Any:
    """The model with the tensors of `state`, which is emptied on the way so that only one copy is held at a time.

    An lm_head that neither `state` nor the config provides becomes None.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    speaks = LM_HEAD in state or config.tie_word_embeddings
    if not speaks:
        model.lm_head = None
    expected = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
    _check_keys(expected, state, tied=config.tie_word_embeddings, source=source)
    loaded = {}
    for key in list(state):
        tensor = state.pop(key)
        if key in expected:
            loaded[key] = tensor.to(device=device, dtype=dtype)
    if config.tie_word_embeddings:
        loaded[LM_HEAD] = loaded[EMBEDDINGS]
    model.load_state_dict(loaded, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.get_input_embeddings().weight
    _fill_rotary(model, device)
    return model.eval().requires_grad_(False)


def _check_keys(expected: Mapping[str, torch.Size], state: Mapping[str, torch.Tensor], *, tied: bool, source: Path) -> None:
    missing = sorted(key for key in expected if key not in state and not (tied and key == LM_HEAD))
    if missing:
        raise CheckpointError(
            f"{source}: expected {len(expected)} tensors of a Qwen2.5-VL, {len(missing)} are missing: {_few(missing)}. The "
            "file is incomplete or of another model; download it again."
        )
    wrong = [f"{k} {tuple(state[k].shape)} != {tuple(s)}" for k, s in expected.items() if k in state and state[k].shape != s]
    if wrong:
        raise CheckpointError(
            f"{source}: {len(wrong)} tensors have another shape than the config says (found != expected): {_few(wrong)}. "
            "The config.json belongs to another size of the model."
        )
    unexpected = sorted(key for key in state if key not in expected and not _IGNORED.search(key))
    if unexpected:
        log.warning("%s: ignored %d tensors that are not of a Qwen2.5-VL: %s", source, len(unexpected), _few(unexpected))


def _take_lm_head(state: dict[str, torch.Tensor], config: Any, need: bool, source: Path) -> None:
    """Drop an lm_head that is not needed or tied; complain about one that is needed and absent."""
    if config.tie_word_embeddings or not need:
        state.pop(LM_HEAD, None)
    elif LM_HEAD not in state:
        raise CheckpointError(
            f"{source}: expected lm_head.weight, which reasoning needs, found a text encoder without it. Use a file that "
            "holds it (the Qwen2.5-VL-7B-Instruct folder, the text_encoder/ of Step1X-Edit v1p2, a ComfyUI file with "
            "lm_head), or let another reasoner think and reflect (--reasoner none or remote:URL; in ComfyUI, Load Reasoner)."
        )
    if not need:
        config.tie_word_embeddings = False


def _fill_rotary(model: Any, device: torch.device) -> None:
    """Rotary frequencies are in no checkpoint; the modules that hold them are made anew, in float32."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            config = model.config.vision_config if ".visual." in name else model.config.get_text_config()
            fresh = _fresh_rotary(module, config)
            for key, buffer in fresh.named_buffers(recurse=False):
                setattr(module, key, buffer.to(device))
            if "original_inv_freq" not in fresh._buffers and hasattr(module, "original_inv_freq"):
                module.original_inv_freq = module.inv_freq
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"tensors without values: {_few(left)}"


def _fresh_rotary(module: Any, config: Any) -> Any:
    if type(module).__name__ == "Qwen2_5_VisionRotaryEmbedding":  # transformers 4.5x: takes the rotated size
        return type(module)(config.hidden_size // config.num_heads // 2)
    return type(module)(config)


def _model_folder(path: Path) -> Path:
    for folder in (path, path / "text_encoder"):
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(f"{path}: expected the config.json of a Qwen2.5-VL (or a text_encoder/ with one), found neither.")


def _depth(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    return 1 + max(int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix))


def _few(names: list[str], n: int = 5) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")
