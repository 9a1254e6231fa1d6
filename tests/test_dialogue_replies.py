"""Replies are read when they can mean one thing only; every other text is a MalformedReply, quickly."""

from __future__ import annotations

import json
import math
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.dialogue.replies import (
    MAX_REPLY,
    SCHEMAS,
    cap_score,
    parse_consistency,
    parse_description,
    parse_pair,
    parse_thought,
    parse_verdict,
)
from reasonedit.reasonedit_core.errors import MalformedReply
from reasonedit.reasonedit_core.types import Decision

PARSERS = (parse_consistency, parse_verdict, parse_pair, parse_thought, parse_description)
quick = settings(max_examples=80, derandomize=True, deadline=None)


def consistency(**changes) -> str:
    fields = {"meets_instruction": "yes", "major_conflicts": 0, "minor_conflicts": 2, "omissions": 0, "raw_score": 9.25}
    return json.dumps({**fields, "reason": "the kite is red", **changes})


# ---- the verdict ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(
    ("tag", "decision", "second"),
    [("<#Success>", Decision.SUCCESS, None), ("<#Failed>", Decision.FAILED, None), ("<#Reflection>", Decision.REFINE, "Turn")],
)
def test_verdict_reads_each_tag(tag, decision, second, released):
    verdict = parse_verdict(f"Sure!\n<#Think> The kite is blue.\n{tag}{second or ''}", released=released)
    assert verdict == (decision, "The kite is blue.", second)


def test_verdict_strips_the_instruction_except_under_released():
    text = "<#Think>no.<#Reflection> Make the kite red. \n"
    assert parse_verdict(text).instruction == "Make the kite red."
    # The reply as a whole is stripped by the released client, what follows the tag is not.
    assert parse_verdict(text, released=True).instruction == " Make the kite red."
    assert parse_verdict("```\n<#Think>no.\n<#Reflection> Go.\n```").instruction == "Go."


def test_others_is_a_success_only_under_released():
    text = "<#Think> cannot say <#Others>"
    assert parse_verdict(text, released=True).decision is Decision.SUCCESS
    with pytest.raises(MalformedReply, match="#Others"):
        parse_verdict(text)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize(
    "text",
    [
        "",
        "   \n",
        "The picture is fine.",
        "<#Success>",
        "<#Think> nothing decided",
        "<#Think> a <#Success> b <#Failed>",
        "<#Think> a <#Success> b <#Success>",
        "<#Success> <#Think> late",
        "＜#Think＞ 很好 ＜#Success＞",
        "这张图片很好，风筝是红色的。",
        "<#think> small <#success>",
    ],
)
def test_unreadable_verdicts_raise(text, released):
    with pytest.raises(MalformedReply, match="expected <#Think>"):
        parse_verdict(text, released=released)


def test_a_second_think_tag_is_a_failure_to_the_released_loop_and_unreadable_to_ours():
    text = "<#Think> a <#Think> b <#Success>"
    assert parse_verdict(text, released=True) == (Decision.FAILED, "a <#Think> b", None)
    with pytest.raises(MalformedReply, match="2 times <#Think>"):
        parse_verdict(text)


def test_released_counts_tags_in_front_of_think_too():
    text = "I may answer <#Failed>. <#Think> good <#Success>"
    assert parse_verdict(text).decision is Decision.SUCCESS
    with pytest.raises(MalformedReply):
        parse_verdict(text, released=True)


@pytest.mark.parametrize("rest", ["", " ", " ...", "\n```"])
def test_refine_needs_an_instruction(rest):
    with pytest.raises(MalformedReply, match="instruction after <#Reflection>"):
        parse_verdict(f"<#Think> almost <#Reflection>{rest}")
    assert parse_verdict(f"<#Think> almost <#Reflection>{rest}", released=True).instruction is not None


def test_thoughts_of_the_model_itself_are_left_out():
    text = "<think>Is it <#Failed> or <#Think>?</think><#Think> fine <#Success>"
    assert parse_verdict(text) == (Decision.SUCCESS, "fine", None)
    with pytest.raises(MalformedReply, match="without an end"):
        parse_verdict("<think> <#Think> fine <#Success>")


# ---- the consistency score -----------------------------------------------------------------------------------------------

CAPS = [
    (dict(raw=9.5, meets="yes", major=0, omissions=0), 9.5),
    (dict(raw=9.5, meets="no", major=0, omissions=0), 2.0),
    (dict(raw=9.5, meets="partial", major=0, omissions=0), 5.0),
    (dict(raw=9.5, meets="yes", major=1, omissions=0), 8.0),
    (dict(raw=9.5, meets="yes", major=2, omissions=0), 5.0),
    (dict(raw=9.5, meets="yes", major=0, omissions=1), 7.0),
    (dict(raw=9.5, meets="yes", major=0, omissions=0, hallucinations=3), 7.0),
    (dict(raw=9.5, meets="maybe", major=0, omissions=0), 8.99),
    (dict(raw=-3, meets="yes", major=0, omissions=0), 0.0),
    (dict(raw=40, meets="yes", major=0, omissions=0), 10.0),
    (dict(raw=7.123456, meets="yes", major=0, omissions=0), 7.1235),
    (dict(raw=1.5, meets="no", major=4, omissions=2), 1.5),
]


@pytest.mark.parametrize(("case", "score"), CAPS)
def test_caps(case, score):
    assert cap_score(**case)[0] == score


@pytest.mark.parametrize(
    ("raw", "ours", "released"),
    [(0.85, 8.5, 8.5), (1, 1.0, 10.0), (1.0, 1.0, 10.0), (1.0000001, 1.0, 10.0), (1.01, 1.01, 1.01), (0, 0.0, 0.0)],
)
def test_a_fraction_is_read_on_a_scale_of_one_and_a_plain_one_only_by_the_released_rule(raw, ours, released):
    text = consistency(raw_score=raw)
    assert parse_consistency(text).score == ours
    assert parse_consistency(text, released=True).score == released


def test_cap_trace_names_every_cap():
    _, trace = cap_score(9.0, "no", 3, 1)
    assert [line.split(":")[0] for line in trace] == ["at most 2", "at most 5", "at most 7", "at most 8.99"]
    assert cap_score(9.0, "yes", 0, 0)[1] == ()


@quick
@given(st.floats(0, 10), st.sampled_from(["yes", "partial", "no"]), st.integers(0, 5), st.integers(0, 5), st.integers(0, 5))
def test_caps_never_raise_a_score_and_worsen_with_findings(raw, meets, major, omissions, hallucinations):
    score, _ = cap_score(raw, meets, major, omissions, hallucinations)
    assert 0 <= score <= 10
    assert score <= cap_score(raw, "yes", 0, 0)[0]
    assert cap_score(raw, meets, major + 1, omissions, hallucinations)[0] <= score


def test_consistency_reads_fields_wherever_the_object_stands():
    for text in (consistency(), f"Here you are:\n```json\n{consistency()}\n```\nBye {{not json}}"):
        read = parse_consistency(text)
        assert (read.score, read.reason, read.fields["minor_conflicts"]) == (9.25, "the kite is red", 2)
        assert read.cap_trace == ()
    assert parse_consistency(consistency(hallucinations=1)).score == 7.0


@pytest.mark.parametrize(
    "cut", [len('{"meets_instruction": "yes", "major_conflicts": 0, "minor_conflicts": 2, "omissions": 0, "raw_score": 9.25,')]
)
def test_consistency_cut_off_after_the_score_is_read(cut):
    whole = consistency()
    for end in range(cut, len(whole) + 1):
        read = parse_consistency(whole[:end])
        assert read.score == 9.25
        assert "the kite is red".startswith(read.reason)
    for end in range(cut):  # 9.2 might have become 9.25: an incomplete number is never used
        with pytest.raises(MalformedReply):
            parse_consistency(whole[:end])


@pytest.mark.parametrize(
    "change",
    [
        {"raw_score": "9"},
        {"raw_score": True},
        {"raw_score": None},
        {"raw_score": math.nan},
        {"raw_score": math.inf},
        {"raw_score": 85},
        {"raw_score": -1},
        {"major_conflicts": -1},
        {"major_conflicts": 1.5},
        {"omissions": "none"},
        {"meets_instruction": "mostly"},
        {"meets_instruction": False},
    ],
)
def test_consistency_refuses_values_of_another_kind_or_range(change):
    with pytest.raises(MalformedReply, match="raw_score"):
        parse_consistency(consistency(**change))


@pytest.mark.parametrize("key", ["meets_instruction", "major_conflicts", "minor_conflicts", "omissions", "raw_score"])
def test_consistency_needs_its_keys(key):
    fields = json.loads(consistency())
    del fields[key]
    with pytest.raises(MalformedReply, match="no such objects"):
        parse_consistency(json.dumps(fields))


def test_a_word_that_was_cut_off_is_not_a_value():
    with pytest.raises(MalformedReply):  # it may have been going to be "not at all"
        parse_consistency(
            '{"major_conflicts": 0, "minor_conflicts": 0, "omissions": 0, "raw_score": 2, "meets_instruction": "no'
        )


def test_two_different_objects_or_keys_are_not_chosen_between():
    with pytest.raises(MalformedReply, match="2 such objects"):
        parse_consistency(consistency() + consistency(raw_score=3))
    assert parse_consistency(consistency() + consistency()).score == 9.25
    with pytest.raises(MalformedReply):
        parse_pair('{"score": [9, 9], "score": [1, 1], "reasoning": ""}')


def test_released_consistency_takes_what_the_released_code_takes():
    text = 'Well: {"meets_instruction": "YES ", "raw_score": "8.5", "major_conflicts": null, "omissions": "1"} done'
    read = parse_consistency(text, released=True)
    assert (read.score, read.fields["meets_instruction"], read.fields["omissions"]) == (7.0, "yes", 1)
    assert parse_consistency(consistency(raw_score=40), released=True).score == 10.0
    for text in ('{"raw_score": "NaN"}', "{}", '{"meets_instruction": "yes"}', "}{", '{"raw_score": 1} {"raw_score": 2}'):
        with pytest.raises(MalformedReply):
            parse_consistency(text, released=True)


# ---- the two marks -------------------------------------------------------------------------------------------------------


def test_pair_reads_plain_fenced_and_cut_off_replies():
    assert parse_pair('{"score": [7, 8.5], "reasoning": "fine"}') == (7.0, 8.5)
    assert parse_pair('```json\n{"score": [7, 8.5], "reasoning": "fine"}\n```') == (7.0, 8.5)
    assert parse_pair('```json\n{"score": [7, 8.5], "reasoning": "fi') == (7.0, 8.5)
    assert parse_pair('{"score": [7, 8.5]') == (7.0, 8.5)
    assert parse_pair('{"score": [7, 8], "reasoning": "a \\') == (7.0, 8.0)
    assert parse_pair('{"score": [7, 8], "reasoning": "a \\u00') == (7.0, 8.0)


@pytest.mark.parametrize(
    "marks",
    [
        "[]",
        "[7]",
        "[7, 8, 9]",
        '["7", 8]',
        "[7, null]",
        "[7, 11]",
        "[-1, 8]",
        "[NaN, 8]",
        "[true, 8]",
        "8",
        '"7, 8"',
        "[1e999, 1]",
    ],
)
def test_pair_refuses_everything_but_two_marks(marks):
    with pytest.raises(MalformedReply, match="two numbers"):
        parse_pair(f'{{"score": {marks}, "reasoning": ""}}')


@pytest.mark.parametrize(
    "text", ['{"score": [7, 8', '{"score": [7', '{"score', "{", "7, 8", '["score", 7, 8]', "好的，都是十分。"]
)
def test_pair_does_not_complete_numbers(text):
    with pytest.raises(MalformedReply):
        parse_pair(text)


def test_released_pair_takes_any_list_of_numbers_and_cuts_fences_unseen():
    assert parse_pair('{"score": [3], "reasoning": 1}', released=True) == (3.0,)
    assert parse_pair('{"score": [3, 12, 5], "reasoning": ""}', released=True) == (3.0, 12.0, 5.0)
    assert parse_pair('```\n{"score": [3, 4], "reasoning": ""}\n```', released=True) == (3.0, 4.0)
    for text in (
        '{"score": [3, 4]}',
        'Here: {"score": [3, 4], "reasoning": ""}',
        '```json\n{"score": [3, 4], "reasoning": ""}',
        '{"score": [], "reasoning": ""}',
        '{"score": ["3", 4], "reasoning": ""}',
    ):
        with pytest.raises(MalformedReply):
            parse_pair(text, released=True)


# ---- free text -----------------------------------------------------------------------------------------------------------


def test_thought_takes_off_wrapping_but_not_lettering():
    assert parse_thought(' "Make the kite red." ').instruction == "Make the kite red."
    assert parse_thought("```text\nMake the kite red.\n```").instruction == "Make the kite red."
    assert parse_thought("1. Remove the dog\n2. Add a cat.").instruction == "Remove the dog. Add a cat."
    assert parse_thought("1、删除狗\n2、添加猫").instruction == "删除狗。添加猫。"
    lettering = '"A. B" becomes "C"'
    assert parse_thought(lettering).instruction == lettering
    assert parse_thought("1 kite. 3.5 m long").instruction == "1 kite. 3.5 m long"


def test_thought_steps_are_sentences_outside_quotes():
    thought = parse_thought('Change "Stop. Now" to "Go!". Remove the dog; paint the wall white.')
    assert thought.steps == ('Change "Stop. Now" to "Go!".', "Remove the dog", "paint the wall white.")
    assert parse_thought("删除狗。把“停！走”改成“来”。").steps == ("删除狗。", "把“停！走”改成“来”。")
    assert parse_thought("Make it red").steps == ("Make it red",)


def test_released_thought_is_the_stripped_reply():
    text = ' "1. Make it red" \n2. and blue '
    assert parse_thought(text, released=True).instruction == text.strip()
    assert parse_description(" a \n\n b ", released=True) == "a \n\n b"


@pytest.mark.parametrize("parse", [parse_thought, parse_description])
@pytest.mark.parametrize("text", ["", " \n", "...", "```\n```", "x" * 5000])
def test_free_text_needs_words_and_an_end(parse, text):
    for released in (False, True):
        with pytest.raises(MalformedReply):
            parse(text, released=released)


# ---- every reader --------------------------------------------------------------------------------------------------------

NASTY = [
    "{" * 10_000_000,
    '{"a":' * 2_000_000,
    '{"score": [' + "9" * 10_000_000,
    "<#Think>" * 1_250_000,
    " " * 10_000_000,
    '"\\' * 5_000_000,
]


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("parse", PARSERS)
def test_ten_megabytes_are_refused(parse, released):
    for text in NASTY:
        with pytest.raises(MalformedReply):
            parse(text, released=released)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("parse", PARSERS)
def test_long_replies_within_the_bound_come_to_an_end(parse, released):
    """No time is asserted: a search that goes back and forth over these would take hours."""
    for text in NASTY:
        with suppress(MalformedReply):
            parse(text[:MAX_REPLY], released=released)


def test_message_shows_the_beginning_and_keeps_the_reply():
    with pytest.raises(MalformedReply) as caught:
        parse_verdict("x" * 300 + "END")
    assert "x" * 200 in str(caught.value) and "END" not in str(caught.value)
    assert caught.value.raw.endswith("END")
    with pytest.raises(MalformedReply, match="NoneType instead of text"):
        parse_verdict(None)


_PIECES = st.sampled_from(
    [
        "<#Think>",
        "<#Success>",
        "<#Reflection>",
        "{",
        "}",
        "[",
        "]",
        '"score"',
        ":",
        ",",
        "7",
        '"',
        "\\",
        "```",
        "红",
        "word ",
        "\n",
    ]
)


@quick
@given(st.one_of(st.text(max_size=60), st.lists(_PIECES, max_size=25).map("".join)), st.booleans())
def test_any_text_is_read_or_refused(text, released):
    for parse in PARSERS:
        try:
            parse(text, released=released)
        except MalformedReply as error:
            assert error.raw == text[:2000]


@quick
@given(st.text(max_size=200))
def test_any_reason_survives_json(reason):
    assert parse_consistency(consistency(reason=reason)).reason == reason.strip()


@quick
@given(st.tuples(st.floats(0, 10), st.integers(0, 10)), st.text(max_size=50), st.data())
def test_cut_off_pairs_are_read_right_or_refused(marks, reasoning, data):
    whole = json.dumps({"score": list(marks), "reasoning": reasoning})
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    try:
        assert parse_pair(cut) == tuple(map(float, marks))
    except MalformedReply:
        assert len(cut) < whole.index("]") + 1


def test_schemas_describe_what_the_readers_take():
    assert list(SCHEMAS["consistency"]["properties"]) == SCHEMAS["consistency"]["required"] == list(json.loads(consistency()))
    assert SCHEMAS["pair"]["required"] == ["score", "reasoning"]
