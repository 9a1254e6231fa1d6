"""Records: what a line may say, what each kind must say, and what the messages name."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import DataError
from reasonedit.training.data import records as module
from reasonedit.training.data.problems import CODES, Place, nearest
from reasonedit.training.data.records import KINDS, REFERENCES, SPLITS, VERDICTS, Record, join_steps, read_records
from reasonedit.training.data.rules import NEEDS, check_record, parse_record

A, B, C = ({"path": f"images/{name}.png"} for name in "abc")
GOOD = {
    "think": {
        "images": {"input": A},
        "instruction": {"raw": "let autumn come", "class": "abstract"},
        "think": {"steps": ["Turn the leaves yellow.", "Let some leaves lie on the ground"]},
    },
    "reflect": {
        "images": {"input": A, "generated": B, "target": C},
        "instruction": {"raw": "make the door red"},
        "reflect": {
            "target_description": "A house with a red door.",
            "scores": {"consistency": 5, "quality": [8, 7.5]},
            "findings": {"meets_instruction": "partial", "major_conflicts": 1},
            "reason": "The door is pink.",
            "verdict": "reflection",
            "second_instruction": "Make the pink door red.",
        },
    },
    "edit": {"images": {"input": A, "target": B}, "instruction": {"raw": "make the door red"}},
    "t2i": {"images": {"target": A}, "caption": "A house."},
    "understand": {"understand": {"turns": [{"question": "What is 1 + 1?", "answer": "2."}]}},
    "hypothetical": {
        "images": {"input": A, "target": B},
        "reason50k": {"scenario": "causal", "hypothetical": "What if it rained for a week?"},
    },
}


def value(kind: str, /, **changes) -> dict:
    """A sound record of `kind`, with values put in (or, with None, taken out) by dotted path written with two underscores."""
    made = {"schema": "reasonedit.record/1", "id": f"{kind}-1", "kind": kind, **copy.deepcopy(GOOD[kind])}
    for path, new in changes.items():
        inner = made
        *parents, last = path.split("__")
        for name in parents:
            inner = inner.setdefault(name, {})
        if new is None:
            inner.pop(last)
        else:
            inner[last] = new
    return made


def found(kind: str, **changes) -> dict[str, str]:
    """field -> code of the problems of such a record."""
    _, problems = check_record(value(kind, **changes), Place("a.jsonl", 7))
    return {problem.field: problem.code for problem in problems}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_record_of_each_kind_is_read_and_written_back_the_same(kind):
    record, problems = check_record(value(kind), Place("data/a.jsonl", 7))
    assert problems == [] and record.kind == kind and record.source == ("data/a.jsonl", 7)
    again, _ = parse_record(record.to_json().encode(), Place("data/a.jsonl", 7), {})
    assert again == record and again.to_json() == record.to_json()
    assert pickle.loads(pickle.dumps(record)).source == record.source  # noqa: S301


def test_every_field_of_the_schema_comes_back():
    whole = value("think", **{key: copy.deepcopy(each) for kind in KINDS for key, each in GOOD[kind].items()})
    whole["images"] = {
        name: {**A, "size": [4, 3], "sha256": "0" * 64} for name in ("input", "generated", "target", *REFERENCES)
    }
    whole["instruction"] |= {"lang": "zh-Hant", "category": "causal", "class": "abstract"}
    whole["think"]["text"] = "x"
    whole["reflect"] |= {"round": 2, "scores": {"consistency": 4.5, "quality": [8.0, 7.5], "edit": 3.0}}
    whole["reflect"]["findings"] |= {"minor_conflicts": 2, "omissions": 3, "reason": "Pink."}
    whole["edit"] = {"instruction_used": "x", "mask": B, "allow_resize": True}
    whole["reason50k"] |= {"objects": ["a"], "source_caption": "b", "target_caption": "c"}
    step = {"step": "label", "model": "m", "endpoint": "local", "prompt": "think@3", "seed": 1, "temperature": 0.5, "time": "t"}
    whole["provenance"] = [{**step, "accepted": True, "score": 9.0, "key": "k", "note": "n"}]
    whole |= {"weight": 2.5, "split": "held_out", "license": "CC0-1.0", "source": "mine"}
    record, problems = check_record(whole, Place("a", 1))
    assert problems == [] and json.loads(record.to_json()) == whole


@pytest.mark.parametrize("kind", KINDS)
def test_every_need_of_a_kind_is_asked_for(kind):
    assert set(NEEDS) == set(KINDS)
    for need in NEEDS[kind]:
        made = value(kind)
        for path in need.field.split("|"):
            inner = made
            *parents, last = path.split(".")
            for name in parents:
                inner = inner.get(name, {})
            inner.pop(last, None)
        _, problems = check_record(made, Place("a.jsonl", 7))
        field = need.field.partition("|")[0]
        assert [problem.code for problem in problems if problem.field == field] == ["missing-field"], field


def test_the_message_names_file_line_record_field_and_fix():
    _, problems = check_record(value("t2i", wieght=2), Place("sets/a.jsonl", 7))
    text = str(problems[0])
    assert text.startswith("sets/a.jsonl:7: record 't2i-1': field wieght: expected one of schema, id, kind")
    assert text.endswith('found "wieght". Fix: did you mean weight? [unknown-key]')


@pytest.mark.parametrize(
    ("field", "bad", "code", "words"),
    [
        ("images__inptu", A, "unknown-key", "input"),
        ("images__target__sise", [1, 2], "unknown-key", "size"),
        ("provenance", [{"step": "x", "modle": "y"}], "unknown-key", "model"),
        ("kind", "t2l", "bad-value", "t2i"),
        ("split", "validation", "bad-value", "held_out"),
        ("schema", "reasonedit.record/2", "bad-value", "reasonedit.record/1"),
        ("id", 7, "wrong-type", "text"),
        ("id", "a\nb", "bad-value", "id"),
        ("caption", ["a"], "wrong-type", "text"),
        ("caption", "  ", "empty-text", "visible"),
        ("caption", "ends<|im_end|> here", "special-token", "im_end"),
        ("weight", "1", "wrong-type", "number"),
        ("weight", True, "wrong-type", "number"),
        ("weight", 0, "out-of-range", "above 0"),
        ("images__target__size", [0, 5], "out-of-range", "at least 1"),
        ("images__target__size", [5], "missing-field", ""),
        ("images__target__size", [5.5, 5], "wrong-type", "whole number"),
        ("images__target__sha256", "ABC", "bad-value", "hexadecimal"),
        ("images__target__path", "/a/b.png", "bad-path", "relative"),
        ("images__target__path", "C:/a.png", "bad-path", "relative"),
        ("images__target__path", "images\\a.png", "bad-path", "images/a.png"),
        ("images__target__path", "https://example.org/a.png", "bad-path", "download"),
        ("images__target__path", "shard-1.tar/a.png", "tar-member", "unpack"),
        ("understand__turns", [], "bad-value", "at least 1"),
        ("images__reference_3", A, "reference-gap", "without gaps"),
    ],
)
def test_a_bad_value_is_named(field, bad, code, words):
    _, problems = check_record(value("t2i", **{field: bad}), Place("a.jsonl", 7))
    hits = [problem for problem in problems if problem.code == code]
    assert hits and words in str(hits[0]), [str(problem) for problem in problems]


def test_all_faults_of_a_line_are_found_at_once():
    faults = found(
        "reflect",
        reflect__verdict=None,
        reflect__reason="x <#Failed>",
        images__generated=None,
        reflect__scores={"consistency": 11, "quality": [1, 2, 3]},
        images__input={"path": "a.png", "siez": [1, 1]},
    )
    assert faults == {
        "reflect.verdict": "missing-field",
        "reflect.reason": "special-token",
        "images.generated": "missing-field",
        "reflect.scores.consistency": "out-of-range",
        "reflect.scores.quality": "bad-value",
        "images.input.siez": "unknown-key",
    }


def test_a_second_instruction_goes_with_a_reflection_and_with_nothing_else():
    second = "reflect.second_instruction"
    assert found("reflect", reflect__second_instruction=None) == {second: "missing-field"}
    assert found("reflect", reflect__second_instruction=" .") == {second: "missing-field"}
    for verdict in ("success", "failed"):
        assert found("reflect", reflect__verdict=verdict)[second] == "unexpected-field"
    assert found("reflect", reflect__verdict="failed", reflect__second_instruction=None) == {}
    assert set(VERDICTS) == {"success", "reflection", "failed"}


def test_scores_that_do_not_go_together():
    field = "reflect.scores.consistency"
    assert found("reflect", reflect__scores={"consistency": 5.5}) == {field: "score-above-findings"}  # partial allows 5
    failed = {"reflect__verdict": "failed", "reflect__second_instruction": None, "reflect__findings": None}
    assert found("reflect", **failed, reflect__scores={"consistency": 9}) == {field: "score-disagrees"}
    record, _ = check_record(value("reflect", **failed, reflect__scores={"consistency": 9}), Place("a", 1))
    assert record is not None, "a warning does not keep a record out"


def test_a_clear_instruction_is_its_own_step():
    clear = {"instruction": {"raw": "make it red", "class": "clear"}}
    assert found("think", **clear, think__steps=["make it red"]) == {}
    assert found("think", **clear, think__steps=["Make it red."]) == {"think.steps": "instruction-changed"}
    abstract = {"instruction": {"raw": "make it red", "class": "abstract"}}
    assert found("think", **abstract, think__steps=["make it red"]) == {"think.steps": "instruction-unchanged"}


def test_too_long_for_a_reply():
    assert found("think", think__text="a " * 2001) == {"think.text": "too-long"}


def test_what_is_no_record_at_all():
    for line, code in (
        (b"{", "not-json"),
        (b"[1]", "not-json"),
        (b"\xff{}", "not-utf8"),
        (b'{"weight": NaN}', "not-json"),
        (b'{"id": "a", "id": "b"}', "duplicate-key"),
        (b"[" * 100_000, "not-json"),
    ):
        record, problems = parse_record(line, Place("a.jsonl", 1), {})
        assert record is None and code in {problem.code for problem in problems}, line[:20]


def test_reading_a_file(tmp_path):
    lines = [json.dumps(value(kind, id=kind), ensure_ascii=False) for kind in KINDS]
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(lines).encode() + b"\n")
    read = read_records(path)
    assert [record.id for record in read] == list(KINDS)
    assert [record.source.line for record in read] == [1, 3, 5, 7, 9, 11]
    assert read_records(tmp_path)[0].picture("input") == tmp_path / "images/a.png"
    assert [record.id for record in read_records(path, kinds=["edit"])] == ["edit"]
    assert read_records(path, splits=["held_out"]) == []


def test_reading_refuses_with_the_first_faults_and_their_number(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(value("t2i", id=f"n{n}", caption="")) for n in range(9)))
    with pytest.raises(DataError, match=r"a\.jsonl:1: record 'n0': field caption") as error:
        read_records(path)
    assert "and 13 more" in str(error.value)  # a missing field and an empty text each


def test_two_records_with_one_id_over_two_files(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(value("t2i")))
    with pytest.raises(DataError, match=r"b\.jsonl:1.*duplicate-id"):
        read_records([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    with pytest.raises(DataError, match="found a.jsonl, b.jsonl"):
        read_records(tmp_path)
    with pytest.raises(DataError, match="found nothing"):
        read_records(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="no line with one"):
        read_records(tmp_path / "c.jsonl")


def test_a_record_speaks_for_itself():
    edit, _ = check_record(value("edit", images__reference_2=C, edit={"mask": B}), Place("d/a.jsonl", 3))
    assert edit.references == ("reference_2",) and edit.picture("mask").as_posix() == "d/images/b.png"
    with pytest.raises(DataError, match=r"d/a\.jsonl:3: record 'edit-1': field images\.generated"):
        edit.picture("generated")
    assert edit.editor_instruction == "make the door red"
    used, _ = check_record(value("edit", edit={"instruction_used": "Paint it."}), Place("a", 1))
    assert used.editor_instruction == "Paint it."
    think, _ = check_record(value("think"), Place("a", 1))
    assert think.editor_instruction == "Turn the leaves yellow. Let some leaves lie on the ground."
    assert join_steps(["把门改成红色", "去掉窗户。"]) == "把门改成红色。去掉窗户。" and join_steps(["as it is"]) == "as it is"
    t2i, _ = check_record(value("t2i", caption="一扇红色的门"), Place("a", 1))
    assert t2i.lang == "zh" and edit.lang == "en" and t2i.editor_instruction is None


def test_the_words_of_the_schema_are_the_fields():
    assert set(Record.model_json_schema()["properties"]) == {
        *("schema", "id", "kind", "images", "instruction", "think", "reflect", "edit", "caption", "reason50k", "understand"),
        *("weight", "split", "provenance", "license", "source"),
    }
    assert set(SPLITS) == {"train", "held_out"}
    assert all(severity in ("error", "warning", "note") for severity, _ in CODES.values())
    assert nearest("heldout", SPLITS) == "held_out" and nearest("zzz", SPLITS) is None
    assert module.REFERENCES == ("reference_2", "reference_3", "reference_4", "reference_5", "reference_6")


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(sorted(Record.model_fields) + ["schema", "source", "zzz"]), _json)
def test_no_value_whatever_makes_reading_fail(kind, key, junk):
    made = value(kind)
    made[key] = junk
    record, problems = parse_record(json.dumps(made).encode(), Place("a.jsonl", 1), {})
    assert (record is None) == any(problem.severity == "error" for problem in problems)
    assert all(str(problem) and problem.code in CODES for problem in problems)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_no_bytes_whatever_make_reading_fail(line):
    record, problems = parse_record(line, Place("a.jsonl", 1), {})
    assert record is None and problems
