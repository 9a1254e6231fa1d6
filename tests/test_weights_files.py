"""Reading weights: what is accepted, what is refused, and with which words."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from reasonedit.reasonedit_core import detect as detection
from reasonedit.reasonedit_core.errors import CheckpointError
from reasonedit.reasonedit_core.weightfiles import (
    find_prefix,
    read_metadata,
    read_shapes,
    read_state,
    strip_prefix,
    weight_files,
)
from reasonedit.reasonedit_core.weights import detect

A, B = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)


def sharded(folder: Path, stem: str = "model", index: str = "model.safetensors.index.json") -> Path:
    """A folder of two shards and their index."""
    names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({"a": A}, folder / names[0])
    save_file({"b": B}, folder / names[1])
    (folder / index).write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    return folder


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left
    )


class TestReading:
    def test_single_file_and_its_header(self, tmp_path):
        save_file({"a": A, "b": B}, tmp_path / "x.safetensors", metadata={"who": "we"})
        assert equal(read_state(tmp_path / "x.safetensors"), {"a": A, "b": B})
        assert read_shapes(tmp_path / "x.safetensors") == {"a": (2, 3), "b": (4,)}
        assert read_metadata(tmp_path / "x.safetensors") == {"who": "we"}

    def test_changing_a_read_tensor_leaves_the_file_alone(self, tmp_path):
        save_file({"a": A}, tmp_path / "x.safetensors")
        read_state(tmp_path / "x.safetensors")["a"].zero_()
        assert torch.equal(read_state(tmp_path / "x.safetensors")["a"], A)

    @pytest.mark.parametrize(
        ("stem", "index"),
        [
            ("model", "model.safetensors.index.json"),
            ("diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index.json"),
            ("diffusion_pytorch_model.bf16", "diffusion_pytorch_model.safetensors.index.bf16.json"),
        ],
    )
    def test_sharded_folder(self, tmp_path, stem, index):
        sharded(tmp_path, stem, index)
        assert equal(read_state(tmp_path), {"a": A, "b": B})
        assert equal(read_state(tmp_path / index), {"a": A, "b": B})

    def test_shards_without_an_index_are_counted(self, tmp_path):
        (sharded(tmp_path) / "model.safetensors.index.json").unlink()
        assert equal(read_state(tmp_path), {"a": A, "b": B})
        (tmp_path / "model-00001-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"missing: model-00001-of-00002\.safetensors"):
            read_state(tmp_path)

    def test_plain_weights_win_over_a_variant(self, tmp_path):
        save_file({"a": A}, tmp_path / "model.fp16.safetensors")
        assert [p.name for p in weight_files(tmp_path)] == ["model.fp16.safetensors"]
        save_file({"a": A}, tmp_path / "model.safetensors")
        assert [p.name for p in weight_files(tmp_path)] == ["model.safetensors"]

    def test_one_file_of_any_name_is_taken_and_two_are_not(self, tmp_path):
        save_file({"a": A}, tmp_path / "mine.safetensors")
        assert equal(read_state(tmp_path), {"a": A})
        save_file({"a": A}, tmp_path / "other.safetensors")
        with pytest.raises(CheckpointError, match=r"found 2 files: mine\.safetensors, other\.safetensors"):
            read_state(tmp_path)

    def test_quantisation_notes_of_the_header_become_tensors(self, tmp_path):
        note = {"format": "float8_e4m3fn"}
        header = {"_quantization_metadata": json.dumps({"layers": {"l": note, "absent": note}})}
        save_file({"l.weight": A}, tmp_path / "x.safetensors", metadata=header)
        state = read_state(tmp_path / "x.safetensors")
        assert set(state) == {"l.weight", "l.comfy_quant"}
        assert json.loads(bytes(state["l.comfy_quant"].tolist())) == note

    def test_unreadable_quantisation_notes_are_an_error(self, tmp_path):
        save_file({"l.weight": A}, tmp_path / "x.safetensors", metadata={"_quantization_metadata": "[1]"})
        with pytest.raises(CheckpointError, match="_quantization_metadata"):
            read_state(tmp_path / "x.safetensors")


class TestRefusals:
    """Each message names what was expected, what was found, and a way out."""

    def refuse(self, path: Path, *words: str) -> None:
        for read in (read_state, read_shapes):
            with pytest.raises(CheckpointError) as caught:
                read(path)
            for word in (*words, str(path.parent)):
                assert word in str(caught.value)

    def test_missing_shard_is_named(self, tmp_path):
        (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
        self.refuse(tmp_path, "missing: model-00002-of-00002.safetensors", "Resume the download")

    def test_index_and_shard_of_different_downloads(self, tmp_path):
        sharded(tmp_path)
        save_file({"other": B}, tmp_path / "model-00002-of-00002.safetensors")
        self.refuse(tmp_path, "expected the key b", "model-00002-of-00002.safetensors", "different downloads")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("not json", "expected a JSON file"),
            ("[]", "found a list"),
            ("{}", "`weight_map`, found none"),
            ('{"weight_map": {"a": "../x.safetensors"}}', "without a folder, found '../x.safetensors'"),
        ],
    )
    def test_bad_index(self, tmp_path, text, words):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        self.refuse(tmp_path, "model.safetensors.index.json", words)

    @pytest.mark.parametrize("keep", [0, 5, 9, 60, -1])
    def test_truncated_file(self, tmp_path, keep):
        save_file({"a": A, "b": B}, tmp_path / "whole.safetensors")
        data = (tmp_path / "whole.safetensors").read_bytes()
        (tmp_path / "cut.safetensors").write_bytes(data[:keep])
        self.refuse(tmp_path / "cut.safetensors", "expected" if 0 <= keep < 61 else "truncated", "ownload it again")

    def test_trailing_bytes(self, tmp_path):
        save_file({"a": A}, tmp_path / "x.safetensors")
        with (tmp_path / "x.safetensors").open("ab") as file:
            file.write(b"\0")
        self.refuse(tmp_path / "x.safetensors", "promises", "corrupt")

    def test_header_that_is_no_json(self, tmp_path):
        (tmp_path / "x.safetensors").write_bytes((20).to_bytes(8, "little") + b"{" + b"x" * 100)
        self.refuse(tmp_path / "x.safetensors", "corrupt", "Download it again")

    @pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth"])
    def test_pickle_by_its_name(self, tmp_path, suffix):
        (tmp_path / f"model{suffix}").write_bytes(b"x" * 100)
        self.refuse(tmp_path / f"model{suffix}", "pickle", "runs code", "safetensors.torch.save_file")
        self.refuse(tmp_path, "pickle")

    def test_pickle_named_as_an_index_entry(self, tmp_path):
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.bin"}}')
        self.refuse(tmp_path, "pickle")

    @pytest.mark.parametrize(
        "write", [lambda path: torch.save({"a": A}, path), lambda path: path.write_bytes(pickle.dumps([0] * 99))]
    )
    def test_pickle_under_another_name(self, tmp_path, write):
        write(tmp_path / "x.safetensors")
        self.refuse(tmp_path / "x.safetensors", "pickle")

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ("git-lfs pointer", "git lfs pull")),
            (b"<!DOCTYPE html><html><body>Sign in</body></html>", ("web page", "licence")),
            (b"\n  <html></html>      ", ("web page",)),
            (b'{"error": "Repository not found"}', ("JSON text",)),
            (b"GGUF" + b"\0" * 40, ("GGUF", "ComfyUI-GGUF")),
        ],
    )
    def test_something_else_under_the_name(self, tmp_path, content, words):
        (tmp_path / "x.safetensors").write_bytes(content)
        self.refuse(tmp_path / "x.safetensors", *words)

    def test_gguf_by_its_name(self, tmp_path):
        (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 40)
        self.refuse(tmp_path / "x.gguf", "GGUF", "ComfyUI-GGUF")

    def test_no_such_path_lists_the_neighbours(self, tmp_path):
        save_file({"a": A}, tmp_path / "here.safetensors")
        self.refuse(tmp_path / "there.safetensors", "no such file", "here.safetensors")

    def test_empty_folder_says_what_was_expected(self, tmp_path):
        self.refuse(tmp_path, "diffusion_pytorch_model", "an empty folder")
        (tmp_path / "notes.txt").write_text("x")
        (tmp_path / "transformer").mkdir()
        self.refuse(tmp_path, "notes.txt, transformer/")


class TestPrefixes:
    def test_the_component_with_the_marker_is_kept_without_its_prefix(self):
        state = {"model.diffusion_model.a": A, "model.diffusion_model.b": B, "vae.c": A}
        assert equal(strip_prefix(state, "a"), {"a": A, "b": B})
        assert find_prefix(state, "c") == "vae."
        assert find_prefix(state, "nowhere") is None

    def test_no_prefix_and_no_marker_leave_everything(self):
        state = {"a": A, "model.b": B}
        assert equal(strip_prefix(state, "a"), state)
        assert equal(strip_prefix(state, "nowhere"), state)

    def test_the_language_model_of_an_mllm_is_no_prefix(self):
        state = {"model.layers.0.x": A, "visual.patch": B, "lm_head.weight": B}
        assert equal(strip_prefix(state, "visual.patch"), state)


def state_of(*keys: str) -> dict[str, torch.Tensor]:
    return {key: torch.zeros(1) for key in keys}


STEP1X = ("double_blocks.0.img_attn.qkv.weight", "connector.S.input_embedder.weight")
QWEN = ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight")


class TestDetection:
    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            (STEP1X, ("transformer", "reasonedit-s", "v1.1", "original")),
            ((*STEP1X, "connector.scale_factor"), ("transformer", "reasonedit-s", "v1.0", "original")),
            ((*STEP1X, "text_token_mapping.weight"), ("transformer", "reasonedit-s", "v1.2", "original")),
            (
                ("transformer_blocks.0.attn.add_q_proj.weight", "connector.S.input_embedder.weight"),
                ("transformer", "reasonedit-s", "v1.1", "diffusers"),
            ),
            (QWEN, ("transformer", "reasonedit-q", "", "diffusers")),
            ((*QWEN, "__index_timestep_zero__"), ("transformer", "reasonedit-q", "edit-plus", "diffusers")),
            (("visual.patch_embed.proj.weight", "model.norm.weight"), ("text_encoder", "", "", "hf")),
            (("encoder.downsamples.0.residual.0.gamma",), ("vae", "reasonedit-q", "", "wan")),
            (("encoder.mid_block.resnets.0.norm1.gamma",), ("vae", "reasonedit-q", "", "diffusers")),
            (("encoder.down.0.block.0.conv1.weight",), ("vae", "reasonedit-s", "", "bfl")),
            (("encoder.down_blocks.0.resnets.0.conv1.weight",), ("vae", "reasonedit-s", "", "diffusers")),
            (("transformer_blocks.0.attn.to_q.lora_A.weight",), ("lora", "", "", "lora")),
            (("lora_unet_double_blocks_0_img_attn_qkv.alpha",), ("lora", "", "", "lora")),
        ],
    )
    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
    def test_keys_tell_the_layout(self, tmp_path, keys, expected, prefix):
        file = tmp_path / "x.safetensors"
        save_file(state_of(*(prefix + key for key in keys)), file)
        layout = detect(file)
        assert (layout.kind, layout.system, layout.variant, layout.names) == expected
        assert layout.zero_cond_t == ("__index_timestep_zero__" in keys)
        assert layout.path == file

    @pytest.mark.parametrize(
        ("keys", "words"),
        [
            (("double_blocks.0.img_attn.qkv.weight",), "FLUX"),
            ((*QWEN, "time_text_embed.addition_t_embedding.weight"), "Layered"),
            (("a", "b"), "2 keys such as a, b"),
        ],
    )
    def test_other_models_are_refused_politely(self, tmp_path, keys, words):
        save_file(state_of(*keys), tmp_path / "x.safetensors")
        with pytest.raises(CheckpointError, match=words):
            detect(tmp_path / "x.safetensors")

    def pipeline(self, folder: Path, name: str, parts=("transformer", "text_encoder", "vae"), **config) -> Path:
        (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
        for part in parts:
            (folder / part).mkdir()
        if config:
            (folder / "transformer" / "config.json").write_text(json.dumps(config))
        return folder

    @pytest.mark.parametrize(
        ("name", "config", "expected"),
        [
            ("Step1XEditPipelineV1P2", {}, ("reasonedit-s", "v1.2", False)),
            ("Step1XEditPipeline", {}, ("reasonedit-s", "v1.1", False)),
            ("QwenImageEditPipeline", {}, ("reasonedit-q", "edit", False)),
            ("QwenImageEditPlusPipeline", {"zero_cond_t": True}, ("reasonedit-q", "edit-plus", True)),
        ],
    )
    def test_folders_by_their_index(self, tmp_path, name, config, expected):
        layout = detect(self.pipeline(tmp_path, name, **config))
        assert (layout.system, layout.variant, layout.zero_cond_t) == expected
        assert layout.kind == "pipeline"
        assert layout.components["vae"] == tmp_path / "vae"

    def test_folder_of_another_pipeline(self, tmp_path):
        with pytest.raises(CheckpointError, match="FluxPipeline"):
            detect(self.pipeline(tmp_path, "FluxPipeline"))

    def test_folder_with_a_part_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match="missing: vae"):
            detect(self.pipeline(tmp_path, "QwenImageEditPipeline", parts=("transformer", "text_encoder")))

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"_class_name": "QwenImageTransformer2DModel", "zero_cond_t": True}, ("transformer", "edit-plus")),
            ({"_class_name": "AutoencoderKL"}, ("vae", "")),
            ({"model_type": "qwen2_5_vl"}, ("text_encoder", "")),
        ],
    )
    def test_component_folders_by_their_config(self, tmp_path, config, expected):
        (tmp_path / "config.json").write_text(json.dumps(config))
        layout = detect(tmp_path)
        assert (layout.kind, layout.variant) == expected

    def test_component_folder_of_another_model(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(CheckpointError, match="llama"):
            detect(tmp_path)

    def test_loose_files_in_comfyui_folders(self, tmp_path):
        for name in ("diffusion_models", "vae", "other"):
            (tmp_path / "split_files" / name).mkdir(parents=True)
        save_file(state_of(*QWEN), tmp_path / "split_files" / "diffusion_models" / "q.safetensors")
        save_file(state_of("encoder.downsamples.0.residual.0.gamma"), tmp_path / "split_files" / "vae" / "v.safetensors")
        save_file(state_of("strange"), tmp_path / "split_files" / "other" / "x.safetensors")
        layout = detect(tmp_path)
        assert (layout.kind, layout.system) == ("pipeline", "reasonedit-q")
        assert {key: path.name for key, path in layout.components.items()} == {
            "transformer": "q.safetensors",
            "vae": "v.safetensors",
        }
        assert detection.find_component(tmp_path, "vae").name == "v.safetensors"
        with pytest.raises(CheckpointError, match="expected a text_encoder in it, found transformer, vae"):
            detection.find_component(tmp_path, "text_encoder")

    def test_two_transformers_in_a_folder_must_be_told_apart(self, tmp_path):
        for name in ("one", "two"):
            save_file(state_of(*STEP1X), tmp_path / f"{name}.safetensors")
        with pytest.raises(CheckpointError, match=r"one\.safetensors, two\.safetensors"):
            detect(tmp_path)

    def test_files_of_both_systems_do_not_mix(self, tmp_path):
        save_file(state_of(*STEP1X), tmp_path / "s.safetensors")
        save_file(state_of("encoder.downsamples.0.residual.0.gamma"), tmp_path / "v.safetensors")
        with pytest.raises(CheckpointError, match="expected one system"):
            detect(tmp_path)

    def test_a_damaged_file_among_loose_ones_is_named(self, tmp_path):
        save_file(state_of(*STEP1X), tmp_path / "s.safetensors")
        (tmp_path / "vae.safetensors").write_bytes(b"<html></html>")
        with pytest.raises(CheckpointError, match=r"vae\.safetensors.*web page"):
            detect(tmp_path)

    def test_folder_of_nothing(self, tmp_path):
        (tmp_path / "readme.txt").write_text("x")
        with pytest.raises(CheckpointError, match=r"readme\.txt"):
            detect(tmp_path)
