"""Names of objects: by rules, by a speaker, by spaCy, by the user; and what is said where none can be found."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from reasonedit.reasonedit_core.brain.cues import make_extractor
from reasonedit.reasonedit_core.dialogue.objects import parse_objects, tidy
from reasonedit.reasonedit_core.errors import BackendUnavailable, CheckpointError, ConfigError, MalformedReply
from reasonedit.reasonedit_core.extractors.ask import AskingExtractor
from reasonedit.reasonedit_core.extractors.given import GivenObjects
from reasonedit.reasonedit_core.extractors.parsed import FirstOf, load_spacy
from reasonedit.reasonedit_core.extractors.rules import RuleExtractor
from reasonedit.reasonedit_core.reasoners.scripted import ScriptedSpeaker

HERE = Path()


@pytest.mark.parametrize(
    ("instruction", "names"),
    [
        ("What would happen if the ice cube was left in the sun?", ["ice cube", "sun"]),
        ("Make it snow", []),
        ("Cover the snow with red autumn leaves.", ["snow", "red autumn leaves"]),
        ("What would the melted candle look like after an hour?", ["melted candle", "hour"]),
        ("Show the man's old car, slowly rusting, beside a tall tree", ["man", "old car", "tall tree"]),
        ("Show this picture as it was 20 years ago", ["years ago"]),
        ("如果把冰块放在阳光下会怎么样？", ["冰块", "阳光"]),
        ("Lift the lid. Polish an apple! Sand flows", ["lid", "apple", "sand flows"]),
        ("", []),
        ("?!", []),
    ],
)
def test_rules_find_the_things(instruction, names):
    assert RuleExtractor().extract(instruction) == names


def test_replies_are_read_tolerantly():
    assert parse_objects('["ice cube", "Sun"]') == ["ice cube", "Sun"]
    assert parse_objects('Sure: []. Or rather\n```json\n[" ice  cube. ", "ice cube", ""]\n```') == ["ice cube"]
    assert parse_objects('["ice cube", "the su') == ["ice cube"], "cut off"
    assert parse_objects("[]") == [] and parse_objects('[1, 2] and ["a"]') == ["a"]
    for reply in ("ice cube and sun", "[1, 2]", ""):
        with pytest.raises(MalformedReply, match="expected a JSON array of names"):
            parse_objects(reply)
    assert len(tidy([str(n) for n in range(40)])) == 16 and tidy(["a b", "A  B", "c"]) == ["a b", "c"]


def test_a_speaker_is_shown_the_picture_and_the_words():
    speaker, picture = ScriptedSpeaker({"objects": ['["ice"]', "no idea"]}), torch.zeros(1, 3, 8, 8)
    asking = AskingExtractor(speaker)
    assert asking.extract("melt it", picture) == ["ice"]
    (query,) = speaker.asked
    assert query.images[0] is picture and query.parts[0] == 0 and "melt it" in query.parts[1] and query.temperature == 0
    with pytest.raises(MalformedReply, match="'no idea'"):
        asking.extract("melt it")
    assert speaker.asked[1].images == ()


def test_one_after_another_until_one_finds_something(caplog):
    first = FirstOf([AskingExtractor(ScriptedSpeaker({"objects": ["?", "[]"]})), RuleExtractor()])
    assert first.extract("melt the ice") == ["ice"] and "expected a JSON array" in caplog.text
    assert first.extract("melt the ice") == ["ice"] and FirstOf([]).extract("x") == []


@dataclass
class Token:
    text: str
    pos_: str
    idx: int


@dataclass
class Entity:
    text: str
    start_char: int


@pytest.fixture
def spacy(monkeypatch):
    """A stand-in for the library, which is optional: a pipeline that answers as spaCy's do."""
    tokens = [Token("the", "DET", 5), Token("ice", "NOUN", 9), Token("cube", "NOUN", 13)]
    document = ModuleType("document")
    document.noun_chunks = [[Token("What", "PRON", 0)], tokens, [Token("sun", "NOUN", 30)]]
    document.ents = [Entity("Monday", 20), Entity("ice", 9)]
    module = ModuleType("spacy")
    module.load = lambda path: lambda text: document
    monkeypatch.setitem(sys.modules, "spacy", module)
    return module


def test_spacy_gives_chunks_and_entities(spacy, tmp_path):
    assert load_spacy(tmp_path).extract("...") == ["ice cube", "Monday", "sun"]
    with pytest.raises(CheckpointError, match="expected a model folder at .*away, found none"):
        load_spacy(tmp_path / "away")

    def fail(path):
        raise OSError("no meta.json")

    spacy.load = fail
    with pytest.raises(CheckpointError, match="does not load .no meta.json"):
        load_spacy(tmp_path)


def test_without_spacy_a_sentence_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(BackendUnavailable, match="found it not installed. Install it .*or take the extractor rules"):
        make_extractor(f"spacy:{tmp_path}", root=HERE)


def test_words_for_extractors():
    speaker = ScriptedSpeaker({"objects": ['["ice"]', '["ice"]']})
    assert make_extractor("auto", root=HERE).extract("melt the cube") == ["cube"]
    assert make_extractor("auto", root=HERE, speaker=speaker).extract("melt the cube") == ["ice"]
    assert make_extractor("mllm", root=HERE, speaker=speaker).extract("melt the cube") == ["ice"]
    assert make_extractor("rules", root=HERE, speaker=speaker).extract("melt the cube") == ["cube"]
    assert make_extractor("whole", root=HERE) is None
    with pytest.raises(ConfigError, match="extractor mllm: expected a reasoner"):
        make_extractor("mllm", root=HERE)
    for name in ("spacy", "gpt", "rules:x"):
        with pytest.raises(ConfigError, match="extractor: expected one of auto, mllm"):
            make_extractor(name, root=HERE)


def test_a_users_names_stand():
    assert GivenObjects([" ice ", "sun", "ice", ""]).extract("whatever") == ["ice", "sun"]
    with pytest.raises(ConfigError, match="objects: expected at least one name"):
        GivenObjects([" "])
