"""Attention over packs: every backend reads one PackMask as the same rule, and nothing passes between documents."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError
from reasonedit.reasonedit_core.kernels import attention, batched, dispatch, explain, flex, reference, sdpa, select, varlen
from reasonedit.reasonedit_core.packing import PADDING, PackMask

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=4)


def documents(lengths, padding=0):
    doc_id = [number for number, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(doc_id + [PADDING] * padding)


def make(length, h=4, hk=2, d=16, seed=0, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, heads, d, generator=rng).to(dtype) for heads in (h, hk, hk)]


def apart(q, k, v, lengths, causal):
    """Attention document by document, with no mask but the causal one; padding gives zeros."""
    out, at = torch.zeros_like(q), 0
    for length in lengths:
        part = slice(at, at + length)
        mask = torch.ones(length, length, dtype=torch.bool).tril() if causal else None
        out[:, part] = reference.run(q[:, part], k[:, part], v[:, part], mask)
        at += length
    return out


def flex_run(q, k, v, mask):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # on the CPU it says that it is slow
        return flex.run(q, k, v, mask)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(lengths=LENGTHS, padding=st.integers(0, 5), causal=st.booleans())
def test_the_dense_mask_equals_the_rule_pair_by_pair(lengths, padding, causal):
    doc_id = documents(lengths, padding)
    mask = PackMask(doc_id, causal)
    ids = doc_id.tolist()
    for row, query in enumerate(ids):
        for column, key in enumerate(ids):
            expected = query == key != PADDING and (column <= row or not causal)
            assert bool(mask.dense[0, 0, row, column]) == expected
    assert mask.cu_seqlens.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert mask.cu_seqlens.dtype == torch.int32


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("run", [reference.run, sdpa.run, batched.run, flex_run], ids=["reference", "sdpa", "batched", "flex"])
def test_a_pack_equals_its_documents_apart(run, padding, causal):
    lengths = (5, 1, 8)
    q, k, v = make(sum(lengths) + padding)
    got = run(q, k, v, PackMask(documents(lengths, padding), causal))
    torch.testing.assert_close(got, apart(q, k, v, lengths, causal), rtol=1e-5, atol=1e-6)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(
    lengths=LENGTHS,
    padding=st.integers(0, 4),
    causal=st.booleans(),
    backend=st.sampled_from(["batched", "sdpa", "reference"]),
)
def test_no_gradient_crosses_a_border(lengths, padding, causal, backend):
    doc_id = documents(lengths, padding)
    leaves = [x.requires_grad_() for x in make(len(doc_id))]
    out = attention(*leaves, PackMask(doc_id, causal), backend=backend)
    for number in range(len(lengths)):
        grads = torch.autograd.grad(out[:, doc_id == number].square().sum(), leaves, retain_graph=True)
        for grad in grads:
            assert grad[:, doc_id != number].abs().sum() == 0
        assert grads[2][:, doc_id == number].abs().max() > 0
    assert out[:, doc_id == PADDING].abs().sum() == 0


@settings(max_examples=25, derandomize=True, deadline=None)
@given(lengths=LENGTHS, padding=st.integers(0, 4), causal=st.booleans(), seed=st.integers(0, 9))
def test_a_changed_document_leaves_the_others_to_the_bit(lengths, padding, causal, seed):
    doc_id = documents(lengths, padding)
    mask = PackMask(doc_id, causal)
    q, k, v = make(len(doc_id), seed=seed)
    before = attention(q, k, v, mask)
    changed = doc_id == seed % len(lengths)
    for x in (q, k, v):
        x[:, changed] = x[:, changed] * -3 + 1
    after = attention(q, k, v, mask)
    assert torch.equal(before[:, ~changed], after[:, ~changed])
    assert not torch.equal(before[:, changed], after[:, changed])


# batched


@settings(max_examples=60, derandomize=True, deadline=None)
@given(lengths=st.lists(st.integers(1, 100), min_size=1, max_size=6), padding=st.integers(0, 40), causal=st.booleans())
def test_documents_of_any_lengths_side_by_side_give_what_they_give_apart(lengths, padding, causal):
    q, k, v = make(sum(lengths) + padding)
    got = batched.run(q, k, v, PackMask(documents(lengths, padding), causal))
    torch.testing.assert_close(got, apart(q, k, v, lengths, causal), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_training_in_low_precision_agrees_on_the_cpu(causal):
    """There the products are written out; values and gradients are those of the plain attention within bfloat16."""
    lengths = (5, 33, 40)
    leaves = [x.requires_grad_() for x in make(sum(lengths) + 2, dtype=torch.bfloat16)]
    mask = PackMask(documents(lengths, 2), causal)
    got, expected = batched.run(*leaves, mask), reference.run(*leaves, mask)
    assert batched._by_products(*leaves) and not batched._by_products(*(x.detach() for x in leaves))
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1)).to(got)
    for ours, theirs in zip(*(torch.autograd.grad((out * weight).sum(), leaves) for out in (got, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)
        assert ours[:, -2:].abs().sum() == 0


def test_batched_documents_cost_less_than_a_step_each():
    lengths = (1, 33, 40, 64, 65, 100)
    made = batched.batches_of(mask := PackMask(documents(lengths)))
    assert batched.batches_of(mask) is made
    assert [tuple(batch.rows.shape) for batch in made.batches] == [(1, 1), (3, 64), (1, 65), (1, 100)]
    assert [batch.real is None for batch in made.batches] == [True, False, True, True]


# flex

SIZES = [(1,), (127, 1), (128,), (129, 127), (64, 64, 128), (300,), (1, 400, 3), (40, 41, 42, 43, 200), (256, 256)]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("padding", [0, 1, 200])
@pytest.mark.parametrize("lengths", SIZES, ids=str)
def test_the_block_mask_equals_the_one_made_from_all_pairs(lengths, padding, causal):
    from torch.nn.attention.flex_attention import create_block_mask

    doc_id = documents(lengths, padding)
    mask = PackMask(doc_id, causal)
    ours = flex.build(mask)
    theirs = create_block_mask(ours.mask_mod, None, None, len(doc_id), len(doc_id), device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    rows = torch.arange(len(doc_id))
    assert torch.equal(ours.mask_mod(None, None, rows[:, None], rows[None]), mask.dense[0, 0])


def test_full_blocks_are_told_apart_from_partial_ones():
    """Else the numbers are right and the kernel asks the rule for every pair."""
    made = flex.build(PackMask(documents((384, 128), 64)))
    assert made.full_kv_num_blocks.flatten().tolist() == [3, 3, 3, 1, 0]
    assert made.kv_num_blocks.sum() == 0
    causal = flex.build(PackMask(documents((384, 128), 64), causal=True))
    assert causal.full_kv_num_blocks.flatten().tolist() == [0, 1, 2, 0, 0]
    assert causal.kv_num_blocks.flatten().tolist() == [1, 1, 1, 1, 0]


def test_a_block_mask_is_made_once_per_pack(monkeypatch):
    made = []
    monkeypatch.setattr(flex, "build", lambda mask: made.append(mask) or f"mask {len(made)}")
    first, second = PackMask(documents((3,))), PackMask(documents((3,)))
    assert [flex.block_mask(mask) for mask in (first, first, second, first)] == ["mask 1", "mask 1", "mask 2", "mask 1"]
    assert made == [first, second]


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_flex_equals_sdpa_over_several_blocks(causal, dtype, tolerance):
    mask = PackMask(documents((130, 60, 100), 10), causal)
    q, k, v = make(300, dtype=dtype)
    torch.testing.assert_close(flex_run(q, k, v, mask), sdpa.run(q, k, v, mask), rtol=tolerance, atol=tolerance)


def test_a_new_pack_compiles_nothing():
    """The rule of a mask is a new function per pack; torch must know it again by its code."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    kernel = torch.compile(flex._flex_attention(), backend=backend)
    with torch.no_grad():
        for lengths in ((100, 156), (30, 40, 186), (256,)):
            mask, (q, k, v) = PackMask(documents(lengths)), make(256)
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            got = kernel(q, k, v, block_mask=flex.block_mask(mask), enable_gqa=True).transpose(1, 2)
            torch.testing.assert_close(got, sdpa.run(*make(256), mask), rtol=1e-5, atol=1e-5)
    assert len(compiled) == 1


# varlen: the kernel is CUDA's, so a stand-in with the meaning that torch documents takes the call


@pytest.fixture(params=[True, False], ids=["with groups", "without groups"])
def kernel(request, monkeypatch):
    calls = []

    def compute(query, key, value, cu_q, cu_k, max_q, max_k, window_size=(-1, -1)):
        assert query.ndim == 3 and cu_q is cu_k and cu_q.dtype == torch.int32
        lengths = cu_q.diff().tolist()
        assert max_q == max_k == max(lengths) and sum(lengths) == len(query) == len(key) == len(value)
        assert window_size in ((-1, -1), (-1, 0))
        calls.append(key.shape[1])
        return apart(query[None], key[None], value[None], lengths, window_size == (-1, 0))[0]

    def grouped(query, key, value, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa or query.shape[1] == key.shape[1]
        return compute(query, key, value, cu_q, cu_k, max_q, max_k, window_size)

    def plain(query, key, value, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1)):
        assert query.shape[1] == key.shape[1]
        return compute(query, key, value, cu_q, cu_k, max_q, max_k, window_size)

    from torch.nn.attention import varlen as theirs

    monkeypatch.setattr(theirs, "varlen_attn", grouped if request.param else plain)
    return calls


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("padding", [0, 3])
def test_varlen_is_called_as_torch_documents_it(kernel, padding, causal):
    lengths = (5, 1, 8)
    q, k, v = make(sum(lengths) + padding, h=4, hk=2)
    got = varlen.run(q, k, v, PackMask(documents(lengths, padding), causal))
    assert len(kernel) == 1
    torch.testing.assert_close(got, apart(q, k, v, lengths, causal), rtol=1e-5, atol=1e-6)


def test_varlen_of_nothing_but_padding_is_zeros(kernel):
    q, k, v = make(4)
    assert varlen.run(q, k, v, PackMask(documents((), 4).long())).abs().sum() == 0 and not kernel


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_torch_takes_the_call_of_varlen_by_its_shapes(causal):
    """The real function, on tensors without values: its arguments are those of this torch, forward and backward."""
    q, k, v = (x.to("meta").requires_grad_() for x in make(16, dtype=torch.bfloat16))
    out = varlen.run(q, k, v, PackMask(documents((5, 8), 3), causal))
    assert out.shape == q.shape and out.dtype == q.dtype
    out.sum().backward()
    assert k.grad.shape == k.shape and v.grad.shape == v.shape


def test_varlen_groups_are_asked_of_torch_where_it_has_them():
    from torch.nn.attention.varlen import varlen_attn

    assert varlen._groups(varlen_attn) == (torch.__version__.split(".")[:2] != ["2", "11"])


# older releases of torch, and machines that lack something: each thing hidden in turn


@pytest.fixture
def forget():
    """Nothing of what a test hid is remembered after it."""
    for probe in (varlen._missing, flex._missing):
        probe.cache_clear()
    yield
    for probe in (varlen._missing, flex._missing):
        probe.cache_clear()


@pytest.fixture
def whole(forget, monkeypatch):
    """A machine that has it all."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (8, 0))
    monkeypatch.setattr(flex, "find_spec", lambda name: object())


CARD = torch.device("cuda", 0)


def test_a_machine_that_has_it_all_can_run_both(whole):
    assert varlen.available(CARD) is None and flex.available(CARD) is None


def no_varlen(monkeypatch):
    from torch.nn.attention import varlen as theirs

    monkeypatch.delattr(theirs, "varlen_attn")


def no_varlen_module(monkeypatch):
    import torch.nn.attention

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    monkeypatch.delattr(torch.nn.attention, "varlen", raising=False)


def no_flash(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)


def old_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))


def no_blocks(monkeypatch):
    from torch.nn.attention.flex_attention import BlockMask

    monkeypatch.delattr(BlockMask, "from_kv_blocks")


def no_flex_module(monkeypatch):
    import torch.nn.attention

    monkeypatch.setitem(sys.modules, "torch.nn.attention.flex_attention", None)
    monkeypatch.delattr(torch.nn.attention, "flex_attention", raising=False)


def no_triton(monkeypatch):
    monkeypatch.setattr(flex, "find_spec", lambda name: None)


NO_VARLEN = f"torch {torch.__version__} has no torch.nn.attention.varlen.varlen_attn"
NO_BLOCKS = f"torch {torch.__version__} has no BlockMask.from_kv_blocks"


@pytest.mark.parametrize(
    ("backend", "hide", "words"),
    [
        (varlen, no_varlen, NO_VARLEN),
        (varlen, no_varlen_module, NO_VARLEN),
        (varlen, no_flash, "this torch was built without flash attention"),
        (varlen, old_card, "it needs a card of compute capability 8.0 or newer, found 7.5"),
        (flex, no_blocks, NO_BLOCKS),
        (flex, no_flex_module, NO_BLOCKS),
        (flex, no_triton, "Triton, which compiles it, is not installed"),
    ],
)
def test_what_torch_or_the_machine_lacks_is_said(whole, monkeypatch, backend, hide, words):
    hide(monkeypatch)
    assert backend.available(CARD) == words


# the dispatch


@pytest.mark.parametrize("name", ["varlen", "flex"])
def test_cuda_backends_say_in_words_why_they_cannot_run_here(name):
    q, k, v = make(8, dtype=torch.bfloat16)
    mask = PackMask(documents((8,)))
    with pytest.raises(BackendUnavailable, match=f"'{name}' cannot run this call: it needs CUDA, not cpu"):
        attention(q, k, v, mask, backend=name)
    assert select("auto", q, k, v, mask).name == "batched"
    assert f"  {name}: it needs CUDA, not cpu" in explain("cpu")
    assert explain("cpu").splitlines()[0] == "attention on cpu: sdpa would run, batched where documents are packed"


@pytest.mark.parametrize(
    "name,call,words",
    [
        ("varlen", dict(mask=None), "PackMask"),
        ("varlen", dict(mask=torch.ones(8, 8, dtype=torch.bool)), "PackMask"),
        ("varlen", dict(dtype=torch.float32), "float16 or bfloat16.*float32"),
        ("varlen", dict(d=12), "multiple of 8 up to 256, got 12"),
        ("varlen", dict(d=264), "got 264"),
        ("varlen", dict(batch=2), "batch of 2"),
        ("flex", dict(mask=None), "PackMask"),
        ("flex", dict(dtype=torch.float64), "float64"),
        ("flex", dict(d=8), "at least 16, got 8"),
    ],
)
def test_calls_that_a_backend_cannot_take_are_refused_with_the_reason(name, call, words):
    mask = call.get("mask", PackMask(documents((8,))))
    q, k, v = make(8, d=call.get("d", 16), dtype=call.get("dtype", torch.bfloat16))
    q, k, v = (x.expand(call.get("batch", 1), -1, -1, -1) for x in (q, k, v))
    with pytest.raises(BackendUnavailable, match=words):
        attention(q, k, v, mask, backend=name)


def test_a_card_that_has_varlen_takes_it_for_packs_and_sdpa_for_the_rest(monkeypatch):
    able = tuple(replace(backend, available=lambda device: None) for backend in dispatch.BACKENDS)
    monkeypatch.setattr(dispatch, "BACKENDS", able)
    mask = PackMask(documents((8,)))
    assert select("auto", *make(8, dtype=torch.bfloat16), mask).name == "varlen"
    assert select("auto", *make(8), mask).name == "flex"
    assert select("auto", *make(8, dtype=torch.float64), mask).name == "batched"
    for other in (None, mask.dense):
        assert select("auto", *make(8, dtype=torch.bfloat16), other).name == "sdpa"


def test_explain_names_the_backend_of_packs(monkeypatch):
    row = dispatch.Backend("quick", lambda device: None, lambda *call: None, lambda *call: None, packs_only=True)
    monkeypatch.setattr(dispatch, "BACKENDS", (row, *dispatch.BACKENDS))
    assert explain("cpu").splitlines()[0] == "attention on cpu: sdpa would run, quick where documents are packed"


def test_a_host_sees_the_mask_of_a_pack_as_a_tensor():
    mask = PackMask(documents((3, 5)))
    q, k, v = make(8)
    seen = []
    attention(q, k, v, mask, host=lambda *call: seen.append(call[3]) or q)
    assert torch.equal(seen[0], mask.dense)


@pytest.mark.parametrize("length", [7, 9])
def test_a_pack_of_another_length_is_refused(length):
    with pytest.raises(ConfigError, match=f"PackMask of 8 tokens.*got {length} and {length}"):
        attention(*make(length), PackMask(documents((8,))))
    q, k, v = make(8)
    with pytest.raises(ConfigError, match="got 8 and 7"):
        attention(q, k[:, :7], v[:, :7], PackMask(documents((8,))))


def test_a_batch_shares_the_mask_of_a_pack():
    lengths = (3, 5)
    q, k, v = (torch.cat([a, b]) for a, b in zip(make(8, seed=1), make(8, seed=2), strict=True))
    for backend in ("sdpa", "reference"):
        got = attention(q, k, v, PackMask(documents(lengths)), backend=backend)
        torch.testing.assert_close(got, apart(q, k, v, lengths, False), rtol=1e-5, atol=1e-6)


def test_compile_sees_one_graph_through_a_pack_that_is_ready():
    q, k, v = make(8)
    mask = PackMask(documents((3, 5)))
    batched.batches_of(mask)  # before: what it is made by cannot be traced
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v, mask), attention(q, k, v, mask))
