"""Planted faults: what goes wrong is what was planned, and reflection says so truly."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.dialogue.answers import say_consistency, say_verdict
from reasonedit.reasonedit_core.errors import DataError
from reasonedit.reasonedit_core.mini.edits import apply
from reasonedit.reasonedit_core.mini.faults import FAULTS, SPOILERS, fitting, plant, reflect, spoil
from reasonedit.reasonedit_core.mini.items import ITEM_KINDS, item
from reasonedit.reasonedit_core.mini.judge import judge
from reasonedit.reasonedit_core.mini.splits import SPLITS, split_of_scene
from reasonedit.reasonedit_core.mini.texts import object_claim, target_description
from reasonedit.reasonedit_core.mini.verdicts import assess_picture
from reasonedit.reasonedit_core.mini.words import LANGUAGES
from reasonedit.reasonedit_core.mini.world import render
from reasonedit.reasonedit_core.types import Decision

DECISIONS = {"success": Decision.SUCCESS, "reflection": Decision.REFINE, "failed": Decision.FAILED}


@settings(deadline=None, max_examples=100)
@given(st.integers(), st.integers(0, 9), st.sampled_from(ITEM_KINDS), st.sampled_from(SPLITS), st.sampled_from(LANGUAGES))
def test_a_planted_fault_gets_the_verdict_and_the_instruction_it_should(seed, lot, kind, split, language):
    found = item(seed, kind, split, language)
    for name in ("right", *FAULTS):
        fault = plant(found, lot, name)
        if fault is None:
            assert name not in ("right", "none", "unrelated")
            continue
        assert fault == plant(found, lot, name) and split_of_scene(fault.shown) == split
        said = fault.assessment
        wanted = {"right": "success", "none": "failed", "unrelated": "failed"}.get(name, "reflection")
        assert said.verdict == wanted
        assert (said.instruction is not None) == (said.verdict == "reflection")
        assert (said.score > 9) == (name == "right") and 0 <= said.score <= 10
        mended = apply(fault.shown, said.repair)
        assert (mended.background, mended.objects) == (found.target.background, found.target.objects)
        if said.verdict == "reflection":
            assert 1 <= len(said.repair) <= 3
        check_against_pixels(found, fault.shown, name)
        findings = {**said.findings, "reason": said.scorer}
        assert str(said.findings["meets_instruction"]) in say_consistency(said.score, said.scorer, findings)
        assert said.reason in say_verdict(DECISIONS[said.verdict], said.reason, said.instruction)


def check_against_pixels(found, shown, name: str) -> None:
    """The judge sees in the pixels what the planter did."""
    mark = judge(found.source, found.target, render(shown))
    assert mark.quality == 10
    match name:
        case "right":
            assert mark.overall == 10
        case "none":
            assert mark.success == 0 and mark.exact
        case "half":
            assert 0 < mark.success < 10 and mark.exact
        case "extra":
            assert mark.done and mark.preservation <= 6
        case "wrong_object":
            assert not mark.done and not mark.exact
        case "wrong_colour" | "wrong_state":
            assert not mark.done and mark.exact
        case "wrong_place":
            assert not mark.done and mark.preservation == 6
        case "unrelated":
            assert not mark.done and mark.overall < 5


def test_every_kind_of_fault_is_planted_often():
    counts = Counter(kind for seed in range(60) for kind in fitting(item(seed, "concrete" if seed % 2 else "abstract")))
    assert min(counts[kind] for kind in FAULTS) >= 5
    drawn = Counter(plant(item(seed, "abstract"), seed).kind for seed in range(200))
    assert set(drawn) == set(FAULTS)
    with pytest.raises(DataError, match="expected one of right, none"):
        plant(item(0), 0, "odd")


def test_the_words_of_a_verdict_need_no_second_picture():
    """What the reason names as wanted stands in the target description."""
    for seed in range(40):
        found = item(seed, "abstract", "train", "en")
        fault = plant(found, seed, "half") or plant(found, seed, "extra")
        wanted = target_description(found.source, found.target, "en")
        for each in found.target.objects:
            if fault.shown.look(each.cell) != each.look:
                claim = object_claim(each, "en")
                assert claim in wanted
                assert claim.split(" is in ")[0].lower() in fault.assessment.reason.lower()


def test_a_real_picture_is_judged_by_the_same_rule():
    for seed in range(10):
        found = item(seed, "abstract", "train")
        fault = plant(found, seed, "extra")
        assert assess_picture(found.source, found.target, render(fault.shown), found.language) == fault.assessment
        assert reflect(found, fault.shown) == fault.assessment
        right = render(found.target)
        assert assess_picture(found.source, found.target, right, found.language).verdict == "success"
        spoiled = assess_picture(found.source, found.target, spoil(right, "noise", seed), found.language)
        assert spoiled.verdict == "failed" and spoiled.instruction is None and spoiled.score < 8


@pytest.mark.parametrize("kind", SPOILERS)
def test_pixels_are_spoiled_the_same_way_each_time(kind):
    pixels = render(item(3).target)
    spoiled = spoil(pixels, kind, 5)
    assert spoiled.shape == pixels.shape and spoiled.dtype == np.uint8
    assert np.array_equal(spoiled, spoil(pixels, kind, 5)) and not np.array_equal(spoiled, pixels)
    assert np.array_equal(pixels, render(item(3).target))


def test_an_unknown_way_to_spoil_is_refused():
    with pytest.raises(DataError, match="expected one of noise"):
        spoil(render(item(3).target), "fire", 0)
