"""Pictures inside a page: upright, small, exact or JPEG as asked, and words that stay words."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from reasonedit.tests.pictures import draw_picture
from reasonedit.training.inline_picture import escaped, inline


def read(url: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))


def test_a_small_picture_is_kept_exactly_as_png(tmp_path):
    draw_picture(40, 24).save(tmp_path / "a.png")
    url = inline(tmp_path / "a.png", 64)
    assert url.startswith("data:image/png;base64,")
    assert np.array_equal(np.asarray(read(url)), np.asarray(draw_picture(40, 24).convert("RGB")))


def test_a_large_one_is_scaled_and_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    draw_picture(80, 40).save(tmp_path / "a.jpg", exif=exif)
    url = inline(tmp_path / "a.jpg", 20, "JPEG")
    assert url.startswith("data:image/jpeg;base64,") and read(url).size == (10, 20)


def test_what_is_no_picture_is_told(tmp_path):
    (tmp_path / "a.png").write_text("none")
    with pytest.raises(OSError):
        inline(tmp_path / "a.png", 20)


def test_words_stay_words():
    assert escaped('<b a="1">&') == "&lt;b a=&quot;1&quot;&gt;&amp;"
