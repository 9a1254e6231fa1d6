"""The pack's own nodes in a real ComfyUI, on tiny checkpoints of both systems: the loop in a graph, the auto loop and the
script agree; the workflows that come with the pack run; a cancelled run ends at once; memory stays flat.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from reasonedit.tests.comfy_server import ROOT, ComfyServer, Events, comfyui_path, fill
from reasonedit.tests.pictures import draw_picture
from reasonedit.tests.workflow_files import CORE, FOLDER, FULL_SIZE, MINI, NAMES, facts_of_info, faults, load, to_prompt

TESTS = Path(__file__).resolve().parent


def consistency(score: float, meets: str) -> str:
    """A reply to `score`."""
    keys = {"meets_instruction": meets, "major_conflicts": 0, "minor_conflicts": 0, "omissions": 0}
    return json.dumps({**keys, "raw_score": score, "reason": "because"})


REPLIES = {
    "think": ["Cover the ground with snow."],
    "describe": ["A snowy field."],
    "score": [consistency(4, "partial"), consistency(9.5, "yes")],
    "reflect": ["<#Think>Too thin.<#Reflection>Add more snow.", "<#Think>Fine.<#Success>"],
    "edit_score": [json.dumps({"score": [5, 6], "reasoning": "x"}), json.dumps({"score": [8, 8], "reasoning": "x"})],
    "quality_score": [json.dumps({"score": [7, 6], "reasoning": "x"}), json.dumps({"score": [8, 9], "reasoning": "x"})],
}
VALUES = {"steps": 3, "guidance": 3.0, "size": 64, "negative": ""}
LOOP = {
    "max_rounds": 3,
    "policy": "reasonedit",
    "pick": "best",
    "on_failed": "rethink",
    "revise": "chain",
    "accept": 9.0,
    "doubt": 3.0,
    "max_seconds": 0.0,
}
SEED = 11

SCRIPT = """
import hashlib, json, sys, torch
from einops import rearrange
from reasonedit.reasonedit_core.load import SystemSpec, load_system
from reasonedit.reasonedit_core.loop import think_edit_reflect
from reasonedit.reasonedit_core.reasoners.scripted import ScriptedSpeaker
from reasonedit.reasonedit_core.reasoners.reasoner import PackReasoner
from reasonedit.reasonedit_core.dialogue.prompts import default_pack
from reasonedit.reasonedit_core.types import EditRequest
name, weights, replies, values, seed = json.loads(sys.argv[1])
system = load_system(SystemSpec(name, weights, reasoner="own", device="cpu", dtype="float32"))
speaker = ScriptedSpeaker(replies)
image = torch.full((1, 3, 48, 64), 0.5)
request = EditRequest(image, "make it winter", seed=seed, steps=values["steps"], guidance=values["guidance"],
    size_level=values["size"], max_rounds=3)
trace = think_edit_reflect(request, reasoner=PackReasoner(default_pack(), speaker, paired=False), generator=system.generator)
pictures = rearrange(torch.cat([r.image for r in trace.rounds]), "b c h w -> b h w c").contiguous()
print(hashlib.sha256(pictures.numpy().tobytes()).hexdigest(), len(trace.rounds), trace.stop_reason)
"""


@pytest.fixture(scope="module", params=["classic", "lru"])
def server(request, tmp_path_factory):
    """A server that finds the tiny checkpoints under the names of the workflows."""
    comfyui_path()
    base = tmp_path_factory.mktemp("comfy")
    fill(base)
    flags = ["--cache-lru", "50"] if request.param == "lru" else []
    with ComfyServer(base, "--preview-method", "auto", *flags, packs={"fake_body": TESTS / "fake_body.py"}) as running:
        yield running


def defaults_of(info: dict, kind: str) -> dict:
    """The values of a node's widgets as a fresh node has them."""
    values = {}
    for name, (io_type, *options) in {**info[kind]["input"]["required"], **info[kind]["input"].get("optional", {})}.items():
        given = options[0] if options else {}
        if "default" in given:
            values[name] = given["default"]
        elif isinstance(io_type, list) and io_type or given.get("options"):
            values[name] = (io_type if isinstance(io_type, list) else given["options"])[0]
    return values


def graph(info: dict, system: str) -> dict[str, dict]:
    """Loaders, the loop as an artist wires it, and the auto loop beside it."""

    def node(kind, **inputs):
        return {"class_type": f"ReasonEdit_{kind}", "inputs": {**defaults_of(info, f"ReasonEdit_{kind}"), **inputs}}

    scripted = {"source": "scripted replies", "replies": json.dumps(REPLIES), "dialogue": "english"}
    return {
        "10": {"class_type": "Test_Paint", "inputs": {"value": 0.5, "count": 1, "channels": 3, "height": 48, "width": 64}},
        "11": node("LoadEditor", checkpoint=f"reasonedit/{system}", dtype="float32"),
        "12": node("LoadReasoner", **scripted),
        "2": node("LoopOpen", image=["10", 0], instruction="make it winter", seed=SEED),
        "3": node("Think", reasoner=["12", 0], image=["2", 1], instruction=["2", 2], history=["2", 3], seed=SEED),
        "4": node("Edit", editor=["11", 0], image=["2", 1], instruction=["3", 0], seed=["2", 5], previous=["2", 6], **VALUES),
        "5": node(
            "Reflect",
            reasoner=["12", 0],
            source=["10", 0],
            edited=["4", 0],
            goal=["3", 0],
            original="make it winter",
            history=["2", 3],
            seed=SEED,
        ),
        "6": node(
            "LoopClose",
            flow=["2", 0],
            image=["4", 0],
            verdict=["5", 0],
            history=["2", 3],
            edited=["4", 1],
            goal=["3", 0],
            **LOOP,
        ),
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
        "8": {"class_type": "Test_Show", "inputs": {"image": ["6", 1], "text": ["6", 3], "number": ["6", 2]}},
        "20": node(
            "AutoLoop",
            editor=["11", 0],
            reasoner=["12", 0],
            image=["10", 0],
            instruction="make it winter",
            seed=SEED,
            **VALUES,
            **LOOP,
        ),
        "21": {"class_type": "Test_Show", "inputs": {"image": ["20", 1], "text": ["20", 3], "number": ["20", 2]}},
    }


@pytest.mark.parametrize("system", ["reasonedit-s", "reasonedit-q"])
def test_graph_auto_loop_and_script_make_the_same_bits(server, system):
    info = server.get("/object_info")
    prompt = graph(info, system)
    run = server.run(prompt)
    assert run.end == "execution_success", (run.told or run.reply, server.text()[-3000:])
    wired, auto = run.outputs["8"], run.outputs["21"]
    assert wired["number"] == [2] and wired["sha256"] == auto["sha256"]
    assert [line.split(" (")[0] for line in wired["text"][0].splitlines()] == [
        line.split(" (")[0] for line in auto["text"][0].splitlines()
    ]
    assert len([e for e in run.of("executed") if e["display_node"] == "7"]) == 2
    assert {e["display_node_id"] for e in run.of("binary") if e["kind"] == 4} <= {"4", "20"}

    weights = server.base / "models" / "reasonedit" / system
    asked = json.dumps([system, str(weights), REPLIES, VALUES, SEED])
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    env = {**os.environ, "PYTHONPATH": str(_as_package(server.base)), "OMP_NUM_THREADS": "1"}
    script = subprocess.run([python, "-c", SCRIPT, asked], env=env, capture_output=True, text=True, timeout=600)
    assert script.stdout.split()[:2] == [wired["sha256"][0], "2"], (script.stdout, script.stderr[-2000:])

    again = server.run(prompt)
    ours = {e["display_node"] for e in again.of("executing") if e.get("display_node")} - {"8", "21"}
    assert ours == set() and again.end == "execution_success"


def _as_package(base: Path) -> Path:
    """A folder in which the repository is importable as `reasonedit`, installed or not."""
    folder = base / "importable"
    folder.mkdir(exist_ok=True)
    if not (folder / "reasonedit").exists():
        (folder / "reasonedit").symlink_to(ROOT, target_is_directory=True)
    return folder


# ---- the workflows that come with the pack -------------------------------------------------------------------------------


def prompt_of(name: str, **changed) -> dict[str, dict]:
    """A workflow in API format, cheap: few steps, few pixels. changed: inputs to be set wherever a node has them."""
    prompt = load(FOLDER / "api" / f"{name}.json")
    for entry in prompt.values():
        for key, value in {"steps": 2, "size": 64, **changed}.items():
            if key in entry["inputs"]:
                entry["inputs"][key] = value
    return prompt


def node_of(prompt: dict[str, dict], kind: str) -> str:
    """Id of the one node of a class."""
    (node,) = [node for node, entry in prompt.items() if entry["class_type"] == f"ReasonEdit_{kind}"]
    return node


def scripted(info: dict, prompt: dict[str, dict], **replies: list[str]) -> dict[str, dict]:
    """The prompt with recorded replies in place of the checkpoint's own reasoner."""
    values = {**defaults_of(info, "ReasonEdit_LoadReasoner"), "source": "scripted replies", "dialogue": "english"}
    values["replies"] = json.dumps({**REPLIES, **replies})
    for entry in prompt.values():
        if "reasoner" in entry["inputs"]:
            entry["inputs"]["reasoner"] = ["script", 0]
    return {**prompt, "script": {"class_type": "ReasonEdit_LoadReasoner", "inputs": values}}


def test_the_workflows_name_what_this_comfyui_has(server):
    known = {name: facts_of_info(entry) for name, entry in server.get("/object_info").items()}
    for name, facts in CORE.items():
        assert (facts.inputs[0].name, facts.outputs) == (known[name].inputs[0].name, known[name].outputs), name
    for name in NAMES:
        prompt = load(FOLDER / "api" / f"{name}.json")
        assert faults(prompt, known) == []
        drawn = to_prompt(load(FOLDER / f"{name}.json"), known)
        assert {n: e["inputs"] for n, e in drawn.items()} == {n: e["inputs"] for n, e in prompt.items()}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FULL_SIZE])
def test_a_workflow_runs_as_it_is(server, name):
    prompt = prompt_of(name)
    run = server.run(prompt)
    assert run.end == "execution_success", (run.told or run.reply, server.text()[-3000:])
    shows = {node for node, entry in prompt.items() if entry["class_type"] in ("PreviewAny", "PreviewImage")}
    shows |= {node for node, entry in prompt.items() if entry["class_type"].endswith(("ShowTrace", "SaveTrace"))}
    assert shows <= set(run.outputs) and all(run.outputs[node].get("images") or run.outputs[node].get("text") for node in shows)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A fresh server: its folders for models and input are empty."""
    comfyui_path()
    with ComfyServer(tmp_path_factory.mktemp("bare")) as running:
        yield running


@pytest.mark.parametrize("name", MINI)
def test_a_mini_workflow_runs_in_a_fresh_comfyui(bare, name):
    assert not any(path.is_file() for folder in ("models", "input") for path in (bare.base / folder).rglob("*"))
    prompt = load(FOLDER / "api" / f"{name}.json")
    run = bare.run(prompt)
    assert run.end == "execution_success", (run.told or run.reply, bare.text()[-3000:])
    shown = {prompt[node]["_meta"]["title"]: output for node, output in run.outputs.items() if node in prompt}
    if name == "mini_think":
        assert shown["What was asked"]["text"] != shown["What it means"]["text"] and shown["Goal"]["text"][0]
    else:
        assert shown["Wanted"]["images"] and "Round 1" in shown["Show Trace (ReasonEdit)"]["text"][0]
        assert len(list((bare.base / "output" / "reasonedit").glob("trace_*.png"))) >= 1
    assert not {"ReasonEdit_MiniScene", "ReasonEdit_LoadEditor", "ReasonEdit_Think"} & kinds(bare.run(prompt), prompt)


def test_a_photograph_on_a_miniature_is_told_of(bare):
    draw_picture(192, 128).save(bare.base / "input" / "mine.png")
    prompt = prompt_of("mini_auto", think=False, reflect=False, instruction="make it winter", image=["photo", 0])
    prompt["photo"] = {"class_type": "LoadImage", "inputs": {"image": "mine.png"}}
    run = bare.run(prompt)
    assert run.end == "execution_success", (run.told, bare.text()[-3000:])
    texts = [event["text"] for event in run.of("binary") if event["kind"] == Events.TEXT]
    assert any("none of the drawn miniature scenes" in text for text in texts)
    (bare.base / "input" / "mine.png").unlink()
    before = bare.text().count("none of the drawn miniature scenes")
    assert before >= 1
    assert bare.run(prompt_of("mini_auto", think=False, reflect=False, seed=1)).end == "execution_success"
    assert bare.text().count("none of the drawn miniature scenes") == before


@pytest.mark.parametrize("name", ["loop_reasonedit_s", "loop_reasonedit_q"])
def test_a_loop_workflow_stops_early_and_keeps_its_rounds(server, name):
    info = server.get("/object_info")
    prompt = scripted(info, prompt_of(name, seed=21, max_rounds=4))
    show, close = node_of(prompt, "ShowTrace"), node_of(prompt, "LoopClose")
    run = server.run(prompt)
    (text,) = run.outputs[show]["text"]
    assert run.end == "execution_success" and "Round 2, best" in text and "Round 3" not in text, run.told
    (looked,) = [node for node, entry in prompt.items() if entry["class_type"] == "PreviewImage"]
    assert len([event for event in run.of("executed") if event["display_node"] == looked]) == 2
    assert ran(server.run(prompt)) == set()
    prompt[close]["inputs"]["max_rounds"] = 1
    assert not {"ReasonEdit_Think", "ReasonEdit_Edit", "ReasonEdit_Reflect"} & kinds(server.run(prompt), prompt)


def ran(run) -> set[str]:
    """The nodes that ran, by what they show on, but for those that write files."""
    return {event["display_node"] for event in run.of("executing") if event.get("display_node")}


def kinds(run, prompt: dict[str, dict]) -> set[str]:
    """Classes of the nodes that ran."""
    return {prompt[node]["class_type"] for node in ran(run) if node in prompt}


def test_a_missing_checkpoint_is_told_of_in_comfyuis_own_words(server):
    gone = {"checkpoint": "reasonedit/gone", "source": "reasonedit/gone", "dialogue": "dialogue/gone.toml"}
    for name, kind, key in (
        ("loop_reasonedit_s", "LoadEditor", "checkpoint"),
        ("think_only", "LoadReasoner", "source"),
        ("reflect_only", "LoadReasoner", "dialogue"),
    ):
        prompt = prompt_of(name)
        node = node_of(prompt, kind)
        prompt[node]["inputs"][key] = gone[key]
        (fault,) = server.run(prompt).reply["node_errors"][node]["errors"]
        assert fault["type"] == "value_not_in_list" and fault["extra_info"]["input_name"] == key
        assert f"{key}: '{gone[key]}' not in" in fault["details"]


@pytest.mark.parametrize("where", ["Think", "Edit", "Reflect"])
def test_cancel_ends_a_token_and_a_step(server, where):
    """The checkpoint's own MLLM speaks; in Edit the cancel falls into the second round."""
    info, seed = server.get("/object_info"), {"Think": 31, "Edit": 32, "Reflect": 33}[where]
    prompt = prompt_of("loop_reasonedit_s", seed=seed, instruction=f"something new for {where}", steps=200)
    if where == "Edit":
        prompt = scripted(info, prompt)
    else:
        prompt[node_of(prompt, "Edit")]["inputs"]["steps"] = 2
    node, counts, cancelled = node_of(prompt, where), Counter(), []

    def cancel(run):
        event = run.events[-1]
        if event["type"] != "binary" or cancelled:
            return
        told = event["data"]
        counts[told["kind"], told.get("display_node_id") or told.get("node")] += 1
        if counts[Events.PREVIEW_META, node] > 250 or counts[Events.TEXT, node]:
            cancelled.append(node)
            server.post("/interrupt")

    run = server.run(prompt, on_event=cancel)
    assert run.end == "execution_interrupted" and cancelled == [node], (run.end, run.told)
    assert server.run(prompt_of("think_only")).end == "execution_success", "the flag is taken back"


@pytest.mark.parametrize("name", ["loop_reasonedit_s", "loop_reasonedit_q"])
def test_memory_stays_flat_over_twenty_runs(server, name):
    """A picture is 5 MB, and each run makes several: one that is kept in every run is seen."""
    draw_picture(768, 512).save(server.base / "input" / "large.png")
    info, sizes = server.get("/object_info"), []
    for seed in range(26):
        prompt = scripted(info, prompt_of(name, seed=100 + 10 * seed))
        for entry in prompt.values():
            if entry["class_type"] == "LoadImage":
                entry["inputs"]["image"] = "large.png"
        run = server.run(prompt)
        assert run.end == "execution_success" and "ReasonEdit_Edit" in kinds(run, prompt), run.told
        sizes.append(server.rss())
    assert median(sizes[-6:]) - median(sizes[4:10]) < 20e6, [size // 1_000_000 for size in sizes]
