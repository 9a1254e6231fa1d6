"""Think, Edit, Reflect and the trace nodes in a real ComfyUI, on tiny checkpoints: through /prompt, as a user queues them."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from PIL import Image

from reasonedit.nodes import tracefile
from reasonedit.tests.comfy_server import ComfyServer, Events, comfyui_path
from reasonedit.tests.tiny import tiny_checkpoint

FROM = "from checkpoint"


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def loader(checkpoint: str, **changed) -> dict:
    values = {
        "text_encoder": FROM,
        "vae": FROM,
        "dialogue": "auto",
        "dtype": "auto",
        "weights_dtype": "auto",
        "variant": "auto",
    }
    return node("ReasonEdit_LoadEditor", checkpoint=checkpoint, **{**values, **changed})


def graph(checkpoint: str, **edit) -> dict:
    """Load, think, edit, reflect."""
    values = {"steps": 3, "guidance": 3.0, "size": 64, "negative": "", "policy": "reasonedit", "seed": 1, **edit}
    return {
        "load": loader(checkpoint),
        "image": node("EmptyImage", width=64, height=48, batch_size=1, color=0x336699),
        "think": node(
            "ReasonEdit_Think", reasoner=["load", 1], image=["image", 0], instruction="winter", seed=1, policy="reasonedit"
        ),
        "edit": node("ReasonEdit_Edit", editor=["load", 0], image=["image", 0], instruction=["think", 0], **values),
        "reflect": node(
            "ReasonEdit_Reflect",
            reasoner=["load", 1],
            source=["image", 0],
            edited=["edit", 0],
            goal=["think", 0],
            seed=1,
            policy="reasonedit",
            original="winter",
        ),
        "show": node("PreviewImage", images=["edit", 0]),
        "text": node("PreviewAny", source=["reflect", 4]),
        "score": node("PreviewAny", source=["reflect", 2]),
        "accepted": node("PreviewAny", source=["reflect", 3]),
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    comfyui_path()
    base = tmp_path_factory.mktemp("comfy")
    small = {"conditioner_pixels": [3136, 6272], "reasoner_pixels": [3136, 6272]}
    for name, system in (("S", "step1x-v1p2"), ("Q", "qwen-edit-plus"), ("VL", "qwen2.5-vl")):
        folder = base / "models" / "reasonedit" / name
        shutil.copytree(tiny_checkpoint(system, std=0.2), folder)
        (folder / "reasonedit.json").write_text(json.dumps(small))
    files = tiny_checkpoint("comfy-qwen-files", std=0.2)
    for kind, name in (("diffusion_models", "dit"), ("text_encoders", "qwen"), ("vae", "vae")):
        (base / "models" / kind).mkdir(parents=True, exist_ok=True)
        (source,) = (files / kind).glob("*.safetensors")
        shutil.copy(source, base / "models" / kind / f"{name}.safetensors")
    tokenizer = base / "models" / "text_encoders" / "qwen"
    shutil.copytree(tiny_checkpoint("qwen2.5-vl", std=0.2), tokenizer, ignore=shutil.ignore_patterns("*.safetensors*"))
    with ComfyServer(base, "--preview-method", "auto") as server:
        yield server


def ran(run) -> list[str]:
    return [told["node"] for told in run.of("executing") if told["node"]]


@pytest.mark.parametrize("checkpoint", ["reasonedit/S", "reasonedit/Q"])
def test_think_edit_reflect(server, checkpoint):
    run = server.run(graph(checkpoint))
    assert run.end == "execution_success", run.told
    assert run.outputs["show"]["images"] and run.outputs["text"]["text"][0].split()[0] in ("success", "refine", "failed")
    assert 0 <= float(run.outputs["score"]["text"][0]) <= 10
    binary = run.of("binary")
    assert [told for told in binary if told["kind"] in (Events.PREVIEW, Events.PREVIEW_META)], "previews of the steps"
    streamed = {told["node"] for told in binary if told["kind"] == Events.TEXT}
    assert {"think", "reflect"} <= streamed
    again = server.run(graph(checkpoint))
    assert again.end == "execution_success" and not {"load", "think", "edit", "reflect"} & set(ran(again))
    seeded = server.run(graph(checkpoint, seed=2))
    assert {"edit", "reflect"} <= set(ran(seeded)) and not {"load", "think"} & set(ran(seeded))


def test_single_files_of_comfyuis_folders(server):
    prompt = graph("diffusion_models/dit.safetensors")
    refused = server.run(prompt)
    assert "choose its text_encoder and its vae as well" in refused.told["exception_message"]
    assert refused.told["node_id"] == "load" and not {"think", "edit"} & set(ran(refused))
    prompt["load"] = loader(
        "diffusion_models/dit.safetensors", text_encoder="text_encoders/qwen.safetensors", vae="vae/vae.safetensors"
    )
    run = server.run(prompt)
    assert run.end == "execution_success", run.told


def test_other_reasoners(server):
    prompt = graph("reasonedit/S")
    shared = {"url": "http://localhost:1/v1", "model": "", "dialogue": "english", "dtype": "auto"}
    prompt["reasoner"] = node("ReasonEdit_LoadReasoner", source="reasonedit/VL", replies="", **shared)
    prompt["think"]["inputs"]["reasoner"] = prompt["reflect"]["inputs"]["reasoner"] = ["reasoner", 0]
    assert server.run(prompt).end == "execution_success"
    prompt = {
        "image": prompt["image"],
        "reasoner": node("ReasonEdit_LoadReasoner", source="scripted replies", replies='{"think": ["Add snow."]}', **shared),
        "think": prompt["think"],
        "text": node("PreviewAny", source=["think", 0]),
    }
    assert server.run(prompt).outputs["text"]["text"] == ["Add snow."]
    prompt["reasoner"]["inputs"]["replies"] = "{"
    assert "expected JSON" in json.dumps(server.run(prompt).reply["node_errors"]["reasoner"])
    prompt["reasoner"]["inputs"].update(source="remote endpoint", url="nowhere")
    assert "expected an address" in json.dumps(server.run(prompt).reply["node_errors"]["reasoner"])


def test_faults_are_one_sentence_before_the_run(server):
    prompt = graph("reasonedit/gone")
    (fault,) = server.run(prompt).reply["node_errors"]["load"]["errors"]
    assert fault["type"] == "value_not_in_list" and "checkpoint: 'reasonedit/gone'" in fault["details"]
    prompt = graph("reasonedit/S", steps=1001)
    assert "steps" in json.dumps(server.run(prompt).reply["node_errors"]["edit"])
    prompt = graph("reasonedit/S", guidance=101.0)
    assert "value_bigger_than_max" in json.dumps(server.run(prompt).reply["node_errors"]["edit"])
    prompt = graph("reasonedit/S")
    prompt["think"]["inputs"]["instruction"] = " "
    assert "Write it" in json.dumps(server.run(prompt).reply["node_errors"]["think"])
    prompt = graph("reasonedit/S", reference_2=["image", 0])
    run = server.run(prompt)
    assert run.end == "execution_error" and "ReasonEdit-S edits one picture" in run.told["exception_message"]


def test_a_batch_with_alpha(server):
    """Four channels of two pictures go in, and come out."""
    prompt = graph("reasonedit/S")
    prompt["mask"] = node("SolidMask", value=0.25, width=64, height=48)
    prompt["alpha"] = node("JoinImageWithAlpha", image=["image", 0], alpha=["mask", 0])
    prompt["two"] = node("RepeatImageBatch", image=["alpha", 0], amount=2)
    prompt["edit"]["inputs"].update(image=["two", 0], instruction="winter")
    prompt = {key: prompt[key] for key in ("load", "image", "mask", "alpha", "two", "edit", "show")}
    run = server.run(prompt)
    assert run.end == "execution_success", run.told
    files = [server.base / "temp" / shown["filename"] for shown in run.outputs["show"]["images"]]
    pictures = [Image.open(file) for file in files]
    assert [picture.mode for picture in pictures] == ["RGBA", "RGBA"]
    assert {picture.getchannel("A").getextrema() for picture in pictures} == {(191, 191)}
    assert pictures[0].tobytes() != pictures[1].tobytes(), "each has its own seed"


@pytest.mark.parametrize("where", ["edit", "think"])
def test_cancel_ends_a_step_and_a_token(server, where):
    prompt = graph("reasonedit/S", steps=1000, seed=77 if where == "edit" else 78)
    if where == "think":
        prompt["think"]["inputs"]["instruction"] = "something that was never asked before"
    cancelled = []

    def cancel(run):
        event = run.events[-1]
        kind = event["data"].get("kind") if event["type"] == "binary" else event["type"]
        ripe = kind == Events.TEXT if where == "think" else kind in (Events.PREVIEW, Events.PREVIEW_META)
        if ripe and not cancelled:
            server.post("/interrupt")
            cancelled.append(kind)

    run = server.run(prompt, on_event=cancel)
    assert run.end == "execution_interrupted" and run.told["node_id"] == where
    assert server.run(graph("reasonedit/S")).end == "execution_success", "the flag is taken back"


def test_a_trace_is_saved_read_back_and_shown(server):
    prompt = graph("reasonedit/S")
    settings = {"max_rounds": 2, "policy": "reasonedit", "pick": "last", "on_failed": "restart", "revise": "chain"}
    settings |= {"accept": 11.0, "doubt": 3.0, "max_seconds": 0.0}
    prompt = {key: prompt[key] for key in ("load", "image")} | {
        "auto": node(
            "ReasonEdit_AutoLoop",
            editor=["load", 0],
            reasoner=["load", 1],
            image=["image", 0],
            instruction="winter",
            seed=3,
            steps=2,
            guidance=2.0,
            size=64,
            negative="",
            think=False,
            reflect=True,
            **settings,
        ),
        "save": node("ReasonEdit_SaveTrace", image=["auto", 0], history=["auto", 4], filename_prefix="runs/leaf"),
        "show": node("ReasonEdit_ShowTrace", history=["auto", 4], policy="reasonedit"),
    }
    run = server.run(prompt)
    assert run.end == "execution_success", run.told
    (shown,) = run.outputs["save"]["images"]
    path = server.base / "output" / shown["subfolder"] / shown["filename"]
    history = tracefile.decode(path)
    assert 1 <= len(history) <= 2 and history[0].edited.latents is not None
    assert "Round 1" in run.outputs["show"]["text"][0] and run.outputs["show"]["images"]
    shutil.copy(path, server.base / "input" / "leaf.png")
    back = {
        "read": node("ReasonEdit_LoadTrace", file="leaf.png"),
        "show": node("ReasonEdit_ShowTrace", history=["read", 0], policy="reasonedit"),
        "picture": node("PreviewImage", images=["read", 1]),
        "words": node("PreviewAny", source=["read", 2]),
    }
    again = server.run(back)
    assert again.end == "execution_success", again.told
    assert again.outputs["show"]["text"] == run.outputs["show"]["text"] and again.outputs["words"]["text"] == ["winter"]
    back["read"]["inputs"]["file"] = "gone.png"
    assert "Upload the file again" in json.dumps(server.run(back).reply["node_errors"]["read"])


def test_free_unloads_and_the_next_run_loads_again(server):
    server.run(graph("reasonedit/S", seed=500))
    status, _ = server.post("/free", {"unload_models": True, "free_memory": True})
    assert status == 200
    # The server frees between two prompts and tells nobody when: a run may still come before it, five in five seconds do not.
    for attempt in range(5):
        before = server.text().count("Requested to load ReasonEditMLLM")
        time.sleep(1)
        assert server.run(graph("reasonedit/S", seed=501 + attempt)).end == "execution_success"
        if server.text().count("Requested to load ReasonEditMLLM") > before:
            return
    pytest.fail("the MLLM stayed loaded after /free")
