"""Runs of the loop on the drawn world, made without any model: a first edit that went wrong, and one that mends it.

Use: `from reasonedit.tests.trace_tools import a_run, save_folder`.
"""

from __future__ import annotations

from pathlib import Path

from reasonedit.reasonedit_core.images import to_pil
from reasonedit.reasonedit_core.mini.faults import plant
from reasonedit.reasonedit_core.mini.items import Item, item
from reasonedit.reasonedit_core.mini.scenes import draw
from reasonedit.reasonedit_core.mini.texts import target_description
from reasonedit.reasonedit_core.mini.verdicts import Assessment
from reasonedit.reasonedit_core.report import RunFolder
from reasonedit.reasonedit_core.types import (
    Counts,
    Decision,
    Edited,
    EditRequest,
    EditTrace,
    Reflection,
    Round,
    Scores,
    Thought,
)

DECISIONS = {"success": Decision.SUCCESS, "reflection": Decision.REFINE, "failed": Decision.FAILED}


def reflection(found: Assessment) -> Reflection:
    scores = Scores((8.0, 9.0), (7.0, 7.5), found.score, found.scorer)
    return Reflection(DECISIONS[found.verdict], found.reason, found.instruction, scores)


def a_run(seed: int, kind: str = "half", language: str = "en") -> tuple[Item, EditTrace]:
    """An abstract item whose first edit went wrong in a way that one more edit mends, and did."""
    seed *= 1000  # runs of different seeds are of different items
    while True:
        one = item(seed, "abstract", "train", language)
        fault = plant(one, seed, kind)
        if fault is not None and fault.assessment.verdict == "reflection":
            break
        seed += 1
    right = plant(one, seed, "right")
    pictures = [draw(fault.shown, 48), draw(one.target, 48)]
    rounds = (
        Round(0, one.concrete, None, Edited(pictures[0], pictures[0], None), reflection(fault.assessment), 1.0),
        Round(1, fault.assessment.instruction, 0, Edited(pictures[1], pictures[1], None), reflection(right.assessment), 1.0),
    )
    request = EditRequest(draw(one.source, 48), one.instruction, seed=seed)
    target = target_description(one.source, one.target, one.language)
    return one, EditTrace(request, Thought(one.instruction, one.concrete), target, rounds, 1, "success")


def save_folder(trace: EditTrace, folder: Path) -> Path:
    to_pil(trace.request.image).save(folder.parent / f"{folder.name}-source.png")
    run = {"image": str(folder.parent / f"{folder.name}-source.png"), "system": "mini-s"}
    RunFolder(folder, run=run, counts=Counts).write_round(trace)
    return folder
