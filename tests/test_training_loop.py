"""The engine on toy units: numbers, errors, hooks, requests. Resume is in test_training_checkpoint.py."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from dataclasses import replace

import pytest
import torch

from reasonedit.reasonedit_core.errors import ConfigError, DataError
from reasonedit.tests.engine_toys import ToySource, numbers, toy_groups, toy_models, toy_settings, toy_step
from reasonedit.training import rng
from reasonedit.training.checkpoint import complete, stored
from reasonedit.training.distributed import ParallelSettings, open_ranks
from reasonedit.training.log import read_log
from reasonedit.training.loop import Hook, NonFinite, train
from reasonedit.training.optim import OptimSettings
from reasonedit.training.signals import EXIT_STOPPED, Requests
from reasonedit.training.types import FM, NTP, ParamGroup


def weights(models):
    return torch.cat([one.detach().reshape(-1) for unit in models.units().values() for one in unit.parameters()])


def test_weights_move_and_the_loss_falls(tmp_path):
    models = toy_models()
    outcome = train(models, toy_groups(models, 0.02), ToySource(length=2, repeat=True), toy_step, toy_settings(60), tmp_path)
    steps = [line for line in read_log(tmp_path) if line["event"] == "step"]
    assert outcome.finished and outcome.exit_code == 0 and outcome.checkpoint.name == "step-00000060"
    assert [line["step"] for line in steps] == list(range(1, 61))
    for name in (NTP, FM):
        assert sum(line["losses"][name] for line in steps[-10:]) < 0.8 * sum(line["losses"][name] for line in steps[:10])
    saved = dict(stored(outcome.checkpoint, "weights"))
    assert torch.equal(saved["dit.blocks.0.linear.weight"], models.dit.blocks[0].linear.weight)


def test_one_step_is_the_gradient_of_mean_losses_over_the_whole_window(tmp_path):
    """Sums over the window divided by counts over the window, not a mean of the means of micro-steps."""
    source = ToySource(total=4, uneven=True)
    models, oracle = toy_models(dtype=torch.float64), toy_models(dtype=torch.float64)
    settings = toy_settings(1, optim=OptimSettings(name="torch.optim.SGD", clip=0.0))
    train(models, toy_groups(models, 0.5), source, toy_step, settings, tmp_path)
    micros = source.load(0, 0)
    losses = [toy_step(oracle, micro, two_phase=False).sums for micro in micros]
    total = 0.0
    for name, weight in {NTP: 0.1, FM: 1.0}.items():
        count = sum(one.counts.get(name, 0) for one in micros)
        total = total + weight * sum(one[name] for one in losses if name in one) / count
    total.backward()
    with torch.no_grad():
        for unit in oracle.units().values():
            for one in unit.parameters():
                one.sub_(0.5 * (one.grad + 0.01 * one if one.grad is not None else 0.01 * one))
    assert (weights(models) - weights(oracle)).abs().max() < 1e-12
    assert read_log(tmp_path)[1]["loss"] == pytest.approx(total.item(), abs=1e-12)


def test_gradients_are_clipped_group_by_group(tmp_path):
    models, free = toy_models(), toy_models()
    optim = OptimSettings(name="torch.optim.SGD", clip=0.05)
    groups = [replace(group, weight_decay=0.0) for group in toy_groups(models, 1.0)]
    before = {group.name: [one.detach().clone() for _, one in group.parameters] for group in groups}
    train(models, groups, ToySource(), toy_step, toy_settings(1, optim=optim), tmp_path / "a")
    norms = read_log(tmp_path / "a")[1]["grad_norm"]
    train(free, toy_groups(free), ToySource(), toy_step, toy_settings(1), tmp_path / "b")
    assert norms == read_log(tmp_path / "b")[1]["grad_norm"] and set(norms) == {"mllm", "dit"}
    for group in groups:
        moved = [one.detach() - old for (_, one), old in zip(group.parameters, before[group.name], strict=True)]
        size = math.sqrt(sum(float(one.square().sum()) for one in moved))
        assert size == pytest.approx(min(0.05, norms[group.name]), rel=1e-3)
    assert max(norms.values()) > 0.05


def test_a_weight_that_no_document_uses_is_decayed_alike_and_never_lost(tmp_path):
    """`quoted` gets no gradient here; its update is the decay alone, as it is on ranks that had to send a zero."""
    models = toy_models()
    with torch.no_grad():
        models.dit.quoted.fill_(1.0)
    train(models, toy_groups(models, 0.01), ToySource(), toy_step, toy_settings(1), tmp_path)
    assert torch.allclose(models.dit.quoted, torch.full((8,), 1 - 0.005 * 0.01))  # warm-up: half the rate


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_step_and_records_and_saves_nothing(tmp_path, value):
    source = ToySource(poison=(1, 0), venom=value)
    models = toy_models()
    with pytest.raises(NonFinite) as error:
        train(models, toy_groups(models), source, toy_step, toy_settings(8, save_every=2), tmp_path)
    text = str(error.value)
    assert text.startswith("expected finite losses, found ")
    assert " for fm at optimizer step 4 (epoch 1, cursor 0), rank 0, micro-step 0" in text
    assert "toy 1 0 0-c" in text and "step-00000002" in text and "lower the learning rate" in text
    assert [one.name for one in complete(tmp_path / "checkpoints")] == ["step-00000002"]
    assert bool(torch.isfinite(weights(models)).all())
    assert read_log(tmp_path)[-1]["event"] == "error"


def test_a_gradient_that_is_not_finite_is_an_error_too(tmp_path):
    models = toy_models()
    models.dit.out.weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(models)
    with pytest.raises(NonFinite, match=r"norms (nan|inf) in dit at optimizer step 1 .*toy 0 0 0-a"):
        train(models, toy_groups(models), ToySource(), toy_step, toy_settings(2), tmp_path)
    assert torch.equal(weights(models), before) and not complete(tmp_path / "checkpoints")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_record_that_cannot_be_loaded_is_named_with_its_step(tmp_path, workers):
    models = toy_models()
    settings = toy_settings(4, workers=workers)
    with pytest.raises(DataError, match=r"optimizer step 2 \(epoch 0, cursor 1\), rank 0: record 'x' line 3: picture"):
        train(models, toy_groups(models), ToySource(broken=(0, 1)), toy_step, settings, tmp_path)


def test_counts_of_a_loss_without_weight_are_refused(tmp_path):
    models = toy_models()
    with pytest.raises(ConfigError, match="expected losses of ntp, found counts of fm"):
        train(models, toy_groups(models), ToySource(), toy_step, toy_settings(2, weights={NTP: 1.0}), tmp_path)


def test_groups_and_trainable_weights_must_be_the_same_set(tmp_path):
    def attempt(change, words):
        models = toy_models()
        groups = change(models, toy_groups(models))
        with pytest.raises(ConfigError, match=words):
            train(models, groups, ToySource(), toy_step, toy_settings(1), tmp_path)

    attempt(lambda models, groups: groups[:1], "trainable and in no group .*dit.blocks.0")
    attempt(lambda models, groups: [*groups, groups[0]], "mllm.embed.weight stands twice")
    attempt(lambda models, groups: (models.dit.requires_grad_(False), groups)[1], "group dit: dit.quoted is frozen")
    foreign = ParamGroup("x", (("w", torch.nn.Parameter(torch.ones(1))),), 0.1)
    attempt(lambda models, groups: [*groups, foreign], "group x: w is in no unit")
    attempt(lambda models, groups: [], "expected weights to train")


def test_frozen_units_stay_to_the_bit_and_in_eval_mode(tmp_path):
    models = toy_models(dropout=0.5)
    models.mllm.requires_grad_(False)
    before = [one.clone() for one in models.mllm.parameters()]
    seen = []

    def step(models, micro):
        seen.append((models.mllm.training, models.dit.training))
        return toy_step(models, replace(micro, text=micro.text)).__class__(
            {FM: toy_step(models, micro).sums[FM]},
        )

    train(models, toy_groups(models)[1:], ToySource(), step, toy_settings(2), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, models.mllm.parameters(), strict=True))
    assert set(seen) == {(False, True)} and models.mllm.embed.weight.grad is None


def test_hooks_change_nothing(tmp_path):
    """Validation that draws, turns modules to eval and asks for gradients leaves training to the bit as it was."""
    calls = []

    def look(moment):
        calls.append((moment.step, moment.models.dit.training, torch.is_grad_enabled(), float(torch.rand(1))))
        with moment.averaged():
            return {"value": float(moment.models.dit(ToySource().load(0, 0)[0].image, torch.zeros(20, 8)).sum())}

    optim = OptimSettings(ema=0.9)
    plain, hooked = toy_models(dropout=0.3), toy_models(dropout=0.3)
    train(plain, toy_groups(plain), ToySource(), toy_step, toy_settings(6, optim=optim), tmp_path / "a")
    hooks = [Hook("look", look, every=4, at_start=True, at_end=True)]
    train(hooked, toy_groups(hooked), ToySource(), toy_step, toy_settings(6, optim=optim), tmp_path / "b", hooks)
    assert torch.equal(weights(plain), weights(hooked))
    assert numbers(read_log(tmp_path / "a")) == numbers(read_log(tmp_path / "b"))
    assert [call[:3] for call in calls] == [(0, False, False), (4, False, False), (6, False, False)]
    assert hooked.dit.training and hooked.dit.blocks[0].dropout.training
    lines = [line for line in read_log(tmp_path / "b") if line["event"] == "hook"]
    assert [line["step"] for line in lines] == [0, 4, 6] and all("value" in line["figures"] for line in lines)


def test_averages_stand_in_for_the_weights_and_give_them_back(tmp_path):
    optim = OptimSettings(ema=0.999, schedule="constant")
    models, seen = toy_models(), {}

    def look(moment):
        seen["own"] = models.dit.out.weight.detach().clone()
        with moment.averaged():
            seen["average"] = models.dit.out.weight.detach().clone()
        seen["after"] = models.dit.out.weight.detach().clone()

    settings = toy_settings(5, optim=optim)
    outcome = train(models, toy_groups(models), ToySource(), toy_step, settings, tmp_path, [Hook("x", look, at_end=True)])
    assert torch.equal(seen["own"], seen["after"]) and not torch.equal(seen["own"], seen["average"])
    assert torch.equal(seen["average"], dict(stored(outcome.checkpoint, "ema"))["dit.out.weight"])


def test_no_average_for_lora_groups_unless_asked_for(tmp_path):
    models = toy_models()
    groups = [replace(group, name=f"{group.name}_lora" if group.name == "mllm" else group.name) for group in toy_groups(models)]
    outcome = train(models, groups, ToySource(), toy_step, toy_settings(1, optim=OptimSettings(ema=0.9)), tmp_path)
    names = [name for name, _ in stored(outcome.checkpoint, "ema")]
    assert names and all(name.startswith("dit.") for name in names)


@pytest.mark.parametrize(("cause", "stops"), [("SIGTERM", True), ("SIGUSR1", False), ("save_quit", True), ("save", False)])
def test_requests_are_honoured_at_the_next_boundary(tmp_path, cause, stops, caplog):
    """Asked for in the middle of step 3, between two micro-steps."""
    models, done = toy_models(), []

    def step(models, micro):
        done.append(micro)
        if len(done) == 5:
            if cause.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, cause))
            else:
                (tmp_path / cause).touch()
        return toy_step(models, micro)

    before = signal.getsignal(signal.SIGTERM)
    with caplog.at_level(logging.INFO):
        outcome = train(models, toy_groups(models), ToySource(), step, toy_settings(6), tmp_path)
    names = [one.name for one in complete(tmp_path / "checkpoints")]
    assert "step-00000003" in names and not (tmp_path / cause).exists()
    assert (outcome.step, outcome.finished, outcome.exit_code) == ((3, False, EXIT_STOPPED) if stops else (6, True, 0))
    assert len(done) == (6 if stops else 12)
    assert signal.getsignal(signal.SIGTERM) is before
    if stops:
        assert cause in outcome.cause and f"stopped after step 3 of 6 because of {outcome.cause}" in caplog.text
        lines = [line for line in read_log(tmp_path) if line["event"] == "end"]
        assert lines[0]["finished"] is False


def test_a_stop_in_the_last_step_is_told(tmp_path):
    """The stage is done, and whoever trains several must not begin the next."""
    models = toy_models()

    def step(models, micro):
        (tmp_path / "save_quit").touch()
        return toy_step(models, micro)

    outcome = train(models, toy_groups(models), ToySource(), step, toy_settings(1), tmp_path)
    assert (outcome.finished, outcome.exit_code) == (True, EXIT_STOPPED) and "save_quit" in outcome.cause


def test_request_files_of_an_earlier_run_are_not_honoured(tmp_path):
    (tmp_path / "save_quit").touch()
    models = toy_models()
    assert train(models, toy_groups(models), ToySource(), toy_step, toy_settings(2), tmp_path).finished


def test_a_signal_that_comes_while_saving_is_not_lost(tmp_path):
    requests = Requests(tmp_path)
    with requests.listening():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.look().stop is False
        os.kill(os.getpid(), signal.SIGTERM)
        requests.done()
        assert requests.look().cause == "SIGTERM" and requests.look() is None


def test_bf16_computes_in_bf16_and_keeps_float32_masters(tmp_path):
    models = toy_models(dtype=torch.bfloat16)
    kinds = set()

    def step(models, micro):
        losses = toy_step(models, micro)
        kinds.add(models.dit.blocks[0].linear(torch.zeros(1, 8)).dtype)
        return losses

    settings = toy_settings(3, parallel=ParallelSettings(precision="bfloat16"))
    outcome = train(models, toy_groups(models, 1e-5), ToySource(), step, settings, tmp_path)
    assert kinds == {torch.bfloat16}
    assert {tensor.dtype for _, tensor in stored(outcome.checkpoint, "weights")} == {torch.float32}
    assert {one.dtype for one in models.dit.parameters()} == {torch.float32}
    # changes of 1e-5 are far below what bf16 resolves near 0.3, and are there
    start = toy_models(dtype=torch.bfloat16).dit.out.weight.float()
    moved = (models.dit.out.weight - start).abs()
    assert 0 < moved.max() < 1e-4


def test_a_bf16_run_may_follow_one_in_float32_and_the_other_way(tmp_path):
    for number, precision in enumerate(("float32", "bfloat16", "float32")):
        models = toy_models()
        settings = toy_settings(1, parallel=ParallelSettings(precision=precision))
        train(models, toy_groups(models), ToySource(), toy_step, settings, tmp_path / str(number))
    assert numbers(read_log(tmp_path / "0")) == numbers(read_log(tmp_path / "2")) != numbers(read_log(tmp_path / "1"))


def scaling(monkeypatch, **options):
    """Give the engine the loss scaling that float16 has on CUDA."""
    from reasonedit.training import loop

    def opened(settings):
        ranks = open_ranks(settings)
        ranks.scaler = torch.amp.GradScaler("cpu", **options)
        return ranks

    monkeypatch.setattr(loop, "open_ranks", opened)


def test_loss_scaling_changes_no_number_and_is_resumed(tmp_path, monkeypatch):
    plain, scaled = toy_models(), toy_models()
    train(plain, toy_groups(plain), ToySource(), toy_step, toy_settings(6), tmp_path / "a")
    scaling(monkeypatch, init_scale=2.0**10, growth_interval=2)
    train(scaled, toy_groups(scaled), ToySource(), toy_step, toy_settings(6, save_every=3, keep=9), tmp_path / "b")
    assert numbers(read_log(tmp_path / "a")) == numbers(read_log(tmp_path / "b"))
    assert torch.equal(weights(plain), weights(scaled))

    def scale(step):
        state = json.loads((tmp_path / f"b/checkpoints/step-{step:08d}/state.json").read_text())
        return state["extra"]["scaler"]["scale"]

    assert (scale(3), scale(6)) == (2.0**11, 2.0**13)
    train(scaled, toy_groups(scaled), ToySource(), toy_step, toy_settings(6, save_every=3, keep=9, resume=3), tmp_path / "b")
    assert scale(6) == 2.0**13


def test_a_step_whose_scaled_gradients_overflow_is_skipped(tmp_path, monkeypatch):
    models, calls = toy_models(), []

    def overflow(gradient):
        calls.append(1)
        return gradient * math.inf if len(calls) == 1 else gradient

    models.dit.out.weight.register_hook(overflow)
    before = weights(models)
    scaling(monkeypatch, init_scale=2.0**10)
    train(models, toy_groups(models), ToySource(), toy_step, toy_settings(1), tmp_path / "a")
    assert torch.equal(weights(models), before)
    train(models, toy_groups(models), ToySource(), toy_step, toy_settings(1), tmp_path / "b")
    assert not torch.equal(weights(models), before)


def test_isolated_generators_come_back_after_an_error():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(KeyError), rng.isolated():
        torch.rand(5)
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_settings_say_what_is_wrong():
    for change in ({"steps": 0}, {"workers": -1}, {"keep": 0}):
        with pytest.raises(ConfigError, match=f"expected {next(iter(change))} >= "):
            toy_settings(**change)
