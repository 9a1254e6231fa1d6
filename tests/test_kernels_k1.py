"""K1, `qk_norm_rope`: the plain form against the DiTs' own code, the operators against the plain form, Triton interpreted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError
from reasonedit.reasonedit_core.kernels import Heads, custom_ops, ops, qk_norm_rope
from reasonedit.reasonedit_core.kernels import reference_ops as plain
from reasonedit.tests import interpreter
from reasonedit.tests import kernel_cases as cases


def make(batch=2, text=3, image=5, heads=4, key_heads=2, dim=8, dtype=torch.float32, seed=0):
    """Text, pictures and angles (L, D / 2)."""
    draw = cases.Draw(dtype, seed)
    layout = cases.Layout(batch=batch, heads=heads, key_heads=key_heads, dim=dim)
    return (
        cases.heads_of(draw, layout, text),
        cases.heads_of(draw, layout, image),
        torch.randn(text + image, dim // 2, generator=draw.generator),
    )


def twice(angles):
    """Tables as Step1X-Edit has them."""
    return angles.cos().repeat_interleave(2, dim=-1), angles.sin().repeat_interleave(2, dim=-1)


def turning(angles):
    """A table as Qwen-Image has it."""
    return torch.polar(torch.ones_like(angles), angles)


def test_triton_equals_the_plain_form_in_float64():
    interpreter.run("k1 or qk_norm_rope")


@pytest.mark.slow
def test_triton_equals_the_plain_form_in_every_case():
    interpreter.run("k1 or qk_norm_rope", slow=True)


# --- the plain form is what the DiTs compute ---


def test_equals_the_code_of_step1x():
    from reasonedit.reasonedit_core.models.step1x_transformer import JointAttention, apply_rope

    torch.manual_seed(0)
    attn = JointAttention(32, 4)
    for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k):
        nn.init.normal_(norm.weight)
    text, image = torch.randn(2, 3, 32), torch.randn(2, 5, 32)
    rope = twice(torch.randn(8, 4))
    pairs = zip(attn.project_text(text), attn.project(image), strict=True)
    q, k, v = (torch.cat(pair, dim=1) for pair in pairs)
    wanted = apply_rope(q, rope), apply_rope(k, rope), v
    streams = [
        Heads(*(layer(x).unflatten(-1, (4, 8)) for layer in layers), norm_q.weight, norm_k.weight)
        for x, layers, norm_q, norm_k in (
            (text, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), attn.norm_added_q, attn.norm_added_k),
            (image, (attn.to_q, attn.to_k, attn.to_v), attn.norm_q, attn.norm_k),
        )
    ]
    torch.testing.assert_close(qk_norm_rope(streams[1], rope, text=streams[0]), wanted, rtol=1e-5, atol=1e-6)


def test_equals_the_code_of_qwen_image():
    from diffusers.models.attention_processor import Attention

    from reasonedit.reasonedit_core.models.qwen_attention import project_heads, rotate

    torch.manual_seed(0)
    sizes = dict(query_dim=32, added_kv_proj_dim=32, out_dim=32, heads=4, dim_head=8)
    attn = Attention(**sizes, context_pre_only=False, qk_norm="rms_norm", eps=1e-6)
    for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k):
        nn.init.normal_(norm.weight)
    text, image, angles = torch.randn(2, 3, 32), torch.randn(2, 5, 32), torch.randn(8, 4)
    table = turning(angles)
    text_parts, image_parts = project_heads(attn, text, image)
    for part in range(2):
        text_parts[part] = rotate(text_parts[part], table[:3])
        image_parts[part] = rotate(image_parts[part], table[3:])
    wanted = tuple(torch.cat(pair, dim=1) for pair in zip(text_parts, image_parts, strict=True))
    streams = [
        Heads(*(layer(x).unflatten(-1, (4, 8)) for layer in layers), norm_q.weight, norm_k.weight)
        for x, layers, norm_q, norm_k in (
            (text, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), attn.norm_added_q, attn.norm_added_k),
            (image, (attn.to_q, attn.to_k, attn.to_v), attn.norm_q, attn.norm_k),
        )
    ]
    torch.testing.assert_close(qk_norm_rope(streams[1], table, text=streams[0]), wanted, rtol=1e-5, atol=1e-6)


def test_rows_are_the_order_of_a_pack():
    from reasonedit.reasonedit_core.models.streams import pack_layout

    text, image, angles = make(batch=1, text=7, image=9)
    layout = pack_layout((2, 4), (5, 3), padding=(1, 1))
    numbers = layout.join(torch.arange(7)[None, :, None], torch.arange(7, 16)[None, :, None])[0, :, 0]
    rows = numbers.argsort()  # where each token of [text, pictures] stands in the pack
    found = qk_norm_rope(image, turning(angles), text=text, rows=rows)
    parts = [layout.part(x, 7) for x in found]
    for name, index in (("q", 0), ("k", 1)):
        for stream, part, own in ((text, parts[index][0], rows[:7]), (image, parts[index][1], rows[7:])):
            wanted = plain.norm_rope(getattr(stream, name), getattr(stream, f"{name}_weight"), turning(angles)[own], 1e-6)
            torch.testing.assert_close(part, wanted)
    assert torch.equal(found[2], layout.join(text.v, image.v))


def test_both_kinds_of_tables_say_the_same():
    text, image, angles = make()
    found = [qk_norm_rope(image, rope, text=text) for rope in (twice(angles), turning(angles), turning(angles)[None])]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@settings(max_examples=25, derandomize=True, deadline=None)
@given(chosen=st.sets(st.integers(0, 11), min_size=1, max_size=8), n_text=st.integers(0, 3), seed=st.integers(0, 9))
def test_a_cache_written_in_parts_equals_the_joint_sequence(chosen, n_text, seed):
    """Whatever rows come first, and the rest behind them: K and V end as in one call, and Q has the rows asked for."""
    _, image, angles = make(text=3, image=12, seed=seed)
    image = Heads(*(x[:, :12] if x.ndim == 4 else x for x in image))
    rope = turning(angles[:12])
    q, k, v = qk_norm_rope(image, rope)
    cache = torch.full_like(k, cases.NAN), torch.full_like(v, cases.NAN)
    first = torch.tensor(sorted(chosen))
    rest = torch.tensor([row for row in range(12) if row not in chosen], dtype=torch.int64)
    n_text = min(n_text, len(first))
    for rows, split in ((first, n_text), (rest, 0)):
        if not len(rows):
            continue
        taken = Heads(*(x[:, rows] if x.ndim == 4 else x for x in image))
        text = Heads(*(x[:, :split] if x.ndim == 4 else x for x in taken)) if split else None
        others = Heads(*(x[:, split:] if x.ndim == 4 else x for x in taken))
        if not others.q.shape[1] and text is None:
            continue
        with torch.no_grad():
            found, *kept = qk_norm_rope(others, rope, text=text, rows=rows.int(), cache=cache)
        assert kept[0] is cache[0] and kept[1] is cache[1]
        torch.testing.assert_close(found, q[:, rows])
    torch.testing.assert_close(cache[0], k)
    assert torch.equal(cache[1], v)


def test_a_single_stream_in_order_keeps_its_values():
    _, image, angles = make(text=3, image=5)
    assert qk_norm_rope(image, turning(angles[:5]))[2] is image.v
    meta = Heads(*(x.to("meta") for x in image))
    assert qk_norm_rope(meta, turning(angles[:5]).to("meta"))[2] is meta.v


def test_bfloat16_is_rounded_once():
    text, image, angles = make(dtype=torch.bfloat16)
    found = qk_norm_rope(image, twice(angles), text=text)
    wanted = plain.qk_norm_rope(cases.wide(image), turning(angles.double()), cases.wide(text))
    for x, right in zip(found, wanted, strict=True):
        assert x.dtype == torch.bfloat16
        # Half a unit in the last place, and what float32 loses before.
        assert bool(((x.double() - right).abs() <= right.abs() * 2**-8 * 1.01 + 1e-6).all())


# --- operators ---


def flat(text, image, angles, rows=None, backend="reference"):
    return (*image, *text, angles.cos()[None], angles.sin()[None], rows, 1e-6, backend)


def double(heads):
    return Heads(*(x.detach().double().clone().requires_grad_() for x in heads))


@pytest.mark.parametrize("rows", [None, torch.tensor([3, 0, 4, 1, 2])], ids=["in order", "in another order"])
def test_gradients_of_the_joint_operator(rows):
    text, image, angles = make(batch=1, text=2, image=3, heads=2, key_heads=1, dim=4)
    leaves = [*double(image), *double(text)]
    angles = angles.double()

    def run(*tensors):
        return custom_ops.qk_norm_rope(*tensors, angles.cos()[None], angles.sin()[None], rows, 1e-6, "reference")

    assert torch.autograd.gradcheck(run, leaves)


def test_gradients_of_the_operator_of_a_single_stream():
    _, image, angles = make(batch=1, text=2, image=3, heads=2, key_heads=1, dim=4)
    image, angles = double(image), angles[:3].double()

    def run(q, k, q_weight, k_weight):
        tables = angles.cos()[None], angles.sin()[None]
        return custom_ops.qk_norm_rope_pair(q, k, q_weight, k_weight, *tables, 1e-6, "reference")

    assert torch.autograd.gradcheck(run, [image.q, image.k, image.q_weight, image.k_weight])


def test_operators_satisfy_torch():
    text, image, angles = make()
    text, image = (Heads(*(x.detach().clone().requires_grad_() for x in stream)) for stream in (text, image))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    named = torch.ops.reasonedit
    torch.library.opcheck(named.qk_norm_rope.default, flat(text, image, angles, torch.randperm(8)), test_utils=tests)
    pair = (image.q, image.k, image.q_weight, image.k_weight, angles.cos()[None, :5], angles.sin()[None, :5], 1e-6, "reference")
    torch.library.opcheck(named.qk_norm_rope_pair.default, pair, test_utils=tests)
    text, image = (Heads(*(x.detach() for x in stream)) for stream in (text, image))
    *most, rows, eps, backend = flat(text, image, angles, torch.randperm(8))
    cached = (*most, torch.zeros(2, 8, 2, 8), torch.zeros(2, 8, 2, 8), rows, eps, backend)
    torch.library.opcheck(named.qk_norm_rope_cached.default, cached, test_utils=tests)


def test_compile_sees_one_node():
    """On the meta device, where the kernel's operator stands for it."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    text, image, angles = (x.to("meta") if isinstance(x, torch.Tensor) else Heads(*(y.to("meta") for y in x)) for x in make())
    rope = twice(angles)
    found = torch.compile(lambda: qk_norm_rope(image, rope, text=text), backend=backend, fullgraph=True)()
    assert [x.shape[1] for x in found] == [8, 8, 8]
    (graph,) = graphs
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in calls if "reasonedit" in name] == ["reasonedit.qk_norm_rope.default"]
    assert not [name for name in calls if "norm" in name and "reasonedit" not in name]


def test_compiled_training_has_the_same_gradients():
    text, image, angles = make()
    grads = []
    for run in (custom_ops.qk_norm_rope, torch.compile(custom_ops.qk_norm_rope, backend="aot_eager", fullgraph=True)):
        leaves = [x.detach().clone().requires_grad_() for x in (*image, *text)]
        out = run(*leaves, angles.cos()[None], angles.sin()[None], None, 1e-6, "reference")
        sum((x * x.detach().cos()).sum() for x in out).backward()
        grads.append([x.grad for x in leaves])
    torch.testing.assert_close(*grads)


BESIDE = """
import conftest, importlib, importlib.util, sys
root = str(conftest.ROOT)
spec = importlib.util.spec_from_file_location("some_odd-name", root + "/__init__.py", submodule_search_locations=[root])
copy = importlib.util.module_from_spec(spec)
sys.modules["some_odd-name"] = copy
spec.loader.exec_module(copy)
both = [importlib.import_module(name + ".reasonedit_core.kernels") for name in ("reasonedit", "some_odd-name")]
assert both[0] is not both[1]
ours = {name.rpartition(".")[2] for name in sys.modules if "reasonedit_core.kernels." in name}
assert not {name for name in ours if name.startswith(("triton_", "nvrtc_"))}, "these are imported when one is first wanted"
import torch
x, table = torch.ones(1, 2, 4, device="meta"), torch.ones(1, 4, device="meta")
for kernels in both:
    assert kernels.gate_norm_modulate(x, x, table)[0].shape == x.shape
    y = torch.ones(1, 2, 4, requires_grad=True)
    torch.ops.reasonedit.gate_residual(y, y, torch.ones(1, 4), None, False, "reference").sum().backward()
    assert y.grad.eq(2).all()
"""


def test_two_copies_of_the_package_live_in_one_process_and_import_no_kernel():
    """ComfyUI loads the folder under a name of its own, beside an installed package."""
    done = subprocess.run([sys.executable, "-c", BESIDE], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- refusals ---


def test_a_cache_is_for_inference():
    text, image, angles = make()
    image = image._replace(q=image.q.detach().requires_grad_())
    cache = torch.zeros(2, 8, 2, 8), torch.zeros(2, 8, 2, 8)
    with pytest.raises(ConfigError, match="for inference: call under torch.no_grad"):
        qk_norm_rope(image, turning(angles), text=text, cache=cache)


def test_rows_that_are_not_there_raise():
    text, image, angles = make()
    cache = torch.zeros(2, 8, 2, 8), torch.zeros(2, 8, 2, 8)
    with pytest.raises((IndexError, RuntimeError)):
        qk_norm_rope(image, turning(angles), text=text, rows=torch.arange(8) + 1, cache=cache)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t, i, r: dict(image=i._replace(v=i.v[:, :4]), rope=r, text=t), r"takes q \(B, N, H, D\).*\(2, 4, 2, 8\)"),
        (lambda t, i, r: dict(image=i, rope=r, text=t._replace(q_weight=t.q_weight[:6])), r"takes q.*\(6,\)"),
        (lambda t, i, r: dict(image=i, rope=r), r"for 5 rows and 4 pairs, got \(8, 4\)"),
        (lambda t, i, r: dict(image=i, rope=(r.real, r.imag), text=t), r"8 rows and 4 pairs, got \(8, 2\)"),
        (lambda t, i, r: dict(image=i, rope=r, text=t, rows=torch.arange(7)), r"rows are \(8,\) int32 or int64"),
        (lambda t, i, r: dict(image=i, rope=r, text=t, rows=torch.arange(8.0)), "float32"),
        (lambda t, i, r: dict(image=i, rope=r, text=t, cache=(i.k, i.q)), r"takes a cache k and v \(2, S, 2, 8\)"),
        (lambda t, i, r: dict(image=i, rope=r, text=t, cache=(i.k.half(), i.v.half())), "cache.*float16"),
    ],
)
def test_calls_without_meaning_are_refused(change, words):
    text, image, angles = make()
    call = change(text, image, turning(angles))
    with torch.no_grad(), pytest.raises(ConfigError, match=words):
        qk_norm_rope(call.pop("image"), call.pop("rope"), **call)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda x: x.double(), "takes float16, bfloat16 or float32, got torch.float64"),
        (lambda x: x.half() if x.shape[2:3] == (4,) else x, "one dtype on one device, got torch.float16 on cpu, torch.float32"),
        (lambda x: x.half() if x.ndim == 1 and float(x[0]) > 0 else x, "one dtype on one device"),
    ],
)
def test_what_a_kernel_cannot_take_is_told_and_the_plain_form_takes_it(change, words):
    text, image, angles = make()
    text, image = (Heads(*map(change, stream)) for stream in (text, image))
    with pytest.raises(BackendUnavailable, match=words):
        qk_norm_rope(image, turning(angles), text=text, backend="triton")
    assert qk_norm_rope(image, turning(angles), text=text)[0].shape == (2, 8, 4, 8)


def test_wide_heads_are_refused_by_kernels_alone():
    text, image, angles = make(batch=1, text=1, image=1, heads=1, key_heads=1, dim=260)
    with pytest.raises(BackendUnavailable, match="head dim up to 256, got 260"):
        qk_norm_rope(image, turning(angles), text=text, backend="nvrtc")
    assert qk_norm_rope(image, turning(angles), text=text)[0].shape == (1, 2, 1, 260)
    assert ops.pick("qk_norm_rope", "auto", torch.device("meta"), "no") == "reference"
