"""A byte-level Qwen2 tokenizer small enough to write by hand, and the processor files beside it.

256 byte tokens in the order of GPT-2 (so `!` is id 0, as in the vocabulary of Qwen), no merges unless they are given, and the
special tokens that the dialogue and the pictures need. The files are the ones of the hub; every supported transformers reads
the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError

Merges = Sequence[tuple[str, str]]
"""Pairs of tokens that become one, the most wanted first."""

BYTES = 256

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Qwen2's pattern of words: no token reaches over the end of one. The slow tokenizer files do not state it."""

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CHAT_TEMPLATE = r"""{%- set seen = namespace(images=0, videos=0) -%}
{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\nYou look at pictures and answer.<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message['role'] ~ '\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
                {%- set seen.images = seen.images + 1 -%}
                {%- if add_vision_id -%}{{- 'Picture ' ~ seen.images ~ ': ' -}}{%- endif -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part['type'] == 'video' or 'video' in part -%}
                {%- set seen.videos = seen.videos + 1 -%}
                {%- if add_vision_id -%}{{- 'Video ' ~ seen.videos ~ ': ' -}}{%- endif -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif 'text' in part -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""


def byte_tokens() -> list[str]:
    """The 256 characters that stand for bytes, in GPT-2 order: printable bytes first, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def byte_vocabulary() -> dict[str, int]:
    """The vocabulary of bytes alone."""
    return {token: n for n, token in enumerate(byte_tokens())}


def special_token_ids(ordinary: int = BYTES) -> dict[str, int]:
    """Ids of the special tokens: they follow the ordinary ones."""
    return {token: ordinary + n for n, token in enumerate(SPECIAL_TOKENS)}


def vocabulary_size(ordinary: int = BYTES) -> int:
    """Number of ids of the tokenizer, special tokens included."""
    return ordinary + len(SPECIAL_TOKENS)


def write_json(path: Path, value: object) -> None:
    """Write JSON in the one form that keeps the files the same bit for bit: UTF-8, two spaces, one final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def write_tokenizer(
    folder: Path, *, fast_file: bool = True, vocab: Mapping[str, int] | None = None, merges: Merges = ()
) -> None:
    """Write the tokenizer files of a Qwen2.5-VL folder. fast_file: tokenizer.json too; some releases lack it.

    vocab: ids of the ordinary tokens, 0 to their number - 1, by default those of the bytes; the special ones follow. merges:
    how its longer tokens come about. ConfigError where the two do not fit.
    """
    vocab = dict(byte_vocabulary() if vocab is None else vocab)
    _check_vocabulary(vocab, merges)
    folder.mkdir(parents=True, exist_ok=True)
    special = special_token_ids(len(vocab))
    added = [_added_token(token, n) for token, n in special.items()]
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    write_json(folder / "added_tokens.json", special)
    write_json(folder / "special_tokens_map.json", _special_tokens_map())
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added},
            **_special_tokens_map(),
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 131072,
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="\n")
    if fast_file:
        write_json(folder / "tokenizer.json", _tokenizer_json(vocab, merges, added))


def _check_vocabulary(vocab: Mapping[str, int], merges: Merges) -> None:
    known = dict.fromkeys(byte_tokens())
    for left, right in merges:
        if left not in known or right not in known:
            raise ConfigError(f"merges: expected parts that are bytes or came about before, found {left!r} {right!r}.")
        known[left + right] = None
    if vocab.keys() != known.keys() or sorted(vocab.values()) != list(range(len(known))):
        raise ConfigError(
            f"vocab: expected the {BYTES} bytes and what the {len(merges)} merges make, numbered from 0, found {len(vocab)} "
            "tokens that are not these. Take both from one training."
        )


def write_processor(folder: Path, *, min_pixels: int, max_pixels: int, processor_class: str) -> None:
    """Write preprocessor_config.json: patch 14, merge 2, the normalisation of CLIP, and the bounds on the pixels."""
    write_json(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": True,
            "do_normalize": True,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_processor_type": "Qwen2VLImageProcessor",
            "image_std": [0.26862954, 0.26130258, 0.27577711],
            "max_pixels": max_pixels,
            "merge_size": 2,
            "min_pixels": min_pixels,
            "patch_size": 14,
            "processor_class": processor_class,
            "resample": 3,
            "rescale_factor": 1 / 255,
            "size": {"longest_edge": max_pixels, "shortest_edge": min_pixels},
            "temporal_patch_size": 2,
        },
    )


def _special_tokens_map() -> dict[str, object]:
    return {
        "additional_special_tokens": [t for t in SPECIAL_TOKENS if t not in ("<|endoftext|>", "<|im_end|>")],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }


def _added_token(content: str, token_id: int) -> dict[str, object]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"id": token_id, "content": content, **flags}


def _tokenizer_json(vocab: dict[str, int], merges: Merges, added: list[dict[str, object]]) -> dict[str, object]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    # Without merges no split of the text into words can change a token, so the word pattern of Qwen is left out.
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    words = {"type": "Sequence", "pretokenizers": [split, byte_level]} if merges else byte_level
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": words,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocab,
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }
