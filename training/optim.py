"""Optimizers, learning rates, clipping and the moving average of the weights. Everything works on DTensors as well (FSDP2).

A learning rate is a pure function of the step, so nothing of a schedule is saved or restored.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..reasonedit_core.errors import BackendUnavailable, ConfigError
from .types import ParamGroup

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass(frozen=True, slots=True)
class OptimSettings:
    """How weights are changed.

    name: adamw, adamw8bit (bitsandbytes), or the dotted path of an optimizer class; options: its further arguments, passed
    as they are (betas and eps go to the two named ones only). schedule: see `rate`; floor: the share of the learning rate
    that linear and cosine end at. clip: largest gradient norm of each group, 0: none. decay_vectors: whether tensors of
    fewer than two dimensions (norms, biases) are decayed. ema: decay of the moving average of the weights, 0: none;
    ema_lora: whether groups called *_lora have one too. master: dtype that trained weights are brought to before anything
    else (float32: updates smaller than bf16 can show are not lost), or keep.
    """

    name: str = "adamw"
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    options: Mapping[str, Any] = field(default_factory=dict)
    schedule: str = "constant_with_warmup"
    warmup: int = 0
    floor: float = 0.0
    clip: float = 1.0
    decay_vectors: bool = True
    ema: float = 0.0
    ema_lora: bool = False
    master: str = "float32"

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"expected a schedule of {', '.join(SCHEDULES)}, found {self.schedule!r}; choose one of them.")
        for name, low in (("warmup", 0), ("clip", 0.0)):
            if not getattr(self, name) >= low:
                raise ConfigError(f"expected {name} >= 0, found {getattr(self, name)}; 0 turns it off.")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"expected ema in 0..1 (1 excluded), found {self.ema}; 0.9999 is usual, 0 turns it off.")
        if self.master not in ("float32", "keep"):
            raise ConfigError(f"expected master float32 or keep, found {self.master!r}.")


def rate(settings: OptimSettings, step: int, steps: int) -> float:
    """What a learning rate is multiplied by at optimizer step `step` (0, 1, ...) of `steps`.

    During warm-up (s + 1) / warmup, so that the first step already moves; then 1 (constant, constant_with_warmup; the plain
    constant has no warm-up), or down to `floor`, linear in the step or by half a cosine.
    """
    warmup = 0 if settings.schedule == "constant" else settings.warmup
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule.startswith("constant"):
        return 1.0
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    down = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.floor + (1.0 - settings.floor) * down


def to_masters(groups: Sequence[ParamGroup], settings: OptimSettings) -> None:
    """Bring trained weights to float32 in place, where settings.master asks for it. Frozen weights are left alone."""
    if settings.master == "float32":
        for group in groups:
            for _, parameter in group.parameters:
                if parameter.dtype in (torch.bfloat16, torch.float16):
                    parameter.data = parameter.data.float()


def build_optimizer(groups: Sequence[ParamGroup], settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer over `groups`; each of its own groups carries `name` and `base_lr`.

    Raises ConfigError for a class that is none or does not take the options, BackendUnavailable for a missing library.
    """
    tables = [table for group in groups for table in _tables(group, settings)]
    make = _optimizer_class(settings.name)
    options = dict(settings.options)
    if settings.name in ("adamw", "adamw8bit"):
        options = {"betas": tuple(settings.betas), "eps": settings.eps, **options}
    try:
        return make(tables, lr=tables[0]["lr"], **options)
    except TypeError as error:
        raise ConfigError(
            f"optimizer {settings.name} does not take the options {sorted(options)}: {error}; correct optim.options."
        ) from error


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Set every group's learning rate to its own times `factor`; returns the rates by group name."""
    for table in optimizer.param_groups:
        table["lr"] = table["base_lr"] * factor
    return {table["name"]: float(table["lr"]) for table in optimizer.param_groups}


def clip(groups: Sequence[ParamGroup], largest: float) -> dict[str, float]:
    """Scale the gradients of each group down to norm `largest` (0: leave them); returns the norms found, by group name.

    Each group on its own: a large gradient of one part does not slow down the others. With DTensors the norms are those of
    the whole gradients, equal on all ranks.
    """
    norms = {}
    for group in groups:
        parameters = [parameter for _, parameter in group.parameters]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norms[group.name] = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if largest and math.isfinite(norms[group.name]):
            nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norms


class Average:
    """Exponential moving average of trained weights, in float32 beside them; only of the groups that settings name.

    weights: by parameter name, float32, DTensors where the parameters are. The decay grows into its value as
    min(decay, (1 + s) / (10 + s)), so that short runs do not average mostly the start.
    """

    def __init__(self, groups: Sequence[ParamGroup], settings: OptimSettings) -> None:
        self.decay = settings.ema
        named = [one for group in groups if _averaged(group, settings) for one in group.parameters]
        self._parameters = dict(named)
        self.weights: dict[str, Tensor] = {name: one.detach().clone().float() for name, one in named}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (0, 1, ...)."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.weights.items():
            average.lerp_(self._parameters[name].detach().float(), 1.0 - keep)

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Iterator[None]:
        """The averages stand in for the weights inside the block; afterwards the weights are what they were, to the bit."""
        kept = {name: self._parameters[name].detach().clone() for name in self.weights}
        for name, average in self.weights.items():
            self._parameters[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in kept.items():
                    self._parameters[name].copy_(weight)


def _averaged(group: ParamGroup, settings: OptimSettings) -> bool:
    return settings.ema > 0 and (settings.ema_lora or not group.name.endswith("_lora"))


def _tables(group: ParamGroup, settings: OptimSettings) -> list[dict[str, Any]]:
    """What torch's optimizers call param groups: one, or two where vectors are not decayed."""

    def table(parameters: list[nn.Parameter], decay: float) -> dict[str, Any]:
        return {
            "params": parameters,
            "lr": group.lr,
            "weight_decay": decay,
            "name": group.name,
            "base_lr": group.lr,
        }

    everything = [parameter for _, parameter in group.parameters]
    if settings.decay_vectors or not group.weight_decay:
        return [table(everything, group.weight_decay)]
    matrices = [parameter for parameter in everything if parameter.ndim >= 2]
    vectors = [parameter for parameter in everything if parameter.ndim < 2]
    halves = ((matrices, group.weight_decay), (vectors, 0.0))
    return [table(parameters, decay) for parameters, decay in halves if parameters]


def _optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    if name == "adamw":
        return torch.optim.AdamW
    path = "bitsandbytes.optim.AdamW8bit" if name == "adamw8bit" else name
    module, _, attribute = path.rpartition(".")
    if not module:
        raise ConfigError(
            f"expected an optimizer adamw, adamw8bit or a dotted path such as torch.optim.SGD, found {name!r}; name one."
        )
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        library = module.partition(".")[0]
        raise BackendUnavailable(f"optimizer {name} needs {library} ({error}); install it, or use adamw.") from error
    except AttributeError as error:
        raise ConfigError(f"{module} has no {attribute}: optimizer {name!r} does not exist; correct optim.name.") from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"expected the path of a torch.optim.Optimizer class, found {name!r}, a {type(found).__name__}.")
    return found
