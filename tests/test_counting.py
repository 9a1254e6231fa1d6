"""The public counter: what a byte is, what an operator is, and the calibration against diffusers' Qwen-Image transformer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from reasonedit.reasonedit_core.bench import counted
from reasonedit.reasonedit_core.counting import Work, count, tensor_bytes
from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.kernels import Heads, gate_norm_modulate, qk_norm_rope


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


ROWS, WIDTH = 6, 10
TENSOR = 2 * ROWS * WIDTH
X, Y = meta(ROWS, WIDTH), meta(ROWS, WIDTH)
ROW = meta(WIDTH)
INDEX = meta(4, dtype=torch.int64)

ELEMENTWISE = {
    "two read, one written": (lambda: X + Y, 3 * TENSOR, 1),
    "read once and written once": (lambda: X.float(), TENSOR + 2 * TENSOR, 1),
    "a scalar is no tensor": (lambda: X * 2, 2 * TENSOR, 1),
    "a broadcast row counts as it is stored": (lambda: X * ROW, 2 * TENSOR + 2 * WIDTH, 1),
    "so does a view that repeats it": (lambda: X * ROW.expand(ROWS, WIDTH), 2 * TENSOR + 2 * WIDTH, 1),
    "in place: read and written": (lambda: meta(ROWS, WIDTH).add_(Y), 3 * TENSOR, 1),
    "a copy into: mutated twice, read once": (lambda: meta(ROWS, WIDTH).copy_(Y), 3 * TENSOR, 1),
    "an out= tensor is written": (lambda: torch.add(X, Y, out=meta(ROWS, WIDTH)), 4 * TENSOR, 1),
    "a list of tensors": (lambda: torch.cat([X, Y]), 4 * TENSOR, 1),
    "indices": (lambda: X.index_select(0, INDEX), TENSOR + 8 * 4 + 2 * 4 * WIDTH, 1),
    "two ops": (lambda: F.gelu(X) * Y, 5 * TENSOR, 2),
    "a fill writes": (lambda: torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16, device="meta"), TENSOR, 1),
    "views move nothing": (lambda: X.view(-1).unsqueeze(0)[0, 1:].split(3)[0].view(3).detach(), 0, 0),
    "nor do allocations": (lambda: [torch.empty_like(X), X.new_empty(5), torch.arange(5, device="meta")], 0, 0),
    "a reshape that copies counts": (lambda: X.t().reshape(-1), 2 * TENSOR, 1),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_bytes_and_operators(name):
    fn, wanted, kernels = ELEMENTWISE[name]
    work = count(fn)
    assert (work.elementwise_bytes, work.kernels) == (wanted, kernels)
    assert (work.flops, work.matmul_bytes, work.attentions) == (0, 0, 0)


def test_weights_and_all_answers_count():
    """A norm reads its weights, and writes statistics that nobody asked for."""
    weight, answers = meta(WIDTH), []
    work = count(lambda: answers.extend(torch.native_layer_norm(X, [WIDTH], weight, weight, 1e-6)))
    assert len(answers) == 3 and work.kernels == 1
    assert work.elementwise_bytes == TENSOR + 2 * 2 * WIDTH + sum(x.numel() * x.element_size() for x in answers)


def test_a_tensor_counts_at_most_its_storage():
    row = torch.empty(WIDTH, device="meta")
    assert tensor_bytes(row.expand(100, WIDTH)) == 4 * WIDTH
    assert tensor_bytes(meta(100, WIDTH)[:3]) == 3 * 2 * WIDTH


def test_matrix_products_stand_apart():
    layer = nn.Linear(WIDTH, 7, device="meta", dtype=torch.bfloat16)
    work = count(lambda: [layer(X), X @ Y.t(), torch.bmm(X[None], Y.t()[None])])
    assert (work.elementwise_bytes, work.kernels, work.matmuls) == (0, 0, 3)
    assert work.flops == 2 * ROWS * WIDTH * 7 + 2 * (2 * ROWS * WIDTH * ROWS)
    weights = 2 * (7 * WIDTH + 7)
    assert work.matmul_bytes == (TENSOR + weights + 2 * ROWS * 7) + 2 * (2 * TENSOR + 2 * ROWS * ROWS)
    with FlopCounterMode(display=False) as torchs:
        layer(X)
    assert count(lambda: layer(X)).flops == torchs.get_total_flops()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_is_opaque_and_has_the_flops_of_sdpa(masked, groups):
    q, k, v = meta(2, 4, 5, 8), meta(2, 4 // groups, 9, 8), meta(2, 4 // groups, 9, 8)
    mask = meta(2, 1, 5, 9, dtype=torch.bool) if masked else None
    shapes = []

    def call():
        out = F.scaled_dot_product_attention(q, key=k, value=v, attn_mask=mask, enable_gqa=groups > 1)
        shapes.append((out.shape, out.dtype))
        return out.transpose(1, 2).flatten(2)

    work = count(call)
    assert work.flops == work.attention_flops == 2 * (2 * 2 * 4 * 5 * 9 * 8)
    assert (work.attentions, work.elementwise_bytes, work.kernels, work.matmul_bytes) == (1, 0, 0, 0)
    assert shapes == [(torch.Size([2, 4, 5, 8]), torch.bfloat16)]


def test_an_attention_without_a_formula_is_refused():
    library = torch.library.Library("reasonedit_test_counting", "DEF")
    library.define("odd_attention(Tensor q) -> Tensor")
    library.impl("odd_attention", lambda q: q.clone(), "Meta")
    with pytest.raises(ConfigError, match="odd_attention.*FLOP formula"):
        count(lambda: torch.ops.reasonedit_test_counting.odd_attention(X))


def test_our_fused_ops_are_single_operators():
    """K1 and K2 on the meta device: each reads and writes every tensor once, and is known by name."""
    tokens, heads, dim = 6, 2, 8
    stream = Heads(*(meta(1, tokens, heads, dim) for _ in range(3)), meta(dim), meta(dim))
    table = (meta(tokens, dim, dtype=torch.float32),) * 2
    k1 = count(lambda: qk_norm_rope(stream, table))
    assert k1.kernels == 1 and len(k1.custom_ops) == 1 and k1.custom_ops[0].startswith("reasonedit::qk_norm_rope")
    unit = 2 * tokens * heads * dim
    assert k1.elementwise_bytes == 4 * unit + 2 * 2 * dim + 2 * 4 * tokens * dim // 2

    x, rows = meta(1, tokens, 16), [meta(1, 16) for _ in range(3)]
    k2 = count(lambda: gate_norm_modulate(x, x.clone(), *rows))
    assert k2.custom_ops == ("reasonedit::gate_norm_modulate",)
    assert k2.bytes_by_op["reasonedit::gate_norm_modulate"] == 4 * 2 * tokens * 16 + 3 * 2 * 16


def test_counting_needs_no_gradients_and_changes_no_result():
    x = torch.randn(3, 4, requires_grad=True)
    seen = []
    work = count(lambda: seen.append(x * 2))
    assert not seen[0].requires_grad and torch.equal(seen[0], (x * 2).detach())
    assert work.bytes_by_op == {"aten::mul": 2 * 48} and work.calls_by_op == {"aten::mul": 1}


def test_what_fails_inside_still_ends_the_count():
    def fail():
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        count(fail)
    assert count(lambda: X + Y).kernels == 1, "no mode is left over"


def test_operators_are_sorted_by_weight():
    work = count(lambda: [F.gelu(X), X + Y, F.gelu(X)])
    assert isinstance(work, Work)
    assert list(work.bytes_by_op) == ["aten::gelu", "aten::add"] and sum(work.calls_by_op.values()) == work.kernels


def test_calibration_diffusers_qwen_image_transformer():
    """295 GB, 4,534 operators, 177.57 TFLOP: the full-size figures that the speed work refers to."""
    work = counted.stock_qwen()
    assert work.elementwise_bytes == pytest.approx(295e9, rel=0.01)
    assert work.kernels == 4534
    assert work.flops == pytest.approx(177.57e12, rel=0.01)
    assert work.attention_flops == pytest.approx(57.51e12, rel=0.001) and work.attentions == 60
    assert work.custom_ops == ()


FUSED = {f"reasonedit::{name}" for name in ("qk_norm_rope", "qk_norm_rope_pair", "qk_norm_rope_cached")}
FUSED |= {f"reasonedit::{name}" for name in ("gate_norm_modulate", "gate_residual", "norm_modulate")}
FUSED |= {f"reasonedit::{name}" for name in ("guided_step", "guided_step_velocity")}


@pytest.mark.parametrize(
    ("system", "flops", "most_bytes", "most_kernels"),
    [
        ("step1x", 169.25e12, 0.19 * 388e9, 0.25 * 3204),
        ("qwen_image", 177.57e12, 0.28 * 295e9, 0.25 * 4534),
    ],
    ids=["step1x", "qwen_image"],
)
def test_full_size_forwards_of_ours(system, flops, most_bytes, most_kernels):
    """The bar: a fraction of the released element-wise traffic and operators, with the same matrix products and attention.

    With nothing prepared before, and in later steps. Operators of our own are the fused ones, each with kernels and tests of
    its own and without a matrix product inside.
    """
    found = counted.forward(system)
    for work in (found, found["later"]):
        assert work["flops"] == pytest.approx(flops, rel=0.01)
        assert work["elementwise_bytes"] <= most_bytes and work["kernels"] <= most_kernels
    assert found["later"]["elementwise_bytes"] <= found["elementwise_bytes"]
    assert set(found["custom_ops"]) <= FUSED
