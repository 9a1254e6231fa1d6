"""The tokenizer of the miniatures: what it is learnt from, its files, and how the world's words come out of it."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.mini import items, words_zh
from reasonedit.reasonedit_core.mini.tokenizer import SPECIAL_TOKENS, byte_vocabulary, write_tokenizer
from reasonedit.reasonedit_core.mini.wordings import wordings
from reasonedit.training.mini import tokens

SIZE, TEXTS, PROMPTS = 1400, 400, 4


@pytest.fixture(scope="module")
def learnt():
    return tokens.learn_tokens(SIZE, texts=TEXTS, prompts=PROMPTS)


@pytest.fixture(scope="module")
def tokenizer(learnt, tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokens.write_tokens(tmp_path_factory.mktemp("tokenizer"), learnt))


def test_the_ids_are_qwens_in_form(learnt, tokenizer):
    assert len(tokenizer) == SIZE and len(learnt.vocab) == SIZE - len(SPECIAL_TOKENS)
    assert tokenizer("!").input_ids == [0]
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(SIZE - len(SPECIAL_TOKENS), SIZE))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_learning_again_gives_the_same(learnt):
    assert tokens.learn_tokens(SIZE, texts=TEXTS, prompts=PROMPTS) == learnt
    assert tokens.learn_tokens(SIZE, seed=6, texts=TEXTS, prompts=PROMPTS) != learnt


def test_what_was_written_is_read_again(learnt, tmp_path):
    assert tokens.read_tokens(tokens.write_tokens(tmp_path, learnt)) == learnt
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(ConfigError, match=r"merges\.txt"):
        tokens.read_tokens(tmp_path)


def test_the_files_without_tokenizer_json_give_the_same_ids(learnt, tokenizer, tmp_path):
    """Qwen-Image's tokenizer folder has none; what the library makes of vocabulary and merges must not differ."""
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path, fast_file=False, vocab=learnt.vocab, merges=learnt.merges)
    slow = AutoTokenizer.from_pretrained(tmp_path)
    for number in range(40):
        one = items.item(number, ("concrete", "abstract")[number % 2])
        text = f"<|im_start|>user\n{one.instruction} it's 12,  \n\n{one.concrete}<|im_end|>\n"
        assert slow(text).input_ids == tokenizer(text).input_ids


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="<")))
def test_any_text_comes_back(tokenizer, text):
    text = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_a_chinese_token_is_no_more_than_a_word(tokenizer):
    """Colour, size and noun are tokens of their own, so that a joining that was never seen is spelt in known tokens."""
    for colour in ("红色", "紫色"):
        for noun in (names[0] for names in words_zh.NOUNS.values()):
            pieces = [tokenizer.decode([one]) for one in tokenizer(f"一个{colour}小{noun}。").input_ids]
            assert colour in pieces and "小" in pieces, pieces


def test_the_vocabulary_is_mostly_of_whole_words(tokenizer):
    for words, most in (("Change the colour of the red circle in the top left to blue.", 16), ("把左上角的红色圆形变大。", 10)):
        assert len(tokenizer(words).input_ids) <= most
    texts = [text for text, often in tokens.prompt_texts() if often]
    assert sum(len(tokenizer(text).input_ids) for text in texts) < sum(len(text.encode()) for text in texts) / 2


def test_only_the_training_split_is_read(monkeypatch):
    drawn, draw = [], items.item
    monkeypatch.setattr(items, "item", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    said = "\n".join(tokens.world_texts(1, 200))
    assert len(drawn) == 200 and {one.split for one in drawn} == {"train"}
    held = [each.pattern for each in wordings("background", "en") if each.split == "held_out"]
    kept = [each.pattern for each in wordings("background", "en") if each.split == "train"]
    grounds = ("a night sky", "a day sky", "plain white", "a meadow", "a wooden table", "plain grey")
    assert not any(pattern.format(ground=ground) in said for pattern in held for ground in grounds)
    assert any(pattern.format(ground=ground) in said for pattern in kept for ground in grounds)


def test_no_control_token_and_no_placeholder_in_what_the_prompts_say():
    texts = [text for text, _ in tokens.prompt_texts()]
    assert not any("<|" in text or "{}" in text for text in texts)
    assert any("You look at pictures" in text for text in texts)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="expected more than 264 ids"):
        tokens.learn_tokens(264)
    with pytest.raises(ConfigError, match="enough for"):
        tokens.learn_tokens(9000, texts=2, prompts=1)


@pytest.mark.parametrize(
    "merges, extra", [((("a", "b"), ("abc", "d")), {"ab": 256}), ((("a", "b"),), {}), ((("a", "b"),), {"ab": 300})]
)
def test_a_vocabulary_that_does_not_fit_its_merges_is_refused(merges, extra, tmp_path):
    with pytest.raises(ConfigError, match="merges: expected|vocab: expected"):
        write_tokenizer(tmp_path, vocab={**byte_vocabulary(), **extra}, merges=merges)
    assert not (tmp_path / "vocab.json").exists()


def test_the_tokenizer_json_splits_words_as_qwen_does(learnt, tmp_path):
    state = json.loads((tokens.write_tokens(tmp_path, learnt) / "tokenizer.json").read_text())
    assert [part["type"] for part in state["pre_tokenizer"]["pretokenizers"]] == ["Split", "ByteLevel"]
    assert len(state["model"]["merges"]) == SIZE - 264
