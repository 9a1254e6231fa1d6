"""The miniatures that the package carries: where they lie, what they may weigh, and that they load like any checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from reasonedit.reasonedit_core.dialogue.pack import fitted
from reasonedit.reasonedit_core.dialogue.packfile import format_pack
from reasonedit.reasonedit_core.dialogue.prompts import default_pack, load_pack
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.load import SystemSpec, load_reasoner, load_system
from reasonedit.reasonedit_core.mini import models
from reasonedit.reasonedit_core.mini.models import MINIS, PLACE, has_mini, mini_folder
from reasonedit.reasonedit_core.parts import find_parts
from reasonedit.reasonedit_core.reasoners.reasoner import PackReasoner
from reasonedit.reasonedit_core.settings import read_settings
from reasonedit.reasonedit_core.types import Scores
from reasonedit.tests.minis import NOTICE, STATED, write_minis

PACKAGED = Path(models.__file__).parent
each_mini = pytest.mark.parametrize("name", MINIS)


@pytest.fixture
def minis(tmp_path, monkeypatch) -> Path:
    place = write_minis(tmp_path / "minis")
    monkeypatch.setenv(PLACE, str(place))
    return place


@each_mini
def test_a_mini_is_found_in_the_place_of_ones_own_and_then_in_the_package(tmp_path, monkeypatch, name):
    monkeypatch.setenv(PLACE, str(tmp_path))
    assert models.mini_places(name) == [tmp_path / name, PACKAGED / name]
    monkeypatch.delenv(PLACE)
    assert models.mini_places(name) == [PACKAGED / name]
    write_minis(tmp_path)
    monkeypatch.setenv(PLACE, str(tmp_path))
    assert mini_folder(name) == tmp_path / name and has_mini(name)


def test_a_mini_that_is_not_there_is_told_of_with_what_helps(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "__file__", str(tmp_path / "models.py"))
    monkeypatch.delenv(PLACE, raising=False)
    assert not has_mini("mini-s")
    with pytest.raises(CheckpointError, match="mini-s: expected the miniature weights in .*`reasonedit-train mini"):
        mini_folder("mini-s")
    with pytest.raises(CheckpointError, match="expected a mini out of mini-s, mini-q, mini-brain, found 'mini-x'"):
        mini_folder("mini-x")


# ---- loading -------------------------------------------------------------------------------------------------------------


@each_mini
def test_a_mini_is_a_system_by_its_name_alone(minis, name):
    system = load_system(SystemSpec(name, dtype="float32", device="cpu"))
    assert system.name == MINIS[name] and system.notes == (NOTICE,), "its notice, and no warning about the wording"
    assert {key: system.defaults[key] for key in ("steps", "guidance", "size_level")} == {
        key: STATED[key] for key in ("steps", "guidance", "size_level")
    }
    assert system.pack_origin["origin"] == "own"
    tasks = [*system.reasoner.pack.tasks.values(), *system.reasoner.pack.in_language("zh").tasks.values()]
    assert {task.max_new_tokens for task in tasks} == {48} and all(task.form != "pair" for task in tasks)


def test_a_mini_of_ones_own_is_loaded_from_its_folder(minis, tmp_path):
    (minis / "mini-q" / "reasonedit.json").write_text(json.dumps({**STATED, "steps": 3}))
    system = load_system(SystemSpec("mini-q", minis / "mini-q", reasoner="none", dtype="float32", device="cpu"))
    assert system.defaults["steps"] == 3 and system.reasoner is None
    with pytest.raises(CheckpointError, match="expected weights of reasonedit-s, found reasonedit-q"):
        load_system(SystemSpec("mini-s", minis / "mini-q"))


def test_a_full_system_needs_its_weights_named():
    with pytest.raises(ConfigError, match="reasonedit-s: expected a folder of weights, found none"):
        load_system(SystemSpec("reasonedit-s"))
    names = "reasonedit-s, reasonedit-q, reasonbrain, mini-s, mini-q, mini-brain"
    with pytest.raises(ConfigError, match=f"expected a system out of {names}, found 'x'"):
        load_system(SystemSpec("x"))


def test_weights_of_our_wording_do_not_speak_what_lies_about(minis, tmp_path):
    """An imported pack in ComfyUI's folder is for released weights; one that the user names is taken all the same."""
    packs = tmp_path / "models" / "reasonedit" / "dialogue"
    packs.mkdir(parents=True)
    (packs / "other.toml").write_text(format_pack(replace(load_pack("en"), name="other")), encoding="utf-8")
    for spoken in (
        load_system(SystemSpec("mini-s", models_dir=tmp_path / "models", dtype="float32", device="cpu")),
        load_reasoner(SystemSpec("", reasoner=f"qwen:{minis / 'mini-s'}", models_dir=tmp_path / "models", device="cpu")),
    ):
        assert spoken.pack_origin["origin"] == "own" and spoken.notes == (NOTICE,)
        assert {task.max_new_tokens for task in spoken.reasoner.pack.tasks.values()} == {48}
    named = load_system(SystemSpec("mini-s", dialogue=packs / "other.toml", dtype="float32", device="cpu"))
    assert named.pack_origin["name"] == "other" and named.notes == (NOTICE,)


# ---- what an MLLM is asked for -------------------------------------------------------------------------------------------


class Listener:
    """A speaker that notes the tasks it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, queries, *, on_text=None, should_stop=None):
        self.asked += [query.task for query in queries]
        keys = {"meets_instruction": "yes", "major_conflicts": 0, "minor_conflicts": 0, "omissions": 0}
        replies = {
            "score": json.dumps({**keys, "raw_score": 9, "reason": "because"}),
            "edit_score": json.dumps({"score": [8, 7], "reasoning": "x"}),
            "quality_score": json.dumps({"score": [6, 5], "reasoning": "x"}),
            "reflect": "<#Think>Fine.<#Success>",
        }
        return [replies[query.task] for query in queries]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((), Scores(None, None, 9.0, "because")),
        (("edit",), Scores((8.0, 7.0), None, 9.0, "because")),
        (("quality",), Scores(None, (6.0, 5.0), 9.0, "because")),
        (("edit", "quality"), Scores((8.0, 7.0), (6.0, 5.0), 9.0, "because")),
    ],
)
def test_a_score_that_was_not_learnt_is_not_asked_for(scores, expected, paired):
    import torch

    listener, picture = Listener(), torch.zeros(1, 3, 28, 28)
    for goal in ("make it red", "把它变成红色"):
        reasoner = PackReasoner(fitted(default_pack(), scores=scores), listener, paired=paired)
        assert reasoner.reflect(picture, picture, goal, "a red thing").scores == expected
    assert listener.asked == 2 * ["score", *(f"{name}_score" for name in scores), "reflect"]


def test_a_fitted_pack_is_shorter_in_every_language_and_never_longer():
    own = default_pack()
    assert fitted(own) == own
    short = fitted(own, reply_tokens=300)
    for language in ("en", "zh"):
        for name, task in short.in_language(language).tasks.items():
            assert task.max_new_tokens == min(300, own.in_language(language).tasks[name].max_new_tokens)


# ---- the trained ones ----------------------------------------------------------------------------------------------------


@each_mini
def test_the_packaged_mini_is_whole_small_and_named_for_what_it_is(name):
    folder = PACKAGED / name
    if not folder.is_dir():
        pytest.skip(f"NOT TESTED: the package holds no trained {name} yet")
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert max(sizes.values()) < 30e6
    settings = read_settings(folder, "step1x-v1.2")
    assert settings.pictures == "miniature" and "drawn" in settings.notice and settings.dialogue == "own"
    assert find_parts(folder, MINIS[name]).layout.system == MINIS[name]
    assert (folder / "README.md").is_file()


def test_the_packaged_minis_are_small_together():
    sizes = [path.stat().st_size for name in MINIS for path in (PACKAGED / name).rglob("*") if path.is_file()]
    assert sum(sizes) < 64e6
