"""Official layouts of the benchmarks in and out."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from reasonedit.reasonedit_core.errors import ConfigError, DataError
from reasonedit.tests.benchmark_tools import LAYOUTS, prepared, save
from reasonedit.training.eval.benchmarks.generate import take_in
from reasonedit.training.eval.benchmarks.items import COUNTS, FILE_NAME, chosen, count_remarks, read_manifest, write_manifest
from reasonedit.training.eval.benchmarks.outputs import OUTPUTS, export_official, find_output, keep_output, official_name
from reasonedit.training.eval.benchmarks.prepare import prepare

NAMES = {
    "gedit": f"fullset/color_alter/en/{0:032x}",
    "imgedit": "100",
    "kris": "temporal_prediction/7",
    "rise": "images/temporal_reasoning/temporal_0",
    "reason50k": "Physical/r0",
}


@pytest.mark.parametrize("bench", LAYOUTS)
def test_every_layout_is_read_whole_and_results_are_named_as_official_scripts_look_for_them(bench, tmp_path):
    manifest = prepared(bench, tmp_path)
    assert len(manifest.items) == 5 and manifest.bench == bench
    shutil.rmtree(tmp_path / "official")  # the manifest stands by itself
    for item in manifest.items:
        for path in manifest.sources(item):
            assert Image.open(path).size == (64, 48)
        for name in ("gt_img", "reference_img"):
            assert manifest.picture(item, name) is None or manifest.picture(item, name).is_file()
    assert NAMES[bench] in {official_name(item) for item in manifest.items}
    assert len({official_name(item) for item in manifest.items}) == 5


def test_counts_are_those_that_are_published():
    assert {bench: sum(counts.values()) for bench, counts in COUNTS.items() if counts} == {
        "gedit": 606,
        "imgedit": 737,
        "kris": 1267,
    }
    assert {bench: len(counts) for bench, counts in COUNTS.items() if counts} == {"gedit": 11, "imgedit": 9, "kris": 20}


def test_items_that_are_missing_are_named_by_group(tmp_path):
    remarks = count_remarks(prepared("imgedit", tmp_path).items)
    assert "add (en): expected 95 items as published, found 2" in remarks and len(remarks) == 9


def test_kris_keeps_all_frames_and_the_true_view_and_rise_takes_nan_for_no(tmp_path):
    items = {item.group: item for item in prepared("kris", tmp_path / "k").items}
    assert len(items["temporal_prediction"].sources) == 2 and "gt_img" not in items["temporal_prediction"].refs
    assert "gt_img" in items["viewpoint_change"].refs and items["biology"].refs["explain"] == "Because."
    free = [item.flags["consistency_free"] for item in prepared("rise", tmp_path / "r").items]
    assert free == [False, False, False, False, True]


def test_a_flat_list_of_kris_is_read_as_well(tmp_path):
    root = LAYOUTS["kris"](tmp_path / "official")
    rows = []
    for path in sorted(root.glob("*/annotation.json")):
        rows += [{"id": key, "type": path.parent.name, **row} for key, row in json.loads(path.read_text()).items()]
        path.unlink()
    (root / "final_data.json").write_text(json.dumps(rows))
    assert prepare("kris", root, tmp_path / "out").items == 5


def test_parquet_of_gedit_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    save(tmp_path / "a.png", 3)
    picture = {"bytes": (tmp_path / "a.png").read_bytes(), "path": "a.png"}
    row = {"task_type": "ps_human", "key": "0" * 32, "instruction": "x", "instruction_language": "en", "input_image": picture}
    (tmp_path / "data").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "Intersection_exist": True}]), tmp_path / "data" / "0.parquet")
    prepare("gedit", tmp_path / "data", tmp_path / "out")
    (item,) = read_manifest(tmp_path / "out").items
    assert (item.group, item.flags) == ("ps_human", {"intersection": True})


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda root: (root / "Basic/animal/000000001.png").unlink(), DataError, "--images"),
        (lambda root: (root / "Basic/basic_edit.json").unlink(), ConfigError, "basic_edit.json"),
        (lambda root: (root / "Basic/basic_edit.json").write_text("{}"), DataError, "found none"),
        (lambda root: (root / "Basic/basic_edit.json").write_text('{"1": {"id": "a.png"}}'), DataError, "edit_type"),
        (
            lambda root: (root / "Basic/basic_edit.json").write_text(
                '{"1": {"id": "../../x.png", "prompt": "p", "edit_type": "add"}}'
            ),
            DataError,
            "leads out of it",
        ),
    ],
)
def test_a_layout_that_is_not_whole_is_refused_with_what_to_do(spoil, error, words, tmp_path):
    root = LAYOUTS["imgedit"](tmp_path / "official")
    spoil(root)
    with pytest.raises(error, match=words):
        prepare("imgedit", root, tmp_path / "out")
    assert not (tmp_path / "out" / FILE_NAME).exists()


def test_a_manifest_holds_one_benchmark_and_each_id_once(tmp_path):
    items = prepared("imgedit", tmp_path / "a").items
    with pytest.raises(DataError, match="twice"):
        write_manifest(tmp_path, [items[0], items[0]])
    with pytest.raises(DataError, match="imgedit and kris"):
        write_manifest(tmp_path, [items[0], prepared("kris", tmp_path / "b").items[0]])
    path = write_manifest(tmp_path, items)
    path.write_text(path.read_text() + '{"bench": "imgedit"}\n')
    with pytest.raises(DataError, match=f"{FILE_NAME}:6"):
        read_manifest(path)


def test_an_id_cannot_name_a_file_outside_the_run(tmp_path):
    from dataclasses import replace

    item = prepared("imgedit", tmp_path).items[0]
    for name in ("../x", "/x", "a/../../x", "a\\b"):
        with pytest.raises(DataError, match="leads elsewhere"):
            official_name(replace(item, id=name))


def test_a_smaller_sample_is_part_of_a_larger_one_and_no_order_decides(tmp_path):
    items = prepared("reason50k", tmp_path).items
    two, four = ({item.id for item in chosen(items, number)} for number in (2, 4))
    assert two < four and {item.id for item in chosen(items[::-1], 2)} == two and len(chosen(items, None)) == 5


@pytest.mark.parametrize("bench", LAYOUTS)
def test_export_gives_what_import_takes(bench, tmp_path):
    manifest = prepared(bench, tmp_path)
    for item in manifest.items[1:]:
        keep_output(tmp_path / "run", item, manifest.sources(item)[0].read_bytes())
    taken = export_official(manifest, tmp_path / "run", tmp_path / "out")
    assert taken.missing == (manifest.items[0].id,)
    sources = list((tmp_path / "out").rglob("*_SRCIMG.png"))
    assert len(sources) == (4 if bench == "gedit" else 0)
    done = take_in(manifest, tmp_path / "out", tmp_path / "again", "theirs")
    assert (done.made, list(done.failed)) == (4, [manifest.items[0].id])
    for item in manifest.items[1:]:
        ours, theirs = (find_output(tmp_path / run / OUTPUTS, item).read_bytes() for run in ("run", "again"))
        assert ours == theirs
    other = manifest.sources(manifest.items[0])[0].read_bytes()
    find_output(tmp_path / "out", manifest.items[1]).write_bytes(
        other
    )  # imported again, a new picture takes the old one's place
    take_in(manifest, tmp_path / "out", tmp_path / "again", "theirs")
    assert find_output(tmp_path / "again" / OUTPUTS, manifest.items[1]).read_bytes() == other


def test_a_folder_of_another_layout_is_refused_with_an_example(tmp_path):
    manifest = prepared("gedit", tmp_path)
    with pytest.raises(ConfigError, match="fullset/color_alter/en"):
        take_in(manifest, tmp_path / "official", tmp_path / "run", "x")
