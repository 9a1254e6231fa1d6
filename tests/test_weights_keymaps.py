"""The key maps: exact round trips, agreement with maps written by others, and the folded factor of v1.0."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core import keymaps
from reasonedit.reasonedit_core.errors import CheckpointError
from reasonedit.reasonedit_core.mini import layouts, originals
from reasonedit.reasonedit_core.mini.builder import random_tensor

QUICK = settings(max_examples=15, derandomize=True, deadline=None)


def step1x_shapes(heads: int = 2, double: int = 2, single: int = 2, mapping: bool = False) -> layouts.Shapes:
    return layouts.step1x_shapes(
        {
            "attention_head_dim": 8,
            "num_attention_heads": heads,
            "num_layers": double,
            "num_single_layers": single,
            "in_channels": 64,
            "out_channels": 64,
            "patch_size": 1,
            "joint_attention_dim": 16,
            "timestep_in_dim": 256,
            "vector_in_dim": 768,
            "connector_in_channels": 24,
            "connector_hidden_size": 16,
            "connector_depth": 1,
            "enable_text_token_mapping": mapping,
        }
    )


def flux_vae_shapes(widths: tuple[int, ...], layers: int, quant_conv: bool = False) -> layouts.Shapes:
    return layouts.flux_vae_shapes(
        {
            "block_out_channels": list(widths),
            "layers_per_block": layers,
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "use_quant_conv": quant_conv,
            "use_post_quant_conv": quant_conv,
            "mid_block_add_attention": True,
        }
    )


def fill(shapes: layouts.Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    return {key: random_tensor(key, shape, seed) for key, shape in shapes.items()}


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert left[key].dtype == right[key].dtype, key
        assert torch.equal(left[key], right[key]), key


class TestStep1X:
    @QUICK
    @given(st.integers(1, 3), st.integers(0, 2), st.integers(0, 2), st.booleans())
    def test_round_trip_from_both_sides(self, heads, double, single, mapping):
        ours = fill(step1x_shapes(heads, double, single, mapping))
        original = keymaps.step1x_to_original(ours)
        assert_equal(keymaps.step1x_from_original(original), ours)
        assert_equal(keymaps.step1x_to_original(keymaps.step1x_from_original(original)), original)

    def test_agrees_with_the_map_of_the_builder(self):
        ours = fill(step1x_shapes(mapping=True))
        assert_equal(keymaps.step1x_from_original(originals.step1x_original(ours)), ours)

    def test_rows_of_fused_weights_are_q_k_v_then_mlp(self):
        ours = fill(step1x_shapes())
        original = keymaps.step1x_to_original(ours)
        block = "single_transformer_blocks.1"
        parts = [ours[f"{block}.{name}.weight"] for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
        assert torch.equal(original["single_blocks.1.linear1.weight"], torch.cat(parts))

    def test_halves_of_the_last_modulation_change_places(self):
        ours = fill(step1x_shapes())
        original = keymaps.step1x_to_original(ours)
        scale, shift = ours["norm_out.linear.bias"].chunk(2)
        assert torch.equal(original["final_layer.adaLN_modulation.1.bias"], torch.cat([shift, scale]))

    def test_the_split_makes_no_copies(self):
        original = keymaps.step1x_to_original(fill(step1x_shapes()))
        ours = keymaps.step1x_from_original(original)
        fused = original["double_blocks.0.img_attn.qkv.weight"].untyped_storage().data_ptr()
        assert ours["transformer_blocks.0.attn.to_v.weight"].untyped_storage().data_ptr() == fused

    def test_a_scale_of_the_whole_goes_to_every_part_and_one_per_row_is_split(self):
        original = keymaps.step1x_to_original(fill(step1x_shapes()))
        original["double_blocks.0.img_attn.qkv.weight_scale"] = torch.tensor(0.5)
        rows = original["single_blocks.0.linear1.weight"].shape[0]
        original["single_blocks.0.linear1.weight_scale"] = torch.arange(rows)
        ours = keymaps.step1x_from_original(original)
        assert all(ours[f"transformer_blocks.0.attn.to_{x}.weight_scale"] == 0.5 for x in "qkv")
        assert ours["single_transformer_blocks.0.proj_mlp.weight_scale"].tolist() == list(range(48, rows))

    def test_unknown_keys_pass_for_the_loader_to_name(self):
        assert set(
            keymaps.step1x_from_original({"strange.weight": torch.ones(1), "single_blocks.0.odd.bias": torch.ones(1)})
        ) == {
            "strange.weight",
            "single_blocks.0.odd.bias",
        }

    def test_a_fused_weight_of_other_rows_is_refused(self):
        original = keymaps.step1x_to_original(fill(step1x_shapes()))
        original["double_blocks.0.img_attn.qkv.weight"] = torch.zeros(47, 16)
        with pytest.raises(CheckpointError, match=r"double_blocks\.0\.img_attn\.qkv.*expected 45 rows.*found 4[78]"):
            keymaps.step1x_from_original(original)

    def test_fusing_needs_every_part_and_no_scales(self):
        ours = fill(step1x_shapes())
        del ours["transformer_blocks.0.attn.to_k.bias"]
        with pytest.raises(CheckpointError, match=r"expected transformer_blocks\.0\.attn\.to_k\.bias"):
            keymaps.step1x_to_original(ours)
        with pytest.raises(CheckpointError, match="Dequantise"):
            keymaps.step1x_to_original({"x_embedder.weight_scale": torch.ones(())})


class TestScaleFactor:
    def test_folding_equals_scaling_the_mean(self):
        weight, bias, mean = (random_tensor(name, shape, 0, 1.0) for name, shape in (("w", (5, 7)), ("b", (5,)), ("x", (3, 7))))
        factor = torch.tensor([-0.91])
        state = {
            "connector.global_proj_out.weight": weight,
            "connector.global_proj_out.bias": bias,
            "connector.scale_factor": factor,
        }
        folded = keymaps.fold_scale_factor(state)
        assert set(folded) == {"connector.global_proj_out.weight", "connector.global_proj_out.bias"}
        assert torch.equal(folded["connector.global_proj_out.bias"], bias)
        expected = torch.nn.functional.linear(mean * (1 + factor), weight, bias)
        result = torch.nn.functional.linear(mean, folded["connector.global_proj_out.weight"], bias)
        assert (result - expected).abs().max() < 1e-6
        assert "connector.scale_factor" in state  # the argument is left as it was

    @pytest.mark.parametrize(("scale", "expected"), [(4.0, 1.0), (None, 0.25)])
    def test_a_low_bit_weight_stays_as_stored_and_its_scale_takes_the_factor(self, scale, expected):
        weight = torch.ones(2, 2, dtype=torch.float8_e4m3fn)
        state = {"connector.global_proj_out.weight": weight, "connector.scale_factor": torch.tensor([-0.75])}
        if scale is not None:
            state["connector.global_proj_out.weight_scale"] = torch.tensor(scale)
        folded = keymaps.fold_scale_factor(state)
        assert folded["connector.global_proj_out.weight_scale"] == expected
        assert folded["connector.global_proj_out.weight"] is weight

    def test_without_its_weight_it_is_an_error(self):
        with pytest.raises(CheckpointError, match=r"global_proj_out\.weight"):
            keymaps.fold_scale_factor({"connector.scale_factor": torch.ones(1)})


class TestFluxVae:
    @QUICK
    @given(st.integers(1, 4), st.integers(1, 3), st.booleans())
    def test_round_trip(self, stages, layers, quant_conv):
        ours = fill(flux_vae_shapes((4, 8, 8, 12)[:stages], layers, quant_conv))
        file = keymaps.flux_vae_to_bfl(ours)
        assert_equal(keymaps.flux_vae_from_bfl(file), ours)
        assert_equal(keymaps.flux_vae_to_bfl(keymaps.flux_vae_from_bfl(file)), file)

    def test_agrees_with_the_map_of_the_builder(self):
        ours = fill(flux_vae_shapes((4, 8, 8, 12), 2))
        assert_equal(keymaps.flux_vae_from_bfl(originals.flux_vae_original(ours)), ours)

    def test_agrees_with_the_converter_of_diffusers(self):
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        ours = fill(flux_vae_shapes((4, 8, 8, 12), 2))
        kinds = {"down_block_types": [""] * 4, "up_block_types": [""] * 4}
        theirs = convert_ldm_vae_checkpoint(keymaps.flux_vae_to_bfl(ours), kinds)
        # Theirs leaves the attention's matrices as 1x1 convolutions, for the model's own loading code.
        assert_equal({key: value.reshape(ours[key].shape) for key, value in theirs.items()}, ours)

    def test_old_diffusers_names(self):
        old = {
            "encoder.mid_block.attentions.0.proj_attn.weight": torch.ones(1),
            "decoder.mid_block.attentions.0.query.bias": torch.ones(1),
        }
        assert set(keymaps.flux_vae_modern(old)) == {
            "encoder.mid_block.attentions.0.to_out.0.weight",
            "decoder.mid_block.attentions.0.to_q.bias",
        }


class TestQwenVae:
    @QUICK
    @given(st.integers(1, 3), st.integers(1, 4))
    def test_agrees_with_the_map_of_the_builder(self, blocks, levels):
        config = {
            "base_dim": 2,
            "dim_mult": [1, 2, 4, 4][:levels],
            "num_res_blocks": blocks,
            "temperal_downsample": [False, True, True][: levels - 1],
            "z_dim": 2,
            "input_channels": 3,
            "attn_scales": [],
        }
        ours = fill(layouts.qwen_vae_shapes(config))
        file = originals.wan_vae_original(ours, num_res_blocks=blocks)
        assert_equal(keymaps.qwen_vae_from_wan(file), ours)

    def test_agrees_with_the_converter_of_diffusers(self):
        from diffusers import AutoencoderKLQwenImage
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        model = AutoencoderKLQwenImage(base_dim=4, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
        ours = fill({key: tuple(value.shape) for key, value in model.state_dict().items()})
        file = originals.wan_vae_original(ours, num_res_blocks=2)
        assert_equal(keymaps.qwen_vae_from_wan(file), convert_wan_vae_to_diffusers(dict(file)))


@pytest.mark.peer
class TestReleasedConverter:
    """The released script converts at the released depth only where it is told so; its functions are taken out of it, as
    it reads the command line when imported."""

    @pytest.fixture
    def functions(self):
        source = os.environ.get("REASONEDIT_PEER_SRC")
        if not source:
            pytest.skip("NOT COMPARED with the released converter: set REASONEDIT_PEER_SRC to a checkout of the released code")
        script = Path(source) / "scripts" / "convert_step1x_edit_to_diffusers.py"
        if not script.is_file():
            pytest.skip(f"{script} is not there")
        tree = ast.parse(script.read_text(encoding="utf-8"))
        wanted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name != "main"]
        names: dict = {"torch": torch}
        exec(compile(ast.Module(wanted, []), str(script), "exec"), names)  # noqa: S102 - the user's own copy
        return names

    @pytest.mark.parametrize("mapping", [False, True])
    def test_transformer(self, functions, mapping):
        original = keymaps.step1x_to_original(fill(step1x_shapes(mapping=mapping)))
        theirs = functions["convert_step1x_edit_transformer_checkpoint_to_diffusers"](
            dict(original), 2, 2, 16, mlp_ratio=4.0, enable_text_token_mapping=mapping
        )
        assert_equal(keymaps.step1x_from_original(original), theirs)

    def test_vae(self, functions):
        ours = fill(flux_vae_shapes((4, 8, 12, 12), 2))
        theirs = functions["convert_step1x_edit_vae_checkpoint_to_diffusers"](keymaps.flux_vae_to_bfl(ours))
        assert_equal(ours, theirs)
