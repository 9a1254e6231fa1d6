"""The check of a data set: every problem is found in one look, and pairs that do not lie on each other are seen."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reasonedit.reasonedit_core import images as core_images
from reasonedit.reasonedit_core.errors import DataError
from reasonedit.training.data import check, pictures
from reasonedit.training.data.alignment import align
from reasonedit.training.data.check import aspect_name, check_records
from reasonedit.training.data.drawn import write_drawn


def texture(side: int, seed: int = 0) -> Image.Image:
    """Detail at every scale, as photographs have it."""
    rng = np.random.default_rng(seed)
    made = np.zeros((side, side))
    for cells in (4, 8, 16, 32, 64, 128):
        noise = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
        made += np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC)) / cells**0.5
    made = (made - made.min()) / np.ptp(made) * 255
    return Image.fromarray(made.astype(np.uint8))


def pair(side: int, dx: float, dy: float, zoom: float, edited: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Grey pictures, the second with its content moved by (dx, dy) and zoomed about its middle, a part of it painted over."""
    big, margin, middle = texture(side * 2), side // 2, side / 2
    scale = 1 / (1 + zoom)
    moved = (scale, 0, margin + middle - scale * (middle + dx), 0, scale, margin + middle - scale * (middle + dy))
    first, second = (
        np.asarray(big.transform((side, side), Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)).copy()
        for data in ((1, 0, margin, 0, 1, margin), moved)
    )
    part = int(side * edited**0.5)
    second[:part, :part] = np.asarray(texture(side, seed=9))[:part, :part]
    return first, second


@pytest.mark.parametrize("side", [256, 512])
@pytest.mark.parametrize(("dx", "dy", "zoom"), [(0, 0, 0), (3, -2, 0), (0, 0, 0.02), (2, 1, -0.03), (20, -12, 0), (45, 30, 0)])
@pytest.mark.parametrize("edited", [0.0, 0.2])
def test_shift_and_zoom_are_found_under_an_edit(side, dx, dy, zoom, edited):
    lie = align(*pair(side, dx, dy, zoom, edited))
    assert lie is not None
    assert lie.pixels(side, side) == pytest.approx((dx, dy), abs=0.2)
    assert lie.zoom == pytest.approx((zoom, zoom), abs=0.0025)
    assert lie.drift(side, side) == pytest.approx(max(abs(dx), abs(dy)) + abs(zoom) * side / 2, abs=0.4)


def test_parts_of_a_pixel_and_shift_with_zoom():
    assert align(*pair(512, 0.5, -0.3, 0)).pixels(512, 512) == pytest.approx((0.5, -0.3), abs=0.05)
    lie = align(*pair(512, 50, -40, 0.012))
    assert lie.pixels(512, 512) == pytest.approx((50, -40), abs=0.15) and lie.zoom == pytest.approx((0.012, 0.012), abs=0.001)


@pytest.mark.parametrize("seed", range(20))
def test_parts_that_move_each_their_own_way_are_no_shift(seed):
    first = pair(256, 0, 0, 0)[0]
    second, rng = first.copy(), np.random.default_rng(seed)
    for y in range(0, 256, 64):
        for x in range(0, 256, 64):
            part = np.s_[y : y + 64, x : x + 64]
            second[part] = np.roll(first[part], rng.integers(-7, 8, 2), axis=(0, 1))
    assert align(first, second) is None


def test_no_shift_is_made_up():
    first, second = pair(256, 0, 0, 0)
    other = np.asarray(texture(256, seed=4))
    flat = np.full((256, 256), 90, np.uint8)
    assert align(first, other) is None and align(flat, flat) is None and align(first, flat) is None
    assert align(first[:40], second[:40]) is None and align(first, second[:200]) is None
    one_thing_moved = first.copy()
    one_thing_moved[100:160, 100:160] = first[100:160, 92:152]
    lie = align(first, one_thing_moved)
    assert lie is not None and lie.drift(256, 256) < 0.1


def save(folder: Path, name: str, image: Image.Image | np.ndarray, **options) -> dict:
    path = folder / "images" / name
    path.parent.mkdir(exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **options)
    return {"path": f"images/{name}"}


def write(folder: Path, *records: dict) -> Path:
    path = folder / "records.jsonl"
    lines = [json.dumps({"schema": "reasonedit.record/1", "id": f"r{n}", **record}) for n, record in enumerate(records, 1)]
    path.write_text("\n".join(lines) + "\n")
    return path


def edit(first: dict, second: dict, **more) -> dict:
    return {"kind": "edit", "images": {"input": first, "target": second}, "instruction": {"raw": "change it"}, **more}


def problems(folder: Path, *records: dict, **options) -> list[tuple[str, str, str | None]]:
    """(code, record, field) of every problem."""
    report = check_records(write(folder, *records), **options)
    return [(each.code, each.record, each.field) for each in report.problems]


def test_a_shifted_pair_is_warned_of_with_its_pixels(tmp_path):
    first, second = pair(256, 6, -3, 0)
    records = [edit(save(tmp_path, "a.png", first), save(tmp_path, "b.png", second))]
    report = check_records(write(tmp_path, *records))
    (problem,) = report.problems
    assert problem.code == "misaligned-pair" and problem.severity == "warning" and report.ok
    assert "(+6.0, -3.0) px" in problem.found or "(+5.9, -3.0) px" in problem.found, problem.found
    assert problem.field == "images.target"
    assert check_records(write(tmp_path, *records), geometry=False).problems == ()
    near = [edit(save(tmp_path, "a.png", first), save(tmp_path, "c.png", pair(256, 0.4, 0, 0)[1]))]
    assert problems(tmp_path, *near) == []


def test_a_zoomed_pair_is_seen_at_another_size(tmp_path):
    first, second = pair(512, 0, 0, 0.03)
    resized = Image.fromarray(second).resize((768, 768), Image.Resampling.BICUBIC)
    report = check_records(write(tmp_path, edit(save(tmp_path, "a.png", first), save(tmp_path, "b.png", resized))))
    (problem,) = report.problems
    assert "+3.0" in problem.found or "+2.9" in problem.found
    assert "at 768 x 768" in problem.found


def test_shapes_of_a_pair(tmp_path):
    grey = [save(tmp_path, f"{w}x{h}.png", np.full((h, w), w % 256, np.uint8)) for w, h in SIZES]
    one, rounded, near, far = grey
    found = problems(tmp_path, edit(one, rounded), edit(one, near), edit(one, far))
    assert found == [("aspect-near", "r2", "images.target"), ("aspect-mismatch", "r3", "images.target")]
    assert problems(tmp_path, edit(one, far, edit={"allow_resize": True}), edit(one, near), allow_resize=True) == []
    assert problems(tmp_path, edit(one, far), aspect_tolerance=0.5) == [("aspect-near", "r1", "images.target")]
    text = str(check_records(write(tmp_path, edit(one, far))).problems[0])
    assert "expected the shape of input, 300 x 200, found 300 x 225, 12.5% off. Fix: crop both" in text


def test_a_pixel_of_rounding_is_no_other_shape(tmp_path):
    wide, small, tall, thin = (
        save(tmp_path, f"{w}x{h}.png", np.full((h, w), 9, np.uint8)) for w, h in ((900, 100), (450, 49), (100, 900), (49, 450))
    )
    assert problems(tmp_path, edit(wide, small), edit(tall, thin)) == []


SIZES = [(300, 200), (200, 133), (302, 200), (300, 225)]


def test_files_that_are_no_pictures(tmp_path):
    good = save(tmp_path, "a.png", texture(64))
    data = (tmp_path / "images/a.png").read_bytes()
    (tmp_path / "images/cut.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "images/text.png").write_text("hello")
    (tmp_path / "images/empty.png").touch()
    save(tmp_path, "long.png", np.zeros((1, 300), np.uint8))
    names = ["cut.png", "text.png", "empty.png", "long.png", "A.png", "images"]
    records = [edit(good, {"path": f"images/{name}"}) for name in names]
    records.append(edit(good, {"path": "x" * 5000}))
    report = check_records(write(tmp_path, *records))
    codes = [each.code for each in report.problems]
    assert codes == ["unreadable-picture"] * 3 + ["picture-size"] + ["missing-picture"] * 3
    assert not report.ok and report.summary.records == 7 and "did you mean a.png?" in str(report.problems[4])


def test_one_look_finds_the_faults_of_the_line_and_of_its_pictures(tmp_path):
    found = problems(tmp_path, edit({"path": "no.png"}, {"path": "neither.png"}, wieght=1), {"kind": "t2i"})
    assert found == [
        ("unknown-key", "r1", "wieght"),
        ("missing-picture", "r1", "images.input"),
        ("missing-picture", "r1", "images.target"),
        ("missing-field", "r2", "images.target"),
        ("missing-field", "r2", "caption"),
    ]
    assert problems(tmp_path, edit({"path": "no.png"}, {"path": "neither.png"}), pictures=False) == []


def test_stated_sizes_and_hashes_are_compared_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(tmp_path, "a.jpg", texture(64).resize((64, 32)), exif=exif)
    digest = hashlib.sha256((tmp_path / turned["path"]).read_bytes()).hexdigest()
    good = {**turned, "size": [32, 64], "sha256": digest}
    records = [{"kind": "t2i", "caption": "x", "images": {"target": each}} for each in (good, {**turned, "size": [64, 32]})]
    records.append({"kind": "t2i", "caption": "x", "images": {"target": {**turned, "sha256": "0" * 64}}})
    report = check_records(write(tmp_path, *records))
    codes = [(each.code, each.record) for each in report.problems if each.severity != "note"]
    assert codes == [("size-mismatch", "r2"), ("hash-mismatch", "r3")]
    assert "EXIF" in next(each.fix for each in report.problems if each.code == "size-mismatch")
    assert report.summary.sizes == {(32, 64): 3} and report.summary.aspects == {"1:2": 3}
    assert [each.code for each in report.of("note")] == ["exif-turned"] * 3


def test_transparency_and_frames_are_noted(tmp_path):
    clear = np.zeros((40, 40, 4), np.uint8)
    solid = np.full((40, 40, 4), 255, np.uint8)
    frames = [Image.new("L", (40, 40), value) for value in (0, 255)]
    names = [
        save(tmp_path, "clear.png", clear),
        save(tmp_path, "solid.png", solid),
        save(tmp_path, "many.gif", frames[0], save_all=True, append_images=frames[1:]),
    ]
    found = problems(tmp_path, *({"kind": "t2i", "caption": "x", "images": {"target": name}} for name in names))
    assert found == [("transparency", "r1", "images.target"), ("several-frames", "r3", "images.target")]


def test_a_pair_of_one_picture_and_a_picture_in_two_splits(tmp_path):
    one, two = save(tmp_path, "a.png", texture(64)), save(tmp_path, "b.bmp", texture(64))
    red, blue = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64, 3), np.uint8)
    red[..., 0], blue[..., 2] = 100, 262 % 256  # (100, 0, 0) and (0, 0, 6): other colours
    blue[..., 2] = 255  # grey 29 against grey 30: nearly the same grey
    recoloured = edit(save(tmp_path, "red.png", red), save(tmp_path, "blue.png", blue))
    found = problems(tmp_path, edit(one, two), recoloured, edit(one, {**two}, split="held_out"))
    assert ("identical-pair", "r1", "images.target") in found and not any(record == "r2" for _, record, _ in found)
    assert [each for each in found if each[0] == "split-leak"] == [
        ("split-leak", "r3", "images.input"),
        ("split-leak", "r3", "images.target"),
    ]


def test_the_same_grey_is_not_the_same_picture(tmp_path):
    flat = [Image.new("RGB", (64, 64), colour) for colour in ((90, 90, 90), (0, 153, 0))]
    grey = [int(np.asarray(each.convert("L"))[0, 0]) for each in flat]
    assert grey[0] == grey[1], "the colours are chosen to have one grey"
    assert problems(tmp_path, edit(save(tmp_path, "a.png", flat[0]), save(tmp_path, "b.png", flat[1]))) == []


def test_drawn_records_have_no_problem_and_are_summed_up(tmp_path):
    path = write_drawn(tmp_path, {"reflect": 10, "edit": 20, "t2i": 3, "think": 8, "hypothetical": 4, "understand": 2}, seed=5)
    report = check_records(path)
    assert report.problems == ()
    summary = report.summary
    assert summary.kinds == {"reflect": 10, "edit": 20, "t2i": 3, "think": 8, "hypothetical": 4, "understand": 2}
    assert summary.verdicts == {"success": 6, "reflection": 2, "failed": 2} and summary.sizes == {(96, 96): 47}
    assert summary.languages == {"en": 24, "zh": 23} and summary.aspects == {"1:1": 47}
    lines = "\n".join(report.lines())
    assert "47 records" in lines and "0 errors, 0 warnings, 0 notes" in lines


def test_the_number_of_workers_and_the_batch_do_not_count(tmp_path, monkeypatch):
    records = [edit({"path": f"{n}.png"}, {"path": "b.png"}) for n in range(7)]
    whole = check_records(write(tmp_path, *records), workers=1)
    monkeypatch.setattr(check, "_BATCH", 2)
    done = []
    assert check_records(tmp_path, workers=3, on_progress=done.append) == whole
    assert done == [2, 4, 6, 7] and len(whole.problems) == 14
    assert {each.record for each in check_records(tmp_path, sample=3).problems} == {"r1", "r4", "r7"}


def test_nothing_to_check(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n")
    assert [each.code for each in check_records(tmp_path).problems] == ["no-records"]
    with pytest.raises(DataError, match="found nothing"):
        check_records(tmp_path / "nowhere")


def test_what_passes_here_also_loads_in_the_core(tmp_path):
    assert (pictures.MAX_PIXELS, pictures.MAX_ASPECT) == (core_images.MAX_PIXELS, core_images.MAX_ASPECT)
    exif = Image.Exif()
    exif[0x0112] = 8
    upside_down = Image.Exif()
    upside_down[0x0112] = 3
    deep = Image.fromarray((np.arange(64 * 48, dtype=np.uint16) * 20).reshape(48, 64))
    for name, image, options in (
        ("a.png", texture(64), {}),
        ("b.jpg", texture(64).resize((64, 40)), {"exif": exif}),
        ("u.jpg", texture(64).resize((64, 40)), {"exif": upside_down}),
        ("c.png", Image.fromarray(np.zeros((8, 9, 4), np.uint8)), {}),
        ("d.png", deep, {}),
        ("e.gif", texture(64).convert("P"), {}),
    ):
        path = tmp_path / save(tmp_path, name, image, **options)["path"]
        loaded = core_images.load_image(path)
        seen = pictures.probe(path)
        assert seen.size == pictures.upright_size(path) == (loaded.rgb.shape[3], loaded.rgb.shape[2]), name
        grey = loaded.rgb[0].mean(0).numpy() * 255
        assert np.abs(seen.grey.astype(float) - grey).max() < 3, name


def test_names_of_aspects():
    names = {(64, 64): "1:1", (150, 100): "3:2", (100, 150): "2:3", (1920, 1080): "16:9", (100, 310): "0.32", (133, 100): "4:3"}
    assert {size: aspect_name(*size) for size in names} == names
