"""Preprocessing for the vision tower: the pixels of the HF processor, sizes, and the released reasoner's two extra resizes."""

from __future__ import annotations

import base64
import importlib.metadata
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.mllm.vision import CELL, patchify, prepare, preprocess, smart_resize, to_bytes
from reasonedit.tests.tiny import tiny_checkpoint

MODERN = int(importlib.metadata.version("transformers").split(".")[0]) >= 5
STOCK = (56 * 56, 28 * 28 * 1280)
REASONER = (262144, 802816)


def picture(width, height, seed=0):
    """A smooth picture with edges and noise, as 8-bit values: (1, 3, H, W) in 0..1."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([127 + 120 * np.sin(x / (7 + c) + y / (11 + 2 * c)) for c in range(3)], axis=-1)
    waves[height // 3 : height // 2, width // 4 : width // 2] = (255, 0, 128)
    noisy = waves + rng.normal(0, 20, waves.shape)
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)[None].float() / 255


def pil(image):
    return Image.fromarray(to_bytes(image)[0].permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def processor():
    """What the released pipelines get: the image processor that AutoProcessor makes of the released config."""
    pytest.importorskip("torchvision", reason="the HF image processor needs torchvision")
    from transformers import AutoProcessor

    made = AutoProcessor.from_pretrained(tiny_checkpoint("qwen2.5-vl"), local_files_only=True).image_processor

    def process(picture, bounds):
        if MODERN:
            return made(images=[picture], size={"shortest_edge": bounds[0], "longest_edge": bounds[1]}, return_tensors="pt")
        assert type(made).__name__ == "Qwen2VLImageProcessorFast"
        return made(images=[picture], min_pixels=bounds[0], max_pixels=bounds[1], return_tensors="pt")

    return process


@pytest.mark.parametrize("bounds", [STOCK, REASONER, (256 * 784, 400 * 784)], ids=["stock", "reasoner", "v1.2"])
@pytest.mark.parametrize("size", [(640, 427), (56, 56), (33, 700), (1, 1), (1531, 1022), (784, 1036), (29, 28)])
def test_pixels_equal_those_of_the_hf_processor(processor, size, bounds):
    image = picture(*size)
    expected = processor(pil(image), bounds)
    patches = preprocess(image, min_pixels=bounds[0], max_pixels=bounds[1])
    assert [1, *patches.grid] == expected["image_grid_thw"][0].tolist()
    assert patches.values.shape == expected["pixel_values"].shape
    assert (patches.values - expected["pixel_values"]).abs().max().item() <= 1e-6


def test_pixels_equal_those_that_the_released_reasoner_was_shown(processor):
    """Thumbnail, PNG, qwen_vl_utils, processor: four steps of the released client against our one call."""
    fetch_image = pytest.importorskip("qwen_vl_utils.vision_process").fetch_image
    for size in ((1500, 900), (301, 470), (1024, 1024), (2200, 700), (40, 30)):
        image = picture(*size)
        shown = pil(image)
        shown.thumbnail((1024, 1024))
        png = BytesIO()
        shown.save(png, format="PNG")
        url = "data:image;base64," + base64.b64encode(png.getvalue()).decode()
        low, high = REASONER
        expected = processor(fetch_image({"image": url}), (low, high))
        patches = preprocess(image, min_pixels=low, max_pixels=high, max_side=1024, snap=True)
        assert [1, *patches.grid] == expected["image_grid_thw"][0].tolist()
        assert (patches.values - expected["pixel_values"]).abs().max().item() <= 1e-6


def test_patch_order_by_hand():
    """Patches of one merged cell are neighbours, and each is laid out as channel, time, row, column."""
    image = torch.arange(3 * 56 * 84).reshape(1, 3, 56, 84) % 251
    patches = patchify(image.to(torch.uint8), (56, 84))
    from reasonedit.reasonedit_core.mllm.vision import MEAN, STD

    def normalised(channel, y, x):
        return (image[0, channel, y, x].item() / 255 - MEAN[channel]) / STD[channel]

    assert patches.values.shape == (24, 1176) and patches.grid == (4, 6) and patches.resized == (56, 84)
    cells = patches.values.view(2, 3, 2, 2, 3, 2, 14, 14)  # cell row, cell column, row, column, channel, time, y, x
    for cy, cx, py, px, c, t, y, x in [(0, 0, 0, 0, 0, 0, 0, 0), (1, 2, 1, 0, 2, 1, 13, 5), (0, 1, 0, 1, 1, 0, 3, 11)]:
        expected = normalised(c, 28 * cy + 14 * py + y, 28 * cx + 14 * px + x)
        assert cells[cy, cx, py, px, c, t, y, x].item() == pytest.approx(expected, abs=1e-5)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 6000), st.sampled_from([STOCK, REASONER, (3136, 12845056)]))
def test_smart_resize_keeps_its_promises(height, width, bounds):
    low, high = bounds
    if max(height, width) > 200 * min(height, width):
        with pytest.raises(ConfigError, match="aspect ratio"):
            smart_resize(height, width, min_pixels=low, max_pixels=high)
        return
    rows, columns = smart_resize(height, width, min_pixels=low, max_pixels=high)
    assert rows % CELL == columns % CELL == 0 and min(rows, columns) >= CELL
    assert rows * columns >= low
    if min(rows, columns) > CELL:  # a side of one cell cannot shrink further
        assert rows * columns <= high


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([STOCK, REASONER]))
def test_smart_resize_equals_transformers(height, width, bounds):
    pytest.importorskip("torchvision")
    from transformers.models.qwen2_vl import image_processing_qwen2_vl as theirs

    if max(height, width) > 200 * min(height, width):
        return
    low, high = bounds
    assert smart_resize(height, width, min_pixels=low, max_pixels=high) == theirs.smart_resize(
        height, width, min_pixels=low, max_pixels=high
    )


def test_key_names_content_and_size():
    image = picture(90, 60)
    key = preprocess(image, min_pixels=3136, max_pixels=50000).key
    assert preprocess(image.clone(), min_pixels=3136, max_pixels=60000).key == key  # other bounds, same size
    assert prepare(image, min_pixels=3136, max_pixels=50000, max_side=90)[2] == key  # nothing to shrink
    assert preprocess(image, min_pixels=30000, max_pixels=50000).key != key
    other = image.clone()
    other[0, 0, 5, 5] = 1 - other[0, 0, 5, 5]
    assert preprocess(other, min_pixels=3136, max_pixels=50000).key != key


@pytest.mark.parametrize("shape", [(3, 60, 90), (1, 4, 60, 90), (2, 3, 60, 90), (1, 3, 0, 9)])
def test_refuses_what_is_no_picture(shape):
    with pytest.raises(ConfigError, match=r"\(1, 3, height, width\)"):
        preprocess(torch.zeros(shape), min_pixels=3136, max_pixels=50000)


def test_refuses_bounds_that_cross():
    with pytest.raises(ConfigError, match="min 50000, max 3136"):
        preprocess(picture(90, 60), min_pixels=50000, max_pixels=3136)
