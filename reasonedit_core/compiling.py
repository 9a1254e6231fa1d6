"""Regional `torch.compile`: the blocks of a DiT, which are alike, compiled once for all of them, and nothing else.

The first edit then takes longer by what the compiler needs (a minute or so; kept on disk for later processes), and so does the
first one whose words or picture are of another length than before: from the second length on, lengths are variables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    import torch


def refuse_moved(compiled: bool, offload: str, moved: bool) -> None:
    """Raise ConfigError where blocks are to be compiled whose weights come and go: each move would compile them anew. moved: a
    host moves the weights."""
    if compiled and (offload != "none" or moved):
        found = "a host that moves them" if moved else f"--offload {offload}"
        raise ConfigError(f"--compile: expected weights that stay on the device, found {found}. Leave one of the two out.")


def compile_blocks(network: torch.nn.Module, **options: Any) -> None:
    """Compile the repeated blocks of a DiT in place, by diffusers' `compile_repeated_blocks`. options: of `torch.compile`."""
    network.compile_repeated_blocks(**options)
