"""Drawn records: the same for the same seed, true of what is drawn, and nothing shared between the splits."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonedit.reasonedit_core.dialogue.replies import cap_score
from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.training.data import drawn_words as words
from reasonedit.training.data.drawn import COUNTS, write_drawn
from reasonedit.training.data.drawn_kinds import VERDICT_CYCLE, Lot, findings, plant_fault, random_change, random_scene
from reasonedit.training.data.drawn_scene import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    Add,
    Background,
    Move,
    Recolour,
    Remove,
    Scene,
    Thing,
    apply,
    compare,
    render,
)
from reasonedit.training.data.records import KINDS, Record, read_records

CHANGES = ("recolour", "add", "remove", "move")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> list[Record]:
    counts = {"think": 40, "reflect": 40, "edit": 40, "t2i": 20, "understand": 20, "hypothetical": 16}
    return read_records(write_drawn(tmp_path_factory.mktemp("drawn"), counts, seed=1, size=(WIDTH, HEIGHT), references=0.2))


WIDTH, HEIGHT = 72, 48  # multiples of three, so that a shape looks the same in every cell


@cache
def sprites(background: str) -> dict[bytes, tuple[str, str]]:
    """What a cell with each shape in each colour looks like."""
    scenes = {(shape, colour): Scene(background, (Thing(0, shape, colour),)) for shape in SHAPES for colour in COLOURS}
    return {render(scene, (WIDTH, HEIGHT))[: HEIGHT // 3, : WIDTH // 3].tobytes(): key for key, scene in scenes.items()}


@cache
def read_back(path: Path) -> Scene:
    """The scene of a drawn picture, by comparing each cell with every shape in every colour."""
    with Image.open(path) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    background = next(name for name, colour in BACKGROUNDS.items() if (pixels[0, 0] == colour).all())
    scene = Scene(background)
    for cell in range(9):
        top, left = cell // 3 * HEIGHT // 3, cell % 3 * WIDTH // 3
        found = sprites(background).get(pixels[top : top + HEIGHT // 3, left : left + WIDTH // 3].tobytes())
        scene = scene.put(Thing(cell, *found)) if found else scene
    assert np.array_equal(render(scene, (WIDTH, HEIGHT)), pixels)
    return scene


def test_the_same_seed_gives_the_same_files(tmp_path):
    def digest(folder: Path) -> dict[str, str]:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    counts = {"think": 4, "reflect": 5, "edit": 4}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert write_drawn(tmp_path / name, counts, seed=seed, size=48) == tmp_path / name / "records.jsonl"
    one, same, other = (digest(tmp_path / name) for name in "abc")
    assert one == same and one["records.jsonl"] != other["records.jsonl"]


def test_counts_splits_languages_and_verdicts(drawn):
    kinds = Counter(record.kind for record in drawn)
    assert kinds == {"think": 40, "reflect": 40, "edit": 40, "t2i": 20, "understand": 20, "hypothetical": 16}
    assert set(COUNTS) == set(KINDS)
    held = [record for record in drawn if record.split == "held_out"]
    assert Counter(record.kind for record in held) == {kind: round(0.2 * count) for kind, count in kinds.items()}
    verdicts = Counter(record.reflect.verdict for record in drawn if record.reflect)
    assert verdicts == {"success": 24, "reflection": 8, "failed": 8} and Counter(VERDICT_CYCLE)["success"] == 3
    assert Counter(record.lang for record in drawn) == {"en": 88, "zh": 88}
    classes = Counter(record.instruction.clarity for record in drawn if record.kind == "think")
    assert classes == {"abstract": 30, "clear": 10}
    edits = Counter(record.instruction.category for record in drawn if record.kind == "edit")
    assert set(edits) == {*CHANGES, "reference"} and min(edits.values()) >= 2
    assert {record.reason50k.scenario for record in drawn if record.reason50k} == {"physical", "temporal", "causal", "story"}


def test_no_picture_is_in_both_splits(drawn):
    shown = {split: set() for split in ("train", "held_out")}
    for record in drawn:
        shown[record.split].update(file.sha256 for file in record.files.values())
    assert shown["train"] and shown["held_out"] and not shown["train"] & shown["held_out"]


def test_pictures_show_what_is_said(drawn):
    for record in drawn:
        scenes = {name: read_back(record.picture(name)) for name in record.files}
        said = record.reflect.target_description if record.reflect else record.caption
        if said:
            things = scenes["target"].things
            named = [words.some(thing, record.lang) for thing in things]
            assert all(name in said for name in named), said
            assert words.colour(scenes["target"].background, record.lang) in said
        if record.kind == "understand":
            for turn in record.understand.turns:
                assert turn.answer == answer(turn.question, scenes["input"], record.lang), (turn, scenes)
        if "target" in scenes and "input" in scenes and record.kind in ("edit", "hypothetical", "think"):
            assert scenes["input"] != scenes["target"]


def answer(question: str, scene: Scene, lang: str) -> str:
    """The true answer, worked out from the question's words."""
    zh = lang == "zh"
    things = {words.some(thing, lang) for thing in scene.things}
    places = {words.place(cell, lang): scene.at(cell) for cell in range(9)}
    if question in ("How many shapes are there?", "图中有几个图形？"):
        return ("零个。", "一个。", "两个。", "三个。", "四个。")[len(scene.things)] if zh else COUNTED[len(scene.things)]
    if question in ("Describe the picture.", "请描述这张图片。"):
        return words.describe(scene, lang)
    if question.startswith(("Is there ", "图中有")):
        there = question.removeprefix("Is there ").rstrip("?") in things
        there = "一个" + question.removeprefix("图中有").removesuffix("吗？") in things if zh else there
        return ("有。" if there else "没有。") if zh else ("Yes." if there else "No.")
    thing = places[question.removesuffix("是什么？") if zh else question.removeprefix("What is ").rstrip("?")]
    said = words.some(thing, lang) if thing else "什么也没有" if zh else "nothing"
    return said + "。" if zh else said.capitalize() + "."


COUNTED = ("None.", "One.", "Two.", "Three.", "Four.")


def test_verdicts_scores_and_second_instructions_are_true(drawn):
    for record in (record for record in drawn if record.reflect):
        reflect = record.reflect
        shown, target, source = (read_back(record.picture(name)) for name in ("generated", "target", "input"))
        difference = compare(target, shown)
        assert reflect.findings.major_conflicts == difference.conflicts
        assert reflect.findings.omissions == len(difference.missing)
        assert (reflect.scores.consistency == 10) == (shown == target)
        if reflect.verdict == "success":
            assert shown == target and reflect.findings.meets_instruction == "yes"
        elif reflect.verdict == "failed":
            assert reflect.scores.consistency <= 2 and reflect.findings.meets_instruction == "no"
            assert shown == source or not set(shown.things) & set(target.things)
        else:
            mends = [
                change
                for change in all_changes(shown)
                if apply(shown, change) == target and reflect.second_instruction in tellings(shown, change, record.lang)
            ]
            assert len(mends) == 1, reflect.second_instruction


def all_changes(scene: Scene) -> list:
    made = [Remove(thing.cell) for thing in scene.things]
    made += [Recolour(thing.cell, colour) for thing in scene.things for colour in COLOURS]
    made += [Move(thing.cell, to) for thing in scene.things for to in scene.empty()]
    return made + [Add(Thing(cell, shape, colour)) for cell in scene.empty() for shape in SHAPES for colour in COLOURS]


def tellings(scene: Scene, change, lang: str) -> set[str]:
    return {words.tell(scene, change, lang, Random(seed)) for seed in range(60)}


@pytest.mark.parametrize("lang", words.LANGUAGES)
def test_an_instruction_names_one_change_only(lang):
    """Two different changes of a scene never have the same words: a shape that is there twice is named with its place."""
    twins = Scene("white", (Thing(0, "circle", "red"), Thing(4, "circle", "red"), Thing(8, "cross", "blue")))
    told: dict[str, object] = {}
    for change in [*all_changes(twins), Background("grey")]:
        for text in tellings(twins, change, lang):
            assert told.setdefault(text, change) == change, text


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(CHANGES))
def test_a_planted_fault_is_mended_by_its_change(seed, kind):
    rng = Random(seed)
    scene = random_scene(rng)
    change = random_change(scene, kind, rng)
    target = apply(scene, change)
    planted = plant_fault(scene, change, target, rng)
    if planted is not None:
        shown, second = planted
        assert shown != target and apply(shown, second) == target
        assert compare(target, shown).conflicts == 1 and not compare(target, shown).missing
        found = findings(scene, change, target, shown, "en")
        limit = cap_score(10, found["meets_instruction"], found["major_conflicts"], found["omissions"])[0]
        assert 0 < found["score"] <= limit < 10
    assert findings(scene, change, target, target, "zh")["score"] == 10
    assert findings(scene, change, target, scene, "zh")["meets_instruction"] == "no"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_how_two_scenes_differ(one, two):
    first, second = random_scene(Random(one)), random_scene(Random(two))
    difference = compare(first, second)
    assert (difference.conflicts + len(difference.missing) == 0) == (first == second)
    assert compare(first, first) == compare(second, second)


def test_changes_that_do_not_fit_are_refused():
    scene = Scene("white", (Thing(0, "circle", "red"),))
    for change in (Add(Thing(0, "cross", "red")), Remove(1), Recolour(3, "red"), Move(0, 0), Move(5, 6)):
        with pytest.raises(ValueError, match="does not fit"):
            apply(scene, change)
    assert Lot(0, "en", 0.999).pick(CHANGES) == "move"


def test_shapes_look_different_at_the_smallest_size(tmp_path):
    things = [Thing(4, shape, colour) for shape in SHAPES for colour in COLOURS]
    made = {(thing.shape, thing.colour): render(Scene("grey", (thing,)), (24, 24)) for thing in things}
    assert len({picture.tobytes() for picture in made.values()}) == len(SHAPES) * len(COLOURS)
    buffer = io.BytesIO()
    Image.fromarray(made["circle", "red"]).save(buffer, format="PNG")
    assert np.array_equal(np.asarray(Image.open(buffer)), made["circle", "red"])


@pytest.mark.parametrize(
    ("options", "words_"),
    [
        ({"counts": {"edits": 2}}, "did you mean edit"),
        ({"counts": {"edit": -1}}, "a number of records"),
        ({"counts": {}}, "at least one record"),
        ({"size": 16}, "at least 24 pixels"),
        ({"held_out": 1.0}, "below 1"),
        ({"languages": ("fr",)}, "some of en, zh"),
        ({"counts": {"t2i": 4}, "languages": ()}, "some of en, zh"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, options, words_):
    with pytest.raises(ConfigError, match=words_):
        write_drawn(tmp_path, **options)
    assert not (tmp_path / "records.jsonl").exists()


def test_one_record_is_a_training_record(tmp_path):
    (record,) = read_records(write_drawn(tmp_path, {"edit": 1}, size=24))
    assert record.split == "train"
    assert {each.split for each in read_records(write_drawn(tmp_path / "b", {"edit": 5}, size=24, held_out=0))} == {"train"}
