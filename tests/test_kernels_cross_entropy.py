"""Cross entropy in chunks, ours and torch's own: the numbers of the plain one, and never the logits of all rows."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reasonedit.reasonedit_core.kernels import cross_entropy, explain, head_cross_entropy, linear_cross_entropy

needs_own = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has no cross entropy in chunks of its own"
)


@pytest.fixture(autouse=True)
def forget():
    """Nothing of what a test hid is remembered after it."""
    cross_entropy._lacking.cache_clear()
    yield
    cross_entropy._lacking.cache_clear()


@pytest.fixture(params=["torch's own", "chunked"])
def way(request, monkeypatch):
    """Each test of it by torch's own where it is there, and in our chunks."""
    if request.param == "chunked":
        monkeypatch.setattr(cross_entropy, "_lacking", lambda: "hidden")
    elif cross_entropy.lacking() is not None:
        pytest.skip(f"torch's own is not there: {cross_entropy.lacking()}")
    return request.param


@pytest.fixture
def chunked(monkeypatch):
    """Without torch's own."""
    monkeypatch.setattr(cross_entropy, "_lacking", lambda: "hidden")


def make(rows, columns=37, width=8, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, width, generator=rng).to(dtype)
    weight = torch.randn(columns, width, generator=rng).to(dtype)
    return states.requires_grad_(), weight.requires_grad_(), torch.randint(columns, (rows,), generator=rng)


def plain(states, weight, targets):
    return torch.nn.functional.cross_entropy((states @ weight.T).float(), targets, reduction="none")


class Largest(TorchDispatchMode):
    """The most elements that any tensor had which an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@settings(max_examples=25, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(0, 12), logits=st.integers(1, 400), frozen=st.booleans(), seed=st.integers(0, 9))
def test_values_and_gradients_equal_the_plain_loss(way, rows, logits, frozen, seed):
    states, weight, targets = make(rows, seed=seed)
    weight.requires_grad_(not frozen)
    scale = torch.rand(rows, generator=torch.Generator().manual_seed(seed))
    leaves = [states] if frozen else [states, weight]
    expected = plain(states, weight, targets)
    grads = torch.autograd.grad((expected * scale).sum(), leaves)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "LOGITS", logits)
        got = linear_cross_entropy(states, weight, targets)
        assert got.shape == (rows,) and got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(torch.autograd.grad((got * scale).sum(), leaves), grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_no_tensor_holds_the_logits_of_all_rows(chunked, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", 4 * 1000)
    states, weight, targets = make(64, columns=1000)
    with Largest() as forward:
        loss = linear_cross_entropy(states, weight, targets).sum()
    with Largest() as backward:
        loss.backward()
    assert forward.elements == backward.elements == weight.numel() == 8000 < 64 * 1000


def test_nothing_of_the_logits_is_kept_for_backward(way, monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", 1000)
    kept = []
    states, weight, targets = make(20, columns=1000)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_cross_entropy(states, weight, targets).sum()
    assert sum(kept) < (1000 if way == "chunked" else 20 * 1000), "torch's own names the weight"
    assert all(each != 20 * 1000 for each in kept)


def test_16_bits_give_losses_in_float32():
    """The logits are those of a 16-bit product; the loss over them is not rounded once more."""
    states, weight, targets = make(40, columns=5000, width=64, dtype=torch.bfloat16)
    got = linear_cross_entropy(states, weight, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, plain(states, weight, targets), rtol=1e-6, atol=1e-6)
    assert (got != got.bfloat16()).any()
    got.sum().backward()
    assert states.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_float64_stays_exact(way):
    states, weight, targets = make(5, dtype=torch.float64)
    got = linear_cross_entropy(states, weight, targets)
    expected = torch.nn.functional.cross_entropy(states @ weight.T, targets, reduction="none")
    assert got.dtype == torch.float64 and (got - expected).abs().max() < 1e-14


def test_dropout_in_a_head_is_the_same_when_recomputed():
    """A LoRA on lm_head drops entries at random: backward must see those of forward."""
    states, weight, targets = make(6)
    masks = []

    def head(rows):
        drawn = torch.nn.functional.dropout(rows, 0.5)
        masks.append(drawn.detach() != 0)
        return drawn @ weight.T

    torch.manual_seed(0)
    head_cross_entropy(head, states, targets, columns=37).sum().backward()
    assert len(masks) == 2 and torch.equal(*masks) and not masks[0].all()
    assert (states.grad[~masks[0]] == 0).all() and states.grad.abs().max() > 0


def test_autocast_reaches_the_head():
    states, weight, targets = make(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_cross_entropy(states, weight, targets)
    expected = linear_cross_entropy(states.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(got, expected)
    got.sum().backward()
    assert states.grad.dtype == torch.float32


# --- torch's own ---


def called(monkeypatch):
    """The calls of torch's own and the rows of their chunks."""
    true, calls = torch.nn.functional.linear_cross_entropy, []

    def watched(states, weight, targets, **how):
        calls.append((states.dtype, how["reduction"], how["options"].batch_chunk_size))
        return true(states, weight, targets, **how)

    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", watched)
    return calls


@needs_own
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
def test_torchs_own_is_taken_where_it_is_exact_and_equals_the_chunks(dtype, apart, monkeypatch):
    """Losses row by row, weighted as a caller weights them, and both gradients."""
    monkeypatch.setattr(cross_entropy, "LOGITS", 3000)
    calls, found = called(monkeypatch), []
    assert cross_entropy.lacking() is None
    calls.clear()
    for hidden in (False, True):
        with monkeypatch.context() as patch:
            if hidden:
                patch.setattr(cross_entropy, "_lacking", lambda: "hidden")
            states, weight, targets = make(50, columns=1000, width=32, dtype=dtype)
            loss = linear_cross_entropy(states, weight, targets)
            (loss * torch.linspace(0, 2, 50, dtype=dtype)).sum().backward()
            found.append([loss.detach(), states.grad, weight.grad])
    assert calls == [(dtype, "none", 3)], "once, in chunks of as many rows as ours"
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= apart * theirs.norm()


@needs_own
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_autocast_and_the_meta_device_keep_our_chunks(dtype, monkeypatch):
    assert cross_entropy.lacking() is None
    calls = called(monkeypatch)
    states, weight, targets = make(6, dtype=dtype)
    assert linear_cross_entropy(states, weight, targets).dtype == torch.float32
    states, weight, targets = make(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear_cross_entropy(states, weight, targets)
    assert linear_cross_entropy(*(x.to("meta") for x in (states, weight, targets))).shape == (6,)
    linear_cross_entropy(states, weight.double().float().requires_grad_(), targets)
    assert len(calls) == 1, "the last alone"


@needs_own
def test_torchs_own_rounds_a_loss_of_16_bits_to_16_bits():
    """Why it is not taken there. Should this fail, torch has mended it: take it."""
    states, weight, targets = make(40, columns=5000, width=64, dtype=torch.bfloat16)
    got = cross_entropy._own(states, weight, targets, 4)
    assert got.dtype == torch.bfloat16


def test_a_torch_without_it_chunks_and_says_so(monkeypatch):
    states, weight, targets = make(6)
    wanted = plain(states, weight, targets)
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", lambda *call, **how: pytest.fail("called"), raising=False)
    words = "has no torch.nn.LinearCrossEntropyOptions, and makes all logits at once"
    assert cross_entropy.lacking() == f"torch {torch.__version__} {words}"
    torch.testing.assert_close(linear_cross_entropy(states, weight, targets), wanted)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy")
    cross_entropy._lacking.cache_clear()
    assert cross_entropy.lacking() == f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy"
    torch.testing.assert_close(linear_cross_entropy(states, weight, targets), wanted)
    assert f"in chunks of rows; torch's own: torch {torch.__version__} has no" in explain("cpu")


@needs_own
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            lambda logits, targets: torch.nn.functional.cross_entropy(logits, targets, reduction="none") * 1.01,
            "failed its test",
        ),
        (lambda logits, targets: torch.nn.functional.cross_entropy(logits, targets), "failed its test"),
        (lambda logits, targets: warnings.warn("options ignored", stacklevel=1), "UserWarning: options ignored"),
        (lambda logits, targets: logits.no_such_method(), "cannot be called.*AttributeError"),
    ],
    ids=["wrong", "reduced", "all logits", "broken"],
)
def test_one_that_fails_its_test_is_not_taken(answer, words, monkeypatch):
    def own(states, weight, targets, **how):
        return answer(states @ weight.T, targets)

    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", own)
    assert re.search(words, cross_entropy.lacking())
    states, weight, targets = make(6)
    torch.testing.assert_close(linear_cross_entropy(states, weight, targets), plain(states, weight, targets))


def test_kernels_switched_off_keep_our_chunks(monkeypatch):
    monkeypatch.setenv("REASONEDIT_KERNELS", "off")
    assert cross_entropy.lacking() == "REASONEDIT_KERNELS=off"


@needs_own
def test_explain_says_which_runs():
    assert "cross entropy of a linear head: torch's own in float32 and float64" in explain("cpu")


@needs_own
def test_the_first_call_may_come_under_inference_mode():
    with torch.inference_mode():
        assert cross_entropy.lacking() is None
