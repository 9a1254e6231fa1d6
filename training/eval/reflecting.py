"""Reflection by itself: pictures that are known to be right or wrong, and what a reflector says and brings about."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...reasonedit_core.dialogue.pack import language_of
from ...reasonedit_core.errors import Interrupted, ReasonEditError
from ...reasonedit_core.images import quantize
from ...reasonedit_core.loop import believed, score
from ...reasonedit_core.mini.dice import Dice
from ...reasonedit_core.mini.faults import FAULTS, SPOILERS, plant, spoil
from ...reasonedit_core.mini.judge import judge
from ...reasonedit_core.mini.scenes import draw, pixels
from ...reasonedit_core.mini.verdicts import assess_picture
from ...reasonedit_core.mini.world import render
from ...reasonedit_core.types import Decision, Reflection, Thought
from . import strands
from .arms import Body, Outcome, Record, Work, judged, marks_of, rounded
from .drawing import Task

if TYPE_CHECKING:
    from ...reasonedit_core.interfaces import Reasoner

RIGHT = "right"


class TwoReasoners:
    """A reasoner that thinks with one and reflects with another, so that reflectors compare on the same goals."""

    def __init__(self, thinker: Reasoner, reflector: Reasoner) -> None:
        self.thinker, self.reflector = thinker, reflector

    def bound(self, **options: Any) -> TwoReasoners:
        """The same for one run."""
        bound = copy.copy(self)
        bound.thinker, bound.reflector = self.thinker.bound(**options), self.reflector.bound(**options)
        return bound

    def think(self, image: torch.Tensor, instruction: str, *, feedback: str | None = None) -> Thought:
        """The thinker's."""
        return self.thinker.think(image, instruction, feedback=feedback)

    def describe(self, image: torch.Tensor, goal: str, *, original: str | None = None) -> str:
        """The reflector's."""
        return self.reflector.describe(image, goal, original=original)

    def reflect(
        self, source: torch.Tensor, edited: torch.Tensor, goal: str, target: str, *, original: str | None = None, **more: Any
    ) -> Reflection:
        """The reflector's."""
        return self.reflector.reflect(source, edited, goal, target, original=original, **more)


# ---- planted pictures ----------------------------------------------------------------------------------------------------


def reflect_on(planted: bool) -> Work:
    """Reflection on a picture of a task: the right one, or one with a fault of a kind that its seed draws.

    What scenes show is seen through the VAE, as if an editor had made it; a spoiled picture as it is. Where the verdict asks
    for one more edit, that is made and judged too.
    """

    def run(body: Body, task: Task) -> Record:
        kind, picture = _planted(body, task) if planted else (RIGHT, _through_vae(body, task, task.item.target))
        return _reflect(body, task, kind, picture)

    return run


def _planted(body: Body, task: Task) -> tuple[str, torch.Tensor]:
    item, dice = task.item, Dice("evaluation fault", task.seed)
    for kind in dice.shuffle((*FAULTS, *SPOILERS)):
        if kind in SPOILERS:
            return kind, _picture(spoil(render(item.target), kind, task.seed))
        fault = plant(item, task.seed, kind)
        if fault is not None:
            return kind, _through_vae(body, task, fault.shown)
    raise AssertionError("every picture can be spoiled")


def _through_vae(body: Body, task: Task, scene: Any) -> torch.Tensor:
    moments = body.codec.encode(draw(scene) * 2 - 1)
    decoded = body.codec.decode(body.codec.sample(moments, torch.Generator().manual_seed(task.seed)))
    return quantize(decoded)


def _picture(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32) / 255).permute(2, 0, 1)[None].contiguous()


def _reflect(body: Body, task: Task, kind: str, picture: torch.Tensor) -> Record:
    item = task.item
    goal, request = item.concrete, body.request(task)
    reasoner = body.reasoner.bound(seed=task.seed)
    expected = assess_picture(item.source, item.target, pixels(picture), language_of(goal))
    record: Record = {"key": task.key, "fault": kind, "expected": expected.verdict, "shown": judged(task, picture)}
    record |= {"mended": record["shown"], "decision": None, "believed": False, "error": None}
    try:
        target = reasoner.describe(request.image, goal, original=item.instruction)
        found = reasoner.reflect(request.image, picture, goal, target, original=item.instruction)
        record |= {
            "target": target,
            "decision": found.decision.value,
            "believed": believed(found, body.policy),
            "score": round(score(found), 6),
            "consistency": found.scores.consistency,
            "reason": found.reason,
            "second": found.instruction,
            "wanted": expected.instruction,
        }
        if found.decision is Decision.REFINE:
            rng = torch.Generator().manual_seed(task.seed)
            edited = body.generator.edit(request, picture, found.instruction, rng)
            record["mended"] = marks_of(judge(item.source, item.target, pixels(edited.image)))
    except ReasonEditError as fault:
        if isinstance(fault, Interrupted):
            raise
        record["error"] = str(fault)
    return record | {"spent": rounded(strands.spent())}


_VERDICTS = {"success": Decision.SUCCESS, "reflection": Decision.REFINE, "failed": Decision.FAILED}


def shown(record: Record) -> Outcome:
    """The picture that is reflected on."""
    return Outcome(record["shown"], 0.0)


def mended(record: Record) -> Outcome:
    """The picture after one more edit, where the reflector asked for one."""
    return Outcome(record["mended"], sum(record["spent"].values()))


def is_wrong(record: Record) -> bool:
    """Whether something is to be found fault with, by the exact judge of the very pixels."""
    return record["expected"] != "success"


def rates(records: Sequence[Record]) -> Mapping[str, float]:
    """Shares over some records. caught: of wrong pictures, those not accepted; rejected: of right ones, the same; verdicts:
    agree with the exact one; instructions: of those that ask for an edit where one helps, word for word the exact one."""
    wrong = [record for record in records if is_wrong(record)]
    right = [record for record in records if not is_wrong(record)]
    said = [_VERDICTS[record["expected"]].value == record["decision"] for record in records]
    seconds = [record for record in wrong if record.get("second") and record.get("wanted")]
    shares = {
        "caught": [not record["believed"] for record in wrong],
        "rejected": [not record["believed"] for record in right],
        "verdicts": said,
        "instructions": [_words(record["second"]) == _words(record["wanted"]) for record in seconds],
    }
    return {name: sum(found) / len(found) for name, found in shares.items() if found}


def _words(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".。")
