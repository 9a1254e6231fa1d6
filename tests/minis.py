"""Stand-ins for the trained miniatures: tiny random checkpoints that state of themselves what the miniatures state.

Tests of a whole ComfyUI take those that `REASONEDIT_MINIS` names, where it is set, else the trained ones of the package, else
these.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from reasonedit.reasonedit_core.mini.models import MINIS, PLACE, has_mini
from reasonedit.tests.tiny import tiny_checkpoint

CHECKPOINTS = {"mini-s": "step1x-v1p2", "mini-q": "qwen-edit-plus"}
NOTICE = "A stand-in: it edits nothing well."
STATED = {
    "steps": 2,
    "guidance": 1.0,
    "size_level": 96,
    "conditioner_pixels": [7056, 7056],
    "reasoner_pixels": [7056, 7056],
    "condition_area": 7056,
    "dialogue": "own",
    "reply_tokens": 48,
    "scores": [],
    "latents": "own",
    "pictures": "miniature",
    "notice": NOTICE,
}


def write_minis(place: Path, **changed) -> Path:
    """A folder with stand-ins for both miniatures, to be named by REASONEDIT_MINIS. The weights are linked, not copied."""
    for name in MINIS:
        folder = place / name
        folder.mkdir(parents=True)
        for path in tiny_checkpoint(CHECKPOINTS[name], std=0.2).iterdir():
            (folder / path.name).symlink_to(path)
        (folder / "reasonedit.json").unlink(missing_ok=True)
        (folder / "reasonedit.json").write_text(json.dumps({**STATED, **changed}))
    return place


def stand_ins(place: Path) -> Path | None:
    """What to set REASONEDIT_MINIS to for another process that is to find miniatures; None where it finds some by itself."""
    return None if os.environ.get(PLACE) or all(map(has_mini, MINIS)) else write_minis(place)
