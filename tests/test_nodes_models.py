"""Loading by components and from single files, and what stays within ComfyUI's memory management."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reasonedit.nodes import memory
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.load import SystemSpec, load_reasoner, load_system
from reasonedit.reasonedit_core.parts import assemble_parts, can_speak
from reasonedit.tests.graph_runner import install_host
from reasonedit.tests.tiny import tiny_checkpoint

install_host()

from reasonedit.nodes import folders, host  # noqa: E402
from reasonedit.nodes import models as node_models  # noqa: E402
from reasonedit.nodes.sockets import Lora  # noqa: E402


class Recorder:
    """A host's mover that notes what it is asked for."""

    def __init__(self, modules, device):
        self.modules, self.device, self.uses = dict(modules), device, []

    @contextmanager
    def __call__(self, component):
        assert component in self.modules
        self.uses.append(component)
        yield

    def release(self):
        """Nothing is managed."""


def files(tmp_path: Path) -> dict[str, Path]:
    """The single files of ComfyUI's Qwen-Image-Edit, each in a folder of its kind, and a tokenizer folder."""
    origin, place = tiny_checkpoint("comfy-qwen-files", std=0.2), tmp_path / "models"
    found = {}
    for kind in ("diffusion_models", "text_encoders", "vae"):
        (source,) = (origin / kind).glob("*.safetensors")
        (place / kind).mkdir(parents=True)
        found[kind] = Path(shutil.copy(source, place / kind))
    found["tokenizer"] = tiny_checkpoint("qwen2.5-vl", std=0.2)
    return found


# ---- the core's parts ----------------------------------------------------------------------------------------------------


def test_single_files_make_a_system(tmp_path):
    found = files(tmp_path)
    parts = assemble_parts(
        found["diffusion_models"], text_encoder=found["text_encoders"], vae=found["vae"], tokenizer=found["tokenizer"]
    )
    assert parts.layout.system == "reasonedit-q" and parts.transformer == found["diffusion_models"]
    assert parts.root == found["diffusion_models"].with_suffix("")
    system = load_system(SystemSpec("reasonedit-q", parts.root, reasoner="own", parts=parts))
    assert system.reasoner is not None and system.mllm.can_generate


def test_parts_of_a_folder_can_be_replaced(tmp_path):
    whole, other = tiny_checkpoint("step1x-v1p2", std=0.2), tiny_checkpoint("qwen2.5-vl", std=0.2)
    plain = assemble_parts(whole)
    assert plain.mllm == whole / "text_encoder" and plain.vae == whole / "vae" and plain.layout.variant == "v1.2"
    mixed = assemble_parts(whole, text_encoder=other)
    assert (mixed.mllm, mixed.vae, mixed.transformer, mixed.root) == (other, plain.vae, plain.transformer, whole)
    assert assemble_parts(whole / "transformer", text_encoder=other, vae=whole / "vae").layout.system == "reasonedit-s"


def test_what_does_not_go_together_is_refused(tmp_path):
    found, flux = files(tmp_path), tiny_checkpoint("step1x-v1p2", std=0.2) / "vae"
    with pytest.raises(CheckpointError, match="expected a Qwen2.5-VL text encoder to go with this file"):
        assemble_parts(found["diffusion_models"])
    with pytest.raises(CheckpointError, match="expected a VAE for reasonedit-q, found a vae of reasonedit-s"):
        assemble_parts(found["diffusion_models"], text_encoder=found["text_encoders"], vae=flux)
    with pytest.raises(CheckpointError, match="expected a Qwen2.5-VL text encoder for reasonedit-q, found a vae"):
        assemble_parts(found["diffusion_models"], text_encoder=found["vae"], vae=found["vae"])
    with pytest.raises(CheckpointError, match="expected the diffusion transformer"):
        assemble_parts(found["vae"], text_encoder=found["text_encoders"], vae=found["vae"])


def test_who_can_speak_is_read_from_the_names_of_the_tensors(tmp_path):
    folder = tiny_checkpoint("qwen2.5-vl", std=0.2)
    assert can_speak(folder) and can_speak(tiny_checkpoint("step1x-v1p2", std=0.2))
    single = files(tmp_path)["text_encoders"]
    assert can_speak(single)
    state = load_file(single)
    mute = {key: value for key, value in state.items() if not key.endswith("lm_head.weight")}
    assert len(mute) < len(state)
    save_file(mute, tmp_path / "mute.safetensors")
    assert not can_speak(tmp_path / "mute.safetensors")


def test_an_editor_whose_mllm_cannot_speak_loads_without_reasoner(tmp_path):
    found = files(tmp_path)
    state = load_file(found["text_encoders"])
    save_file({k: v for k, v in state.items() if not k.endswith("lm_head.weight")}, found["text_encoders"])
    parts = assemble_parts(
        found["diffusion_models"], text_encoder=found["text_encoders"], vae=found["vae"], tokenizer=found["tokenizer"]
    )
    system = load_system(SystemSpec("reasonedit-q", parts.root, reasoner="own", parts=parts))
    assert system.reasoner is None and not system.mllm.can_generate
    with pytest.raises(CheckpointError, match="lm_head"):
        load_system(SystemSpec("reasonedit-q", parts.root, reasoner="qwen", parts=parts))


def test_a_hosts_mover_gets_every_component_and_every_use():
    spec = SystemSpec("reasonedit-s", tiny_checkpoint("step1x-v1p2", std=0.2), make_mover=Recorder, device=torch.device("cpu"))
    system = load_system(spec)
    assert system.mover.modules.keys() == {"mllm", "dit", "vae"}
    assert system.mover.modules["mllm"] is system.mllm.model
    system.reasoner.speaker.answer([])
    assert system.mover.uses == ["mllm"], "the reasoner's MLLM is the conditioner's, moved by the same mover"


def test_a_reasoner_loads_without_an_editor(tmp_path):
    folder = tiny_checkpoint("qwen2.5-vl", std=0.2)
    loaded = load_reasoner(SystemSpec("", folder, reasoner=f"qwen:{folder}", make_mover=Recorder))
    assert loaded.mllm.can_generate and loaded.mover.modules.keys() == {"mllm"}
    remote = load_reasoner(SystemSpec("", folder, reasoner="remote:http://localhost:1/v1"))
    assert remote.mllm is None and remote.pack_origin["origin"] == "own"
    (tmp_path / "replies.json").write_text(json.dumps({"think": ["x"]}))
    assert load_reasoner(SystemSpec("", folder, reasoner=f"scripted:{tmp_path / 'replies.json'}")).reasoner is not None
    with pytest.raises(ConfigError, match="expected a reasoner out of qwen:PATH"):
        load_reasoner(SystemSpec("", folder, reasoner="none"))


# ---- memory --------------------------------------------------------------------------------------------------------------


def test_a_holder_takes_the_device_that_comfyui_writes_on_it():
    holder = memory.hold("dit", nn.Linear(2, 2))
    assert type(holder).__name__ == "ReasonEditDiT" and holder.device == torch.device("cpu")
    holder.device = torch.device("meta")
    assert {name for name, _ in holder.named_parameters()} == {"module.weight", "module.bias"}


def test_a_component_is_loaded_right_before_each_use_with_what_was_announced(monkeypatch):
    loads = []
    monkeypatch.setattr(host, "make_patcher", lambda name, holder, device: SimpleNamespace(name=name, on_unload=None))
    monkeypatch.setattr(host, "load", lambda patcher, needed: loads.append((patcher.name, needed)))
    mover = memory.ComfyMover({"mllm": nn.Linear(1, 1), "dit": nn.Linear(1, 1)}, torch.device("cpu"))
    mover.need("dit", 123)
    for component in ("dit", "mllm", "dit"):
        with mover(component):
            pass
    assert loads == [("dit", 123), ("mllm", memory.UNKNOWN), ("dit", 123)]
    with pytest.raises(ConfigError, match="expected one of the components mllm, dit"), mover("vae"):
        pass


def test_estimates_grow_with_what_they_count():
    config = SimpleNamespace(
        num_key_value_heads=4,
        hidden_size=3584,
        num_attention_heads=28,
        num_hidden_layers=28,
        intermediate_size=18944,
        vocab_size=152064,
    )
    assert memory.dit_bytes(8192, 3072, 2) == 2 * memory.dit_bytes(4096, 3072, 2)
    assert memory.vae_bytes("reasonedit-q", 1 << 20, 2) > memory.vae_bytes("reasonedit-s", 1 << 20, 2)
    kv = memory.mllm_bytes(0, config, 2, rows=1, cached=1000) - memory.mllm_bytes(0, config, 2)
    assert kv == 57344 * 1000, "57 kB per token in the 7B model"


# ---- folders -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A models folder with a checkpoint of every kind, in place of ComfyUI's."""
    root = tmp_path / "models"
    for name, system in (("S", "step1x-v1p2"), ("VL", "qwen2.5-vl"), ("loose", "comfy-qwen-files")):
        shutil.copytree(tiny_checkpoint(system, std=0.2), root / "reasonedit" / name)
    (root / "reasonedit" / "dialogue").mkdir()
    (root / "reasonedit" / "dialogue" / "own.toml").write_text("")
    (root / "reasonedit" / "empty").mkdir()
    shutil.copytree(tiny_checkpoint("qwen2.5-vl", std=0.2), root / "LLM" / "Qwen-VL" / "Qwen2.5-VL-7B")
    (root / "diffusers" / "other").mkdir(parents=True)
    (root / "diffusers" / "other" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    monkeypatch.setattr(host, "places", lambda key: [root / key])
    monkeypatch.setattr(host, "files", lambda key: ["a.safetensors", "b.gguf"] if key == "diffusion_models" else [])
    return root


def test_the_lists_hold_what_each_loader_can_load(models):
    minis = ["mini-s", "mini-q"]
    assert folders.editor_names() == ["reasonedit/S", "reasonedit/loose", "diffusion_models/a.safetensors", *minis]
    assert folders.text_encoder_names() == ["LLM/Qwen-VL/Qwen2.5-VL-7B", "reasonedit/VL"]
    assert folders.reasoner_names() == [
        *folders.text_encoder_names(),
        "reasonedit/S",
        *minis,
        folders.REMOTE,
        folders.SCRIPTED,
    ]
    assert folders.dialogue_names() == ["auto", "english", "chinese", "dialogue/own.toml"]


def test_entries_lead_to_their_paths_and_nowhere_else(models):
    assert folders.locate("reasonedit/S") == models / "reasonedit" / "S"
    assert folders.locate_dialogue("auto") is None and folders.locate_dialogue("chinese") == "zh"
    assert folders.locate_dialogue("dialogue/own.toml") == models / "reasonedit" / "dialogue" / "own.toml"
    for name in ("reasonedit/gone", "reasonedit/../LLM", "reasonedit/", "reasonedit", f"reasonedit/{models}"):
        with pytest.raises(ConfigError, match="found nothing"):
            folders.locate(name)


def test_the_fingerprint_changes_with_the_files_alone(models):
    place = models / "reasonedit" / "S"
    before = folders.fingerprint([place])
    assert before == folders.fingerprint([place]) and "transformer" in before
    (place / "reasonedit.json").write_text("{}")
    after = folders.fingerprint([place])
    assert after != before
    (place / "notes.md").write_text("words")
    assert folders.fingerprint([place]) == after


def test_the_tokenizer_of_a_single_file(models, monkeypatch):
    monkeypatch.setattr(host, "tokenizer_folder", lambda: Path("carried"))
    file = models / "text_encoders" / "qwen.safetensors"
    file.parent.mkdir()
    assert folders.tokenizer_for(file) == Path("carried")
    file.with_suffix("").mkdir()
    (file.with_suffix("") / "vocab.json").write_text("{}")
    assert folders.tokenizer_for(file) == file.with_suffix("")
    assert folders.tokenizer_for(models / "LLM") is None


# ---- LoRAs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def loras(models, monkeypatch):
    """A models folder with a LoRA of transformer and MLLM, and a PEFT folder of the MLLM."""
    place = models / "loras"
    (place / "tuned").mkdir(parents=True)
    (models / "reasonedit" / "dialogue" / "own.toml").unlink()
    q = "layers.0.self_attn.q_proj"
    pair = {"lora_A.weight": torch.full((2, 64), 0.1), "lora_B.weight": torch.full((64, 2), 0.1)}
    mllm = {f"text_encoders.qwen25_7b.transformer.model.{q}.{end}": value for end, value in pair.items()}
    to_q = "diffusion_model.transformer_blocks.0.attn.to_q"
    dit = {f"{to_q}.lora_A.weight": torch.full((2, 32), 0.1), f"{to_q}.lora_B.weight": torch.full((32, 2), 0.1)}
    save_file(dit | mllm, place / "both.safetensors")
    save_file({f"base_model.model.{q}.{end}": v for end, v in pair.items()}, place / "tuned" / "adapter_model.safetensors")
    (place / "tuned" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    listed = ["both.safetensors", "tuned/adapter_model.safetensors", "tuned/whole.safetensors", "old.pt"]
    kinds = {"loras": listed, "diffusion_models": ["a.safetensors"]}
    monkeypatch.setattr(host, "files", lambda key: kinds.get(key, []))
    monkeypatch.setattr(host, "models_dir", lambda: models)
    monkeypatch.setattr(host, "choose_dtype", lambda name: "float32")
    monkeypatch.setattr(host, "compute_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(memory, "ComfyMover", HostMover)
    return place


class HostMover(Recorder):
    """A mover that is told what to call when a component leaves."""

    def on_unload(self, component, release):
        assert component in self.modules


BOTH, TUNED = "loras/both.safetensors", "loras/tuned/adapter_model.safetensors"


def stack(*names: str, strength: float = 0.5):
    """What a chain of LoRA nodes gives."""
    found = None
    for name in names:
        (found,) = node_models.LoRA.execute(name, strength, found).result
    return found


def test_the_lora_node_lists_files_and_stacks_them(loras):
    assert folders.lora_names() == [BOTH, TUNED], "neither other formats nor the whole tensors of a PEFT folder"
    assert stack(BOTH, TUNED) == (
        Lora(loras / "both.safetensors", 0.5),
        Lora(loras / "tuned" / "adapter_model.safetensors", 0.5),
    )
    with pytest.raises(ConfigError, match="Put one into models/loras"):
        stack(folders.NO_LORA)
    with pytest.raises(ConfigError, match="expected 'gone.safetensors' below models/loras"):
        stack("loras/gone.safetensors")


def test_the_lora_node_sees_a_changed_file_and_a_changed_configuration(loras):
    before = {name: node_models.LoRA.fingerprint_inputs(name) for name in (BOTH, TUNED)}
    (loras / "tuned" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16}))
    after = {name: node_models.LoRA.fingerprint_inputs(name) for name in (BOTH, TUNED)}
    assert before[BOTH] == after[BOTH] and before[TUNED] != after[TUNED]


def linear(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name)


IN_DIT, IN_MLLM = "transformer_blocks.0.attn.to_q", "model.language_model.layers.0.self_attn.q_proj"


def test_the_editor_takes_loras_of_both_parts(loras, monkeypatch):
    how = {"dialogue": "auto", "dtype": "auto", "weights_dtype": "auto", "variant": "auto"}
    editor, reasoner = node_models.load_editor("reasonedit/S", *[folders.FROM_CHECKPOINT] * 2, **how, loras=stack(BOTH))
    layers = linear(editor.generator.denoiser.transformer, IN_DIT), linear(editor.mllm.model, IN_MLLM)
    assert [layer.scaling["lora0"] for layer in layers] == [0.5, 0.5]
    assert reasoner.mllm is editor.mllm
    plain, _ = node_models.load_editor("reasonedit/S", *[folders.FROM_CHECKPOINT] * 2, **how)
    assert not hasattr(linear(plain.mllm.model, IN_MLLM), "lora_A")


def test_the_reasoner_takes_loras_of_the_mllm_and_tells_what_was_left(loras):
    how = {"url": "", "model": "", "replies": "", "dialogue": "auto", "dtype": "auto"}
    reasoner = node_models.load_reasoner("reasonedit/VL", **how, loras=stack(TUNED, BOTH))
    layer = linear(reasoner.mllm.model, IN_MLLM)
    assert layer.scaling == {"lora0": 0.5 * 4 / 2, "lora1": 0.5}
    assert len(reasoner.notes) == 1 and "2 keys of the LoRA match nothing" in reasoner.notes[0]
    with pytest.raises(ConfigError, match="loras: expected none with 'scripted replies'"):
        node_models.load_reasoner(folders.SCRIPTED, **how, loras=stack(TUNED))
