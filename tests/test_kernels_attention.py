"""The attention dispatch: backends against the formula, masks never dropped, refusals in words."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError
from reasonedit.reasonedit_core.kernels import (
    Backend,
    Refused,
    attention,
    chosen_backends,
    dispatch,
    explain,
    reference,
    sdpa,
    select,
)

MASKS = {
    "none": lambda b, h, t, s: None,
    "keys": lambda b, h, t, s: (b, 1, 1, s),
    "pairs": lambda b, h, t, s: (b, 1, t, s),
    "heads": lambda b, h, t, s: (b, h, t, s),
    "flat": lambda b, h, t, s: (t, s),
    "batchless": lambda b, h, t, s: (1, t, s),
}


def make(b=2, t=5, s=7, h=4, hk=4, d=6, mask="none", seed=0, dtype=torch.float32):
    """q, k, v and a mask in which every row keeps key 0."""
    rng = torch.Generator().manual_seed(seed)
    q = torch.randn(b, t, h, d, generator=rng).to(dtype)
    k, v = (torch.randn(b, s, hk, d, generator=rng).to(dtype) for _ in range(2))
    shape = MASKS[mask](b, h, t, s)
    if shape is None:
        return q, k, v, None
    keep = torch.rand(shape, generator=rng) < 0.5
    keep[..., 0] = True
    return q, k, v, keep


def by_hand(q, k, v, mask):
    """Attention by loops over batch, head and query, in double precision."""
    b, t, h, d = q.shape
    s, hk = k.shape[1:3]
    full = torch.ones(b, h, t, s, dtype=torch.bool) if mask is None else mask.expand(b, h, t, s)
    out = torch.zeros(b, t, h, v.shape[-1], dtype=torch.float64)
    for i, j, n in ((i, j, n) for i in range(b) for j in range(h) for n in range(t)):
        keys = [m for m in range(s) if full[i, j, n, m]]
        group = j * hk // h
        weights = [math.exp(float(q[i, n, j].double() @ k[i, m, group].double()) / math.sqrt(d)) for m in keys]
        for m, w in zip(keys, weights, strict=True):
            out[i, n, j] += w / sum(weights) * v[i, m, group].double()
    return out


@pytest.mark.parametrize("run", [reference.run, sdpa.run], ids=["reference", "sdpa"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("hk", [4, 2, 1])
def test_backends_equal_the_formula(run, mask, hk):
    q, k, v, keep = make(hk=hk, mask=mask)
    out = run(q, k, v, keep)
    assert out.shape == q.shape and out.dtype == q.dtype
    torch.testing.assert_close(out.double(), by_hand(q, k, v, keep), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1, 8), (2, 17, 63, 6, 3, 20), (1, 130, 130, 2, 2, 64)], ids=str)
def test_sdpa_equals_reference(size, dtype, tolerance):
    b, t, s, h, hk, d = size
    for mask in ("none", "keys", "pairs"):
        q, k, v, keep = make(b, t, s, h, hk, d, mask=mask, dtype=dtype)
        torch.testing.assert_close(sdpa.run(q, k, v, keep), reference.run(q, k, v, keep), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mask", ["none", "pairs"])
def test_gradients_of_sdpa_equal_those_of_reference(mask):
    grads = []
    for run in (reference.run, sdpa.run):
        q, k, v, keep = make(hk=2, mask=mask)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        run(*leaves, keep).square().sum().backward()
        grads.append([x.grad for x in leaves])
    for ours, theirs in zip(*grads, strict=True):
        assert ours.abs().max() > 1e-3
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_a_query_without_keys_gets_zeros_and_no_nan_in_gradients(name):
    q, k, v, keep = make(mask="pairs")
    keep[0, :, 2] = False
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, keep, backend=name)
    assert out[0, 2].abs().max() == 0
    assert out[1].abs().min() > 0
    out.sum().backward()
    assert all(torch.isfinite(x.grad).all() for x in leaves)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    name=st.sampled_from(["reference", "sdpa"]),
    valid=st.integers(1, 9),
    padding=st.integers(1, 9),
    queries=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_hidden_keys_might_as_well_not_be_there(name, valid, padding, queries, seed):
    q, k, v, _ = make(1, queries, valid + padding, seed=seed)
    mask = (torch.arange(valid + padding) < valid)[None, None, None]
    k[:, valid:], v[:, valid:] = 1e4, 1e4
    got = attention(q, k, v, mask, backend=name)
    torch.testing.assert_close(got, attention(q, k[:, :valid], v[:, :valid], backend=name), rtol=1e-4, atol=1e-5)


def test_the_host_comes_first_and_sees_the_mask():
    q, k, v, keep = make(mask="keys")
    seen = []

    def host(*call):
        seen.append(call)
        return torch.full_like(q, 7.0)

    assert (attention(q, k, v, keep, host=host, backend="reference") == 7).all()
    assert seen == [(q, k, v, keep)]


def test_a_host_that_refuses_hands_over_and_says_why_once(caplog):
    q, k, v, keep = make(mask="keys")

    def host(*call):
        raise Refused("no masks in this host")

    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert torch.equal(attention(q, k, v, keep, host=host), attention(q, k, v, keep))
    assert sum("no masks in this host" in line for line in caplog.messages) == 1


def test_a_host_that_breaks_is_not_hidden():
    def host(*call):
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        attention(*make(), host=host)


@pytest.fixture
def picky(monkeypatch):
    """A first row that computes everything but masked calls, and marks its work."""
    row = Backend(
        "picky",
        available=lambda device: None,
        supports=lambda q, k, v, mask: None if mask is None else "it takes no mask",
        run=lambda q, k, v, mask: torch.full_like(q, 3.0),
    )
    absent = Backend("absent", lambda device: f"it needs CUDA, not {device.type}", lambda *a: None, lambda *a: None)
    monkeypatch.setattr(dispatch, "BACKENDS", (absent, row, *dispatch.BACKENDS))
    dispatch._log_once.cache_clear()


def test_auto_takes_the_first_backend_that_can_and_logs_it_once(picky, caplog):
    q, k, v, keep = make(mask="pairs")
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert (attention(q, k, v) == 3).all()
            assert torch.equal(attention(q, k, v, keep), sdpa.run(q, k, v, keep))
    assert [line for line in caplog.messages if "backend picky" in line] == [
        "attention on cpu: backend picky; absent: it needs CUDA, not cpu"
    ]
    assert sum("backend sdpa" in line and "picky: it takes no mask" in line for line in caplog.messages) == 1


def test_a_named_backend_runs_or_raises_with_its_reason(picky):
    q, k, v, keep = make(mask="pairs")
    assert (attention(q, k, v, backend="picky") == 3).all()
    with pytest.raises(BackendUnavailable, match="'picky' cannot run this call: it takes no mask.*'sdpa'"):
        attention(q, k, v, keep, backend="picky")
    with pytest.raises(BackendUnavailable, match="it needs CUDA, not cpu"):
        attention(q, k, v, backend="absent")
    assert select("reference", q, k, v).name == "reference"


def test_auto_without_any_backend_lists_every_reason(picky, monkeypatch):
    monkeypatch.setattr(dispatch, "BACKENDS", dispatch.BACKENDS[:2])
    q, k, v, keep = make(mask="pairs")
    with pytest.raises(BackendUnavailable, match="absent: it needs CUDA.*picky: it takes no mask"):
        attention(q, k, v, keep)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="'warp' is not known.*'auto'.*'sdpa'.*'reference'"):
        attention(*make(), backend="warp")


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda q, k, v: (q, k, v, torch.zeros(5, 7)), "bool.*float32"),
        (lambda q, k, v: (q, k, v, torch.ones(2, 1, 5, 6, dtype=torch.bool)), "broadcast.*2, 1, 5, 6"),
        (lambda q, k, v: (q, k, v, torch.ones(3, 1, 1, 7, dtype=torch.bool)), "broadcast.*3, 1, 1, 7"),
        (lambda q, k, v: (q, k, v, torch.ones(1, 2, 1, 5, 7, dtype=torch.bool)), "broadcast"),
        (lambda q, k, v: (q, k[:, :, :3], v[:, :, :3], None), "multiple of the key heads"),
        (lambda q, k, v: (q, k, v[:, :3], None), "k.*7.*v.*3"),
        (lambda q, k, v: (q[:1], k, v, None), "one batch"),
        (lambda q, k, v: (q.flatten(2), k, v, None), "takes q"),
    ],
    ids=["float mask", "short mask", "batch of mask", "5-d mask", "heads", "values", "batch", "rank"],
)
def test_calls_that_a_backend_could_misread_are_refused(change, words):
    q, k, v, _ = make()
    with pytest.raises(ConfigError, match=words):
        attention(*change(q, k, v))


def test_explain_names_the_choice_and_every_reason(picky):
    text = explain("cpu")
    assert text.splitlines()[0] == "attention on cpu: picky would run"
    assert "absent: it needs CUDA, not cpu" in text and "sdpa: available" in text and "reference: available" in text


def test_compile_sees_one_graph_without_logging(caplog):
    q, k, v, keep = make(hk=2, mask="keys")
    dispatch._log_once.cache_clear()
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    with caplog.at_level(logging.INFO, logger=dispatch.__name__):
        got = compiled(q, k, v, keep)
    assert not [record for record in caplog.records if record.name == dispatch.__name__]
    assert torch.equal(got, attention(q, k, v, keep))


# --- what ran ---


@pytest.fixture
def unheard(monkeypatch):
    """Nothing has run, nothing was compiled."""
    monkeypatch.setattr(dispatch, "_RAN", set())
    monkeypatch.setattr(dispatch, "_TRACED", set())


def test_what_ran_since_it_was_last_asked_is_told(unheard, picky):
    q, k, v, keep = make(mask="pairs")
    assert chosen_backends() == ()
    attention(q, k, v, keep)
    attention(q, k, v)
    attention(q, k, v)
    attention(q, k, v, backend="reference")
    assert chosen_backends(forget=False) == chosen_backends() == ("picky", "sdpa", "reference")
    assert chosen_backends() == ()
    with pytest.raises(BackendUnavailable):
        attention(q, k, v, keep, backend="picky")
    assert chosen_backends() == (), "what cannot run has not run"


def test_a_host_that_computed_is_told_and_one_that_refused_is_not(unheard):
    q, k, v, keep = make(mask="pairs")

    def host(q, k, v, mask):
        if mask is not None:
            raise Refused("no masks")
        return q

    attention(q, q, q, host=host)
    assert chosen_backends() == ("host",)
    attention(q, k, v, keep, host=host)
    assert chosen_backends() == ("sdpa",)


def test_a_compiled_graph_tells_what_it_was_made_of_and_is_made_once(unheard):
    torch.compiler.reset()  # what other tests compiled of it counts towards shapes that are not fixed
    q, k, v, _ = make(hk=2)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    for _ in range(3):
        assert torch.equal(compiled(q, k, v), attention(q, k, v))
        attention(q, k, v, backend="reference")
        assert chosen_backends() == ("sdpa", "reference")
        compiled(q, k, v)
        assert chosen_backends() == ("sdpa",)
    assert len(graphs) == 1
