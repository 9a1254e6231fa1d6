"""Which kernel computes a call: what was asked for, what a card can, and what its test of the kernel said."""

from __future__ import annotations

import logging

import pytest
import torch

from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError
from reasonedit.reasonedit_core.kernels import devices, interval, ops, trial


def test_a_kernel_that_fails_its_test_is_not_used_and_says_so_once(monkeypatch, caplog):
    runs = []
    monkeypatch.setattr(devices, "_PASSED", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(trial, "run", lambda *call: runs.append(call) or "its test failed: q is off by 3.0e-01")
    monkeypatch.setattr(devices, "_missing", lambda backend, card: None)
    device = torch.device("cuda", 0)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            assert interval.available(device) == "its test failed: q is off by 3.0e-01"
            assert ops.pick("guided_step", "auto", device) == "reference"
    assert [(op, backend) for op, backend, _ in runs] == [
        ("interval", "triton"),
        ("guided_step", "triton"),
        ("guided_step", "nvrtc"),
    ]
    assert sum("kernel interval (triton) on cuda:0: its test failed" in line for line in caplog.messages) == 1
    with pytest.raises(BackendUnavailable, match="'nvrtc' cannot run this guided_step: its test failed"):
        ops.pick("guided_step", "nvrtc", device)


def test_triton_comes_before_nvrtc_and_that_before_plain_torch(monkeypatch):
    device = torch.device("cuda", 0)
    able = {"triton", "nvrtc"}
    monkeypatch.setattr(ops, "unable", lambda op, name, device: None if name in able else "no")
    for wanted in ("triton", "nvrtc", "reference"):
        assert ops.pick("guided_step", "auto", device) == wanted
        able.discard(wanted)
    assert ops.pick("guided_step", "auto", torch.device("cpu")) == "reference"


def test_a_test_waits_until_no_graph_is_captured(monkeypatch):
    capturing = [True]
    monkeypatch.setattr(devices, "_PASSED", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(trial, "run", lambda *call: None)
    assert "not tested yet" in devices.passed("guided_step", "triton", torch.device("cuda", 0))
    capturing[0] = False
    assert devices.passed("guided_step", "triton", torch.device("cuda", 0)) is None


@pytest.mark.parametrize(
    "value,wanted",
    [("off", "reference"), ("nvrtc", "nvrtc"), ("triton", "triton"), ("auto", "triton"), ("", "triton")],
)
def test_the_environment_narrows_the_choice(monkeypatch, value, wanted):
    monkeypatch.setenv("REASONEDIT_KERNELS", value)
    monkeypatch.setattr(devices, "_missing", lambda backend, card: None)
    monkeypatch.setattr(devices, "passed", lambda *call: None)
    assert [ops.pick("guided_step", "auto", torch.device(kind)) for kind in ("cuda:0", "meta")] == [wanted] * 2
    if value == "off":
        with pytest.raises(BackendUnavailable, match="REASONEDIT_KERNELS=off"):
            ops.pick("guided_step", "triton", torch.device("cuda:0"))


def test_an_unknown_value_of_the_environment_is_refused(monkeypatch):
    monkeypatch.setenv("REASONEDIT_KERNELS", "fast")
    with pytest.raises(ConfigError, match="'fast'; expected one of auto, off, triton, nvrtc"):
        devices.refusal("triton", torch.device("cuda"))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ConfigError, match="'cutlass' is not known.*'triton', 'nvrtc', 'reference'"):
        ops.pick("guided_step", "cutlass", torch.device("cpu"))


@pytest.mark.parametrize(
    "capability,backend,words",
    [
        ((7, 5), "triton", "compute capability 8.0 or newer, found 7.5"),
        ((7, 0), "nvrtc", "compute capability 7.5 or newer, found 7.0"),
        ((8, 0), "triton", "Triton is not installed"),
    ],
)
def test_what_a_card_or_machine_lacks_is_told(monkeypatch, capability, backend, words):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda card: capability)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    devices._lacking.cache_clear()
    try:
        assert words in devices.refusal(backend, torch.device("cuda", 0))
    finally:
        devices._lacking.cache_clear()


def test_compile_looks_at_a_card_once_and_not_into_the_looking(monkeypatch):
    """The choice is a constant of what is compiled, whatever it took to find out."""
    monkeypatch.setattr(devices, "_PASSED", {})
    monkeypatch.setattr(devices, "_lacking", lambda backend, card: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(trial, "run", lambda *call: None if call[1] == "nvrtc" else "its test failed")
    device = torch.device("cuda", 0)

    def chosen(x):
        return x + (1 if ops.pick("guided_step", "auto", device) == "nvrtc" else 0)

    assert torch.compile(chosen, backend="eager", fullgraph=True)(torch.zeros(2)).tolist() == [1, 1]
