"""Rules of the world, and how edits and rules are put into words: what they mean, and what training may see of them."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import DataError
from reasonedit.reasonedit_core.mini import words
from reasonedit.reasonedit_core.mini.dice import Dice
from reasonedit.reasonedit_core.mini.edits import (
    EDIT_KINDS,
    Move,
    Recolour,
    Remove,
    Replace,
    Resize,
    SetBackground,
    SetLabel,
    SetState,
    apply,
    possible,
)
from reasonedit.reasonedit_core.mini.items import scene as draw_scene
from reasonedit.reasonedit_core.mini.items import stage
from reasonedit.reasonedit_core.mini.kinds import KINDS
from reasonedit.reasonedit_core.mini.rules import CATEGORIES, KNOWLEDGE, phrase, rules, rules_of, unkey
from reasonedit.reasonedit_core.mini.splits import SPLITS, held_out_joinings, held_out_of
from reasonedit.reasonedit_core.mini.wordings import canonical, describe, draw_wording, state_wordings, wordings
from reasonedit.reasonedit_core.mini.world import LOOKS, Look, Object, Scene, scene_of

NAMES = sorted(rules())


def scene(ground: str = "white", **looks: Look) -> Scene:
    """c0=..., c4=...: looks by cell."""
    return scene_of(ground, [Object(int(name[1:]), look) for name, look in looks.items()])


# ---- the rules -----------------------------------------------------------------------------------------------------------


def test_there_are_enough_rules_of_every_label():
    assert len(rules()) >= 30
    assert min(Counter(rule.category for rule in rules().values()).values()) >= 8
    assert min(Counter(rule.knowledge for rule in rules().values()).values()) >= 8
    for rule in rules().values():
        assert rule.category in CATEGORIES and rule.knowledge in KNOWLEDGE
    assert {rule.name for rule in rules_of("abstract")} == set(NAMES)
    assert all(rule.category == "causal" for rule in rules_of("causal"))
    with pytest.raises(DataError, match="expected one of abstract"):
        rules_of("magic")


@pytest.mark.parametrize("name", NAMES)
def test_a_rule_applies_to_what_it_is_staged_for(name):
    rule = rules()[name]
    assert set(rule.pairs("train")) | set(rule.pairs("held_out")) == set(rule.subjects)
    assert not set(rule.pairs("train")) & set(rule.pairs("held_out"))
    assert len(rule.pairs("train")) > len(rule.pairs("held_out")) >= 1
    met = 0
    for seed, subject in enumerate(rule.subjects * 2):
        dice = Dice("test", name, seed)
        staged, slots = stage(rule, rule.stage(subject, dice), dice)
        edits = rule.meaning(staged, slots)
        if not edits:
            continue
        met += 1
        assert 1 <= len(edits) <= 3 and len(staged.objects) <= 4
        assert apply(staged, edits) == apply(staged, edits[::-1]) != staged, "the order of disjoint edits does not matter"
        for language in words.LANGUAGES:
            for wording in rule.wordings(language)[:: 1 + seed % 5]:
                said = phrase(wording, staged, slots, language, dice)
                assert "{" not in said and said == said.strip()
    assert met > len(rule.subjects) // 2


@pytest.mark.parametrize("name", NAMES)
def test_training_sees_every_cause_that_a_rule_knows(name):
    """What is held out of a rule is a joining: each part of each subject is in training too."""
    rule = rules()[name]
    for place in range(len(unkey(rule.subjects[0]))):
        seen = {unkey(subject)[place] for subject in rule.pairs("train")}
        assert seen == {unkey(subject)[place] for subject in rule.subjects}


RED, BLUE, GREEN = "red", "blue", "green"
TRUTHS = [
    ("sun_melts", scene(c0=Look("ice cube", state="solid"), c4=Look("egg", state="whole")), {}, (SetState(0, "puddle"),)),
    ("next_season", scene(c8=Look("tree", state="winter")), {}, (SetState(8, "spring"),)),
    ("three_hours", scene(c8=Look("clock", state="9")), {}, (SetState(8, "12"),)),
    ("half_a_day", scene(c8=Look("clock", state="9")), {}, (SetState(8, "3"),)),
    ("cars_go", scene(c1=Look("traffic light", state="red")), {}, (SetState(1, "green"),)),
    ("cars_go", scene(c1=Look("traffic light", state="green")), {}, ()),
    ("potassium", scene(c1=Look("leaf", state="healthy")), {}, (SetState(1, "deficient"),)),
    ("hours_pass", scene("night"), {}, (SetBackground("day"),)),
    ("hours_pass", scene("table"), {}, ()),
    ("night_falls", scene("day", c2=Look("sun", size="small")), {},
     (Replace(2, Look("moon", "", "small", "full")), SetBackground("night"))),
    ("let_go", scene(c7=Look("balloon", RED, "large", "full")), {}, (Move(7, 1),)),
    ("let_go", scene(c7=Look("balloon", RED, "large", "full"), c1=Look("star", RED)), {}, ()),
    ("drives_off", scene(c7=Look("car", RED)), {}, (Resize(7, "small"),)),
    ("likeness", scene(c7=Look("car", RED)), {"the": "7", "like": GREEN}, (Recolour(7, GREEN),)),
    ("opposite_colour", scene(c7=Look("car", RED)), {"the": "7"}, (Recolour(7, GREEN),)),
    ("next_colour", scene(c7=Look("car", GREEN)), {"the": "7"}, (Recolour(7, BLUE),)),
    ("next_colour", scene(c7=Look("car", "purple")), {"the": "7"}, ()),
    ("mirror", scene(c3=Look("car", RED)), {"the": "3"}, (Move(3, 5),)),
    ("mirror", scene(c4=Look("car", RED)), {"the": "4"}, ()),
    ("across", scene(c2=Look("car", RED)), {"the": "2"}, (Move(2, 6),)),
    ("centre", scene(c2=Look("car", RED), c4=Look("sun")), {"the": "2"}, ()),
    ("alone", scene(c2=Look("car", RED), c4=Look("sun"), c5=Look("sun")), {"the": "2"}, (Remove(4), Remove(5))),
    ("like_largest", scene(c0=Look("circle", RED), c1=Look("square", BLUE), c2=Look("square", GREEN, "small")),
     {"kinds_a": "circle", "kind_b": "square"}, (Recolour(0, BLUE),)),
    ("like_largest", scene(c0=Look("circle", RED), c1=Look("square", BLUE), c2=Look("square", GREEN)),
     {"kinds_a": "circle", "kind_b": "square"}, ()),
    ("odd_colour", scene(c0=Look("star", RED), c1=Look("star", BLUE), c2=Look("star", RED)), {}, (Recolour(1, RED),)),
    ("odd_size", scene(c0=Look("star", RED), c1=Look("star", RED, "small"), c2=Look("star", RED)), {}, (Resize(1, "large"),)),
    ("swap_colours", scene(c0=Look("star", RED), c1=Look("heart", BLUE)), {"the_a": "0", "the_b": "1"},
     (Recolour(0, BLUE), Recolour(1, RED))),
    ("corners", scene(c0=Look("star", RED), c1=Look("heart", BLUE), c3=Look("square", RED)), {}, (Remove(0), Remove(3))),
    ("growing", scene(c0=Look("tree", state="winter"), c1=Look("heart", BLUE)), {}, (Remove(1),)),
    ("more_than", scene(c0=Look("star", RED), c1=Look("heart", BLUE), c2=Look("heart", RED)),
     {"kinds_a": "heart", "kinds_b": "circle", "the": "0", "colour_c": GREEN}, (Remove(0),)),
    ("more_than", scene(c0=Look("star", RED), c1=Look("heart", BLUE), c2=Look("circle", RED)),
     {"kinds_a": "heart", "kinds_b": "circle", "the": "0", "colour_c": GREEN}, (Recolour(0, GREEN),)),
    ("count", scene(c0=Look("sign", state="GO"), c1=Look("heart", BLUE), c2=Look("heart", RED)), {"kinds_a": "heart"},
     (SetLabel(0, "2"),)),
    ("sum", scene(c0=Look("sign", state="GO")), {"a": "5", "b": "4"}, (SetLabel(0, "9"),)),
    ("gravity", scene(c0=Look("star", RED), c4=Look("heart", BLUE), c8=Look("heart", RED)), {}, (Move(0, 6), Move(4, 7))),
    ("gravity", scene(c0=Look("star", RED), c3=Look("heart", BLUE)), {}, ()),
    ("seesaw_tips", scene(c3=Look("star", RED, "small"), c4=Look("seesaw", state="level"), c5=Look("heart", RED)), {},
     (SetState(4, "right"),)),
    ("heavier_left", scene(c0=Look("star", RED, "small"), c2=Look("heart", RED), c7=Look("seesaw", state="level")), {},
     (Move(2, 6), Move(0, 8), SetState(7, "left"))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "before", "slots", "edits"), TRUTHS, ids=[f"{n}-{case[0]}" for n, case in enumerate(TRUTHS)])
def test_what_a_rule_means(name, before, slots, edits):
    assert rules()[name].meaning(before, slots) == edits


# ---- wordings ------------------------------------------------------------------------------------------------------------


def every_group() -> list[tuple[str, str, tuple]]:
    """(language, name, wordings) of all edits and rules."""
    found = []
    for language in words.LANGUAGES:
        found += [(language, kind, wordings(kind, language)) for kind in EDIT_KINDS]
        found += [
            (language, f"{kind} {state}", state_wordings(kind, state, language))
            for kind in KINDS
            for state in KINDS[kind].states
            if state and kind != "sign"
        ]
        found += [(language, name, rule.wordings(language)) for name, rule in rules().items()]
    return found


def test_there_are_many_wordings_and_both_splits_have_some():
    for language, name, group in every_group():
        least = 12 if name in EDIT_KINDS else {"en": 6, "zh": 4}[language]
        assert len({each.pattern for each in group}) == len(group) >= least, name
        held = [each for each in group if each.split == "held_out"]
        assert 0.1 < len(held) / len(group) < 0.3, name
        assert group[0].split == "train", "the canonical wording is what thoughts are trained on"
        assert bool(re.search(r"[\u4e00-\u9fff]", group[0].pattern)) == (language == "zh")


def test_no_wording_is_in_both_splits_and_held_out_ones_use_known_words():
    """Ids and texts are apart; a word that training never shows could not be understood."""
    for language in words.LANGUAGES:
        groups = [group for lang, _, group in every_group() if lang == language]
        texts = {split: {each.pattern for group in groups for each in group if each.split == split} for split in SPLITS}
        assert not texts["train"] & texts["held_out"]
        for group in groups:
            known = {split: set() for split in SPLITS}
            for each in group:
                plain = re.sub(r"\{\w+\}", " ", each.pattern.lower())
                known[each.split] |= set(re.findall(r"[a-z']+" if language == "en" else r"[\u4e00-\u9fff]", plain))
            assert known["held_out"] <= known["train"]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 6), st.text(max_size=4))
def test_a_held_out_joining_has_both_its_parts_in_training(rows, columns, key):
    held = held_out_joinings(rows, columns, key)
    assert (0, 0) not in held and len(held) <= 0.2 * rows * columns + 1
    for row in range(rows):
        assert any((row, column) not in held for column in range(columns))
    for column in range(columns if rows > 1 else 0):
        assert any((row, column) not in held for row in range(rows))


def test_one_of_two_is_held_out_and_one_of_one_is_not():
    assert len(held_out_of(("a", "b"), "k")) == 1 and not held_out_of(("a",), "k")


# ---- references and instructions -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=80)
@given(st.integers(), st.sampled_from(words.LANGUAGES), st.sampled_from(SPLITS))
def test_a_reference_means_one_object_only(seed, language, split):
    """In each form that is offered, no other object of the scene has the same words, whatever synonyms are drawn."""
    scene = draw_scene(seed, split, least=1)
    for each in scene.objects:
        for form in words.forms(scene, each.cell):
            said = {words.refer(scene, each.cell, language, Dice(seed, n), among=(form,)) for n in range(6)}
            for other in scene.objects:
                if other != each:
                    theirs = {words._referred(other, form, language, Dice(seed, n)) for n in range(12)}
                    assert not said & theirs, (form, scene)


def test_references_tell_alike_objects_apart():
    two = scene(c0=Look("circle", RED, "small"), c8=Look("circle", RED))
    assert words.forms(two, 0) == ("place", "size", "full")
    assert words.refer(two, 0, "en") == "the red circle in the top left"
    assert words.refer(two, 0, "zh") == "左上角的红色圆形"
    one = scene(c0=Look("circle", RED, "small"), c8=Look("circle", BLUE), c4=Look("ice cube", state="puddle"))
    assert words.forms(one, 0) == ("place", "colour", "size", "full")
    assert words.refer(one, 4, "en") == "the puddle of water in the centre"
    with pytest.raises(DataError, match="expected an object"):
        words.refer(one, 1, "en")
    with pytest.raises(DataError, match="expected one of en, zh"):
        words.refer(one, 0, "fr")


def test_canonical_instructions():
    before = scene("day", c0=Look("circle", RED, "small"), c4=Look("candle", BLUE, "large", "new"), c8=Look("sign", state="GO"))
    edits = (Recolour(0, GREEN), SetState(4, "burning"), SetLabel(8, "5"))
    assert canonical(edits, before, "en") == (
        "Change the colour of the red circle in the top left to green.",
        "Change the blue candle in the centre so that it is burning.",
        'Change the text on the sign in the bottom right to "5".',
    )
    assert canonical(edits, before, "zh")[1] == "把正中央的蓝色蜡烛变成燃烧的样子。"


@settings(deadline=None, max_examples=60)
@given(st.integers(), st.sampled_from(words.LANGUAGES), st.sampled_from(SPLITS))
def test_every_edit_can_be_told(seed, language, split):
    scene = draw_scene(seed, split)
    dice = Dice(seed)
    for kind in EDIT_KINDS:
        fits = list(possible(scene, kind))
        if fits:
            edit = dice.pick(fits)
            wording = draw_wording(edit, scene, language, split, dice)
            said = describe(edit, scene, language, wording, dice)
            assert wording.split == split and "{" not in said and said[-1] in ".?。？"


def test_all_looks_have_names_of_their_own():
    for language in words.LANGUAGES:
        assert len({words.a_look(look, language) for look in LOOKS}) == len(LOOKS)
    assert words.a_look(Look("egg", state="whole"), "en") == "a large whole egg"
    assert words.a_look(Look("sign", state="GO"), "en") == 'a sign saying "GO"'
