"""Schedules, clipping, optimizers by name and the moving average."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError
from reasonedit.training.optim import (
    SCHEDULES,
    Average,
    OptimSettings,
    build_optimizer,
    clip,
    rate,
    set_rate,
    to_masters,
)
from reasonedit.training.types import ParamGroup


def group(name="dit", lr=0.1, decay=0.01, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(3, 2).to(dtype)
    return ParamGroup(name, tuple((f"{name}.{key}", one) for key, one in linear.named_parameters()), lr, decay)


def rates(steps, **changes):
    return [rate(OptimSettings(**changes), step, steps) for step in range(steps)]


def test_schedules_by_hand():
    assert rates(4, schedule="constant", warmup=2) == [1, 1, 1, 1]
    assert rates(5, schedule="constant_with_warmup", warmup=4) == [0.25, 0.5, 0.75, 1, 1]
    assert rates(6, schedule="linear", warmup=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates(4, schedule="linear", floor=0.5) == [1, 0.875, 0.75, 0.625]
    assert rates(4, schedule="cosine") == pytest.approx([1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)])
    assert rate(OptimSettings(schedule="cosine", floor=0.1), 10, 4) == pytest.approx(0.1)


@pytest.mark.parametrize(("name", "schedule"), [("cosine", "cosine"), ("linear", "linear")])
def test_after_warmup_the_shape_is_that_of_transformers(name, schedule):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=11)
    for step in range(11):
        if step >= 3:
            assert rate(OptimSettings(schedule=schedule, warmup=3), step, 11) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


@given(st.sampled_from(SCHEDULES), st.integers(0, 20), st.integers(1, 40), st.floats(0, 1), st.integers(0, 60))
def test_rates_stay_between_nothing_and_one(schedule, warmup, steps, floor, step):
    value = rate(OptimSettings(schedule=schedule, warmup=warmup, floor=floor), step, steps)
    assert 0 <= value <= 1 + 1e-12
    if step >= warmup:
        assert value >= floor - 1e-12 or schedule.startswith("constant")


def test_each_group_has_its_own_rate():
    optimizer = build_optimizer([group("a", 0.1), group("b", 0.4)], OptimSettings())
    assert set_rate(optimizer, 0.5) == {"a": 0.05, "b": 0.2}
    assert set_rate(optimizer, 1.0) == {"a": 0.1, "b": 0.4}


def test_adamw_is_the_default_with_our_betas():
    optimizer = build_optimizer([group(decay=0.3)], OptimSettings())
    table = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.AdamW) and len(optimizer.param_groups) == 1
    assert (table["betas"], table["eps"], table["weight_decay"]) == ((0.9, 0.95), 1e-8, 0.3)


def test_vectors_may_be_left_out_of_decay():
    optimizer = build_optimizer([group(decay=0.3)], OptimSettings(decay_vectors=False))
    found = {table["weight_decay"]: [one.ndim for one in table["params"]] for table in optimizer.param_groups}
    assert found == {0.3: [2], 0.0: [1]}
    assert set_rate(optimizer, 1.0) == {"dit": 0.1}


def test_optimizers_by_dotted_path():
    optimizer = build_optimizer([group()], OptimSettings(name="torch.optim.SGD", options={"momentum": 0.5}))
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize(
    ("name", "options", "kind", "words"),
    [
        ("sgd", {}, ConfigError, "dotted path"),
        ("torch.optim.Sgd", {}, ConfigError, "torch.optim has no Sgd"),
        ("torch.nn.Linear", {}, ConfigError, "expected the path of a torch.optim.Optimizer class"),
        ("torch.optim.SGD", {"momenta": 1}, ConfigError, "does not take the options .*momenta"),
        ("no_such_library.Adam", {}, BackendUnavailable, "needs no_such_library"),
    ],
)
def test_optimizers_that_are_none(name, options, kind, words):
    with pytest.raises(kind, match=words):
        build_optimizer([group()], OptimSettings(name=name, options=options))


def test_eight_bit_adam_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BackendUnavailable, match="adamw8bit needs bitsandbytes .*use adamw"):
        build_optimizer([group()], OptimSettings(name="adamw8bit"))


@pytest.mark.parametrize("change", [{"schedule": "step"}, {"warmup": -1}, {"clip": -1.0}, {"ema": 1.0}, {"master": "fp16"}])
def test_settings_out_of_range(change):
    with pytest.raises(ConfigError, match="expected"):
        OptimSettings(**change)


def test_groups_are_clipped_apart():
    groups = [group("a"), group("b")]
    for size, one in zip((3.0, 0.1), groups, strict=True):
        for _, parameter in one.parameters:
            parameter.grad = torch.full_like(parameter, size)
    norms = clip(groups, 1.0)
    assert norms == pytest.approx({"a": 3 * math.sqrt(8), "b": 0.1 * math.sqrt(8)})
    sizes = [math.sqrt(sum(float(p.grad.square().sum()) for _, p in one.parameters)) for one in groups]
    assert sizes == pytest.approx([1.0, 0.1 * math.sqrt(8)], rel=1e-5)
    clip(groups, 0.0)
    assert math.sqrt(sum(float(p.grad.square().sum()) for _, p in groups[0].parameters)) == pytest.approx(1.0, rel=1e-5)


def test_masters_are_float32_unless_kept():
    for master, dtype in (("float32", torch.float32), ("keep", torch.bfloat16)):
        one = group(dtype=torch.bfloat16)
        values = [parameter.detach().clone() for _, parameter in one.parameters]
        to_masters([one], OptimSettings(master=master))
        assert {parameter.dtype for _, parameter in one.parameters} == {dtype}
        for (_, parameter), value in zip(one.parameters, values, strict=True):
            assert torch.equal(parameter.bfloat16(), value)
    wide = group(dtype=torch.float64)
    to_masters([wide], OptimSettings())
    assert wide.parameters[0][1].dtype == torch.float64


def test_the_average_by_hand():
    one = group()
    weight = one.parameters[0][1]
    start = weight.detach().clone()
    average = Average([one], OptimSettings(ema=0.5))
    expected = start.clone()
    for step in range(4):
        with torch.no_grad():
            weight.add_(1.0)
        average.update(step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * weight.detach()
    assert torch.allclose(average.weights["dit.weight"], expected)
    assert not torch.allclose(average.weights["dit.weight"], weight)


def test_the_average_is_float32_and_gives_bf16_weights_back_to_the_bit():
    one = group(dtype=torch.bfloat16)
    weight = one.parameters[0][1]
    average = Average([one], OptimSettings(ema=0.9))
    with torch.no_grad():
        weight.add_(0.125)
    average.update(0)
    own, mean = weight.detach().clone(), average.weights["dit.weight"].clone()
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(weight, mean.bfloat16())
        raise KeyError
    assert mean.dtype == torch.float32 and torch.equal(weight, own) and torch.equal(average.weights["dit.weight"], mean)
