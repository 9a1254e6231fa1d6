"""Packs: who sees whom, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import PackingError
from reasonedit.reasonedit_core.packing import IGNORED, PADDING, ImagePack, PackMask, TextPack

lengths = st.lists(st.integers(1, 6), min_size=0, max_size=5)


def numbered(parts: list[int], padding: int) -> torch.Tensor:
    return torch.tensor([doc for doc, n in enumerate(parts) for _ in range(n)] + [PADDING] * padding, dtype=torch.int64)


@given(lengths, st.integers(0, 4), st.booleans())
def test_dense_mask_is_the_rule_written_out(parts, padding, causal):
    doc = numbered(parts, padding)
    mask = PackMask(doc, causal)
    for q in range(len(doc)):
        for k in range(len(doc)):
            seen = doc[q] == doc[k] and doc[q] != PADDING and (k <= q or not causal)
            assert bool(mask.dense[0, 0, q, k]) == bool(seen)


@given(lengths, st.integers(0, 4))
def test_lengths_and_borders(parts, padding):
    mask = PackMask(numbered(parts, padding))
    assert list(mask.lengths) == parts
    assert mask.cu_seqlens.dtype == torch.int32
    assert mask.cu_seqlens.tolist() == [sum(parts[:n]) for n in range(len(parts) + 1)]


@pytest.mark.parametrize("doc", [[1], [0, 2], [0, 1, 0], [0, -1, 1], [-1, 0]], ids=str)
def test_documents_out_of_order_are_refused(doc):
    with pytest.raises(PackingError, match="in order"):
        PackMask(torch.tensor(doc))


def test_a_table_of_documents_is_refused():
    with pytest.raises(PackingError, match=r"\(2, 2\)"):
        PackMask(torch.zeros(2, 2, dtype=torch.int64))


def test_noise_and_velocity_are_those_of_the_target_alone():
    clean, noise = torch.randn(5, 4), torch.randn(5, 4)
    pack = ImagePack(
        text_index=torch.tensor([0]),
        text_doc=torch.tensor([0]),
        clean=clean,
        noise=noise,
        sigma=torch.tensor([0.25, 1.0]),
        image_doc=torch.tensor([0, 0, 0, 1, 1]),
        role=torch.tensor([0, 0, 1, 0, 1]),
        loss_weight=torch.tensor([1.0, 1, 0, 1, 0]),
        grids=(((1, 2), (1, 1)), ((1, 1), (1, 1))),
    )
    noisy = pack.noisy()
    torch.testing.assert_close(noisy[:2], 0.75 * clean[:2] + 0.25 * noise[:2])
    assert torch.equal(noisy[2], clean[2]) and torch.equal(noisy[4], clean[4])
    torch.testing.assert_close(noisy[3], noise[3])
    torch.testing.assert_close(noisy[0] - pack.sigma[0] * pack.velocity()[0], clean[0])
    assert pack.velocity()[[2, 4]].abs().max() == 0
    assert (pack.n_documents, pack.n_targets) == (2, 3)


def test_answers_are_counted():
    pack = TextPack(
        ids=torch.arange(4),
        positions=torch.zeros(3, 4, dtype=torch.int64),
        doc_id=torch.zeros(4, dtype=torch.int64),
        labels=torch.tensor([IGNORED, IGNORED, 2, 3]),
        weights=torch.ones(4),
        patches=torch.zeros(0, 1176),
    )
    assert pack.n_answers == 2
