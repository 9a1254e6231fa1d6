"""Constrained replies: whatever the logits, within whatever budget, the reply parses in its form."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import ConfigError, ReasonerError
from reasonedit.reasonedit_core.mllm.constrain import FORMS, Code, Reply, Vocabulary, least_tokens, readable, scan

MERGED = [b'",', b'"}', b'."', b'\\"', b"\\\\", b"\\n", b'\\"}', b"<#", b" <", b"<<", b"#S", b"#>", b" <#S", b"Success", b"yes"]
MERGED += [b"partial", b"par", b"no", b"10", b"7.", b"12", b"], ", b", ", b" the", b"red", b" car", b"\n\n", b"> ok"]
MERGED += ["红".encode()]
EOS, IMAGE, END = 256 + len(MERGED), 257 + len(MERGED), 258 + len(MERGED)


def make_vocabulary(merged=True):
    """All bytes, tokens of several bytes that cross every border of every form, and control tokens."""
    pieces = [bytes([b]) for b in range(256)] + (MERGED if merged else [b"."] * len(MERGED)) + [None, None, None, None]
    longest_first = sorted((p for p in pieces if p), key=len, reverse=True)
    ids = {p: i for i, p in reversed(list(enumerate(pieces))) if p}

    def encode(text):
        data, found = text.encode(), []
        while data:
            piece = next(p for p in longest_first if data.startswith(p))
            found.append(ids[piece])
            data = data[len(piece) :]
        return found

    return Vocabulary(pieces, [EOS, END], encode)


WORDS = make_vocabulary()
BYTES = make_vocabulary(merged=False)
TROUBLE = [i for i, p in enumerate(WORDS.pieces) if p is None or any(b in b'"\\<#>}]\n\x00' for b in p)]
SPACES = [i for i, p in enumerate(WORDS.pieces) if p and not p.strip()]


def write(form, budget, seed, vocabulary=WORDS, boost=(), by=8.0):
    """A reply from random logits; `boost` makes some tokens likely. Returns the reply and all tokens that were fed."""
    rng = torch.Generator().manual_seed(seed)
    reply = Reply(form, vocabulary, budget)
    fed = list(reply.opening)
    while not reply.done:
        logits = torch.randn(len(vocabulary.pieces), generator=rng) * 3
        logits[list(boost)] += by
        narrowed = reply.narrow(logits)
        assert torch.isfinite(narrowed).any(), "no token is left"
        fed += reply.take(int(narrowed.argmax()))
    return reply, fed


def check(form, text):
    if form == "free":
        assert text.strip()
    elif form == "consistency":
        value = json.loads(text)
        assert list(value) == ["meets_instruction", "major_conflicts", "minor_conflicts", "omissions", "raw_score", "reason"]
        assert value["meets_instruction"] in ("yes", "partial", "no")
        assert all(type(value[k]) is int and value[k] >= 0 for k in ("major_conflicts", "minor_conflicts", "omissions"))
        assert 0 <= value["raw_score"] <= 10 and value["reason"]
    elif form == "pair":
        value = json.loads(text)
        assert list(value) == ["score", "reasoning"] and len(value["score"]) == 2 and value["reasoning"]
        assert all(0 <= score <= 10 for score in value["score"])
    else:
        match = re.fullmatch(r"<#Think>(.*?)<#(Success|Failed|Others|Reflection)>(.*)", text, re.S)
        assert match, text
        assert match[1].strip() and "<#" not in match[1] and "<#" not in match[3]
        assert bool(match[3].strip()) == (match[2] == "Reflection")


@settings(max_examples=400, derandomize=True, deadline=None)
@given(
    form=st.sampled_from(list(FORMS)),
    budget=st.integers(16, 60) | st.just(32),
    seed=st.integers(0, 10**6),
    vocabulary=st.sampled_from([WORDS, BYTES]),
    boost=st.sampled_from([(), TROUBLE, SPACES, [EOS, IMAGE, END], [ord("\\"), ord("<")], [0xE7, 0x80]]),
)
def test_every_reply_parses_within_its_budget(form, budget, seed, vocabulary, boost):
    reply, _ = write(form, budget, seed, vocabulary, boost)
    assert reply.chosen <= budget
    check(form, reply.text.strip())


@pytest.mark.parametrize("form", list(FORMS))
def test_smallest_budget_holds_and_one_less_is_refused(form):
    least = least_tokens(FORMS[form])
    for seed in range(40):
        for boost in ((), TROUBLE, [ord("1"), ord(".")]):
            reply, _ = write(form, least, seed, BYTES, boost)
            assert reply.chosen <= least
            check(form, reply.text.strip())
    with pytest.raises(ReasonerError, match=f"at least {least} .* found {least - 1}"):
        Reply(form, WORDS, least - 1)


@pytest.mark.parametrize("form", ["consistency", "verdict", "pair"])
def test_what_was_fed_spells_the_reply(form):
    """The model must have read what it is said to have written, up to the closing part, which nobody reads any more."""
    foreign = [i for i, p in enumerate(WORDS.pieces) if p and not p.isascii()]
    for seed in range(60):
        # No bytes of characters: those that a mark cuts short are fed and are not part of the text.
        reply, fed = write(form, 60, seed, boost=foreign, by=-50.0)
        spelled = text_of(fed).decode()
        assert reply.text.startswith(spelled) and len(reply.text) - len(spelled) < 14


def follow(form, *pieces, budget=60, vocabulary=WORDS):
    """A reply in which the model chooses exactly these pieces; checks that each was on offer."""
    reply = Reply(form, vocabulary, budget)
    fed = [reply.opening]
    for piece in pieces:
        token = piece if isinstance(piece, int) else vocabulary.ids[piece]
        assert torch.isfinite(reply.narrow(torch.zeros(len(vocabulary.pieces)))[token]), piece
        fed.append(reply.take(token))
    return reply, fed


def text_of(tokens):
    return b"".join(WORDS.pieces[token] for token in tokens)


def test_a_json_text_ends_at_the_first_unescaped_quote():
    reply, fed = follow("pair", b"7.", b"5", b"8", b"], ", b"red", b'\\"', b" car", b'\\"', b'."')
    assert json.loads(reply.text) == {"score": [7.5, 8], "reasoning": 'red" car".'} and reply.done


def test_one_continuation_is_not_asked_for():
    """`par` can only become `partial`: the rest and the next literal are fed at once."""
    reply, fed = follow("consistency", b"par")
    assert text_of(fed[1]) == b'partial", "major_conflicts": '
    assert reply.text == '{"meets_instruction": "partial", "major_conflicts": '


def test_a_token_of_the_next_literal_ends_a_number():
    reply, fed = follow("consistency", b"yes", b"1", b", ")
    assert text_of(fed[3]) == b', "minor_conflicts": '
    assert reply.text.endswith('"major_conflicts": 1, "minor_conflicts": ')


@pytest.mark.parametrize("way", [[b"<#"], [b"<", b"#S"], [b" <#S"], [b" <", b"#"]])
def test_every_spelling_of_the_mark_closes_the_thinking(way):
    reply, fed = follow("verdict", b"red", *way)
    assert reply.text.replace(" ", "") == "<#Think>red<#"
    assert text_of(sum(fed, [])).replace(b" ", b"") == b"<#Think>red<#"
    token = WORDS.ids[b"F"]
    assert reply.take(token) == [] and reply.done and reply.text.replace(" ", "") == "<#Think>red<#Failed>"


def test_end_of_turn_ends_an_instruction_but_no_thinking():
    reply = Reply("verdict", WORDS, 40)
    zeros = torch.zeros(len(WORDS.pieces))
    reply.take(WORDS.ids[b"red"])
    assert torch.isinf(reply.narrow(zeros)[EOS])
    for piece in (b"<#", b"R"):
        reply.take(WORDS.ids[piece])
    assert torch.isinf(reply.narrow(zeros)[EOS]), "an instruction must not be empty"
    reply.take(WORDS.ids[b" car"])
    assert torch.isfinite(reply.narrow(zeros)[EOS])
    assert reply.take(EOS) == [] and reply.done and reply.text == "<#Think>red<#Reflection> car"


def test_thinking_leaves_room_for_the_instruction():
    reply = Reply("verdict", WORDS, 40)
    taken = 0
    while reply.text.count("<#") == 1:
        reply.take(WORDS.ids[b"red"])
        taken += 1
    assert taken == 30  # a quarter of 40 is kept back
    reply.take(WORDS.ids[b"R"])
    while not reply.done:
        reply.take(WORDS.ids[b" car"])
    assert reply.chosen == 40 and reply.text.count(" car") == 9


def test_free_text_hides_nothing_once_it_is_visible():
    reply = Reply("free", WORDS, 8)
    logits = torch.randn(len(WORDS.pieces))
    assert torch.isinf(reply.narrow(logits)[[EOS, END]]).all()
    reply.take(WORDS.ids[b"red"])
    assert torch.equal(reply.narrow(logits), logits)
    assert reply.take(IMAGE) == [IMAGE] and reply.text == "red"  # a control token is fed and not written
    assert reply.take(END) == [] and reply.done


def test_scan_by_hand():
    assert scan("json", b'a"b', False) == (Code.CLOSES, 1)
    assert scan("json", b'"', True)[0] is Code.STAYS
    assert scan("json", b"\\", False)[0] is Code.HANGS
    assert scan("json", b"x", True)[0] is Code.BREAKS  # \x is no escape
    assert scan("json", b"\n", False)[0] is Code.BREAKS
    assert scan("tagged", b"a<", False)[0] is Code.HANGS
    assert scan("tagged", b"#", False)[0] is Code.STAYS
    assert scan("tagged", b"#", True) == (Code.CLOSES, 0)


def test_readable_leaves_an_incomplete_character_out():
    data = "红色".encode()
    assert readable(data) == "红色" and readable(data[:-1]) == "红" and readable(b"a\xff") == "a\ufffd"


def test_unknown_form_is_named():
    with pytest.raises(ConfigError, match="'prose'"):
        Reply("prose", WORDS, 10)
