"""Differences of pixels, held against scikit-image and against shifts that are known; what is no edit; anchors and masks."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
from PIL import Image

from reasonedit.reasonedit_core.errors import DataError
from reasonedit.tests.benchmark_tools import damaged_png, prepared
from reasonedit.tests.pictures import draw_picture
from reasonedit.training.eval.benchmarks import pixels
from reasonedit.training.eval.benchmarks.differences import PIXELS, measure, pixel_means
from reasonedit.training.eval.benchmarks.outputs import OUTPUTS, find_output, keep_output, official_name


def picture(width=120, height=90) -> np.ndarray:
    return np.asarray(draw_picture(width, height), dtype=np.float64) / 255


def noisy(a: np.ndarray, seed: int = 0) -> np.ndarray:
    return (a + np.random.default_rng(seed).normal(0, 0.05, a.shape)).clip(0, 1)


def test_psnr_and_ssim_are_those_of_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    a, b = picture(), noisy(picture())
    theirs = metrics.structural_similarity(
        a, b, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert pixels.ssim(a, b) == pytest.approx(theirs, abs=1e-6)
    assert pixels.psnr(a, b) == pytest.approx(metrics.peak_signal_noise_ratio(a, b, data_range=1.0), abs=1e-9)


def test_equal_pictures():
    a = picture()
    assert (pixels.l1(a, a), pixels.ssim(a, a), pixels.psnr(a, a)) == (0, pytest.approx(1), math.inf)
    assert pixels.compare(a, a) == {"l1": 0, "psnr": None, "ssim": 1, "shift": 0}


@pytest.mark.parametrize(("right", "down"), [(0, 0), (3, 0), (0, -4), (-5, 7), (8, 8)])
def test_a_shift_is_found(right, down):
    whole = picture(200, 160)
    a, b = whole[20:140, 20:180], whole[20 - down : 140 - down, 20 - right : 180 - right]
    assert pixels.shift(a, noisy(b)) == pytest.approx((right, down), abs=0.35)


def test_a_mask_leaves_out_what_was_edited():
    a, b = picture(), picture()
    b[10:40, 10:50] = (1.0, 0.0, 0.0)
    outside = np.ones(a.shape[:2], bool)
    outside[10:40, 10:50] = False
    assert pixels.l1(a, b, outside) == 0 < pixels.l1(a, b) and pixels.psnr(a, b, outside) == math.inf
    assert pixels.ssim(a, b) < pixels.ssim(a, b, outside) < 1  # windows at its edge see it
    inside = pixels.l1(a, b, ~outside)
    assert pixels.l1(a, b) == pytest.approx(inside * (~outside).mean())


@pytest.mark.parametrize(
    ("a", "b", "mask", "words"),
    [
        (picture(), picture(60, 90), None, "one size"),
        (picture(), picture(), np.ones((3, 3), bool), "one size"),
        (picture(), picture(), np.zeros((90, 120), bool), "empty"),
        (picture(10, 90), picture(10, 90), None, "11 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(a, b, mask, words):
    with pytest.raises(DataError, match=words):
        pixels.ssim(a, b, mask)


def test_pictures_are_read_upright_on_white_and_brought_to_a_size(tmp_path):
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.save(tmp_path / "a.png")
    a = pixels.read_picture(tmp_path / "a.png")
    assert a.shape == (10, 20, 3) and a[5, 5].tolist() == [1, 1, 1] and a[0, 0].tolist() == [1, 0, 0]
    assert pixels.read_picture(tmp_path / "a.png", (40, 30)).shape == (30, 40, 3)
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="b.png"):
        pixels.read_picture(tmp_path / "b.png")


# ---- what is no edit -------------------------------------------------------------------------------------------------------


def as_jpeg(a: np.ndarray, quality: int) -> np.ndarray:
    stream = io.BytesIO()
    Image.fromarray(np.rint(a * 255).astype(np.uint8)).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream), dtype=np.float64) / 255


def edited_small(a: np.ndarray) -> np.ndarray:
    b = a.copy()
    b[200:260, 300:360] = (1.0, 0.0, 0.0)
    return b


@pytest.mark.parametrize(
    ("change", "still"),
    [
        (lambda a: a, True),
        (lambda a: as_jpeg(a, 75), True),
        (lambda a: as_jpeg(a, 30), True),
        (lambda a: (a + np.random.default_rng(0).normal(0, 0.02, a.shape)).clip(0, 1), True),
        (edited_small, False),
        (lambda a: as_jpeg(edited_small(a), 75), False),
        (lambda a: 0.05 + 0.9 * a, False),  # all the light, slightly
    ],
    ids=("itself", "JPEG 75", "JPEG 30", "noise", "a red patch", "a red patch in JPEG", "light"),
)
def test_a_small_edit_is_one_and_noise_is_none(change, still):
    a = picture(512, 512)
    assert pixels.no_op(*pixels.largest_change(a, change(a))) is still
    if change is edited_small:
        assert pixels.l1(a, change(a)) < 0.01, "the mean over the picture would not tell it from noise"


@pytest.mark.parametrize("at", [(0, 0), (8, 8), (90 - 10, 120 - 10), (37, 53)])
def test_a_spot_of_ten_pixels_is_seen_wherever_it_lies(at):
    a = np.full((90, 120, 3), 0.5)
    b = a.copy()
    b[at[0] : at[0] + 10, at[1] : at[1] + 10] = 1.0
    assert not pixels.no_op(*pixels.largest_change(a, b))
    assert pixels.largest_change(a[:5, :5], b[:5, :5])[0] <= 0.5  # a picture smaller than one square


# ---- masks -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "down"), [(0, 0), (3, 0), (0, -4), (-5, 7)])
def test_a_shift_outside_a_mask_is_found_and_one_inside_is_none(right, down):
    whole = picture(200, 160)
    a, b = whole[20:140, 20:180], noisy(whole[20 - down : 140 - down, 20 - right : 180 - right])
    outside = np.ones(a.shape[:2], bool)
    outside[20:100, 20:110] = False
    b[~outside] = np.random.default_rng(1).random((int((~outside).sum()), 3))
    assert pixels.shift(a, b, outside) == pytest.approx((right, down), abs=0.35)
    inside = a.copy()
    inside[20:100, 20:110] = a[24:104, 20:110]
    assert pixels.shift(a, inside, outside) == pytest.approx((0, 0), abs=0.1)
    assert pixels.shift(np.zeros_like(a), np.zeros_like(a), outside) == (0, 0)


def test_the_small_mse_is_that_of_what_the_mask_leaves():
    a = np.zeros((128, 128, 3))
    b = a.copy()
    b[:, 64:] = 0.5
    left, all_over = np.zeros((128, 128), bool), np.ones((128, 128), bool)
    left[:, :48] = True
    assert pixels.mse_small(a, b, left) == pytest.approx(0, abs=1e-9)
    assert pixels.mse_small(a, b, all_over) == pytest.approx(0.25 / 2, rel=0.03)
    one = np.zeros((512, 512), bool)
    one[0, 0] = True
    assert pixels.mse_small(np.zeros((512, 512, 3)), np.zeros((512, 512, 3)), one) is None  # too little to be left of


# ---- a run -----------------------------------------------------------------------------------------------------------------


def test_pictures_are_held_against_source_and_target_and_so_are_the_anchors(tmp_path):
    manifest = prepared("reason50k", tmp_path)
    run = tmp_path / "run"
    for at, item in enumerate(manifest.items[:4]):
        source, target = manifest.sources(item)[0], manifest.picture(item, "gt_img")
        keep_output(run, item, (target if at else source).read_bytes())
    measured = measure(manifest, run, manifest.items)
    told = pixel_means(measured)
    assert told["n"] == 4 and told["to_target"]["l1"]["n_scored"] == 4 and told["to_target"]["l1"]["n"] == 5
    assert told["to_target"]["psnr"]["n_scored"] == 1 and told["to_target"]["psnr"]["infinite"] == 3
    assert told["to_source"]["psnr"]["infinite"] == 1 and told["to_source"]["psnr"]["n_scored"] == 3
    still, end = (told["anchors"][name] for name in ("no-edit", "ground-truth"))
    assert still["to_source"]["l1"]["mean"] == 0 < still["to_target"]["l1"]["mean"]
    assert (
        end["to_target"]["l1"]["mean"] == 0 < end["to_source"]["l1"]["mean"] == pytest.approx(still["to_target"]["l1"]["mean"])
    )
    assert still["to_source"]["psnr"] == {"n": 4, "n_scored": 0, "mean": None, "infinite": 4}
    lines = (run / PIXELS).read_text().splitlines()
    assert len(lines) == 12 and measure(manifest, run, manifest.items).rows == measured.rows
    old = [{key: value for key, value in json.loads(line).items() if key != "version"} for line in lines]
    (run / PIXELS).write_text("".join(json.dumps(row) + "\n" for row in old))  # rows of before are measured anew
    assert measure(manifest, run, manifest.items).rows == measured.rows


def test_a_damaged_picture_or_mask_costs_its_own_item_only(tmp_path):
    manifest, masks = prepared("imgedit", tmp_path), tmp_path / "masks"
    run = tmp_path / "run"
    for item in manifest.items:
        keep_output(run, item, manifest.sources(item)[0].read_bytes())
    good, torn, text, white, _ = manifest.items
    damaged_png(find_output(run / OUTPUTS, torn))
    find_output(run / OUTPUTS, text).write_bytes(b"no picture")
    masks.mkdir()
    for item, colour in ((good, 0), (white, 255)):
        Image.new("L", (64, 48), colour).save(masks / f"{official_name(item)}.png")
    found = measure(manifest, run, manifest.items, masks)
    assert found.damaged.keys() == {torn.id, text.id, white.id} and len(found.rows) == 2
    assert all(f"{each.id}.png" in found.damaged[each.id] for each in (torn, text, white))
    assert "white alone" in found.damaged[white.id] and "outside" in found.rows[good.id]
    assert pixel_means(found)["to_source"]["l1"]["n"] == 5
