"""K2, `gate_norm_modulate`: the plain form against the DiTs' own code, the operators against it, Triton interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError
from reasonedit.reasonedit_core.kernels import custom_ops, gate_norm_modulate
from reasonedit.reasonedit_core.models.streams import Samples, Spans
from reasonedit.tests import interpreter
from reasonedit.tests import kernel_cases as cases


def make(batch=2, tokens=5, width=12, count=None, dtype=torch.float32, seed=0):
    """x, y, gate, scale, shift."""
    draw = cases.Draw(dtype, seed)
    tables = draw(batch if count is None else count, 3 * width).chunk(3, dim=1)
    return draw(batch, tokens, width), draw(batch, tokens, width), *tables


def test_triton_equals_the_plain_form_in_float64():
    interpreter.run("k2 or gate_norm_modulate")


@pytest.mark.slow
def test_triton_equals_the_plain_form_in_every_case():
    interpreter.run("k2", slow=True)


# --- the plain form is what the DiTs compute ---


def norm(x):
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6)


def test_equals_the_batches_of_the_dits():
    x, y, gate, scale, shift = make()
    wanted = Samples().gated(x, gate, y)
    residual, normed = gate_norm_modulate(x, y, gate, scale, shift)
    torch.testing.assert_close(residual, wanted)
    torch.testing.assert_close(normed, Samples().modulate(norm(wanted), scale, shift), rtol=1e-5, atol=1e-5)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(spans=st.lists(st.tuples(st.integers(0, 4), st.sampled_from([None, 0, 1, 2])), min_size=1, max_size=5))
def test_equals_the_packs_of_the_dits(spans):
    """Rows by token are the spans of a pack, padding (None) included."""
    lengths, rows = zip(*spans, strict=True)
    if not sum(lengths):
        return
    x, y, gate, scale, shift = make(batch=1, tokens=sum(lengths), count=3)
    pack = Spans(lengths, rows)
    index = torch.tensor([-1 if row is None else row for row in rows]).repeat_interleave(torch.tensor(lengths))
    wanted = pack.gated(x, gate, y)
    residual, normed = gate_norm_modulate(x, y, gate, scale, shift, rows=index)
    torch.testing.assert_close(residual, wanted)
    torch.testing.assert_close(normed, pack.modulate(norm(wanted), scale, shift), rtol=1e-5, atol=1e-5)


def test_equals_the_last_norm_and_the_clean_references_of_qwen_image():
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    x, _, _, scale, shift = make(count=4)
    block = QwenImageTransformerBlock.__new__(QwenImageTransformerBlock)
    index = torch.tensor([[0, 0, 1, 1, 1]] * 2)  # 1: a reference, modulated as at t = 0
    wanted, _ = QwenImageTransformerBlock._modulate(block, norm(x), torch.cat([shift, scale, scale], dim=1), index)
    rows = torch.arange(2)[:, None] + 2 * index
    torch.testing.assert_close(gate_norm_modulate(x, scale=scale, shift=shift, rows=rows)[1], wanted, rtol=1e-5, atol=1e-5)


def test_parts_of_it_equal_the_whole():
    x, y, gate, scale, shift = make(dtype=torch.bfloat16)
    residual, normed = gate_norm_modulate(x, y, gate, scale, shift)
    only, nothing = gate_norm_modulate(x, y, gate)
    same, later = gate_norm_modulate(only, scale=scale, shift=shift)
    assert torch.equal(only, residual) and nothing is None
    assert same is only and torch.equal(later, normed)


def test_residuals_in_float16_stay_finite_where_asked():
    class Plainly:
        @staticmethod
        def gate_norm_modulate(x, y, gate, scale, shift, rows, residual, normed, eps, clamp):
            residual.copy_(gate_norm_modulate(x, y, gate, clamp=clamp)[0])

    cases.check_k2_clamp(Plainly)


# --- operators ---


@pytest.mark.parametrize("rows", [None, torch.tensor([1, -1, 0, 2]), torch.tensor([[1, -1, 0, 2], [0, 0, 2, 1]])], ids=str)
def test_gradients_of_the_operators(rows):
    tensors = make(tokens=4, width=3, count=2 if rows is None else 3)
    x, y, gate, scale, shift = (t.detach().double().requires_grad_() for t in tensors)

    def both(*tensors):
        return custom_ops.gate_norm_modulate(*tensors, rows, 1e-6, False, "reference")

    def gated(*tensors):
        return custom_ops.gate_residual(*tensors, rows, False, "reference")

    def normed(*tensors):
        return custom_ops.norm_modulate(*tensors, rows, 1e-6, "reference")

    assert torch.autograd.gradcheck(both, (x, y, gate, scale, shift), fast_mode=True)
    assert torch.autograd.gradcheck(gated, (x, y, gate), fast_mode=True)
    assert torch.autograd.gradcheck(normed, (x, scale, shift), fast_mode=True)


def test_gradients_of_modulation_are_summed_in_float32():
    """In bfloat16, where a sum of many small gradients in the weights' dtype would stop growing."""
    x, y, gate, scale, shift = make(batch=1, tokens=600, width=4, count=2, dtype=torch.bfloat16)
    rows = (torch.arange(600) >= 300).long()
    leaves = [t.detach().requires_grad_() for t in (gate, scale, shift)]
    out = gate_norm_modulate(x, y, *leaves, rows=rows)
    sum(o.float().sum() for o in out).backward()
    wide = [t.detach().double().requires_grad_() for t in (gate, scale, shift)]
    wanted = gate_norm_modulate(x.double(), y.double(), *wide, rows=rows)
    sum(o.sum() for o in wanted).backward()
    for ours, theirs in zip(leaves[1:], wide[1:], strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=8e-3, atol=1.0)


@pytest.mark.parametrize("inside", [False, True], ids=["outside autocast", "inside autocast"])
def test_gradients_do_not_depend_on_autocast(inside):
    x, y, gate, scale, shift = make(count=2, batch=1)
    rows = torch.tensor([0, 1, 1, 0, -1])
    grads = []
    for lowered in (False, inside):
        leaves = [t.detach().clone().requires_grad_() for t in (gate, scale, shift)]
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered):
            out = gate_norm_modulate(x, y, *leaves, rows=rows)
            sum((o * o.detach().cos()).sum() for o in out).backward()
        grads.append([t.grad for t in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_operators_satisfy_torch():
    x, y, gate, scale, shift = (t.detach().clone().requires_grad_() for t in make(count=3))
    rows = torch.tensor([1, -1, 0, 2, 2])
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    named = torch.ops.reasonedit
    call = (x, y, gate, scale, shift, rows, 1e-6, False, "reference")
    torch.library.opcheck(named.gate_norm_modulate.default, call, test_utils=tests)
    torch.library.opcheck(named.gate_residual.default, (x, y, gate, rows, False, "reference"), test_utils=tests)
    torch.library.opcheck(named.norm_modulate.default, (x, scale, shift, rows, 1e-6, "reference"), test_utils=tests)


def test_compile_sees_one_node():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    call = [t.to("meta") for t in make()]
    found = torch.compile(lambda: gate_norm_modulate(*call), backend=backend, fullgraph=True)()
    assert [t.shape for t in found] == [call[0].shape] * 2
    calls = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function" and "getitem" not in node.name]
    assert len(graphs) == 1 and calls == ["reasonedit.gate_norm_modulate.default"]


def test_compiled_training_has_the_same_gradients():
    tensors, rows, grads = make(count=3), torch.tensor([0, 1, -1, 2, 2]), []
    eager = custom_ops.gate_norm_modulate
    for run in (eager, torch.compile(eager, backend="aot_eager", fullgraph=True)):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        out = run(*leaves, rows, 1e-6, False, "reference")
        sum((o * o.detach().cos()).sum() for o in out).backward()
        grads.append([t.grad for t in leaves])
    torch.testing.assert_close(*grads)


# --- refusals ---


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda x, y, g, c, s: ((x,), {}), "nothing to do"),
        (lambda x, y, g, c, s: ((x, y), {}), "takes y with gate"),
        (lambda x, y, g, c, s: ((x,), dict(scale=c)), "scale with shift"),
        (lambda x, y, g, c, s: ((x, y[:, :2], g), {}), r"takes x and y \(B, L, C\).*\(2, 2, 12\)"),
        (lambda x, y, g, c, s: ((x, y, g[:, :3]), {}), r"modulation is \(R, 12\)"),
        (lambda x, y, g, c, s: ((x, y, g, c[:1], s), {}), r"with one R, got \(2, 12\), \(1, 12\)"),
        (lambda x, y, g, c, s: ((x, y, torch.cat([g, g])), {}), "4 rows for a batch of 2: give rows"),
        (lambda x, y, g, c, s: ((x, y, g), dict(rows=torch.arange(4))), r"rows are \(5,\) or \(2, 5\)"),
        (lambda x, y, g, c, s: ((x, y, g), dict(rows=torch.zeros(5))), "int32 or int64.*float32"),
    ],
)
def test_calls_without_meaning_are_refused(change, words):
    args, options = change(*make())
    with pytest.raises(ConfigError, match=words):
        gate_norm_modulate(*args, **options)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda x, y, *m: (x.double(), y.double(), *m), "got torch.float64"),
        (lambda x, y, *m: (x, y.half(), *m), "one dtype on one device"),
        (lambda x, y, g, *m: (x, y, g.half(), *m), "one dtype on one device"),
    ],
)
def test_what_a_kernel_cannot_take_is_told_and_the_plain_form_takes_it(change, words):
    call = change(*make())
    with pytest.raises(BackendUnavailable, match=f"'triton' cannot run this gate_norm_modulate: .*{words}"):
        gate_norm_modulate(*call, backend="triton")
    assert gate_norm_modulate(*call)[0].dtype == call[0].dtype


def test_wide_rows_are_refused_by_kernels_alone():
    x = torch.zeros(1, 1, 16385)
    table = torch.zeros(1, 16385)
    with pytest.raises(BackendUnavailable, match="width up to 16384, got 16385"):
        gate_norm_modulate(x, scale=table, shift=table, backend="nvrtc")
    assert gate_norm_modulate(x, scale=table, shift=table)[1].shape == x.shape
