"""Who edits for the pipelines: a system of the project, or anything that makes a picture of a picture and an instruction."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ....reasonedit_core.errors import ConfigError
from .annotators import Shown

if TYPE_CHECKING:
    from ....reasonedit_core.load import System


class Editor(Protocol):
    """name: part of every key and of every record; it must tell one set of weights and settings from another."""

    name: str

    def edit(self, picture: Shown, instruction: str, seed: int) -> tuple[bytes, tuple[int, int]]:
        """(PNG, (width, height)). The same arguments give the same picture. Called in a thread, one call at a time."""
        ...


class LoadedSystem:
    """A system that is loaded when it is first needed. weights: its folder, None for a miniature's own."""

    def __init__(self, system: str, weights: Path | None, *, device: str = "auto", dtype: str = "auto") -> None:
        self.system, self.weights, self._device, self._dtype = system, weights, device, dtype
        self._loaded: System | None = None
        self._lock = threading.Lock()

    @classmethod
    def parse(cls, text: str, **options: str) -> LoadedSystem:
        """SYSTEM=DIR, or the name of a miniature alone. ConfigError for anything else."""
        system, _, folder = text.partition("=")
        if not system or (folder and not Path(folder).is_dir()):
            raise ConfigError(f"--editor: expected SYSTEM=DIR with a folder of weights, found {text!r}. Check the path.")
        return cls(system, Path(folder) if folder else None, **options)

    def get(self) -> System:
        """The system."""
        with self._lock:
            if self._loaded is None:
                from ....reasonedit_core.load import SystemSpec, load_system

                spec = SystemSpec(self.system, self.weights, reasoner="own", dtype=self._dtype, device=self._device)
                self._loaded = load_system(spec)
            return self._loaded


class SystemEditor:
    """One edit of a system, without thinking and reflection. steps: None for the checkpoint's own number."""

    def __init__(self, loaded: LoadedSystem, steps: int | None = None) -> None:
        self._loaded, self._steps = loaded, steps
        folder = loaded.weights.resolve().name if loaded.weights else loaded.system
        self.name = f"{loaded.system}:{folder}" + (f"@{steps}" if steps else "")

    def edit(self, picture: Shown, instruction: str, seed: int) -> tuple[bytes, tuple[int, int]]:
        """The first round that the loop would make with this seed."""
        import torch

        from ....reasonedit_core.images import load_image, to_pil
        from ....reasonedit_core.types import EditRequest

        system = self._loaded.get()
        values = {name: system.defaults[name] for name in ("guidance", "size_level", "negative")}
        steps = self._steps or system.defaults["steps"]
        request = EditRequest(load_image(picture.path).rgb, instruction, seed=seed, steps=steps, **values)
        rng = torch.Generator().manual_seed(seed)
        made = to_pil(system.generator.edit(request, request.image, instruction, rng).image)
        buffer = io.BytesIO()
        made.save(buffer, format="PNG")
        return buffer.getvalue(), made.size
