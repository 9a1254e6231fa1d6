"""What `golden_pipeline.py` runs through the released pipelines and the tests through ours."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reasonedit.reasonedit_core import images
from reasonedit.tests.peer.recipe import draw

SYSTEMS = {"v1.2": "step1x-v1p2", "v1.1": "step1x-v1p1"}
STD = 0.2  # with the tiny checkpoints' own 0.05 the text has next to no effect on the picture
STEPS, SEED, STRIDE = 3, 0, 17
CELL = 28 * 28
BOUNDS = {"v1.2": (256 * CELL, 400 * CELL), "v1.1": (256 * CELL, 324 * CELL)}
DROPPED = {"v1.2": 90, "v1.1": 217}
STRIP_IDS = (160, 251)  # the bytes E2 and 9D in the tiny tokenizer: first of an opening, last of a closing curly quote

# Our own words. v1.1 drops 217 tokens (here: bytes), so its prefix is longer.
PREFIX = {
    "v1.2": "Look at the picture and read the request. Say what the picture shows once the request is done. Request:",
    "v1.1": (
        "Read the request that follows the picture. Say in full what the changed picture shows: things, places, colours, "
        "light and text. Leave out what nobody asked for and keep the rest as it is. Give the description only. Request:"
    ),
}


@dataclass(frozen=True, slots=True)
class Text:
    """One text encoding. size: (width, height) of the picture, as generated."""

    instruction: str
    size: tuple[int, int] = (64, 64)
    strip: bool = False


@dataclass(frozen=True, slots=True)
class Edit:
    """One edit. size: (width, height) of the source."""

    instruction: str
    size: tuple[int, int]
    guidance: float = 6.0
    level: int = 96
    dtype: torch.dtype = torch.float32


WORDS = {
    "empty": "",
    "plain": "make the cube red",
    "straight": 'write "Open 24h" on the sign',
    "curly": "write “Grüße” and “” on it",
    "mixed": 'from "a“b”c" to “d"e"f”',
    "unclosed": 'add "no end, and “quotes” inside',
    "unclosed_curly": 'say "hi" then “and so on',
    "bang": "Stop! Now ! or never!",
    "quoted_bang": '"Stop!" he said',
    "chinese": "把招牌上的字改成“营业中”，不要动别的！",
    "apostrophe": "paint the girl's hat, don't touch 'this'",
    "one_apostrophe": "paint the girl's hat",
}

TEXTS = {
    "v1.2": {
        **{name: Text(words) for name, words in WORDS.items()},
        "wide": Text("make it wide", (144, 48)),
        "tall": Text('a "tall" one', (32, 256)),
    },
    "v1.1": {
        **{name: Text(words) for name, words in WORDS.items()},
        "wide": Text("make it wide", (144, 48)),
        "strip": Text('write "Open 24h" on “it”', strip=True),
        "long": Text("again and again " * 40),
    },
}

EDITS = {
    "v1.2": {
        "guided": Edit('write "Hi!" on the sign!', (97, 61)),
        "unguided": Edit("把天空变成“星夜”", (33, 250), guidance=1.0),
        "bf16": Edit("make the cube red", (97, 61), dtype=torch.bfloat16),
    },
    "v1.1": {
        "guided": Edit("paint the girl's hat", (97, 61)),
        "unguided": Edit('write "no" on it!', (33, 250), guidance=1.0),
    },
}


def picture(size: tuple[int, int]) -> torch.Tensor:
    """A smooth picture (1, 3, H, W) with values k / 255; size is (width, height)."""
    coarse = draw(f"picture {size}", (1, 3, 5, 5)).mul(0.25).add(0.5).clamp(0, 1)
    # Through integers, so that no machine's last bit of an interpolation gets into the picture.
    return images.resize_bicubic_pil(coarse, *size)


def generated_picture(size: tuple[int, int]) -> torch.Tensor:
    """What the MLLM is shown: a picture that already has the size that is generated."""
    return picture(size)
