"""Whole modules from the released layouts: equal to what the libraries' own loaders give, and strict."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from reasonedit.reasonedit_core import keymaps, sizes
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.fp8 import FP8, Fp8Linear, dequantize_tensor, quantize_tensor
from reasonedit.reasonedit_core.mini import originals
from reasonedit.reasonedit_core.weights import (
    load_flux_vae,
    load_into,
    load_qwen_transformer,
    load_qwen_vae,
    load_step1x_transformer,
    read_state,
)
from reasonedit.tests.tiny import tiny_checkpoint

F32 = torch.float32


def same(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    mine = module.state_dict()
    return mine.keys() == state.keys() and all(torch.equal(mine[key], state[key]) for key in mine)


def write(path: Path, state: dict[str, torch.Tensor], **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata=metadata or None)
    return path


@pytest.fixture(scope="module")
def step1x() -> dict[str, torch.Tensor]:
    return read_state(tiny_checkpoint("step1x-v1p1") / "transformer")


@pytest.fixture(scope="module")
def qwen() -> dict[str, torch.Tensor]:
    return read_state(tiny_checkpoint("qwen-edit") / "transformer")


class TestStep1X:
    @pytest.mark.parametrize(("system", "variant", "mapping"), [("step1x-v1p2", "v1.2", True), ("step1x-v1p1", "v1.1", False)])
    def test_folder(self, system, variant, mapping):
        folder = tiny_checkpoint(system)
        for path in (folder, folder / "transformer"):
            module, found, report = load_step1x_transformer(path, dtype=F32)
            assert found == variant
            assert same(module, read_state(folder / "transformer"))
            assert (module.text_token_mapping is not None) == mapping
            assert not module.training
            assert (report.missing, report.unexpected, report.wrong_shape) == ((), (), ())
            assert report.matched == len(module.state_dict())
            assert report.bytes == sum(p.numel() * 4 for p in module.parameters())

    def test_v1p0_single_file_of_the_original_layout(self):
        folder = tiny_checkpoint("step1x-v1p0-files")
        module, variant, report = load_step1x_transformer(folder, dtype=F32)
        file = load_file(folder / "step1x-edit-i1258.safetensors")
        factor = file.pop("connector.scale_factor")
        file["connector.global_proj_out.weight"] = file["connector.global_proj_out.weight"] * (1 + factor)
        assert variant == "v1.0"
        assert same(module, keymaps.step1x_from_original(file))
        assert any("scale_factor" in note for note in report.notes)

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    @pytest.mark.parametrize("original", [False, True])
    def test_single_file_needs_no_config(self, tmp_path, step1x, prefix, original):
        state = originals.step1x_original(step1x) if original else step1x
        file = write(tmp_path / "x.safetensors", {prefix + key: value for key, value in state.items()})
        module, variant, _ = load_step1x_transformer(file, dtype=F32)
        folder = load_step1x_transformer(tiny_checkpoint("step1x-v1p1"), dtype=F32)[0]
        assert variant == "v1.1"
        assert same(module, step1x)
        assert {k: v for k, v in module.config.items() if k[0] != "_"} == {
            k: tuple(v) if isinstance(v, list) else v for k, v in folder.config.items() if k[0] != "_"
        }

    def test_variant_in_doubt_is_said_and_can_be_named(self, tmp_path, step1x):
        file = write(tmp_path / "x.safetensors", step1x)
        _, variant, report = load_step1x_transformer(file, dtype=F32)
        assert variant == "v1.1"
        assert any("name the variant" in note for note in report.notes)
        assert load_step1x_transformer(file, dtype=F32, variant="v1.2")[1] == "v1.2"
        with pytest.raises(ConfigError, match=r"variant: expected auto or one of v1\.0"):
            load_step1x_transformer(file, dtype=F32, variant="v2")

    def test_the_mapping_is_found_by_its_keys_and_not_by_the_config(self, tmp_path):
        folder = tmp_path / "x"
        shutil.copytree(tiny_checkpoint("step1x-v1p2") / "transformer", folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"enable_text_token_mapping": False, "from_later": 1}))
        module, variant, report = load_step1x_transformer(folder, dtype=F32)
        assert variant == "v1.2"
        assert module.text_token_mapping is not None
        assert any("from_later" in note for note in report.notes)

    def test_a_forward_pass_runs_with_what_was_not_in_the_file(self):
        module, _, _ = load_step1x_transformer(tiny_checkpoint("step1x-v1p1"), dtype=torch.bfloat16)
        rng = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=rng).to(torch.bfloat16)  # noqa: E731
        out = module(draw(1, 4, 64), torch.tensor([0.5]), draw(1, 3, 64), txt_ids=torch.zeros(3, 3), img_ids=torch.zeros(4, 3))
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()

    def test_qwen_weights_are_not_step1x(self):
        with pytest.raises(CheckpointError, match=r"expected the transformer of Step1X-Edit.*reasonedit-q"):
            load_step1x_transformer(tiny_checkpoint("qwen-edit") / "transformer", dtype=F32)


class TestQwen:
    def test_folder_equals_the_loader_of_diffusers(self):
        from diffusers import QwenImageTransformer2DModel

        folder = tiny_checkpoint("qwen-edit-2511")
        module, report = load_qwen_transformer(folder, dtype=F32)
        theirs = QwenImageTransformer2DModel.from_pretrained(folder / "transformer").eval()
        assert module.config.zero_cond_t is True
        assert same(module, theirs.state_dict())
        assert report.matched == len(theirs.state_dict())
        rng = torch.Generator().manual_seed(0)
        inputs = {
            "hidden_states": torch.randn(1, 8, 64, generator=rng),
            "encoder_hidden_states": torch.randn(1, 3, 64, generator=rng),
            "encoder_hidden_states_mask": torch.ones(1, 3, dtype=torch.bool),
            "timestep": torch.tensor([0.3]),
            "img_shapes": [[(1, 2, 2), (1, 2, 2)]],
        }
        with torch.no_grad():
            # Not to the bit: their weights lie where the file has them, and some CPUs sum unaligned rows in another order.
            torch.testing.assert_close(module(**inputs)[0], theirs(**inputs)[0], rtol=0, atol=1e-6)

    @pytest.mark.parametrize("marker", [False, True])
    def test_comfyui_file_and_its_marker_of_2511(self, tmp_path, qwen, marker):
        state = {f"model.diffusion_model.{key}": value for key, value in qwen.items()}
        if marker:
            state["model.diffusion_model.__index_timestep_zero__"] = torch.empty(0)
        module, report = load_qwen_transformer(write(tmp_path / "q.safetensors", state), dtype=F32)
        assert module.config.zero_cond_t is marker
        assert same(module, qwen)
        assert report.unexpected == ()
        assert tuple(module.config.axes_dims_rope) == (4, 6, 6)

    def test_comfyui_folders(self):
        module, _ = load_qwen_transformer(tiny_checkpoint("comfy-qwen-files"), dtype=torch.bfloat16)
        assert module.dtype == torch.bfloat16

    def test_released_sizes_give_the_released_config(self):
        """From shapes alone, at full width and two blocks."""
        shapes = {
            "img_in.weight": (3072, 64),
            "txt_in.weight": (3072, 3584),
            "proj_out.weight": (64, 3072),
            "transformer_blocks.0.attn.norm_q.weight": (128,),
            "transformer_blocks.59.attn.norm_q.weight": (128,),
        }
        assert sizes.qwen_transformer_config(shapes) == {
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        }

    def test_step1x_weights_are_not_qwen(self):
        with pytest.raises(CheckpointError, match=r"expected the transformer of Qwen-Image-Edit.*reasonedit-s"):
            load_qwen_transformer(tiny_checkpoint("step1x-v1p1") / "transformer", dtype=F32)


def test_released_sizes_of_step1x_give_the_released_config():
    shapes = {
        "x_embedder.weight": (3072, 64),
        "context_embedder.weight": (3072, 4096),
        "proj_out.weight": (64, 3072),
        "time_embed.in_layer.weight": (3072, 256),
        "vec_embed.in_layer.weight": (3072, 768),
        "transformer_blocks.0.attn.norm_q.weight": (128,),
        "transformer_blocks.18.norm1.linear.bias": (18432,),
        "single_transformer_blocks.37.proj_out.bias": (3072,),
        "connector.S.input_embedder.weight": (4096, 3584),
        "connector.S.individual_token_refiner.blocks.1.norm1.bias": (4096,),
        "connector.global_proj_out.weight": (768, 3584),
    }
    import inspect

    from reasonedit.reasonedit_core.models.step1x_transformer import Step1XEditTransformer2DModel

    defaults = {key: p.default for key, p in inspect.signature(Step1XEditTransformer2DModel).parameters.items()}
    found = sizes.step1x_config(shapes)
    assert found == {key: 64 if key == "out_channels" else defaults[key] for key in found}


class TestVaes:
    @pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
    def test_flux_folder_and_single_files(self, tmp_path, dtype):
        from diffusers import AutoencoderKL

        folder = tiny_checkpoint("step1x-v1p1")
        theirs = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype)
        state = read_state(folder / "vae")
        files = [
            folder,
            write(tmp_path / "bfl.safetensors", originals.flux_vae_original(state)),
            write(tmp_path / "prefixed.safetensors", {f"vae.{k}": v for k, v in originals.flux_vae_original(state).items()}),
            write(tmp_path / "diffusers.safetensors", state),
        ]
        for path in files:
            vae, report = load_flux_vae(path, dtype=dtype)
            assert same(vae, theirs.state_dict())
            assert (vae.config.scaling_factor, vae.config.shift_factor) == (0.3611, 0.1159)
            assert vae.config.norm_num_groups == 4
            assert report.unexpected == ()

    def test_flux_without_the_sizes_of_the_release(self, tmp_path):
        """32 groups where the widths allow it; quant convolutions and two layers by their keys."""
        from diffusers import AutoencoderKL

        theirs = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(32, 64),
            layers_per_block=2,
        ).eval()
        path = write(tmp_path / "x.safetensors", keymaps.flux_vae_to_bfl(theirs.state_dict()))
        vae, _ = load_flux_vae(path, dtype=F32)
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(vae.encode(x).latent_dist.mean, theirs.encode(x).latent_dist.mean)

    def test_qwen_folder_and_wan_file(self, tmp_path):
        from diffusers import AutoencoderKLQwenImage

        folder = tiny_checkpoint("qwen-edit")
        theirs = AutoencoderKLQwenImage.from_pretrained(folder / "vae").eval()
        wan = write(tmp_path / "wan.safetensors", originals.wan_vae_original(read_state(folder / "vae"), num_res_blocks=2))
        x = torch.randn(1, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = theirs.encode(x).latent_dist.mode()
            for path in (folder, wan):
                vae, report = load_qwen_vae(path, dtype=F32)
                assert same(vae, theirs.state_dict())
                assert vae.config.latents_mean == theirs.config.latents_mean
                assert vae.config.temperal_downsample == theirs.config.temperal_downsample
                assert torch.equal(vae.encode(x).latent_dist.mode(), expected)
                assert report.unexpected == ()

    def test_each_refuses_the_other(self):
        with pytest.raises(CheckpointError, match=r"expected the FLUX autoencoder, found a vae of reasonedit-q"):
            load_flux_vae(tiny_checkpoint("qwen-edit") / "vae", dtype=F32)
        with pytest.raises(CheckpointError, match=r"expected the Qwen-Image VAE, found a vae of reasonedit-s"):
            load_qwen_vae(tiny_checkpoint("step1x-v1p1") / "vae", dtype=F32)


class TestStrictness:
    def broken(self, tmp_path, qwen, change) -> str:
        state = dict(qwen)
        change(state)
        path = write(tmp_path / "x.safetensors", state)
        with pytest.raises(CheckpointError) as caught:
            load_qwen_transformer(path, dtype=F32)
        assert str(caught.value).count(str(path)) == 1
        return str(caught.value)

    def test_missing_keys_are_named_ten_at_most(self, tmp_path, qwen):
        def drop(state):
            for key in [key for key in state if key.startswith("transformer_blocks.1.attn.")]:
                del state[key]

        message = self.broken(tmp_path, qwen, drop)
        assert "20 keys missing" in message
        assert message.count("transformer_blocks.1.attn.") == 10
        assert "and 10 more" in message

    def test_wrong_shape_shows_both(self, tmp_path, qwen):
        def cut(state):
            state["transformer_blocks.0.img_mlp.net.2.weight"] = torch.zeros(32, 7)

        message = self.broken(tmp_path, qwen, cut)
        assert "transformer_blocks.0.img_mlp.net.2.weight: expected (32, 128), found (32, 7)" in message

    def test_a_key_that_sizes_are_read_from(self, tmp_path, qwen):
        assert "expected the key img_in.weight" in self.broken(tmp_path, qwen, lambda state: state.pop("img_in.weight"))

    def test_unexpected_keys_are_logged_in_one_line(self, tmp_path, qwen, caplog):
        state = dict(qwen) | {"odd.one": torch.zeros(1), "odd.two": torch.zeros(1)}
        with caplog.at_level(logging.INFO, "reasonedit"):
            _, report = load_qwen_transformer(write(tmp_path / "x.safetensors", state), dtype=F32)
        assert report.unexpected == ("odd.one", "odd.two")
        assert [record.message for record in caplog.records if "2 keys not used: odd.one, odd.two" in record.message]

    def test_a_config_of_another_size(self, tmp_path):
        shutil.copytree(tiny_checkpoint("qwen-edit") / "transformer", tmp_path / "x")
        config = json.loads((tmp_path / "x" / "config.json").read_text())
        (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
        with pytest.raises(CheckpointError, match="keys missing: transformer_blocks.2"):
            load_qwen_transformer(tmp_path / "x", dtype=F32)

    def test_not_strict_reports_instead(self):
        linear = nn.Linear(2, 2)
        report = load_into(linear, {"weight": torch.zeros(3, 2), "odd": torch.zeros(1)}, dtype=F32, strict=False)
        assert report.missing == ("bias",)
        assert report.unexpected == ("odd",)
        assert report.wrong_shape == ("weight: expected (2, 2), found (3, 2)",)


class TestOwnership:
    def test_the_file_may_be_overwritten_after_loading(self, tmp_path, qwen):
        path = write(tmp_path / "x.safetensors", qwen)
        module, _ = load_qwen_transformer(path, dtype=F32)
        path.write_bytes(b"\xff" * path.stat().st_size)
        assert same(module, qwen)

    def test_the_state_is_emptied_so_that_one_copy_lives(self):
        state = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
        load_into(nn.Linear(2, 2), state, dtype=F32)
        assert state == {}

    def test_progress_reaches_the_whole(self, tmp_path, qwen):
        calls: list[tuple[int, int]] = []
        load_qwen_transformer(
            write(tmp_path / "x.safetensors", qwen), dtype=F32, on_bytes=lambda done, total: calls.append((done, total))
        )
        assert calls[-1][0] == calls[-1][1] == sum(v.numel() * 4 for v in qwen.values())
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtype(self, tmp_path, qwen, dtype):
        module, _ = load_qwen_transformer(write(tmp_path / "x.safetensors", qwen), dtype=dtype)
        assert {p.dtype for p in module.parameters()} == {dtype}
        assert torch.equal(module.img_in.weight, qwen["img_in.weight"].to(dtype))


def scaled(state: dict[str, torch.Tensor], *, skip: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Matrices as fp8 with `.weight_scale`, as ComfyUI's newer files have them."""
    result = {}
    for key, value in state.items():
        if value.ndim == 2 and not key.startswith(skip or ("-",)):
            result[key], result[f"{key}_scale"] = quantize_tensor(value)
        else:
            result[key] = value
    return result


class TestFp8:
    def test_all_fp8_stays_fp8_and_equals_the_dequantised_weights(self, tmp_path, qwen):
        path = write(tmp_path / "x.safetensors", scaled(qwen))
        kept, report = load_qwen_transformer(path, dtype=torch.bfloat16)
        full, _ = load_qwen_transformer(path, dtype=torch.bfloat16, weights_dtype="full")
        linears = [m for m in kept.modules() if isinstance(m, nn.Linear)]
        assert linears and all(isinstance(m, Fp8Linear) and m.weight.dtype == FP8 for m in linears)
        assert any("kept as fp8" in note for note in report.notes)
        assert report.bytes < 0.55 * sum(p.numel() * 2 for p in full.parameters())
        assert not any(isinstance(m, Fp8Linear) for m in full.modules())
        key = "transformer_blocks.0.attn.to_q"
        expected = dequantize_tensor(*quantize_tensor(qwen[f"{key}.weight"]), torch.bfloat16)
        assert torch.equal(full.get_submodule(key).weight, expected)
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
        assert torch.equal(kept.get_submodule(key)(x), full.get_submodule(key)(x))

    def test_plain_fp8_without_scales(self, tmp_path, qwen):
        plain = {key: value.to(FP8) for key, value in qwen.items()}
        module, _ = load_qwen_transformer(write(tmp_path / "x.safetensors", plain), dtype=torch.bfloat16)
        assert isinstance(module.img_in, Fp8Linear)
        assert module.img_in.weight_scale == 1
        assert torch.equal(module.txt_norm.weight, plain["txt_norm.weight"].to(torch.bfloat16))
        assert module.img_in.bias.dtype == torch.bfloat16

    def test_a_mixed_file_is_dequantised_unless_fp8_is_asked_for(self, tmp_path, qwen):
        path = write(tmp_path / "x.safetensors", scaled(qwen, skip=("proj_out", "transformer_blocks.1.")))
        auto, report = load_qwen_transformer(path, dtype=torch.bfloat16)
        assert not any(isinstance(m, Fp8Linear) for m in auto.modules())
        assert any("brought to bfloat16" in note for note in report.notes)
        kept, _ = load_qwen_transformer(path, dtype=torch.bfloat16, weights_dtype="fp8")
        assert isinstance(kept.img_in, Fp8Linear)  # fp8 in the file
        assert isinstance(kept.transformer_blocks[1].attn.to_q, Fp8Linear)  # a block's Linear: quantised by us
        assert type(kept.proj_out) is nn.Linear  # last layer, not fp8 in the file

    def test_full_weights_are_quantised_when_asked(self, tmp_path, step1x):
        module, _, report = load_step1x_transformer(
            write(tmp_path / "x.safetensors", step1x), dtype=torch.bfloat16, weights_dtype="fp8"
        )
        kinds = {name: type(m) for name, m in module.named_modules() if isinstance(m, nn.Linear)}
        blocks = ("transformer_blocks.", "single_transformer_blocks.")
        assert all((kind is Fp8Linear) == name.startswith(blocks) for name, kind in kinds.items())
        key = "single_transformer_blocks.1.proj_mlp"
        stored, scale = quantize_tensor(step1x[f"{key}.weight"])
        assert torch.equal(module.get_submodule(key).weight.view(torch.uint8), stored.view(torch.uint8))
        assert module.get_submodule(key).weight_scale == scale

    def test_fp8_that_computes_is_the_same_weights_asked_to_multiply(self, tmp_path, step1x):
        path = write(tmp_path / "x.safetensors", step1x)
        for name, computing in (("fp8", False), ("fp8-compute", True)):
            module, _, report = load_step1x_transformer(path, dtype=torch.bfloat16, weights_dtype=name)
            layers = [m for m in module.modules() if isinstance(m, Fp8Linear)]
            assert layers and {layer.computing for layer in layers} == {computing}
            assert any("multiplied in 8 bits where the device can" in note for note in report.notes) == computing

    @pytest.mark.parametrize("rows", [False, True])
    def test_original_layout_in_fp8_with_scales_is_split_with_its_scales(self, tmp_path, step1x, rows):
        original = originals.step1x_original(step1x)
        state = {}
        for key, value in original.items():
            if value.ndim == 2:
                scale = value.abs().amax(1) / 448 if rows else value.abs().max() / 448
                stored = (value / (scale[:, None] if rows else scale)).clamp(-448, 448).to(FP8)
                state[key], state[key.replace(".weight", ".scale_weight")] = stored, scale
                original[key] = dequantize_tensor(stored, scale, F32)
            else:
                state[key] = value
        state["scaled_fp8"] = torch.empty(2, dtype=FP8)
        path = write(tmp_path / "x.safetensors", state)
        full, _, _ = load_step1x_transformer(path, dtype=F32, weights_dtype="full")
        assert same(full, keymaps.step1x_from_original(original))
        kept, _, _ = load_step1x_transformer(path, dtype=F32)
        layers = {name: m for name, m in kept.named_modules() if isinstance(m, Fp8Linear)}
        assert len(layers) == sum(isinstance(m, nn.Linear) for m in full.modules())
        for name, layer in layers.items():
            weight = dequantize_tensor(layer.weight, layer.weight_scale, F32)
            assert torch.equal(weight, full.get_submodule(name).weight), name

    def test_convrot_is_refused_with_a_way_out(self, tmp_path, qwen):
        key = "transformer_blocks.0.attn.to_q"
        state = dict(qwen) | {f"{key}.weight": torch.zeros(32, 32, dtype=torch.int8), f"{key}.weight_scale": torch.ones(32)}
        layers = {"layers": {key: {"format": "int8_tensorwise", "convrot": True}}}
        path = write(tmp_path / "x.safetensors", state, _quantization_metadata=json.dumps(layers))
        with pytest.raises(CheckpointError, match=r"x\.safetensors: transformer_blocks\.0\.attn\.to_q: .*ConvRot.*fp8_scaled"):
            load_qwen_transformer(path, dtype=F32)

    def test_unknown_weights_dtype(self, qwen, tmp_path):
        with pytest.raises(ConfigError, match="auto, fp8, fp8-compute, full, found 'int4'"):
            load_qwen_transformer(write(tmp_path / "x.safetensors", qwen), dtype=F32, weights_dtype="int4")
