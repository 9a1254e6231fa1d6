"""What saves work and is off by default: guidance between two timesteps, cached steps, both passes of guidance as one."""

from __future__ import annotations

import inspect
from dataclasses import fields

import pytest
import torch

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.load import SystemSpec, load_system
from reasonedit.reasonedit_core.regions import GuidanceInterval, StepCache
from reasonedit.reasonedit_core.types import EditRequest
from reasonedit.tests.graph_runner import install_host
from reasonedit.tests.tiny import tiny_checkpoint

install_host()

from reasonedit.nodes import auto_loop, edit, host, models, sockets  # noqa: E402
from reasonedit.tests.test_nodes_edit import Still, handle, picture  # noqa: E402

STEPS = {"steps": 8, "guidance": 3.0, "size": 64}
SHORTCUTS = ["guidance_low", "guidance_high", "step_cache"]


@pytest.fixture(scope="module")
def editor():
    return handle("reasonedit-s")


def test_a_fresh_node_asks_for_nothing_of_it():
    names = {field.name for field in fields(EditRequest)}
    off = sockets.to_shortcuts()
    assert off == {"guidance_interval": None, "step_cache": None} and off.keys() <= names
    assert sockets.to_shortcuts(0.2, 0.8, 3) == {
        "guidance_interval": GuidanceInterval(0.2, 0.8),
        "step_cache": StepCache(every=3),
    }
    with pytest.raises(ConfigError, match="expected 0 <= low <= high <= 1"):
        sockets.to_shortcuts(0.8, 0.2)


@pytest.mark.parametrize("node", [edit.Edit, auto_loop.AutoLoop])
def test_they_come_last_and_old_graphs_do_without(node):
    inputs = node.define_schema().inputs[-len(SHORTCUTS) :]
    assert [one.id for one in inputs] == SHORTCUTS and all(one.optional for one in inputs)
    given = inspect.signature(node.execute).parameters
    shown = {one.id: one.declared["default"] for one in inputs}
    assert {name: given[name].default for name in SHORTCUTS} == shown == dict(zip(SHORTCUTS, (0.0, 1.0, 0), strict=True))


@pytest.mark.parametrize(("low", "high", "every"), [(0.3, 0.8, 0), (0.0, 1.0, 2)], ids=["interval", "cache"])
def test_edit_makes_the_cores_picture_with_fewer_forwards(editor, low, high, every):
    image, counts = picture(3), editor.generator.counts
    asked = sockets.to_shortcuts(low, high, every)
    before = counts.denoiser_forwards
    node = type("Clone", (edit.Edit,), {"hidden": None})
    how = {"seed": 5, "negative": "", "policy": "reasonedit", **STEPS}
    (found, _) = node.execute(
        editor, image, "make it red", guidance_low=low, guidance_high=high, step_cache=every, **how
    ).result
    made = counts.denoiser_forwards - before
    assert made < 2 * STEPS["steps"]
    (source,) = sockets.to_pictures(image)
    request = EditRequest(source, "make it red", seed=5, steps=8, guidance=3.0, size_level=64, **asked)
    wanted = editor.generator.edit(request, source, "make it red", torch.Generator().manual_seed(5))
    assert torch.equal(found, sockets.to_image([wanted.image]))
    assert not torch.equal(found, edit.edit_all(editor, image, "make it red", seed=5, **STEPS).image)


def test_a_region_and_a_step_cache_are_refused_together(editor):
    with pytest.raises(ConfigError, match="expected a region or a step cache, found both"):
        edit.edit_all(editor, picture(3), "x", seed=5, region="auto", **STEPS, **sockets.to_shortcuts(every=2))


def test_the_auto_loop_hands_them_to_every_edit(editor, monkeypatch):
    requests = []

    def note(request, **_run):
        requests.append(request)
        raise ConfigError("seen enough")

    monkeypatch.setattr(auto_loop, "think_edit_reflect", note)
    node = type("Clone", (auto_loop.AutoLoop,), {"hidden": None})
    loop = {"max_rounds": 1, "policy": "reasonedit", "pick": "best", "on_failed": "stop", "revise": "chain"}
    loop |= {"accept": 9.0, "doubt": 3.0, "max_seconds": 0.0, "think": False, "reflect": False, "negative": ""}
    for more in ({}, {"guidance_low": 0.2, "guidance_high": 0.8, "step_cache": 3}):
        with pytest.raises(ConfigError, match="seen enough"):
            node.execute(editor, picture(3), "make it red", 5, **STEPS, **loop, **more)
    assert [(r.guidance_interval, r.step_cache) for r in requests] == [
        (None, None),
        (GuidanceInterval(0.2, 0.8), StepCache(every=3)),
    ]


# ---- both passes as one --------------------------------------------------------------------------------------------------


def test_load_editor_has_batched_cfg_last(monkeypatch):
    monkeypatch.setattr(host, "places", lambda key: [])
    monkeypatch.setattr(host, "files", lambda key: [])
    last = models.LoadEditor.define_schema().inputs[-1]
    assert last.id == "batched_cfg" and last.optional and last.declared["default"] is False
    assert inspect.signature(models.LoadEditor.execute).parameters["batched_cfg"].default is False


def test_two_passes_as_one_ask_for_the_memory_of_both():
    needs = {}
    for batched in (False, True):
        folder = tiny_checkpoint("step1x-v1p2", std=0.2)
        system = load_system(SystemSpec("reasonedit-s", folder, "none", batched_cfg=batched))
        made = (system.generator, system.defaults, system.mllm, Still(), torch.device("cpu"))
        editor = sockets.EditorHandle("s", "reasonedit-s", *made)
        for guidance in (1.0, 3.0):
            request = editor.request(torch.zeros(1, 3, 64, 64), "x", seed=0, size=64, guidance=guidance)
            editor.expect(request, request.image)
            needs[batched, guidance] = editor.mover.needs["dit"]
    assert needs[False, 1.0] == needs[False, 3.0] == needs[True, 1.0] and needs[True, 3.0] == 2 * needs[True, 1.0]
