"""The manifest: its hash follows the data and nothing else, and indexing again reads only what changed."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from reasonedit.reasonedit_core.errors import DataError
from reasonedit.training.data import manifest as module
from reasonedit.training.data.drawn import write_drawn
from reasonedit.training.data.manifest import Manifest, changed, index
from reasonedit.training.data.records import read_records

COUNTS = {"reflect": 5, "edit": 4, "t2i": 3, "understand": 2}


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_drawn(tmp_path / "set", COUNTS, seed=2, size=24).parent


def rewrite(folder: Path, change) -> None:
    """Change the values of the record file, all at once."""
    path = folder / "records.jsonl"
    values = [json.loads(line) for line in path.read_text().splitlines()]
    change(values)
    path.write_text("\n".join(json.dumps(value) for value in values))


def test_what_a_manifest_holds(folder):
    made = index(folder)
    assert len(made) == 14 and [entry.id for entry in made.entries] == sorted(record.id for record in read_records(folder))
    record = next(record for record in read_records(folder) if record.kind == "reflect")
    entry = made.by_id[record.id]
    assert (entry.kind, entry.split, entry.weight, entry.file, entry.line) == ("reflect", record.split, 1.0, "records.jsonl", 1)
    for name, file in record.files.items():
        assert entry.pictures[name].sha256 == file.sha256 and entry.pictures[name].size == (24, 24)
    assert Manifest.load(folder / "manifest.jsonl") == made and Manifest.load(folder / "manifest.jsonl").hash == made.hash
    assert made.select(splits=["held_out"], kinds=["t2i"]).entries == tuple(
        entry for entry in made.entries if entry.split == "held_out" and entry.kind == "t2i"
    )
    assert made.lines()[0].startswith("14 records,") and "train edit: 3" in made.lines()


def test_the_hash_does_not_follow_order_names_or_places(folder, tmp_path):
    before = index(folder).hash
    rewrite(folder, lambda values: random.Random(0).shuffle(values))
    assert index(folder).hash == before
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    os.utime(next((moved / "images").iterdir()), (0, 0))
    (moved / "manifest.jsonl").unlink()
    assert index(moved).hash == before
    one, two = folder / "a.jsonl", folder / "b.jsonl"
    lines = (folder / "records.jsonl").read_text().splitlines()
    one.write_text("\n".join(lines[:5]))
    two.write_text("\n".join(lines[5:]))
    assert index([two, one], tmp_path / "both.jsonl").hash == before

    def rename(values):
        for value in values:
            for file in value["images"].values():
                target = Path(file["path"]).with_name("x" + Path(file["path"]).name).as_posix()
                if not (folder / target).exists():
                    shutil.copy(folder / file["path"], folder / target)
                file["path"] = target
            value["provenance"], value["license"] = [], "other"

    rewrite(folder, rename)
    assert index(folder).hash == before


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.update(id="another"),
        lambda value: value.update(split="held_out"),
        lambda value: value.update(weight=2.0),
        lambda value: value["instruction"].update(raw="something else"),
        lambda value: value["reflect"]["scores"].update(quality=3),
        lambda value: value["images"].pop("target"),
        lambda value: value.update(edit={"allow_resize": True}),
    ],
)
def test_the_hash_follows_what_a_record_says(folder, change):
    before = index(folder).hash
    rewrite(folder, lambda values: change(values[0]))
    assert index(folder).hash != before


def test_the_hash_follows_the_pixels_and_only_changed_files_are_read(folder, monkeypatch):
    read: list[str] = []
    whole = module.hashlib.file_digest

    def spy(stream, name):
        read.append(Path(stream.name).name)
        return whole(stream, name)

    monkeypatch.setattr(module.hashlib, "file_digest", spy)
    first = index(folder, workers=1)
    assert len(set(read)) == len({each.path for entry in first.entries for each in entry.pictures.values()})
    read.clear()
    assert index(folder, workers=1) == first and read == []
    touched = next((folder / "images").iterdir())
    os.utime(touched, ns=(7, 7))
    assert index(folder, workers=1).hash == first.hash and set(read) == {touched.name}
    read.clear()
    victim = folder / next(iter(first.entries[0].pictures.values())).path
    shutil.copy(next(path for path in victim.parent.iterdir() if path.read_bytes() != victim.read_bytes()), victim)
    os.utime(victim, ns=(5, 5))
    assert first.entries[0].id in set(changed(first, folder))
    second = index(folder, workers=1)
    assert set(read) == {victim.name} and second.hash != first.hash
    assert list(changed(second, folder)) == []
    (folder / "manifest.jsonl").write_text("nonsense")
    assert index(folder).hash == second.hash, "an index that cannot be read is made anew"


def test_missing_pictures_are_named_and_nothing_is_written(folder):
    records = read_records(folder)
    records[0].picture("input").unlink()
    with pytest.raises(DataError, match=rf"records\.jsonl:1: record '{records[0].id}': field images\.input: .*missing-picture"):
        index(folder)
    assert not (folder / "manifest.jsonl").exists()


def test_a_manifest_that_was_touched_is_refused(folder):
    index(folder)
    path = folder / "manifest.jsonl"
    good = path.read_text()
    path.write_text(good.replace('"weight":1.0', '"weight":9.0', 1))
    with pytest.raises(DataError, match="the file was changed or cut short"):
        Manifest.load(path)
    path.write_text("\n".join(good.splitlines()[:-1]) + "\n")
    with pytest.raises(DataError, match="the file was changed or cut short"):
        Manifest.load(path)
    path.write_text(good.replace("manifest/1", "manifest/2", 1))
    with pytest.raises(DataError, match="expected schema"):
        Manifest.load(path)
    path.write_text("")
    with pytest.raises(DataError, match="expected a manifest"):
        Manifest.load(path)


def test_odd_names_survive(folder):
    def rename(values):
        values[0]["id"] = "odd\u2028name"

    rewrite(folder, rename)
    made = index(folder)
    assert Manifest.load(folder / "manifest.jsonl") == made and "odd\u2028name" in made.by_id
