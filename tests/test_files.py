"""Files that are there whole or not at all."""

import os

import pytest

from reasonedit.reasonedit_core import files
from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.files import write_many, write_whole


def test_many_files_are_on_the_disk_before_one_has_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "sync", lambda: seen.append(sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file())))
    paths = write_many((tmp_path / name[0] / name, name.encode()) for name in ("ab", "ac", "bc"))
    assert [path.read_bytes() for path in paths] == [b"ab", b"ac", b"bc"]
    assert seen == [[".part"] * 3]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["ab", "ac", "bc"]


def test_where_the_system_cannot_be_synced_each_file_is(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sync", raising=False)
    synced, real = [], os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda number: (synced.append(number), real(number)))
    write_many([(tmp_path / "a", b"1"), (tmp_path / "b", b"2")])
    assert len(synced) == 2 and (tmp_path / "b").read_bytes() == b"2"


def test_what_fails_half_way_leaves_neither_parts_nor_old_files_spoilt(tmp_path):
    (tmp_path / "a").write_bytes(b"old")

    def broken():
        yield tmp_path / "a", b"new"
        raise ValueError("the second could not be made")

    with pytest.raises(ValueError, match="second"):
        write_many(broken())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot write .*choose a folder"):
        write_whole(tmp_path / "file" / "below", b"1")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_nothing_to_write_is_no_fault(tmp_path):
    assert write_many([]) == [] and list(tmp_path.iterdir()) == []
