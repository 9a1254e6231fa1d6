"""Weights that wait on the CPU until their turn: `none`, `component` (one part at a time) and `block` (DiT blocks streamed).

A mover hands out a context per component, `with mover("dit"): ...`; inside it the weights are on the device. A part stays
there after its context closes, until another one needs the room, so that two calls in a row pay for one transfer.
Weights never change while editing, so leaving the device means dropping the copy: the bits on the CPU are the same ones.

Why not accelerate's hooks: `cpu_offload` walks down to every leaf, swaps in meta tensors (which `apply_lora` and dtype
lookups then trip over) and transfers inputs as well; `cpu_offload_with_hook` copies weights back on every exit. Both take
their device from global state, so which part sits where cannot be counted in a test.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from .errors import ConfigError

if TYPE_CHECKING:
    from .interfaces import Query, Speaker
    from .types import OnText, ShouldStop

log = logging.getLogger(__name__)

MODES = ("none", "component", "block")

STREAMED = {"dit", "mllm"}
"""Components that are rows of blocks."""

ROOM_FOR_WEIGHTS = 0.8
"""Share of the device's memory that one component's weights may fill; the rest is for activations and the KV cache."""

Transfer = Callable[[torch.Tensor, torch.device], torch.Tensor]
"""(tensor, device) -> a copy of it there. Tests put a counting one in."""


class Mover(Protocol):
    """Puts the weights of a component on the device for as long as a context is open."""

    device: torch.device

    def __call__(self, component: str) -> AbstractContextManager[None]:
        """component: a name given at construction (`mllm`, `dit`, `vae`)."""
        ...

    def release(self) -> None:
        """Take everything that this mover manages off the device."""
        ...


def copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The default transfer. Pinned memory is copied without waiting: later kernels of the same stream come after it."""
    return tensor.to(device, non_blocking=tensor.is_pinned())


class Parked:
    """The tensors of one or several modules, with their home on the CPU and, while `fetch`ed, a copy on the device."""

    def __init__(self, modules: Sequence[nn.Module], transfer: Transfer = copy_to, pin: bool = False) -> None:
        self._transfer = transfer
        self._homes: dict[nn.Parameter, torch.Tensor] = {}
        self._modules = tuple(modules)
        self.fetched = False
        for module in self._modules:
            for parameter in module.parameters():
                self._homes[parameter] = _home(parameter.data, pin)
                parameter.data = self._homes[parameter]
            for owner, name, buffer in _buffers(module):
                owner._buffers[name] = _home(buffer, False)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters. Buffers are small and not counted."""
        return sum(home.numel() * home.element_size() for home in self._homes.values())

    def fetch(self, device: torch.device) -> None:
        """Copy to the device. When that fails half-way (out of memory) nothing is left there."""
        if self.fetched:
            return
        try:
            self.fetched = True
            for parameter, home in self._homes.items():
                parameter.data = self._transfer(home, device)
            for module in self._modules:
                for owner, name, buffer in _buffers(module):
                    owner._buffers[name] = self._transfer(buffer, device)
        except BaseException:
            self.drop()
            raise

    def drop(self) -> None:
        """Forget the copies of the parameters; buffers come back, as a forward pass may have written to them."""
        if not self.fetched:
            return
        self.fetched = False
        for parameter, home in self._homes.items():
            parameter.data = home
        for module in self._modules:
            for owner, name, buffer in _buffers(module):
                owner._buffers[name] = buffer.to("cpu")


class Resident:
    """`none`: everything is put on the device at once and stays."""

    def __init__(self, modules: Mapping[str, nn.Module], device: torch.device) -> None:
        self.device = device
        self._names = tuple(modules)
        for module in modules.values():
            module.to(device)

    def __call__(self, component: str) -> AbstractContextManager[None]:
        """Nothing to do: the component is there."""
        _known(component, self._names)
        return nullcontext()

    def release(self) -> None:
        """Nothing is managed, nothing is released."""


class OneAtATime:
    """`component` and `block`: at most one component on the device.

    streamed: per component the blocks that come and go with their own forward pass instead of with the component.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        device: torch.device,
        *,
        streamed: Mapping[str, Sequence[nn.Module]] | None = None,
        transfer: Transfer = copy_to,
    ) -> None:
        self.device = device
        pin = device.type == "cuda"
        self._open: list[str] = []
        self._parts: dict[str, Parked] = {}
        self._blocks: list[Parked] = []
        for name, module in modules.items():
            blocks = tuple((streamed or {}).get(name, ()))
            for block in blocks:
                self._blocks.append(_stream(block, device, transfer, pin))
            self._parts[name] = Parked(_remainder(module, blocks), transfer, pin)

    @property
    def resident(self) -> str | None:
        """The component on the device now."""
        return next((name for name, part in self._parts.items() if part.fetched), None)

    @contextmanager
    def __call__(self, component: str) -> Iterator[None]:
        """Contexts nest: the inner component displaces the outer one, which comes back when the inner context closes."""
        _known(component, tuple(self._parts))
        self._bring(component)
        self._open.append(component)
        try:
            yield
        finally:
            self._open.pop()
            for block in self._blocks:  # hooks run after an Exception, not after a KeyboardInterrupt
                block.drop()
            if self._open:
                self._bring(self._open[-1])

    def release(self) -> None:
        """Take everything off the device."""
        for part in (*self._blocks, *self._parts.values()):
            part.drop()

    def _bring(self, component: str) -> None:
        if self._parts[component].fetched:
            return
        for part in self._parts.values():
            part.drop()
        log.debug("moving %s to %s", component, self.device)
        self._parts[component].fetch(self.device)


class MovedSpeaker:
    """A speaker in process whose MLLM is put on the device for the time of its answers."""

    def __init__(self, speaker: Speaker, mover: Mover, component: str = "mllm") -> None:
        self._speaker, self._mover, self._component = speaker, mover, component

    def answer(
        self, queries: Sequence[Query], *, on_text: OnText | None = None, should_stop: ShouldStop | None = None
    ) -> list[str]:
        """Raw replies, one per query, in order."""
        with self._mover(self._component):
            return self._speaker.answer(queries, on_text=on_text, should_stop=should_stop)


def make_mover(
    mode: str,
    modules: Mapping[str, nn.Module],
    device: torch.device | str,
    *,
    memory: int | None = None,
    transfer: Transfer = copy_to,
) -> Mover:
    """The mover of `--offload MODE` for the components `modules`.

    memory: bytes of the device, None to ask it. Under `block` the DiT is streamed, and the MLLM as well where its weights
    would fill more than 80 % of the device (16.6 GB on a 16 GB card). VAEs are small and move as a whole.
    """
    device = torch.device(device)
    if mode == "none":
        return Resident(modules, device)
    if mode not in MODES:
        raise ConfigError(f"--offload: expected one of {', '.join(MODES)}, found {mode!r}")
    streamed = {}
    if mode == "block":
        memory = _device_memory(device) if memory is None else memory
        for name in STREAMED & modules.keys():
            size = sum(p.numel() * p.element_size() for p in modules[name].parameters())
            if name == "dit" or (memory is not None and size > ROOM_FOR_WEIGHTS * memory):
                streamed[name] = find_blocks(modules[name])
    return OneAtATime(modules, device, streamed=streamed, transfer=transfer)


def find_blocks(module: nn.Module) -> list[nn.Module]:
    """The blocks that a network is a row of: those of the classes it names itself, as diffusers and transformers do.

    A list of modules alone does not tell them: the connector's refiner blocks are called piece by piece, and a hook on the
    block would not see that.
    """
    names = getattr(module, "_repeated_blocks", None) or getattr(module, "_no_split_modules", None) or ()
    blocks = [block for block in module.modules() if type(block).__name__ in names]
    if not blocks:
        raise ConfigError(
            f"--offload block: expected a network that names its blocks (_repeated_blocks), found {type(module).__name__} "
            "with none; use --offload component"
        )
    return blocks


def _stream(block: nn.Module, device: torch.device, transfer: Transfer, pin: bool) -> Parked:
    part = Parked([block], transfer, pin)
    block.register_forward_pre_hook(partial(_fetch_hook, part, device))
    # always_call: a block that raises (out of memory, a cancelled run) leaves the device as well
    block.register_forward_hook(partial(_drop_hook, part), always_call=True)
    return part


def _fetch_hook(part: Parked, device: torch.device, _module: nn.Module, _args: object) -> None:
    part.fetch(device)


def _drop_hook(part: Parked, _module: nn.Module, _args: object, _output: object) -> None:
    part.drop()


def _remainder(module: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Modules that together hold every tensor of `module` that is in none of `blocks`.

    A module with tensors of its own beside its children is split by giving those tensors to a leaf that shares them.
    """
    if not blocks:
        return [module]
    excluded = set(blocks)
    rest: list[nn.Module] = []

    def descend(current: nn.Module) -> None:
        if current in excluded:
            return
        inside = set(current.modules())
        if not inside & excluded:
            rest.append(current)
            return
        if current._parameters or current._buffers:
            rest.append(_Own(current))
        for child in current.children():
            descend(child)

    descend(module)
    return rest


class _Own(nn.Module):
    """A view of the tensors that a module owns itself; the dictionaries are shared, so replaced buffers are seen."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers = owner._parameters, owner._buffers


def _home(tensor: torch.Tensor, pin: bool) -> torch.Tensor:
    home = tensor.detach().to("cpu")
    if not pin or home.is_pinned():
        return home
    try:
        return home.pin_memory()
    except RuntimeError as error:  # the operating system limits locked memory; transfers are then slower, not wrong
        log.info("could not pin %d bytes of host memory (%s); transfers will be slower", home.nbytes, error)
        return home


def _buffers(module: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
    return [
        (owner, name, buffer) for owner in module.modules() for name, buffer in owner._buffers.items() if buffer is not None
    ]


def _device_memory(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _known(component: str, names: tuple[str, ...]) -> None:
    if component not in names:
        raise ConfigError(f"offload: expected one of the components {', '.join(names)}, found {component!r}")
