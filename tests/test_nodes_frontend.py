"""The workflows in ComfyUI's own frontend: opened, run, and shown in the template browser.

Needs COMFYUI_PATH and what frontend.py needs. `REASONEDIT_WRITE_GOLDEN=1` makes the thumbnails anew; those of the miniatures
show a finished run.
"""

from __future__ import annotations

import io
import os
import uuid

import pytest
from PIL import Image

from reasonedit.tests.comfy_server import ComfyServer, comfyui_path, fill
from reasonedit.tests.frontend import chromium, frontend
from reasonedit.tests.pictures import draw_picture
from reasonedit.tests.workflow_files import FOLDER, FULL_SIZE, MINI, NAMES, NOTES, facts_of_info, load

THUMBNAIL = 512
VIEWS = {
    "mini_loop": (690, -170, 1040),
    "mini_think": (-10, -240, 1130),
    "mini_auto": (700, -180, 1010),
    "loop_reasonedit_s": (690, -170, 1040),
    "loop_reasonedit_q": (690, -170, 1040),
    "think_only": (-10, -240, 1130),
    "reflect_only": (350, -220, 1090),
    "auto_loop": (-10, -240, 1110),
    "reasonbrain_edit": (670, -170, 1240),
    "reasonbrain_loop": (690, -170, 1040),
    "reasonbrain_native": (670, -170, 1040),
}
"""(left, top, side) of the part of a graph that its thumbnail shows."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    comfyui_path()
    base = tmp_path_factory.mktemp("comfy")
    fill(base)
    draw_picture(768, 512).save(base / "input" / "example.png")
    with ComfyServer(base, "--preview-method", "auto") as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    comfyui_path()
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def page(server, browser):
    with frontend(browser, server) as opened:
        yield opened


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_opens_as_it_was_saved_and_runs(name, server, page):
    graph, info = load(FOLDER / f"{name}.json"), server.get("/object_info")
    assert page.open(graph) == []
    nodes = {node["id"]: node for node in page.nodes()}
    assert set(nodes) == {node["id"] for node in graph["nodes"]} and not any(node["broken"] for node in nodes.values())
    for saved in graph["nodes"]:
        if saved["type"] not in NOTES:
            assert values_of(nodes[saved["id"]]["values"], facts_of_info(info[saved["type"]])) == saved["widgets_values"]
    twin, sent = load(FOLDER / "api" / f"{name}.json"), page.prompt()
    assert {node: kept(entry) for node, entry in sent.items()} == {node: kept(entry) for node, entry in twin.items()}
    if name not in MINI:
        keep_thumbnail(page, name)  # what tiny random weights paint is nothing to show
    if name in FULL_SIZE:
        return
    ended, said = page.run()
    assert ended == "execution_success", said
    page.wait_for_pictures(("PreviewImage", "ReasonEdit_ShowTrace", "ReasonEdit_SaveTrace"))
    if name in MINI:
        keep_thumbnail(page, name)


def keep_thumbnail(page, name: str) -> None:
    """Write the picture of the template browser anew, where that is asked for."""
    if os.environ.get("REASONEDIT_WRITE_GOLDEN"):
        left, top, side = VIEWS[name]
        picture = Image.open(io.BytesIO(page.picture(left, top, side, side))).convert("RGB")
        picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS).save(FOLDER / f"{name}.jpg", quality=88)


def values_of(values: dict, facts) -> list:
    """A node's values in the order in which they are saved, with those of the seeds' control and of the upload button."""
    controls = [value for name, value in values.items() if name in ("control_after_generate", "upload")]
    found = []
    for slot in facts.inputs:
        if slot.widget:
            found += [values[slot.name], *(controls[:1] if slot.extra else ())]
    return found


def kept(entry: dict) -> tuple:
    """What of a prompt's entry counts: Preview Any has widgets that are none of the node's inputs."""
    return entry["class_type"], {k: v for k, v in entry["inputs"].items() if not k.startswith("preview")}


def test_the_template_browser_lists_and_shows_them(server, page):
    (folder, listed), *rest = server.get("/workflow_templates").items()
    assert set(listed) == set(NAMES) and not rest
    for name in NAMES:
        size = page.page.evaluate(
            """source => new Promise(done => { const picture = new Image(); picture.onload = () => done(picture.width);
            picture.onerror = () => done(0); picture.src = source })""",
            f"/api/workflow_templates/{folder}/{name}.jpg",
        )
        assert size == THUMBNAIL
        assert server.get(f"/api/workflow_templates/{folder}/{name}.json") == load(FOLDER / f"{name}.json")


def test_missing_files_are_told_of_by_comfyui_itself(tmp_path, browser):
    """Nothing breaks when a workflow is opened without its files; pressing Run says what is missing."""
    with ComfyServer(tmp_path) as bare, frontend(browser, bare) as page:
        graph = load(FOLDER / "loop_reasonedit_q.json") | {"id": str(uuid.uuid4())}
        assert page.open(graph) == []
        (loader,) = [node for node in page.nodes() if node["type"] == "ReasonEdit_LoadEditor"]
        assert loader["values"]["checkpoint"] == "diffusion_models/qwen_image_edit_2509_fp8_e4m3fn.safetensors"
        ended, said = page.run()
        assert ended == "" and "Value not in list: checkpoint" in said[0] and "not in ['mini-s', 'mini-q']" in said[0]
        assert "text_encoder: 'text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors' not in ['from checkpoint']" in said[0]
