"""Converters: the folders that people have, made small, become the records they mean; what cannot be used is named."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

from reasonedit.reasonedit_core.errors import ConfigError, DataError
from reasonedit.training.data.check import check_records
from reasonedit.training.data.convert import LAYOUTS, convert, recognise
from reasonedit.training.data.records import Record, read_records


def paint(path: Path, shade: int = 100, size: tuple[int, int] = (48, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade, shade, shade)).save(path)
    return path


def text(path: Path, words: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(words, encoding="utf-8")
    return path


def jsonl(path: Path, *rows: dict) -> Path:
    return text(path, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows))


def names(record: Record, root: Path) -> dict[str, str]:
    """Which files of `root` a record's pictures are."""
    return {name: record.picture(name).resolve().relative_to(root.resolve()).as_posix() for name in record.files}


def run(layout: str, root: Path, out: Path, **options) -> tuple[list[Record], list[tuple[str, str]]]:
    report = convert(layout, root, out, **options)
    records = read_records(report.path)
    assert report.written == len(records) and report.layout in LAYOUTS and report.why
    return records, [(each.where, each.reason) for each in report.skipped]


# ---- musubi-tuner --------------------------------------------------------------------------------------------------------


def musubi(root: Path) -> Path:
    for name in ("a", "b", "c"):
        paint(root / f"images/{name}.png", 10)
    text(root / "images/a.txt", "make it red\n")
    text(root / "images/b.txt", "把它变红")
    paint(root / "control/a.jpg", 20)
    paint(root / "control/b_1.png", 31)
    paint(root / "control/b_010.png", 31)
    paint(root / "control/b_02.png", 30)
    paint(root / "control/b_0.png", 30)
    paint(root / "control/c.png", 40)
    paint(root / "control/zzz.png", 50)
    return root


def test_musubi_folders(tmp_path):
    root = musubi(tmp_path / "set")
    records, skipped = run("musubi", root, tmp_path / "out")
    assert [names(record, root) for record in records] == [
        {"input": "control/a.jpg", "target": "images/a.png"},
        {
            "input": "control/b_0.png",
            "target": "images/b.png",
            **{f"reference_{2 + n}": f"control/b_{name}.png" for n, name in enumerate(("1", "02", "010"))},
        },
    ]
    assert [(record.kind, record.instruction.raw, record.lang) for record in records] == [
        ("edit", "make it red", "en"),
        ("edit", "把它变红", "zh"),
    ]
    assert skipped == [
        ("images/c.png", "no caption c.txt beside it"),
        ("control/zzz.png", "no target picture of its name in images"),
    ]
    assert records[0].files["input"].size == (48, 32) and records[0].origin == "musubi:set"
    assert recognise(root) == ("musubi", "target pictures in images, the pictures that go in in control")


def test_musubi_jsonl(tmp_path):
    root = tmp_path / "set"
    for name in ("t1", "t2", "c1", "c2", "c3"):
        paint(root / f"pics/{name}.png")
    table = jsonl(
        root / "meta.jsonl",
        {"image_path": "pics/t1.png", "control_path": "pics/c1.png", "caption": "one"},
        {
            "image_path": "/elsewhere/set/pics/t2.png",
            "control_path_1": "pics/c3.png",
            "control_path_0": "pics/c2.png",
            "caption": "two",
        },
        {"image_path": "pics/gone.png", "control_path": "pics/c1.png", "caption": "three"},
        {"image_path_0": "pics/t1.png", "image_path_1": "pics/t2.png", "caption": "layers"},
        {"image_path": "pics/t1.png", "caption": "a caption"},
        {"image_path": "pics/t1.png", "control_path": "pics/c1.png", "caption": " "},
    )
    with open(table, "a") as stream:
        stream.write("\n{broken\n")
    records, skipped = run("auto", root, tmp_path / "out")
    assert [names(record, root) for record in records] == [
        {"input": "pics/c1.png", "target": "pics/t1.png"},
        {"input": "pics/c2.png", "target": "pics/t2.png", "reference_2": "pics/c3.png"},
        {"target": "pics/t1.png"},
    ]
    assert [record.kind for record in records] == ["edit", "edit", "t2i"] and records[2].caption == "a caption"
    assert [where for where, _ in skipped] == ["meta.jsonl:3", "meta.jsonl:4", "meta.jsonl:6", "meta.jsonl:7"]
    assert "'pics/gone.png' is not there" in skipped[0][1] and "2 target pictures" in skipped[1][1]
    assert "instruction.raw" in skipped[2][1] and "not a JSON object" in skipped[3][1]


def test_musubi_toml(tmp_path):
    root = musubi(tmp_path / "set")
    jsonl(root / "more.jsonl", {"image_path": "images/c.png", "caption": "a thing"})
    text(
        root / "data.toml",
        """
        [general]
        caption_extension = ".txt"
        [[datasets]]
        image_directory = "/elsewhere/set/images"
        control_directory = "control"
        num_repeats = 3
        [[datasets]]
        image_jsonl_file = "more.jsonl"
        [[datasets]]
        video_directory = "videos"
        [[datasets]]
        image_directory = "nowhere"
        """,
    )
    records, skipped = run("auto", root / "data.toml", tmp_path / "out")
    assert [(record.kind, record.weight) for record in records] == [("edit", 3), ("edit", 3), ("t2i", 1)]
    assert ("data.toml", "a video data set") in skipped and ("data.toml", "folder 'nowhere' is not there") in skipped


def test_a_folder_of_captioned_pictures_is_text_to_image(tmp_path):
    root = tmp_path / "set"
    text(paint(root / "a.png").with_suffix(".txt"), "a grey field")
    records, skipped = run("auto", root, tmp_path / "out")
    assert [record.kind for record in records] == ["t2i"] and skipped == []
    paint(root / "strange/a.png")
    with pytest.raises(DataError, match="Name the layout, or the folders"):
        recognise(root)
    (edit,), _ = run("musubi", root, tmp_path / "edit", controls=["strange"])
    assert names(edit, root) == {"input": "strange/a.png", "target": "a.png"}


# ---- ai-toolkit ----------------------------------------------------------------------------------------------------------


def aitoolkit(root: Path) -> Path:
    for folder in ("target", "control_1", "control_2"):
        for name in ("a", "b"):
            paint(root / folder / f"{name}.jpg")
    text(root / "target/a.txt", "put [trigger] on")
    text(root / "target/b.txt", "take it off")
    (root / "control_2/b.jpg").unlink()
    return root


def test_aitoolkit_folders(tmp_path):
    root = aitoolkit(tmp_path / "set")
    (record,), skipped = run("auto", root, tmp_path / "out")
    assert names(record, root) == {"input": "control_1/a.jpg", "reference_2": "control_2/a.jpg", "target": "target/a.jpg"}
    assert skipped == [("target/b.jpg", "no picture named b or b_0 in control_2")]
    assert recognise(root)[0] == "ai-toolkit"


@pytest.mark.parametrize(
    "keys", ["control_path: [control_1, control_2]", "control_path_1: control_1\n      control_path_2: control_2"]
)
def test_aitoolkit_yaml(tmp_path, keys):
    root = aitoolkit(tmp_path / "set")
    paint(root / "masks/a.png")
    config = f"""
config:
  process:
  - type: sd_trainer
    trigger_word: a hat
    datasets:
    - folder_path: /elsewhere/set/target
      {keys}
      caption_ext: txt
      num_repeats: 2
      mask_path: masks
"""
    text(root / "train.yaml", config)
    (record,), skipped = run("auto", root, tmp_path / "out")
    assert record.instruction.raw == "put a hat on" and record.weight == 2
    assert names(record, root)["mask"] == "masks/a.png" and record.references == ("reference_2",)
    assert len(skipped) == 1


# ---- DiffSynth-Studio ----------------------------------------------------------------------------------------------------


def test_diffsynth_csv_and_json(tmp_path):
    root = tmp_path / "set"
    for name in ("t", "c", "d"):
        paint(root / f"{name}.png")
    with open(root / "metadata.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows(
            [["image", "prompt", "edit_image"], ["t.png", "one,\ntwo", "c.png"], ["t.png", "several", '["c.png", "d.png"]']]
        )
        writer.writerow(["t.png", "a picture", ""])
        writer.writerow(["t.png", "lost", "gone.png"])
    records, skipped = run("auto", root, tmp_path / "csv")
    assert [names(record, root) for record in records] == [
        {"input": "c.png", "target": "t.png"},
        {"input": "c.png", "target": "t.png", "reference_2": "d.png"},
        {"target": "t.png"},
    ]
    assert records[0].instruction.raw == "one,\ntwo" and skipped == [("metadata.csv:6", "picture 'gone.png' is not there")]
    rows = [
        {"image": "t.png", "prompt": "one", "edit_image": ["d.png"]},
        {"image": "t.png", "prompt": "two", "edit_image": "c.png"},
        3,
    ]
    text(root / "metadata_edit.json", json.dumps(rows))
    with pytest.raises(DataError, match="one metadata file, found metadata.csv, metadata_edit.json"):
        convert("auto", root, tmp_path / "both")
    records, skipped = run("auto", root / "metadata_edit.json", tmp_path / "json")
    assert [names(record, root)["input"] for record in records] == ["d.png", "c.png"]
    assert skipped == [("metadata_edit.json[3]", "not a JSON object")]


# ---- kohya / Step1X-Edit -------------------------------------------------------------------------------------------------


def kohya(root: Path) -> dict:
    paint(root / "target_img/a.png")
    paint(root / "target_img/b.png")
    paint(root / "source_img/a.png")
    return {
        "a.png": {"caption": "smile", "ref_image_path": "/elsewhere/set/source_img/a.png"},
        "b": {"caption": "no reference", "ref_image_path": "source_img/b.png"},
        "c.png": {"caption": "no target", "ref_image_path": "source_img/a.png"},
        "d.png": "text",
    }


def test_kohya_metadata(tmp_path):
    root = tmp_path / "set"
    text(root / "metadata.json", json.dumps(kohya(root)))
    (record,), skipped = run("auto", root, tmp_path / "out")
    assert names(record, root) == {"input": "source_img/a.png", "target": "target_img/a.png"}
    assert record.instruction.raw == "smile" and recognise(root)[0] == "kohya"
    assert [reason for _, reason in skipped] == [
        "picture 'source_img/b.png' is not there",
        "picture 'c.png' is not there",
        "not a JSON object",
    ]


def test_kohya_toml_names_the_folder(tmp_path):
    root = tmp_path / "set"
    text(root / "meta/metadata.json", json.dumps({"a": {"caption": "smile", "ref_image_path": "source_img/a.png"}}))
    kohya(root)
    text(
        root / "edit.toml",
        """
        [[datasets]]
        edit_dataset = true
        [[datasets.subsets]]
        image_dir = "target_img"
        metadata_file = "meta/metadata.json"
        num_repeats = 5
        """,
    )
    (record,), _ = run("auto", root, tmp_path / "out")
    assert record.weight == 5 and names(record, root) == {"input": "source_img/a.png", "target": "target_img/a.png"}


# ---- MagicBrush and ImgEdit ----------------------------------------------------------------------------------------------


def test_magicbrush_gives_a_record_a_turn(tmp_path):
    root = tmp_path / "dev"
    for name in ("7-input.png", "7-output1.png", "7-output2.png", "7-mask1.png"):
        paint(root / "images/7" / name)
    turns = [
        {"input": "7-input.png", "mask": "7-mask1.png", "output": "7-output1.png", "instruction": "add a hat"},
        {"input": "7-output1.png", "mask": "7-mask2.png", "output": "7-output2.png", "instruction": "make it blue"},
        {"input": "7-output2.png", "output": "7-output3.png", "instruction": "lost"},
    ]
    text(root / "edit_sessions.json", json.dumps({"7": turns}))
    records, skipped = run("auto", root, tmp_path / "out")
    assert [record.id for record in records] == ["magicbrush-dev-7-1", "magicbrush-dev-7-2"]
    assert names(records[0], root)["mask"] == "images/7/7-mask1.png" and "mask" not in records[1].files
    assert records[1].picture("input").resolve() == records[0].picture("target").resolve()
    assert {record.split for record in records} == {"held_out"}, "dev and test sets are not trained on"
    assert skipped == [("edit_sessions.json: 7, turn 3", "picture '7-output3.png' is not there")]
    jsonl(
        root / "table.jsonl",
        {
            "img_id": "7",
            "turn_index": 1,
            "source_img": "7-input.png",
            "target_img": "7-output1.png",
            "instruction": "add",
            "mask_img": None,
        },
    )
    (row,), _ = run("magicbrush", root / "table.jsonl", tmp_path / "rows", split="train")
    assert row.id == "magicbrush-dev-7-1" and row.split == "train"


def test_imgedit_rows_and_turns(tmp_path):
    root = tmp_path / "set"
    for name in ("origin_0", "result_0", "origin_1", "result_1"):
        paint(root / f"results/5/{name}.png")
    jsonl(
        root / "add_part0.jsonl",
        {"input_images": ["results/5/origin_0.png"], "output_images": ["results/5/result_0.png"], "prompt": "add a hat"},
        {"input_images": ["results/5/origin_0.png"], "output_images": [], "prompt": "nothing"},
    )
    turns = [
        {"input_images": [f"results/5/origin_{n}.png"], "output_images": [f"results/5/result_{n}.png"], "prompt": f"turn {n}"}
        for n in (0, 1)
    ]
    text(root / "version_part3.json", json.dumps([{"data": turns}]))
    records, skipped = run("auto", root, tmp_path / "out")
    assert [(record.instruction.raw, record.instruction.category) for record in records] == [
        ("add a hat", "add"),
        ("turn 0", "version"),
        ("turn 1", "version"),
    ]
    assert skipped == [("add_part0.jsonl:2", "0 target pictures")] and len({record.id for record in records}) == 3


# ---- all -----------------------------------------------------------------------------------------------------------------


def test_copied_pictures_make_a_set_that_can_be_moved(tmp_path):
    root = musubi(tmp_path / "set")
    out = tmp_path / "deep/out"
    records, _ = run("musubi", root, out, copy=True, license="CC0-1.0")
    assert all(record.picture("target").parent == out / "images" for record in records) and records[0].license == "CC0-1.0"
    moved = tmp_path / "moved"
    out.rename(moved)
    assert check_records(moved).ok


def test_records_may_lie_anywhere(tmp_path):
    root = musubi(tmp_path / "set")
    for out in (root, tmp_path / "x/y/z.jsonl", root / "control/deep"):
        report = convert("musubi", root, out)
        assert check_records(report.path).ok and report.path.suffix == ".jsonl"
    with pytest.raises(ConfigError, match="expected no file yet, found one"):
        convert("musubi", root, root)
    assert convert("musubi", root, root, overwrite=True).written == 2


def test_the_report_says_what_was_not_used(tmp_path):
    root = musubi(tmp_path / "set")
    paint(root / "control/a.jpg", size=(48, 48))
    (root / "control/c.png").write_text("no picture")
    text(root / "images/c.txt", "words")
    report = convert("auto", root, tmp_path / "out")
    lines = "\n".join(report.lines(most=1))
    assert "layout musubi: target pictures in images" in lines and "(edit 2)" in lines and "not used: 2" in lines
    assert "... and 1 more" in lines and "1 pairs have pictures of different shapes (musubi-set-images-a)" in lines
    assert any("cannot be decoded" in each.reason for each in report.skipped)


def test_two_of_a_name_and_too_many_pictures(tmp_path):
    root = tmp_path / "set"
    paint(root / "a/t.png")
    row = {"image_path": "a/t.png", "caption": "x"}
    many = {**row, **{f"control_path_{n}": "a/t.png" for n in range(7)}}
    jsonl(root / "m.jsonl", row, row, many)
    records, skipped = run("auto", root, tmp_path / "out")
    assert [record.id for record in records] == ["musubi-set-m-t", "musubi-set-m-t-2"]
    assert skipped == [("m.jsonl:3", "7 pictures go in; a record holds 6")]


def test_what_cannot_be_converted_is_refused(tmp_path):
    with pytest.raises(DataError, match="found nothing"):
        convert("auto", tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ConfigError, match="Did you mean musubi"):
        convert("musubi_tuner", tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="Looked for magicbrush: edit_sessions.json"):
        convert("auto", tmp_path, tmp_path / "out")
    paint(tmp_path / "images/a.png")
    paint(tmp_path / "control/a.png")
    with pytest.raises(DataError, match=r"none that can be used \(images/a.png: no caption a.txt beside it\)"):
        convert("auto", tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="expected a folder of pictures"):
        convert("musubi", tmp_path, tmp_path / "out", images="pictures")
    paint(tmp_path / "results/b.png")
    with pytest.raises(DataError, match="found images, results. Name it"):
        convert("musubi", tmp_path, tmp_path / "out")
