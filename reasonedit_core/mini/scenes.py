"""Held-out scenes to show, and whether a picture is a scene at all.

What is drawn here no training has seen: the split is part of the key of an item (`splits.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .items import Item, item
from .judge import Judgement, judge, read
from .rules import KNOWLEDGE
from .world import SIZE, Scene, render

if TYPE_CHECKING:
    import torch

SPLIT = "held_out"

READABLE_CELLS = 7
"""Cells of a picture that must fit the world's sprites for it to count as one of its scenes."""


def held_out(seed: int, kind: str, language: str | None = None) -> Item:
    """The held-out item of a seed. Any integer is one; kind and language: as `items.item` takes them."""
    return item(seed, kind, SPLIT, language)


def shown_items(seed: int, language: str = "en") -> tuple[Item, ...]:
    """The scenes of the demonstration: one for each kind of knowledge that an instruction may need."""
    return tuple(held_out(seed, kind, language) for kind in KNOWLEDGE)


def draw(scene: Scene, size: int = SIZE) -> torch.Tensor:
    """A scene as the picture that a system edits: (1, 3, size, size) in 0..1."""
    from ..images import from_pil

    return from_pil(Image.fromarray(render(scene, size)))


def pixels(picture: torch.Tensor) -> np.ndarray:
    """A picture (1, 3, H, W) in 0..1 as it is saved: (H, W, 3), uint8."""
    from ..images import to_pil

    return np.asarray(to_pil(picture))


def judge_picture(shown: Item, picture: torch.Tensor) -> Judgement:
    """The exact judge on a picture (1, 3, H, W) that an item's edit gave."""
    return judge(shown.source, shown.target, pixels(picture))


def is_scene(picture: np.ndarray) -> bool:
    """Whether a picture (H, W, 3) shows a scene of this world: most of its cells are sprites of it.

    Of nine cells photographs have none to two such, and drawn scenes all, also where they were scaled or saved as JPEG.
    """
    return sum(read(picture).readable) >= READABLE_CELLS


def picture_remark(pictures: str, picture: torch.Tensor) -> str:
    """What to tell the user about a picture (1, 3, H, W) before it is edited; "" where there is nothing to say.

    pictures: what the checkpoint states that it can edit (`Settings.pictures`).
    """
    if pictures == "any" or is_scene(pixels(picture)):
        return ""
    return (
        "this picture is none of the drawn miniature scenes, and these weights edit nothing else. The run goes on, but its "
        "result will mean nothing: take full-size weights for photographs"
    )
