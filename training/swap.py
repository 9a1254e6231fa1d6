"""Block swap: frozen weights of DiT blocks wait in main memory and are on the device only while their block computes.

The core's movers drop a block's weights after its forward pass, which the backward pass still needs. Here a block is lent
copies of its frozen tensors for each forward: autograd keeps the copies alive until the block has been taken back, and with
activation checkpointing, which runs a block's forward again right before its backward, that is one block at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..reasonedit_core.errors import ConfigError


def swap_blocks(blocks: Sequence[nn.Module], count: int, device: torch.device) -> int:
    """Park the frozen tensors of the last `count` blocks in main memory; trained ones go to `device`. Returns bytes parked.

    A block must be entered through `__call__`, as its hooks do the lending.
    """
    if count > len(blocks):
        raise ConfigError(f"model.swap_blocks: expected at most {len(blocks)}, the number of blocks, found {count}.")
    return sum(_park(block, device) for block in blocks[len(blocks) - count :])


def _park(block: nn.Module, device: torch.device) -> int:
    slots: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter.requires_grad:
                parameter.data = parameter.data.to(device)
                continue
            parameter.data = _home(parameter.data, device)
            slots.append((module._parameters, name, parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _home(buffer, device)
                slots.append((module._buffers, name, module._buffers[name]))
    block.register_forward_pre_hook(partial(_lend, slots, device))
    # always_call: a block that raises (out of memory) gives its copies back as well
    block.register_forward_hook(partial(_take_back, slots), always_call=True)
    return sum(home.numel() * home.element_size() for _, _, home in slots)


def _lend(slots, device: torch.device, _module: nn.Module, _args: object) -> None:
    for table, name, home in slots:
        table[name] = home.detach().to(device, non_blocking=home.is_pinned())


def _take_back(slots, _module: nn.Module, _args: object, _output: object) -> None:
    for table, name, home in slots:
        table[name] = home


def _home(tensor: Tensor, device: torch.device) -> Tensor:
    home = tensor.detach().to("cpu")
    if device.type != "cuda":
        return home
    try:
        return home.pin_memory()
    except RuntimeError:  # the operating system limits locked memory; transfers are then slower, not wrong
        return home
