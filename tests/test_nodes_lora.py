"""The LoRA node in a real ComfyUI: what training exports changes the picture there, through our loaders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reasonedit.tests.comfy_server import ComfyServer, comfyui_path
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.training.adapters import Adapters, Trained
from reasonedit.training.export import export

FROM = "from checkpoint"
IN_DIT, IN_MLLM = "transformer_blocks.0.attn.to_v", "model.language_model.layers.0.self_attn.v_proj"


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def trained(part: str, module: str, sizes: tuple[int, int]) -> Trained:
    draw = torch.Generator().manual_seed(0)
    ins, out = sizes
    lora = {f"{module}.lora_A": torch.randn(2, ins, generator=draw), f"{module}.lora_B": torch.randn(out, 2, generator=draw)}
    return Trained(part, lora, {"r": 2, "lora_alpha": 4.0, "use_rslora": False})


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    comfyui_path()
    base = tmp_path_factory.mktemp("comfy")
    weights = tiny_checkpoint("step1x-v1p2", std=0.2)
    shutil.copytree(weights, base / "models" / "reasonedit" / "S")
    small = {"conditioner_pixels": [3136, 6272], "reasoner_pixels": [3136, 6272]}
    (base / "models" / "reasonedit" / "S" / "reasonedit.json").write_text(json.dumps(small))
    parts = (trained("dit", IN_DIT, (32, 32)), trained("mllm", IN_MLLM, (64, 32)))
    made = Adapters("reasonedit-s", weights, parts)
    export(made, "comfyui", base / "models" / "loras", name="mine")
    export(made, "peft", base / "models" / "loras", name="folder")
    with ComfyServer(base) as server:
        yield server


def graph(*loras: tuple[str, float]) -> dict:
    values = {"dialogue": "auto", "dtype": "auto", "weights_dtype": "auto", "variant": "auto"}
    load = node("ReasonEdit_LoadEditor", checkpoint="reasonedit/S", text_encoder=FROM, vae=FROM, **values)
    made = {"image": node("EmptyImage", width=64, height=48, batch_size=1, color=0x336699)}
    for number, (name, strength) in enumerate(loras):
        before = {"loras": [f"lora{number - 1}", 0]} if number else {}
        made[f"lora{number}"] = node("ReasonEdit_LoRA", lora=f"loras/{name}", strength=strength, **before)
        load["inputs"]["loras"] = [f"lora{number}", 0]
    how = {"steps": 2, "guidance": 1.0, "size": 64, "negative": "", "policy": "reasonedit", "seed": 1}
    edit = node("ReasonEdit_Edit", editor=["load", 0], image=["image", 0], instruction="winter", **how)
    return {**made, "load": load, "edit": edit, "save": node("SaveImage", images=["edit", 0], filename_prefix="made")}


def picture(server, *loras: tuple[str, float]) -> np.ndarray:
    run = server.run(graph(*loras))
    assert run.end == "execution_success", run.told
    (image,) = run.outputs["save"]["images"]
    return np.asarray(Image.open(Path(server.base) / "output" / image["subfolder"] / image["filename"]), dtype=float)


def test_what_training_exports_changes_the_picture(server):
    plain = picture(server)
    dit, mllm = picture(server, ("mine_dit.safetensors", 1.0)), picture(server, ("mine_mllm.safetensors", 1.0))
    both = picture(server, ("mine_dit.safetensors", 1.0), ("mine_mllm.safetensors", 1.0))
    shown = [plain, dit, mllm, both]
    differ = [np.abs(one - other).max() for i, one in enumerate(shown) for other in shown[:i]]
    assert min(differ) >= 2, differ
    folders = [(f"folder_{part}/adapter_model.safetensors", 1.0) for part in ("dit", "mllm")]
    assert np.abs(picture(server, *folders) - both).max() <= 1, "PEFT folders and files are the same LoRA"
    assert np.abs(picture(server, ("mine_dit.safetensors", 0.0)) - plain).max() <= 1
    assert np.abs(picture(server, ("mine_dit.safetensors", 0.5)) - dit).max() >= 1, "a change of strength is seen"


def test_a_missing_lora_and_one_for_another_part_are_told(server):
    run = server.run(graph(("gone.safetensors", 1.0)))
    told = json.dumps(run.reply) + json.dumps(run.told)
    assert run.end != "execution_success" and "gone.safetensors" in told
    prompt = graph(("mine_dit.safetensors", 1.0))
    values = {"url": "http://localhost:1/v1", "model": "", "replies": "", "dialogue": "auto", "dtype": "auto"}
    prompt["load"] = node("ReasonEdit_LoadReasoner", source="reasonedit/S", loras=["lora0", 0], **values)
    prompt["think"] = node(
        "ReasonEdit_Think", reasoner=["load", 0], image=["image", 0], instruction="winter", seed=1, policy="reasonedit"
    )
    prompt["text"] = node("PreviewAny", source=["think", 0])
    del prompt["edit"], prompt["save"]
    run = server.run(prompt)
    assert run.end == "execution_error" and run.told["node_id"] == "load"
    assert "of a part (DiT, MLLM) that is not loaded here" in run.told["exception_message"]
    prompt["lora0"]["inputs"]["lora"] = "loras/mine_mllm.safetensors"
    assert server.run(prompt).end == "execution_success"
