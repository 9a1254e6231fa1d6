"""Cross entropy in chunks: the numbers of the plain one, and never the logits of all rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reasonedit.reasonedit_core.kernels import cross_entropy, head_cross_entropy, linear_cross_entropy


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


@settings(max_examples=25, derandomize=True, deadline=None)
@given(rows=st.integers(0, 12), logits=st.integers(1, 400), frozen=st.booleans(), seed=st.integers(0, 9))
def test_values_and_gradients_equal_the_plain_loss(rows, logits, frozen, seed):
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


def test_no_tensor_holds_the_logits_of_all_rows(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", 4 * 1000)
    states, weight, targets = make(64, columns=1000)
    with Largest() as forward:
        loss = linear_cross_entropy(states, weight, targets).sum()
    with Largest() as backward:
        loss.backward()
    assert forward.elements == backward.elements == weight.numel() == 8000 < 64 * 1000


def test_nothing_of_the_logits_is_kept_for_backward(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS", 1000)
    kept = []
    states, weight, targets = make(20, columns=1000)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        linear_cross_entropy(states, weight, targets).sum()
    assert sum(kept) < 1000


def test_16_bits_give_losses_in_float32():
    """The logits are those of a 16-bit product; the loss over them is not rounded once more."""
    states, weight, targets = make(40, columns=5000, width=64, dtype=torch.bfloat16)
    got = linear_cross_entropy(states, weight, targets)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, plain(states, weight, targets), rtol=1e-6, atol=1e-6)
    assert (got != got.bfloat16()).any()
    got.sum().backward()
    assert states.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_float64_stays_exact():
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
