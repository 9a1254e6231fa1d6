"""Tiny random checkpoints for tests: built once per user and state of the builder, outside the repository.

Use: `from reasonedit.tests.tiny import tiny_checkpoint`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from reasonedit.reasonedit_core.brain import model
from reasonedit.reasonedit_core.mini import builder
from reasonedit.tests import brains


@cache
def tiny_checkpoint(system: str, seed: int = 0, std: float = builder.STD) -> Path:
    """Folder of the tiny checkpoint of `system`. Shared between tests and processes: do not write into it."""
    return _built(f"{system}-{seed}-{std}", lambda place: builder.build_checkpoint(system, place, seed=seed, std=std))


@cache
def tiny_reasonbrain(kind: str = "sd") -> Path:
    """Folder of a tiny ReasonBrain system, sd or flux. Shared like the others."""
    digest = hashlib.sha256()
    core = Path(model.__file__).parent.parent
    rooms = (core / "brain", core / "models" / "reasonbrain", core / "conditioners")
    ours = [path for room in rooms for path in sorted(room.glob("*.py"))]
    for source in (Path(brains.__file__), core / "mllm" / "llava.py", *ours):
        digest.update(source.read_bytes())
    return _built(f"reasonbrain-{kind}-{digest.hexdigest()[:16]}", lambda place: brains.write_system(place, kind))


def _built(name: str, build: Callable[[Path], object]) -> Path:
    """The folder `name` of the cache, built where it is not there."""
    folder = _cache() / name
    if not folder.exists():
        # Built aside and renamed, so that a process that runs at the same time never sees half a checkpoint.
        building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        build(building)
        try:
            building.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(building)  # another process was faster; its folder holds the same bits
    return folder


@cache
def _cache() -> Path:
    """Cache folder of this user, keyed by the sources of the builder: a change of the builder never meets old files."""
    digest = hashlib.sha256()
    for source in sorted(Path(builder.__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"reasonedit-tiny-{user}" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder
