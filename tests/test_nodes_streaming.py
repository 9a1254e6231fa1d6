"""Layers that stay off the device: the hooks, what must not stay behind, and ComfyUI's own patcher over them."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from reasonedit.nodes import streaming
from reasonedit.reasonedit_core.fp8 import Fp8Linear, quantize_linears

ROOT = Path(__file__).resolve().parent.parent


class Hooked(nn.Linear):
    """Stands in for the host's Linear."""

    comfy_cast_weights = False

    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return nn.functional.linear(x, self.weight, self.bias)


class Net(nn.Module):
    """Two Linears, a norm, an embedding with a tied head, and a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("table", torch.ones(3))

    def forward(self, ids):
        return self.head(self.second(self.first(self.norm(self.embed(ids)))))


def test_linears_get_hooks_and_tied_ones_do_not():
    torch.manual_seed(0)
    net, ids = Net(), torch.arange(10)
    before = net(ids)
    assert streaming.make_streamable(net, Hooked) == 2
    assert type(net.first) is Hooked and type(net.head) is nn.Linear
    assert net.first.weight_function == [] and net.first.weight_function is not net.second.weight_function
    assert torch.equal(net(ids), before) and net.first.calls == 1


def test_fp8_linears_compute_the_same_with_their_weights_elsewhere():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 8))
    quantize_linears(net, skip=())
    x = torch.randn(3, 16)
    before = net(x)
    assert type(net[0]) is Fp8Linear
    assert streaming.make_streamable(net, Hooked) == 1
    assert type(net[0]) is streaming.StreamedFp8Linear
    assert torch.equal(net(x), before)
    net[0].comfy_cast_weights = True
    assert torch.equal(net(x), before)
    net[0].to("meta")
    with pytest.raises((NotImplementedError, RuntimeError)):  # without values there is nothing to bring over
        net(x)


def test_only_layers_with_hooks_stay_behind():
    net = Net()
    streaming.make_streamable(net, Hooked)
    resident = 4 * (10 * 8 + 2 * 8 + 3)
    assert streaming.resident_bytes(net) == resident
    net.to("meta")
    settled = []

    def note(name, _fn, recurse=True):
        settled.append((name, recurse))

    for layer in net.modules():
        layer._apply = partial(note, type(layer).__name__)
    streaming.settle(net, torch.device("cpu"))
    assert sorted(settled) == [("Embedding", False), ("LayerNorm", False), ("Linear", False), ("Net", False)]


CODE = """
import sys, types
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch
from reasonedit.nodes import host, memory
from reasonedit.reasonedit_core.fp8 import quantize_linears
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.reasonedit_core.load import SystemSpec, load_system

host.mm.is_device_cpu = lambda device: False  # where a host computes on the CPU, nothing is streamed
system = load_system(SystemSpec("reasonedit-s", tiny_checkpoint("step1x-v1p2", std=0.2), reasoner="own"))
dit = system.generator.denoiser.transformer
if "fp8" in sys.argv0:
    quantize_linears(dit)
torch.manual_seed(0)
args = dict(
    hidden_states=torch.randn(1, 8, 64), timestep=torch.tensor([0.5]),
    encoder_hidden_states=torch.randn(1, 5, dit.config.connector_in_channels),
    txt_ids=torch.zeros(5, 3), img_ids=torch.zeros(8, 3))
with torch.inference_mode():
    before = dit(**args)
    patcher = host.make_patcher("dit", memory.hold("dit", dit), torch.device("cpu"))
    size = patcher.model_size()
    hooked = [m for m in dit.modules() if hasattr(m, "comfy_cast_weights")]
    assert len(hooked) > 20, len(hooked)
    for share in (0.0, 0.3, 0.7, 2.0):
        patcher.partially_load(torch.device("cpu"), share * size)
        cast = sum(m.comfy_cast_weights for m in hooked)
        assert torch.equal(dit(**args), before), share
        loaded = patcher.loaded_size()
        print(share, cast, len(hooked), loaded, size)
        assert (cast == 0) == (share == 2.0)
        assert loaded <= max(share * size, 1.001 * host.streaming.resident_bytes(patcher.model) + 2) or share == 2.0
        patcher.detach()
        assert patcher.loaded_size() == 0 and not any(m.comfy_cast_weights for m in hooked)
    patcher.partially_load(torch.device("cpu"), 0.9 * size)
    before_bytes = patcher.loaded_size()
    freed = patcher.partially_unload(torch.device("cpu"), 0.4 * size)
    assert freed >= 0.4 * size and patcher.loaded_size() == before_bytes - freed
    assert torch.equal(dit(**args), before)
    system_mllm = memory.hold("mllm", system.mllm.model)
    image = torch.rand(1, 3, 56, 56)
    ask = lambda: system.mllm.states(system.mllm.embed([1, 2, 3]), system.mllm.positions([1, 2, 3]))
    said = ask()
    other = host.make_patcher("mllm", system_mllm, torch.device("cpu"))
    other.partially_load(torch.device("cpu"), 0)
    assert any(getattr(m, "comfy_cast_weights", False) for m in system_mllm.modules())
    assert torch.equal(ask(), said)
print("STREAMED")
"""


@pytest.mark.skipif(not os.environ.get("COMFYUI_PATH"), reason="COMFYUI_PATH is not set: ComfyUI's own patcher is not tried")
@pytest.mark.parametrize("weights", ["plain", "fp8"])
def test_comfyuis_patcher_loads_in_part_and_the_result_stays(weights):
    code = f"import sys; sys.argv0 = {weights!r}\n" + CODE
    environment = {**os.environ, "PYTHONPATH": os.environ["COMFYUI_PATH"], "HF_HUB_OFFLINE": "1"}
    environment["REASONEDIT_KERNELS"] = "off"  # Linears of the CPU that are no plain ones are not streamed either
    bootstrap = (
        "import sys, importlib.util as u\n"
        f"spec = u.spec_from_file_location('reasonedit', {str(ROOT / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(ROOT)!r}])\n"
        "module = u.module_from_spec(spec); sys.modules['reasonedit'] = module; spec.loader.exec_module(module)\n"
    )
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    done = subprocess.run(
        [python, "-c", bootstrap + code], env=environment, cwd=os.environ["COMFYUI_PATH"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "STREAMED" in done.stdout, done.stdout + done.stderr
