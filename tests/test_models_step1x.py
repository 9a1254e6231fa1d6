"""The Step1X-Edit DiT: equal to the released one in three id layouts, and everything the release cannot do."""

from __future__ import annotations

import math
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.kernels import Refused, attention
from reasonedit.reasonedit_core.models.step1x_transformer import (
    Step1XEditTransformer2DModel,
    TextState,
    apply_rope,
    join_ids,
)
from reasonedit.tests.peer import recipe

GOLDEN = Path(__file__).parent / "golden" / "step1x_model.safetensors"

# Released keys at full size, "name: shape" with and without the trailing .weight/.bias pair; {} counts blocks.
KEYS_OUTSIDE = """
time_embed.in_layer 3072 256 | time_embed.out_layer 3072 3072
vec_embed.in_layer 3072 768 | vec_embed.out_layer 3072 3072
context_embedder 3072 4096 | x_embedder 3072 64 | norm_out.linear 6144 3072 | proj_out 64 3072
connector.S.input_embedder 4096 3584 | connector.S.t_embedder.mlp.0 4096 256 | connector.S.t_embedder.mlp.2 4096 4096
connector.S.c_embedder.linear_1 4096 3584 | connector.S.c_embedder.linear_2 4096 4096
connector.global_proj_out 768 3584
"""
KEYS_OF_BLOCKS = {
    ("connector.S.individual_token_refiner.blocks.{}.", 2): """
norm1 4096 | norm2 4096 | self_attn_qkv 12288 4096 | self_attn_proj 4096 4096
mlp.fc1 16384 4096 | mlp.fc2 4096 16384 | adaLN_modulation.1 8192 4096
""",
    ("transformer_blocks.{}.", 19): """
norm1.linear 18432 3072 | norm1_context.linear 18432 3072
attn.to_q 3072 3072 | attn.to_k 3072 3072 | attn.to_v 3072 3072 | attn.to_out.0 3072 3072
attn.add_q_proj 3072 3072 | attn.add_k_proj 3072 3072 | attn.add_v_proj 3072 3072 | attn.to_add_out 3072 3072
ff.net.0.proj 12288 3072 | ff.net.2 3072 12288 | ff_context.net.0.proj 12288 3072 | ff_context.net.2 3072 12288
attn.norm_q 128 * | attn.norm_k 128 * | attn.norm_added_q 128 * | attn.norm_added_k 128 *
""",
    ("single_transformer_blocks.{}.", 38): """
norm.linear 9216 3072 | proj_mlp 12288 3072 | proj_out 3072 15360
attn.to_q 3072 3072 | attn.to_k 3072 3072 | attn.to_v 3072 3072 | attn.norm_q 128 * | attn.norm_k 128 *
""",
}


def released_keys(mapping: bool) -> dict[str, tuple[int, ...]]:
    """Key -> shape at full size. A `*` marks a norm without bias."""

    def entries(prefix: str, table: str):
        for name, *numbers in (entry.split() for entry in table.replace("\n", "|").split("|") if entry.strip()):
            shape = tuple(int(number) for number in numbers if number != "*")
            yield f"{prefix}{name}.weight", shape
            if "*" not in numbers:
                yield f"{prefix}{name}.bias", shape[:1]

    keys = dict(entries("", KEYS_OUTSIDE + ("text_token_mapping 4096 3584" if mapping else "")))
    for (prefix, count), table in KEYS_OF_BLOCKS.items():
        for index in range(count):
            keys.update(entries(prefix.format(index), table))
    return keys


@cache
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN)


def make(mapping: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> Step1XEditTransformer2DModel:
    model = Step1XEditTransformer2DModel(**recipe.TINY, enable_text_token_mapping=mapping)
    return recipe.randomise(model, seed).to(dtype).eval()


def case(layout: str = "v1.2", length: int = 11, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs of a golden case; positions stay fp32."""
    return {
        key: value.to(dtype) if value.is_floating_point() and not key.endswith("_ids") else value
        for key, value in recipe.inputs(layout, length).items()
    }


def training_case(batch: int = 2) -> dict[str, torch.Tensor]:
    values = case("v1.2", 11)
    for key in ("hidden_states", "encoder_hidden_states", "text_embeds"):
        values[key] = recipe.draw(f"batch of {key}", (batch, *values[key].shape[1:]))
    for key in ("encoder_mask", "text_mask"):
        values[key] = values[key].expand(batch, -1).clone()
    values["timestep"] = torch.linspace(0.2, 0.9, batch)
    return values


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("mapping", [False, True], ids=["plain", "mapping"])
def test_keys_shapes_and_count_are_the_released_ones(mapping):
    with torch.device("meta"):
        model = Step1XEditTransformer2DModel(enable_text_token_mapping=mapping)
    keys = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert keys == released_keys(mapping)
    assert len(keys) == (1198 if mapping else 1196)
    assert sum(value.numel() for value in model.parameters()) == (12_442_484_544 if mapping else 12_427_800_384)


@pytest.mark.parametrize("mapping", [False, True], ids=["plain", "mapping"])
@pytest.mark.parametrize("layout", recipe.LAYOUTS)
@torch.no_grad()
def test_fp32_equals_the_released_transformer(layout, mapping):
    model = make(mapping)
    for length in recipe.LENGTHS:
        expected = golden()[f"dit/fp32/{'mapping' if mapping else 'plain'}/{layout}/{length}"]
        torch.testing.assert_close(model(**case(layout, length)), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_large_activations_equal_the_released_transformer():
    """Small ones cannot tell the tanh form of GELU from the exact one, which moves these by 5e-4.

    CPUs sum in different orders: against float64 the golden is off by 5e-5, and another CPU's result by 1e-5.
    """
    model = recipe.randomise(make(mapping=True), std=recipe.STRONG)
    expected = golden()["dit/fp32/strong"]
    assert expected.std() > 1
    torch.testing.assert_close(model(**case("v1.2", 11)), expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("mapping", [False, True], ids=["plain", "mapping"])
@pytest.mark.parametrize("layout", recipe.LAYOUTS)
@torch.no_grad()
def test_bf16_equals_the_released_transformer(layout, mapping):
    model = make(mapping, torch.bfloat16)
    for length in recipe.LENGTHS:
        expected = golden()[f"dit/bf16/{'mapping' if mapping else 'plain'}/{layout}/{length}"].float()
        got = model(**case(layout, length, torch.bfloat16))
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=2e-2)
        assert torch.cosine_similarity(got.float().flatten(), expected.flatten(), dim=0) > 0.9999


def test_golden_cases_differ_by_more_than_the_tolerance():
    """Else the comparisons above could not tell layouts or the mapping apart."""
    for length in recipe.LENGTHS:
        outputs = [golden()[f"dit/fp32/{kind}/{layout}/{length}"] for kind in ("plain", "mapping") for layout in recipe.LAYOUTS]
        for index, one in enumerate(outputs):
            for other in outputs[index + 1 :]:
                assert (one - other).abs().max() > 5e-5


def test_rope_tables_are_the_released_ones():
    ids = join_ids(*recipe.ids("v1.2", 11))
    cos, sin = make().rope(ids)
    assert cos.dtype == sin.dtype == torch.float32
    torch.testing.assert_close(cos, golden()["rope/cos"], rtol=0, atol=1e-7)
    torch.testing.assert_close(sin, golden()["rope/sin"], rtol=0, atol=1e-7)
    batched = make().rope(torch.stack([ids, ids + 1]))
    assert torch.equal(batched[0][0], cos) and not torch.equal(batched[0][1], cos)


def test_rope_angles_are_exact_far_from_the_origin():
    ids = torch.tensor([[-2047.0, 301.37, 455.71], [-1.0, 0.15, -0.22]])
    exponents = [2 * (index // 2) / dim for dim in (4, 6, 6) for index in range(dim)]
    axes = [axis for axis, dim in enumerate((4, 6, 6)) for _ in range(dim)]
    angles = [[float(row[axis]) / 10000.0**power for axis, power in zip(axes, exponents, strict=True)] for row in ids]
    for table, function in zip(make().rope(ids), (math.cos, math.sin), strict=True):
        expected = torch.tensor([[function(angle) for angle in row] for row in angles])
        torch.testing.assert_close(table, expected, rtol=0, atol=1e-7)


def test_rotation_keeps_length_and_depends_on_distance_only():
    q, k = (recipe.draw(name, (1, 1, 2, 16)).expand(-1, 9, -1, -1) for name in "qk")
    rope = make().rope(torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.5, 2.0]))
    turned_q, turned_k = apply_rope(q, rope), apply_rope(k, rope)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    products = torch.einsum("bthd,bshd->bhts", turned_q, turned_k)
    torch.testing.assert_close(products[..., 2:, 2:], products[..., :-2, :-2], rtol=1e-4, atol=1e-4)
    assert (products[..., 0, 0] - products[..., 0, 3]).abs().min() > 1e-3


# ---------------------------------------------------------------- what the release cannot do


@torch.no_grad()
def test_two_prompts_in_one_padded_batch_equal_two_calls():
    model = make(mapping=True)
    short, long = case("v1.2", 5), case("v1.2", 11)
    long["encoder_hidden_states"] = recipe.draw("other", (1, 11, 64))
    long["text_embeds"] = recipe.draw("quoted", (1, 11, 64))
    separate = torch.cat([model(**short), model(**long)])

    def padded(key: str) -> torch.Tensor:
        value = short[key] if key != "txt_ids" else short[key][None]
        padding = torch.full_like(value[:, :1], 1 if value.dtype == torch.bool else 7).expand(-1, 6, *value.shape[2:])
        return torch.cat([value, padding], dim=1)

    both = {
        key: torch.cat([padded(key), long[key] if key != "txt_ids" else long[key][None]])
        for key in ("encoder_hidden_states", "text_embeds", "text_mask", "txt_ids")
    }
    valid = torch.arange(11) < torch.tensor([[5], [11]])
    joint_mask = torch.cat([valid, torch.ones(2, 48, dtype=torch.bool)], dim=1)[:, None, None]
    for img_ids in (short["img_ids"], short["img_ids"][None].expand(2, -1, -1)):
        got = model(
            short["hidden_states"].expand(2, -1, -1), short["timestep"].expand(2), both["encoder_hidden_states"], valid,
            both["txt_ids"], img_ids, both["text_embeds"], both["text_mask"], joint_mask,
        )  # fmt: skip
        torch.testing.assert_close(got, separate, rtol=0, atol=1e-5)
    without = model(
        short["hidden_states"].expand(2, -1, -1), short["timestep"].expand(2), both["encoder_hidden_states"], valid,
        both["txt_ids"], short["img_ids"], both["text_embeds"], both["text_mask"],
    )  # fmt: skip
    assert (without - separate)[0].abs().max() > 1e-4, "padding takes part when no joint mask is given"


@torch.no_grad()
def test_a_batch_of_two_timesteps_equals_two_calls():
    model, values = make(True), training_case()
    together = model(**values)
    for index in range(2):
        alone = {k: v if k.endswith("_ids") else v[index : index + 1] for k, v in values.items()}
        torch.testing.assert_close(together[index : index + 1], model(**alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_prepared_prompt_and_tables_give_equal_bits(dtype):
    model = make(True, dtype)
    values = case("v1.1", 11, dtype)
    prompt = ("encoder_hidden_states", "encoder_mask", "text_embeds", "text_mask")
    state = model.prepare_text(*(values[key] for key in prompt))
    rope = model.rope(join_ids(values["txt_ids"], values["img_ids"]))
    for t in (1.0, 0.4):
        values["timestep"] = torch.tensor([t], dtype=dtype)
        assert torch.equal(model(values["hidden_states"], values["timestep"], state, rope=rope), model(**values))
    with pytest.raises(AttributeError):
        state.vector = None


@torch.no_grad()
def test_one_prepared_prompt_serves_a_batch_of_pictures():
    model, values = make(True), case()
    state = model.prepare_text(values["encoder_hidden_states"], None, values["text_embeds"], values["text_mask"])
    pictures = recipe.draw("pictures", (3, 48, 64))
    ids = {"txt_ids": values["txt_ids"], "img_ids": values["img_ids"]}
    for t in (torch.tensor([0.5]), torch.full((3,), 0.5)):
        got = model(pictures, t, state, **ids)
        for index in range(3):
            alone = model(pictures[index : index + 1], torch.tensor([0.5]), state, **ids)
            torch.testing.assert_close(got[index : index + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@torch.no_grad()
def test_half_precision_follows_fp32_with_a_timestep_of_either_dtype(dtype, tolerance):
    values = {**case(), "timestep": torch.tensor([0.75])}
    expected = make(True)(**values)
    for t_dtype in (dtype, torch.float32):
        half = {**case(dtype=dtype), "timestep": torch.tensor([0.75], dtype=t_dtype)}
        got = make(True, dtype)(**half)
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_the_timestep_rounds_in_its_own_dtype():
    """In bf16 the sinusoid sees 992.0 where exact arithmetic has 993.6: part of the released numerics."""
    model, values = make(dtype=torch.bfloat16), case(dtype=torch.bfloat16)
    exact = torch.tensor([0.9936])

    def at(t: torch.Tensor) -> torch.Tensor:
        return model(**{**values, "timestep": t})

    assert torch.equal(at(exact.to(torch.bfloat16)), at(torch.tensor([0.992])))
    assert not torch.equal(at(exact), at(torch.tensor([0.992])))


@pytest.mark.parametrize("stream", ["text of a double block", "single block"])
@torch.no_grad()
def test_fp16_overflow_is_clamped(stream):
    model = make(dtype=torch.float16)
    if stream == "single block":
        block = model.single_transformer_blocks[0]
        block.norm.linear.bias[64:] = 2.0  # the gate
        block.proj_out.bias[:16] = 6e4
    else:
        block = model.transformer_blocks[0]
        block.norm1_context.linear.bias[160:] = 2.0  # the gate of the MLP
        block.ff_context.net[2].bias[:16] = 6e4
    assert torch.isfinite(model(**case(dtype=torch.float16))).all()


@torch.no_grad()
def test_attention_goes_through_the_dispatch_everywhere():
    model, values = make(True), case("v1.1", 11)
    expected, calls = model(**values), []

    def host(q, k, v, mask):
        calls.append((q.shape[1], None if mask is None else tuple(mask.shape)))
        if mask is not None:
            raise Refused("no masks here")
        return attention(q, k, v)

    assert torch.equal(model(**values, host=host), expected)
    assert calls == [(11, (1, 1, 11, 11))] * 2 + [(59, None)] * 4
    torch.testing.assert_close(model(**values, backend="reference"), expected, rtol=0, atol=1e-5)
    with pytest.raises(ConfigError, match="warp"):
        model(**values, backend="warp")


@torch.no_grad()
def test_a_joint_mask_reaches_every_block():
    model, values, masks = make(), case(), []
    joint_mask = torch.ones(1, 1, 59, 59, dtype=torch.bool)
    joint_mask[..., 3] = False

    def host(q, k, v, mask):
        masks.append(mask)
        return attention(q, k, v, mask)

    masked = model(**values, joint_mask=joint_mask, host=host)
    assert sum(mask is joint_mask for mask in masks) == 4
    assert (masked - model(**values)).abs().max() > 1e-5


# ---------------------------------------------------------------- training


def test_every_parameter_gets_a_gradient():
    model, values = make(True).train(), training_case()
    values["hidden_states"].requires_grad_()
    values["encoder_hidden_states"].requires_grad_()
    model(**values).square().mean().backward()
    for name, leaf in [*model.named_parameters(), *((k, v) for k, v in values.items() if v.requires_grad)]:
        assert leaf.grad is not None and torch.isfinite(leaf.grad).all() and leaf.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_no_gradient():
    def recorded(blocks, run, block, *args):
        blocks.append(block)
        return run(block, *args)

    grads, blocks = [], []
    for checkpointing in (False, True):
        model = make(True).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
            run = model._gradient_checkpointing_func
            model._gradient_checkpointing_func = partial(recorded, blocks, run)
        joint_mask = torch.ones(2, 1, 1, 59, dtype=torch.bool)
        joint_mask[1, ..., 9:11] = False
        model(**training_case(), joint_mask=joint_mask).square().mean().backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert blocks == [*model.transformer_blocks, *model.single_transformer_blocks]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=1e-8)


def test_lora_adapters_attach_and_learn():
    peft = pytest.importorskip("peft")
    model, values = make(), case()
    before = model(**values).detach()
    targets = ["to_q", "to_v", "add_k_proj", "to_out.0", "ff.net.0.proj", "proj_mlp", "self_attn_qkv"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets))
    torch.testing.assert_close(model(**values).detach(), before, rtol=0, atol=1e-6)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * (2 * 5 + 2 * 3 + 2) and all("lora_" in name for name in trained)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(recipe.draw(name, tuple(parameter.shape)))
    out = model(**values)
    assert (out - before).abs().max() > 1e-3
    out.square().mean().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())


# ---------------------------------------------------------------- as a diffusers model


def test_saving_and_loading_keeps_every_bit(tmp_path):
    model, values = make(True, torch.bfloat16), case(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = Step1XEditTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert loaded.config.axes_dims_rope in ([4, 6, 6], (4, 6, 6))
    for (name, ours), (other, theirs) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(loaded(**values), model(**values))


def test_released_configuration_fields_are_known():
    released = {
        "_class_name": "Step1XEditTransformer2DModel", "_diffusers_version": "0.36.0.dev0", "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56], "connector_depth": 2, "connector_heads_num": 32, "connector_hidden_size": 4096,
        "connector_in_channels": 3584, "enable_text_token_mapping": True, "guidance_embeds": False, "in_channels": 64,
        "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38,
        "out_channels": None, "patch_size": 1, "timestep_in_dim": 256, "vector_in_dim": 768,
    }  # fmt: skip
    with torch.device("meta"):
        config = dict(Step1XEditTransformer2DModel.from_config(released).config)
    for key in released.keys() - {"_diffusers_version", "_class_name"}:
        got = config[key]
        assert (list(got) if isinstance(got, (list, tuple)) else got) == released[key], key
    assert len(config.keys() - set(released) - {"_use_default_values"}) == 0


def test_regional_compilation_meets_no_graph_break():
    model, values = make(True), case("v1.1", 11)
    joint_mask = torch.ones(1, 1, 1, 59, dtype=torch.bool)
    joint_mask[..., 9:11] = False
    with torch.no_grad():
        expected = model(**values, joint_mask=joint_mask)
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        torch.testing.assert_close(model(**values, joint_mask=joint_mask), expected, rtol=0, atol=1e-6)


def test_the_whole_model_compiles_into_one_graph():
    model, values = make(True), case("v1.1", 11)
    state = model.prepare_text(values["encoder_hidden_states"], values["encoder_mask"])
    rope = model.rope(join_ids(values["txt_ids"], values["img_ids"]))
    with torch.no_grad():
        expected = model(values["hidden_states"], values["timestep"], state, rope=rope)
        step = torch.compile(model, fullgraph=True, backend="eager")
        got = step(values["hidden_states"], values["timestep"], state, rope=rope)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"img_ids": None}, "positions are missing"),
        ({"txt_ids": torch.zeros(10, 3)}, "positions for 58 tokens.*have 59"),
        ({"text_mask": None}, "text_embeds came without text_mask"),
        ({"encoder_hidden_states": TextState(None, None)}, "already holds"),
    ],
    ids=["no ids", "short ids", "no text mask", "state and mask"],
)
def test_inputs_that_do_not_fit_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        make(True)(**{**case(), **change})


@pytest.mark.parametrize(
    "change,words",
    [
        ({"axes_dims_rope": (4, 4, 4)}, "sums to 12.*is 16"),
        ({"connector_heads_num": 5}, "64 is not a multiple of connector_heads_num 5"),
        ({"joint_attention_dim": 32}, "joint_attention_dim 32 must equal connector_hidden_size 64"),
    ],
    ids=["axes", "heads", "widths"],
)
def test_sizes_that_do_not_fit_are_named(change, words):
    with pytest.raises(ConfigError, match=words):
        Step1XEditTransformer2DModel(**{**recipe.TINY, **change})


@torch.no_grad()
def test_quoted_characters_count_only_with_the_mapping():
    values = case()
    without = {**values, "text_embeds": None, "text_mask": None}
    assert torch.equal(make()(**values), make()(**without))
    assert (make(True)(**values) - make(True)(**without)).abs().max() > 1e-5
    nothing = {**values, "text_mask": torch.zeros_like(values["text_mask"])}
    assert torch.equal(make(True)(**nothing), make(True)(**without))
