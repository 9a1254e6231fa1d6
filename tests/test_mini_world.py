"""The miniature world: scenes, their pixels, edits, and how far apart its sprites are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import DataError
from reasonedit.reasonedit_core.mini import edits as edits_
from reasonedit.reasonedit_core.mini.backgrounds import background
from reasonedit.reasonedit_core.mini.dice import Dice, digest
from reasonedit.reasonedit_core.mini.edits import Add, Move, Recolour, Remove, SetBackground, SetLabel, SetState, apply, touched
from reasonedit.reasonedit_core.mini.kinds import BACKGROUNDS, CELLS, KINDS, STYLES
from reasonedit.reasonedit_core.mini.world import LOOKS, Look, Object, Scene, cell_box, paint, render, scene_of

LEAST_DISTANCE = 10.0
"""Root mean square distance (of 255 levels) that any two sprites keep on any ground when 2x2 pixels are one; measured 10.5."""


@st.composite
def scenes(draw, most: int = 4) -> Scene:
    """Any scene of the world."""
    cells = draw(st.lists(st.sampled_from(list(CELLS)), unique=True, max_size=most))
    looks = draw(st.lists(st.sampled_from(LOOKS), min_size=len(cells), max_size=len(cells)))
    objects = [Object(cell, look) for cell, look in zip(cells, looks, strict=True)]
    return scene_of(draw(st.sampled_from(BACKGROUNDS)), objects, draw(st.sampled_from(list(STYLES))))


def street() -> Scene:
    looks = {0: Look("circle", "red", "small"), 4: Look("candle", "blue", "large", "new"), 8: Look("sign", state="GO")}
    return scene_of("day", [Object(cell, look) for cell, look in looks.items()], 2)


# ---- values --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Look("dog"), "expected a kind of circle"),
        (lambda: Look("circle"), "expected colour of 'red'"),
        (lambda: Look("egg", "red", "large", "whole"), "expected colour of ''"),
        (lambda: Look("egg", state="burning"), "expected state of 'whole', 'broken'"),
        (lambda: Look("seesaw", size="small", state="level"), "expected size of 'large'"),
        (lambda: Scene("sea"), "expected a background"),
        (lambda: Scene("day", style=9), "expected a style"),
        (lambda: Scene("day", (Object(3, LOOKS[0]), Object(3, LOOKS[1]))), "expected objects in different cells"),
        (lambda: Scene("day", (Object(9, LOOKS[0]),)), "expected objects in different cells"),
        (lambda: render(Scene("day"), 20), "expected at least 48"),
    ],
)
def test_what_the_world_does_not_have_is_refused(make, words):
    with pytest.raises(DataError, match=words):
        make()


def test_the_looks_are_all_looks():
    count = sum(len(kind.colours) * len(kind.sizes) * len(kind.states) for kind in KINDS.values())
    assert len(set(LOOKS)) == len(LOOKS) == count
    assert all(Look(look.kind, look.colour, look.size, look.state) == look for look in LOOKS)


def test_a_scene_tells_what_stands_where():
    scene = street()
    assert scene.label == "GO" and scene.empty() == (1, 2, 3, 5, 6, 7)
    assert scene.put(4, None).of("candle") == () and scene.put(1, LOOKS[0]).look(1) == LOOKS[0]
    assert Scene("day").label is None


# ---- pixels --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(scenes(), st.sampled_from([96, 128]))
def test_pixels_follow_from_the_scene_and_stay_in_its_cells(scene, size):
    pixels = render(scene, size)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, render(scene, size))
    bare = render(Scene(scene.background, (), scene.style), size)
    changed = (pixels != bare).any(axis=2)
    for each in scene.objects:
        assert changed[cell_box(each.cell, size)].mean() > 0.04, each
        changed[cell_box(each.cell, size)] = False
    assert not changed.any()


def test_drawing_leaves_the_kept_pictures_alone():
    render(Scene("night"))[:] = 0
    assert render(Scene("night")).any()


def test_every_style_of_a_background_differs():
    for name in BACKGROUNDS:
        pictures = [render(Scene(name, (), style)).astype(float) for style in STYLES]
        for a in STYLES:
            for b in range(a):
                assert np.sqrt(np.square(pictures[a] - pictures[b]).mean()) > 3


def test_any_two_sprites_can_be_told_apart_when_blurred():
    """Over all pairs of looks, and a look and nothing, on all grounds in all styles, in the cell where they are least apart."""
    least = np.inf
    for name in BACKGROUNDS:
        for style in STYLES:
            ground = background(name, style, 96)[cell_box(1, 96)]
            drawn = np.stack([*(paint(ground, look, style) for look in LOOKS), np.rint(ground)]).astype(np.float32)
            soft = drawn.reshape(len(drawn), 16, 2, 16, 2, 3).mean(axis=(2, 4)).reshape(len(drawn), -1)
            square = np.square(soft).sum(axis=1)
            gaps = square[:, None] + square[None] - 2 * soft @ soft.T
            np.fill_diagonal(gaps, np.inf)
            least = min(least, float(np.sqrt(gaps.min() / soft.shape[1])))
    assert least > LEAST_DISTANCE


# ---- edits ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(scenes(), st.integers(0, 10**9), st.sampled_from(edits_.EDIT_KINDS))
def test_an_edit_keeps_what_it_does_not_name(scene, lot, kind):
    fits = list(edits_.possible(scene, kind))
    if not fits:
        return
    edit = fits[lot % len(fits)]
    after = apply(scene, edit)
    assert after != scene and after.style == scene.style
    named = touched(edit)
    for cell in CELLS:
        if cell not in named:
            assert after.at(cell) == scene.at(cell)
    if isinstance(edit, SetBackground):
        assert after.background == edit.name and after.objects == scene.objects
        return
    assert after.background == scene.background
    changed = (render(after) != render(scene)).any(axis=2)
    for cell in named:
        assert changed[cell_box(cell, 96)].any()
        changed[cell_box(cell, 96)] = False
    assert not changed.any()
    old, new = scene.look(named[0]), after.look(named[-1])
    traits = {"recolour": {"colour"}, "resize": {"size"}, "state": {"state"}, "label": {"state"}, "move": set()}.get(kind)
    if traits is not None:
        assert {name for name in ("kind", "colour", "size", "state") if getattr(old, name) != getattr(new, name)} == traits


@pytest.mark.parametrize(
    "edit",
    [
        Recolour(0, "red"), Recolour(8, "red"), Recolour(1, "red"), Add(0, LOOKS[0]), Remove(1), Move(0, 4), Move(0, 0),
        SetState(8, "NO"), SetLabel(4, "NO"), SetState(4, "open"), SetBackground("day"), edits_.Resize(8, "small"),
        edits_.Replace(0, Look("circle", "blue")),
    ],
)  # fmt: skip
def test_an_edit_that_does_not_fit_is_refused(edit):
    with pytest.raises(DataError, match="expected an edit that changes the scene"):
        apply(street(), edit)


def test_possible_edits_name_their_kind():
    found = list(edits_.possible(street()))
    assert {edits_.edit_kind(edit) for edit in found} == set(edits_.EDIT_KINDS)
    assert len(found) == len(set(found))
    full = street().put(1, LOOKS[0])
    assert not list(edits_.possible(full, "add"))
    with pytest.raises(DataError, match="expected a kind of recolour"):
        list(edits_.possible(full, "paint"))


@settings(deadline=None, max_examples=100)
@given(scenes(), scenes())
def test_the_edits_between_two_scenes_lead_from_one_to_the_other(shown, wanted):
    edits = edits_.edits_between(shown, wanted)
    after = apply(shown, edits)
    assert (after.background, after.objects) == (wanted.background, wanted.objects)
    if (shown.background, shown.objects) == (wanted.background, wanted.objects):
        assert edits == ()


def test_a_misplaced_object_is_moved_and_a_wrong_colour_is_mended():
    scene = street()
    assert edits_.edits_between(scene, apply(scene, Move(0, 5))) == (Move(0, 5),)
    assert edits_.edits_between(scene, apply(scene, Recolour(4, "green"))) == (Recolour(4, "green"),)
    assert edits_.edits_between(scene, apply(scene, SetLabel(8, "7"))) == (SetLabel(8, "7"),)


# ---- dice ----------------------------------------------------------------------------------------------------------------


def test_dice_follow_from_their_key_and_never_change():
    dice = Dice("a", 1)  # were this to change, every held-out item would be another one
    assert [dice.below(1000) for _ in range(6)] == [717, 174, 234, 738, 253, 165] and digest("a") == 4681665781835383343
    first, second = Dice("a", 1), Dice("a", 2)
    draws = [[dice.below(1000) for _ in range(6)] for dice in (first, second, Dice("a", 1))]
    assert draws[0] == draws[2] != draws[1]
    assert digest("a", "b") != digest("ab") and digest("a") == digest("a")


def test_dice_are_fair():
    dice = Dice("fair")
    counts = np.bincount([dice.below(7) for _ in range(7000)], minlength=7)
    assert counts.min() > 880 and counts.max() < 1120
    assert sorted(dice.shuffle(range(5))) == list(range(5))
    assert 0.2 < sum(dice.chance(0.25) for _ in range(2000)) / 2000 < 0.3
