"""Items of the miniature world: they follow from integers, are true, and training shares nothing with the test."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.dialogue.answers import say_description, say_thought
from reasonedit.reasonedit_core.errors import DataError
from reasonedit.reasonedit_core.mini import items, texts
from reasonedit.reasonedit_core.mini.dice import Dice
from reasonedit.reasonedit_core.mini.edits import EDIT_KINDS, apply, disjoint, edits_between
from reasonedit.reasonedit_core.mini.items import ITEM_KINDS, Item, item
from reasonedit.reasonedit_core.mini.kinds import CELLS, MOST_OBJECTS
from reasonedit.reasonedit_core.mini.rules import CATEGORIES, KNOWLEDGE, rules
from reasonedit.reasonedit_core.mini.splits import SPLITS, split_of_scene
from reasonedit.reasonedit_core.mini.wordings import canonical
from reasonedit.reasonedit_core.mini.words import LANGUAGES
from reasonedit.reasonedit_core.mini.world import combination

CJK = re.compile(r"[\u3400-\u9fff]")


@settings(deadline=None, max_examples=150)
@given(st.integers(), st.sampled_from(ITEM_KINDS), st.sampled_from(SPLITS), st.sampled_from([None, *LANGUAGES]))
def test_an_item_is_true(seed, kind, split, language):
    found = item(seed, kind, split, language)
    assert found == item(seed, kind, split, language)
    assert found.target == apply(found.source, found.edits) != found.source
    assert disjoint(found.edits) and 1 <= len(found.edits) <= 3
    assert max(len(found.source.objects), len(found.target.objects)) <= MOST_OBJECTS
    assert found.language == (language or found.language) and found.split == split
    assert bool(CJK.search(found.instruction)) == bool(CJK.search(found.concrete)) == (found.language == "zh")
    assert split_of_scene(found.source) == split_of_scene(found.target) == split
    if found.clear:
        assert found.instruction == found.concrete and found.rule is found.category is found.pair is None
        assert kind == "concrete" or found.edit_kinds == (kind,) or (kind == "compound" and len(found.edits) == 2)
    else:
        rule = rules()[found.rule]
        assert found.instruction != found.concrete == found.canonical
        assert found.steps == canonical(found.edits, found.source, found.language)
        assert (found.category, found.knowledge) == (rule.category, rule.knowledge)
        assert kind in (found.category, found.knowledge, "abstract")


@settings(deadline=None, max_examples=60)
@given(st.integers(), st.sampled_from(sorted(rules())), st.sampled_from(SPLITS))
def test_every_rule_gives_items_in_both_splits(seed, name, split):
    found = item(seed, name, split)
    assert found.rule == name and found.pair.split(":")[1] in rules()[name].pairs(split)


def drawn(split: str) -> list[Item]:
    return [item(seed, kind, split) for kind in ("concrete", "abstract", *EDIT_KINDS) for seed in range(50)]


def test_training_and_test_share_nothing():
    """No wording, no combination of objects (of source or target), no pair of rule and object; the seeds are the same."""
    train, held_out = drawn("train"), drawn("held_out")
    for of in (
        lambda each: set(each.wordings),
        lambda each: {combination(each.source), combination(each.target)},
        lambda each: {each.pair} - {None},
        lambda each: {each.instruction} if each.clear else set(),
    ):
        sides = [set().union(*map(of, side)) for side in (train, held_out)]
        assert min(map(len, sides)) > 30 and not sides[0] & sides[1]
    scenes = [{combination(items.scene(seed, split)) for seed in range(300)} for split in SPLITS]
    assert not scenes[0] & scenes[1] and not scenes[0] & {combination(each.source) for each in held_out}


def test_what_is_held_out_is_made_of_what_training_has_seen():
    """Kinds in their colours, backgrounds and rules: only their joinings are new."""
    train = [item(seed, kind, "train") for kind in ("concrete", "abstract") for seed in range(900)]
    held_out = [item(seed, kind, "held_out") for kind in ("concrete", "abstract") for seed in range(100)]
    for of in (
        lambda each: set(combination(each.source)) | set(combination(each.target)),
        lambda each: {each.source.background, each.target.background},
        lambda each: {each.rule},
    ):
        assert set().union(*map(of, held_out)) <= set().union(*map(of, train))


def test_kinds_are_what_they_are_called():
    for label, name in [*((each, "category") for each in CATEGORIES), *((each, "knowledge") for each in KNOWLEDGE)]:
        assert {getattr(item(seed, label), name) for seed in range(20)} == {label}
    kinds = [item(seed).edit_kinds for seed in range(400)]
    assert {kind for each in kinds for kind in each} == set(EDIT_KINDS)
    assert 0.08 < sum(len(each) == 2 for each in kinds) / len(kinds) < 0.22
    assert {item(seed, "abstract").rule for seed in range(900)} == set(rules())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, "funny"), "expected a kind of concrete"),
        ((0, "concrete", "validation"), "expected train or held_out"),
        ((0, "concrete", "train", "fr"), "expected one of en, zh"),
    ],
)
def test_what_there_is_not_is_refused(arguments, words):
    with pytest.raises(DataError, match=words):
        item(*arguments)


# ---- texts ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(), st.sampled_from(SPLITS), st.sampled_from(LANGUAGES))
def test_descriptions_hold_for_their_scene_and_no_other(seed, split, language):
    found = item(seed, "concrete", split, language)
    said = texts.caption(found.source, language)
    for each in found.source.objects:
        assert texts.object_claim(each, language) in said
    assert texts.ground_claim(found.source, language) in said
    assert texts.caption(found.target, language) != said
    wanted = texts.target_description(found.source, found.target, language)
    claims = {texts.object_claim(each, language) for each in found.target.objects}
    changed = [cell for cell in CELLS if found.source.look(cell) != found.target.look(cell)]
    claims |= {texts.empty_claim(cell, language) for cell in changed if found.target.at(cell) is None}
    claims.add(texts.ground_claim(found.target, language))
    assert all(claim in wanted for claim in claims)
    assert len(wanted) == sum(map(len, claims)) + (len(claims) - 1) * (language == "en"), "nothing else is claimed"
    first = texts.ground_claim(found.target, language) if found.source.background != found.target.background else None
    new = {texts.object_claim(each, language) for each in found.target.objects if each.cell in changed}
    new |= {texts.empty_claim(cell, language) for cell in changed}
    assert wanted.startswith(first if first else tuple(new)), "it begins with what the instruction brings about"
    assert say_description(wanted) == wanted and say_description(said) == said


@settings(deadline=None, max_examples=60)
@given(st.integers(), st.sampled_from(ITEM_KINDS), st.sampled_from(SPLITS))
def test_thoughts_can_be_said(seed, kind, split):
    found = item(seed, kind, split)
    assert say_thought(found.concrete) == found.concrete and say_thought(found.canonical) == found.canonical


@settings(deadline=None, max_examples=60)
@given(st.integers(), st.sampled_from(SPLITS), st.sampled_from(LANGUAGES))
def test_questions_have_one_answer(seed, split, language):
    """The same question about the same scene has the same answer whatever the dice; an answer is never in its question."""
    scene = items.scene(seed, split)
    asked: dict[str, str] = {}
    for n in range(4):
        for question, answer in texts.questions(scene, language, Dice(seed, n), 10):
            assert asked.setdefault(question, answer) == answer
            assert bool(CJK.search(question)) == (language == "zh")
            if "colour" in question or "颜色" in question:
                assert answer.strip(".。").lower() not in question.lower()
    assert len(asked) >= 4


def test_questions_are_answered_by_the_scene():
    scene = items.scene_of("night", [items.Object(0, items.Look("cup", "red", "small", "empty"))])
    found = dict(pair for n in range(40) for pair in texts.questions(scene, "en", Dice("ask", n), 10))
    assert found["How many objects are there?"] == "1."
    assert found["What colour is the cup?"] == "Red." and found["Where is the cup?"] == "In the top left."
    assert found["What is in the top left?"] == "A small red empty cup." and found["What is the background?"] == "A night sky."
    assert found["Is there a cup?"] == "Yes." and found["How large is the cup?"] == "Small."
    assert found["What state is the object in the top left in?"] == "Empty."
    assert found["Describe the picture."] == "The background is a night sky. A small red empty cup is in the top left."


def test_the_repair_of_nothing_is_nothing():
    found = item(0, "abstract")
    assert edits_between(found.target, found.target) == ()
