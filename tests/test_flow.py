"""The schedule against diffusers' scheduler, bit for bit; the Euler loop; the guidance rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core import flow
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError, Interrupted, ReasonEditError
from reasonedit.reasonedit_core.types import Conditioning

CONFIGS = {
    "step1x": {"use_dynamic_shifting": True, "shift": 3.0},
    "qwen": {
        "use_dynamic_shifting": True,
        "shift": 1.0,
        "max_shift": 0.9,
        "max_image_seq_len": 8192,
        "shift_terminal": 0.02,
    },
    "lightning": {
        "use_dynamic_shifting": True,
        "shift": 1.0,
        "base_shift": math.log(3),
        "max_shift": math.log(3),
        "max_image_seq_len": 8192,
    },
    "fixed": {"use_dynamic_shifting": False, "shift": 3.0},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
}
NAMED = {"step1x": flow.STEP1X, "qwen": flow.QWEN, "lightning": flow.LIGHTNING}


def reference(config: dict, steps: int, tokens: int):
    """diffusers' scheduler, driven as the released pipelines drive it."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    c = scheduler.config
    m = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
    mu = tokens * m + (c.base_shift - m * c.base_image_seq_len)
    with np.errstate(invalid="ignore"):  # the 0/0 of one step under shift_terminal
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    return scheduler, mu


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8, 28, 50])
@pytest.mark.parametrize("tokens", [24, 256, 4080, 4096, 6144])
@pytest.mark.parametrize("name", CONFIGS)
def test_sigmas_equal_diffusers_bit_for_bit(name, tokens, steps):
    schedule = flow.FlowSchedule.from_config(CONFIGS[name])
    scheduler, mu = reference(CONFIGS[name], steps, tokens)
    found = flow.sigmas(steps, tokens, schedule)
    assert flow.shift_of(tokens, schedule) == mu
    if name == "qwen" and steps == 1:
        # 0/0 in the stretch of the official scheduler.
        assert scheduler.sigmas.isnan().any() and found.tolist() == [1.0, 0.0]
    else:
        assert torch.equal(found, scheduler.sigmas)


def test_named_schedules_are_those_of_the_configs():
    for name, schedule in NAMED.items():
        read = flow.FlowSchedule.from_config(CONFIGS[name])
        assert torch.equal(flow.sigmas(28, 4096, schedule), flow.sigmas(28, 4096, read))


def test_known_values():
    assert flow.shift_of(4096, flow.STEP1X) == pytest.approx(1.15)
    assert flow.shift_of(4096, flow.QWEN) == pytest.approx(0.6935, abs=1e-4)
    eight = [1, 0.916, 0.820, 0.709, 0.580, 0.427, 0.244, 0.02, 0]
    assert flow.sigmas(8, 4096, flow.QWEN).tolist() == pytest.approx(eight, abs=1e-3)
    assert flow.sigmas(4, 4096, flow.LIGHTNING).tolist() == pytest.approx([1, 0.9, 0.75, 0.5, 0], abs=1e-6)


@settings(max_examples=60, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 20000), st.sampled_from(sorted(NAMED)))
def test_sigmas_fall_from_one_to_zero(steps, tokens, name):
    values = flow.sigmas(steps, tokens, NAMED[name])
    assert len(values) == steps + 1 and values[0] == 1 and values[-1] == 0
    assert (values.diff() < 0).all()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({"use_karras_sigmas": True}, "use_karras_sigmas"),
        ({"time_shift_type": "cosine"}, "cosine"),
    ],
)
def test_other_schedulers_are_refused_by_name(config, words):
    with pytest.raises(CheckpointError, match=f"cfg.json.*{words}"):
        flow.FlowSchedule.from_config(config, "cfg.json")


def test_zero_steps_are_refused():
    with pytest.raises(ConfigError, match="at least 1"):
        flow.sigmas(0, 16, flow.STEP1X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_euler_equals_the_scheduler_step(dtype):
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(1, 24, 64, generator=rng).to(dtype)
    velocities = [torch.randn(1, 24, 64, generator=rng).to(dtype) for _ in range(5)]
    scheduler, _ = reference(CONFIGS["step1x"], 5, 24)
    scheduler.set_begin_index(0)
    expected = start
    for t, v in zip(scheduler.timesteps, velocities, strict=True):
        expected = scheduler.step(v, t, expected, return_dict=False)[0]

    left, seen = list(velocities), []
    found = flow.euler(
        lambda x, sigma: left.pop(0),
        start,
        flow.sigmas(5, 24, flow.STEP1X),
        on_step=lambda i, n, x: seen.append((i, n, x.shape)),
    )
    assert found.dtype == dtype and torch.equal(found, expected)
    assert seen == [(i, 5, start.shape) for i in range(1, 6)]


def test_euler_stops_before_a_step():
    steps = []
    with pytest.raises(Interrupted, match="step 3 of 5"):
        flow.euler(
            lambda x, sigma: steps.append(float(sigma)) or torch.zeros_like(x),
            torch.zeros(1, 4, 64),
            flow.sigmas(5, 4, flow.STEP1X),
            should_stop=lambda: len(steps) == 2,
        )
    assert len(steps) == 2


@pytest.mark.parametrize("bad_step", [1, 4])
def test_nan_is_named_after_the_first_and_the_last_step(bad_step):
    count = 0

    def velocity(x, sigma):
        nonlocal count
        count += 1
        return torch.full_like(x, math.nan if count == bad_step else 0.0)

    with pytest.raises(ReasonEditError, match=rf"step {bad_step} of 4, 256 of 256.*float16 overflow"):
        flow.euler(velocity, torch.zeros(1, 4, 64), flow.sigmas(4, 4, flow.STEP1X))
    assert count == bad_step


def released_rule(cond, uncond, scale, power):
    """The rule of the release in its own order of operations, written out token by token."""
    out = torch.empty_like(cond)
    for i in range(cond.shape[1]):
        diff = cond[:, i] - uncond[:, i]
        length = torch.linalg.vector_norm(diff)
        damped = length**power if length > 1 else torch.ones(())
        out[:, i] = uncond[:, i] + scale * diff / damped
    return out


def test_norm_rule():
    rng = torch.Generator().manual_seed(1)
    cond, uncond = torch.randn(1, 40, 64, generator=rng), torch.randn(1, 40, 64, generator=rng)
    uncond[:, ::2] = cond[:, ::2] + 0.01 * uncond[:, ::2]  # differences shorter than 1 stay as they are
    found = flow.combine_step1x(cond, uncond, 6.0)
    assert torch.allclose(found, released_rule(cond, uncond, 6.0, 0.4), atol=1e-5)
    plain = flow.combine_step1x(cond, uncond, 6.0, on=False)
    assert torch.equal(plain, uncond + 6.0 * (cond - uncond))
    assert torch.equal(found[:, ::2], plain[:, ::2]) and not torch.allclose(found[:, 1::2], plain[:, 1::2], atol=0.1)


def test_truncate_counts_in_sigmas():
    cond, uncond = torch.full((1, 2, 64), 3.0), torch.zeros(1, 2, 64)
    on, off = flow.combine_step1x(cond, uncond, 6.0), flow.combine_step1x(cond, uncond, 6.0, on=False)
    at = {0.0: (on, on, on), 0.93: (on, off, off), 1.0: (off, off, off)}
    for truncate, expected in at.items():
        rule = flow.Step1XGuidance(truncate=truncate)
        for sigma, value in zip((1.0, 0.93, 0.01), expected, strict=True):
            assert torch.equal(rule(cond, uncond, 6.0, torch.tensor(sigma)), value)


def test_qwen_rule_keeps_the_length_of_the_conditional():
    rng = torch.Generator().manual_seed(2)
    cond, uncond = torch.randn(1, 9, 64, generator=rng), torch.randn(1, 9, 64, generator=rng)
    found = flow.combine_qwen(cond, uncond, 4.0)
    assert torch.allclose(found.norm(dim=-1), cond.norm(dim=-1), rtol=1e-5)
    combined = uncond + 4.0 * (cond - uncond)
    assert torch.allclose(torch.cosine_similarity(found, combined, dim=-1), torch.ones(1, 9))
    assert torch.equal(flow.combine_qwen(cond, cond, 4.0), cond)


def test_guided_velocity_forms_agree():
    cond, uncond = Conditioning(torch.full((1, 1, 1), 2.0)), Conditioning(torch.full((1, 1, 1), 5.0))
    joined = Conditioning(torch.cat([cond.tokens, uncond.tokens]))
    calls = []

    def predict(x, t, conditioning):
        calls.append(x.shape[0])
        return x * conditioning.tokens + t[:, None, None]

    x, sigma = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(3)), torch.tensor(0.5)
    make = dict(scale=3.0, combine=flow.Step1XGuidance())
    one = flow.guided_velocity(predict, cond, None, **make)(x, sigma)
    two = flow.guided_velocity(predict, cond, uncond, **make)(x, sigma)
    both = flow.guided_velocity(predict, cond, uncond, joined=joined, **make)(x, sigma)
    assert torch.equal(one, 2 * x + 0.5) and torch.equal(two, both) and calls == [1, 1, 1, 2]
    assert torch.equal(two, flow.combine_step1x(2 * x + 0.5, 5 * x + 0.5, 3.0))
