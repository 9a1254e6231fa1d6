"""The record sets of the miniatures: their mixture, that what they say is true of their pictures, and that they are split."""

from __future__ import annotations

import hashlib
import io
import re
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonedit.reasonedit_core.errors import ConfigError, DataError
from reasonedit.reasonedit_core.mini.faults import plant
from reasonedit.reasonedit_core.mini.items import item, scene
from reasonedit.reasonedit_core.mini.judge import judge, quality, read
from reasonedit.reasonedit_core.mini.splits import split_of_scene
from reasonedit.reasonedit_core.mini.texts import caption, target_description
from reasonedit.reasonedit_core.mini.verdicts import assess_picture
from reasonedit.reasonedit_core.mini.world import render
from reasonedit.training.data.check import check_records
from reasonedit.training.data.documents import Documents
from reasonedit.training.data.records import read_records
from reasonedit.training.mini import books, writers
from reasonedit.training.mini.books import BOOKS, draw_records, write_book

COUNT, HELD = 60, 10


@cache
def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    place = tmp_path_factory.mktemp("books")
    return {name: write_book(name, place / name, COUNT, 4, held_out=HELD) for name in BOOKS}


@pytest.fixture(scope="module")
def shelf(written):
    return {name: read_records(path) for name, path in written.items()}


@pytest.mark.parametrize("name", BOOKS)
def test_a_book_has_what_was_asked_for_and_no_fault(name, written, shelf):
    assert Counter(each.split for each in shelf[name]) == {"train": COUNT, "held_out": HELD}
    problems = check_records(written[name]).problems
    assert {each.code for each in problems} <= {"misaligned-pair"}  # all that a scene holds may move by one cell
    assert len(problems) < 5


def test_the_mixtures(shelf):
    kinds = {name: Counter(each.kind for each in records if each.split == "train") for name, records in shelf.items()}
    assert kinds == {
        "words": {"understand": 60},
        "edits": {"edit": 53, "t2i": 7},
        "pairs": {"think": 60},
        "triples": {"reflect": 60},
        "drawings": {"t2i": 60},
        "suppositions": {"hypothetical": 60},
        "looks": {"understand": 60},
        "meanings": {"understand": 60},
        "copies": {"understand": 60},
    }
    clear = Counter(each.instruction.clarity for each in shelf["pairs"] if each.split == "train")
    assert clear == {"abstract": 40, "clear": 20}
    known = Counter(each.instruction.category for each in shelf["pairs"] if each.instruction.clarity == "abstract")
    assert max(known.values()) - min(known.values()) <= 2 and set(known) == {"factual", "conceptual", "procedural"}
    verdicts = Counter(each.reflect.verdict for each in shelf["triples"] if each.split == "train")
    assert verdicts == {"success": 36, "reflection": 12, "failed": 12}
    languages = Counter(each.lang for records in shelf.values() for each in records)
    assert 0.45 < languages["en"] / sum(languages.values()) < 0.75


def test_hard_edits_and_references_by_content_are_drawn_more_often():
    dice = [books.Draw("", 90_000 + n, books.Dice("t", n), None) for n in range(400)]
    found = [books.clear_item(each, "en") for each in dice]
    kinds = Counter(each.edit_kinds[0] for each in found if len(each.edits) == 1)
    assert min(kinds[kind] for kind in ("move", "recolour", "replace")) > 2 * max(kinds[k] for k in ("background", "label"))
    assert 50 < sum(len(each.edits) > 1 for each in found) < 110
    plain = [item(each.seed, "concrete", "train", "en") for each in dice]
    assert sum(map(books._by_place, found)) < 0.8 * sum(map(books._by_place, plain))


def test_all_scenes_are_of_the_training_split(shelf):
    """Read back from the files. What a spoiled picture shows is not to be read, and need not be a scene at all."""
    seen = 0
    for records in shelf.values():
        for record in records[COUNT - 12 : COUNT + 4]:
            for name in record.files:
                reading = read(_pixels(record.picture(name)))
                if quality(reading) == 10:
                    seen += 1
                    assert split_of_scene(reading.scene) == "train", record.id
    assert seen > 100


def test_files_are_named_by_what_they_hold(shelf, written):
    used = set()
    for name, records in shelf.items():
        for record in records:
            for each, file in record.files.items():
                data = record.picture(each).read_bytes()
                assert hashlib.sha256(data).hexdigest() == file.sha256 and file.size == (96, 96)
                used.add((name, file.path))
    stored = {(name, p.relative_to(path.parent).as_posix()) for name, path in written.items() for p in path.parent.rglob("*.*")}
    assert not used - stored
    assert len(stored - used) < 2 * len(BOOKS) + 4  # two files a book, and what was drawn for a record that then did not fit


def test_an_edit_is_carried_out_in_its_target(shelf):
    for record in (*shelf["edits"][:16], *shelf["pairs"][-16:], *shelf["triples"][:16]):
        if record.kind == "t2i":
            continue
        source, target = (_pixels(record.picture(name)) for name in ("input", "target"))
        before, after = read(source).scene, read(target).scene
        assert before != after
        found = judge(before, after, target)
        assert found.done and found.exact and found.quality == 10


def test_thoughts_are_clear_and_clear_ones_stay(shelf):
    for record in shelf["pairs"]:
        if record.instruction.clarity == "clear":
            assert record.editor_instruction == record.instruction.raw
        else:
            assert record.editor_instruction != record.instruction.raw and record.think.steps
    told = [record.editor_instruction for record in shelf["edits"] if record.kind == "edit"]
    assert 2 < sum(record.edit is not None for record in shelf["edits"]) < len(told) / 3


def test_a_triple_says_what_its_pictures_show(shelf):
    """Every value is worked out anew, from the pixels."""
    goals = Counter()
    for record in shelf["triples"]:
        source, target, pixels = (_pixels(record.picture(name)) for name in ("input", "target", "generated"))
        before, after = read(source).scene, read(target).scene
        found, told = assess_picture(before, after, pixels, record.lang), record.reflect
        assert (told.verdict, told.reason, told.second_instruction) == (found.verdict, found.reason, found.instruction)
        assert told.scores.consistency == found.score and told.findings.reason == found.scorer
        assert told.findings.model_dump(exclude={"reason"}) == found.findings
        assert told.target_description == target_description(before, after, record.lang)
        seen = judge(before, after, pixels)
        assert told.scores.edit == (round(seen.success, 1), round(seen.preservation, 1))
        assert told.scores.quality == (round(seen.quality, 1),) * 2
        if record.instruction.clarity == "abstract":
            goals[record.think is not None] += 1
    assert goals[True] > goals[False] > 0
    spoilt = [each for each in shelf["triples"] if each.reflect.scores.quality != (10.0, 10.0)]
    assert 0 < len(spoilt) < 14 and {each.reflect.verdict for each in spoilt} == {"failed"}


def test_the_words_teach_no_reasoning_about_edits(shelf):
    """Answers are captions, names, places, numbers and clear instructions; nothing abstract is asked, nothing judged."""
    rules = [record.instruction.raw for record in shelf["pairs"] if record.instruction.clarity == "abstract"]
    for record in (*shelf["words"], *shelf["looks"]):
        for turn in record.understand.turns:
            for text in (turn.question, turn.answer):
                assert not re.search(r"<#|\{|meets_instruction|should be|应该|described", text), text
                assert not any(rule in text for rule in rules)
    shown = [record for record in shelf["words"] if "input" in record.files]
    assert len(shelf["words"]) - len(shown) == 6  # of the training part; the numbers of the other hold none
    turns = [turn for record in shown for turn in record.understand.turns]
    assert any("plain words" in turn.question for turn in turns) and any("用平实的话说" in turn.question for turn in turns)


def test_meanings_are_thoughts_in_short(tmp_path):
    for number, record in enumerate(draw_records("meanings", tmp_path, range(40), 2)):
        (turn,) = record["understand"]["turns"]
        seed = (list(BOOKS).index("meanings") << 56) + (2 << 64) + (number << 5)
        both = [item(seed, books._KNOWLEDGE[number % 3], "train", language) for language in ("en", "zh")]
        asked = next(one for one in both if one.instruction in turn["question"])
        assert turn["answer"] == asked.concrete and len(turn["question"]) - len(asked.instruction) < 30


def test_copies_are_copies(shelf):
    asked = Counter()
    for record in shelf["copies"]:
        turns = record.understand.turns
        for turn in turns:
            assert turn.answer in turn.question
        asked[len(turns)] += 1
    assert min(asked[1], asked[2]) > 15


def test_captions_are_those_of_the_pictures(shelf):
    for record in shelf["words"]:
        answers = [turn.answer for turn in record.understand.turns]
        if "input" in record.files and any(answer.startswith("The background is") for answer in answers):
            assert caption(read(_pixels(record.picture("input"))).scene, "en") in answers


def test_a_book_follows_from_its_seed_and_not_from_the_processes(tmp_path, written, monkeypatch):
    monkeypatch.setattr(books, "_BATCH", 7)
    again = write_book("pairs", tmp_path / "a", COUNT, 4, held_out=HELD, workers=2)
    assert again.read_bytes() == written["pairs"].read_bytes()
    other = write_book("pairs", tmp_path / "b", COUNT, 5, held_out=HELD)
    texts = [{each.instruction.raw for each in read_records(path)} for path in (again, other)]
    assert len(texts[0] & texts[1]) < 0.2 * len(texts[0])


def test_a_longer_book_begins_with_the_shorter(tmp_path, shelf):
    numbers = [*range(5), *(books.VALIDATION + n for n in range(2))]
    found = [record["id"] for record in draw_records("edits", tmp_path, numbers, 4)]
    assert found == [f"edits-4-{n:06d}" for n in range(5)] + ["edits-4-h000000", "edits-4-h000001"]
    ids = [record.id for record in shelf["edits"]]
    assert set(found) <= set(ids)


def test_no_picture_of_the_validation_part_is_in_the_training_part(tmp_path):
    """Also where scenes are few: of these, more than half would come twice."""
    few = [record for record in draw_records("words", tmp_path, range(400), 1) if "images" in record]
    seen = {record["images"]["input"]["sha256"] for record in few}
    numbers = range(books.VALIDATION, books.VALIDATION + 30)
    free = [record for record in draw_records("words", tmp_path, numbers, 1) if "images" in record]
    kept = [record for record in draw_records("words", tmp_path, numbers, 1, avoid=seen) if "images" in record]
    assert any(record["images"]["input"]["sha256"] in seen for record in free)
    assert not any(record["images"]["input"]["sha256"] in seen for record in kept) and len(kept) == len(free)


def test_a_finished_book_is_not_made_again(tmp_path, caplog):
    first = write_book("drawings", tmp_path, 4, held_out=2)
    stamp = first.stat().st_mtime_ns
    assert write_book("drawings", tmp_path, 4, held_out=2).stat().st_mtime_ns == stamp
    assert len(read_records(write_book("drawings", tmp_path, 5, held_out=2))) == 7
    (tmp_path / "book.json").unlink()
    stamp = first.stat().st_mtime_ns
    assert write_book("drawings", tmp_path, 5, held_out=2).stat().st_mtime_ns != stamp


def test_books_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="expected a book out of words, edits, .*copies, found 'novels'"):
        write_book("novels", tmp_path, 4)
    for count, held_out, seed in ((0, 0, 0), (-1, 5, 0), (4, 2, -1)):
        with pytest.raises(ConfigError, match="expected"):
            write_book("words", tmp_path, count, seed, held_out=held_out)


def test_every_document_can_be_made(shelf, tmp_path):
    """By the reasoner and the conditioner of a miniature, within the length of its replies."""
    from types import SimpleNamespace

    from reasonedit.reasonedit_core.conditioners.step1x import Step1XConditioner
    from reasonedit.reasonedit_core.dialogue.pack import fitted
    from reasonedit.reasonedit_core.dialogue.prompts import find_pack
    from reasonedit.reasonedit_core.generator import Step1XGeometry
    from reasonedit.reasonedit_core.mllm import load
    from reasonedit.reasonedit_core.mllm.qwen25vl import QwenVL
    from reasonedit.reasonedit_core.weightfiles import read_json
    from reasonedit.training.data.transcripts import Shown
    from reasonedit.training.data.voice import Voice
    from reasonedit.training.mini import blank, tokens

    learnt = tokens.learn_tokens(1600, texts=500, prompts=20)
    folder = blank.write_blank("mini-s", tmp_path, vocab=learnt.vocab, merges=learnt.merges)
    tokenizer = load.load_tokenizer(folder / "text_encoder")
    config = load.make_config(read_json(folder / "text_encoder" / "config.json"), tokenizer)
    mllm = QwenVL(SimpleNamespace(config=config, lm_head=None), tokenizer)
    stated = blank.settings("mini-s")
    pack = fitted(find_pack().pack, reply_tokens=stated["reply_tokens"])
    prefix = pack.conditioning_for("v1.2").prefix
    low, high = stated["conditioner_pixels"]
    conditioner = Step1XConditioner(mllm, prefix=prefix, variant="v1.2", min_pixels=low, max_pixels=high)
    documents = Documents(Voice(mllm, pack, conditioner, Step1XGeometry("v1.2"), 96, "", Shown(low, high)))
    sources, made, refused = documents.items([record for name in BOOKS for record in shelf[name]])
    assert not refused
    tasks = Counter(task for _, task in sources.values())
    assert tasks == {
        "understand": 280, "think": 70, "describe": 70, "score": 70, "reflect": 70, "t2i": 78, "edit": 272, "refine": 14,
    }  # fmt: skip
    assert max(each.text for each in made) < 1000 and max(each.image for each in made) < 200


# ---- one record at a time ------------------------------------------------------------------------------------------------


@settings(max_examples=25, derandomize=True, deadline=None)
@given(st.integers(0, 10**9), st.sampled_from(("concrete", "abstract", "compound")))
def test_marks_are_the_judges(seed, kind):
    one = item(seed, kind)
    for shown in (one.target, plant(one, seed).shown):
        found = judge(one.source, one.target, render(shown))
        assert writers.marks(one.source, one.target, shown) == (found.success, found.preservation)


def test_a_picture_that_an_editor_made_is_read_by_the_judge(tmp_path):
    one, store = item(5, "abstract"), writers.PictureStore(tmp_path)
    fault = next(found for n in range(30) if (found := writers.faulty(one, n, "reflection")))
    drawn = writers.reflect_record(one, store, "a", fault)
    made = writers.reflect_picture_record(one, store, "a", render(fault.shown))
    assert made == drawn


def test_png_files_are_those_of_pillow():
    for pixels in (render(scene(1)), np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)):
        image = Image.open(io.BytesIO(writers.encode_png(pixels)))
        assert image.mode == "RGB" and (np.asarray(image) == pixels).all()


def test_verdicts_are_those_asked_for():
    one = item(11, "compound")
    for verdict in ("success", "reflection", "failed"):
        found = [writers.faulty(one, seed, verdict) for seed in range(12)]
        assert {each.assessment.verdict for each in found if each} == {verdict}
    with pytest.raises(DataError, match="found 'good'"):
        writers.faulty(one, 0, "good")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_reading_place_by_place_names_all_nine_as_they_are(language):
    from reasonedit.reasonedit_core.mini import words
    from reasonedit.reasonedit_core.mini.dice import Dice
    from reasonedit.reasonedit_core.mini.kinds import CELLS
    from reasonedit.training.mini.readings import read_cells

    for seed in range(20):
        shown = scene(seed)
        (_, told), *asked = read_cells(shown, language, Dice("place by place", seed))
        parts = re.split("[；。]" if language == "zh" else r"; |\.$", told)[:9]
        assert len(parts) == 9 and len(asked) <= 2
        for cell, part in zip(CELLS, parts, strict=True):
            place, _, thing = part.partition("：" if language == "zh" else ": ")
            look = shown.look(cell)
            empty = "空" if language == "zh" else "empty"
            assert place.lower() == words.place_name(cell, language)
            assert thing == (words.name_look(look, language) if look else empty)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_questions_after_places_and_objects_meant_are_answered_truly(language):
    from reasonedit.reasonedit_core.mini import words
    from reasonedit.reasonedit_core.mini.dice import Dice
    from reasonedit.training.mini.readings import read_meant, read_places

    def sentence(text):
        return f"{text}。" if language == "zh" else f"{text[:1].upper()}{text[1:]}."

    for seed in range(20):
        shown = scene(seed, least=2)
        named = [one for one in shown.objects if words.forms(shown, one.cell) != ("place", "full")]
        places = {sentence(words.at_place(one.cell, language)) for one in named}
        told = read_places(shown, language, Dice("places", seed))
        assert {answer for _, answer in told[: len(named)]} == places and len(told) <= len(named) + 2
        objects = set()
        for one in shown.objects:
            where, look = words.at_place(one.cell, language), words.name_look(one.look, language)
            objects.add(f"{where}的{look}。" if language == "zh" else f"The {look} {where}.")
        meant = read_meant(shown, language, Dice("meant", seed))
        assert meant and {answer for _, answer in meant} <= objects
