"""Attention of other packages: modules in their form stand in for them, as none is installed where tests run."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from reasonedit.reasonedit_core.errors import BackendUnavailable
from reasonedit.reasonedit_core.kernels import (
    attend_with,
    attention,
    chosen,
    devices,
    dispatch,
    explain,
    packages,
    reference,
    trial,
)

CARD = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing installed, nothing remembered, a card that can all."""
    for name in ("flash_attn", "flash_attn_interface", "sageattention", "comfy_kitchen"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card=None: (9, 0))
    monkeypatch.setattr(devices, "_PASSED", {})
    packages._function.cache_clear()
    yield
    packages._function.cache_clear()


def install(monkeypatch, module: str, **functions):
    made = ModuleType(module)
    vars(made).update(functions)
    monkeypatch.setitem(sys.modules, module, made)
    packages._function.cache_clear()


def flash2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    assert not causal
    return reference.run(q, k, v)


def flash3(q, k, v, softmax_scale=None, causal=False):
    return reference.run(q, k, v), torch.zeros(q.shape[0], q.shape[2], q.shape[1])


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
    assert tensor_layout == "NHD" and not is_causal
    out = reference.run(q, k, v)
    k -= k.mean(dim=1, keepdim=True)  # as version 1 does
    return out


def int8_attention(q, k, v, *, scale=None, attn_mask=None):
    """Batch, heads, sequence, head dim; contiguous, as the package wants it."""
    assert all(x.is_contiguous() for x in (q, k, v)) and attn_mask is None
    return reference.run(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


INSTALLED = {
    "flash": ("flash_attn", {"flash_attn_func": flash2}),
    "sage": ("sageattention", {"sageattn": sageattn}),
    "kitchen": ("comfy_kitchen", {"int8_attention": int8_attention, "int8_attention_is_available": lambda device: True}),
}


def draw(queries=7, keys=9, heads=4, groups=2, dim=16, dtype=torch.bfloat16):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, h, dim, generator=rng).to(dtype) for n, h in ((queries, heads), (keys, groups), (keys, groups))]


@pytest.mark.parametrize("name", INSTALLED)
def test_a_package_gets_its_own_layout_and_answers_ours(name, monkeypatch):
    module, functions = INSTALLED[name]
    install(monkeypatch, module, **functions)
    monkeypatch.setattr(packages, "available", lambda *call: None)
    q, k, v = draw()
    q = q.transpose(1, 2).contiguous().transpose(1, 2)  # strides as a projection leaves them after a norm
    kept = k.clone()
    found = packages.run(name, q, k, v)
    assert torch.equal(k, kept) and found.shape == q.shape and found.dtype == q.dtype
    assert torch.equal(found, reference.run(q, k, v))


def test_version_three_of_flash_comes_first_and_may_answer_more(monkeypatch):
    install(monkeypatch, "flash_attn", flash_attn_func=lambda *call: pytest.fail("version 2 was asked"))
    install(monkeypatch, "flash_attn_interface", flash_attn_func=flash3)
    q, k, v = draw()
    assert torch.equal(packages.run("flash", q, k, v), reference.run(q, k, v))


@pytest.mark.parametrize(
    ("name", "words"),
    [("flash", "flash-attn is not installed"), ("sage", "SageAttention is not installed"), ("kitchen", "comfy-kitchen is not")],
)
def test_what_is_not_installed_is_said(name, words):
    assert packages.available(name, CARD).startswith(words)


def test_a_package_that_lacks_the_function_or_cannot_be_imported_is_told(monkeypatch, tmp_path):
    install(monkeypatch, "sageattention")
    assert packages.available("sage", CARD) == "this SageAttention has no sageattention.sageattn"
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    packages._function.cache_clear()
    told = packages.available("flash", CARD)
    assert "flash_attn cannot be imported (ImportError: undefined symbol: _ZN3c10)" in told


def test_a_card_that_is_too_old_or_that_the_package_does_not_know_is_told(monkeypatch):
    for name, (module, functions) in INSTALLED.items():
        install(monkeypatch, module, **functions)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card=None: (7, 0))
        assert "compute capability" in packages.available(name, CARD)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card=None: (7, 5))
    monkeypatch.setattr(sys.modules["comfy_kitchen"], "int8_attention_is_available", lambda device: False)
    assert packages.available("kitchen", CARD) == "this comfy-kitchen has no compiled kernels for it"
    del sys.modules["comfy_kitchen"].int8_attention_is_available
    assert "does not answer whether it can run there" in packages.available("kitchen", CARD)


@pytest.mark.parametrize("name", INSTALLED)
def test_calls_that_no_package_takes_are_refused(name):
    q, k, v = draw()
    assert packages.supports(name, q, k, v, None) is None
    assert "it takes no mask, got Tensor" in packages.supports(name, q, k, v, torch.ones(7, 9, dtype=torch.bool))
    assert "float16 or bfloat16" in packages.supports(name, *(x.float() for x in (q, k, v)), None)
    assert "multiple of 8 up to" in packages.supports(name, *draw(dim=12), None)
    assert "multiple of 8 up to" in packages.supports(name, *draw(dim=264), None)
    learning = [x.requires_grad_() for x in (q, k, v)]
    assert packages.supports(name, *learning, None) == (None if name == "flash" else "it has no backward pass")
    with torch.no_grad():
        assert packages.supports(name, *learning, None) is None


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, None),
        (torch.zeros_like, "attention is off by 1.0e+00 of its length, at most"),
        (lambda q: torch.full_like(q, float("nan")), "attention is off by nan"),
    ],
)
@pytest.mark.parametrize("name", INSTALLED)
def test_each_is_tested_once_on_a_card_before_it_is_used(name, answer, words, monkeypatch):
    """A package that was built for other cards may answer zeros."""
    calls = []
    true = packages.PACKAGES[name].call

    def call(function, q, k, v):
        calls.append((q.shape[1], q.shape[2] // k.shape[2]))
        return true(function, q, k, v) if answer is None else answer(q)

    module, functions = INSTALLED[name]
    install(monkeypatch, module, **functions)
    package = packages.PACKAGES[name]
    monkeypatch.setitem(
        packages.PACKAGES, name, packages.Package(**{f: getattr(package, f) for f in package.__slots__} | {"call": call})
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    real = trial.run
    monkeypatch.setattr(trial, "run", lambda op, backend, device: real(op, backend, torch.device("cpu")))
    first, second = packages.available(name, CARD), packages.available(name, CARD)
    assert first == second
    if words is None:
        assert first is None and calls == [(200, 1), (77, 1), (200, 2)]
    else:
        assert words in first and len(calls) == 1


def test_auto_never_takes_one_and_a_name_does(monkeypatch):
    for module, functions in INSTALLED.values():
        install(monkeypatch, module, **functions)
    monkeypatch.setattr(packages, "available", lambda *call: None)
    rows = tuple(
        dispatch.Backend(one.name, lambda device: None, one.supports, one.run, one.about, one.packs_only, one.passes)
        for one in dispatch.BACKENDS
        if one.name in (*INSTALLED, "reference")
    )
    monkeypatch.setattr(dispatch, "BACKENDS", rows)
    q, k, v = draw()
    assert dispatch.select("auto", q, k, v).name == "reference"
    mask = torch.arange(9)[None, None, None] < torch.tensor([9, 4])[:, None, None, None]
    for name in INSTALLED:
        assert torch.equal(attention(q, k, v, backend=name), reference.run(q, k, v))
        torch.testing.assert_close(attend_with(backend=name)(q, k, v, mask), reference.run(q, k, v, mask), atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", INSTALLED)
def test_a_name_that_cannot_run_is_refused_with_the_reason(name):
    assert name in chosen.names()
    with pytest.raises(BackendUnavailable, match=f"found {name!r}, which cannot: it needs CUDA, not cpu"):
        chosen.check(name, torch.device("cpu"), torch.bfloat16)
    assert f"  {name}: it needs CUDA, not cpu" in explain("cpu")
