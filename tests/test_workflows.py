"""The workflows that come with the pack: sound, alike in both forms, and as the frontend wants them.

The files in the frontend's form are the source: they are made and changed in ComfyUI. `REASONEDIT_WRITE_GOLDEN=1` writes their
twins in API format anew. In a real ComfyUI they run in test_nodes_workflows.py.
"""

from __future__ import annotations

import copy
import json
import os
import re
import uuid

import pytest
from PIL import Image

from reasonedit.tests.graph_runner import install_host
from reasonedit.tests.workflow_files import CORE, FOLDER, MINI, NAMES, NOTES, facts_of_schema, faults, files_of, load, to_prompt

install_host()

from reasonedit.nodes import auto_loop, edit, host, loop, mini_scene, models, reasonbrain, reflect, think, trace  # noqa: E402

OURS = (
    models.LoadEditor,
    models.LoadReasoner,
    think.Think,
    edit.Edit,
    reflect.Reflect,
    loop.LoopOpen,
    loop.LoopClose,
    auto_loop.AutoLoop,
    trace.ShowTrace,
    trace.SaveTrace,
    mini_scene.MiniScene,
    reasonbrain.Load,
    reasonbrain.Objects,
    reasonbrain.Regions,
    reasonbrain.Reason,
    reasonbrain.Apply,
    reasonbrain.Edit,
)
each_workflow = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def known(monkeypatch):
    """Facts about every class that our workflows may use, with empty model folders."""
    monkeypatch.setattr(host, "places", lambda key: [])
    monkeypatch.setattr(host, "files", lambda key: [])
    schemas = [kind.GET_SCHEMA() for kind in OURS]
    return CORE | {schema.node_id: facts_of_schema(schema) for schema in schemas}


def workflow(name: str) -> dict:
    return load(FOLDER / f"{name}.json")


def twin(name: str) -> dict:
    return load(FOLDER / "api" / f"{name}.json")


def test_every_file_is_checked():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(NAMES)
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == set(NAMES)


@each_workflow
def test_both_forms_say_the_same(name, known):
    prompt = to_prompt(workflow(name), known)
    if os.environ.get("REASONEDIT_WRITE_GOLDEN"):
        (FOLDER / "api" / f"{name}.json").write_text(json.dumps(prompt, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert twin(name) == prompt, "write the twins anew with REASONEDIT_WRITE_GOLDEN=1"


@each_workflow
def test_a_prompt_names_only_what_exists_and_is_complete(name, known):
    prompt = twin(name)
    assert all(entry["class_type"] for entry in prompt.values())
    assert faults(prompt, known) == []


@each_workflow
def test_links_of_the_frontend_agree_at_both_ends(name, known):
    graph = workflow(name)
    nodes = {node["id"]: node for node in graph["nodes"]}
    inputs = {slot["link"]: (n, slot) for n, node in nodes.items() for slot in node["inputs"] if slot.get("link") is not None}
    outputs = {(n, i, link) for n, node in nodes.items() for i, slot in enumerate(node["outputs"]) for link in slot["links"]}
    assert len({link[0] for link in graph["links"]}) == len(graph["links"]) == len(inputs) == len(outputs)
    for number, start, output, end, place, kind in graph["links"]:
        assert (start, output, number) in outputs and inputs[number][0] == end, number
        assert nodes[end]["inputs"][place] == inputs[number][1], number
        assert nodes[start]["outputs"][output]["type"] == kind == known[nodes[start]["type"]].outputs[output], number
    for node in graph["nodes"]:
        for slot in node["inputs"] if node["type"] in known else ():
            facts = known[node["type"]][slot["name"]]
            assert slot["name"] == "upload" or (facts.type == slot["type"] and facts.widget == ("widget" in slot)), slot


@each_workflow
def test_the_frontend_finds_every_field_it_needs(name):
    graph = workflow(name)
    assert str(uuid.UUID(graph["id"])) == graph["id"] and graph["version"] == 0.4
    numbers = [node["id"] for node in graph["nodes"]]
    assert len(set(numbers)) == len(numbers) and max(numbers) <= graph["last_node_id"]
    assert max(link[0] for link in graph["links"]) <= graph["last_link_id"]
    for node in graph["nodes"]:
        assert {"id", "type", "pos", "size", "flags", "order", "mode", "properties", "widgets_values"} <= set(node), node["id"]
        assert len(node["pos"]) == len(node["size"]) == 2 and node["mode"] == 0, node["id"]
        if node["type"] not in NOTES:
            assert node["properties"]["Node name for S&R"] == node["type"]
    assert sorted(node["order"] for node in graph["nodes"]) == list(range(len(numbers)))


@each_workflow
def test_nodes_do_not_lie_on_each_other(name):
    boxes = []
    for node in nodes_of(name):
        (x, y), (width, height) = node["pos"], node["size"]
        boxes.append((x, y - 30, x + width, y + height))  # the title stands above
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def nodes_of(name: str) -> list[dict]:
    return workflow(name)["nodes"]


@each_workflow
def test_a_note_says_what_it_does_and_names_every_file(name):
    (note,) = [node["widgets_values"][0] for node in nodes_of(name) if node["type"] in NOTES]
    assert len(re.findall(r"[.!](?:\s|\*|$)", note)) >= 2
    for file in files_of(twin(name)):
        folder, _, rest = file.partition("/")
        assert f"models/{folder}" in note and rest in note, file


@pytest.mark.parametrize("name", MINI)
def test_what_needs_no_files_names_none(name):
    prompt = twin(name)
    assert files_of(prompt) == [] and not any(entry["class_type"] == "LoadImage" for entry in prompt.values())
    (scene,) = [node for node, entry in prompt.items() if entry["class_type"] == "ReasonEdit_MiniScene"]
    asked = [entry["inputs"]["instruction"] for entry in prompt.values() if "instruction" in entry["inputs"]]
    assert [scene, 1] in asked and [scene, 2] not in asked, "the loop is not told what it is to find out"


@each_workflow
def test_a_thumbnail_stands_beside_it(name):
    """The template browser looks for NAME.jpg and shows it in a square."""
    path = FOLDER / f"{name}.jpg"
    with Image.open(path) as picture:
        assert picture.format == "JPEG" and picture.width == picture.height >= 400
    assert path.stat().st_size < 150_000


# ---- the checks themselves -----------------------------------------------------------------------------------------------


def spoil(prompt: dict, node: str, **inputs) -> dict:
    spoiled = copy.deepcopy(prompt)
    spoiled[node]["inputs"].update(inputs)
    return spoiled


def test_faults_are_found(known):
    prompt = twin("loop_reasonedit_s")
    at = {entry["class_type"]: node for node, entry in prompt.items()}
    close, opened = at["ReasonEdit_LoopClose"], at["ReasonEdit_LoopOpen"]
    assert "no such input" in faults(spoil(prompt, close, rounds=3), known)[0]
    assert "is not within 1 and 8" in faults(spoil(prompt, close, max_rounds=9), known)[0]
    assert "is no INT" in faults(spoil(prompt, close, max_rounds=True), known)[0]
    assert "is not in" in faults(spoil(prompt, close, policy="best"), known)[0]
    assert "a socket with a value" in faults(spoil(prompt, close, image="x"), known)[0]
    assert "has no output 7" in faults(spoil(prompt, close, history=[opened, 7]), known)[0]
    assert "takes REASONEDIT_HISTORY, is given IMAGE" in faults(spoil(prompt, close, history=[opened, 1]), known)[0]
    assert "no node '99'" in faults(spoil(prompt, close, history=["99", 0]), known)[0]
    gone = copy.deepcopy(prompt)
    del gone[close]["inputs"]["flow"]
    assert "required and not given" in faults(gone, known)[0]
    gone[close]["class_type"] = "ReasonEdit_Close"
    assert "no class" in faults(gone, known)[0]


def test_values_too_many_are_found_and_new_widgets_get_their_defaults(known):
    graph = workflow("auto_loop")
    (node,) = [node for node in graph["nodes"] if node["type"] == "ReasonEdit_AutoLoop"]
    last = node["widgets_values"].pop()
    assert to_prompt(graph, known)[str(node["id"])]["inputs"]["max_seconds"] == last == 0
    node["widgets_values"] += [last, "lazy", 0.0, 1.0, 0, "one more"]
    with pytest.raises(ValueError, match="values for"):
        to_prompt(graph, known)
    node["widgets_values"].remove("fixed")
    with pytest.raises(ValueError, match="behind the value of seed"):
        to_prompt(graph, known)
