"""Offloading on the CPU: a counting transfer stands in for the copy to the device, and parked weights are poisoned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.interfaces import Query
from reasonedit.reasonedit_core.offload import MODES, MovedSpeaker, OneAtATime, Parked, find_blocks, make_mover


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(x)) * self.scale


class Net(nn.Module):
    """Blocks in a list, and tensors outside of it: a leaf, an own parameter, an own buffer, a tied weight."""

    _repeated_blocks = ("Block",)

    def __init__(self, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.out = nn.Linear(width, width)
        self.out.weight = self.embed.weight
        self.bias = nn.Parameter(torch.randn(width))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x) + self.bias


class Device:
    """A transfer that remembers true values and poisons what stays at home, so that a weight used while parked shows."""

    def __init__(self, *modules: nn.Module) -> None:
        self.true: dict[int, torch.Tensor] = {}
        self.live: list[torch.Tensor] = []
        self.transfers = 0
        self.fail_after: int | None = None
        for parameter in {p for module in modules for p in module.parameters()}:
            self.true[parameter.data_ptr()] = parameter.data.clone()
            parameter.data.fill_(float("nan"))

    def __call__(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        if self.fail_after is not None and self.transfers >= self.fail_after:
            raise torch.OutOfMemoryError("no room")
        self.transfers += 1
        return self.true.get(tensor.data_ptr(), tensor).clone()


def on_device(module: nn.Module) -> bool:
    return not any(p.isnan().any() for p in module.parameters())


def parked(module: nn.Module) -> bool:
    return all(p.isnan().all() for p in module.parameters())


@pytest.fixture
def nets() -> dict[str, Net]:
    torch.manual_seed(0)
    return {name: Net(depth=depth).eval() for name, depth in (("mllm", 2), ("dit", 4), ("vae", 3))}


def expected(nets: dict[str, Net], x: torch.Tensor) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: net(x) for name, net in nets.items()}


@pytest.mark.parametrize("mode", ["component", "block"])
def test_offloaded_results_are_equal_bit_for_bit_and_only_one_component_is_resident(nets, mode):
    x = torch.randn(2, 8)
    want = expected(nets, x)
    device = Device(*nets.values())
    mover = make_mover(mode, nets, "cpu", transfer=device)
    assert all(parked(net) for net in nets.values())
    for name in ("mllm", "dit", "dit", "vae", "mllm"):
        with mover(name), torch.no_grad():
            assert mover.resident == name
            others = [net for other, net in nets.items() if other != name]
            assert all(parked(net) for net in others), "two components on the device at once"
            assert torch.equal(nets[name](x), want[name])
    mover.release()
    assert mover.resident is None and all(parked(net) for net in nets.values()), "weights left on the device"


def test_none_leaves_everything_in_place_and_refuses_unknown_components(nets):
    mover = make_mover("none", nets, "cpu")
    with mover("dit"):
        assert nets["dit"](torch.zeros(1, 8)).isfinite().all()
    for mode in MODES:
        with pytest.raises(ConfigError, match="mllm, dit, vae.*'unet'"), make_mover(mode, nets, "cpu")("unet"):
            pass


def test_two_uses_in_a_row_pay_for_one_transfer(nets):
    device = Device(*nets.values())
    mover = make_mover("component", nets, "cpu", transfer=device)
    with mover("dit"):
        pass
    first = device.transfers
    with mover("dit"):
        pass
    assert device.transfers == first > 0
    with mover("vae"):
        pass
    with mover("dit"):
        pass
    assert device.transfers > 2 * first


def test_block_mode_streams_one_block_at_a_time_and_keeps_the_rest(nets):
    x = torch.randn(2, 8)
    want = expected(nets, x)
    device = Device(*nets.values())
    mover = make_mover("block", nets, "cpu", transfer=device)
    dit, seen = nets["dit"], []

    def look(_module, _args):
        seen.append([on_device(block) for block in dit.blocks])

    for block in dit.blocks:
        block.register_forward_pre_hook(look)
    with mover("dit"), torch.no_grad():
        assert on_device(dit.embed) and not dit.bias.isnan().any(), "the rest of the DiT is resident"
        assert all(parked(block) for block in dit.blocks)
        assert torch.equal(dit(x), want["dit"])
        assert all(parked(block) for block in dit.blocks)
    assert seen == [[i == j for j in range(4)] for i in range(4)]
    with mover("vae"):
        assert on_device(nets["vae"]), "only the DiT is streamed while the others fit"


def test_a_component_that_does_not_fit_the_device_is_streamed_too(nets):
    size = sum(p.numel() * 4 for p in nets["mllm"].parameters())
    x = torch.randn(1, 8)
    want = expected(nets, x)
    mover = make_mover("block", nets, "cpu", memory=size, transfer=Device(*nets.values()))
    with mover("mllm"), torch.no_grad():
        assert parked(nets["mllm"].blocks[0])
        assert torch.equal(nets["mllm"](x), want["mllm"])


@pytest.mark.parametrize("mode", ["component", "block"])
def test_an_error_inside_leaves_a_state_that_works_on(nets, mode):
    x = torch.randn(1, 8)
    want = expected(nets, x)
    mover = make_mover(mode, nets, "cpu", transfer=Device(*nets.values()))
    with pytest.raises(RuntimeError), mover("dit"):
        nets["dit"](torch.randn(1, 5))
    assert mode == "component" or all(parked(block) for block in nets["dit"].blocks)
    with mover("vae"), torch.no_grad():
        assert parked(nets["dit"]) and torch.equal(nets["vae"](x), want["vae"])
    with mover("dit"), torch.no_grad():
        assert torch.equal(nets["dit"](x), want["dit"])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_the_device(error):
    torch.manual_seed(0)
    net = Net()
    mover = make_mover("block", {"dit": net}, "cpu", transfer=Device(net))

    def fail(*_):
        raise error

    net.blocks[1].linear.register_forward_hook(fail)
    with pytest.raises(error), mover("dit"):
        try:
            net(torch.randn(1, 8))
        except RuntimeError:
            assert all(parked(block) for block in net.blocks), "not only when the context closes"
            raise
    assert all(parked(block) for block in net.blocks)


@pytest.mark.parametrize("after", [0, 2, 5])
def test_running_out_of_memory_while_moving_leaves_nothing_on_the_device(nets, after):
    device = Device(*nets.values())
    mover = make_mover("component", nets, "cpu", transfer=device)
    device.fail_after = after
    with pytest.raises(torch.OutOfMemoryError), mover("dit"):
        pass
    assert mover.resident is None and all(parked(net) for net in nets.values())
    device.fail_after = None
    with mover("dit"):
        assert on_device(nets["dit"])


def test_nested_contexts_give_the_outer_component_back(nets):
    mover = make_mover("component", nets, "cpu", transfer=Device(*nets.values()))
    with mover("dit"):
        with mover("vae"):
            assert mover.resident == "vae" and parked(nets["dit"])
        assert mover.resident == "dit" and on_device(nets["dit"])


def test_homes_are_the_very_tensors_and_buffers_written_on_the_device_come_back(nets):
    net = nets["dit"]
    homes = {name: p.data_ptr() for name, p in net.named_parameters()}
    mover = make_mover("component", nets, "cpu", transfer=lambda t, _d: t.clone())
    with mover("dit"):
        assert {name: p.data_ptr() for name, p in net.named_parameters()} != homes
        net(torch.zeros(1, 8))
    mover.release()
    assert {name: p.data_ptr() for name, p in net.named_parameters()} == homes, "weights were copied back, not dropped"
    assert net.calls == 1


def test_tied_weights_stay_tied_and_are_moved_once(nets):
    device = Device(nets["dit"])
    part = Parked([nets["dit"]], device)
    part.fetch(torch.device("cpu"))
    assert nets["dit"].out.weight is nets["dit"].embed.weight
    tensors = len(list(nets["dit"].parameters())) + len(list(nets["dit"].buffers()))
    assert device.transfers == tensors
    assert part.nbytes == sum(p.numel() * 4 for p in nets["dit"].parameters())


def test_blocks_are_those_of_the_classes_that_the_network_names(nets):
    net = nets["dit"]
    assert find_blocks(net) == list(net.blocks)
    net._repeated_blocks, net._no_split_modules = None, ["Linear"]
    assert len(find_blocks(net)) == 2 + len(net.blocks)
    with pytest.raises(ConfigError, match="--offload block: expected a network that names its blocks.*Linear"):
        find_blocks(nn.Linear(2, 2))


def test_unknown_mode_is_refused(nets):
    with pytest.raises(ConfigError, match="--offload.*none, component, block.*'disk'"):
        make_mover("disk", nets, "cpu")


def test_moved_speaker_answers_with_the_mllm_on_the_device(nets):
    mover = make_mover("component", nets, "cpu", transfer=Device(*nets.values()))

    class Speaker:
        def answer(self, queries, *, on_text=None, should_stop=None):
            return [f"{query.task} {mover.resident}" for query in queries]

    query = Query("think", "", ("x",), ())
    assert mover.resident is None
    assert MovedSpeaker(Speaker(), mover).answer([query]) == ["think mllm"]


def test_streamed_blocks_are_outside_the_component_and_nothing_is_held_twice(nets):
    net = nets["dit"]
    mover = OneAtATime({"dit": net}, torch.device("cpu"), streamed={"dit": find_blocks(net)}, transfer=Device(net))
    with mover("dit"):
        inside = [name for name, p in net.named_parameters() if not p.isnan().any()]
    assert sorted(inside) == ["bias", "embed.bias", "embed.weight", "out.bias"]
