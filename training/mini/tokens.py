"""The tokenizer of the miniatures: byte pairs learnt from what the drawn world and the prompts say, in both languages.

The vocabulary is Qwen's in form (byte level, `!` is id 0, special tokens at the end) and small: the words of the world and of
the prompts that are asked again and again. It is learnt from the training split only and follows from the seed.

Chinese has no spaces, so byte pairs alone would make one token of "large red circle", and a joining that was never seen would
be spelt in tokens that were never learnt. What the world says in Chinese is therefore cut into words before it is counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.mini.tokenizer import (
    BYTES,
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    WORDS,
    byte_tokens,
    byte_vocabulary,
    vocabulary_size,
    write_tokenizer,
)

SIZE = 2048
"""Ids in all."""

SEED = 5
TEXTS = 6000
"""Items of the world that the corpus is made of."""

PROMPTS = 60
"""How often the corpus repeats each prompt; those of the tasks that the miniatures do not train, a tenth of it."""

LONGEST = 24
"""Bytes of the longest token: whole clauses of a Chinese prompt would else take the place of the world's words."""

_CUT = "\0"
"""Between two words that are counted apart."""

_SELDOM = ("reflect_paired", "edit_score", "edit_score_paired", "quality_score")


class Vocabulary(NamedTuple):
    """vocab: ids of the ordinary tokens; merges: how the longer ones come about."""

    vocab: dict[str, int]
    merges: tuple[tuple[str, str], ...]


def learn_tokens(size: int = SIZE, *, seed: int = SEED, texts: int = TEXTS, prompts: int = PROMPTS) -> Vocabulary:
    """Learn `size` ids, special tokens included, from `texts` items of the world and the prompts.

    ConfigError for a size that holds no more than the bytes, or that the texts do not fill.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    merges_wanted = size - vocabulary_size(BYTES)
    if merges_wanted < 1:
        raise ConfigError(f"tokenizer: expected more than {vocabulary_size(BYTES)} ids, found {size}. Raise the size.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    cuts, as_bytes = pre_tokenizers.Split(_CUT, "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cuts, words, as_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=BYTES + merges_wanted,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=byte_tokens(),
        max_token_length=LONGEST,
    )
    tokenizer.train_from_iterator(corpus(seed, texts, prompts), trainer)
    merges = _merges(tokenizer)
    if len(merges) < merges_wanted:
        raise ConfigError(f"tokenizer: expected text for {size} ids, found enough for {len(merges)} merges. Take more texts.")
    vocab = byte_vocabulary()
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    return Vocabulary(vocab, merges)


def write_tokens(folder: Path, learnt: Vocabulary) -> Path:
    """Write the tokenizer files of a Qwen2.5-VL folder and return the folder."""
    write_tokenizer(folder, vocab=learnt.vocab, merges=learnt.merges)
    return folder


def read_tokens(folder: Path) -> Vocabulary:
    """The vocabulary of a folder that `write_tokens` wrote. ConfigError where its files are not there."""
    names = (folder / "vocab.json", folder / "merges.txt")
    absent = [path.name for path in names if not path.is_file()]
    if absent:
        raise ConfigError(f"{folder}: expected a tokenizer's vocab.json and merges.txt, missing: {', '.join(absent)}.")
    lines = names[1].read_text(encoding="utf-8").splitlines()[1:]
    merges = tuple((left, right) for left, right in (line.split(" ") for line in lines))
    return Vocabulary(json.loads(names[0].read_text(encoding="utf-8")), merges)


def _merges(tokenizer) -> tuple[tuple[str, str], ...]:
    """The merges in their order, each of which makes a new token."""
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return tuple(tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs)


# ---- what it is learnt from ----------------------------------------------------------------------------------------------


def corpus(seed: int = SEED, texts: int = TEXTS, prompts: int = PROMPTS) -> Iterator[str]:
    """What the world says in its training split, and the prompts, each `prompts` times (the seldom ones less often)."""
    for text, often in prompt_texts():
        yield from [text] * (prompts if often else -(-prompts // 10))
    yield from (_cut(text) for text in world_texts(seed, texts))


def _cut(text: str) -> str:
    """The text with its Chinese words apart: those of `_chinese_words`, and every other character."""
    return re.sub("[\u3001-\u9fff\uff01-\uff5e]+", lambda run: _CUT + _CUT.join(_chinese_words().findall(run[0])) + _CUT, text)


@cache
def _chinese_words() -> re.Pattern[str]:
    """Matches one word at a time, the longest that is known; what is not known is one character."""
    from ...reasonedit_core.mini import words_zh
    from ...reasonedit_core.mini.edits import EDIT_KINDS
    from ...reasonedit_core.mini.wordings import wordings

    tables = (words_zh.NOUNS, words_zh.STATES, words_zh.BECOMES, words_zh.COLOURS, words_zh.LARGER, words_zh.BACKGROUNDS)
    names = [name for table in tables for value in table.values() for name in ([value] if isinstance(value, str) else value)]
    names += [name for place in words_zh.PLACES for name in place]
    names += [f"一{measure}" for measure in {"个", *words_zh.MEASURES.values()}]
    names += [wording.pattern for kind in EDIT_KINDS for wording in wordings(kind, "zh") if wording.split == "train"]
    runs = (run for name in names for run in re.findall("[\u3400-\u9fff]+", re.sub("{[a-z]+}", " ", name)))
    pieces = {run.removeprefix("的") or run for run in runs}
    return re.compile("|".join([*sorted(pieces, key=lambda piece: (-len(piece), piece)), "."]))


def prompt_texts() -> Iterator[tuple[str, bool]]:
    """The fixed words of every prompt without control tokens, and whether the miniatures are asked it in training."""
    from ...reasonedit_core.conditioners.qwen_image import read_template, read_text_template
    from ...reasonedit_core.dialogue.pack import OWN_LANGUAGES
    from ...reasonedit_core.dialogue.prompts import default_pack

    for language in OWN_LANGUAGES:
        pack = default_pack().in_language(language)
        for name, task in pack.tasks.items():
            often = name not in _SELDOM
            for template in (task.system, *(part.text for part in task.user)):
                yield from ((text, often) for text in template if isinstance(text, str))
    yield from ((each.prefix, name == "step1x-v1p2") for name, each in default_pack().conditioning.items())
    controls = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    edit = read_template(plus=True)
    for text in (edit.dialogue, edit.picture or "", read_text_template().dialogue, _spoken(CHAT_TEMPLATE)):
        for piece in controls.split(text):
            yield from ((part, True) for part in piece.split("{}") if part)


def _spoken(template: str) -> str:
    """The text within the tags of a chat template: what stands between quotes and is long enough to be words."""
    return "".join(found for found in re.findall(r"'([^']*)'", template) if " " in found).replace("\\n", "\n")


def world_texts(seed: int, count: int) -> Iterator[str]:
    """Whatever is said about `count` items of the training split: asked, thought, described, judged, questioned, answered."""
    from ...reasonedit_core.dialogue.answers import say_consistency
    from ...reasonedit_core.mini.dice import Dice, digest
    from ...reasonedit_core.mini.faults import plant
    from ...reasonedit_core.mini.items import item, scene
    from ...reasonedit_core.mini.texts import caption, questions, target_description

    for number in range(count):
        one = item(digest("tokens", seed, number), ("concrete", "abstract", "concrete", "compound")[number % 4])
        yield from (one.instruction, one.canonical, target_description(one.source, one.target, one.language))
        fault = plant(one, number, "right" if number % 2 else None)
        if fault is not None:
            found = fault.assessment
            yield say_consistency(found.score, found.scorer, found.findings)
            yield f"<#Think> {found.reason} <#Success><#Reflection> {found.instruction or ''}<#Failed>"
        dice, drawn = Dice("tokens", seed, number), scene(digest("tokens", "scene", seed, number))
        language = one.language
        yield caption(drawn, language, dice)
        yield from (text for pair in questions(drawn, language, dice) for text in pair)
