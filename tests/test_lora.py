"""LoRAs: every key style lands on the right modules with the right strength, and nothing is lost in silence."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from reasonedit.reasonedit_core import keymaps
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.fp8 import Fp8Linear, dequantize_tensor, quantize_linears
from reasonedit.reasonedit_core.lora import apply_lora, find_linears, merge_lora
from reasonedit.reasonedit_core.weights import load_qwen_transformer, load_step1x_transformer
from reasonedit.tests.tiny import tiny_checkpoint

RANK, ALPHA = 2, 8.0
TO_Q, MLP = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2"

Deltas = dict[str, torch.Tensor]


def draw(key: str, *shape: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(sum(map(ord, key)))
    return torch.randn(shape, generator=rng) * 0.3


def pair(module: nn.Module, name: str, rank: int = RANK) -> tuple[torch.Tensor, torch.Tensor]:
    layer = find_linears(module)[name]
    return draw(name + "down", rank, layer.in_features), draw(name + "up", layer.out_features, rank)


def weights(module: nn.Module) -> Deltas:
    return {name: layer.weight.detach().clone() for name, layer in find_linears(module).items()}


def changes(before: Deltas, module: nn.Module) -> Deltas:
    """What each Linear's weight grew by."""
    after = weights(module)
    return {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}


def close(left: Deltas, right: Deltas) -> bool:
    return left.keys() == right.keys() and all(torch.allclose(left[key], right[key], atol=1e-5) for key in left)


def write(path: Path, state: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file({key: value.clone().contiguous() for key, value in state.items()}, path, metadata=metadata or None)
    return path


@pytest.fixture
def qwen() -> nn.Module:
    return load_qwen_transformer(tiny_checkpoint("qwen-edit"), dtype=torch.float32)[0]


@pytest.fixture
def step1x() -> nn.Module:
    return load_step1x_transformer(tiny_checkpoint("step1x-v1p1"), dtype=torch.float32)[0]


def flat(prefix: str):
    return lambda name: prefix + name.replace(".", "_")


PEFT = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")
STYLES = {
    "diffusers": (lambda name: f"transformer.{name}", PEFT, False),
    "diffusers with alpha": (lambda name: f"transformer.{name}", PEFT, True),
    "bare peft": (lambda name: name, PEFT, False),
    "comfy": (lambda name: f"diffusion_model.{name}", PEFT, False),
    "ours": (lambda name: f"diffusion_model.{name}", PEFT, True),
    "lightning": (lambda name: name, KOHYA, True),
    "kohya": (flat("lora_unet_"), KOHYA, True),
    "onetrainer": (flat("lora_transformer_"), KOHYA, True),
    "lycoris": (flat("lycoris_"), KOHYA, True),
    "diffsynth": (lambda name: name, ("lora_A.default.weight", "lora_B.default.weight"), False),
    "diffsynth prefixed twice": (
        lambda name: f"transformer.{name}",
        ("lora_A.default_0.default.weight", "lora_B.default_0.default.weight"),
        False,
    ),
    "raw peft": (lambda name: f"base_model.model.{name}", PEFT, False),
    "no weight suffix": (lambda name: name, ("lora_A", "lora_B"), False),
    "old diffusers": (lambda name: f"transformer.{name}", ("lora.down.weight", "lora.up.weight"), False),
    "older diffusers": (lambda name: f"transformer.{name}_lora", ("down.weight", "up.weight"), False),
}


@pytest.mark.parametrize("style", STYLES)
def test_key_styles(tmp_path, qwen, style):
    stem, (down_name, up_name), with_alpha = STYLES[style]
    state, expected = {}, {}
    for name in (TO_Q, MLP):
        down, up = pair(qwen, name)
        state |= {f"{stem(name)}.{down_name}": down, f"{stem(name)}.{up_name}": up}
        if with_alpha:
            state[f"{stem(name)}.alpha"] = torch.tensor(ALPHA)
        expected[name] = 0.5 * (ALPHA / RANK if with_alpha else 1.0) * up @ down
    before = weights(qwen)
    report = merge_lora(qwen, write(tmp_path / "x.safetensors", state), 0.5)
    assert close(changes(before, qwen), expected)
    assert (report.matched, set(report.modules), report.unmatched) == (2, {TO_Q, MLP}, ())
    assert report.style and "lora" in report.style


def test_style_is_told(tmp_path, qwen):
    down, up = pair(qwen, TO_Q)
    path = write(
        tmp_path / "x.safetensors",
        {f"diffusion_model.{TO_Q}.lora_A.weight": down, f"diffusion_model.{TO_Q}.lora_B.weight": up},
    )
    assert merge_lora(qwen, path).style == "diffusion_model.*.lora_A/lora_B"


class TestStep1XNames:
    """LoRAs trained on the original code name its fused modules."""

    IMAGE = tuple(f"transformer_blocks.1.attn.to_{x}" for x in "qkv")
    LINEAR1 = (*(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.0.proj_mlp")

    def fused_change(self, module: nn.Module, before: Deltas, original: str) -> torch.Tensor:
        """The change of the fused original weight, put together from its parts' by the key map."""
        grown = changes(before, module)
        parts = keymaps.step1x_modules(original)
        assert set(grown) == set(parts)
        return torch.cat([grown[part] for part in parts])

    @pytest.mark.parametrize("original", ["double_blocks.1.img_attn.qkv", "single_blocks.0.linear1"])
    @pytest.mark.parametrize("stem", [flat("lora_unet_"), lambda name: f"diffusion_model.{name}", lambda name: name])
    def test_fused_lora_splits_its_up_rows(self, tmp_path, step1x, original, stem):
        parts = [find_linears(step1x)[name] for name in keymaps.step1x_modules(original)]
        down, up = draw("d", RANK, 32), draw("u", sum(part.out_features for part in parts), RANK)
        name = stem(original)
        state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
        before = weights(step1x)
        report = merge_lora(step1x, write(tmp_path / "x.safetensors", state))
        assert torch.allclose(self.fused_change(step1x, before, original), ALPHA / RANK * up @ down, atol=1e-5)
        assert report.matched == len(parts)
        assert "original names" in report.style

    @pytest.mark.parametrize("original", ["double_blocks.1.txt_attn.qkv", "single_blocks.1.linear1"])
    def test_split_lora_has_a_pair_per_part(self, tmp_path, step1x, original):
        name = flat("lora_unet_")(original)
        state, expected = {f"{name}.alpha": torch.tensor(ALPHA)}, {}
        for i, part in enumerate(keymaps.step1x_modules(original)):
            down, up = pair(step1x, part)
            state |= {f"{name}.lora_down.{i}.weight": down, f"{name}.lora_up.{i}.weight": up}
            expected[part] = ALPHA / RANK * up @ down
        before = weights(step1x)
        report = merge_lora(step1x, write(tmp_path / "x.safetensors", state))
        assert close(changes(before, step1x), expected)
        assert report.style == "lora_unet_*.lora_down/lora_up.k (original names)"

    def test_saved_split_lora_is_one_block_sparse_pair(self, tmp_path, step1x):
        """The released trainer saves split qkv as one pair of three times the rank; alpha is then read over that rank."""
        original = "double_blocks.0.img_attn.qkv"
        name = flat("lora_unet_")(original)
        pairs = [pair(step1x, part) for part in keymaps.step1x_modules(original)]
        state = {
            f"{name}.lora_down.weight": torch.cat([down for down, _ in pairs]),
            f"{name}.lora_up.weight": torch.block_diag(*[up for _, up in pairs]),
            f"{name}.alpha": torch.tensor(ALPHA),
        }
        before = weights(step1x)
        merge_lora(step1x, write(tmp_path / "x.safetensors", state))
        expected = {
            part: ALPHA / (3 * RANK) * up @ down
            for part, (down, up) in zip(keymaps.step1x_modules(original), pairs, strict=True)
        }
        assert close(changes(before, step1x), expected)

    def test_every_original_linear_is_found(self, tmp_path, step1x):
        originals = dict.fromkeys(keymaps.step1x_original(name)[0] for name in find_linears(step1x))
        state = {}
        for original in originals:
            layers = [find_linears(step1x)[name] for name in keymaps.step1x_modules(original)]
            name = flat("lora_unet_")(original)
            state[f"{name}.lora_down.weight"] = torch.zeros(1, layers[0].in_features)
            state[f"{name}.lora_up.weight"] = torch.zeros(sum(layer.out_features for layer in layers), 1)
        report = merge_lora(step1x, write(tmp_path / "x.safetensors", state))
        assert set(report.modules) == set(find_linears(step1x))
        assert report.unmatched == ()

    @pytest.mark.parametrize("original", [True, False])
    def test_the_last_modulation_has_its_halves_swapped(self, tmp_path, step1x, original):
        down, up = pair(step1x, "norm_out.linear")
        name = "lora_unet_final_layer_adaLN_modulation_1" if original else "lora_unet_norm_out_linear"
        before = weights(step1x)
        state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        merge_lora(step1x, write(tmp_path / "x.safetensors", state))
        expected = keymaps.swap_halves(up) if original else up
        assert close(changes(before, step1x), {"norm_out.linear": expected @ down})

    @pytest.mark.parametrize("parts", [(0, 1), (1,), (0, 1, 3)])
    def test_split_parts_must_be_all_there(self, tmp_path, step1x, parts):
        name, state = "lora_unet_double_blocks_0_img_attn_qkv", {}
        for i in parts:
            state |= {f"{name}.lora_down.{i}.weight": draw("d", 2, 32), f"{name}.lora_up.{i}.weight": draw("u", 32, 2)}
        with pytest.raises(CheckpointError, match=rf"expected 3 split parts .*found parts {re.escape(str(list(parts)))}"):
            merge_lora(step1x, write(tmp_path / "x.safetensors", state))

    def test_qwen_has_no_original_names(self, tmp_path, qwen):
        """A FLUX LoRA must not slip in because sizes happen to fit."""
        state = {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 32),
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(96, 2),
        }
        with pytest.raises(CheckpointError, match="no key that meets a module"):
            merge_lora(qwen, write(tmp_path / "x.safetensors", state))


def two_pairs(module: nn.Module, path: Path, rank: int = RANK) -> Path:
    state = {}
    for name in (TO_Q, MLP):
        down, up = pair(module, name, rank)
        state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return write(path, state)


def forward(module: nn.Module) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return module(
            hidden_states=torch.randn(1, 4, 64, generator=rng).to(module.proj_out.weight.dtype),
            encoder_hidden_states=torch.randn(1, 3, 64, generator=rng).to(module.proj_out.weight.dtype),
            encoder_hidden_states_mask=torch.ones(1, 3, dtype=torch.bool),
            timestep=torch.tensor([0.3]),
            img_shapes=[[(1, 2, 2)]],
        )[0]


class TestModes:
    def test_merging_is_exact_in_float32(self, tmp_path, qwen):
        qwen.to(torch.bfloat16)
        before = weights(qwen)[TO_Q]
        merge_lora(qwen, two_pairs(qwen, tmp_path / "x.safetensors"), 0.3)
        down, up = pair(qwen, TO_Q)
        expected = (before.float() + 0.3 * (ALPHA / RANK) * (up @ down)).to(torch.bfloat16)
        assert torch.equal(weights(qwen)[TO_Q], expected)

    def test_adapter_and_merge_agree(self, tmp_path, qwen):
        path, plain = two_pairs(qwen, tmp_path / "x.safetensors"), forward(qwen)
        report = apply_lora(qwen, path, 0.7)
        adapted = forward(qwen)
        other = load_qwen_transformer(tiny_checkpoint("qwen-edit"), dtype=torch.float32)[0]
        merge_lora(other, path, 0.7)
        assert (adapted - plain).abs().max() > 1e-3
        assert (adapted - forward(other)).abs().max() < 1e-5
        assert (report.matched, report.name) == (2, "x")

    def test_several_add_in_both_modes(self, tmp_path, qwen):
        first, second = two_pairs(qwen, tmp_path / "a.safetensors"), two_pairs(qwen, tmp_path / "b.safetensors", rank=3)
        other = load_qwen_transformer(tiny_checkpoint("qwen-edit"), dtype=torch.float32)[0]
        reports = [apply_lora(qwen, first, 0.5), apply_lora(qwen, second, -0.25), apply_lora(qwen, first, 0.125)]
        assert [report.name for report in reports] == ["a", "b", "a_2"]
        for path, scale in ((first, 0.5), (second, -0.25), (first, 0.125)):
            merge_lora(other, path, scale)
        assert (forward(qwen) - forward(other)).abs().max() < 1e-5

    def test_merging_below_an_adapter(self, tmp_path, qwen):
        first, second = two_pairs(qwen, tmp_path / "a.safetensors"), two_pairs(qwen, tmp_path / "b.safetensors", rank=3)
        other = load_qwen_transformer(tiny_checkpoint("qwen-edit"), dtype=torch.float32)[0]
        apply_lora(qwen, first)
        merge_lora(qwen, second)
        merge_lora(other, first)
        merge_lora(other, second)
        assert (forward(qwen) - forward(other)).abs().max() < 1e-5

    def test_ranks_and_alphas_may_differ_between_modules(self, tmp_path, qwen):
        state, expected = {}, {}
        for name, rank, alpha in ((TO_Q, 2, 8.0), (MLP, 5, 3.0), ("proj_out", 1, 1.0)):
            down, up = pair(qwen, name, rank)
            state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(alpha)}
            expected[name] = alpha / rank * up @ down
        path = write(tmp_path / "x.safetensors", state)
        other = load_qwen_transformer(tiny_checkpoint("qwen-edit"), dtype=torch.float32)[0]
        before = weights(other)
        merge_lora(other, path)
        assert close(changes(before, other), expected)
        assert apply_lora(qwen, path).matched == 3
        assert (forward(qwen) - forward(other)).abs().max() < 1e-5

    def test_a_short_name_does_not_catch_its_namesakes(self, tmp_path, step1x):
        """`proj_out` is the last layer, and every single block has one of its own."""
        down, up = pair(step1x, "proj_out")
        apply_lora(step1x, write(tmp_path / "x.safetensors", {"proj_out.lora_A.weight": down, "proj_out.lora_B.weight": up}))
        assert hasattr(step1x.proj_out, "lora_A")
        assert type(step1x.single_transformer_blocks[0].proj_out) is nn.Linear

    def test_adapters_are_ready_for_inference_and_known_to_diffusers(self, tmp_path, qwen):
        plain = forward(qwen)
        report = apply_lora(qwen, two_pairs(qwen, tmp_path / "my lora.v2.safetensors"))
        layer = qwen.get_submodule(TO_Q)
        assert report.name == "my_lora_v2"
        assert not layer.training
        assert not any(p.requires_grad for name, p in layer.named_parameters() if "lora" in name)
        qwen.disable_adapters()
        assert torch.equal(forward(qwen), plain)

    def test_a_module_without_the_mixin_of_diffusers(self, tmp_path):
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        base, x = net[1].weight.detach().clone(), torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
        expected = nn.functional.linear(net[0](x), base + draw("u", 4, 1) @ draw("d", 1, 4), net[1].bias)
        state = {"1.lora_A.weight": draw("d", 1, 4), "1.lora_B.weight": draw("u", 4, 1)}
        apply_lora(net, write(tmp_path / "x.safetensors", state), name="n")
        assert torch.allclose(net(x), expected, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_fp8_weights_take_an_adapter(self, tmp_path, qwen, dtype):
        qwen.to(dtype)
        quantize_linears(qwen)
        layer, x = qwen.get_submodule(TO_Q), draw("x", 3, 32).to(dtype)
        stored = dequantize_tensor(layer.weight, layer.weight_scale, torch.float32)
        apply_lora(qwen, two_pairs(qwen, tmp_path / "x.safetensors"), 0.5)
        down, up = pair(qwen, TO_Q)
        expected = nn.functional.linear(x.float(), stored + 0.5 * (ALPHA / RANK) * up @ down, layer.bias.float())
        wrapped = qwen.get_submodule(TO_Q)
        assert isinstance(wrapped.base_layer, Fp8Linear)
        assert wrapped.lora_A["x"].weight.dtype == dtype
        assert torch.allclose(wrapped(x).float(), expected, atol=1e-5 if dtype == torch.float32 else 0.1)
        assert forward(qwen).isfinite().all()

    def test_fp8_weights_refuse_a_merge_before_anything_changes(self, tmp_path, qwen):
        quantize_linears(qwen, only=(MLP,))
        before = weights(qwen)
        with pytest.raises(ConfigError, match=r"cannot be merged into fp8.*net\.2.*adapter"):
            merge_lora(qwen, two_pairs(qwen, tmp_path / "x.safetensors"))
        assert torch.equal(before[TO_Q], weights(qwen)[TO_Q])

    @pytest.mark.parametrize(
        ("options", "words"),
        [({"mode": "blend"}, "adapter, merge, found 'blend'"), ({"scale": math.inf}, "finite number, found inf")],
    )
    def test_bad_options(self, tmp_path, qwen, options, words):
        with pytest.raises(ConfigError, match=words):
            apply_lora(qwen, two_pairs(qwen, tmp_path / "x.safetensors"), **options)


class TestStatedAlpha:
    """Files without `.alpha` keys whose writer states alpha elsewhere."""

    def file(self, qwen, path: Path, **metadata: str) -> Path:
        path.parent.mkdir(exist_ok=True)
        down, up = pair(qwen, TO_Q)
        return write(
            path, {f"base_model.model.{TO_Q}.lora_A.weight": down, f"base_model.model.{TO_Q}.lora_B.weight": up}, **metadata
        )

    def gain(self, qwen, path: Path) -> float:
        before = weights(qwen)
        merge_lora(qwen, path)
        down, up = pair(qwen, TO_Q)
        return (changes(before, qwen)[TO_Q] / (up @ down)).median().item()

    @pytest.mark.parametrize(
        ("config", "expected"),
        [
            ({"lora_alpha": 8, "r": 2}, 4.0),
            ({"lora_alpha": 8, "r": 2, "use_rslora": True}, 8 / math.sqrt(2)),
            ({"lora_alpha": 8, "r": 2, "alpha_pattern": {"attn.to_q": 6}}, 3.0),
            ({"lora_alpha": 8, "r": 2, "alpha_pattern": {"n.to_q": 6}}, 4.0),
            ({}, 1.0),
        ],
    )
    def test_peft_folder(self, tmp_path, qwen, config, expected):
        file = self.file(qwen, tmp_path / "l" / "adapter_model.safetensors")
        (tmp_path / "l" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
        assert self.gain(qwen, tmp_path / "l") == pytest.approx(expected, rel=1e-3)
        assert self.gain(qwen, file) == pytest.approx(expected, rel=1e-3)

    def test_metadata_of_diffusers(self, tmp_path, qwen):
        metadata = json.dumps({"transformer.lora_alpha": 8, "transformer.r": 2})
        file = self.file(qwen, tmp_path / "pytorch_lora_weights.safetensors", lora_adapter_metadata=metadata)
        assert self.gain(qwen, file) == pytest.approx(4.0, rel=1e-3)

    @pytest.mark.parametrize(
        ("config", "words"),
        [({"peft_type": "LOKR"}, "found LOKR"), ({"peft_type": "LORA", "use_dora": True}, "expected the magnitudes")],
    )
    def test_other_adapters(self, tmp_path, qwen, config, words):
        self.file(qwen, tmp_path / "l" / "adapter_model.safetensors")
        (tmp_path / "l" / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=words):
            merge_lora(qwen, tmp_path / "l")

    def test_unreadable_metadata(self, tmp_path, qwen):
        file = self.file(qwen, tmp_path / "x.safetensors", lora_adapter_metadata="nonsense")
        with pytest.raises(CheckpointError, match="lora_adapter_metadata"):
            merge_lora(qwen, file)


def dora_by_hand(weight, down, up, gain, magnitude, axis, scale=1.0, bare=False):
    """W + scale * (m * (W + D) / |.| - W), the norm over rows (axis 1) or columns (axis 0)."""
    moved = weight + gain * up @ down
    norm = (weight if bare else moved).square().sum(axis, keepdim=True).sqrt()
    return weight + scale * (magnitude * moved / norm - weight)


class TestDora:
    """The weight's rows (or columns) get a length of their own; the LoRA turns them."""

    NAMES = (TO_Q, MLP)

    def file(self, module, path: Path, *, axis: int = 1, form: str = "dora_scale", **metadata: str) -> Path:
        state = {}
        for name in self.NAMES:
            down, up = pair(module, name)
            state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
            rows = self.magnitude(module, name, axis)
            state[f"{name}.{form}"] = rows if form == "dora_scale" else rows[:, 0]
        return write(path, state, **metadata)

    def magnitude(self, module, name: str, axis: int = 1) -> torch.Tensor:
        out, ins = find_linears(module)[name].weight.shape
        return draw(name + "magnitude", *((out, 1) if axis == 1 else (1, ins))).abs() + 1

    def expected(self, module, name: str, **how) -> torch.Tensor:
        axis = how.pop("axis", 1)
        weight = find_linears(module)[name].weight.detach().clone()
        return dora_by_hand(weight, *pair(module, name), ALPHA / RANK, self.magnitude(module, name, axis), axis, **how)

    @pytest.mark.parametrize("axis", [1, 0])
    @pytest.mark.parametrize("scale", [1.0, 0.25, -0.5])
    def test_merged_by_the_formula(self, tmp_path, qwen, axis, scale):
        expected = {name: self.expected(qwen, name, axis=axis, scale=scale) for name in self.NAMES}
        report = merge_lora(qwen, self.file(qwen, tmp_path / "x.safetensors", axis=axis), scale)
        assert close({name: weights(qwen)[name] for name in self.NAMES}, expected)
        assert (report.matched, report.unmatched) == (2, ())

    @pytest.mark.parametrize(
        "form", ["lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight"]
    )
    def test_forms_of_peft(self, tmp_path, qwen, form):
        expected = self.expected(qwen, TO_Q)
        merge_lora(qwen, self.file(qwen, tmp_path / "x.safetensors", form=form))
        assert torch.allclose(weights(qwen)[TO_Q], expected, atol=1e-5)

    def test_our_own_files_divide_by_the_bare_weight_as_comfyui_does(self, tmp_path, qwen):
        expected = self.expected(qwen, TO_Q, bare=True)
        assert not torch.allclose(expected, self.expected(qwen, TO_Q), atol=1e-3)
        merge_lora(qwen, self.file(qwen, tmp_path / "x.safetensors", **{"reasonedit.dora_norm": "weight"}))
        assert torch.allclose(weights(qwen)[TO_Q], expected, atol=1e-5)

    @pytest.mark.parametrize("axis", [1, 0])
    def test_adapters_equal_the_merge_in_every_order(self, tmp_path, qwen, axis):
        """A DoRA sees what the LoRAs before it made of the weight, whether they were merged or stand beside it."""
        plain = two_pairs(qwen, tmp_path / "a.safetensors", rank=3)
        dora = self.file(qwen, tmp_path / "b.safetensors", axis=axis)
        for order in ([dora], [plain, dora], [dora, plain], [dora, dora], [plain, dora, plain, dora]):
            one, other = (load_qwen_transformer(tiny_checkpoint("qwen-edit"), dtype=torch.float32)[0] for _ in range(2))
            before = forward(one)
            for path in order:
                apply_lora(one, path, 0.6)
                merge_lora(other, path, 0.6)
            assert (forward(one) - before).abs().max() > 1e-3
            assert (forward(one) - forward(other)).abs().max() < 1e-5

    def test_equal_to_pefts_own_layers(self, tmp_path, qwen):
        from peft import LoraConfig, inject_adapter_in_model

        other = load_qwen_transformer(tiny_checkpoint("qwen-edit"), dtype=torch.float32)[0]
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=[TO_Q, MLP])
        inject_adapter_in_model(config, other)
        for name in self.NAMES:
            layer = other.get_submodule(name)
            down, up = pair(qwen, name)
            layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = down, up
            layer.lora_magnitude_vector["default"].weight.data = self.magnitude(qwen, name)[:, 0]
        apply_lora(qwen, self.file(qwen, tmp_path / "x.safetensors"))
        assert (forward(qwen) - forward(other.eval())).abs().max() < 1e-5

    def test_fp8_rows_take_it_in_their_scales(self, tmp_path, qwen):
        quantize_linears(qwen)
        layer = find_linears(qwen)[TO_Q]
        stored, bits = dequantize_tensor(layer.weight, layer.weight_scale, torch.float32), layer.weight.clone()
        path = self.file(qwen, tmp_path / "x.safetensors")
        expected = dora_by_hand(stored, *pair(qwen, TO_Q), ALPHA / RANK, self.magnitude(qwen, TO_Q), 1, 0.5)
        x = draw("x", 3, 32)
        apply_lora(qwen, path, 0.5)
        wrapped = qwen.get_submodule(TO_Q)
        assert torch.allclose(wrapped(x), nn.functional.linear(x, expected, layer.bias), atol=1e-4)
        assert torch.equal(wrapped.base_layer.weight.view(torch.uint8), bits.view(torch.uint8)), "nothing is rounded"

    def test_fp8_columns_are_refused_before_anything_changes(self, tmp_path, qwen):
        quantize_linears(qwen, only=(MLP,))
        before = weights(qwen)
        with pytest.raises(ConfigError, match=r"x\.safetensors.*DoRA over columns.*net\.2.*in full"):
            apply_lora(qwen, self.file(qwen, tmp_path / "x.safetensors", axis=0))
        assert torch.equal(before[TO_Q], weights(qwen)[TO_Q])

    def test_fused_rows_are_split_and_fused_columns_refused(self, tmp_path, step1x):
        original, alpha = "double_blocks.1.img_attn.qkv", {"double_blocks.1.img_attn.qkv.alpha": torch.tensor(ALPHA)}
        parts = keymaps.step1x_modules(original)
        ins = step1x.get_submodule(parts[0]).in_features
        outs = [step1x.get_submodule(part).out_features for part in parts]
        down, up, rows = draw("d", RANK, ins), draw("u", sum(outs), RANK), draw("m", sum(outs), 1).abs() + 1
        state = {f"{original}.lora_down.weight": down, f"{original}.lora_up.weight": up, **alpha}
        fused = torch.cat([step1x.get_submodule(part).weight.detach() for part in parts])
        merge_lora(step1x, write(tmp_path / "x.safetensors", state | {f"{original}.dora_scale": rows}))
        merged = torch.cat([step1x.get_submodule(part).weight for part in parts])
        assert torch.allclose(merged, dora_by_hand(fused, down, up, ALPHA / RANK, rows, 1), atol=1e-5)
        with pytest.raises(CheckpointError, match="as the weight is fused"):
            merge_lora(step1x, write(tmp_path / "y.safetensors", state | {f"{original}.dora_scale": torch.ones(1, ins)}))

    @pytest.mark.parametrize(
        ("extra", "words"),
        [
            ({f"{TO_Q}.dora_scale": torch.ones(31, 1)}, r"magnitude of shape \(32, 1\) or \(1, 32\), found \(31, 1\)"),
            ({f"{TO_Q}.lora_magnitude_vector": torch.ones(32)}, "expected one magnitude"),
        ],
    )
    def test_bad_magnitudes(self, tmp_path, qwen, extra, words):
        down, up = pair(qwen, TO_Q)
        state = {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up, f"{TO_Q}.dora_scale": torch.ones(32, 1)}
        with pytest.raises(CheckpointError, match=words):
            apply_lora(qwen, write(tmp_path / "x.safetensors", state | extra))


class TestWholeTensors:
    """Parameters that were trained whole (a connector) travel in the LoRA's file."""

    def state(self, module) -> Deltas:
        down, up = pair(module, TO_Q)
        state = {f"diffusion_model.{TO_Q}.lora_A.weight": down, f"diffusion_model.{TO_Q}.lora_B.weight": up}
        state["diffusion_model.txt_in.set_weight"] = draw("w", *module.txt_in.weight.shape)
        state["diffusion_model.txt_in.bias.set_weight"] = draw("b", *module.txt_in.bias.shape)
        state["diffusion_model.txt_norm.set_weight"] = draw("n", *module.txt_norm.weight.shape)
        return state

    @pytest.mark.parametrize("apply", [apply_lora, merge_lora])
    @pytest.mark.parametrize("scale", [1.0, 0.5])
    def test_they_replace_or_approach_the_parameters(self, tmp_path, qwen, apply, scale):
        state, old = self.state(qwen), qwen.txt_in.weight.detach().clone()
        report = apply(qwen, write(tmp_path / "x.safetensors", state), scale)
        assert set(report.whole) == {"txt_in.weight", "txt_in.bias", "txt_norm.weight"} and report.unmatched == ()
        assert torch.allclose(qwen.txt_in.weight, old + scale * (draw("w", *old.shape) - old), atol=1e-6)
        if scale == 1:
            assert torch.equal(qwen.txt_in.bias, state["diffusion_model.txt_in.bias.set_weight"])
            assert torch.equal(qwen.txt_norm.weight, state["diffusion_model.txt_norm.set_weight"])

    def test_below_an_adapter_and_alone(self, tmp_path, qwen):
        apply_lora(qwen, two_pairs(qwen, tmp_path / "a.safetensors"))
        new = draw("w", 32, 32)
        report = apply_lora(qwen, write(tmp_path / "x.safetensors", {f"{TO_Q}.set_weight": new}))
        assert torch.equal(qwen.get_submodule(TO_Q).base_layer.weight, new)
        assert (report.matched, report.name, report.whole) == (0, "", (f"{TO_Q}.weight",))

    def test_in_a_peft_folder_they_stand_in_a_file_of_their_own(self, tmp_path, qwen):
        state = self.state(qwen)
        lora = {f"base_model.model.{key.split('.', 1)[1]}": value for key, value in state.items() if "lora" in key}
        write(tmp_path / "adapter_model.safetensors", lora)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": ALPHA, "r": RANK}))
        write(tmp_path / "whole.safetensors", {key.split(".", 1)[1]: v for key, v in state.items() if "lora" not in key})
        before = weights(qwen)[TO_Q]
        report = merge_lora(qwen, tmp_path)
        down, up = pair(qwen, TO_Q)
        assert torch.allclose(weights(qwen)[TO_Q], before + ALPHA / RANK * up @ down, atol=1e-5) and len(report.whole) == 3
        (tmp_path / "adapter_config.json").unlink()
        (tmp_path / "adapter_model.safetensors").unlink()
        assert apply_lora(qwen, tmp_path).matched == 0, "a folder may hold nothing but them"

    def test_what_does_not_fit_is_refused(self, tmp_path, qwen):
        with pytest.raises(CheckpointError, match=r"expected \(32, 64\) for txt_in.weight, found \(1, 1\)"):
            apply_lora(qwen, write(tmp_path / "x.safetensors", {"txt_in.set_weight": torch.ones(1, 1)}))
        quantize_linears(qwen, only=(MLP,))
        shape = find_linears(qwen)[MLP].weight.shape
        with pytest.raises(ConfigError, match="a whole tensor cannot be applied to fp8"):
            apply_lora(qwen, write(tmp_path / "y.safetensors", {f"{MLP}.set_weight": torch.ones(shape)}))


class TestNothingInSilence:
    def test_unmatched_keys_are_reported_and_logged_once(self, tmp_path, qwen, caplog):
        down, up = pair(qwen, TO_Q)
        state = {
            f"{TO_Q}.lora_A.weight": down,
            f"{TO_Q}.lora_B.weight": up,
            "transformer_blocks.77.attn.to_q.lora_A.weight": down,
            "transformer_blocks.77.attn.to_q.lora_B.weight": up,
            "transformer_blocks.0.attn.to_q.diff_b": torch.zeros(32),
            "lora_te_layers_0_q_proj.alpha": torch.tensor(1.0),
        }
        with caplog.at_level(logging.INFO, "reasonedit"):
            report = apply_lora(qwen, write(tmp_path / "x.safetensors", state))
        assert report.matched == 1
        assert set(report.unmatched) == set(list(state)[2:])
        lines = [record for record in caplog.records if "4 keys met no module" in record.message]
        assert len(lines) == 1 and lines[0].levelno == logging.WARNING

    def test_no_match_at_all_shows_both_sides(self, tmp_path, qwen):
        state = {"unet.down.lora_A.weight": torch.ones(1, 2), "unet.down.lora_B.weight": torch.ones(2, 1)}
        with pytest.raises(
            CheckpointError, match=r"no key that meets a module: unet\.down.*modules are called time_text_embed"
        ):
            apply_lora(qwen, write(tmp_path / "x.safetensors", state))

    @pytest.mark.parametrize(
        ("keys", "kind"),
        [
            (("lokr_w1", "lokr_w2"), "LoKr"),
            (("hada_w1_a",), "LoHa"),
            (("lora_down.weight", "lora_up.weight", "lora_mid.weight"), "LoCon"),
            (("oft_blocks",), "OFT"),
        ],
    )
    def test_other_kinds_are_named(self, tmp_path, qwen, keys, kind):
        state = {f"lycoris_{TO_Q.replace('.', '_')}.{key}": torch.ones(2, 2) for key in keys}
        with pytest.raises(CheckpointError, match=rf"x\.safetensors: expected a LoRA, found {kind}"):
            apply_lora(qwen, write(tmp_path / "x.safetensors", state))

    def test_half_a_pair(self, tmp_path, qwen):
        with pytest.raises(CheckpointError, match=r"expected a down and an up matrix, found only .*lora_A"):
            apply_lora(qwen, write(tmp_path / "x.safetensors", {f"{TO_Q}.lora_A.weight": torch.ones(2, 32)}))

    def test_an_alpha_that_is_no_number(self, tmp_path, qwen):
        down, up = pair(qwen, TO_Q)
        state = {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up, f"{TO_Q}.alpha": torch.ones(2)}
        with pytest.raises(CheckpointError, match=r"to_q\.alpha: expected one number, found .*\(2,\)"):
            apply_lora(qwen, write(tmp_path / "x.safetensors", state))

    def test_another_models_sizes(self, tmp_path, qwen):
        state = {f"{TO_Q}.lora_A.weight": torch.ones(2, 31), f"{TO_Q}.lora_B.weight": torch.ones(32, 2)}
        with pytest.raises(CheckpointError, match=r"expected down \(r, 32\) and up \(32, r\).*found \(2, 31\) and \(32, 2\)"):
            apply_lora(qwen, write(tmp_path / "x.safetensors", state))

    def test_the_same_module_twice(self, tmp_path, qwen):
        down, up = pair(qwen, TO_Q)
        state = {f"{TO_Q}.lora_A.weight": down, f"{TO_Q}.lora_B.weight": up}
        state |= {f"transformer.{key}": value for key, value in state.items()}
        with pytest.raises(CheckpointError, match="found a second one"):
            apply_lora(qwen, write(tmp_path / "x.safetensors", state))

    def test_two_adapters_in_one_file(self, tmp_path, qwen):
        down, up = pair(qwen, TO_Q)
        state = {f"{TO_Q}.lora_A.{n}.weight": down for n in "ab"} | {f"{TO_Q}.lora_B.{n}.weight": up for n in "ab"}
        with pytest.raises(CheckpointError, match="expected one adapter, found several"):
            apply_lora(qwen, write(tmp_path / "x.safetensors", state))

    def test_a_failed_lora_leaves_the_module_as_it_was(self, tmp_path, qwen):
        before = forward(qwen)
        state = {f"{TO_Q}.lora_A.weight": torch.ones(2, 32), f"{TO_Q}.lora_B.weight": torch.ones(31, 2)}
        with pytest.raises(CheckpointError):
            apply_lora(qwen, write(tmp_path / "x.safetensors", state))
        assert torch.equal(forward(qwen), before)
        assert not getattr(qwen, "peft_config", {})
