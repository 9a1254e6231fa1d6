"""Packs: our own wording is complete, files are read strictly and written exactly, and the right one is chosen."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from string import Formatter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.dialogue.pack import (
    TASKS,
    Pack,
    Part,
    Slot,
    fill,
    format_template,
    joined,
    language_of,
    parse_template,
)
from reasonedit.reasonedit_core.dialogue.packfile import _quoted, format_pack, parse_pack
from reasonedit.reasonedit_core.dialogue.prompts import default_pack, find_pack, load_pack, render
from reasonedit.reasonedit_core.errors import ConfigError

quick = settings(max_examples=100, derandomize=True, deadline=None)
IMAGES = {"source": "SOURCE", "result": "RESULT"}
VALUES = {"instruction": "GOAL", "target": "TARGET", "score": 7.25, "reason": "REASON"}

SMALL = """
format = "reasonedit.dialogue/1"
name = "small"
language = "en"
version = 3
[languages]
en = "English"
zh = "Chinese"
[task.describe]
system = "Look."
form = "free"
max_new_tokens = 10
temperature = 0
top_p = 1.0
user = [{ image = "source" }, { text = "Do {instruction} in {language}" }]
"""


# ---- our own wording -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_own_packs_have_every_task_and_conditioning(language):
    pack = load_pack(language)
    assert set(pack.tasks) == set(TASKS)
    assert set(pack.conditioning) == {"step1x-v1p2", "step1x-v1p1"}
    assert all(prompt.dropped_tokens is None for prompt in pack.conditioning.values())
    assert pack.correction and not pack.imported


def test_own_languages_say_the_same_things():
    en, zh = load_pack("en"), load_pack("zh")
    assert en.conditioning == zh.conditioning  # the denoisers were trained under one text for every language
    for name in TASKS:
        a, b = en.tasks[name], zh.tasks[name]
        shape = [
            [(part.image, part.when, {p.name for p in part.text if isinstance(p, Slot)}) for part in t.user] for t in (a, b)
        ]
        assert shape[0] == shape[1], name
        assert (a.form, a.max_new_tokens, a.temperature, a.top_p) == (b.form, b.max_new_tokens, b.temperature, b.top_p)
        assert a.system == en.tasks["think"].system and b.system == zh.tasks["think"].system


@pytest.mark.parametrize("language", ["en", "zh"])
def test_format_facts_stand_in_the_prompts(language):
    pack = default_pack()
    text = {task: "".join(map(str, render(pack, task, language, IMAGES, VALUES).parts)) for task in TASKS}
    for key in ("meets_instruction", "major_conflicts", "minor_conflicts", "omissions", "raw_score", "reason"):
        assert f'"{key}"' in text["score"]
    for task in ("reflect", "reflect_paired"):
        for tag in ("<#Think>", "<#Success>", "<#Reflection>", "<#Failed>"):
            assert tag in text[task]
    for task in ("edit_score", "edit_score_paired", "quality_score"):
        assert '{"score": [' in text[task] and '"reasoning":' in text[task]


# ---- templates and rendering ---------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.one_of(st.text(), st.sampled_from(["a", "original"]).map(Slot))))
def test_templates_round_trip(pieces):
    template = joined(pieces)
    assert parse_template(format_template(template)) == template


def test_templates_agree_with_str_format():
    text = "{{{instruction}}} {{a}} {language}"
    names = [name for _, name, _, _ in Formatter().parse(text) if name]
    template = parse_template(text)
    assert [piece.name for piece in template if isinstance(piece, Slot)] == names
    assert fill(template, {"instruction": "I", "language": "L"}) == text.format(instruction="I", language="L")


@pytest.mark.parametrize("text", ["a { b", "a } b", "{}", "{a b}", "{a!r}", "{a:3}", "{0}"])
def test_other_braces_are_refused(text):
    with pytest.raises(ValueError, match="lone"):
        parse_template(text)


NASTY = 'say "hi" {instruction} {language} {{x}} <instruction> <#Success> \\n %s 把天空变蓝'


@pytest.mark.parametrize("task", TASKS)
def test_values_are_put_in_literally(task):
    query = render(default_pack(), task, "en", IMAGES, {**VALUES, "instruction": NASTY, "target": NASTY, "reason": NASTY})
    text = "".join(part for part in query.parts if isinstance(part, str))
    asked = {slot.name for part in default_pack().tasks[task].user for slot in part.text if isinstance(slot, Slot)}
    assert text.count(NASTY) == len(asked & {"instruction", "target", "reason"})


def test_render_orders_pictures_and_names_the_plain_task():
    paired = render(default_pack(), "reflect_paired", "en", IMAGES, VALUES, seed=5)
    assert (paired.task, paired.form, paired.seed) == ("reflect", "verdict", 5)
    assert paired.images == ("SOURCE", "RESULT")
    assert [part for part in paired.parts if isinstance(part, int)] == [0, 1]
    single = render(default_pack(), "reflect", "en", IMAGES, VALUES)
    assert single.images == ("RESULT",)
    assert "SOURCE" not in single.images and "7.25" in single.parts[1]


def test_conditional_parts():
    pack = default_pack()
    plain = render(pack, "think", "en", IMAGES, {"instruction": "X"})
    again = render(pack, "think", "en", IMAGES, {"instruction": "X", "feedback": "WHY"})
    assert "WHY" in again.parts[1] and len(again.parts) == len(plain.parts) == 2
    assert render(pack, "think", "en", IMAGES, {"instruction": "X", "feedback": ""}) == plain
    both = render(pack, "score", "en", IMAGES, {**VALUES, "original": "USER WORDS"})
    assert "USER WORDS" in both.parts[1]


def test_language_decides_the_wording_and_its_name():
    pack = default_pack("en")
    assert "English" in render(pack, "think", "en", IMAGES, VALUES).parts[1]
    assert "汉语" in render(pack, "think", "zh", IMAGES, VALUES).parts[1]
    assert "Chinese" in render(load_pack("en"), "think", "zh", IMAGES, VALUES).parts[1]
    with pytest.raises(ConfigError, match="found 'fr'"):
        default_pack("fr")


@pytest.mark.parametrize(
    ("text", "language"),
    [("make it red", "en"), ("", "en"), ("add 红", "en"), ("add 红色", "zh"), ("赤い", "en"), ("把天空变蓝", "zh")],
)
def test_language_of(text, language):
    assert language_of(text) == language


# ---- files ---------------------------------------------------------------------------------------------------------------


@quick
@given(st.text() | st.text(alphabet='"\\\n\r\t {}\x00\x7f\u0085\u2028a'))
def test_strings_are_written_exactly(text):
    assert tomllib.loads(f"a = {_quoted(text)}\n") == {"a": text}


def test_quotes_and_ends_of_lines_are_written_exactly():
    for length in range(1, 6):
        for text in map("".join, itertools.product('"\\\n ', repeat=length)):
            written = _quoted(text)
            assert tomllib.loads(f"a = {written}\n") == {"a": text}
            assert all(line == line.rstrip() for line in written.splitlines())  # editors may strip what stands there


@quick
@given(st.text(max_size=40), st.text(max_size=40), st.text(min_size=1, max_size=40).filter(str.strip), st.integers(0, 300))
def test_packs_are_written_exactly(system, text, prefix, dropped):
    own = load_pack("en")
    user = (Part(image="source"), Part(text=joined([text, Slot("instruction"), system])))
    think = replace(own.tasks["think"], system=joined([system]), user=user)
    conditioning = {"step1x-v1p2": replace(own.conditioning["step1x-v1p2"], prefix=prefix, dropped_tokens=dropped)}
    pack = replace(own, tasks={"think": think}, conditioning=conditioning, imported=True, sources=(("a.py", "00"),), name=text)
    assert parse_pack(format_pack(pack, ["made by a test"]), own.path) == pack


def test_half_surrogates_are_refused():
    with pytest.raises(ConfigError, match="surrogate"):
        _quoted("\ud800")


FAULTS = [
    ("version = 3", "version = true", r"version: expected int, found True"),
    ("version = 3", "", r"version: expected int, found nothing"),
    ("version = 3", "version = 3\nverison = 4", r"verison: expected no such key"),
    ("dialogue/1", "dialogue/9", r'format: expected "reasonedit.dialogue/1", found'),
    ('zh = "Chinese"', "", r"languages.zh: expected str"),
    ("[task.describe]", "[task.descibe]", r"task.descibe: expected a section .*describe"),
    ('form = "free"', 'form = "pair"', r'task.describe.form: expected "free"'),
    ("max_new_tokens = 10", "max_new_tokens = 0", r"task.describe.max_new_tokens: expected a number from 1"),
    ("max_new_tokens = 10", "max_new_tokens = 1.5", r"task.describe.max_new_tokens: expected int"),
    ("temperature = 0", "temperature = -1", r"task.describe.temperature"),
    ("top_p = 1.0", "top_p = nan", r"task.describe.top_p"),
    ('{ image = "source" }, ', "", r"task.describe.user: expected the pictures \['source'\]"),
    ('{ image = "source" }', '{ image = "result" }', r"task.describe.user\[0\].image: expected one of"),
    ('{ image = "source" }', '{ image = "source", text = "x" }', r"task.describe.user\[0\]: expected either"),
    ('{ image = "source" }', '"source"', r"task.describe.user: expected tables"),
    ("{instruction}", "that", r"task.describe.user: expected a text that holds \{instruction\}"),
    ("{language}", "{langauge}", r"task.describe.user\[1\].text: expected only the placeholders .*found 'langauge'"),
    ("{language}", "{score}", r"task.describe.user\[1\].text: expected only the placeholders .*found 'score'"),
    ("{language}", "{language", r"a lone '\{'"),
    ('system = "Look."', 'system = "{reason}"', r"task.describe.system"),
    ('text = "Do', 'when = "feedback", text = "Do', r"task.describe.user\[1\].when: expected one of \['original'\]"),
    ("[languages]", "[[languages]]", r"languages: expected dict"),
    ('name = "small"', "name = small", r"expected TOML, found a fault"),
]


@pytest.mark.parametrize(("old", "new", "message"), FAULTS)
def test_faulty_files_are_refused_by_name(tmp_path, old, new, message):
    assert SMALL.count(old) >= 1
    path = tmp_path / "mine.toml"
    path.write_text(SMALL.replace(old, new), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_pack(path)
    assert str(path) in str(caught.value)


def test_feedback_must_be_conditional():
    text = format_pack(load_pack("en")).replace('when = "feedback"\n', "")
    with pytest.raises(ConfigError, match=r"task.think.user\[2\].when: expected \"feedback\""):
        parse_pack(text, "x.toml")


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_pack(tmp_path / "none.toml")
    path = tmp_path / "latin.toml"
    path.write_bytes(b'name = "\xe9"')
    with pytest.raises(ConfigError, match="UTF-8"):
        load_pack(path)
    with pytest.raises(ConfigError, match="at least one"):
        parse_pack(SMALL.partition("[task")[0], "empty.toml")


def test_absent_prompts_are_named():
    pack = parse_pack(SMALL, "small.toml")
    with pytest.raises(ConfigError, match=r"small.toml.*'think'.*only describe"):
        render(pack, "think", "en", IMAGES, VALUES)
    with pytest.raises(ConfigError, match=r"small.toml.*conditioning.step1x-v1p1.*only none"):
        pack.conditioning_for("v1p0")


@pytest.mark.parametrize("variant", ["v1p2", "step1x-v1p2", "v1.2", "step1x-v1.2"])
def test_conditioning_variants(variant):
    own = default_pack()
    assert own.conditioning_for(variant) is own.conditioning["step1x-v1p2"]
    assert own.conditioning_for("v1.0") is own.conditioning_for("step1x-v1p1")
    with pytest.raises(ConfigError, match="v9"):
        own.conditioning_for("v9")


# ---- the choice ----------------------------------------------------------------------------------------------------------


def imported(name: str, *, tasks=("think", "reflect_paired"), conditioning=("step1x-v1p2",)) -> str:
    own = load_pack("en")
    bare = replace(own.tasks["think"], user=tuple(part for part in own.tasks["think"].user if part.when is None))
    prompts = {**own.tasks, "think": bare}
    pack = Pack(
        name=name,
        language="any",
        version=1,
        tasks={task: prompts[task] for task in tasks},
        conditioning={key: replace(own.conditioning[key], dropped_tokens=90) for key in conditioning},
        languages=own.languages,
        imported=True,
    )
    return format_pack(pack)


@pytest.fixture
def places(tmp_path):
    weights, models = tmp_path / "weights", tmp_path / "models"
    (models / "reasonedit" / "dialogue").mkdir(parents=True)
    weights.mkdir()
    return weights, models


def test_order_of_search(tmp_path, places):
    weights, models = places
    choose = dict(weights=weights, models_dir=models, variant="v1p2")
    assert find_pack(**choose).origin == "own"
    (models / "reasonedit" / "dialogue" / "a.toml").write_text(imported("a", conditioning=("step1x-v1p1",)), "utf-8")
    (models / "reasonedit" / "dialogue" / "b.toml").write_text(imported("b"), "utf-8")
    assert (find_pack(**choose).origin, find_pack(**choose).pack.name) == ("models", "b")
    assert find_pack(**{**choose, "variant": "v1p1"}).pack.name == "a"
    (weights / "dialogue.toml").write_text(imported("w"), "utf-8")
    assert (find_pack(**choose).origin, find_pack(**choose).pack.name) == ("weights", "w")
    (weights / "model.safetensors").touch()
    assert find_pack(**{**choose, "weights": weights / "model.safetensors"}).pack.name == "w"
    (tmp_path / "mine.toml").write_text(SMALL, "utf-8")
    chosen = find_pack(explicit=tmp_path / "mine.toml", **choose)
    assert (chosen.origin, chosen.pack.name) == ("explicit", "small")
    with pytest.raises(ConfigError, match="no such file"):
        find_pack(explicit=tmp_path / "other.toml", **choose)


def test_one_warning_with_the_command_for_v1p2_without_an_imported_pack(places, caplog):
    weights, _ = places
    with caplog.at_level(logging.INFO):
        chosen = find_pack(weights=weights, variant="v1p2")
    assert f'reasonedit dialogue import SOURCE --out "{weights / "dialogue.toml"}"' in chosen.warning
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [chosen.warning]
    assert chosen.reason in caplog.text and "our own wording" in chosen.reason
    assert find_pack(weights=weights, variant="v1p1").warning is None
    assert find_pack(weights=weights).warning is None
    (weights / "dialogue.toml").write_text(imported("w"), "utf-8")
    assert find_pack(weights=weights, variant="v1p2").warning is None
    (weights / "dialogue.toml").write_text(imported("w", conditioning=("step1x-v1p1",)), "utf-8")
    assert find_pack(weights=weights, variant="v1p2").warning is not None


def test_gaps_are_filled_from_our_own_wording_and_named(places):
    weights, _ = places
    (weights / "dialogue.toml").write_text(imported("w"), "utf-8")
    chosen = find_pack(weights=weights, variant="v1p2")
    assert "reflect" not in chosen.pack.tasks  # its paired form is there, and the two wordings are not mixed
    assert "task.describe" in chosen.filled and "task.describe" in chosen.reason
    assert chosen.pack.conditioning_for("v1p2").dropped_tokens == 90
    assert chosen.pack.conditioning_for("v1p1").dropped_tokens is None
    own = default_pack()
    for language in ("en", "zh"):
        theirs = render(chosen.pack, "describe", language, IMAGES, VALUES)
        assert theirs.system == render(own, "describe", language, IMAGES, VALUES).system


def test_imported_think_gets_our_words_for_feedback_and_nothing_else(places):
    weights, _ = places
    (weights / "dialogue.toml").write_text(imported("w"), "utf-8")
    filled, plain = find_pack(weights=weights).pack, load_pack(weights / "dialogue.toml")
    assert render(filled, "think", "zh", IMAGES, VALUES) == render(plain, "think", "zh", IMAGES, VALUES)
    again = render(filled, "think", "zh", IMAGES, {**VALUES, "feedback": "WHY"})
    assert "WHY" in again.parts[1] and "此前" in again.parts[1]
    assert again.parts[1].endswith(render(plain, "think", "zh", IMAGES, VALUES).parts[1][-30:])


def test_the_room_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; "
        "from reasonedit.reasonedit_core.dialogue import prompts, replies, importer; "
        "from reasonedit.reasonedit_core.reasoners import reasoner, remote, scripted; prompts.default_pack()"
    )
    path = str(Path(__file__).resolve().parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); import conftest; {code}"], check=False
    )
    assert done.returncode == 0
