"""Objects that a user has named."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ConfigError


class GivenObjects:
    """An `ObjectExtractor` that answers with the user's own names, whatever the instruction."""

    def __init__(self, names: Sequence[str]) -> None:
        """Raises ConfigError without names."""
        self.names = list(dict.fromkeys(name.strip() for name in names if name.strip()))
        if not self.names:
            raise ConfigError("objects: expected at least one name, found none. Name what the instruction is about.")

    def extract(self, instruction: str, image: torch.Tensor | None = None) -> list[str]:
        """The names, in their order, none twice."""
        return list(self.names)
