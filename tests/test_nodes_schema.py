"""The nodes as a real ComfyUI lists them: every schema, every tooltip, and a snapshot that may only grow.

`REASONEDIT_WRITE_GOLDEN=1` writes the snapshot anew, after a node or an input was added on purpose.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request

import pytest

from reasonedit.tests.comfy_server import ROOT, ComfyServer, comfyui_path

SNAPSHOT = ROOT / "tests" / "golden" / "nodes.json"
LANGUAGES = ("en", "zh")
OURS = ("ReasonEdit", "ReasonBrain")
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}

SCHEMAS = """
import asyncio, importlib.util, sys
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, {comfy!r})
import comfy.options
comfy.options.enable_args_parsing()
spec = importlib.util.spec_from_file_location("pack", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
heavy = [name for name in ("transformers", "diffusers", "peft", "accelerate") if name in sys.modules]
for node in nodes:
    node.GET_SCHEMA()
print("IDS", *(node.GET_SCHEMA().node_id for node in nodes))
print("HEAVY", *heavy)
"""


def snapshot() -> dict:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    comfyui_path()
    with ComfyServer(tmp_path_factory.mktemp("comfy")) as server:
        yield server


@pytest.fixture(scope="module")
def listed(server) -> dict:
    return {name: info for name, info in server.get("/object_info").items() if name.startswith(OURS)}


def inputs_of(info: dict) -> list[tuple[str, str, dict]]:
    """(name, type, options) in the order of the widgets."""
    found = []
    for kind in ("required", "optional"):
        for name in info["input_order"].get(kind, []):
            entry = info["input"][kind][name]
            found.append((name, entry[0] if isinstance(entry[0], str) else "COMBO", entry[1] if len(entry) > 1 else {}))
    return found


def facts(listed: dict) -> dict:
    """What must not change: ids, order and types of inputs and outputs."""
    return {
        name: {
            "inputs": [[key, kind] for key, kind, _ in inputs_of(info)],
            "outputs": info["output"],
        }
        for name, info in sorted(listed.items())
    }


def test_every_schema_is_made_without_the_heavy_libraries():
    """One bad schema makes ComfyUI drop the whole pack with a line of warning."""
    comfy = str(comfyui_path())
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    script = SCHEMAS.format(comfy=comfy, root=str(ROOT))
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python, "-c", script], cwd=comfy, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line.startswith(("IDS", "HEAVY"))}
    assert set(lines["IDS"]) >= set(snapshot())
    assert "diffusers" not in lines["HEAVY"] and "peft" not in lines["HEAVY"]


def test_all_nodes_are_listed_with_words_for_everything(listed):
    assert set(listed) >= set(snapshot())
    for name, info in listed.items():
        assert info["category"].split("/")[0] == "ReasonEdit", name
        assert info["description"] and info["display_name"] != name, name
        for key, _, options in inputs_of(info):
            assert options.get("tooltip"), f"{name}.{key} has no tooltip"
        assert len(info["output_tooltips"]) == len(info["output"]) and all(info["output_tooltips"]), name


def test_seeds_have_the_full_range_and_their_control(listed):
    seeds = {name: o for name, info in listed.items() for key, _, o in inputs_of(info) if key == "seed"}
    assert len(seeds) >= 4
    for name, options in seeds.items():
        assert options["max"] == 2**64 - 1 and options["control_after_generate"] is True, name


def test_the_pack_loads(server):
    """`/object_info` answered, so the log is complete."""
    assert len(re.findall(r"^ +[\d.]+ seconds: .*custom_nodes.reasonedit\s*$", server.text(), re.MULTILINE)) == 1
    assert "IMPORT FAILED" not in "".join(re.findall(r".*custom_nodes.reasonedit\s*$", server.text(), re.MULTILINE))


def test_saved_workflows_keep_their_meaning(listed):
    """Widget values are stored by position: ids and orders of the snapshot stay as they are, and may only grow at the end."""
    now = facts(listed)
    if os.environ.get("REASONEDIT_WRITE_GOLDEN"):
        SNAPSHOT.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    for name, then in snapshot().items():
        assert name in now, f"{name} is gone: ids are permanent"
        kept = [entry for entry in now[name]["inputs"] if entry in then["inputs"]]
        assert kept == then["inputs"], f"{name}: inputs were removed, renamed or reordered"
        before, after = ([entry for entry in entries["inputs"] if entry[1] in WIDGETS] for entries in (then, now[name]))
        assert after[: len(before)] == before, f"{name}: new widgets come after all others"
        assert now[name]["outputs"][: len(then["outputs"])] == then["outputs"], f"{name}: outputs changed"
    assert now == snapshot(), "new nodes or inputs: write the snapshot anew with REASONEDIT_WRITE_GOLDEN=1"


def test_help_and_translations_are_served(server, listed):
    translations = server.get("/i18n")
    for language in LANGUAGES:
        assert set(translations[language]["nodeDefs"]) >= set(listed), language
    for name in listed:
        if "internal" not in listed[name]["category"]:
            address = f"http://127.0.0.1:{server.port}/extensions/reasonedit/docs/{name}.md"
            with urllib.request.urlopen(address, timeout=30) as reply:
                assert reply.read().startswith(b"# "), name


# ---- always: what can be checked without ComfyUI --------------------------------------------------------------------------


def test_every_node_of_the_snapshot_has_a_help_page():
    for name in snapshot():
        if name != "ReasonEdit_Advance":
            page = ROOT / "nodes" / "web" / "docs" / f"{name}.md"
            assert page.is_file() and page.read_text(encoding="utf-8").startswith("# "), name
    pages = {page.stem for page in (ROOT / "nodes" / "web" / "docs").glob("*.md")}
    assert pages <= set(snapshot()), "a page of a node that does not exist"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_input_and_output_is_translated(language):
    words = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    for name, then in snapshot().items():
        entry = words[name]
        assert entry["display_name"] and entry["description"], name
        assert set(entry["inputs"]) == {key for key, _ in then["inputs"]}, name
        assert all(value["tooltip"] for value in entry["inputs"].values()), name
        assert set(entry["outputs"]) == {str(n) for n in range(len(then["outputs"]))}, name
    assert set(words) == set(snapshot())


def test_help_pages_name_only_inputs_that_exist():
    """In a help page an input or output stands in backticks at the start of a table row, with its type behind it."""
    for name, then in snapshot().items():
        page = ROOT / "nodes" / "web" / "docs" / f"{name}.md"
        if page.is_file():
            rows = re.findall(r"^\| `([^`]+)` \| (\w+)", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert [list(row) for row in rows[: len(then["inputs"])]] == then["inputs"], name
            assert [kind for _, kind in rows[len(then["inputs"]) :]] == then["outputs"], name
