"""The pack's own nodes in a real ComfyUI, on a tiny checkpoint: the loop in a graph, the auto loop and the script agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reasonedit.tests.comfy_server import ROOT, ComfyServer, comfyui_path
from reasonedit.tests.tiny import tiny_checkpoint

TESTS = Path(__file__).resolve().parent


def consistency(score: float, meets: str) -> str:
    """A reply to `score`."""
    keys = {"meets_instruction": meets, "major_conflicts": 0, "minor_conflicts": 0, "omissions": 0}
    return json.dumps({**keys, "raw_score": score, "reason": "because"})


SMALL = {"conditioner_pixels": [3136, 6272], "reasoner_pixels": [3136, 6272]}

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
weights, replies, values, seed = json.loads(sys.argv[1])
system = load_system(SystemSpec("reasonedit-s", weights, reasoner="own", device="cpu", dtype="float32"))
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
    """A server that finds the tiny checkpoint in models/reasonedit."""
    comfyui_path()
    base = tmp_path_factory.mktemp("comfy")
    _weights(base)
    flags = ["--cache-lru", "50"] if request.param == "lru" else []
    with ComfyServer(base, *flags, packs={"fake_body": TESTS / "fake_body.py"}) as running:
        yield running


def _weights(base: Path) -> Path:
    """The tiny checkpoint with settings that keep the MLLM's pictures small; its files are linked."""
    folder = base / "models" / "reasonedit" / "tiny-s"
    if not folder.exists():
        folder.mkdir(parents=True)
        for path in tiny_checkpoint("step1x-v1p2").iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "reasonedit.json").write_text(json.dumps(SMALL))
    return folder


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


def graph(info: dict) -> dict[str, dict]:
    """Loaders, the loop as an artist wires it, and the auto loop beside it."""

    def node(kind, **inputs):
        return {"class_type": f"ReasonEdit_{kind}", "inputs": {**defaults_of(info, f"ReasonEdit_{kind}"), **inputs}}

    scripted = {"source": "scripted replies", "replies": json.dumps(REPLIES), "dialogue": "english"}
    return {
        "10": {"class_type": "Test_Paint", "inputs": {"value": 0.5, "count": 1, "channels": 3, "height": 48, "width": 64}},
        "11": node("LoadEditor", checkpoint="reasonedit/tiny-s", dtype="float32"),
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


def test_graph_auto_loop_and_script_make_the_same_bits(server):
    info = server.get("/object_info")
    prompt = graph(info)
    run = server.run(prompt)
    assert run.end == "execution_success", (run.told or run.reply, server.text()[-3000:])
    wired, auto = run.outputs["8"], run.outputs["21"]
    assert wired["number"] == [2] and wired["sha256"] == auto["sha256"]
    assert [line.split(" (")[0] for line in wired["text"][0].splitlines()] == [
        line.split(" (")[0] for line in auto["text"][0].splitlines()
    ]
    assert len([e for e in run.of("executed") if e["display_node"] == "7"]) == 2
    assert {e["display_node_id"] for e in run.of("binary") if e["kind"] == 4} <= {"4", "20"}

    asked = json.dumps([str(_weights(server.base)), REPLIES, VALUES, SEED])
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    env = {**os.environ, "PYTHONPATH": str(_as_package(server.base)), "OMP_NUM_THREADS": "1"}
    script = subprocess.run([python, "-c", SCRIPT, asked], env=env, capture_output=True, text=True, timeout=120)
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
