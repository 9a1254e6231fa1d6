"""The sizes of ReasonEdit-Q: equal to the pipelines' rule, who decides the output, what a chained round keeps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.geometry import QwenGeometry

SIDES = st.integers(1, 6000)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(width=SIDES, height=SIDES, level=st.integers(256, 2048))
def test_sizes_are_those_of_the_pipelines(width, height, level):
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    area = calculate_dimensions(level * level, width / height)
    shown = calculate_dimensions(384 * 384, width / height)
    if 0 in (*area, *shown):
        return  # the pipelines fail there
    edit = QwenGeometry(plus=False).plan([(width, height)], level)
    assert edit.output == edit.vae[0] == edit.mllm[0] == area
    plus = QwenGeometry(plus=True).plan([(width, height)], level)
    assert (plus.output, plus.vae, plus.mllm) == (area, (area,), (shown,))


def test_square_at_the_default_level():
    plan = QwenGeometry(plus=True).plan([(500, 500)], 1024)
    assert (plan.output, plan.vae, plan.mllm) == ((1024, 1024), ((1024, 1024),), ((384, 384),))


def test_output_follows_the_edited_picture_and_in_the_release_the_last():
    geometry, sizes = QwenGeometry(plus=True), [(1600, 900), (900, 1600), (700, 700)]
    ours, released = geometry.plan(sizes, 1024), geometry.plan(sizes, 1024, released=True)
    assert ours.output == ours.vae[0] == (1376, 768)
    assert released.output == released.vae[2] == (1024, 1024)
    assert (ours.vae, ours.mllm) == (released.vae, released.mllm)


def test_a_generated_picture_keeps_its_size():
    """Its own ratio would round to another size: a chain of edits must not drift."""
    size = (1376, 768)
    assert QwenGeometry(plus=True).plan([size], 512).output != size
    plan = QwenGeometry(plus=True).plan([size, (640, 480)], 512, keep=True)
    assert plan.output == plan.vae[0] == size and plan.vae[1] == (576, 448)
    assert plan.mllm[0] == (512, 288)
    assert QwenGeometry(plus=False).plan([size], 512, keep=True).mllm == (size,)


def test_areas_and_multiple_are_parameters():
    large = QwenGeometry(plus=True, multiple=16, patch=64).plan([(100, 100)], 96)
    assert (large.output, large.grid) == ((128, 128), (2, 2))
    geometry = QwenGeometry(plus=True, condition_area=64 * 64, multiple=16)
    plan = geometry.plan([(100, 100)], 112)
    assert (plan.output, plan.mllm) == ((112, 112), ((64, 64),))


def test_no_side_becomes_zero():
    for plus in (False, True):
        plan = QwenGeometry(plus=plus).plan([(6000, 30)], 256)
        assert min(*plan.output, *plan.vae[0], *plan.mllm[0]) == 32


def test_the_original_release_takes_no_references():
    with pytest.raises(ConfigError, match="found 2.*2509"):
        QwenGeometry(plus=False).plan([(64, 64)] * 3, 1024)


@pytest.mark.parametrize("name", ["to_vae", "to_mllm"])
def test_resizes_are_those_of_the_pipelines(name):
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    rng = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (1, 3, 61, 97), generator=rng)
    image = Image.fromarray(levels[0].permute(1, 2, 0).byte().numpy())
    expected = VaeImageProcessor(vae_scale_factor=16).preprocess(image, 64, 96)
    made = getattr(QwenGeometry(plus=True), name)(levels / 255, (96, 64))
    assert torch.equal(made * 2 - 1, expected)
