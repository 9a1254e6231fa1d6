"""What the loader puts together from a spec and a checkpoint folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from reasonedit.reasonedit_core import flow
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
