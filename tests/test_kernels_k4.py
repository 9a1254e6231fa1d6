"""K4, `guided_step`: the plain form against the Euler loop and its guidance rules, Triton interpreted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core import flow
from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError
from reasonedit.reasonedit_core.kernels import guided_step
from reasonedit.tests import interpreter
from reasonedit.tests import kernel_cases as cases


def make(batch=1, tokens=6, channels=8, dtype=torch.float32, seed=0):
    """latents, cond, uncond; the differences of tokens are shorter and longer than 1."""
    draw = cases.Draw(dtype, seed)
    latents, cond, other = (draw(batch, tokens, channels) for _ in range(3))
    return latents, cond, cond + other * torch.linspace(0.05, 3, tokens)[:, None].to(dtype)


def test_triton_equals_the_plain_form_in_float64():
    interpreter.run("k4 or guided_step")


@pytest.mark.slow
def test_triton_equals_the_plain_form_in_every_case():
    interpreter.run("k4", slow=True)


COMBINES = {
    "step1x": (flow.Step1XGuidance(), dict(rule="step1x")),
    "step1x-power": (flow.Step1XGuidance(power=0.7), dict(rule="step1x", power=0.7)),
    "step1x-truncated": (flow.Step1XGuidance(truncate=0.5), dict(rule="step1x", truncate=0.5)),
    "step1x-never": (flow.step1x_guidance("v1.0"), dict(rule="step1x", truncate=1.0)),
    "plain": (flow.step1x_guidance("v1.0"), dict(rule="plain")),
    "qwen": (flow.combine_qwen, dict(rule="qwen")),
}


@pytest.mark.parametrize("name", COMBINES)
def test_a_run_of_steps_equals_the_euler_loop(name):
    combine, options = COMBINES[name]
    latents, cond, uncond = make()
    sigmas = flow.sigmas(5, 64, flow.STEP1X)
    scale = 4.0

    def velocity(x, sigma):
        return combine(cond * x.mean(), uncond, scale, sigma)

    wanted = flow.euler(velocity, latents, sigmas)
    for i in range(5):
        call = dict(uncond=uncond, scale=scale, velocity=True, **options)
        mean = latents.mean()
        latents, found = guided_step(latents, cond * mean, sigmas[i], sigmas[i + 1], **call)
        torch.testing.assert_close(found, combine(cond * mean, uncond, scale, sigmas[i]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(latents, wanted, rtol=1e-5, atol=1e-5)


def test_without_a_second_prediction_it_is_an_euler_step():
    latents, cond, _ = make()
    sigmas = torch.tensor([0.9, 0.4])
    wanted = flow.euler(lambda x, sigma: cond, latents, sigmas)
    found, velocity = guided_step(latents, cond, *sigmas, velocity=True)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(velocity, cond)
    assert torch.equal(guided_step(latents, cond, *sigmas), found)


@settings(max_examples=25, derandomize=True, deadline=None)
@given(rule=st.sampled_from(["plain", "step1x", "qwen"]), scale=st.floats(0, 8), seed=st.integers(0, 99))
def test_equal_predictions_are_not_changed_by_guidance(rule, scale, seed):
    latents, cond, _ = make(seed=seed)
    sigmas = torch.tensor([0.9, 0.4])
    found = guided_step(latents, cond, *sigmas, uncond=cond.clone(), scale=scale, rule=rule)
    torch.testing.assert_close(found, guided_step(latents, cond, *sigmas), rtol=1e-5, atol=1e-5)


def test_answers_have_the_dtype_of_the_prediction():
    latents, cond, uncond = make(dtype=torch.bfloat16)
    found = guided_step(latents.float(), cond, torch.tensor(0.9), torch.tensor(0.4), uncond=uncond, rule="qwen", velocity=True)
    assert [x.dtype for x in found] == [torch.bfloat16] * 2


def test_nothing_is_learned_through_it():
    latents, cond, uncond = make()
    sigma = torch.tensor(0.5)
    for number in range(3):
        tensors = [latents, cond, uncond]
        tensors[number] = tensors[number].detach().clone().requires_grad_()
        with pytest.raises(ConfigError, match="computes no gradients"):
            guided_step(tensors[0], tensors[1], sigma, sigma, uncond=tensors[2])
    with pytest.raises(ConfigError, match="computes no gradients"):
        guided_step(latents, cond, sigma.clone().requires_grad_(), sigma)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda x, c, u: ((x, c, c.mean(), c.mean()), dict(uncond=u, rule="cfg")), "'cfg' is not known.*'step1x'"),
        (lambda x, c, u: ((x[:, :2], c, c.mean(), c.mean()), {}), r"one shape \(B, N, C\).*\(1, 2, 8\)"),
        (lambda x, c, u: ((x, c, torch.ones(1), torch.tensor(0.5)), {}), "tensors of one number"),
        (lambda x, c, u: ((x, c, torch.tensor(1), torch.tensor(0.5)), {}), "tensors of one number"),
    ],
)
def test_calls_without_meaning_are_refused(change, words):
    args, options = change(*make())
    with pytest.raises(ConfigError, match=words):
        guided_step(*args, **options)


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda x, c, u, s: (x.double(), c, u, s), "got torch.float64"),
        (lambda x, c, u, s: (x, c, u.half(), s), "one dtype"),
        (lambda x, c, u, s: (x, c, u, s.double()), "sigmas in float32"),
        (lambda *t: (*(z.repeat(1, 1, 129) for z in t[:3]), t[3]), "up to 1024 channels, got 1032"),
    ],
)
def test_what_a_kernel_cannot_take_is_told_and_the_plain_form_takes_it(change, words):
    latents, cond, uncond, sigma = change(*make(), torch.tensor(0.5))
    with pytest.raises(BackendUnavailable, match=words):
        guided_step(latents, cond, sigma, sigma, uncond=uncond, backend="triton")
    assert guided_step(latents, cond, sigma, sigma, uncond=uncond).shape == cond.shape


def test_operators_satisfy_torch():
    latents, cond, uncond = make()
    sigmas = torch.tensor([0.9, 0.4])
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for second in (uncond, None):
        call = (latents, cond, second, sigmas[0], sigmas[1], 4.0, "step1x", 0.4, 0.5, "reference")
        torch.library.opcheck(torch.ops.reasonedit.guided_step.default, call, test_utils=tests)
        torch.library.opcheck(torch.ops.reasonedit.guided_step_velocity.default, call, test_utils=tests)


def test_compile_sees_one_node_and_no_value_is_asked_for():
    """A value of sigma that Python looks at would break the graph."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    latents, cond, uncond = (x.to("meta") for x in make())
    sigmas = torch.zeros(2, device="meta")

    def step():
        return guided_step(latents, cond, sigmas[0], sigmas[1], uncond=uncond, rule="step1x", truncate=0.93)

    assert torch.compile(step, backend=backend, fullgraph=True)().shape == cond.shape
    calls = [str(node.target) for node in graphs[0].graph.nodes if "reasonedit" in str(node.target)]
    assert len(graphs) == 1 and calls == ["reasonedit.guided_step.default"]
