"""Differences of pixels, held against scikit-image and against shifts that are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from reasonedit.reasonedit_core.errors import DataError
from reasonedit.tests.pictures import draw_picture
from reasonedit.training.eval.benchmarks import pixels


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
