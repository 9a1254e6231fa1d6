"""The journal of `reasonedit-data`: torn tails, what counts as whole, one writer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import ConfigError, DataError
from reasonedit.training.data.label import journal
from reasonedit.training.data.label.journal import Entry, Journal, read_journal

ANY_PLACE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

values = st.dictionaries(st.text(max_size=5), st.text(max_size=12) | st.integers() | st.booleans(), max_size=3)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    key, step = draw(st.text("0123456789abcdef", min_size=4, max_size=6)), draw(st.sampled_from(("classify", "verify")))
    if draw(st.booleans()):
        return Entry(key, step, draw(st.text(max_size=6)), "done", draw(values), tokens_in=draw(st.integers(0, 99)))
    return Entry(key, step, draw(st.text(max_size=6)), "rejected", reason="refused", note=draw(st.text(max_size=12)))


def write(path: Path, told: list[Entry]) -> bytes:
    path.unlink(missing_ok=True)
    with Journal(path) as kept:
        for entry in told:
            kept.add(entry)
    return path.read_bytes()


def one(key: str = "k1", **more) -> Entry:
    return Entry(key, "classify", "item", "done", {"x": 1}, **more)


@ANY_PLACE
@given(told=st.lists(entries(), max_size=6))
def test_what_was_added_is_read_back_and_the_later_of_two_wins(tmp_path, told):
    write(tmp_path / "j", told)
    found = read_journal(tmp_path / "j")
    assert found.entries == {entry.key: entry for entry in told} and found.torn == 0


@ANY_PLACE
@given(told=st.lists(entries(), min_size=1, max_size=5), data=st.data())
def test_cut_anywhere_all_whole_lines_count_and_the_rest_is_dropped_and_written_over(tmp_path, told, data):
    path = tmp_path / "j"
    whole = write(path, told)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    ends = [0]
    for entry in told:
        ends.append(ends[-1] + len(entry.line()))
    kept = sum(end <= cut for end in ends) - 1
    with Journal(path) as again:
        assert again.entries == {entry.key: entry for entry in told[:kept]}
        assert again.dropped == cut - ends[kept]
        for entry in told[kept:]:
            again.add(entry)
    assert path.read_bytes() == whole


@ANY_PLACE
@given(told=st.lists(entries(), min_size=1, max_size=4), tail=st.binary(min_size=1, max_size=40))
def test_rubbish_after_the_last_line_is_dropped_and_never_read(tmp_path, told, tail):
    path = tmp_path / "j"
    whole = write(path, told)
    tail = tail.replace(b"\n", b"") + (b"\n" if tail[0] % 2 else b"")
    path.write_bytes(whole + tail)
    if tail.strip(b"\n") == b"" and tail:  # an empty line is one that lost what was in it
        assert read_journal(path).torn == len(tail)
    found = read_journal(path)
    assert found.entries == {entry.key: entry for entry in told} and found.length == len(whole)
    Journal(path).close()
    assert path.read_bytes() == whole


def test_a_line_is_on_the_disk_before_add_returns(tmp_path, monkeypatch):
    flushed = []
    kept = Journal(tmp_path / "j")
    fsync = os.fsync
    monkeypatch.setattr(journal.os, "fsync", lambda file: (fsync(file), flushed.append((tmp_path / "j").read_bytes())))
    kept.add(one())
    kept.close()
    assert flushed == [one().line()] and kept.entries == {"k1": one()}


def test_a_damaged_line_before_the_last_is_an_error_with_its_number(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(one().line() + b'{"key": "k2", "st\n' + one("k3").line())
    with pytest.raises(DataError, match=r"j:2: expected an entry of the journal.*Remove this line"):
        Journal(path)
    assert path.read_bytes().count(b"\n") == 3  # nothing was cut off


@pytest.mark.parametrize(
    "line",
    [
        b'{"key": "a", "step": "s", "item": "i", "status": "done"}',
        b'{"key": "a", "step": "s", "item": "i", "status": "rejected", "value": {}}',
        b'{"key": "a", "step": "s", "item": "i", "status": "perhaps", "value": {}}',
        b'{"key": "a", "step": "s", "item": "i", "status": "done", "value": {}, "colour": 1}',
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
    ],
)
def test_what_is_no_entry_is_none(tmp_path, line):
    path = tmp_path / "j"
    path.write_bytes(line + b"\n" + one().line())
    with pytest.raises(DataError, match="j:1: expected an entry"):
        read_journal(path)


def test_a_full_disk_leaves_no_half_line_and_says_what_to_do(tmp_path, monkeypatch):
    path = tmp_path / "j"
    with Journal(path) as kept:
        kept.add(one())
        write = os.write

        def full(file: int, data: bytes) -> int:
            write(file, data[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(journal.os, "write", full)
            with pytest.raises(ConfigError, match="No space left.*make room and start again"):
                kept.add(one("k2"))
        assert path.read_bytes() == one().line() and list(kept.entries) == ["k1"]
        kept.add(one("k3"))
    assert list(read_journal(path).entries) == ["k1", "k3"]


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
def test_two_runs_in_one_folder_are_kept_apart(tmp_path):
    first = Journal(tmp_path / "j")
    with pytest.raises(ConfigError, match="expected no other run in this folder"):
        Journal(tmp_path / "j")
    first.close()
    Journal(tmp_path / "j").close()


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot write .*choose another folder with --out"):
        Journal(tmp_path / "file" / "j")
    assert read_journal(tmp_path / "nothing").entries == {}
