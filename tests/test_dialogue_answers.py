"""Answers that are learnt: each is read back as the value it was made of, and constrained decoding can say it."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.dialogue import answers
from reasonedit.reasonedit_core.dialogue.replies import (
    cap_score,
    parse_consistency,
    parse_description,
    parse_pair,
    parse_thought,
    parse_verdict,
)
from reasonedit.reasonedit_core.errors import DataError
from reasonedit.reasonedit_core.mini.tokenizer import byte_tokens, special_token_ids
from reasonedit.reasonedit_core.mllm.constrain import Reply, Vocabulary
from reasonedit.reasonedit_core.types import Decision

PLAIN = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="<>"), min_size=1, max_size=60)
# Letters first: what begins with a list number, a fence or a quote is refused, which has its own test.
WORDS = PLAIN.map(lambda text: answers.one_line("Ab " + text))
MARKS = st.integers(0, 100).map(lambda tenths: tenths / 10)


@pytest.fixture(scope="module")
def vocabulary():
    special = special_token_ids()
    to_byte = {char: bytes([byte]) for char, byte in zip(byte_tokens(), _byte_order(), strict=True)}
    pieces = [to_byte[char] for char in byte_tokens()] + [None] * len(special)
    ids = {piece: i for i, piece in enumerate(pieces) if piece}
    return Vocabulary(pieces, [special["<|im_end|>"]], lambda text: [ids[bytes([byte])] for byte in text.encode()])


def _byte_order():
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return printable + [byte for byte in range(256) if byte not in printable]


def sayable(form: str, text: str, vocabulary: Vocabulary) -> None:
    """Let the constrained decoder write `text`: every byte it may choose must be allowed, and nothing else come out."""
    reply = Reply(form, vocabulary, 4096)
    data, size = text.encode(), len(vocabulary.pieces)
    at = _fed(reply.opening, vocabulary)
    assert data.startswith(at)
    while not reply.done:
        rest = data[len(at) :]
        token = vocabulary.ids[rest[:1]] if rest else min(vocabulary.stops)
        allowed = reply.narrow(torch.zeros(size))[token]
        assert allowed == 0, f"{rest[:20]!r} cannot be said after {at[-40:]!r}"
        at += _fed(reply.take(token), vocabulary)
        assert data.startswith(at)
    assert reply.text == text


def _fed(tokens, vocabulary):
    return b"".join(vocabulary.pieces[token] or b"" for token in tokens)


# ---- free text -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(WORDS)
def test_thoughts_come_back(text):
    assert parse_thought(answers.say_thought(text)).instruction == text


@settings(deadline=None)
@given(WORDS)
def test_descriptions_come_back(text):
    assert parse_description(answers.say_description(text)) == text


@settings(max_examples=30, deadline=None)
@given(text=WORDS)
def test_thoughts_can_be_said(vocabulary, text):
    sayable("free", answers.say_thought(text), vocabulary)


def test_line_breaks_become_blanks():
    assert answers.say_thought(" Paint the kite\n\n  red.\t") == "Paint the kite red."
    assert answers.one_line("a\x00b\u2028c  d") == "a b c  d"


@pytest.mark.parametrize(
    "text", ['"Paint it."', "1. Paint it.", "```Paint it.```", "- Paint it.", "<think>x</think> y", "", "..."]
)
def test_thoughts_that_would_be_read_otherwise_are_refused(text):
    with pytest.raises(DataError):
        answers.say_thought(text)


# ---- the consistency score -----------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(MARKS, WORDS)
def test_scores_come_back_without_findings(mark, reason):
    found = parse_consistency(answers.say_consistency(mark, reason))
    assert (found.score, found.reason) == (answers.said_mark(mark), reason)


@settings(deadline=None)
@given(
    MARKS,
    WORDS,
    st.fixed_dictionaries(
        {
            "meets_instruction": st.sampled_from(answers.MEETS),
            "major_conflicts": st.integers(0, 3),
            "minor_conflicts": st.integers(0, 3),
            "omissions": st.integers(0, 3),
        }
    ),
)
def test_scores_come_back_with_their_findings_or_are_refused(mark, reason, findings):
    most, _ = cap_score(10.0, findings["meets_instruction"], findings["major_conflicts"], findings["omissions"])
    if answers.said_mark(mark) > most:
        with pytest.raises(DataError, match="that its findings allow"):
            answers.say_consistency(mark, reason, findings)
        return
    found = parse_consistency(answers.say_consistency(mark, reason, findings))
    assert found.score == answers.said_mark(mark)
    assert {key: found.fields[key] for key in findings} == findings


@settings(max_examples=30, deadline=None)
@given(mark=MARKS, reason=WORDS)
def test_scores_can_be_said(vocabulary, mark, reason):
    sayable("consistency", answers.say_consistency(mark, reason), vocabulary)


@pytest.mark.parametrize(("score", "said"), [(0.04, 0), (0.3, 0), (0.7, 1), (1.0, 1), (7.46, 7.5), (8.0, 8), (10, 10)])
def test_scores_are_said_as_replies_have_them(score, said):
    text = answers.say_consistency(score, "as seen")
    assert json.loads(text)["raw_score"] == said and f'"raw_score": {said},' in text


def test_findings_of_a_bare_score_grow_worse_with_it():
    found = [answers.findings_of(mark) for mark in (10, 8, 6, 4, 1)]
    assert [f["meets_instruction"] for f in found] == ["yes", "yes", "yes", "partial", "no"]
    assert [(f["major_conflicts"], f["minor_conflicts"], f["omissions"]) for f in found] == [
        (0, 0, 0),
        (0, 1, 0),
        (0, 0, 1),
        (1, 0, 0),
        (2, 0, 0),
    ]


@pytest.mark.parametrize(
    ("score", "reason", "findings"),
    [
        (11, "x", None),
        (float("nan"), "x", None),
        (5, " \n", None),
        (5, "x", {"meets_instruction": "maybe", "major_conflicts": 0, "minor_conflicts": 0, "omissions": 0}),
        (5, "x", {"meets_instruction": "yes", "major_conflicts": 100, "minor_conflicts": 0, "omissions": 0}),
    ],
)
def test_scores_that_cannot_be_said_are_refused(score, reason, findings):
    with pytest.raises(DataError):
        answers.say_consistency(score, reason, findings)


# ---- the two marks -------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(marks=st.tuples(MARKS, MARKS), reason=WORDS)
def test_pairs_come_back_and_can_be_said(vocabulary, marks, reason):
    text = answers.say_pair(marks, reason)
    assert parse_pair(text) == marks
    assert json.loads(text)["reasoning"] == reason
    sayable("pair", text, vocabulary)


def test_pairs_need_two_marks():
    with pytest.raises(DataError, match="two marks"):
        answers.say_pair([8], "x")


# ---- the verdict ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(decision=st.sampled_from(Decision), reason=WORDS, second=WORDS)
def test_verdicts_come_back_and_can_be_said(vocabulary, decision, reason, second):
    instruction = second if decision is Decision.REFINE else None
    assume(not (instruction or "").endswith("```"))
    text = answers.say_verdict(decision, reason, instruction)
    assert parse_verdict(text) == (decision, reason, instruction)
    sayable("verdict", text, vocabulary)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_whatever_the_reason_it_comes_back_or_is_refused(reason):
    try:
        text = answers.say_verdict(Decision.FAILED, reason)
    except DataError:
        return
    assert parse_verdict(text).reason == answers.one_line(reason)


@pytest.mark.parametrize(
    ("decision", "reason", "second", "match"),
    [
        (Decision.SUCCESS, "fine", "Paint it.", "second instruction"),
        (Decision.REFINE, "pale", None, "second instruction"),
        (Decision.REFINE, "pale", "...", "instruction after"),
        (Decision.FAILED, "a <#Success> b", None, "without <#Success>"),
        (Decision.FAILED, "a <# b", None, "without <#"),
        (Decision.REFINE, "a", "b <#Think> c", "without <#Think>"),
        (Decision.FAILED, "", None, "found no text"),
    ],
)
def test_verdicts_that_mean_nothing_are_refused(decision, reason, second, match):
    with pytest.raises(DataError, match=match):
        answers.say_verdict(decision, reason, second)
