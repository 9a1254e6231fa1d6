"""What was trained arrives unchanged where it is used: our loaders, peft, diffusers, ComfyUI, merged weights."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.load import SystemSpec, load_system
from reasonedit.reasonedit_core.lora import apply_lora, find_linears, merge_lora
from reasonedit.reasonedit_core.lora_keys import normalise
from reasonedit.reasonedit_core.mllm.load import load_mllm
from reasonedit.reasonedit_core.types import EditRequest
from reasonedit.reasonedit_core.weights import load_qwen_transformer, load_step1x_transformer
from reasonedit.tests.comfy_server import comfyui_path
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.training import adapters, merged
from reasonedit.training.adapters import Adapters, Trained, collect, restore
from reasonedit.training.export import export, find_trained, lora_tensors

RANK, ALPHA = 3, 6.0
DIT_TARGETS = r"(single_)?transformer_blocks\.\d+\.(attn\.(to_q|add_k_proj|to_out\.0)|img_mlp\.net\.0\.proj|proj_out)"
MLLM_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.(q|v)_proj|mlp\.down_proj)"
SYSTEMS = {"reasonedit-s": "step1x-v1p2", "reasonedit-q": "qwen-edit-plus"}
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def weights_of(system: str) -> Path:
    return tiny_checkpoint(SYSTEMS.get(system, system), std=0.2)


def load_dit(system: str, path: Path | None = None) -> nn.Module:
    load = load_step1x_transformer if system == "reasonedit-s" else load_qwen_transformer
    return load(path or weights_of(system), dtype=torch.float32)[0].requires_grad_(False)


def load_mllm_model(system: str, path: Path | None = None) -> nn.Module:
    return load_mllm(path or weights_of(system), dtype=torch.float32, need_lm_head=False).model


def draw(name: str, shape, size: float = 0.2) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name)))) * size


def train(module: nn.Module, targets: str, *, how=None, whole: tuple[str, ...] = (), **config) -> nn.Module:
    """A module as training leaves it: a LoRA with drawn weights, and parameters that were trained whole."""
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **config)
    made = get_peft_model(module, config) if how == "get_peft_model" else inject_adapter_in_model(config, module)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.removeprefix("base_model.model.") in whole)
        if "lora_magnitude_vector" in name:
            parameter.data = parameter.data * (1 + draw(name, parameter.shape))
        elif parameter.requires_grad:
            parameter.data = draw(name, parameter.shape)
    return made


def trained(system: str = "reasonedit-q", *, whole: bool = False, mllm: bool = True, **config) -> Adapters:
    connector = {"reasonedit-s": "connector.S.input_embedder", "reasonedit-q": "txt_in"}[system]
    names = (f"{connector}.weight", f"{connector}.bias") if whole else ()
    parts = [collect("dit", train(load_dit(system), DIT_TARGETS, whole=names, **config))]
    if mllm:
        parts.append(collect("mllm", train(load_mllm_model(system), MLLM_TARGETS, **config)))
    return Adapters(system, weights_of(system), tuple(parts), about={"stage": "joint", "steps": "7"})


def expected(one: Trained, module: str, weight: torch.Tensor) -> torch.Tensor:
    """The merged weight of a module, by the formulas of the papers."""
    down, up = one.lora[f"{module}.lora_A"], one.lora[f"{module}.lora_B"]
    moved = weight + ALPHA / (math.sqrt(RANK) if one.config["use_rslora"] else RANK) * up @ down
    if not one.is_dora:
        return moved
    return one.lora[f"{module}.lora_magnitude_vector"][:, None] * moved / moved.square().sum(1, keepdim=True).sqrt()


def linears(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.weight.detach().clone() for name, layer in find_linears(module).items()}


def check_merged(one: Trained, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    assert len(one.modules) >= 4
    for name, weight in before.items():
        if name in one.modules:
            assert torch.allclose(after[name], expected(one, name, weight), atol=2e-5), name
        elif f"{name}.weight" not in one.whole:
            assert torch.equal(after[name], weight), name


# ---- taking, keeping, putting back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["inject", "get_peft_model"])
def test_it_is_taken_from_modules_however_peft_was_put_in(how):
    plain = train(load_dit("reasonedit-q"), DIT_TARGETS, whole=("txt_in.weight",))
    other = train(load_dit("reasonedit-q"), DIT_TARGETS, how=how, whole=("txt_in.weight",))
    one, two = collect("dit", plain), collect("dit", other)
    assert set(one.lora) == set(two.lora) and set(one.whole) == set(two.whole) == {"txt_in.weight"}
    assert one.config == two.config and one.config["lora_alpha"] == ALPHA
    assert all(name.partition(".lora_")[0] in find_linears(load_dit("reasonedit-q")) for name in one.lora)


@pytest.mark.parametrize("root", ["model", "model.language_model", "model.model"])
def test_the_mllm_is_named_from_its_root_wherever_its_lora_was_put(root):
    model = load_mllm_model("reasonedit-q")
    inner = {"model": model, "model.language_model": model.model.language_model, "model.model": model.model}[root]
    train(inner, r"(.*\.)?layers\.\d+\.self_attn\.q_proj")
    names = {f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert set(collect("mllm", inner).modules) == names
    assert set(collect("mllm", model).modules if root == "model" else names) == names


def test_what_was_taken_does_not_change_with_the_module():
    module = train(load_dit("reasonedit-q"), DIT_TARGETS)
    one = collect("dit", module)
    kept = {name: tensor.clone() for name, tensor in one.lora.items()}
    for parameter in module.parameters():
        parameter.data.zero_()
    assert all(torch.equal(one.lora[name], kept[name]) for name in kept)


def test_other_adapters_are_left_alone(tmp_path):
    module = train(load_dit("reasonedit-q"), DIT_TARGETS)
    expected = collect("dit", module)
    one = trained(mllm=False).trained[0]
    other = replace(one, lora={name: 2 * value for name, value in one.lora.items()})
    files = export(Adapters("reasonedit-q", weights_of("reasonedit-q"), (other,)), "comfyui", tmp_path).files
    apply_lora(module, files[0], name="other")
    found = collect("dit", module)
    assert found.lora.keys() == expected.lora.keys()
    assert all(torch.equal(found.lora[name], expected.lora[name]) for name in found.lora)


def test_nothing_trained_is_nothing_and_wrong_names_are_told():
    assert collect("dit", load_dit("reasonedit-q")) is None
    with pytest.raises(ConfigError, match="none called nobody.weight"):
        collect("dit", load_dit("reasonedit-q"), whole=["nobody.weight"])
    with pytest.raises(ConfigError, match="out of dit, mllm, found 'vae'"):
        Trained("vae", whole={"a": torch.ones(1)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_folder_gives_the_same_bits_and_goes_on_training(tmp_path, kind, dtype):
    system = "reasonedit-q"
    module = train(load_dit(system), DIT_TARGETS, whole=("txt_in.weight", "txt_in.bias"), lora_dropout=0.1, **KINDS[kind])
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    one = collect("dit", module)
    adapters.save(Adapters(system, weights_of(system), (one,), about={"stage": "x"}), tmp_path)
    again = adapters.load(tmp_path)
    (two,) = again.trained
    assert (again.system, again.base, dict(again.about)) == (system, weights_of(system), {"stage": "x"})
    assert one.config == two.config and one.modules == two.modules
    for mine, theirs in ((one.lora, two.lora), (one.whole, two.whole)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype == dtype for k in mine)
    state = torch.get_rng_state()
    fresh = load_dit(system)
    restore(fresh, two)
    assert torch.equal(torch.get_rng_state(), state), "going on draws nothing from the global generator"
    old, new = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (module, fresh))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    if dtype == torch.float32:
        for some in (module, fresh):
            torch.manual_seed(0)
            forward(some.train()).square().mean().backward()
        assert all(torch.equal(old[name].grad, new[name].grad) for name in old), "the next step is the same"


def forward(module: nn.Module) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return module(
        hidden_states=torch.randn(1, 4, 64, generator=rng),
        encoder_hidden_states=torch.randn(1, 3, 64, generator=rng),
        encoder_hidden_states_mask=torch.ones(1, 3, dtype=torch.bool),
        timestep=torch.tensor([0.3]),
        img_shapes=[[(1, 2, 2)]],
    )[0]


def test_restoring_into_another_model_is_refused(tmp_path):
    one = collect("dit", train(load_dit("reasonedit-s"), DIT_TARGETS))
    with pytest.raises((CheckpointError, ValueError)):
        restore(load_dit("reasonedit-q"), one)
    small = replace(one, lora={k: v[:, :-1] if k.endswith("lora_A") else v for k, v in one.lora.items()})
    with pytest.raises(CheckpointError, match="expected a dit that fits what was trained"):
        restore(load_dit("reasonedit-s"), small)
    few = replace(one, lora={name: value for name, value in one.lora.items() if ".to_q." in name})
    with pytest.raises(CheckpointError, match="expected a dit that fits what was trained"):
        restore(train(load_dit("reasonedit-s"), DIT_TARGETS), few)  # its other LoRAs would keep what they hold
    with pytest.raises(CheckpointError, match="trained.json"):
        adapters.load(tmp_path)


def test_stages_are_combined_part_by_part():
    whole = {name: torch.full((1,), float(number)) for number, name in enumerate(("a.weight", "b.weight"))}
    lora = {f"m.{half}": torch.ones(1, 1) for half in ("lora_A", "lora_B")}

    def of(*parts: Trained) -> Adapters:
        return Adapters("reasonedit-q", Path("base"), parts)

    first = of(
        Trained("mllm", lora, {"lora_alpha": 1}), Trained("dit", lora, {"lora_alpha": 2}, {"a.weight": whole["a.weight"]})
    )
    new = {"a.weight": whole["b.weight"], "b.weight": whole["b.weight"]}
    both = adapters.combine(first, of(Trained("dit", whole=new)))
    assert [one.part for one in both.trained] == ["dit", "mllm"]
    assert both.trained[0].config == {"lora_alpha": 2} and both.trained[0].whole == new
    assert both.trained[1] is first.trained[0]
    later = of(Trained("dit", lora, {"lora_alpha": 3}))
    assert adapters.combine(first, later).trained[0].config == {"lora_alpha": 3}
    assert set(adapters.combine(first, later).trained[0].whole) == {"a.weight"}
    with pytest.raises(ConfigError, match="one system"):
        adapters.combine(first, replace(later, system="reasonedit-s"))


# ---- LoRA files in our own loaders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_files_merge_to_the_formula_in_our_loaders(tmp_path, system, kind):
    made = trained(system, whole=True, **KINDS[kind])
    done = export(made, "comfyui", tmp_path, name="mine")
    assert [file.name for file in done.files] == ["mine_dit.safetensors", "mine_mllm.safetensors"]
    for file, one, module in zip(done.files, made.trained, (load_dit(system), load_mllm_model(system)), strict=True):
        before = linears(module)
        report = merge_lora(module, file)
        assert report.unmatched == () and set(report.modules) == set(one.modules)
        check_merged(one, before, linears(module))
        for name, tensor in one.whole.items():
            assert torch.equal(module.get_parameter(name), tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_they_equal_pefts_own_merge(tmp_path, kind):
    made = trained(mllm=False, **KINDS[kind])
    (file,) = export(made, "comfyui", tmp_path).files
    tuned = load_dit("reasonedit-q")
    restore(tuned, made.trained[0])
    for layer in tuned.modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "merge"):
            layer.merge()
    merged_by_peft, ours = linears(tuned), load_dit("reasonedit-q")
    merge_lora(ours, file)
    assert all(torch.allclose(weight, merged_by_peft[name], atol=2e-5) for name, weight in linears(ours).items())


def test_alpha_says_the_gain_times_the_rank(tmp_path):
    for kind, alpha in (("lora", ALPHA), ("rslora", ALPHA * math.sqrt(RANK))):
        (file, _) = export(trained(**KINDS[kind]), "comfyui", tmp_path, name=kind).files
        found = {value.item() for key, value in load_file(file).items() if key.endswith(".alpha")}
        assert len(found) == 1 and found.pop() == pytest.approx(alpha), kind


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 5),
    alpha=st.floats(0.01, 64),
    root=st.booleans(),
    own=st.dictionaries(st.sampled_from(["to_q", "attn.to_k", "blocks.1.to_q"]), st.floats(0.01, 64), max_size=2),
)
def test_every_gain_survives_the_file(rank, alpha, root, own):
    names = ("blocks.0.attn.to_q", "blocks.1.to_q", "blocks.1.attn.to_k")
    lora = {
        f"{name}.{half}": torch.ones(*size) for name in names for half, size in (("lora_A", (rank, 4)), ("lora_B", (3, rank)))
    }
    one = Trained("dit", lora, {"r": rank, "lora_alpha": alpha, "use_rslora": root, "alpha_pattern": own})
    made = Adapters("reasonedit-q", Path("base"), (one,))
    found = normalise(lora_tensors(made, one, None), dict.fromkeys(names, (4, 3)))
    assert found.unmatched == ()
    for name in names:
        stated = next((value for key, value in own.items() if f".{name}".endswith(f".{key}")), alpha)
        assert found.pairs[name].gain == pytest.approx(stated / (math.sqrt(rank) if root else rank), rel=1e-6)


def test_the_header_says_what_it_is_and_where_it_loads(tmp_path):
    for system, words in (
        ("reasonedit-s", "no other program has this model"),
        ("reasonedit-q", "ComfyUI's LoRA loaders, diff"),
    ):
        done = export(trained(system, mllm=False), "comfyui", tmp_path, name=system)
        with safe_open(str(done.files[0]), "pt") as file:
            header = file.metadata()
        assert header["reasonedit.system"] == system and header["reasonedit.part"] == "dit"
        assert words in header["reasonedit.loads_in"] and words in done.notes[0]
        assert (header["reasonedit.rank"], header["reasonedit.stage"]) == (str(RANK), "joint")
        assert str(Path.home()) not in json.dumps(header) and os.sep not in header["reasonedit.base"]


def test_a_dora_warns_of_diffusers_and_whole_tensors_of_who_cannot_read_them(tmp_path):
    notes = export(trained(whole=True, mllm=False, use_dora=True), "comfyui", tmp_path).notes
    assert "2 parameters that were trained whole" in notes[0] and "diffusers and peft do not" in notes[0]
    (note,) = export(trained("reasonedit-s", whole=True, mllm=False), "comfyui", tmp_path).notes
    assert "peft does not" in note and "diffusers" not in note.removeprefix(str(tmp_path))
    assert "diffusers ignores its dora_scale" in notes[1]
    assert len(export(trained(mllm=False), "comfyui", tmp_path).notes) == 1


def test_the_dtype_can_be_chosen(tmp_path):
    (file,) = export(trained(mllm=False), "comfyui", tmp_path, dtype="bfloat16").files
    dtypes = {key.rpartition(".lora_")[1] and value.dtype for key, value in load_file(file).items() if ".lora_" in key}
    assert dtypes == {torch.bfloat16}
    with pytest.raises(ConfigError, match="float32, bfloat16, float16, found 'int8'"):
        export(trained(mllm=False), "comfyui", tmp_path, dtype="int8")
    with pytest.raises(ConfigError, match="comfyui, peft, merged, found 'onnx'"):
        export(trained(mllm=False), "onnx", tmp_path)


def test_an_export_of_another_base_is_refused_not_written_in_silence(tmp_path):
    made = trained("reasonedit-s", mllm=False)
    with pytest.raises(CheckpointError):
        export(replace(made, base=weights_of("reasonedit-q")), "merged", tmp_path)
    one = replace(made.trained[0], lora={k.replace("blocks.1.", "blocks.7."): v for k, v in made.trained[0].lora.items()})
    with pytest.raises(CheckpointError, match="expected every key to meet a module"):
        export(replace(made, trained=(one,)), "comfyui", tmp_path)


# ---- pictures ------------------------------------------------------------------------------------------------------------


def picture(system: str, weights: Path | None = None, loras=()) -> torch.Tensor:
    spec = SystemSpec(
        system,
        weights or weights_of(system),
        reasoner="none",
        dtype="float32",
        device="cpu",
        loras=tuple((p, 1.0) for p in loras),
    )
    image = torch.rand(1, 3, 40, 56, generator=torch.Generator().manual_seed(3))
    request = EditRequest(image, 'write "Hi" on it', steps=2, guidance=3.0, size_level=64)
    generator = load_system(spec).generator
    return generator.edit(request, image, request.instruction, torch.Generator().manual_seed(0)).latents


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_picture_of_the_files_is_that_of_the_merged_weights_and_of_the_peft_folders(tmp_path, system, kind):
    made = trained(system, whole=True, **KINDS[kind])
    files = export(made, "comfyui", tmp_path, name="mine").files
    (folder, *_) = export(made, "merged", tmp_path, name="mine").files
    assert folder == tmp_path / "mine_merged"
    plain, tuned = picture(system), picture(system, loras=files)
    assert (tuned - plain).abs().max() > 1e-2, "the LoRA changes the picture"
    assert torch.allclose(tuned, picture(system, folder), atol=5e-4)
    export(made, "peft", tmp_path, name="mine")
    assert torch.allclose(tuned, picture(system, loras=(tmp_path / "mine_dit", tmp_path / "mine_mllm")), atol=5e-4)


# ---- merged weights ------------------------------------------------------------------------------------------------------


def test_a_merged_folder_differs_in_what_was_trained_alone(tmp_path):
    made = trained(whole=True)
    export(made, "merged", tmp_path)
    old, new = weights_of("reasonedit-q"), tmp_path / "reasonedit_merged"
    files = {path.relative_to(old) for path in old.rglob("*") if path.is_file()}
    assert {path.relative_to(new) for path in new.rglob("*") if path.is_file()} == files | {Path(merged.MARK)}
    names = {"dit": merged.targets(made.trained[0]), "mllm": merged.targets(made.trained[1])}
    for file in files:
        if file.suffix != ".safetensors":
            assert (old / file).read_bytes() == (new / file).read_bytes()
            continue
        before, after = load_file(old / file), load_file(new / file)
        assert list(before) == list(after)
        part = {"transformer": "dit", "text_encoder": "mllm"}.get(file.parts[0])
        for key in before:
            name = key if part == "dit" else key.replace("model.", "model.language_model.", 1)
            changed = part is not None and name in names[part]
            assert torch.equal(before[key], after[key]) != changed, key


@pytest.mark.parametrize("name", ["step1x-v1p0-files", "step1x-v1p1", "comfy-qwen-files"])
def test_single_files_and_original_names_are_merged_too(tmp_path, name):
    system = "reasonedit-q" if "qwen" in name else "reasonedit-s"
    base = copy_of(name, tmp_path / "base")
    load = load_step1x_transformer if system == "reasonedit-s" else load_qwen_transformer
    module = load(base, dtype=torch.float32)[0].requires_grad_(False)
    before = linears(module)
    one = collect("dit", train(module, DIT_TARGETS))
    export(Adapters(system, base, (one,)), "merged", tmp_path)
    check_merged(one, before, linears(load(tmp_path / "reasonedit_merged", dtype=torch.float32)[0]))
    if name != "comfy-qwen-files":  # whose tiny sizes need a config.json beside the tokenizer
        spec = SystemSpec(system, tmp_path / "reasonedit_merged", reasoner="none", dtype="float32", device="cpu")
        assert load_system(spec).generator is not None


def test_parts_from_several_places_become_one_folder(tmp_path):
    mixed = {"text_encoder": tiny_checkpoint("qwen2.5-vl", std=0.2), "vae": weights_of("reasonedit-q") / "vae"}
    made = trained()
    made = replace(made, base=weights_of("reasonedit-q") / "transformer", pieces=mixed)
    adapters.save(replace(made, pieces={**mixed, "vae": tmp_path / "away"}), tmp_path / "run")
    with pytest.raises(CheckpointError):
        export(tmp_path / "run", "merged", tmp_path)
    folder = export(tmp_path / "run", "merged", tmp_path, pieces=mixed).files[0]
    assert {path.name for path in folder.iterdir()} == {"transformer", "text_encoder", "vae", merged.MARK}
    before = linears(load_mllm(mixed["text_encoder"], dtype=torch.float32, need_lm_head=False).model)
    check_merged(made.trained[1], before, linears(load_mllm_model("reasonedit-q", folder)))
    check_merged(made.trained[0], linears(load_dit("reasonedit-q")), linears(load_dit("reasonedit-q", folder)))


def copy_of(name: str, folder: Path) -> Path:
    shutil.copytree(tiny_checkpoint(name, std=0.2), folder)
    if name == "comfy-qwen-files":
        weights = shutil.ignore_patterns("model*", "config.json")
        shutil.copytree(tiny_checkpoint("qwen2.5-vl", std=0.2), folder / "tokenizer", ignore=weights)
    return folder


def test_low_bit_bases_are_merged_in_full(tmp_path):
    from reasonedit.reasonedit_core.fp8 import quantize_tensor

    base = copy_of("comfy-qwen-files", tmp_path / "base")
    (file,) = (base / "diffusion_models").glob("*.safetensors")
    state = {}
    for key, value in load_file(file).items():
        if value.ndim == 2:
            state[key], state[key.replace(".weight", ".scale_weight")] = quantize_tensor(value)
        else:
            state[key] = value
    save_file(state | {"scaled_fp8": torch.ones(1)}, file)
    module = load_qwen_transformer(base, dtype=torch.float32, weights_dtype="full")[0]
    before = linears(module)
    one = collect("dit", train(module, DIT_TARGETS))
    export(Adapters("reasonedit-q", base, (one,)), "merged", tmp_path)
    (written,) = (tmp_path / "reasonedit_merged" / "diffusion_models").glob("*.safetensors")
    assert not any("scale" in key for key in load_file(written))
    after = linears(load_qwen_transformer(written, dtype=torch.float32)[0])
    for name in one.modules:
        assert torch.allclose(after[name], expected(one, name, before[name]), atol=0.02)


def test_shards_that_become_one_file_leave_no_index(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(weights_of("reasonedit-q"), base)
    for shard in (base / "transformer").glob("*.safetensors"):
        state = {key: value.to(torch.float8_e4m3fn) if value.ndim == 2 else value for key, value in load_file(shard).items()}
        save_file(state, shard, metadata={"format": "pt"})
    module = load_qwen_transformer(base, dtype=torch.float32, weights_dtype="full")[0].requires_grad_(False)
    made = Adapters("reasonedit-q", base, (collect("dit", train(module, DIT_TARGETS)),))
    folder = export(made, "merged", tmp_path).files[0]
    names = {path.name for path in (folder / "transformer").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_scale_factor_that_loading_folds_is_not_applied_twice(tmp_path):
    """v1.0's factor belongs to a weight that may have been trained with it folded in."""
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint("step1x-v1p1", std=0.2), base)
    state = {}
    for file in sorted((base / "transformer").glob("*.safetensors*")):
        state |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    state["connector.scale_factor"] = torch.tensor([-0.5])
    save_file(state, base / "transformer" / "diffusion_pytorch_model.safetensors")
    module = load_dit("reasonedit-s", base)
    before = linears(module)
    name = "connector.global_proj_out.weight"
    one = collect("dit", train(module, DIT_TARGETS, whole=(name,)))
    after = load_dit("reasonedit-s", export(Adapters("reasonedit-s", base, (one,)), "merged", tmp_path).files[0])
    assert torch.equal(after.get_parameter(name), one.whole[name])
    check_merged(one, before, linears(after))


def test_a_single_file_of_2511_says_so(tmp_path):
    base = tiny_checkpoint("qwen-edit-2511", std=0.2)
    module = load_dit("reasonedit-q", base)
    names = [name for name, _ in module.named_parameters()]
    made = Adapters("reasonedit-q", base, (collect("dit", module, whole=names),))
    (file,) = export(made, "comfyui", tmp_path).files
    assert load_dit("reasonedit-q", file).config.zero_cond_t
    folder = export(made, "merged", tmp_path).files[0]
    assert load_dit("reasonedit-q", folder).config.zero_cond_t


def test_a_merged_folder_is_written_anew_but_nothing_else_is_overwritten(tmp_path):
    made = trained(mllm=False)
    export(made, "merged", tmp_path)
    export(made, "merged", tmp_path)
    (tmp_path / "reasonedit_merged" / merged.MARK).unlink()
    with pytest.raises(ConfigError, match="found something that is no merged export"):
        export(made, "merged", tmp_path)
    assert not list(tmp_path.glob(".*.part"))


def test_a_part_that_was_trained_as_a_whole_is_a_file_of_weights(tmp_path):
    module = load_dit("reasonedit-q")
    names = [name for name, _ in module.named_parameters() if not name.startswith("txt_")]
    for name in names:
        module.get_parameter(name).data += 0.1
    made = Adapters("reasonedit-q", weights_of("reasonedit-q"), (collect("dit", module, whole=names),))
    done = export(made, "comfyui", tmp_path)
    assert "models/diffusion_models" in done.notes[0] and "not a LoRA" in done.notes[0]
    again = load_qwen_transformer(done.files[0], dtype=torch.float32)[0]
    assert all(torch.equal(again.get_parameter(name), value) for name, value in module.named_parameters())
    folder = export(made, "merged", tmp_path).files[0]
    again = load_qwen_transformer(folder, dtype=torch.float32)[0]
    assert all(torch.equal(again.get_parameter(name), value) for name, value in module.named_parameters())


# ---- folders -------------------------------------------------------------------------------------------------------------


def test_a_run_folder_is_found_and_a_choice_is_told(tmp_path):
    made = trained(mllm=False)
    adapters.save(made, tmp_path / "run" / "1-reasoning")
    assert find_trained(tmp_path / "run") == tmp_path / "run" / "1-reasoning"
    done = export(tmp_path / "run", "comfyui", tmp_path / "out")
    assert load_file(done.files[0]).keys() == load_file(export(made, "comfyui", tmp_path / "other").files[0]).keys()
    adapters.save(made, tmp_path / "run" / "2-editing")
    with pytest.raises(CheckpointError, match="found 1-reasoning, 2-editing"):
        export(tmp_path / "run", "comfyui", tmp_path)


def test_moved_weights_are_named_anew(tmp_path):
    made = replace(trained(mllm=False, use_dora=True), base=tmp_path / "away")
    adapters.save(made, tmp_path / "run")
    with pytest.raises(CheckpointError, match="expected the weights that the DoRA was trained from"):
        export(tmp_path / "run", "comfyui", tmp_path)
    assert export(tmp_path / "run", "comfyui", tmp_path, base=weights_of("reasonedit-q")).files


def test_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    made = trained(mllm=False)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    for format in ("comfyui", "peft", "merged"):
        with pytest.raises(ConfigError, match="No space left on device.*has room"):
            export(made, format, tmp_path / "out")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# ---- peft ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_peft_loads_the_folders(tmp_path, system, kind):
    from peft import PeftModel

    made = trained(system, **KINDS[kind])
    export(made, "peft", tmp_path, name="mine")
    for one, module in zip(made.trained, (load_dit(system), load_mllm_model(system)), strict=True):
        before = linears(module)
        loaded = PeftModel.from_pretrained(module, tmp_path / f"mine_{one.part}", is_trainable=True)
        again = collect(one.part, loaded)
        assert again.lora.keys() == one.lora.keys() and again.whole == {}
        assert all(torch.equal(again.lora[key], one.lora[key]) for key in one.lora)
        check_merged(one, before, linears(loaded.merge_and_unload()))


def test_our_loaders_take_the_folders(tmp_path):
    made = trained(whole=True, use_rslora=True)
    export(made, "peft", tmp_path, name="mine")
    module = load_dit("reasonedit-q")
    before = linears(module)
    report = apply_lora(module, tmp_path / "mine_dit")
    assert report.unmatched == () and len(report.whole) == 2
    other = load_dit("reasonedit-q")
    merge_lora(other, tmp_path / "mine_dit")
    check_merged(made.trained[0], before, linears(other))


# ---- diffusers -----------------------------------------------------------------------------------------------------------


def through_diffusers(file: Path) -> dict[str, torch.Tensor]:
    """The file's tensors as a pipeline of diffusers reads them."""
    from diffusers.loaders import QwenImageLoraLoaderMixin

    read = QwenImageLoraLoaderMixin.lora_state_dict(str(file.parent), weight_name=file.name)
    return read[0] if isinstance(read, tuple) else read


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_diffusers_loads_the_file_of_q(tmp_path, kind):
    """Through the door that pipelines use, onto the bare transformer."""
    made = trained(mllm=False, **KINDS[kind])
    (file,) = export(made, "comfyui", tmp_path).files
    module = load_dit("reasonedit-q")
    before = linears(module)
    module.load_lora_adapter(through_diffusers(file), adapter_name="mine", prefix="transformer")
    (one,) = made.trained
    wrapped = {name for name, layer in module.named_modules() if hasattr(layer, "lora_A")}
    assert wrapped == set(one.modules), "every key met its module"
    module.fuse_lora()
    check_merged(one, before, linears(module))


def test_diffusers_drops_the_magnitudes_of_a_dora_as_we_warn(tmp_path):
    (file,) = export(trained(mllm=False, use_dora=True), "comfyui", tmp_path).files
    state = through_diffusers(file)
    assert state and not any("dora" in key or "magnitude" in key for key in state)


# ---- the real ComfyUI ----------------------------------------------------------------------------------------------------

COMFY = """
import json, logging, sys
comfy_path, base, out, *files = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, comfy_path)
import comfy.options
comfy.options.enable_args_parsing()
import torch
from safetensors.torch import load_file, save_file
import comfy.lora, comfy.model_base, comfy.model_patcher, comfy.ops, comfy.supported_models, comfy.utils
import comfy.text_encoders.llama

warned = []
class Listen(logging.Handler):
    def emit(self, record):
        warned.append(record.getMessage())
logging.getLogger().addHandler(Listen())
config = json.loads(open(base + "/transformer/config.json").read())
unet = {name: config[name] for name in ("num_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim")}
unet |= {"image_model": "qwen_image", "in_channels": 64, "axes_dims_rope": tuple(config["axes_dims_rope"])}
model = comfy.model_base.QwenImage(comfy.supported_models.QwenImage(unet), device=torch.device("cpu"))
model.diffusion_model.to(torch.float32)
weights = {}
for file in sorted(__import__("pathlib").Path(base, "transformer").glob("*.safetensors")):
    weights |= load_file(file)
missing, unexpected = model.diffusion_model.load_state_dict(weights, strict=False)
assert not missing and not unexpected, (missing, unexpected)
keys = comfy.lora.model_lora_keys_unet(model, {})
state = comfy.utils.load_torch_file(files[0], safe_load=True)
patches = comfy.lora.load_lora(state, keys, log_missing=True)
cpu = torch.device("cpu")
patcher = comfy.model_patcher.ModelPatcher(model, cpu, cpu)
applied = patcher.add_patches(patches, 1.0)
patcher.patch_model(cpu)
after = {name.removeprefix("diffusion_model."): value.clone() for name, value in model.state_dict().items()}
told = {"dit": {"patches": len(patches), "applied": len(applied), "warned": list(warned)}}

warned.clear()
class Stand(torch.nn.Module):
    "The text encoder of Qwen-Image with the real class in it, its tensors without memory."
    def __init__(self):
        super().__init__()
        self.qwen25_7b = torch.nn.Module()
        real = comfy.text_encoders.llama.Qwen25_7BVLI
        self.qwen25_7b.transformer = real({}, torch.float32, "meta", comfy.ops.disable_weight_init)
clip = Stand()
keys = comfy.lora.model_lora_keys_clip(clip, {})
state = comfy.utils.load_torch_file(files[1], safe_load=True)
patches = comfy.lora.load_lora(state, keys, log_missing=True)
told["mllm"] = {"patches": sorted(patches), "warned": list(warned)}
save_file({name: value.contiguous() for name, value in after.items()}, out + "/after.safetensors")
open(out + "/told.json", "w").write(json.dumps(told))
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_comfyui_matches_every_key_and_arrives_at_the_same_weights(tmp_path, kind):
    comfy = comfyui_path()
    made = trained(whole=True, **KINDS[kind])
    files = export(made, "comfyui", tmp_path).files
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    command = [python, "-c", COMFY, str(comfy), str(weights_of("reasonedit-q")), str(tmp_path), *map(str, files)]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=comfy, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads((tmp_path / "told.json").read_text())
    dit, mllm = made.trained
    count = len(dit.modules) + len(dit.whole)
    assert told["dit"] == {"patches": count, "applied": count, "warned": []}, "no `lora key not loaded`"
    assert told["mllm"]["warned"] == [] and len(told["mllm"]["patches"]) == len(mllm.modules)
    assert told["mllm"]["patches"][0].startswith("qwen25_7b.transformer.model.layers.0.mlp.down_proj")
    after = load_file(tmp_path / "after.safetensors")
    check_merged(dit, linears(load_dit("reasonedit-q")), {n: after[f"{n}.weight"] for n in linears(load_dit("reasonedit-q"))})
    for name, tensor in dit.whole.items():
        assert torch.equal(after[name], tensor)
