"""The two small vocabularies of mini-brain: LLaVA's byte pairs, and those of the text encoder, which marks a word's end.

Learnt from what the drawn world says in English in its training split; mini-brain speaks English, as Stable Diffusion does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ...reasonedit_core.files import write_json
from ...reasonedit_core.mini.dice import Dice
from ...reasonedit_core.mini.items import CATEGORIES, item, scene
from ...reasonedit_core.mini.tokenizer import byte_tokens
from .brain_blank import WORD_END
from .readings import read_cells, read_scene

MERGES = 700
"""Of each vocabulary: nearly every word of the world is one token then."""

TEXTS = 4000
LANGUAGE = "en"

# The words that CLIP's tokenizer cuts a text into before it looks for pairs.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def learn_merges(kind: str, *, size: int = MERGES, texts: int = TEXTS, seed: int = 0) -> list[tuple[str, str]]:
    """The merges of `llava` or of `text` (CLIP's kind: lower case, no spaces, words end in a mark), in their order."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    clip = kind == "text"
    words = Tokenizer(models.BPE(end_of_word_suffix=WORD_END) if clip else models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not clip)
    if clip:
        words.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        cut = pre_tokenizers.Split(Regex(_WORDS), "removed", invert=True)
        as_bytes = pre_tokenizers.Sequence([cut, as_bytes])
    words.pre_tokenizer = as_bytes
    letters = byte_tokens()
    trainer = trainers.BpeTrainer(
        vocab_size=size + len(letters) * (2 if clip else 1),
        show_progress=False,
        initial_alphabet=letters,
        **({"end_of_word_suffix": WORD_END} if clip else {}),
    )
    words.train_from_iterator(world_words(texts, seed), trainer)
    pairs = json.loads(words.to_str())["model"]["merges"]
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]


def world_words(count: int, seed: int = 0) -> Iterator[str]:
    """What is said about `count` scenes: instructions of all kinds, descriptions, questions and answers."""
    kinds = (*CATEGORIES, "concrete", "compound")
    for number in range(count):
        dice = Dice("brain words", seed, number)
        drawn = item(dice.below(1 << 62), kinds[number % len(kinds)], "train", LANGUAGE)
        yield f"{drawn.instruction} {drawn.concrete}"
        read = read_cells if number % 2 else read_scene
        for question, answer in read(scene(dice.below(1 << 62)), LANGUAGE, dice):
            yield f"USER: {question} ASSISTANT: {answer}"


def write_merges(folder: Path, **how: int) -> Path:
    """Learn and keep both: FOLDER/llava.json and text.json."""
    for kind in ("llava", "text"):
        write_json(folder / f"{kind}.json", [list(pair) for pair in learn_merges(kind, **how)])
    return folder


def read_merges(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """What `write_merges` has kept, by kind."""
    found = {kind: json.loads((folder / f"{kind}.json").read_text(encoding="utf-8")) for kind in ("llava", "text")}
    return {kind: [tuple(pair) for pair in pairs] for kind, pairs in found.items()}
