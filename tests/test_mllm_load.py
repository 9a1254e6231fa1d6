"""Every layout a Qwen2.5-VL is found in gives the same model; what is missing is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reasonedit.reasonedit_core.errors import CheckpointError
from reasonedit.reasonedit_core.mllm.load import EMBEDDINGS, infer_config, load_mllm, rename_keys
from reasonedit.reasonedit_core.types import Counts
from reasonedit.tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def folder():
    return tiny_checkpoint("qwen2.5-vl")


@pytest.fixture(scope="module")
def state(folder):
    """The tensors of the stock folder under their names on the hub."""
    return {k: v.float() for shard in sorted(folder.glob("*.safetensors")) for k, v in load_file(shard).items()}


@pytest.fixture(scope="module")
def expected(folder):
    return logits_of(load_mllm(folder, dtype=torch.float32))


def logits_of(mllm):
    """Logits after a picture: depend on the tower, the language model, the rotary tables and lm_head."""
    image = torch.rand(1, 3, 84, 112, generator=torch.Generator().manual_seed(1)).mul(255).round() / 255
    features = [mllm.vision(image, min_pixels=3136, max_pixels=28 * 28 * 12)]
    ids = mllm.tokenize(mllm.render("s", [0, "go"], n_images=1))
    with torch.no_grad():
        states = mllm.states(mllm.embed(ids, features), mllm.positions(ids, features))
        return mllm.model.lm_head(states) if mllm.can_generate else states


def copy_folder(folder, target, **changes):
    """A writable copy; changes: function per file name, dict -> dict, None to remove the file."""
    shutil.copytree(folder, target)
    for name, change in changes.items():
        path = target / f"{name}.json"
        if change is None:
            path.unlink()
        else:
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return target


def nested(config):
    """The config as transformers 5 writes it."""
    outer = ("architectures", "model_type", "vision_config", "image_token_id", "video_token_id", "tie_word_embeddings")
    text = {k: v for k, v in config.items() if k not in outer}
    theta = text.pop("rope_theta")
    section = text.pop("rope_scaling")["mrope_section"]
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": section, "rope_theta": theta}
    return {k: v for k, v in config.items() if k in outer} | {"text_config": text}


def test_nested_config_gives_the_same_model(folder, expected, tmp_path):
    copy = copy_folder(folder, tmp_path / "model", config=nested)
    assert torch.equal(logits_of(load_mllm(copy, dtype=torch.float32)), expected)


def test_theta_and_sections_of_the_config_are_used(folder, expected, tmp_path):
    other = copy_folder(folder, tmp_path / "a", config=lambda c: c | {"rope_theta": 100.0})
    assert not torch.allclose(logits_of(load_mllm(other, dtype=torch.float32)), expected, atol=1e-4)
    scaling = {"type": "mrope", "mrope_section": [4, 2, 2]}
    other = copy_folder(folder, tmp_path / "b", config=lambda c: c | {"rope_scaling": scaling})
    assert not torch.allclose(logits_of(load_mllm(other, dtype=torch.float32)), expected, atol=1e-4)


@pytest.mark.parametrize("system", ["step1x-v1p2", "step1x-v1p1", "qwen-edit-plus"])
def test_pipelines_give_their_text_encoder(system):
    """Tokenizer in text_encoder/ itself, in processor/, or in tokenizer/ without tokenizer.json; bounds beside them."""
    root = tiny_checkpoint(system)
    mllm = load_mllm(root / "text_encoder", dtype=torch.float32)
    assert torch.equal(logits_of(mllm), logits_of(load_mllm(root, dtype=torch.float32)))
    assert mllm.bounds == ((3136, 28 * 28 * 16384) if system.startswith("qwen") else (256 * 784, 400 * 784))
    assert mllm.tokenize("a!<|im_end|>") == [64, 0, 258]


def single_file(path, state, prefix=""):
    save_file({prefix + key: value.contiguous() for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "text_encoders.qwen25_7b.transformer."])
def test_single_file_gives_the_same_model(folder, state, expected, tmp_path, prefix):
    path = single_file(tmp_path / "te.safetensors", state, prefix)
    mllm = load_mllm(path, dtype=torch.float32, tokenizer_path=folder)
    assert torch.equal(logits_of(mllm), expected)


def test_comfy_file_of_the_builder_loads(folder):
    file = next((tiny_checkpoint("comfy-qwen-files") / "text_encoders").glob("*.safetensors"))
    assert logits_of(load_mllm(file, dtype=torch.bfloat16, tokenizer_path=folder)).dtype == torch.bfloat16


@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_file_is_dequantised(folder, state, expected, tmp_path, scaled):
    low = {}
    for key, value in state.items():
        if value.ndim == 2 and not key.startswith(("lm_head", "model.embed")):
            scale = value.abs().max() / 448 if scaled else torch.tensor(1.0)
            low[key] = (value / scale).to(torch.float8_e4m3fn)
            if scaled:
                low[key.removesuffix("weight") + "scale_weight"] = scale
        else:
            low[key] = value.to(torch.float16)
    if scaled:
        low["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    mllm = load_mllm(single_file(tmp_path / "te.safetensors", low), dtype=torch.float32, tokenizer_path=folder)
    assert {p.dtype for p in mllm.model.parameters()} == {torch.float32}
    error = (logits_of(mllm) - expected).abs().max() / expected.abs().max()
    assert 1e-6 < error < 0.1


def test_without_lm_head(folder, state, expected, tmp_path):
    headless = {k: v for k, v in state.items() if k != "lm_head.weight"}
    path = single_file(tmp_path / "te.safetensors", headless)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight.*--reasoner none"):
        load_mllm(path, dtype=torch.float32, tokenizer_path=folder)
    mllm = load_mllm(path, dtype=torch.float32, tokenizer_path=folder, need_lm_head=False)
    assert not mllm.can_generate
    with pytest.raises(CheckpointError, match="without lm_head"):
        mllm.require_lm_head()
    full = load_mllm(folder, dtype=torch.float32)
    assert torch.equal(full.model.lm_head(logits_of(mllm)), expected)


def test_lm_head_that_is_not_needed_is_left_out(folder):
    mllm = load_mllm(folder, dtype=torch.float32, need_lm_head=False)
    assert not any(name.startswith("lm_head") for name, _ in mllm.model.named_parameters())


def test_tied_embeddings(folder, state, tmp_path):
    copy = copy_folder(folder, tmp_path / "model", config=lambda c: c | {"tie_word_embeddings": True})
    for shard in copy.glob("*.safetensors*"):
        shard.unlink()
    single_file(copy / "model.safetensors", {k: v for k, v in state.items() if k != "lm_head.weight"})
    mllm = load_mllm(copy, dtype=torch.float32)
    embeddings = mllm.model.get_input_embeddings().weight
    assert mllm.model.lm_head.weight is embeddings
    assert torch.equal(embeddings, state["model.embed_tokens.weight"])
    assert not load_mllm(copy, dtype=torch.float32, need_lm_head=False).can_generate


def test_sizes_of_the_published_models_are_inferred(tmp_path):
    """From meta tensors in the shapes of the 7B and the 3B."""
    from reasonedit.reasonedit_core.mini.layouts import qwen25vl_shapes

    vision = {"hidden_size": 1280, "intermediate_size": 3420, "patch_size": 14, "spatial_merge_size": 2, "depth": 32}
    vision |= {"temporal_patch_size": 2, "in_chans": 3}
    for hidden, ff, layers, heads, kv_heads, tied in ((3584, 18944, 28, 28, 4, False), (2048, 11008, 36, 16, 2, True)):
        config = {"hidden_size": hidden, "intermediate_size": ff, "num_hidden_layers": layers, "vocab_size": 152064}
        config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        config["vision_config"] = vision | {"out_hidden_size": hidden}
        shapes = qwen25vl_shapes(config)
        state = rename_keys({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
        found = infer_config(state, tmp_path, tmp_path / "x.safetensors")
        assert {key: found[key] for key in config if key != "vision_config"} == {
            key: value for key, value in config.items() if key != "vision_config"
        }
        assert found["tie_word_embeddings"] is tied
        assert (found["vision_config"]["depth"], found["vision_config"]["out_hidden_size"]) == (32, hidden)


def test_unknown_sizes_ask_for_a_config(folder, state, tmp_path):
    path = single_file(tmp_path / "te.safetensors", state)
    bare = copy_folder(folder, tmp_path / "tokenizer", config=None)
    with pytest.raises(CheckpointError, match=r"found 64 and 32.*config\.json"):
        load_mllm(path, dtype=torch.float32, tokenizer_path=bare)


def test_weights_are_held_once(folder):
    """Each parameter has storage of its own size: no tensor is a view of something larger that stays alive."""
    mllm = load_mllm(folder, dtype=torch.bfloat16)
    for key, parameter in mllm.model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 2, key
    assert not any(parameter.requires_grad for parameter in mllm.model.parameters()) and not mllm.model.training


def test_rotary_tables_stay_in_float32(folder):
    mllm = load_mllm(folder, dtype=torch.bfloat16)
    tables = dict(mllm.model.named_buffers())
    assert len(tables) >= 2 and all(table.dtype == torch.float32 and not table.is_meta for table in tables.values())


def test_counts_are_shared(folder):
    counts = Counts()
    mllm = load_mllm(folder, dtype=torch.float32, counts=counts)
    logits_of(mllm)
    assert counts.vision_passes == 1


def test_what_is_missing_is_named(folder, state, tmp_path):
    with pytest.raises(CheckpointError, match="found nothing"):
        load_mllm(tmp_path / "nowhere", dtype=torch.float32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json of a Qwen2\.5-VL"):
        load_mllm(tmp_path / "empty", dtype=torch.float32)
    file = single_file(tmp_path / "te.safetensors", state)
    with pytest.raises(CheckpointError, match="tokenizer_path"):
        load_mllm(file, dtype=torch.float32)
    with pytest.raises(CheckpointError, match="tokenizer_path"):
        load_mllm(file, dtype=torch.float32, tokenizer_path=tmp_path / "empty")
    partial = {k: v for k, v in state.items() if "layers.1.mlp" not in k}
    single_file(tmp_path / "partial.safetensors", partial)
    with pytest.raises(CheckpointError, match=r"3 are missing: model\.language_model\.layers\.1\.mlp"):
        load_mllm(tmp_path / "partial.safetensors", dtype=torch.float32, tokenizer_path=folder)
    text_only = {k: v for k, v in state.items() if not k.startswith("visual")}
    single_file(tmp_path / "text.safetensors", text_only)
    with pytest.raises(CheckpointError, match="vision tower"):
        load_mllm(tmp_path / "text.safetensors", dtype=torch.float32, tokenizer_path=folder)


def test_wrong_shapes_are_named(folder, tmp_path):
    copy = copy_folder(folder, tmp_path / "model", config=lambda c: c | {"intermediate_size": 80})
    with pytest.raises(CheckpointError, match=r"another shape.*\(96, 64\) != \(80, 64\)"):
        load_mllm(copy, dtype=torch.float32)


def test_another_model_is_refused(folder, tmp_path):
    copy = copy_folder(folder, tmp_path / "model", config=lambda c: {"model_type": "clip", "projection_dim": 3})
    with pytest.raises(CheckpointError, match="'clip'"):
        load_mllm(copy, dtype=torch.float32)
    broken = copy_folder(folder, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_mllm(broken, dtype=torch.float32)


def test_foreign_tensors_are_named_in_a_warning(folder, state, tmp_path, caplog):
    path = single_file(tmp_path / "te.safetensors", state | {"logit_bias": torch.zeros(3)})
    load_mllm(path, dtype=torch.float32, tokenizer_path=folder)
    assert "logit_bias" in caplog.text


@pytest.mark.parametrize(
    ("key", "renamed"),
    [
        ("model.embed_tokens.weight", EMBEDDINGS),
        ("model.language_model.embed_tokens.weight", EMBEDDINGS),
        ("language_model.model.embed_tokens.weight", EMBEDDINGS),
        ("qwen25_7b.transformer.model.embed_tokens.weight", EMBEDDINGS),
        ("visual.blocks.3.attn.qkv.bias", "model.visual.blocks.3.attn.qkv.bias"),
        ("model.visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"),
        ("text_encoders.qwen25_7b.transformer.lm_head.weight", "lm_head.weight"),
        ("model.layers.0.mlp.up_proj.weight", "model.language_model.layers.0.mlp.up_proj.weight"),
        ("vae.conv.weight", "vae.conv.weight"),
    ],
)
def test_key_names(key, renamed):
    assert list(rename_keys({key: torch.zeros(1)})) == [renamed]


@pytest.mark.slow
def test_runs_without_torchvision_and_processors(folder):
    """At run time only the tokenizer of transformers is used; its image processors would import torchvision."""
    code = (
        "import sys, torch\n"
        "for name in ('torchvision', 'torchaudio', 'qwen_vl_utils'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import conftest\n"
        "from reasonedit.reasonedit_core.interfaces import Query\n"
        "from reasonedit.reasonedit_core.mllm.decode import generate\n"
        "from reasonedit.reasonedit_core.mllm.load import load_mllm\n"
        f"mllm = load_mllm({str(folder)!r}, dtype=torch.float32)\n"
        "asked = Query('think', 's', (0, 'x'), (torch.rand(1, 3, 60, 90),), max_new_tokens=4)\n"
        "print(len(generate(mllm, [asked], min_pixels=3136, max_pixels=30000)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "1", done.stderr
