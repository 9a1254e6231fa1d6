"""The trained miniature checkpoints that the package carries: their names, the systems they are of, and where they lie.

They are folders in the released layouts and go through the same loader as every other checkpoint; what is different about
them stands in their `reasonedit.json`.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import CheckpointError

MINIS = {"mini-s": "reasonedit-s", "mini-q": "reasonedit-q"}
"""Name -> the system whose architecture it has."""

BRAINS = {"mini-brain": "reasonbrain"}
"""The same of ReasonBrain, whose folder is another (`brain/layout.py`)."""

PLACE = "REASONEDIT_MINIS"
"""Environment variable: a folder with minis of one's own, looked at before the package."""


def mini_folder(name: str) -> Path:
    """The folder of a mini. CheckpointError where it is not there."""
    places = mini_places(name)
    for place in places:
        if _whole(name, place):
            return place
    looked = " and ".join(map(str, places))
    raise CheckpointError(
        f"{name}: expected the miniature weights in {looked}, found none. Install a release with them, or make them with "
        f"`reasonedit-train mini --system {name} --out DIR` and set {PLACE}=DIR."
    )


def mini_places(name: str) -> list[Path]:
    """Where a mini is looked for, in this order."""
    if name not in {**MINIS, **BRAINS}:
        raise CheckpointError(f"expected a mini out of {', '.join((*MINIS, *BRAINS))}, found {name!r}. Correct the name.")
    own = os.environ.get(PLACE)
    return [*([Path(own) / name] if own else []), Path(__file__).parent / name]


def has_mini(name: str) -> bool:
    """Whether the weights of a mini are there."""
    return any(_whole(name, place) for place in mini_places(name))


def _whole(name: str, place: Path) -> bool:
    """Whether a folder holds a mini of that name; each system's last file stands for all."""
    return (place / ("brain.safetensors" if name in BRAINS else "model_index.json")).is_file()
