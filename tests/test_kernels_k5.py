"""K5, attention over intervals of keys: the intervals themselves, the backend in the dispatch, Triton interpreted."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError
from reasonedit.reasonedit_core.kernels import (
    Intervals,
    attention,
    devices,
    dispatch,
    explain,
    interval,
    reference,
    sdpa,
    select,
    timing,
)
from reasonedit.reasonedit_core.kernels.mask import intervals_of
from reasonedit.reasonedit_core.packing import PADDING, PackMask
from reasonedit.tests import interpreter

LENGTHS = st.lists(st.integers(1, 9), min_size=0, max_size=4)


def pack(lengths, padding=0, causal=False):
    numbers = [number for number, length in enumerate(lengths) for _ in range(length)] + [PADDING] * padding
    return PackMask(torch.tensor(numbers, dtype=torch.int64), causal)


def make(queries, keys=None, heads=4, key_heads=2, dim=16, dtype=torch.float32, batch=1):
    rng = torch.Generator().manual_seed(0)
    sizes = ((queries, heads), (keys or queries, key_heads), (keys or queries, key_heads))
    return [torch.randn(batch, length, h, dim, generator=rng).to(dtype) for length, h in sizes]


def bounds(*pairs, keys):
    lo, hi = (torch.tensor(x, dtype=torch.int32) for x in zip(*pairs, strict=True))
    return Intervals(lo, hi, keys)


def test_triton_equals_the_reference_in_float64():
    interpreter.run("k5")


@pytest.mark.slow
def test_triton_equals_the_reference_in_every_case():
    interpreter.run("k5", slow=True)


# --- intervals ---


@settings(max_examples=40, derandomize=True, deadline=None)
@given(lengths=LENGTHS, padding=st.integers(0, 4), causal=st.booleans())
def test_the_intervals_of_a_pack_are_its_mask(lengths, padding, causal):
    if not sum(lengths) + padding:
        return
    mask = pack(lengths, padding, causal)
    intervals = intervals_of(mask)
    assert torch.equal(intervals.dense, mask.dense)
    assert intervals_of(mask) is intervals  # made once
    index = torch.arange(len(mask.doc_id))[::2]
    assert torch.equal(intervals.take(index).dense[0, 0], mask.dense[0, 0, index])


@settings(max_examples=80, derandomize=True, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 22)), min_size=1, max_size=12),
    keys=st.integers(1, 20),
    size=st.sampled_from([1, 4, 8]),
)
def test_seen_by_misses_no_query_and_names_few_too_many(pairs, keys, size):
    intervals = bounds(*pairs, keys=keys)
    found = intervals.seen_by(size)
    assert found.dtype == torch.int32 and found.shape == (2, -(-keys // size))
    assert intervals.seen_by(size) is found
    seen = intervals.dense[0, 0]
    for tile, (first, last) in enumerate(found.T.tolist()):
        rows = seen[:, tile * size : (tile + 1) * size].any(dim=1).nonzero()[:, 0].tolist()
        if rows:
            assert first <= rows[0] and last > rows[-1]
        # A tile of queries is named whole, because the union of its intervals meets the tile of keys.
        assert 0 <= first <= last <= len(pairs)


def test_seen_by_of_documents_is_tight():
    found = intervals_of(pack((8, 16, 8))).seen_by(8)
    assert found.tolist() == [[0, 8, 8, 24], [8, 24, 24, 32]]
    nothing = [(5, 5)] * 4
    assert bounds(*nothing, *[(0, 8)] * 4, keys=8).seen_by(4).tolist() == [[4, 4], [8, 8]]
    assert bounds((1, 0), *[(6, 8)] * 3, keys=8).seen_by(4).tolist() == [[0, 0], [0, 4]]


@pytest.mark.parametrize(
    "lo,hi,words",
    [
        (torch.zeros(3), torch.zeros(3).int(), "lo is .*float32"),
        (torch.zeros(3).int(), torch.zeros(4).int(), r"hi is \(4,\)"),
        (torch.zeros(3, 1).int(), torch.zeros(3, 1).int(), r"lo is \(3, 1\)"),
    ],
)
def test_malformed_intervals_are_refused(lo, hi, words):
    with pytest.raises(ConfigError, match=words):
        Intervals(lo, hi, 3)


# --- in the dispatch ---


@pytest.mark.parametrize("name", ["sdpa", "reference"])
def test_every_backend_takes_intervals_that_takes_masks(name):
    intervals = bounds((0, 3), (2, 9), (4, 4), (8, 9), keys=9)
    q, k, v = make(4, 9)
    found = attention(q, k, v, intervals, backend=name)
    torch.testing.assert_close(found, reference.run(q, k, v, intervals.dense))
    assert found[0, 2].abs().max() == 0


def test_the_host_gets_intervals_as_a_mask():
    intervals, seen = bounds((0, 3), (2, 9), keys=9), []
    q, k, v = make(2, 9)
    attention(q, k, v, intervals, host=lambda *call: seen.append(call[3]) or q)
    assert torch.equal(seen[0], intervals.dense)


@pytest.mark.parametrize("queries,keys", [(3, 9), (2, 8)])
def test_intervals_of_other_lengths_are_refused(queries, keys):
    with pytest.raises(ConfigError, match=f"Intervals of 2 queries and 9 keys.*got {queries} and {keys}"):
        attention(*make(queries, keys), bounds((0, 3), (2, 9), keys=9))


@pytest.mark.parametrize("name", ["varlen", "flex"])
def test_backends_of_packs_do_not_take_intervals(name):
    with pytest.raises(BackendUnavailable, match="PackMask"):
        attention(*make(2, 9, dtype=torch.bfloat16), bounds((0, 3), (2, 9), keys=9), backend=name)


@pytest.mark.parametrize(
    "call,words",
    [
        (dict(mask=torch.ones(8, 8, dtype=torch.bool)), "got a bool tensor"),
        (dict(dtype=torch.float32), "float16 or bfloat16.*float32"),
        (dict(dim=136), "head dim up to 128, got 136"),
        (dict(), "it needs CUDA, not cpu"),
    ],
)
def test_what_it_cannot_take_is_refused_with_the_reason(call, words):
    q, k, v = make(8, dim=call.get("dim", 16), dtype=call.get("dtype", torch.bfloat16))
    with pytest.raises(BackendUnavailable, match=f"'interval' cannot run this call: .*{words}"):
        attention(q, k, v, call.get("mask"), backend="interval")


def test_sequences_beyond_32_bits_are_refused():
    q, k, v = (torch.empty(1, 2**20, 16, 128, dtype=torch.bfloat16, device="meta") for _ in range(3))
    assert "32 bits" in interval.supports(q, k, v, None)
    assert interval.supports(q[:, : 2**19], k[:, : 2**19], v[:, : 2**19], None) is None


@pytest.fixture
def card(monkeypatch):
    """Every backend could run, and the tensors of the test pass for those of a card."""
    passes = interval.passes

    def on_card(q, k, v, mask):
        card = torch.device("cuda", 0)
        fake = [SimpleNamespace(device=card, requires_grad=x.requires_grad, shape=x.shape) for x in (q, k, v)]
        return passes(*fake, mask)

    rows = []
    for backend in dispatch.BACKENDS:
        able = {"available": lambda device: None}
        if backend.name == "interval":
            able["passes"] = on_card
        rows.append(dispatch.Backend(**{**{n: getattr(backend, n) for n in backend.__slots__}, **able}))
    monkeypatch.setattr(dispatch, "BACKENDS", tuple(rows))
    monkeypatch.setattr(interval, "available", lambda device: None)
    answers = {"slower": "it is slower"}
    monkeypatch.setattr(timing, "slower", lambda *call: answers["slower"])
    return answers


def test_auto_takes_it_for_what_varlen_cannot(card):
    """Packs: varlen, else K5, else FlexAttention, else SDPA by document."""
    q, k, v = make(8, dtype=torch.bfloat16)
    assert select("auto", q, k, v, pack((5, 3))).name == "varlen"
    batch = [x.expand(2, -1, -1, -1) for x in (q, k, v)]
    assert select("auto", *batch, pack((5, 3))).name == "interval"
    assert select("auto", q, k, v, intervals_of(pack((5, 3)))).name == "interval"
    assert select("auto", *make(8), pack((5, 3))).name == "flex"
    assert select("auto", *make(8, dtype=torch.float64), pack((5, 3))).name == "batched"
    assert select("auto", q, k, v, pack((5, 3)).dense).name == "sdpa"


def test_auto_takes_it_without_a_mask_only_where_it_was_timed_to_be_faster(card, caplog):
    q, k, v = make(64, dtype=torch.bfloat16)
    dispatch._log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        assert select("auto", q, k, v).name == "sdpa"
        card["slower"] = None
        assert select("auto", q, k, v).name == "interval"
    assert any("backend sdpa" in line and "interval: it is slower" in line for line in caplog.messages)
    assert any("backend interval" in line for line in caplog.messages)
    assert select("interval", q, k, v).name == "interval"
    q.requires_grad_()
    assert select("auto", q, k, v).name == "sdpa"
    with torch.no_grad():
        assert select("auto", q, k, v).name == "interval"
        assert select("auto", q[:, :63], k, v).name == "sdpa"


def test_explain_names_it():
    text = explain("cpu")
    assert "  interval: it needs CUDA, not cpu" in text
    assert "gate_norm_modulate on cpu: plain torch would run" in text


def test_the_backward_kernels_are_tested_when_gradients_are_wanted(monkeypatch):
    runs = []
    monkeypatch.setattr(devices, "refusal", lambda backend, device: None)
    monkeypatch.setattr(devices, "passed", lambda op, backend, device: runs.append(op) or f"{op} failed")
    q, k, v = make(8, dtype=torch.bfloat16)
    assert interval.supports(q, k, v, None) is None and runs == []
    assert interval.supports(q, k.requires_grad_(), v, None) == "interval backward failed"
    with torch.no_grad():
        assert interval.supports(q, k, v, None) is None
    assert interval.available(torch.device("cuda", 0)) == "interval failed"


# --- timing, with a clock of our own ---


@pytest.fixture
def clock(monkeypatch):
    taken = {"ours": 1.0, "theirs": 2.0}
    calls = []

    def milliseconds(run, inputs):
        calls.append(run)
        run(*inputs)
        return taken[run.__name__]

    def ours(q, k, v):
        return q

    def theirs(q, k, v):
        return q

    monkeypatch.setattr(timing, "_milliseconds", milliseconds)
    monkeypatch.setattr(timing, "_FOUND", {})
    monkeypatch.setattr(devices, "number", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return SimpleNamespace(taken=taken, calls=calls, ours=ours, theirs=theirs)


def broken(q, k, v):
    raise RuntimeError("no")


def timed(clock, inputs):
    return timing.slower("interval", clock.ours, "sdpa", clock.theirs, tuple(inputs))


def test_a_class_of_shapes_is_timed_once_and_said(clock, caplog):
    with caplog.at_level(logging.INFO):
        assert timed(clock, make(100)) is None
    assert len(clock.calls) == 2 * (timing.REPEATS + 2)
    assert clock.calls[:4] == [clock.ours, clock.theirs] * 2  # one after the other, so that a slow minute meets both
    assert ["interval took 1.000 ms where sdpa took 2.000 ms" in line for line in caplog.messages] == [True]
    clock.taken["ours"] = 3.0
    assert timed(clock, make(101)) is None  # the same class
    assert "interval took 3.000 ms" in timed(clock, make(200))
    assert "interval took 3.000 ms" in timed(clock, make(100, dtype=torch.bfloat16))


def test_a_tie_goes_to_the_library(clock):
    clock.taken.update(ours=0.99, theirs=1.0)
    assert "where sdpa took 1.000 ms" in timed(clock, make(100))


def test_a_backend_that_breaks_while_it_is_timed_is_not_taken(clock):
    reason = timing.slower("interval", broken, "sdpa", clock.theirs, tuple(make(100)))
    assert reason == "timing it failed (RuntimeError: no)"


def test_nothing_is_timed_while_a_graph_is_captured(clock, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "not timed yet" in timed(clock, make(100))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert timed(clock, make(100)) is None


def test_explain_lists_what_was_timed_on_the_card(clock, monkeypatch):
    assert timing.explain(torch.device("cuda", 0)) == []
    timed(clock, make(100))
    clock.taken["ours"] = 3.0
    timed(clock, make(200, dtype=torch.bfloat16))
    timing.slower("interval", broken, "sdpa", clock.theirs, tuple(make(400)))
    lines = timing.explain(torch.device("cuda", 0))
    assert lines[0].startswith(
        "  timed: interval took 1.000 ms where sdpa took 2.000 ms (q (1, 100, 4, 16), k (1, 100, 2, 16))"
    )
    assert lines[0].endswith(": interval is taken, float32") and lines[1].endswith(": sdpa is taken, bfloat16")
    assert lines[2] == "  timed: interval against sdpa (q (1, 400, 4, 16)): timing it failed (RuntimeError: no), float32"
    monkeypatch.setattr(devices, "number", lambda device: 1)
    assert timing.explain(torch.device("cuda", 1)) == [], "another card"
    monkeypatch.setattr(devices, "number", lambda device: 0)
    rows = tuple(replace(backend, available=lambda device: None) for backend in dispatch.BACKENDS)
    monkeypatch.setattr(dispatch, "BACKENDS", rows)
    monkeypatch.setattr(dispatch.ops, "explain", lambda device: [])
    monkeypatch.setattr(dispatch.scaled, "refusal", lambda device: "no card is here")
    assert "\n".join(lines) in explain(torch.device("cuda", 0))


# --- the operator ---


def test_work_is_counted_as_that_of_torchs_attention():
    """Whatever the intervals leave out: forward as SDPA, backward with the scores computed anew, as torch counts flash."""
    counts = []
    for run in (lambda *qkv: interval.run(*qkv, pack((5, 3))), sdpa.run):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            run(*(x.to("meta") for x in make(8, dtype=torch.bfloat16, key_heads=4)))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 2 * 4 * 8 * 8 * 16
    counter = FlopCounterMode(display=False)
    leaves = [x.to("meta").requires_grad_() for x in make(8, dtype=torch.bfloat16)]
    with counter:
        interval.run(*leaves, pack((5, 3))).sum().backward()
    assert counter.get_total_flops() == counts[0] + counts[0] * 5 // 2
    assert [x.grad.shape for x in leaves] == [x.shape for x in leaves]


def test_compile_sees_one_node():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    q, k, v = (x.to("meta") for x in make(4, 9, dtype=torch.bfloat16))
    intervals = bounds((0, 3), (2, 9), (4, 4), (8, 9), keys=9)
    intervals = Intervals(intervals.lo.to("meta"), intervals.hi.to("meta"), 9)
    run = torch.compile(lambda: attention(q, k, v, intervals, backend="interval"), backend=backend, fullgraph=True)
    assert run().shape == q.shape
    calls = [str(node.target) for node in graphs[0].graph.nodes if "reasonedit" in str(node.target)]
    assert len(graphs) == 1 and calls == ["reasonedit.interval_attention.default"]
