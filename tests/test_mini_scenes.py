"""Held-out scenes to show, and telling a scene from a photograph."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonedit.reasonedit_core.mini import scenes
from reasonedit.reasonedit_core.mini.items import scene
from reasonedit.reasonedit_core.mini.splits import split_of_scene
from reasonedit.reasonedit_core.mini.world import render
from reasonedit.tests.pictures import draw_picture


@given(st.integers(-(2**70), 2**70))
@settings(max_examples=20, deadline=None)
def test_the_demonstration_shows_held_out_scenes_of_each_kind_of_knowledge(seed):
    shown = scenes.shown_items(seed)
    assert [item.knowledge for item in shown] == ["factual", "conceptual", "procedural"]
    assert {item.split for item in shown} == {"held_out"} and {item.language for item in shown} == {"en"}
    assert all(split_of_scene(item.source) == split_of_scene(item.target) == "held_out" for item in shown)
    assert shown == scenes.shown_items(seed)


def test_a_drawn_picture_is_what_the_world_renders():
    item = scenes.held_out(3, "abstract")
    picture = scenes.draw(item.source)
    assert picture.shape == (1, 3, 96, 96) and (scenes.pixels(picture) == render(item.source)).all()
    assert scenes.judge_picture(item, scenes.draw(item.target)).overall == pytest.approx(10)
    unchanged = scenes.judge_picture(item, picture)
    assert unchanged.success == 0 and unchanged.preservation == 10 and not unchanged.done and unchanged.exact


@pytest.mark.parametrize("seed", range(12))
def test_scenes_are_known_whatever_file_they_came_from(seed):
    drawn = Image.fromarray(render(scene(seed, "train"), 96))
    assert scenes.is_scene(np.asarray(drawn)) and scenes.is_scene(render(scene(seed, "train"), 128))
    for side in (192, 250, 512):
        assert scenes.is_scene(np.asarray(drawn.resize((side, side), Image.Resampling.LANCZOS)))
    file = io.BytesIO()
    drawn.save(file, "JPEG", quality=60)
    assert scenes.is_scene(np.asarray(Image.open(file)))


def photographs():
    yield "drawn otherwise", np.asarray(draw_picture())
    yield "noise", np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    yield "ramp", np.broadcast_to(np.linspace(0, 255, 96)[None, :, None], (96, 96, 3)).astype(np.uint8)
    try:
        from skimage import data
    except ImportError:
        return
    for name in ("chelsea", "astronaut", "coffee", "rocket"):
        try:
            yield name, getattr(data, name)()[..., :3]
        except Exception:  # not in this release's own files, and there is no network
            continue


def test_other_pictures_are_told_of_where_weights_edit_scenes_only():
    import torch

    for name, pixels in photographs():
        assert not scenes.is_scene(pixels), name
        picture = torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)[None]
        assert "none of the drawn miniature scenes" in scenes.picture_remark("miniature", picture)
        assert scenes.picture_remark("any", picture) == ""
    assert scenes.picture_remark("miniature", scenes.draw(scene(1))) == ""
