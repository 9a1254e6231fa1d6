"""LoRAs of the MLLM: every way its modules are called lands on them, and one file may serve DiT and MLLM together."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.load import SystemSpec, load_reasoner, load_system
from reasonedit.reasonedit_core.lora import apply_lora, apply_lora_to, find_linears, merge_lora
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.mllm.qwen25vl import QwenVL
from reasonedit.tests.tiny import tiny_checkpoint

RANK, ALPHA = 2, 6.0
Q, DOWN = "layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"
VISION = "visual.blocks.1.attn.qkv"
DIT = "transformer_blocks.0.attn.to_q"


def full(short: str) -> str:
    """The name in memory."""
    return f"model.{short}" if short.startswith("visual.") else f"model.language_model.{short}"


def draw(key: str, *shape: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(sum(map(ord, key)))
    return torch.randn(shape, generator=rng) * 0.3


def halves(module, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    layer = find_linears(module)[name]
    return draw(name + "a", RANK, layer.in_features), draw(name + "b", layer.out_features, RANK)


def write(path: Path, state: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.clone().contiguous() for key, value in state.items()}, path)
    return path


def keys_for(module, name: str, stem: str, kohya: bool = False) -> dict[str, torch.Tensor]:
    down, up = halves(module, name)
    ends = ("lora_down.weight", "lora_up.weight") if kohya else ("lora_A.weight", "lora_B.weight")
    return {f"{stem}.{ends[0]}": down, f"{stem}.{ends[1]}": up, f"{stem}.alpha": torch.tensor(ALPHA)}


@pytest.fixture
def mllm() -> QwenVL:
    return load_mllm(tiny_checkpoint("qwen2.5-vl", std=0.2), dtype=torch.float32)


def states(mllm: QwenVL) -> torch.Tensor:
    ids = mllm.tokenize("make the sky green and the grass blue")
    with torch.no_grad():
        return mllm.states(mllm.embed(ids), mllm.positions(ids))


HUB = {name: name if name.startswith("visual.") else f"model.{name}" for name in (Q, DOWN, VISION)}
STEMS = {
    "comfyui": lambda name: f"text_encoders.qwen25_7b.transformer.{HUB[name]}",
    "peft on the whole model": lambda name: f"base_model.model.{full(name)}",
    "peft on the whole model of transformers 4.51": lambda name: f"base_model.model.{HUB[name]}",
    "peft on the language model": lambda name: f"base_model.model.{name}",
    "hub names": lambda name: HUB[name],
    "names in memory": full,
    "diffusers": lambda name: f"text_encoder.{full(name)}",
    "kohya": lambda name: "lora_te_" + HUB[name].replace(".", "_"),
    "kohya, of the language model": lambda name: "lora_te1_" + name.replace(".", "_"),
    "kohya, names in memory": lambda name: "lora_te_" + full(name).replace(".", "_"),
}


@pytest.mark.parametrize("style", STEMS)
def test_key_styles(tmp_path, mllm, style):
    stem, linears = STEMS[style], find_linears(mllm.model)
    before = {name: layer.weight.clone() for name, layer in linears.items()}
    state = {}
    for name in (Q, DOWN, VISION):
        state |= keys_for(mllm.model, full(name), stem(name), kohya=style.startswith("kohya"))
    report = merge_lora(mllm.model, write(tmp_path / "x.safetensors", state), 0.5)
    assert set(report.modules) == {full(Q), full(DOWN), full(VISION)} and report.unmatched == ()
    for name, layer in linears.items():
        down, up = halves(mllm.model, name)
        grown = 0.5 * ALPHA / RANK * up @ down if name in report.modules else torch.zeros(())
        assert torch.allclose(layer.weight, before[name] + grown, atol=1e-6), name


def test_an_adapter_equals_the_merge_and_needs_a_release(tmp_path, mllm):
    path = write(tmp_path / "x.safetensors", keys_for(mllm.model, full(Q), STEMS["comfyui"](Q)))
    other = load_mllm(tiny_checkpoint("qwen2.5-vl", std=0.2), dtype=torch.float32)
    plain = states(mllm)
    report = apply_lora(mllm.model, path, 0.7)
    merge_lora(other.model, path, 0.7)
    assert (states(mllm) - plain).abs().max() > 1e-3
    assert torch.allclose(states(mllm), states(other), atol=1e-5)
    assert report.name == "x" and not any(p.requires_grad for p in mllm.model.parameters())


def test_names_of_both_models_never_meet(tmp_path, mllm):
    """A LoRA of the DiT alone has no place in the MLLM, and says so."""
    path = write(
        tmp_path / "x.safetensors", {f"{DIT}.lora_A.weight": torch.ones(2, 4), f"{DIT}.lora_B.weight": torch.ones(4, 2)}
    )
    with pytest.raises(CheckpointError, match=r"no key that meets a module.*of a part \(DiT, MLLM\) that is not loaded"):
        apply_lora(mllm.model, path)


@pytest.fixture(params=["reasonedit-s:step1x-v1p2", "reasonedit-q:qwen-edit-plus"])
def spec(request) -> SystemSpec:
    system, checkpoint = request.param.split(":")
    return SystemSpec(system, tiny_checkpoint(checkpoint, std=0.2), reasoner="none", dtype="float32", device="cpu")


def with_loras(spec: SystemSpec, *paths: Path, **changes) -> SystemSpec:
    from dataclasses import replace

    return replace(spec, loras=tuple((path, 0.5) for path in paths), **changes)


def both(spec: SystemSpec, path: Path, *, extra: bool = False) -> Path:
    system = load_system(spec)
    state = keys_for(system.generator.denoiser.transformer, DIT, f"diffusion_model.{DIT}")
    state |= keys_for(system.mllm.model, full(Q), STEMS["comfyui"](Q))
    if extra:
        state["nobody.lora_A.weight"] = torch.ones(2, 2)
    return write(path, state)


def test_one_file_goes_to_both_parts_of_a_system(tmp_path, spec, caplog):
    path = both(spec, tmp_path / "x.safetensors", extra=True)
    with caplog.at_level(logging.WARNING, "reasonedit"):
        system, plain = load_system(with_loras(spec, path)), load_system(spec)
    dit, mllm = system.generator.denoiser.transformer, system.mllm.model
    assert hasattr(dit.get_submodule(DIT), "lora_A") and hasattr(mllm.get_submodule(full(Q)), "lora_A")
    assert not torch.allclose(states(system.mllm), states(plain.mllm), atol=1e-4)
    words = f"{path}: 1 keys of the LoRA match nothing in this model: nobody.lora_A.weight."
    assert words in system.notes and words not in plain.notes
    assert len([r for r in caplog.records if "1 keys met no module: nobody" in r.message]) == 1


def test_reports_are_by_part(tmp_path, spec):
    path = both(spec, tmp_path / "x.safetensors")
    system = load_system(spec)
    parts = {"dit": system.generator.denoiser.transformer, "mllm": system.mllm.model}
    reports = apply_lora_to(parts, path)
    assert {name: report.modules for name, report in reports.items()} == {"dit": (DIT,), "mllm": (full(Q),)}
    assert all(report.unmatched == () for report in reports.values())
    assert apply_lora(parts["mllm"], path).unmatched, "asked of one part alone, the keys of the other are left"


def test_the_loader_forgets_what_the_mllm_kept(tmp_path, spec, monkeypatch):
    released = []
    monkeypatch.setattr(QwenVL, "release", lambda self: released.append(self))
    path = both(spec, tmp_path / "x.safetensors")
    assert released == []
    system = load_system(with_loras(spec, path))
    assert released == [system.mllm]


def peft_folder(mllm: QwenVL, folder: Path) -> Path:
    down, up = halves(mllm.model, full(Q))
    stem = f"base_model.model.{full(Q)}"
    write(folder / "adapter_model.safetensors", {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_reasoner_of_its_own_takes_a_peft_folder(tmp_path, mllm):
    folder = peft_folder(mllm, tmp_path / "lora")
    weights = tiny_checkpoint("qwen2.5-vl", std=0.2)
    spec = SystemSpec("", weights, reasoner=f"qwen:{weights}", dtype="float32", device="cpu", loras=((folder, 2.0),))
    tuned = load_reasoner(spec).mllm
    down, up = halves(mllm.model, full(Q))
    find_linears(mllm.model)[full(Q)].weight.data += 2 * ALPHA / RANK**0.5 * up @ down
    assert torch.allclose(states(tuned), states(mllm), atol=1e-5)


def test_the_editors_reasoner_has_loras_of_its_own(tmp_path, spec, mllm):
    folder, weights = peft_folder(mllm, tmp_path / "lora"), tiny_checkpoint("qwen2.5-vl", std=0.2)
    loras = ((folder, 1.0),)
    system = load_system(with_loras(spec, reasoner=f"qwen:{weights}", reasoner_loras=loras))
    speaking = system.reasoner.speaker._speaker.mllm
    assert hasattr(speaking.model.get_submodule(full(Q)), "lora_A")
    assert not hasattr(system.mllm.model.get_submodule(full(Q)), "lora_A"), "the conditioner's MLLM stays as it was"
    for reasoner in ("qwen", "own", "none"):
        with pytest.raises(ConfigError, match=r"expected a reasoner qwen:DIR.*--lora"):
            load_system(with_loras(spec, reasoner=reasoner, reasoner_loras=loras))


def test_distant_reasoners_take_no_loras(tmp_path, mllm):
    (tmp_path / "r.json").write_text("{}")
    loras = ((peft_folder(mllm, tmp_path / "lora"), 1.0),)
    for reasoner in (f"scripted:{tmp_path / 'r.json'}", "remote:http://localhost:1/v1"):
        with pytest.raises(ConfigError, match="expected a reasoner qwen:DIR"):
            load_reasoner(SystemSpec("", tmp_path, reasoner=reasoner, loras=loras))
