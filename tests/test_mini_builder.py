"""The tiny checkpoints: same bits everywhere, the released layouts, strict loads by the libraries that read those."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.mini import configs, layouts
from reasonedit.reasonedit_core.mini.builder import SYSTEMS, build_checkpoint
from reasonedit.tests.tiny import tiny_checkpoint

TOKENIZER = {"vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"}
TOKENIZER |= {"chat_template.jinja"}
MLLM = {"config.json", "generation_config.json", "model.safetensors.index.json"}
MLLM |= {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
STOCK = MLLM | TOKENIZER | {"tokenizer.json", "preprocessor_config.json"}
SHARDED = {"config.json", "diffusion_pytorch_model.safetensors.index.json"}
SHARDED |= {f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)}
SINGLE = {"config.json", "diffusion_pytorch_model.safetensors"}
PROCESSOR = TOKENIZER | {"tokenizer.json", "preprocessor_config.json"}
COMMON = {"model_index.json", "scheduler/scheduler_config.json"}


def _under(folder: str, names: set[str]) -> set[str]:
    return {f"{folder}/{name}" for name in names}


_STEP1X = COMMON | _under("transformer", SHARDED) | _under("vae", SINGLE) | _under("processor", PROCESSOR)
_QWEN = _STEP1X | _under("text_encoder", MLLM) | _under("tokenizer", TOKENIZER)
FILES = {
    "step1x-v1p2": _STEP1X | _under("text_encoder", STOCK),
    "step1x-v1p1": _STEP1X | _under("text_encoder", MLLM),
    "step1x-v1p0-files": {"step1x-edit-i1258.safetensors", "vae.safetensors"} | _under("Qwen2.5-VL-7B-Instruct", STOCK),
    "qwen-edit": _QWEN,
    "qwen-edit-plus": _QWEN,
    "qwen-edit-2511": _QWEN,
    "qwen2.5-vl": STOCK,
    "comfy-qwen-files": {
        "diffusion_models/qwen_image_edit_2509.safetensors",
        "text_encoders/qwen_2.5_vl.safetensors",
        "vae/qwen_image_vae.safetensors",
    },
}
DIGESTS = {
    "step1x-v1p2": "694fd2868647a3ce",
    "step1x-v1p1": "60047d7743518aab",
    "step1x-v1p0-files": "acf96d30c83a54ef",
    "qwen-edit": "3d7857066658a9b3",
    "qwen-edit-plus": "3d7857066658a9b3",
    "qwen-edit-2511": "3d7857066658a9b3",
    "qwen2.5-vl": "663e41a864ff775c",
    "comfy-qwen-files": "6ff77a0ce464c975",
}
QWEN_FOLDERS = ("qwen-edit", "qwen-edit-plus", "qwen-edit-2511")
MLLM_FOLDERS = ("step1x-v1p2/text_encoder", "step1x-v1p1/text_encoder", "step1x-v1p0-files/Qwen2.5-VL-7B-Instruct")
MLLM_FOLDERS += ("qwen-edit/text_encoder", "qwen2.5-vl")


def _place(path: str) -> Path:
    system, _, inside = path.partition("/")
    return tiny_checkpoint(system) / inside


def _state(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def _names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def _tensor_digest(folder: Path) -> str:
    """sha256 over names, types, shapes and values only: how safetensors writes its header is not ours to pin."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        for key, tensor in sorted(load_file(path).items()):
            digest.update(f"{key}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("system", SYSTEMS)
def test_layout_and_recorded_bits(system):
    folder = tiny_checkpoint(system)
    assert _names(folder) == FILES[system]
    assert _tensor_digest(folder)[:16] == DIGESTS[system]


def test_two_builds_are_equal_and_another_seed_is_not(tmp_path):
    first = tiny_checkpoint("step1x-v1p2")
    second = build_checkpoint("step1x-v1p2", tmp_path / "again")
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in _names(first))
    other = _state(build_checkpoint("step1x-v1p2", tmp_path / "other", seed=1) / "transformer")
    assert not any(torch.equal(other[key], tensor) for key, tensor in _state(first / "transformer").items())


def test_shard_index_points_to_each_tensor():
    folder = tiny_checkpoint("step1x-v1p2") / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    found = {key: path.name for path in folder.glob("*.safetensors") for key in load_file(path)}
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in _state(folder).values())


def test_nothing_is_zero_and_norms_are_about_one():
    state = _state(tiny_checkpoint("step1x-v1p2") / "transformer") | _state(tiny_checkpoint("qwen-edit") / "vae")
    for key, tensor in state.items():
        centre = 1.0 if tensor.numel() == max(tensor.shape) and not key.endswith("bias") else 0.0
        deviation = (tensor - centre).pow(2).mean().sqrt().item()
        assert abs(deviation - 0.05) < 0.05 * 5 / math.sqrt(2 * tensor.numel()), key


def test_dtype_and_deviation(tmp_path):
    folder = build_checkpoint("qwen2.5-vl", tmp_path, dtype=torch.bfloat16, std=0.2)
    state = _state(folder)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert abs(state["lm_head.weight"].float().std() - 0.2) < 0.01
    assert abs(state["model.norm.weight"].float().std() - 0.05) < 0.02


# Sizes that the released checkpoints are known to have.
RELEASED_STEP1X = {
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "connector_heads_num": 32,
    "connector_hidden_size": 4096,
    "connector_in_channels": 3584,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
}
RELEASED_MLLM = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
}
RELEASED_QWEN = {
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
}


def _shapes(system: str, component: str, **overrides) -> layouts.Shapes:
    part = configs.components(system, torch.float32, overrides)[component]
    return part.shapes(part.config)


def _count(shapes: layouts.Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def test_released_sizes_give_the_released_counts():
    sizes = {"transformer": RELEASED_STEP1X, "text_encoder": RELEASED_MLLM}
    v1p1, v1p2 = (_shapes(s, "transformer", **sizes) for s in ("step1x-v1p1", "step1x-v1p2"))
    assert (len(v1p1), len(v1p2)) == (1196, 1198)
    assert round(_count(v1p1) / 1e9, 4) == 12.4278
    assert round(_count(v1p2) / 1e9, 4) == 12.4425
    flux = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
    assert _count(_shapes("step1x-v1p1", "vae", vae=flux)) == 83_819_683
    sizes = {"transformer": RELEASED_QWEN, "text_encoder": RELEASED_MLLM}
    assert round(_count(_shapes("qwen-edit", "transformer", **sizes)) / 1e9, 3) == 20.430
    assert round(_count(_shapes("qwen-edit", "vae", vae={"base_dim": 96})) / 1e9, 3) == 0.127
    assert round(_count(_shapes("qwen2.5-vl", "text_encoder", text_encoder=RELEASED_MLLM)) / 1e9, 3) == 8.292


def test_tiny_sizes_are_those_of_the_design():
    shapes = _shapes("step1x-v1p1", "transformer")
    assert (len(shapes), _count(shapes)) == (148, 350_208)
    assert set(_shapes("step1x-v1p2", "transformer")) - set(shapes) == {
        "text_token_mapping.weight",
        "text_token_mapping.bias",
    }


@pytest.mark.parametrize("folder", MLLM_FOLDERS)
def test_transformers_loads_the_mllm_strictly(folder):
    from transformers import Qwen2_5_VLForConditionalGeneration

    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(_place(folder), output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    text = model.config.get_text_config()
    assert (text.hidden_size, text.rms_norm_eps, model.config.image_token_id) == (64, 1e-6, 262)
    expected = _state(_place(folder))["lm_head.weight"]
    assert torch.equal(model.lm_head.weight, expected.to(model.dtype))
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)


def test_config_is_flat_and_has_the_nested_copy_only_where_released():
    flat = json.loads((tiny_checkpoint("qwen2.5-vl") / "config.json").read_text())
    both = json.loads((tiny_checkpoint("qwen-edit") / "text_encoder" / "config.json").read_text())
    assert flat["hidden_size"] == both["hidden_size"] == both["text_config"]["hidden_size"] == 64
    assert "text_config" not in flat and "vision_config" not in both["text_config"]


@pytest.mark.parametrize("system", QWEN_FOLDERS)
def test_diffusers_loads_the_qwen_parts_strictly(system):
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel

    folder = tiny_checkpoint(system)
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == ("QwenImageEditPipeline" if system == "qwen-edit" else "QwenImageEditPlusPipeline")
    for part, kind in (("transformer", QwenImageTransformer2DModel), ("vae", AutoencoderKLQwenImage)):
        model, info = kind.from_pretrained(folder / part, output_loading_info=True)
        assert not any(info.values())
        assert len(model.state_dict()) == len(_state(folder / part))
        if part == "transformer":
            assert model.config.zero_cond_t is (system == "qwen-edit-2511")
            assert (model.config.in_channels, model.config.out_channels) == (64, 16)


def test_diffusers_loads_the_flux_vae_and_the_schedulers():
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

    folder = tiny_checkpoint("step1x-v1p2")
    model, info = AutoencoderKL.from_pretrained(folder / "vae", output_loading_info=True)
    assert not any(info.values())
    assert (model.config.scaling_factor, model.config.shift_factor) == (0.3611, 0.1159)
    assert len(model.state_dict()) == len(_state(folder / "vae"))
    step1x = FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    qwen = FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_checkpoint("qwen-edit") / "scheduler")
    found = [(s.config.max_shift, s.config.max_image_seq_len, s.config.shift_terminal) for s in (step1x, qwen)]
    assert found == [(1.15, 4096, None), (0.9, 8192, 0.02)]


@pytest.mark.parametrize("channels", [[8, 8, 8, 8], [8, 16, 16, 32]])
def test_flux_single_file_is_the_folder_in_other_names(tmp_path, channels):
    """Converted back by diffusers itself, with and without shortcuts."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    sizes = {"vae": {"block_out_channels": channels, "layers_per_block": 2}}
    original = build_checkpoint("step1x-v1p0-files", tmp_path / "files", config=sizes) / "vae.safetensors"
    folder = build_checkpoint("step1x-v1p1", tmp_path / "folder", config=sizes) / "vae"
    found = convert_ldm_vae_checkpoint(load_file(original), json.loads((folder / "config.json").read_text()))
    expected = _state(folder)
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_comfy_files_are_the_folder_in_other_names():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    files, folder = tiny_checkpoint("comfy-qwen-files"), tiny_checkpoint("qwen-edit-plus")
    vae = convert_wan_vae_to_diffusers(_state(files / "vae"))
    dit = {key.removeprefix("model.diffusion_model."): t for key, t in _state(files / "diffusion_models").items()}
    pairs = [(vae, "vae"), (dit, "transformer"), (_state(files / "text_encoders"), "text_encoder")]
    for found, part in pairs:
        expected = _state(folder / part)
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert {"encoder.conv1.weight", "decoder.head.2.bias", "conv2.weight"} <= set(_state(files / "vae"))


def test_step1x_single_file_is_the_folder_in_other_names():
    original = load_file(tiny_checkpoint("step1x-v1p0-files") / "step1x-edit-i1258.safetensors")
    state = _state(tiny_checkpoint("step1x-v1p1") / "transformer")
    assert len(original) == 121
    assert original["connector.scale_factor"].shape == (1,)
    assert -1.2 < original["connector.scale_factor"].item() < -0.6
    # Every number of the folder is in the file once, and the rows of the fused tensors stand in the released order.
    assert sum(t.numel() for t in original.values()) - 1 == sum(t.numel() for t in state.values())
    double = original["double_blocks.1.txt_attn.qkv.weight"].split(32)
    single = original["single_blocks.0.linear1.bias"].split((32, 32, 32, 128))
    shift, scale = original["final_layer.adaLN_modulation.1.weight"].chunk(2)
    for name, part in zip(("add_q_proj", "add_k_proj", "add_v_proj"), double, strict=True):
        assert torch.equal(part, state[f"transformer_blocks.1.attn.{name}.weight"])
    for name, part in zip(("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), single, strict=True):
        assert torch.equal(part, state[f"single_transformer_blocks.0.{name}.bias"])
    assert torch.equal(torch.cat([scale, shift]), state["norm_out.linear.weight"])
    same = {
        "double_blocks.0.img_attn.norm.key_norm.scale": "transformer_blocks.0.attn.norm_k.weight",
        "double_blocks.1.txt_attn.norm.query_norm.scale": "transformer_blocks.1.attn.norm_added_q.weight",
        "double_blocks.0.img_mlp.2.weight": "transformer_blocks.0.ff.net.2.weight",
        "double_blocks.0.txt_attn.proj.bias": "transformer_blocks.0.attn.to_add_out.bias",
        "single_blocks.1.modulation.lin.weight": "single_transformer_blocks.1.norm.linear.weight",
        "vector_in.out_layer.weight": "vec_embed.out_layer.weight",
        "txt_in.bias": "context_embedder.bias",
        "final_layer.linear.weight": "proj_out.weight",
    }
    assert all(torch.equal(original[ours], state[theirs]) for ours, theirs in same.items())


def test_other_sizes_load_strictly(tmp_path):
    from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLForConditionalGeneration

    sizes = {
        "transformer": {"num_layers": 3, "joint_attention_dim": 96},
        "text_encoder": {
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "vision_config": {"depth": 3, "out_hidden_size": 96},
        },
        "vae": {"base_dim": 4, "dim_mult": [1, 2, 2, 4], "temperal_downsample": [True, False, True]},
    }
    folder = build_checkpoint("qwen-edit-plus", tmp_path, config=sizes)
    kinds = {
        "transformer": QwenImageTransformer2DModel,
        "vae": AutoencoderKLQwenImage,
        "text_encoder": Qwen2_5_VLForConditionalGeneration,
    }
    for part, kind in kinds.items():
        _, info = kind.from_pretrained(folder / part, output_loading_info=True)
        assert not any(info.values()), part
    before, after = _state(tiny_checkpoint("qwen-edit-plus") / "transformer"), _state(folder / "transformer")
    shared = [key for key in before if before[key].shape == after[key].shape]
    assert len(shared) > 60 and all(torch.equal(before[key], after[key]) for key in shared)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"unet": {}}, "'unet'"),
        ({"transformer": {"depth": 3}}, "'depth'"),
        ({"text_encoder": {"vision_config": {"layers": 3}}}, "vision_config.*'layers'"),
        ({"text_encoder": {"hidden_size": 96}}, "out_hidden_size"),
        ({"transformer": {"connector_in_channels": 96}}, "connector_in_channels"),
        ({"transformer": {"connector_hidden_size": 96}}, "joint_attention_dim"),
        ({"transformer": {"attention_head_dim": 32}}, "axes_dims_rope"),
    ],
)
def test_sizes_that_cannot_work_are_refused(tmp_path, sizes, message):
    with pytest.raises(ConfigError, match=message):
        build_checkpoint("step1x-v1p2", tmp_path / "new", config=sizes)
    assert not (tmp_path / "new").exists()


def test_unknown_system_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="qwen-edit-plus.*'step2x'"):
        build_checkpoint("step2x", tmp_path)


PEER_EDIT = """
import json, sys, torch
from pathlib import Path
from PIL import Image, ImageStat
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers import Step1XEditPipelineV1P2, Step1XEditTransformer2DModel
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

folder, bf16 = Path(sys.argv[1]), torch.bfloat16
config = json.loads((folder / "transformer/config.json").read_text())
transformer = Step1XEditTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
transformer.text_token_mapping = torch.nn.Linear(64, 64)  # the released class fixes 3584 -> 4096
state = {}
for path in sorted((folder / "transformer").glob("*.safetensors")):
    state |= load_file(path)
transformer.load_state_dict(state, strict=True)
pipe = Step1XEditPipelineV1P2(
    scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
    vae=AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=bf16),
    text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", torch_dtype=bf16),
    processor=AutoProcessor.from_pretrained(folder / "processor"),
    transformer=transformer.to(bf16),
)
out = pipe(
    image=Image.radial_gradient("L").resize((96, 64)).convert("RGB"), prompt='write "Hi!"', num_inference_steps=2,
    size_level=64, enable_reflection_mode=False, generator=torch.Generator().manual_seed(0),
)
print("size", out.images[0].size, "varied", min(ImageStat.Stat(out.images[0]).stddev) > 1)
"""


@pytest.mark.peer
@pytest.mark.slow
def test_released_pipeline_runs_on_the_folder():
    source, python = (os.environ.get(f"REASONEDIT_PEER_{name}") for name in ("SRC", "PYTHON"))
    if not source or not python:
        pytest.skip("NOT RUN with the released code: set REASONEDIT_PEER_SRC (checkout) and REASONEDIT_PEER_PYTHON")
    env = os.environ | {"PYTHONPATH": f"{source}/src", "CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    command = [python, "-c", PEER_EDIT, str(tiny_checkpoint("step1x-v1p2", std=0.2))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert "size (96, 64) varied True" in done.stdout, done.stderr[-2000:]
