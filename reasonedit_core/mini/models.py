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

PLACE = "REASONEDIT_MINIS"
"""Environment variable: a folder with minis of one's own, looked at before the package."""


def mini_folder(name: str) -> Path:
    """The folder of a mini. CheckpointError where it is not there."""
    places = mini_places(name)
    for place in places:
        if (place / "model_index.json").is_file():
            return place
    looked = " and ".join(map(str, places))
    raise CheckpointError(
        f"{name}: expected the miniature weights in {looked}, found none. Install a release with them, or make them with "
        f"`reasonedit-train mini --system {name} --out DIR` and set {PLACE}=DIR."
    )


def mini_places(name: str) -> list[Path]:
    """Where a mini is looked for, in this order."""
    if name not in MINIS:
        raise CheckpointError(f"expected a mini out of {', '.join(MINIS)}, found {name!r}. Correct the name.")
    own = os.environ.get(PLACE)
    return [*([Path(own) / name] if own else []), Path(__file__).parent / name]


def has_mini(name: str) -> bool:
    """Whether the weights of a mini are there."""
    return any((place / "model_index.json").is_file() for place in mini_places(name))
