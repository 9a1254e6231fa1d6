"""Our Triton kernels on the CPU, by Triton's interpreter, which must be chosen before Triton is imported.

Not collected by name: `test_kernels_k*.py` run the parts of this file in processes of their own with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
import triton

assert os.environ.get("TRITON_INTERPRET") == "1", "run with TRITON_INTERPRET=1"

from reasonedit.reasonedit_core import kernels  # noqa: E402
from reasonedit.reasonedit_core.kernels import trial, triton_attention, triton_ops  # noqa: E402
from reasonedit.reasonedit_core.mllm.load import load_mllm  # noqa: E402
from reasonedit.reasonedit_core.mllm.packed import PackedMLLM  # noqa: E402
from reasonedit.reasonedit_core.packing import PackMask  # noqa: E402
from reasonedit.tests import attention_cases  # noqa: E402
from reasonedit.tests import kernel_cases as cases  # noqa: E402
from reasonedit.tests import packed as text_packed  # noqa: E402
from reasonedit.tests import test_models_packed as models_packed  # noqa: E402
from reasonedit.tests.tiny import tiny_checkpoint  # noqa: E402

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))


def _mend_loops() -> None:
    """Triton 3.6 turns the bound of a loop into an int in a way that NumPy 2.4 no longer allows; 3.9 does it as here."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def mended(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = mended


if TRITON < (3, 9):
    _mend_loops()

# The interpreter cuts float32 to bfloat16 where a card rounds: errors are twice those of rounding.
TOLERANCES = {torch.float32: 5e-7, torch.float16: 5e-4, torch.bfloat16: 6e-3}
DTYPES = [
    torch.float32,
    pytest.param(torch.float16, marks=pytest.mark.slow),
    pytest.param(torch.bfloat16, marks=pytest.mark.slow),
]
QUICK = {"groups", "packed-order", "cache", "rows-by-token", "odd-width", "step1x", "qwen", "unguided"}


def some(table):
    """The cases of a table; those beyond QUICK are slow."""
    return [pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, case in table.items()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", some(cases.LAYOUTS))
def test_k1(layout, dtype):
    cases.check_k1(triton_ops, layout, dtype, TOLERANCES[dtype])


def test_k1_without_values():
    cases.check_k1_without_values(triton_ops, torch.float32, TOLERANCES[torch.float32])


def test_k1_rows_outside():
    cases.check_k1_rows_outside(triton_ops, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", some(cases.MODULATIONS))
def test_k2(case, dtype):
    cases.check_k2(triton_ops, case, dtype, TOLERANCES[dtype])


def test_k2_clamp():
    cases.check_k2_clamp(triton_ops)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", some(cases.STEPS))
def test_k4(case, dtype):
    cases.check_k4(triton_ops, case, dtype, TOLERANCES[dtype])


# --- through the door, where the interpreter may be named ---


def test_k1_through_the_door_has_the_gradients_of_the_plain_form():
    draw, layout = cases.Draw(torch.float32), cases.Layout(batch=2, heads=4)
    text, image = (cases.heads_of(draw, layout, n) for n in (3, 6))
    angles = torch.randn(9, 4, generator=draw.generator).repeat_interleave(2, dim=-1)
    rope, rows = (angles.cos(), angles.sin()), draw.order(9)
    found = {}
    for backend in ("triton", "reference"):
        leaves = [x.detach().clone().requires_grad_() for x in (*text, *image)]
        out = kernels.qk_norm_rope(
            kernels.Heads(*leaves[5:]), rope, text=kernels.Heads(*leaves[:5]), rows=rows, backend=backend
        )
        sum((x * x.detach().cos()).sum() for x in out).backward()
        found[backend] = [*out, *(x.grad for x in leaves)]
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_k2_through_the_door_has_the_gradients_of_the_plain_form():
    draw = cases.Draw(torch.float32)
    tensors, rows = [draw(2, 5, 12), draw(2, 5, 12), *(draw(3, 12) for _ in range(3))], torch.tensor([0, 2, -1, 1, 1])
    found = {}
    for backend in ("triton", "reference"):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out = kernels.gate_norm_modulate(*leaves, rows=rows, backend=backend)
        sum((x * x.detach().cos()).sum() for x in out).backward()
        found[backend] = [*out, *(x.grad for x in leaves)]
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_k4_through_the_door():
    draw = cases.Draw(torch.float32)
    latents, cond, uncond = (draw(2, 5, 6) for _ in range(3))
    sigmas = torch.tensor([0.9, 0.7])
    call = dict(uncond=uncond, scale=6.0, rule="step1x", velocity=True)
    ours, theirs = (kernels.guided_step(latents, cond, *sigmas, **call, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("op", [pytest.param("qk_norm_rope", marks=pytest.mark.slow), "gate_norm_modulate", "guided_step"])
def test_trial_passes_here_and_fails_where_a_kernel_is_wrong(op, monkeypatch):
    """The card's own test, on the CPU: k1, k2 and k4."""
    device = torch.device("cpu")
    assert trial.run(op, "triton", device) is None
    right = getattr(triton_ops, op)

    def wrong(*args, **kwargs):
        right(*args, **kwargs)
        outs = [x for x in args if isinstance(x, torch.Tensor)] + [x for a in args if isinstance(a, tuple) for x in a]
        for x in outs:
            if x is not None and x.dtype == torch.bfloat16:
                x.mul_(1.05)

    monkeypatch.setattr(triton_ops, op, wrong)
    assert "its test failed" in trial.run(op, "triton", device)
    monkeypatch.setattr(triton_ops, op, lambda *args, **kwargs: None)
    assert "is off by nan" in trial.run(op, "triton", device)
    monkeypatch.setattr(triton_ops, op, lambda *args, **kwargs: 1 / 0)
    assert trial.run(op, "triton", device) == "its test broke (ZeroDivisionError: division by zero)"


# --- K5 ---

SMALL = triton_attention.Tiles(16, 16, 4, 1)
TALL = triton_attention.Tiles(32, 16, 4, 1)
FLAT = triton_attention.Tiles(16, 32, 4, 1)


def documents(*lengths, padding=0, causal=False):
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    return kernels.mask.intervals_of(PackMask(torch.tensor(numbers), causal))


def rows(*pairs, keys):
    lo, hi = (torch.tensor(x, dtype=torch.int32) for x in zip(*pairs, strict=True))
    return kernels.Intervals(lo, hi, keys)


def runs(length, *spans):
    """Causal text with bidirectional runs in it."""
    hi = torch.arange(1, length + 1, dtype=torch.int32)
    for start, stop in spans:
        hi[start:stop] = stop
    return kernels.Intervals(torch.zeros(length, dtype=torch.int32), hi, length)


# name -> (batch, queries, keys, heads, key heads, head dim, intervals, tiles)
ATTENTION = {
    "full": (2, 20, 20, 2, 2, 16, None, SMALL),
    "odd-sizes": (1, 19, 37, 4, 2, 20, None, SMALL),
    "fewer-keys-than-a-tile": (1, 5, 3, 2, 1, 8, None, TALL),
    "partial-queries": (1, 7, 40, 2, 1, 16, documents(9, 14, 17).take(torch.tensor([0, 8, 9, 20, 23, 30, 39])), SMALL),
    "documents": (1, 45, 45, 2, 2, 16, documents(7, 18, 16, padding=4), SMALL),
    "documents-causal": (2, 45, 45, 4, 2, 16, documents(7, 18, 16, padding=4, causal=True), FLAT),
    "bidirectional-runs": (1, 50, 50, 2, 1, 16, runs(50, (5, 21), (30, 50)), TALL),
    "rising-starts": (1, 20, 70, 2, 1, 16, rows(*((3 + row, 70) for row in range(20)), keys=70), SMALL),
    "masked-rows": (1, 6, 33, 2, 2, 16, rows((0, 5), (3, 3), (9, 4), (0, 33), (32, 33), (7, 99), keys=33), SMALL),
    "nothing-seen": (1, 4, 20, 2, 2, 16, rows((0, 0), (5, 5), (9, 2), (20, 20), keys=20), SMALL),
}
QUICK_ATTENTION = {"odd-sizes", "partial-queries", "documents-causal", "masked-rows", "rising-starts"}


def attend(name, dtype):
    batch, queries, keys, heads, key_heads, dim, intervals, tiles = ATTENTION[name]
    draw = cases.Draw(dtype)
    q, grad = draw(batch, queries, heads, dim), draw(batch, queries, heads, dim)
    k, v = draw(batch, keys, key_heads, dim), draw(batch, keys, key_heads, dim)
    upcast, scale = dtype == torch.bfloat16, dim**-0.5
    pair = None if intervals is None else (intervals.lo, intervals.hi)
    out = cases.hole(*q.shape, dtype=dtype)
    lse, share = (torch.full((batch, heads, queries), cases.NAN) for _ in range(2))
    triton_attention.forward(q, k, v, pair, out, lse, scale, sizes=tiles, upcast=upcast)
    grads = [cases.hole(*x.shape, dtype=dtype) for x in (q, k, v)]
    seen = None if intervals is None else intervals.seen_by(tiles.keys)
    sizes = (tiles, tiles)
    triton_attention.backward(q, k, v, out, lse, grad, pair, seen, tuple(grads), share, scale, sizes=sizes, upcast=upcast)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = kernels.reference.run(*leaves, intervals)
    wanted.backward(grad.double())
    return [out, *grads], [wanted.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK_ATTENTION else pytest.mark.slow) for name in ATTENTION]
)
def test_k5(name, dtype):
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    for what, found, wanted in zip(("out", "q", "k", "v"), *attend(name, dtype), strict=True):
        if wanted.abs().max() == 0:
            assert found.abs().max() == 0, what
        else:
            cases.close(found, wanted, tolerance, what)
        assert cases.untouched_around(found), what


def test_k5_visits_no_tile_that_no_row_sees():
    """Keys of another document that lie in other tiles may be anything; a document's own NaN shows in its answer."""
    intervals = documents(16, 16, 16)
    draw = cases.Draw(torch.float32)
    q, k, v, grad = (draw(1, 48, 2, 16) for _ in range(4))
    own = slice(16, 32)
    for x in (k, v):
        x[:, :16], x[:, 32:] = cases.NAN, cases.NAN
    out, grads = torch.zeros_like(q), [torch.zeros_like(x) for x in (q, k, v)]
    lse, share = (torch.zeros(1, 2, 48) for _ in range(2))
    pair = (intervals.lo, intervals.hi)
    triton_attention.forward(q, k, v, pair, out, lse, 0.25, sizes=SMALL)
    assert out[:, own].isfinite().all() and out[:, :16].isnan().all()
    seen, sizes = intervals.seen_by(16), (SMALL, SMALL)
    triton_attention.backward(q, k, v, out, lse, grad, pair, seen, tuple(grads), share, 0.25, sizes=sizes)
    assert all(x[:, own].isfinite().all() for x in grads)


def test_k5_by_name_through_the_dispatch():
    """Packs, intervals, no mask; values and gradients as those of the reference."""
    mask = PackMask(torch.tensor([0] * 9 + [1] * 20 + [-1] * 3), causal=True)
    draw = cases.Draw(torch.float16)
    tensors = [draw(1, 32, 4, 16), draw(1, 32, 2, 16), draw(1, 32, 2, 16)]
    some_rows = torch.tensor([3, 8, 12, 31])
    for chosen in (mask, None, kernels.mask.intervals_of(mask).take(some_rows)):
        found = {}
        for backend in ("interval", "reference"):
            leaves = [x.detach().clone().requires_grad_() for x in tensors]
            q = leaves[0][:, some_rows] if isinstance(chosen, kernels.Intervals) else leaves[0]
            out = kernels.attention(q, *leaves[1:], chosen, backend=backend)
            (out * out.detach().cos()).sum().backward()
            found[backend] = [out, *(x.grad for x in leaves)]
        for ours, theirs in zip(*found.values(), strict=True):
            cases.close(ours.detach(), theirs.detach().double(), 3e-3)


@pytest.mark.slow
def test_k5_trial_passes_here_and_fails_where_a_kernel_is_wrong(monkeypatch):
    device = torch.device("cpu")
    for name in ("forward", "backward"):
        monkeypatch.setattr(triton_attention, name, partial(getattr(triton_attention, name), upcast=True))
    assert trial.run("interval", "triton", device) is None
    assert trial.run("interval backward", "triton", device) is None
    right = triton_attention.backward

    def wrong(*args, **kwargs):
        right(*args, **kwargs)
        args[8][1].mul_(1.05)

    monkeypatch.setattr(triton_attention, "backward", wrong)
    told = trial.run("interval backward", "triton", device)
    assert told.startswith("its test failed: the gradient of k with intervals is off by")


@pytest.mark.parametrize("system", attention_cases.SYSTEMS)
def test_chosen_interval_is_sdpa_to_rounding(system):
    """A whole DiT on K5, in half precision."""
    ours, sdpa = (attention_cases.velocities(system, name, torch.float16) for name in ("interval", "sdpa"))
    for case, wanted in sdpa.items():
        apart = (ours[case].float() - wanted.float()).norm() / wanted.float().norm()
        assert 0 < apart < 2e-3, (case, float(apart))


def test_k5_operators_satisfy_torch():
    mask = documents(9, 8)
    draw = cases.Draw(torch.float16)
    q, k, v = (draw(1, 17, heads, 16).detach().clone().requires_grad_() for heads in (2, 1, 1))
    call = (q, k, v, mask.lo, mask.hi, mask.seen_by(64), 0.25)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.reasonedit.interval_attention.default, call, test_utils=tests)


# --- K5 in whole packed networks, as they are trained ---


def packed_image(system, backend):
    """The velocity of a pack of documents and padding, its network, and the leaves besides its weights; in half precision."""
    documents = models_packed.make_documents(system)
    transformer = models_packed.make_transformer(system, torch.float16)
    pack = models_packed.pack_of(documents, padding=3)
    velocity = models_packed.make_unit(system, transformer, backend=backend)(pack)
    return models_packed.target_parts(pack, velocity), transformer, models_packed.leaves_of(documents)


def packed_mllm(backend):
    """The states of a pack and its losses, likewise."""
    mllm = load_mllm(tiny_checkpoint("qwen2.5-vl", std=0.2), dtype=torch.float16)
    mllm.model.requires_grad_(True)
    documents = [text_packed.document(mllm, "make it red", "the sky is red", [text_packed.picture(0)])]
    documents += [text_packed.document(mllm, "no picture here"), text_packed.document(mllm, "and this", "ok")]
    states, ce = PackedMLLM(mllm, backend=backend).train()(text_packed.pack(documents, padding=5))
    return [states[:-5], ce], mllm.model, []


NETWORKS = {
    **{f"{system}": partial(packed_image, system) for system in ("v1.1", "v1.2", "2509", "2511")},
    "mllm": packed_mllm,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_k5_in_a_packed_network_is_batched_to_rounding(name):
    """Velocities or states and losses, and the gradients of every weight and input."""
    found = {}
    for backend in ("interval", "batched"):
        kernels.chosen_backends()
        outs, net, leaves = NETWORKS[name](backend)
        assert kernels.chosen_backends() == (backend,)
        weights = dict(net.named_parameters())
        loss = sum((out.float() * cases.Draw(torch.float32)(*out.shape)).sum() for out in outs)
        grads = torch.autograd.grad(loss, [*weights.values(), *leaves], allow_unused=True)
        named = zip([*weights, *(f"leaf {n}" for n in range(len(leaves)))], grads, strict=True)
        found[backend] = torch.cat([out.detach().double().flatten() for out in outs]), dict(named)
    (ours, gradients), (theirs, wanted) = found["interval"], found["batched"]
    assert 0 < float((ours - theirs).norm() / theirs.norm()) < 5e-3
    whole = torch.cat([grad.double().flatten() for grad in wanted.values() if grad is not None]).norm()
    apart = 0.0
    for what, grad in wanted.items():
        assert (grad is None) == (gradients[what] is None), what
        if grad is not None:
            error = float((gradients[what].double() - grad.double()).norm())
            # Of its own length, or, for one that is nearly nothing, of all gradients' together.
            assert error <= max(3e-2 * float(grad.double().norm()), 1e-4 * float(whole)), (what, error)
            apart += error**2
    assert 0 < apart**0.5 < 1e-2 * float(whole)
