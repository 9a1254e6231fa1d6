"""The Step1X connector: equal to the released one, split into a part per prompt and a part per step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from reasonedit.reasonedit_core.models.connector import Step1XConnector, masked_mean, pairwise
from reasonedit.tests.peer import recipe

GOLDEN = Path(__file__).parent / "golden" / "step1x_model.safetensors"


def make(dtype=torch.float32, seed=0) -> Step1XConnector:
    """A tiny connector with the golden weights, which carry the prefix it has inside the transformer."""
    connector = Step1XConnector(64, 64, 4, 2, 768)
    with torch.no_grad():
        for key, value in connector.state_dict().items():
            value.copy_(recipe.weight(f"connector.{key}", tuple(value.shape), seed))
    return connector.to(dtype).eval()


def prompt(batch=2, length=9, valid=(9, 5), dtype=torch.float32):
    x = recipe.draw("x", (batch, length, 64)).to(dtype)
    return x, torch.arange(length)[None] < torch.tensor(valid)[:, None]


@pytest.mark.parametrize("case,layout", [("padded", "v1.1"), ("full", "v1.2")])
@torch.no_grad()
def test_equal_to_the_released_connector(case, layout):
    golden = load_file(GOLDEN)
    values = recipe.inputs(layout, 11)
    assert values["encoder_mask"].all() == (case == "full")
    tokens, pooled = make()(values["encoder_hidden_states"], values["timestep"], values["encoder_mask"])
    torch.testing.assert_close(tokens, golden[f"connector/{case}/tokens"], rtol=0, atol=1e-6)
    torch.testing.assert_close(pooled, golden[f"connector/{case}/pooled"], rtol=0, atol=1e-6)


@torch.no_grad()
def test_prepare_once_refine_per_step_has_the_bits_of_forward():
    connector, (x, mask) = make(), prompt()
    state = connector.prepare(x, mask)
    results = []
    for t in (0.1, 0.9884):
        tokens = connector.refine(state, torch.tensor([t, t]))
        expected, pooled = connector(x, torch.tensor([t, t]), mask)
        assert torch.equal(tokens, expected) and torch.equal(state.pooled, pooled)
        results.append(tokens)
    assert (results[0] - results[1]).abs().max() > 1e-3


@torch.no_grad()
def test_one_prompt_serves_a_batch_of_timesteps():
    connector, (x, mask) = make(), prompt(1, 9, (7,))
    state = connector.prepare(x, mask)
    steps = torch.tensor([0.05, 0.5, 1.0])
    together = connector.refine(state, steps)
    assert together.shape == (3, 9, 64)
    for t, tokens in zip(steps, together, strict=True):
        torch.testing.assert_close(tokens[None], connector.refine(state, t[None]), rtol=0, atol=1e-6)


@torch.no_grad()
def test_attention_of_the_first_block_is_not_repeated():
    connector, (x, mask) = make(), prompt()
    calls = []

    def attend(q, k, v, keep):
        calls.append(keep.shape)
        return torch.zeros_like(q)

    state = connector.prepare(x, mask, attend)
    for _ in range(3):
        connector.refine(state, torch.ones(2), attend)
    assert calls == [(2, 1, 9, 9)] * (1 + 3)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(valid=st.integers(1, 8), padding=st.integers(1, 8), junk=st.sampled_from([0.0, 3.0, -50.0]))
@torch.no_grad()
def test_padding_does_not_reach_valid_tokens_or_the_pooled_vector(valid, padding, junk):
    connector = make()
    x, mask = prompt(1, valid + padding, (valid,))
    x[:, valid:] = junk
    tokens, pooled = connector(x, torch.tensor([0.3]), mask)
    alone, alone_pooled = connector(x[:, :valid], torch.tensor([0.3]))
    torch.testing.assert_close(tokens[:, :valid], alone, rtol=0, atol=2e-6)
    torch.testing.assert_close(pooled, alone_pooled, rtol=0, atol=2e-6)
    assert torch.isfinite(tokens).all()


@torch.no_grad()
def test_no_mask_means_that_all_tokens_are_valid():
    connector, (x, mask) = make(), prompt(2, 9, (9, 9))
    for ours, theirs in zip(connector(x, torch.ones(2)), connector(x, torch.ones(2), mask), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@torch.no_grad()
def test_masks_of_integers_are_read_as_bool():
    connector, (x, mask) = make(), prompt()
    for ours, theirs in zip(connector(x, torch.ones(2), mask.long()), connector(x, torch.ones(2), mask), strict=True):
        assert torch.equal(ours, theirs)


def test_pairs_hide_padding_but_leave_no_row_empty():
    pairs = pairwise(torch.tensor([[True, True, False], [False, False, False]]))[:, 0].int().tolist()
    assert pairs == [[[1, 1, 0], [1, 1, 0], [1, 0, 0]], [[1, 0, 0]] * 3]


def test_the_mean_of_fp16_states_does_not_overflow():
    x = torch.full((1, 640, 8), 300.0, dtype=torch.float16)
    mask = torch.arange(640)[None] < 500
    assert (masked_mean(x, mask) == 300).all() and (masked_mean(x, None) == 300).all()
    assert (masked_mean(x, torch.zeros_like(mask)) == 0).all()


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@torch.no_grad()
def test_half_precision_follows_fp32_with_a_timestep_of_either_dtype(dtype, tolerance):
    x, mask = prompt()
    t = torch.tensor([0.25, 0.5])  # exact in bf16 and in fp16
    expected = make()(x, t, mask)
    for t_dtype in (dtype, torch.float32):
        for ours, theirs in zip(make(dtype)(x.to(dtype), t.to(t_dtype), mask), expected, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_the_timestep_rounds_in_its_own_dtype():
    connector, (x, mask) = make(torch.bfloat16), prompt(dtype=torch.bfloat16)
    state = connector.prepare(x, mask)
    exact = torch.full((2,), 0.9936)
    rounded = exact.to(torch.bfloat16)
    assert torch.equal(connector.refine(state, rounded), connector.refine(state, torch.full((2,), 0.992)))
    assert not torch.equal(connector.refine(state, rounded), connector.refine(state, exact))


def test_every_parameter_gets_a_gradient():
    connector, (x, mask) = make(), prompt()
    tokens, pooled = connector(x.requires_grad_(), torch.tensor([0.2, 0.7]), mask)
    (tokens.square().sum() + pooled.square().sum()).backward()
    for name, parameter in [("x", x), *connector.named_parameters()]:
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, name
