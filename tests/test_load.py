"""What the loader puts together from a spec and a checkpoint folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from reasonedit.reasonedit_core import compiling, flow
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.load import SystemSpec, load_system
from reasonedit.reasonedit_core.types import EditRequest
from reasonedit.tests.tiny import tiny_checkpoint


def spec(system: str, name: str, **options) -> SystemSpec:
    defaults = {"reasoner": "none", "dtype": "float32", "device": "cpu"}
    return SystemSpec(system, tiny_checkpoint(name, std=0.2), **(defaults | options))


def edit(system, guidance: float = 4.0) -> torch.Tensor:
    image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(3))
    request = EditRequest(image, 'write "Hi" on it', steps=2, guidance=guidance, size_level=64)
    return system.generator.edit(request, image, request.instruction, torch.Generator().manual_seed(0)).image


@pytest.mark.parametrize("name", ["reasonedit-s:step1x-v1p2", "reasonedit-q:qwen-edit-plus"])
def test_batched_guidance_makes_the_same_picture_with_half_the_forwards(name):
    system, checkpoint = name.split(":")
    one = load_system(spec(system, checkpoint))
    both = load_system(spec(system, checkpoint, batched_cfg=True))
    assert (edit(one) - edit(both)).abs().max() <= 2 / 255
    assert (one.counts.denoiser_forwards, both.counts.denoiser_forwards) == (4, 2)


@pytest.mark.parametrize("name", ["reasonedit-s:step1x-v1p2", "reasonedit-q:qwen-edit-plus"])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_make_the_same_picture(monkeypatch, name, backend):
    """With guidance: two lengths of text. Inductor needs a C++ compiler and a minute."""
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("needs g++")
    system, checkpoint = name.split(":")
    plain, seen = edit(load_system(spec(system, checkpoint))), []

    def compile_blocks(network):
        compiling.compile_blocks(network, backend=backend)
        seen.extend(module for module in network.modules() if module._compiled_call_impl is not None)

    monkeypatch.setattr("reasonedit.reasonedit_core.load.compile_blocks", compile_blocks)
    compiled = load_system(spec(system, checkpoint, compiled=True))
    assert (edit(compiled) - plain).abs().max() <= 2 / 255
    assert {type(block).__name__ for block in seen} == (
        {"DoubleBlock", "SingleBlock"} if system == "reasonedit-s" else {"QwenImageTransformerBlock"}
    )


def test_what_moves_weights_does_not_go_with_compiling():
    with pytest.raises(ConfigError, match="--compile: expected weights that stay on the device, found --offload block"):
        load_system(spec("reasonedit-s", "step1x-v1p2", compiled=True, offload="block"))
    with pytest.raises(ConfigError, match="found a host that moves them"):
        load_system(spec("reasonedit-s", "step1x-v1p2", compiled=True, make_mover=lambda *_: None))


def test_lightning_is_a_setting_of_the_checkpoint_folder(tmp_path):
    folder = shutil.copytree(tiny_checkpoint("qwen-edit-plus", std=0.2), tmp_path / "q")
    (folder / "reasonedit.json").write_text(json.dumps({"schedule": "lightning", "steps": 4, "guidance": 1.0}))
    system = load_system(replace(spec("reasonedit-q", "qwen-edit-plus"), weights=folder))
    assert flow.sigmas(4, 4096, system.generator.schedule).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert (system.defaults["steps"], system.defaults["guidance"]) == (4, 1.0)
    plain = load_system(spec("reasonedit-q", "qwen-edit-plus"))
    assert flow.sigmas(4, 4096, plain.generator.schedule)[1].item() != pytest.approx(0.9, abs=1e-3)


def test_lightning_is_refused_where_it_does_not_belong(tmp_path):
    folder = shutil.copytree(tiny_checkpoint("step1x-v1p2", std=0.2), tmp_path / "s")
    (folder / "reasonedit.json").write_text(json.dumps({"schedule": "lightning"}))
    with pytest.raises(ConfigError, match="'lightning' belongs to Qwen-Image"):
        load_system(replace(spec("reasonedit-s", "step1x-v1p2"), weights=folder))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"system": "reasonedit-x"}, ConfigError, "reasonedit-s, reasonedit-q"),
        ({"policy": "strict"}, ConfigError, "reasonedit, released"),
        ({"dtype": "int8"}, ConfigError, "auto, float32"),
        ({"reasoner": "remote:"}, ConfigError, "remote:URL"),
        ({"system": "reasonedit-q"}, CheckpointError, "Use --system reasonedit-s"),
    ],
)
def test_a_wrong_spec_is_refused_with_what_would_do(changes, error, words):
    with pytest.raises(error, match=words):
        load_system(replace(spec("reasonedit-s", "step1x-v1p2"), **changes))


def test_reasoner_none_takes_no_lm_head_and_one_mllm_serves_both_roles():
    assert not load_system(spec("reasonedit-s", "step1x-v1p2")).mllm.can_generate
    both = load_system(spec("reasonedit-s", "step1x-v1p2", reasoner="qwen"))
    assert both.mllm.can_generate and both.generator.conditioner.mllm is both.mllm and both.reasoner is not None
