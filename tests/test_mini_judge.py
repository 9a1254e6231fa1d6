"""The exact judge: reading scenes back from pixels, and its marks for right, wrong and spoiled pictures."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from reasonedit.reasonedit_core.errors import DataError
from reasonedit.reasonedit_core.mini import judge as judge_
from reasonedit.reasonedit_core.mini.edits import Add, Move, Recolour, Remove, SetBackground, SetState, apply
from reasonedit.reasonedit_core.mini.faults import SPOILERS, spoil
from reasonedit.reasonedit_core.mini.items import ITEM_KINDS, item
from reasonedit.reasonedit_core.mini.items import scene as draw_scene
from reasonedit.reasonedit_core.mini.judge import judge, quality, read
from reasonedit.reasonedit_core.mini.kinds import BACKGROUNDS, CELLS, STYLES
from reasonedit.reasonedit_core.mini.verdicts import LEAST_QUALITY
from reasonedit.reasonedit_core.mini.world import LOOKS, Look, Object, Scene, render, scene_of


@st.composite
def scenes(draw) -> Scene:
    """Any scene of the world."""
    cells = draw(st.lists(st.sampled_from(list(CELLS)), unique=True, max_size=4))
    looks = draw(st.lists(st.sampled_from(LOOKS), min_size=len(cells), max_size=len(cells)))
    objects = [Object(cell, look) for cell, look in zip(cells, looks, strict=True)]
    return scene_of(draw(st.sampled_from(BACKGROUNDS)), objects, draw(st.sampled_from(list(STYLES))))


SOURCE = scene_of(
    "day",
    [
        Object(0, Look("circle", "red")),
        Object(4, Look("candle", "blue", "large", "new")),
        Object(8, Look("star", "yellow", "small")),
    ],
    1,
)
TARGET = apply(SOURCE, [Recolour(0, "green"), SetState(4, "burning")])


def halved(pixels: np.ndarray) -> np.ndarray:
    """What a soft decoder makes of a picture: half the resolution, and back."""
    size = pixels.shape[0]
    small = Image.fromarray(pixels).resize((size // 2, size // 2), Image.Resampling.BICUBIC)
    return np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))


# ---- reading -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(scenes(), st.sampled_from([96, 128]))
def test_what_is_rendered_is_read_back(scene, size):
    reading = read(render(scene, size))
    assert reading.scene == scene
    assert reading.residuals == reading.soft == (0.0,) * 9 and quality(reading) == 10


def test_every_look_is_read_back_on_every_ground():
    """All looks; grounds, styles and cells in turn."""
    grounds = [(name, style) for name in BACKGROUNDS for style in STYLES]
    for n in range(0, len(LOOKS), 4):
        name, style = grounds[(n // 4 * 5) % len(grounds)]
        cells = [(n // 4 + 2 * k) % 9 for k in range(4)]
        scene = scene_of(name, [Object(cell, look) for cell, look in zip(cells, LOOKS[n : n + 4], strict=False)], style)
        assert read(render(scene)).scene == scene


@settings(deadline=None, max_examples=25)
@given(scenes(), st.integers(0, 99))
def test_blur_and_mild_noise_do_not_matter(scene, seed):
    """Half the resolution, a Gaussian blur, noise of 10 levels, 8 levels too bright: the same scene, every cell readable."""
    pixels, rng = render(scene), np.random.default_rng(seed)
    noisy = np.clip(pixels + rng.normal(0, 10, pixels.shape), 0, 255).astype(np.uint8)
    blurred = np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.6)))
    for changed in (halved(pixels), noisy, blurred, np.clip(pixels.astype(int) + 8, 0, 255).astype(np.uint8)):
        reading = read(changed)
        assert reading.scene == scene and all(reading.readable)
        assert quality(reading) > LEAST_QUALITY


def test_floats_and_other_sizes_are_read():
    pixels = render(TARGET)
    assert read(pixels / 255.0).scene == read(pixels.astype(np.float32) / 255).scene == TARGET
    large = np.asarray(Image.fromarray(pixels).resize((288, 288), Image.Resampling.NEAREST))
    assert read(large).scene == TARGET
    assert read(render(TARGET, 128)).scene == TARGET


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((96, 96), "u1"), np.zeros((96, 96, 4), "u1"), np.zeros((96, 96, 3), int), np.full((96, 96, 3), np.nan)],
)
def test_what_is_no_picture_is_refused(pixels):
    with pytest.raises(DataError, match="picture: expected"):
        read(pixels)


def test_any_picture_is_read_as_some_scene():
    rng = np.random.default_rng(0)
    for pixels in (np.zeros((96, 96, 3), np.uint8), rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)):
        reading = read(pixels)
        assert not all(reading.readable) and quality(reading) == 0
    many = scene_of("white", [Object(cell, LOOKS[cell * 7]) for cell in range(6)])
    assert read(render(many)).scene == many, "a faulty picture may show more objects than an item has"


# ---- judging -------------------------------------------------------------------------------------------------------------


def marks(shown: Scene) -> tuple[float, float]:
    found = judge(SOURCE, TARGET, render(shown))
    assert found.quality == 10
    assert found.overall == pytest.approx(math.sqrt(min(found.success, found.preservation) * 10))
    assert found.done == (found.success == 10) and found.exact == (found.preservation == 10)
    return found.success, found.preservation


def test_the_target_gets_full_marks():
    assert marks(TARGET) == (10, 10)
    assert judge(SOURCE, TARGET, render(TARGET)).overall == 10


@pytest.mark.parametrize(
    ("shown", "success", "preservation"),
    [
        (SOURCE, 0, 10),  # no edit
        (apply(SOURCE, Recolour(0, "green")), 5, 10),  # half of it
        (apply(TARGET, Recolour(0, "purple")), 5, 10),  # a wrong colour
        (apply(SOURCE, Recolour(4, "green")), 0, 10),  # a wrong object, which should have changed otherwise
        (apply(SOURCE, Recolour(8, "green")), 0, 6),  # a wrong object
        (apply(TARGET, Remove(8)), 10, 6),  # one thing too many
        (apply(TARGET, Move(8, 7)), 10, 2),  # that makes two cells
        (apply(TARGET, [Remove(8), Add(1, LOOKS[0]), Add(2, LOOKS[0])]), 10, 0),
        (apply(TARGET, SetBackground("night")), 10, 2),
        (Scene(TARGET.background, TARGET.objects, 2), 10, 6),  # drawn in another style
    ],
)
def test_faults_of_content_cost_what_they_should(shown, success, preservation):
    assert marks(shown) == (success, preservation)


def test_an_asked_background_counts_among_the_changes():
    target = apply(SOURCE, [SetBackground("night"), Remove(8)])
    found = judge(SOURCE, target, render(apply(SOURCE, Remove(8))))
    assert (found.success, found.preservation) == (5, 10)
    assert dict(found.asked) == {8: True, "background": False}
    assert judge(SOURCE, target, render(target)).overall == 10


def test_an_item_without_a_change_is_refused():
    with pytest.raises(DataError, match="expected a target that differs"):
        judge(SOURCE, SOURCE, render(SOURCE))


@pytest.mark.parametrize("kind", SPOILERS)
def test_spoiled_pixels_get_a_low_mark(kind):
    """Whatever the scene, as long as something stands in it: a right picture that is spoiled loses at least half."""
    for seed in range(12):
        found = item(seed, ITEM_KINDS[seed % len(ITEM_KINDS)], "held_out")
        right, spoiled = render(found.target), spoil(render(found.target), kind, seed)
        assert judge(found.source, found.target, right).overall == 10
        if len(found.target.objects) > 1:
            assert judge(found.source, found.target, spoiled).overall < 6, (seed, kind)


def test_a_soft_decoder_costs_little():
    scores = []
    for seed in range(20):
        found = item(seed, "concrete", "held_out")
        result = judge(found.source, found.target, halved(render(found.target)))
        assert result.done and result.exact
        scores.append(result.overall)
    assert np.mean(scores) > 8.5  # most of what is lost is of the line around the picture


def test_a_ghost_is_not_a_removal():
    """An object that is only half gone is neither there nor away."""
    target = apply(SOURCE, Remove(0))
    ghost = (render(SOURCE).astype(int) + render(target)) // 2
    found = judge(SOURCE, target, ghost.astype(np.uint8))
    assert not found.done and found.exact
    faint = (render(SOURCE).astype(int) + 9 * render(target).astype(int)) // 10
    assert judge(SOURCE, target, faint.astype(np.uint8)).done


def test_quality_falls_with_noise():
    pixels, rng = render(TARGET).astype(float), np.random.default_rng(0)
    noise = rng.normal(0, 1, pixels.shape)
    found = [quality(read(np.clip(pixels + sigma * noise, 0, 255).astype(np.uint8))) for sigma in (0, 5, 10, 20, 30, 60)]
    assert found[0] == 10 and found[1] > 9.5 and found[-1] == 0 and found == sorted(found, reverse=True)


def test_the_worst_cell_counts():
    reading = judge_.Reading(SOURCE, (0.0,) * 8 + (60.0,), (0.0,) * 8 + (50.0,))
    assert reading.readable == (True,) * 8 + (False,)
    assert quality(reading) == pytest.approx(10 * (judge_.SPOILED - 30) / (judge_.SPOILED - judge_.CLEAN))


def test_reading_does_not_depend_on_what_was_read_before():
    scene = draw_scene(1, least=2)
    before = read(render(scene))
    judge_._sprites.cache_clear()
    judge_._sizes.cache_clear()
    judge_.warm_up()
    assert read(render(scene)) == before
