"""The state of any optimizer as named tensors and JSON values, and back, without pickle and independent of ranks.

An optimizer keeps, per parameter, tensors (AdamW: exp_avg, exp_avg_sq, step) and plain values. Tensors are called
`<parameter>::<key>`. Set directly and not through `load_state_dict`, which casts state to the dtype of its parameter.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..reasonedit_core.errors import CheckpointError, ConfigError

PLAIN = (int, float, str, bool, type(None))
GIVEN = frozenset(("params", "lr", "weight_decay", "name", "base_lr", "betas", "eps"))
"""Entries of param_groups that come from the settings, not from a checkpoint, so that a change that was allowed has effect."""


def check_savable(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ConfigError if the optimizer keeps state that a checkpoint cannot hold. To be called after its first step, as it
    has none before, and long before a save would fail."""
    for name, key, value in _entries(optimizer, parameters):
        cut_apart = isinstance(value, Tensor) and not _cut(value) and _cut(parameters[name]) and value.ndim > 0
        if cut_apart or not isinstance(value, (Tensor, *PLAIN)):
            raise ConfigError(
                f"optimizer {type(optimizer).__name__} keeps {key} of {name} as {type(value).__name__}, which a checkpoint "
                f"cannot hold{' under fsdp2' if cut_apart else ''}; use adamw{', or parallel = ddp' if cut_apart else ''}."
            )


def tensors_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the state, with its name."""
    for name, key, value in _entries(optimizer, parameters):
        if isinstance(value, Tensor):
            yield f"{name}::{key}", value


def values_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The rest of the state: plain values by parameter, those of the optimizer's own groups, and which tensors are kept on
    the CPU wherever the parameters are (AdamW's step)."""
    plain: dict[str, dict[str, Any]] = {}
    for name, key, value in _entries(optimizer, parameters):
        if not isinstance(value, Tensor):
            plain.setdefault(name, {})[key] = value
    on_cpu = set()
    for name, key, value in _entries(optimizer, parameters):
        # a scalar of a run on the CPU: kept there too if that run goes on with a GPU, which is where AdamW wants it
        if isinstance(value, Tensor) and value.device.type == "cpu" and (not value.ndim or parameters[name].is_cuda):
            on_cpu.add(key)
    groups = [
        {key: value for key, value in table.items() if key != "params" and _is_plain(value)} for table in optimizer.param_groups
    ]
    return {"class": _class(optimizer), "plain": plain, "on_cpu": sorted(on_cpu), "groups": groups}


def read_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    values: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    given: Collection[str] = (),
) -> None:
    """Give a fresh optimizer the state that `values_of` and `tensors_of` gave.

    Entries of its groups that come from the settings (`GIVEN` and the names in `given`) keep what they are now. Raises
    CheckpointError if the optimizer is another one.
    """
    if values["class"] != _class(optimizer) or len(values["groups"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"expected the state of {_class(optimizer)} with {len(optimizer.param_groups)} groups, found {values['class']} "
            f"with {len(values['groups'])}; resume with the optimizer that the checkpoint was written with."
        )
    optimizer.state.clear()
    for name, entries in values["plain"].items():
        optimizer.state[parameters[name]].update(entries)
    for full, tensor in tensors:
        name, _, key = full.rpartition("::")
        parameter = parameters[name]
        if key not in values["on_cpu"]:
            like = parameter if tensor.shape == parameter.shape else torch.empty((), device=parameter.device)
            tensor = placed_like(tensor, like)
        optimizer.state[parameter][key] = tensor
    for table, saved in zip(optimizer.param_groups, values["groups"], strict=True):
        for key, value in saved.items():
            if key not in GIVEN and key not in given:
                table[key] = tuple(value) if isinstance(table.get(key), tuple) else value


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole CPU tensor where and how `other` is: on its device, and cut like it where it is a DTensor. Keeps its dtype."""
    if not _cut(other):
        return tensor.to(other.device)
    from torch.distributed.tensor import distribute_tensor

    # every rank has read the same file, so nothing is sent
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """A DTensor gathered from all ranks, which all must call this; any other tensor as it is."""
    return tensor.full_tensor() if _cut(tensor) else tensor


def _entries(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, str, Any]]:
    """(parameter, key, value) of the whole state, in an order that is the same on all ranks."""
    for name, parameter in parameters.items():
        for key, value in sorted(optimizer.state.get(parameter, {}).items()):
            yield name, key, value


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (isinstance(value, (list, tuple)) and all(isinstance(one, PLAIN) for one in value))


def _cut(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _class(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
