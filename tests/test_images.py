"""Pictures from files, the exact resizes and the size plans."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonedit.reasonedit_core import images
from reasonedit.reasonedit_core.errors import ConfigError, DataError


def noise_image(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def picture(width: int, height: int, seed: int = 0) -> torch.Tensor:
    return images.from_pil(Image.fromarray(noise_image(width, height, seed=seed)))


@pytest.mark.parametrize(
    ("size", "expected"), [((1920, 1080), (1360, 768)), ((3000, 2000), (1248, 832)), ((800, 1200), (832, 1248))]
)
def test_step1x_sizes_of_the_released_rule(size, expected):
    assert images.step1x_size(*size, 1024) == expected


@settings(max_examples=200, derandomize=True)
@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([64, 96, 512, 1024]))
def test_sizes_are_multiples_and_near_the_area(width, height, level):
    for found, multiple in (
        (images.step1x_size(width, height, level), 16),
        (images.qwen_size(width, height, level * level), 32),
    ):
        assert all(side >= multiple and side % multiple == 0 for side in found)
    if max(width, height) <= 4 * min(width, height) and level >= 512:
        for found in (images.step1x_size(width, height, level), images.qwen_size(width, height, level * level)):
            assert 0.85 < found[0] * found[1] / level**2 < 1.15


@pytest.mark.parametrize("size", [(1024, 1024), (1920, 1080), (97, 61), (33, 250), (640, 427), (17, 3000)])
@pytest.mark.parametrize("area", [1024 * 1024, 384 * 384])
def test_qwen_size_equals_diffusers(size, area):
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    expected = tuple(int(side) for side in calculate_dimensions(area, size[0] / size[1]))
    assert images.qwen_size(*size, area) == tuple(max(side, 32) for side in expected)


def test_quantize_equals_the_released_postprocess():
    from diffusers.image_processor import VaeImageProcessor

    for dtype in (torch.float32, torch.bfloat16):
        pixels = (torch.rand(1, 3, 19, 23, generator=torch.Generator().manual_seed(0)) * 2.6 - 1.3).to(dtype)
        expected = VaeImageProcessor(vae_scale_factor=16).postprocess(pixels)[0]
        assert torch.equal(images.quantize(pixels), images.from_pil(expected))


def test_pil_round_trip_keeps_every_level():
    levels = torch.arange(256).float().view(1, 1, 16, 16).expand(1, 3, 16, 16) / 255.0
    assert torch.equal(images.from_pil(images.to_pil(levels)), levels)
    assert images.to_pil(torch.full((1, 3, 1, 1), 1.7)).getpixel((0, 0)) == (255, 255, 255)


def test_resizes_are_those_of_pil_and_of_torch():
    array = noise_image(97, 61)
    source, image = images.from_pil(Image.fromarray(array)), Image.fromarray(array)
    assert torch.equal(images.resize_lanczos_pil(source, 48, 80), images.from_pil(image.resize((48, 80), Image.LANCZOS)))
    # The release calls resize() without a filter: this holds as long as Pillow's default stays bicubic.
    assert torch.equal(images.resize_bicubic_pil(source, 33, 250), images.from_pil(image.resize((33, 250))))
    released = torch.from_numpy(array.copy()).float().permute(2, 0, 1)[None] / 255.0
    released = torch.nn.functional.interpolate(released, (48, 80), mode="bilinear", antialias=True)
    assert torch.equal(images.resize_bilinear(source, 80, 48), released)
    assert images.resize_lanczos_pil(source, 97, 61) is source


def save(tmp_path, image: Image.Image, name: str = "in.png", **options) -> str:
    path = tmp_path / name
    image.save(path, **options)
    return path


def test_plain_file_is_exact_and_has_no_note(tmp_path):
    array = noise_image(13, 7)
    loaded = images.load_image(save(tmp_path, Image.fromarray(array)))
    assert loaded.alpha is None and loaded.note == "" and loaded.rgb.shape == (1, 3, 7, 13)
    assert torch.equal(loaded.rgb, torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    array = noise_image(4, 2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    loaded = images.load_image(save(tmp_path, Image.fromarray(array), exif=exif))
    turned = {
        1: array,
        2: array[:, ::-1],
        3: array[::-1, ::-1],
        4: array[::-1],
        5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1),
        7: np.rot90(array, 2).transpose(1, 0, 2),
        8: np.rot90(array),
    }[orientation]
    assert np.array_equal(np.asarray(images.to_pil(loaded.rgb)), turned)
    assert (str(orientation) in loaded.note) == (orientation > 1)


def test_transparency_is_laid_on_white_and_kept(tmp_path):
    array = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], dtype=np.uint8)
    loaded = images.load_image(save(tmp_path, Image.fromarray(array)))
    assert np.asarray(images.to_pil(loaded.rgb)).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]
    assert (loaded.alpha * 255).round().flatten().tolist() == [255, 0, 51]
    assert "white" in loaded.note


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    return image


@pytest.mark.parametrize(
    ("image", "options", "pixels"),
    [
        (Image.fromarray(np.array([[7, 250]], dtype=np.uint8)), {}, [[7] * 3, [250] * 3]),
        (Image.fromarray(np.array([[[100, 255], [0, 0]]], dtype=np.uint8)), {}, [[100] * 3, [255] * 3]),
        (palette_with_transparency(), {}, [[10, 20, 30], [40, 50, 60]]),
        (palette_with_transparency(), {"transparency": 1}, [[10, 20, 30], [255, 255, 255]]),
        (Image.fromarray(np.array([[True, False]])), {}, [[255] * 3, [0] * 3]),
        (Image.fromarray(np.array([[0, 32768]], dtype=np.uint16)), {}, [[0] * 3, [128] * 3]),
        (Image.fromarray(np.array([[65535, 257 * 3]], dtype=np.uint16)), {}, [[255] * 3, [3] * 3]),
    ],
    ids=["L", "LA", "P", "P-transparent", "1", "I;16", "I;16-bright"],
)
def test_modes_become_rgb(tmp_path, image, options, pixels):
    loaded = images.load_image(save(tmp_path, image, **options))
    assert np.asarray(images.to_pil(loaded.rgb))[0].tolist() == pixels
    assert loaded.note


def test_cmyk_and_float_files(tmp_path):
    cmyk = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    red = images.load_image(save(tmp_path, cmyk, "in.tif")).rgb[0, :, 0, 0]
    assert red[0] > 0.9 and red[1:].max() < 0.1
    for values, expected in (([[0.0, 0.5]], 128), ([[0.0, 100.0]], 100)):
        image = Image.fromarray(np.array(values, dtype=np.float32))
        loaded = images.load_image(save(tmp_path, image, "float.tif")).rgb
        assert round(float(loaded[0, 0, 0, 1]) * 255) == expected
    image = Image.fromarray(np.array([[0.0, float("nan")]], dtype=np.float32))
    with pytest.raises(DataError, match="0..65535"):
        images.load_image(save(tmp_path, image, "nan.tif"))


def test_one_pixel_loads(tmp_path):
    assert images.load_image(save(tmp_path, Image.new("RGB", (1, 1), (1, 2, 3)))).rgb.shape == (1, 3, 1, 1)


@pytest.mark.parametrize(("size", "words"), [((1, 201), "200:1"), ((12000, 9000), "108 million")])
def test_sizes_that_cannot_be_taken(tmp_path, size, words):
    with pytest.raises(ConfigError, match=words):
        images.load_image(save(tmp_path, Image.new("1", size)))


def test_a_bomb_is_refused_by_its_header(tmp_path):
    path = save(tmp_path, Image.new("1", (1, 1)))
    data = bytearray(path.read_bytes())
    data[16:24] = (100_000).to_bytes(4, "big") * 2
    import zlib

    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    path.write_bytes(bytes(data))
    with pytest.raises(ConfigError, match="million pixels"):
        images.load_image(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_names_path_and_remedy(tmp_path, format):
    buffer = io.BytesIO()
    Image.fromarray(noise_image(64, 64)).save(buffer, format=format)
    path = tmp_path / "cut.bin"
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(DataError, match=r"cut\.bin.*(again|formats)"):
        images.load_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"<svg/>"])
def test_a_file_that_is_no_picture(tmp_path, content):
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"notes\.png.*PNG, JPEG"):
        images.load_image(path)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="found nothing"):
        images.load_image(tmp_path / "no.png")
    with pytest.raises(ConfigError, match="found a folder"):
        images.load_image(tmp_path)


def test_save_png_round_trip_with_metadata(tmp_path):
    source = picture(9, 5)
    path = tmp_path / "out.png"
    images.save_png(source, path, {"instruction": "把天空变红", "round": {"index": 1}})
    assert torch.equal(images.load_image(path).rgb, source)
    text = Image.open(path).text
    assert text["instruction"] == "把天空变红" and text["round"] == '{"index": 1}'
    assert os.listdir(tmp_path) == ["out.png"]


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "out.png"
    images.save_png(picture(9, 5), path)
    before = path.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConfigError, match=r"out\.png: No space left"):
        images.save_png(picture(9, 5, seed=1), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["out.png"]
