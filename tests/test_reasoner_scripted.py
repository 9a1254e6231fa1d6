"""Recorded replies are handed out in order, and a bad recording is refused by file and key."""

from __future__ import annotations

import json

import pytest

from reasonedit.reasonedit_core.errors import ConfigError, Interrupted, ReasonerError
from reasonedit.reasonedit_core.interfaces import Query
from reasonedit.reasonedit_core.reasoners.scripted import ScriptedSpeaker


def ask(task: str) -> Query:
    return Query(task, "", ("?",), ())


def test_replies_come_in_order_per_task():
    speaker = ScriptedSpeaker({"think": ["a", "b"], "score": ["1", "2", "left over"]})
    assert speaker.answer([ask("score"), ask("think")]) == ["1", "a"]
    told = []
    assert speaker.answer([ask("think"), ask("score")], on_text=lambda *text: told.append(text)) == ["b", "2"]
    assert told == [("think", "b"), ("score", "2")]
    assert [query.task for query in speaker.asked] == ["score", "think", "think", "score"]


def test_a_list_that_runs_out_names_its_key():
    speaker = ScriptedSpeaker({"reflect": ["only"]})
    speaker.answer([ask("reflect")])
    with pytest.raises(ReasonerError, match="'reflect', found 1, all used"):
        speaker.answer([ask("reflect")])
    with pytest.raises(ReasonerError, match="'describe', found 0"):
        speaker.answer([ask("describe")])


def test_stops_when_asked():
    speaker = ScriptedSpeaker({"think": ["a"]})
    with pytest.raises(Interrupted):
        speaker.answer([ask("think")], should_stop=lambda: True)
    assert speaker.answer([ask("think")]) == ["a"]


def test_reads_a_file(tmp_path):
    path = tmp_path / "replies.json"
    path.write_text("\ufeff" + json.dumps({"think": ["把天空变蓝"]}, ensure_ascii=False), encoding="utf-8")
    assert ScriptedSpeaker.from_file(path).answer([ask("think")]) == ["把天空变蓝"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"thnik": []}', "key 'thnik'"),
        ('{"think": "one"}', "think: .*found str"),
        ('{"think": {"a": "b"}}', "think: .*found dict"),
        ('{"score": ["ok", {"score": 1}]}', "score: .*found dict at place 1"),
        ('["think"]', "found list"),
        ('{"think": [', "expected JSON"),
        (b"\xff\xfe\x00", "expected JSON"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, content, message):
    path = tmp_path / "replies.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        ScriptedSpeaker.from_file(path)
    assert str(path) in str(caught.value)


def test_absent_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing.json"):
        ScriptedSpeaker.from_file(tmp_path / "nothing.json")
