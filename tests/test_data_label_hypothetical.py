"""Whether words suppose something and keep the outcome to themselves."""

from __future__ import annotations

import json

import pytest

from reasonedit.reasonedit_core.errors import MalformedReply
from reasonedit.training.data.label.hypothetical import MOST_WORDS, content_words, leak, length_of, supposes, unfit
from reasonedit.training.data.label.replies import Rewritten, UnfitReply, read_reply

BEFORE, AFTER = "An ice cube lies on a wooden table.", "A puddle of water lies on a wooden table."


def test_words_count_by_their_stems_and_stop_words_do_not():
    assert content_words("Melting ice, melted ices!") == content_words("ice melts") == {"melt", "ice"}
    assert content_words("what if it would") == frozenset()
    assert content_words("Stopped cars") == content_words("stopping car")
    assert content_words("把冰块融化") == {"把冰", "冰块", "块融", "融化"}


@pytest.mark.parametrize(
    ("words", "share"),
    [
        ("What if the sun shines on it for an hour?", 0.0),
        ("What if it turns into a puddle?", 0.5),
        ("What if there is a water puddle?", 1.0),
        ("What if the ice cube is left on the table?", 0.0),  # the source has these words too
    ],
)
def test_only_words_that_the_outcome_alone_has_are_given_away(words, share):
    assert leak(words, BEFORE, AFTER) == share


def test_what_only_goes_away_has_no_words_to_give_away_and_equal_captions_have_no_outcome():
    assert leak("What if a thief comes by?", "A ring and a cup.", "A cup.") == 0.0
    assert leak("What if?", BEFORE, f" {BEFORE} ") is None


def test_chinese_is_held_to_the_same_rule():
    before, after = "桌上有一块冰。", "桌上有一滩水。"
    assert leak("如果太阳晒了一个小时，会怎么样？", before, after) == 0.0
    assert leak("如果变成一滩水呢？", before, after) > 0.3


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        ("What would happen to the ice?", True),
        ("Suppose an hour passes.", True),
        ("Show it after the storm.", True),
        ("如果下雨呢？", True),
        ("假设停电了。", True),
        ("Paint the cup red.", False),
        ("把杯子涂成红色。", False),
        ("Show the iffy suppository.", False),  # parts of words are none
    ],
)
def test_a_question_or_a_supposition(words, holds):
    assert supposes(words) is holds


@pytest.mark.parametrize(
    ("instruction", "before", "after", "code"),
    [
        ("What if an hour passes in the sun?", BEFORE, AFTER, None),
        ("Leave it in the sun.", BEFORE, AFTER, "not-hypothetical"),
        ("What if it becomes a puddle of water?", BEFORE, AFTER, "leaks"),
        ("What if nothing happens?", BEFORE, BEFORE, "no-change"),
        ("What if " + "the sun " * MOST_WORDS + "?", BEFORE, AFTER, "too-long"),
    ],
)
def test_each_fault_has_its_code(instruction, before, after, code):
    found = unfit(instruction, before, after)
    assert (found and found[0]) == code


def test_two_chinese_characters_are_as_long_as_a_word():
    assert length_of("太阳晒了") == 2 and length_of("one two three") == 3


def test_the_annotator_is_told_what_gave_the_outcome_away():
    told = {"instruction": "What if it becomes a puddle of water?", "source_caption": BEFORE, "target_caption": AFTER}
    with pytest.raises(UnfitReply, match="names it: puddl, water") as caught:
        read_reply(json.dumps({**told, "objects": ["ice"]}), Rewritten)
    assert caught.value.reason == "leaks" and isinstance(caught.value, MalformedReply)
