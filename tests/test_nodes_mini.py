"""The miniatures in ComfyUI: the node that draws scenes, the loaders' entries, and what is told of other pictures."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from reasonedit.nodes import memory
from reasonedit.reasonedit_core.errors import CheckpointError
from reasonedit.reasonedit_core.mini import models as minis
from reasonedit.reasonedit_core.mini.items import ITEM_KINDS
from reasonedit.reasonedit_core.mini.judge import read
from reasonedit.reasonedit_core.mini.scenes import draw, held_out, pixels
from reasonedit.reasonedit_core.mini.splits import split_of_scene
from reasonedit.reasonedit_core.types import Edited
from reasonedit.tests.graph_runner import install_host
from reasonedit.tests.minis import NOTICE, STATED, write_minis

install_host()

from reasonedit.nodes import auto_loop, edit, folders, host, mini_scene, models, sockets  # noqa: E402
from reasonedit.tests.test_nodes_edit import Still  # noqa: E402

HOW = {"dialogue": "auto", "dtype": "float32", "weights_dtype": "auto", "variant": "auto"}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """Stand-ins for the miniatures, and a host whose own folders are empty."""
    found = write_minis(tmp_path / "minis")
    monkeypatch.setenv(minis.PLACE, str(found))
    monkeypatch.setattr(host, "places", lambda key: [])
    monkeypatch.setattr(host, "files", lambda key: [])
    monkeypatch.setattr(host, "models_dir", lambda: tmp_path / "models")
    monkeypatch.setattr(host, "compute_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(memory, "ComfyMover", HostMover)
    return found


class HostMover(Still):
    """A mover that is told what to call when a component leaves."""

    def on_unload(self, component, release):
        """Nothing leaves."""


# ---- the node that draws -------------------------------------------------------------------------------------------------


def test_every_kind_of_item_can_be_asked_for():
    assert sorted(mini_scene.KINDS) == sorted(ITEM_KINDS) and len(set(mini_scene.KINDS)) == len(mini_scene.KINDS)


@pytest.mark.parametrize("kind", mini_scene.KINDS)
def test_a_scene_is_held_out_and_says_what_is_meant(kind):
    image, instruction, concrete, wanted = mini_scene.MiniScene.execute(2**64 - 1, kind, "english").result
    source, target = (read((picture[0].numpy() * 255).round().astype("uint8")).scene for picture in (image, wanted))
    assert image.shape == wanted.shape == (1, 96, 96, 3) and source != target
    assert split_of_scene(source) == split_of_scene(target) == "held_out"
    item = held_out(2**64 - 1, kind, "en")
    assert (source, target) == (item.source, item.target) and (instruction, concrete) == (item.instruction, item.concrete)
    again = mini_scene.MiniScene.execute(2**64 - 1, kind, "english").result
    assert torch.equal(image, again[0]) and instruction == again[1]


def test_seeds_and_languages_make_a_difference():
    drawn = [mini_scene.MiniScene.execute(seed, "abstract", "chinese").result for seed in range(6)]
    assert len({made[1] for made in drawn}) > 3 and all(any("\u4e00" <= c <= "\u9fff" for c in made[1]) for made in drawn)


# ---- the loaders ---------------------------------------------------------------------------------------------------------


def test_the_loaders_list_the_miniatures_also_where_all_folders_are_empty(place):
    assert folders.editor_names() == ["mini-s", "mini-q"]
    assert folders.reasoner_names() == ["mini-s", "mini-q", folders.REMOTE, folders.SCRIPTED]
    for node, name in ((models.LoadEditor, "checkpoint"), (models.LoadReasoner, "source")):
        (slot,) = [slot for slot in node.GET_SCHEMA().inputs if slot.id == name]
        assert {"mini-s", "mini-q"} <= set(slot.display_name if isinstance(slot.display_name, list) else slot.options)
    assert folders.locate("mini-q") == place / "mini-q"
    assert "reasonedit.json" in models.LoadEditor.fingerprint_inputs("mini-s", *[folders.FROM_CHECKPOINT] * 2, "auto")


def test_a_miniature_that_is_missing_is_told_of(place, monkeypatch):
    monkeypatch.setattr(minis, "mini_places", lambda name: [])
    with pytest.raises(CheckpointError, match="mini-s: expected the miniature weights"):
        models.load_editor("mini-s", *[folders.FROM_CHECKPOINT] * 2, **HOW)


@pytest.mark.parametrize("name", ["mini-s", "mini-q"])
def test_an_editor_and_its_reasoner_load_by_name_alone(place, name):
    editor, reasoner = models.load_editor(name, *[folders.FROM_CHECKPOINT] * 2, **HOW)
    assert (editor.name, editor.system, editor.pictures, editor.latents) == (name, minis.MINIS[name], "miniature", "own")
    assert editor.notes == reasoner.notes == (NOTICE,) and reasoner.mllm is editor.mllm
    assert editor.request(torch.zeros(1, 3, 96, 96), "x", seed=0).steps == STATED["steps"]
    alone = models.load_reasoner(name, url="", model="", replies="", dialogue="auto", dtype="float32")
    assert alone.name == name and alone.notes == (NOTICE,)
    for asked in (alone.pack, reasoner.pack):
        assert {task.max_new_tokens for task in asked.tasks.values()} == {STATED["reply_tokens"]}
        assert not any(task.endswith("_score") or "edit_score" in task for task in asked.tasks)


# ---- what is told --------------------------------------------------------------------------------------------------------


def values(seed=0) -> dict:
    return {"seed": seed, "steps": 0, "guidance": 0.0, "size": 0, "negative": "", "policy": "reasonedit"}


LOOP = {"pick": "best", "on_failed": "rethink", "revise": "chain", "accept": 9.0, "doubt": 3.0, "max_seconds": 0.0}


def test_other_pictures_are_told_of_where_they_enter_and_scenes_are_not(place, monkeypatch, caplog):
    editor, _ = models.load_editor("mini-s", *[folders.FROM_CHECKPOINT] * 2, **HOW)
    shown = []
    monkeypatch.setattr(host.Watch, "show", lambda self, text: shown.append(text))
    monkeypatch.setattr(edit, "Preview", lambda *args: type("Silent", (), {"begin": print, "__call__": print})())
    photograph = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(1))
    scene = sockets.to_image([draw(held_out(1, "abstract").source)])

    def told(run) -> tuple[int, int]:
        """(warnings in the log, texts on the node) about a picture."""
        shown.clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run()
        said = [record.getMessage() for record in caplog.records]
        return tuple(sum("none of the drawn miniature scenes" in text for text in texts) for texts in (said, shown))

    monkeypatch.setattr(edit, "edit_all", lambda editor, image, *args, **more: sockets.Made(image, ()))
    assert told(lambda: edit.Edit.execute(editor, photograph, "x", **values())) == (1, 1)
    assert told(lambda: edit.Edit.execute(editor, scene, "x", **values())) == (0, 0)
    earlier = sockets.Made(photograph, ())
    assert told(lambda: edit.Edit.execute(editor, photograph, "x", **values(), previous=earlier)) == (0, 0), "a later round"
    monkeypatch.setattr(auto_loop, "Preview", lambda *args: None)
    monkeypatch.setattr(auto_loop, "_Edits", lambda *args: Unchanged())
    loop = {**values(), "think": False, "reflect": False, "max_rounds": 1, **LOOP}
    assert told(lambda: auto_loop.AutoLoop.execute(editor, photograph, "x", **loop)) == (1, 1)
    assert told(lambda: auto_loop.AutoLoop.execute(editor, scene, "x", **loop)) == (0, 0)


class Unchanged:
    """A generator that gives the source back."""

    def edit(self, request, *args, **how) -> Edited:
        """As it was."""
        return Edited(request.image, request.image, None)


def test_weights_for_any_picture_are_not_asked():
    handle = sockets.EditorHandle("x", "reasonedit-s", None, {}, None, None, torch.device("cpu"))
    assert handle.remark("not even an image") == ""
    assert pixels(draw(held_out(1, "abstract").source)).shape == (96, 96, 3)
