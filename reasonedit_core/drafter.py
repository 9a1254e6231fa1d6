"""A LoRA that is on while drafts are made and off at all other times."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .types import Edited


class Drafter:
    """A `Generator` that edits with a LoRA which is off at other times.

    generator: the `FlowGenerator` of the full runs. network: its DiT, with the peft adapter `adapter` on it, which is off.
    schedule: a `FlowSchedule` for the drafts, where the LoRA was trained with another.
    """

    def __init__(self, generator: Any, network: torch.nn.Module, adapter: str, schedule: Any = None) -> None:
        self.network, self.adapter = network, adapter
        self.generator = copy.copy(generator)  # kept moments are shared
        if schedule is not None:
            self.generator.schedule = schedule

    def edit(self, *args: Any, **options: Any) -> Edited:
        """See `Generator`."""
        with self._switched_on():
            return self.generator.edit(*args, **options)

    @contextmanager
    def _switched_on(self) -> Iterator[None]:
        switch(self.network, self.adapter, on=True)
        try:
            yield
        finally:
            switch(self.network, self.adapter, on=False)


def switch(network: torch.nn.Module, adapter: str, *, on: bool) -> None:
    """Let one of the peft adapters of `network` count or not; the others stay as they are."""
    for layer in network.modules():
        if adapter in getattr(layer, "lora_A", ()):
            others = [name for name in layer.active_adapters if name != adapter]
            layer.set_adapter([*others, adapter] if on else others)
            for half in (layer.lora_A, layer.lora_B):
                half.requires_grad_(False)  # `set_adapter` makes what it switches on trainable
