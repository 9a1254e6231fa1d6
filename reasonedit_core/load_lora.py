"""The LoRAs of a system: onto its networks for good, or onto the DiT for drafts alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .drafter import switch
from .errors import ConfigError

if TYPE_CHECKING:
    from .mllm.qwen25vl import QwenVL

Loras = tuple[tuple[Path, float], ...]
"""(file or peft folder, scale), in the order in which they are applied."""


def apply_loras(loras: Loras, mllm: QwenVL, transformer: torch.nn.Module | None = None) -> list[str]:
    """Apply each LoRA to the DiT, the MLLM or both, as its keys say. Returns a sentence per file of which a part was left."""
    from .lora import apply_lora_to

    modules = ({} if transformer is None else {"dit": transformer}) | {"mllm": mllm.model}
    notes = []
    for number, (path, scale) in enumerate(loras):
        reports = apply_lora_to(modules, path, scale, name=f"lora{number}")
        unmatched = next(iter(reports.values())).unmatched
        if unmatched:
            few = ", ".join(unmatched[:5])
            notes.append(f"{path}: {len(unmatched)} keys of the LoRA match nothing in this model: {few}.")
    if loras:
        mllm.release()
    return notes


def draft_adapter(loras: Loras, transformer: torch.nn.Module) -> str:
    """The name of the adapter that is on for drafts alone, beside the weights and off for now; "" without one."""
    from .lora import apply_lora, read_lora

    if not loras:
        return ""
    if len(loras) > 1:
        raise ConfigError(f"draft LoRA: expected one, found {len(loras)}. Leave the others out, or merge them into one file.")
    ((path, scale),) = loras
    told = (".lora_magnitude_vector", ".dora_scale", ".set_weight")
    moves = next((key for key in read_lora(path)[0] if any(part in key for part in told)), None)
    if moves is not None:
        raise ConfigError(
            f"{path}: expected a LoRA that can be switched off after a draft, found one that changes the weights themselves "
            f"({moves}). Take a plain LoRA for drafts."
        )
    name = apply_lora(transformer, path, scale, name="draft").name
    switch(transformer, name, on=False)
    return name


def refuse_reasoner_loras(loras: Loras, reasoner: str) -> None:
    """ConfigError where LoRAs are named for a reasoner that takes none."""
    if loras:
        raise ConfigError(
            f"{loras[0][0]}: expected a reasoner qwen:DIR to put this LoRA onto, found {reasoner!r}. The checkpoint's own MLLM "
            "gets its LoRAs with the editor's (--lora); other reasoners take none."
        )
