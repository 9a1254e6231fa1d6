"""Small checkpoints with random weights in the released layouts, and the pictures that all arms of a run share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_json
from ..images import quantize, resize_bicubic_pil, to_pil
from ..mini.builder import build_checkpoint
from ..mini.tokenizer import byte_tokens, byte_vocabulary, special_token_ids, vocabulary_size, write_tokenizer
from ..settings import FILE_NAME

if TYPE_CHECKING:
    import torch

INSTRUCTION = "make the cube red"
SEED = 26
DROPPED = 90
"""Leading tokens cut from the conditioning of ReasonEdit-S, as the release cuts them from its own prompt."""

STD = 0.1
"""Of the weights: enough that words and pictures show in what comes out, so that arms can be compared."""

_DIT = {"num_attention_heads": 4, "attention_head_dim": 32, "axes_dims_rope": [8, 12, 12]}
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "step1x-v1p2": {"transformer": {**_DIT, "num_layers": 2, "num_single_layers": 4}},
    "qwen-edit-plus": {"transformer": {**_DIT, "num_layers": 4}},
    "qwen2.5-vl": {
        "text_encoder": {
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 4,
            "rope_scaling": {"mrope_section": [8, 12, 12]},
            "vision_config": {"out_hidden_size": 256, "hidden_size": 64, "intermediate_size": 160},
        }
    },
}
"""What a benchmark's checkpoint has in place of the builder's own sizes, which are too small to time."""


MERGES = 700
"""Of the reflections' tokenizer. Prompts then have about 4 characters per token, as with the released tokenizer; in bytes the
text would outweigh the pictures, which it never does."""


def write_checkpoint(system: str, folder: Path) -> Path:
    """The checkpoint that the timed arms of `system` share."""
    speaks = system == "qwen2.5-vl"
    config = _with_words(SIZES[system]) if speaks else SIZES[system]
    build_checkpoint(system, folder, seed=SEED, std=STD, config=config)
    if speaks:
        write_words(folder)
    if system == "step1x-v1p2":
        write_json(folder / FILE_NAME, {"dropped_tokens": DROPPED, "dialogue": "own"})
    return folder


def _with_words(config: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The config of an MLLM whose tokenizer has MERGES more tokens than bytes: special tokens come behind them."""
    ids = special_token_ids(len(byte_tokens()) + MERGES)
    ends = {"bos_token_id": ids["<|endoftext|>"], "pad_token_id": ids["<|endoftext|>"]}
    named = {
        "eos_token_id": ids["<|im_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "vocab_size": vocabulary_size(len(byte_tokens()) + MERGES),
    }
    text = {**config["text_encoder"], **ends, **named}
    return {"text_encoder": text, "generation": {**ends, "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}}


def write_words(folder: Path) -> None:
    """A tokenizer in `folder` with words, learnt from our own English prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from ..dialogue.prompts import load_pack, render

    pack, names = load_pack("en"), {"source": "source", "result": "result"}
    values = {"instruction": INSTRUCTION, "target": "A red cube.", "score": 8.0, "reason": "so it looks"}
    queries = [render(pack, task, "en", names, values) for task in pack.tasks]  # type: ignore[arg-type]
    texts = [text for query in queries for text in (query.system, *query.parts) if isinstance(text, str)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=len(byte_tokens()) + MERGES, show_progress=False, initial_alphabet=byte_tokens())
    tokenizer.train_from_iterator(texts, trainer)
    learnt = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = [tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in learnt]
    vocab = byte_vocabulary()
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    write_tokenizer(folder, vocab=vocab, merges=merges)


def picture(number: int, size: tuple[int, int] = (256, 256)) -> torch.Tensor:
    """A smooth picture (1, 3, H, W) of values k / 255; another one for each number. size: (width, height)."""
    import torch

    coarse = torch.rand((1, 3, 6, 6), generator=torch.Generator().manual_seed(number))
    return quantize(resize_bicubic_pil(coarse, *size).clamp(0, 1))


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (256, 256)) -> list[str]:
    """`count` different pictures as PNG files; their paths. Every repeat gets its own, so that nothing kept helps."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03d}.png" for number in range(count)]
    for number, path in enumerate(paths):
        to_pil(picture(number, size)).save(path)
    return [str(path) for path in paths]
