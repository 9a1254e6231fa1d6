"""Low-bit weights: the forms that are read, those that are refused, and Linears that stay fp8."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reasonedit.reasonedit_core import fp8
from reasonedit.reasonedit_core.errors import CheckpointError
from reasonedit.reasonedit_core.fp8 import (
    FP8,
    Fp8Linear,
    canonical,
    compute_in_fp8,
    dequantize,
    dequantize_tensor,
    module_bytes,
    quantize_linears,
    quantize_tensor,
)
from reasonedit.reasonedit_core.kernels import devices, explain, scaled, trial

QUICK = settings(max_examples=30, derandomize=True, deadline=None)


def random(*shape: int, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def note(**fields: object) -> torch.Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


STORED = random(4, 3).to(FP8)


class TestForms:
    """weight = stored * scale, in whatever form it comes."""

    def test_plain(self):
        result = dequantize({"l.weight": STORED, "l.bias": random(4).to(FP8), "n.weight": random(3)}, torch.bfloat16)
        assert torch.equal(result["l.weight"], STORED.to(torch.bfloat16))
        assert result["l.bias"].dtype == torch.bfloat16
        assert result["n.weight"].dtype == torch.float32  # not low-bit: left for the loader

    @pytest.mark.parametrize("scale", [torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([[0.3]])])
    def test_older_scaled_form(self, scale):
        state = {
            "scaled_fp8": torch.empty(2, dtype=FP8),
            "l.weight": STORED,
            "l.scale_weight": scale,
            "l.scale_input": torch.ones(()),
        }
        result = dequantize(state, torch.float32)
        assert set(result) == {"l.weight"}
        assert torch.equal(result["l.weight"], STORED.float() * torch.tensor(0.3))

    @pytest.mark.parametrize("shape", [(4,), (4, 1)])
    def test_newer_form_with_one_scale_per_row(self, shape):
        rows = torch.tensor([0.5, 1.0, 2.0, 3.0])
        state = {
            "l.weight": STORED,
            "l.weight_scale": rows.reshape(shape),
            "l.input_scale": torch.ones(()),
            "l.comfy_quant": note(format="float8_e4m3fn", full_precision_matrix_mult=True),
        }
        assert set(canonical(state)) == {"l.weight", "l.weight_scale"}
        assert torch.equal(dequantize(state, torch.float32)["l.weight"], STORED.float() * rows[:, None])

    def test_fp8_in_a_uint8_container(self):
        state = {"l.weight": STORED.view(torch.uint8), "l.comfy_quant": note(format="float8_e4m3fn")}
        assert torch.equal(dequantize(state, torch.float32)["l.weight"], STORED.float())

    def test_plain_int8_with_a_note(self):
        state = {
            "l.weight": torch.tensor([[-128, 127]], dtype=torch.int8),
            "l.weight_scale": torch.tensor([0.5]),
            "l.comfy_quant": note(format="int8_tensorwise"),
        }
        assert dequantize(state, torch.float32)["l.weight"].tolist() == [[-64.0, 63.5]]

    def test_a_scale_beside_a_full_weight_counts_too(self):
        state = {"l.weight": torch.ones(2, 2, dtype=torch.bfloat16), "l.scale_weight": torch.tensor(0.5)}
        assert dequantize(state, torch.float32)["l.weight"].tolist() == [[0.5, 0.5], [0.5, 0.5]]

    def test_the_product_is_rounded_once(self):
        """In bf16 the scale alone would already be rounded: 3 * 1.007 is not 3 * bf16(1.007) = 3 * 1.0078125."""
        stored, scale = torch.tensor([[26.0]]).to(FP8), torch.tensor(1.0059)
        result = dequantize({"l.weight": stored, "l.weight_scale": scale}, torch.bfloat16)["l.weight"]
        assert result.item() == torch.tensor(26 * 1.0059).to(torch.bfloat16).item()
        assert result.item() != (stored.to(torch.bfloat16) * scale.to(torch.bfloat16)).item()


class TestRefused:
    @pytest.mark.parametrize(
        ("state", "words"),
        [
            (
                {"l.weight": STORED.view(torch.int8), "l.comfy_quant": note(format="int8_tensorwise", convrot=True)},
                "ConvRot",
            ),
            ({"l.weight": STORED.view(torch.int8), "l.weight_scale": torch.ones(())}, "int8 weights without a note"),
            ({"l.weight": STORED.view(torch.uint8), "l.comfy_quant": note(format="nvfp4")}, "nvfp4"),
            ({"l.weight": STORED, "l.comfy_quant": note(format="mxfp8")}, "mxfp8"),
            ({"l.weight": STORED, "l.weight_scale_2": torch.ones(())}, "second scale"),
            ({"l.weight": STORED, "l.pre_quant_scale": torch.ones(3)}, "pre_quant_scale"),
            ({"l.weight": STORED, "l.weight_scale": torch.ones(2, 3)}, r"block-wise scales of shape \(2, 3\)"),
            ({"l.weight": STORED, "l.weight_scale": torch.ones(4, dtype=torch.uint8)}, "block-wise scales in 8 bits"),
        ],
    )
    def test_forms_that_need_other_kernels(self, state, words):
        with pytest.raises(CheckpointError, match=words) as caught:
            canonical(state)
        assert str(caught.value).startswith("l: ")
        assert "use the bf16" in str(caught.value)

    def test_a_note_that_cannot_be_read(self):
        with pytest.raises(CheckpointError, match=r"l\.comfy_quant"):
            canonical({"l.weight": STORED, "l.comfy_quant": torch.tensor([1, 2], dtype=torch.uint8)})

    def test_damaged_weights_are_not_quantised(self):
        with pytest.raises(CheckpointError, match="NaN"):
            quantize_tensor(torch.tensor([[1.0, float("nan")]]))


class TestQuantising:
    @QUICK
    @given(st.floats(1e-6, 1e6), st.integers(0, 5))
    def test_three_mantissa_bits_are_kept(self, std, seed):
        weight = random(8, 16, seed=seed, std=std)
        stored, scale = quantize_tensor(weight)
        assert torch.frexp(scale)[0] == 0.5  # a power of two
        error = (dequantize_tensor(stored, scale, torch.float32) - weight).abs()
        # Half of the last of three mantissa bits; below the smallest normal number, half of the smallest step.
        assert (error <= torch.maximum(weight.abs() * 2**-4, scale * 2**-10)).all()

    @QUICK
    @given(st.floats(1e-6, 1e6), st.integers(0, 5))
    def test_what_was_fp8_comes_back(self, std, seed):
        once = dequantize_tensor(*quantize_tensor(random(8, 16, seed=seed, std=std)), torch.float32)
        assert torch.equal(dequantize_tensor(*quantize_tensor(once), torch.float32), once)

    @pytest.mark.parametrize("weight", [torch.zeros(2, 2), torch.full((2, 2), 448.0), torch.full((1, 1), -449.0)])
    def test_edges(self, weight):
        stored, scale = quantize_tensor(weight)
        assert torch.allclose(dequantize_tensor(stored, scale, torch.float32), weight, rtol=2**-4, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_the_whole_range_is_used(self, dtype):
        for peak, scale in ((448.0, 1.0), (224.0, 0.5), (225.0, 1.0), (450.0, 2.0)):
            stored, found = quantize_tensor(torch.tensor([[1.0, -peak]], dtype=dtype))
            assert (found, stored.float().abs().max() >= 224) == (scale, True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.x_embedder = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False))])
        self.table = nn.Embedding(3, 8)
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x):
        return self.blocks[0](self.x_embedder(x))


class TestFp8Linear:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("scale", [torch.tensor(0.37), torch.tensor([0.1, 0.2, 0.3, 0.4])])
    def test_equals_a_linear_with_the_dequantised_weight_bit_for_bit(self, dtype, scale):
        x, bias = random(2, 5, 3, seed=1).to(dtype), random(4, seed=2).to(dtype)
        expected = F.linear(x, dequantize_tensor(STORED, scale, dtype), bias)
        assert torch.equal(Fp8Linear(STORED, scale, bias)(x), expected)

    def test_a_change_of_dtype_leaves_the_stored_weight(self):
        layer = Fp8Linear(STORED, torch.tensor(0.3), random(4))
        weight = layer.weight.view(torch.uint8).clone()
        for _ in range(2):
            layer.to(torch.bfloat16)
            assert layer.weight.dtype == FP8
            assert torch.equal(layer.weight.view(torch.uint8), weight)
            assert layer.weight_scale == torch.tensor(0.3)
            assert layer.bias.dtype == torch.bfloat16
            layer.half().float().bfloat16()

    def test_moves_follow(self):
        layer = Fp8Linear(STORED, torch.tensor(0.3), None).to("meta")
        assert layer.weight.is_meta and layer.weight_scale.is_meta

    def test_state_dict_round_trip(self):
        layer = Fp8Linear(STORED, torch.tensor(0.3), random(4))
        other = Fp8Linear(torch.zeros(4, 3).to(FP8), torch.ones(()), torch.zeros(4))
        other.load_state_dict(layer.state_dict())
        x = random(2, 3)
        assert torch.equal(layer(x), other(x))

    def test_first_and_last_layers_norms_and_embeddings_stay(self):
        net = Net()
        assert quantize_linears(net) == ("blocks.0.0", "blocks.0.2")
        assert type(net.x_embedder) is nn.Linear
        assert net.blocks[0][1].weight.dtype == net.table.weight.dtype == net.conv.weight.dtype == torch.float32

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"skip": ()}, ("x_embedder", "blocks.0.0", "blocks.0.2")),
            ({"skip": ("blocks",)}, ("x_embedder",)),
            ({"skip": ("block",)}, ("x_embedder", "blocks.0.0", "blocks.0.2")),  # whole names only
            ({"skip": ("*.2",)}, ("x_embedder", "blocks.0.0")),
            ({"only": ("x_embedder",)}, ("x_embedder",)),
        ],
    )
    def test_which_layers(self, options, expected):
        assert quantize_linears(Net(), **options) == expected

    def test_results_stay_close_and_bytes_fall(self):
        torch.manual_seed(0)
        net, x = Net().eval(), random(4, 6)
        before, size = net(x), module_bytes(net)
        quantize_linears(net)
        after = net(x)
        assert 0 < (after - before).norm() / before.norm() < 0.1
        assert module_bytes(net) == size - 2 * 8 * 8 * 3 + 2 * 4

    def test_on_the_meta_device_only_shapes_are_made(self):
        with torch.device("meta"):
            net = Net()
        quantize_linears(net)
        assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))
        assert net.blocks[0][0].weight.dtype == FP8


CARD = torch.device("cuda", 0)
WAYS = [way for way in scaled.WAYS if scaled._absent(way) is None]
"""torch's functions that are there; they run on the CPU as well."""


@pytest.fixture
def here(monkeypatch):
    """The CPU multiplies in 8 bits."""
    if not WAYS:
        pytest.skip("this torch has no product with scales")
    monkeypatch.setattr(scaled, "_way", lambda device: (WAYS[-1], None))
    devices.log_once.cache_clear()


def layer(dtype=torch.bfloat16, scale=0.02, bias=True, computing=True, features=(64, 48)):
    weight = random(features[1], features[0]).to(FP8)
    scale = torch.tensor(scale) if isinstance(scale, float) else scale
    return Fp8Linear(weight, scale, random(features[1], seed=2).to(dtype) if bias else None, computing=computing)


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


class TestComputing:
    """Products in 8 bits: opted in to, probed, tested on the card, and the dequantised form wherever they do not fit."""

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("scale", [0.02, torch.linspace(0.01, 0.1, 48)], ids=["one scale", "by row"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_the_product_is_that_of_the_rounded_activations(self, here, monkeypatch, dtype, scale, bias, way):
        """Against float64 on what was rounded: nothing but the answer's own rounding is between them."""
        monkeypatch.setattr(scaled, "_way", lambda device: (way, None))
        net, x = layer(dtype, scale, bias), random(2, 5, 64, seed=1).to(dtype)
        stored, scales = scaled.quantize_rows(x.flatten(0, 1))
        rounded = (stored.double() * scales.double()).view(2, 5, 64)
        weight = net.weight.double() * net.weight_scale.double().reshape(-1, 1)
        wanted = rounded @ weight.t() + (net.bias.double() if bias else 0)
        with torch.no_grad():
            found = net(x)
        assert found.shape == (2, 5, 48) and found.dtype == dtype
        assert apart(found, wanted) < 4e-3

    def test_against_the_dequantised_form_it_is_off_by_the_rounding_of_activations(self, here):
        """Three mantissa bits of random numbers: between one and four parts in a hundred. Not less, or nothing was rounded."""
        net, x = layer(features=(512, 256)), random(64, 512, seed=1).to(torch.bfloat16)
        with torch.no_grad():
            found = net(x)
            net.computing = False
            assert 0.01 < apart(found, net(x)) < 0.04

    def test_rows_are_rounded_apart_and_nothing_overflows(self):
        x = torch.cat([random(1, 64), 1e4 * random(1, 64, seed=1), torch.zeros(1, 64), 1e-30 * random(1, 64, seed=2)])
        stored, scale = scaled.quantize_rows(x)
        assert stored.dtype == FP8 and scale.shape == (4, 1) and scale.dtype == torch.float32
        assert stored.float().isfinite().all() and (stored[[0, 1, 3]].float().abs().amax(1) == 448).all()
        assert stored[2].float().abs().max() == 0
        error = (stored.float() * scale - x).abs()
        assert (error <= torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.001).all()
        worst = torch.full((1, 16), 65504.0, dtype=torch.float16)
        assert torch.equal(scaled.quantize_rows(worst)[0].float(), torch.full((1, 16), 448.0))
        assert scaled.quantize_rows(torch.tensor([[float("nan")] * 16]))[0].float().isnan().all(), "damage is not hidden"

    @pytest.mark.parametrize(
        ("x", "features", "words"),
        [
            (random(3, 64), (64, 48), "it takes float16 or bfloat16, got torch.float32"),
            (random(3, 24).bfloat16(), (24, 48), "multiples of 16 in and out, got 24 and 48"),
            (random(3, 64).bfloat16(), (64, 20), "multiples of 16 in and out, got 64 and 20"),
            (random(0, 64).bfloat16(), (64, 48), "there is nothing to multiply"),
        ],
    )
    def test_other_calls_take_the_dequantised_form_and_say_why_once(self, here, caplog, x, features, words):
        net = layer(features=features)
        with caplog.at_level("INFO"), torch.no_grad():
            for _ in range(2):
                found = net(x)
        net.computing = False
        assert torch.equal(found, net(x))
        assert sum(words in line and "are brought to" in line for line in caplog.messages) == 1

    def test_gradients_are_those_of_the_dequantised_form(self, here):
        net, x = layer(), random(3, 64, seed=1).to(torch.bfloat16).requires_grad_()
        (found := net(x)).sum().backward()
        grad, x.grad, net.computing = x.grad, None, False
        (wanted := net(x)).sum().backward()
        assert torch.equal(found, wanted) and torch.equal(grad, x.grad)
        net.computing = True
        with torch.no_grad():
            assert not torch.equal(net(x), wanted)

    def test_it_is_opted_in_to(self, here):
        net = Net()
        quantize_linears(net)
        assert not any(child.computing for child in net.modules() if isinstance(child, Fp8Linear))
        assert compute_in_fp8(net) == 2 and all(net.blocks[0][n].computing for n in (0, 2))
        assert Fp8Linear.from_linear(nn.Linear(16, 16), computing=True).computing
        with torch.device("meta"):
            assert Fp8Linear.from_linear(nn.Linear(16, 16), computing=True).computing

    def test_the_cpu_and_switched_off_kernels_say_why(self, monkeypatch):
        assert scaled.refusal(torch.device("cpu")) == "it needs CUDA, not cpu"
        assert "fp8 products on cpu: dequantised; it needs CUDA, not cpu" in explain("cpu")
        monkeypatch.setenv("REASONEDIT_KERNELS", "off")
        assert scaled.refusal(CARD) == "REASONEDIT_KERNELS=off"

    def test_a_card_that_is_too_old_and_a_torch_that_lacks_it_say_why(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 6))
        assert scaled.refusal(CARD) == "it needs a card of compute capability 8.9 or newer, found 8.6"
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 9))
        monkeypatch.setattr(devices, "passed", lambda *call: None)
        monkeypatch.delattr(F, "scaled_mm", raising=False)
        assert scaled._way(CARD) == ("_scaled_mm", None)
        monkeypatch.delattr(torch, "_scaled_mm", raising=False)
        told = scaled.refusal(CARD)
        assert f"scaled_mm: torch {torch.__version__} has no torch.nn.functional.scaled_mm with scales by row" in told
        assert f"_scaled_mm: torch {torch.__version__} has no torch._scaled_mm" in told

    @pytest.mark.parametrize("way", WAYS)
    def test_the_test_of_a_card_passes_here_and_fails_where_a_product_is_wrong(self, monkeypatch, way):
        device = torch.device("cpu")
        assert trial.run(scaled.OP, way, device) is None
        true = scaled._CALLS[way]
        monkeypatch.setitem(scaled._CALLS, way, lambda *call: true(*call) * 1.05)
        assert trial.run(scaled.OP, way, device).startswith("its test failed: the product with one scale is off by 5")
        monkeypatch.setitem(scaled._CALLS, way, lambda rows, columns, scales, by, bias: true(rows, columns, scales, by, None))
        assert "with one scale and bias is off" in trial.run(scaled.OP, way, device)
        monkeypatch.setitem(scaled._CALLS, way, lambda *call: 1 / 0)
        assert trial.run(scaled.OP, way, device).startswith("its test broke (ZeroDivisionError")

    def test_each_of_torchs_functions_is_tested_once_and_the_first_that_passes_is_taken(self, monkeypatch):
        runs = []
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(devices, "_PASSED", {})
        monkeypatch.setattr(scaled, "_absent", lambda way: None)
        failing = {"scaled_mm"}
        monkeypatch.setattr(trial, "run", lambda op, way, device: runs.append((op, way)) or ("no" if way in failing else None))
        for _ in range(2):
            assert scaled._way(CARD) == ("_scaled_mm", None)
        assert runs == [(scaled.OP, "scaled_mm"), (scaled.OP, "_scaled_mm")]
        devices._PASSED.clear()
        failing.add("_scaled_mm")
        assert scaled.refusal(CARD) == "scaled_mm: no; _scaled_mm: no"

    def test_compile_sees_one_graph(self, here):
        net, x = layer(), random(3, 64, seed=1).to(torch.bfloat16)
        with torch.no_grad():
            assert torch.equal(torch.compile(net, backend="eager", fullgraph=True)(x), net(x))
        net.computing, plain = True, fp8.Fp8Linear(net.weight, net.weight_scale, net.bias)
        with torch.no_grad():
            assert not torch.equal(net(x), plain(x))
