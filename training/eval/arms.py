"""What is run for an item, and the record of it: every picture that was made, judged exactly, with the work it took.

A record holds all rounds, so that several rows of a table come from one run: what a shorter run would have given is the head
of a longer one, because the loop looks at the number of rounds only to stop (`loop.next_step`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...reasonedit_core.errors import Interrupted, ReasonEditError
from ...reasonedit_core.interfaces import Generator, Reasoner
from ...reasonedit_core.loop import POLICIES, believed, best_round, score, think_edit_reflect
from ...reasonedit_core.mini.judge import Judgement, judge
from ...reasonedit_core.mini.scenes import draw, pixels
from ...reasonedit_core.types import EditRequest, EditTrace, Policy, Round
from . import strands
from .drawing import Task

if TYPE_CHECKING:
    from ...reasonedit_core.interfaces import Codec

EAGER = replace(POLICIES["reasonedit"], lazy_scores=False)
"""The default policy with all scores: a record tells what a shorter run would have returned, which compares other rounds."""

Record = dict[str, Any]
"""What came of one run for one item; JSON. key, rounds (see `_round_record`), source: the judgement of the untouched picture,
best: per number of rounds the index of the round that is returned, None for the source, error: why it ended early, or None."""

Work = Callable[["Body", Task], Record]


@dataclass(frozen=True, slots=True, eq=False)
class Body:
    """A system as an arm runs it. defaults: steps, guidance, size_level and negative of every request. codec: the VAE by
    itself, for pictures that no editor made."""

    generator: Generator
    reasoner: Reasoner | None
    defaults: Mapping[str, Any]
    policy: Policy = EAGER
    codec: Codec | None = None

    def request(self, task: Task, instruction: str | None = None, **options: Any) -> EditRequest:
        """The request of a task; instruction: in place of the user's words."""
        words = task.item.instruction if instruction is None else instruction
        return EditRequest(draw(task.item.source), words, task.seed, **self.defaults, **options)


# ---- runs ----------------------------------------------------------------------------------------------------------------


def edit_plainly(body: Body, task: Task) -> Record:
    """The editor with the user's words."""
    return _run_loop(body, task, body.request(task, think=False, reflect=False))


def edit_truly(body: Body, task: Task) -> Record:
    """The editor with an instruction that says plainly what is meant."""
    return _run_loop(body, task, body.request(task, task.item.concrete, think=False, reflect=False))


def loop_of(rounds: int, *, think: bool = True) -> Work:
    """The loop of at most `rounds` edits, with or without thinking."""

    def run(body: Body, task: Task) -> Record:
        return _run_loop(body, task, body.request(task, think=think, max_rounds=rounds))

    return run


def _run_loop(body: Body, task: Task, request: EditRequest) -> Record:
    marks: list[tuple[int, bool, dict[str, float]]] = []

    def mark(trace: EditTrace) -> None:
        marks.append((len(trace.rounds) - 1, trace.rounds[-1].reflection is not None, strands.spent()))

    error = None
    try:
        trace = think_edit_reflect(request, reasoner=body.reasoner, generator=body.generator, policy=body.policy, on_round=mark)
    except ReasonEditError as fault:
        trace, error = _trace_of(fault), str(fault)
    best = [best_round(replace(trace, rounds=trace.rounds[: n + 1]), body.policy) for n in range(len(trace.rounds))]
    return _record(body, task, trace, best, marks, error)


def reroll_of(seeds: int) -> Work:
    """Blind re-rolls: the goal is edited `seeds` times from the source, each with another noise, and the one that the
    reasoner scores highest is returned. Its verdict is not looked at, and the time of it does not count."""

    def run(body: Body, task: Task) -> Record:
        request = body.request(task, max_rounds=seeds)
        reasoner = body.reasoner.bound(seed=request.seed)
        trace, marks, error = EditTrace(request), [], None
        try:
            trace = replace(trace, thought=reasoner.think(request.image, request.instruction))
            target = reasoner.describe(request.image, trace.goal, original=request.instruction)
            trace = replace(trace, target=target)
            for number in range(seeds):
                rng = torch.Generator().manual_seed(request.seed + number)
                edited = body.generator.edit(request, request.image, trace.goal, rng)
                seen = Round(number, trace.goal, None, edited)
                trace = replace(trace, rounds=(*trace.rounds, seen))
                marks.append((number, False, strands.spent()))
                found = reasoner.reflect(request.image, edited.image, trace.goal, target, original=request.instruction)
                trace = replace(trace, rounds=(*trace.rounds[:-1], replace(seen, reflection=found)))
                marks.append((number, True, _without(strands.spent(), "reflect")))
        except ReasonEditError as fault:
            if isinstance(fault, Interrupted):
                raise
            error = str(fault)
        return _record(body, task, trace, _highest(trace), marks, error)

    return run


def _highest(trace: EditTrace) -> list[int | None]:
    """Per number of rolls the one with the highest score; the earlier of equals. One that was not scored loses."""
    scores = [-1.0 if made.reflection is None else score(made.reflection) for made in trace.rounds]
    return [max(range(n + 1), key=lambda at: (scores[at], -at)) for n in range(len(scores))]


def _trace_of(fault: ReasonEditError) -> EditTrace:
    """What was made before the fault. One without a trace, or that somebody asked for, is raised."""
    trace = getattr(fault, "trace", None)
    if trace is None or isinstance(fault, Interrupted):
        raise fault
    return trace


def _without(found: dict[str, float], task: str) -> dict[str, float]:
    return {name: seconds for name, seconds in found.items() if name != task}


# ---- records -------------------------------------------------------------------------------------------------------------


def _record(
    body: Body,
    task: Task,
    trace: EditTrace,
    best: list[int | None],
    marks: list[tuple[int, bool, dict[str, float]]],
    error: str | None,
) -> Record:
    edited = {number: found for number, judged, found in marks if not judged}
    reflected = {number: found for number, judged, found in marks if judged}
    return {
        "key": task.key,
        "thought": trace.thought and trace.thought.instruction,
        "target": trace.target,
        "rounds": [
            _round_record(body, task, made, edited.get(made.index, {}), reflected.get(made.index)) for made in trace.rounds
        ],
        "best": best,
        "source": judged(task, trace.request.image),
        "spent": rounded(strands.spent()),
        "stop": trace.stop_reason,
        "error": error,
    }


def _round_record(body: Body, task: Task, made: Round, edited: dict[str, float], reflected: dict[str, float] | None) -> Record:
    """judged: of the picture; spent_edit, spent: seconds of work by task up to the edit, and up to its reflection."""
    found = made.reflection
    record = {
        "instruction": made.instruction,
        "input": made.input_index,
        "judged": judged(task, made.image),
        "spent_edit": rounded(edited),
        "spent": rounded(edited if reflected is None else reflected),
        "decision": None,
    }
    if found is not None:
        record |= {
            "decision": found.decision.value,
            "believed": believed(found, body.policy),
            "score": round(score(found), 6) if found.scores.asked else None,
            "consistency": found.scores.consistency,
            "reason": found.reason,
            "second": found.instruction,
        }
    return record


def judged(task: Task, picture: torch.Tensor) -> dict[str, Any]:
    """The exact judge on a picture (1, 3, H, W) in 0..1, for a task."""
    return marks_of(judge(task.item.source, task.item.target, pixels(picture)))


def marks_of(found: Judgement) -> dict[str, Any]:
    """A judgement as a record holds it."""
    return {
        "overall": round(found.overall, 6),
        "success": round(found.success, 6),
        "preservation": round(found.preservation, 6),
        "quality": round(found.quality, 6),
        "done": found.done,
        "exact": found.exact,
    }


def rounded(found: Mapping[str, float]) -> dict[str, float]:
    """Seconds as a record holds them."""
    return {name: round(seconds, 5) for name, seconds in found.items()}


# ---- views ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one row of a table counts of one item. marks: as `marks_of`; seconds: of work."""

    marks: Mapping[str, Any]
    seconds: float


View = Callable[[Record], Outcome]


def first_edit(record: Record) -> Outcome:
    """The first picture as it came, without any reflection; the time of thinking and of the edit."""
    if not record["rounds"]:
        return Outcome(record["source"], _total(record["spent"], "think", "edit"))
    first = record["rounds"][0]
    return Outcome(first["judged"], _total(first["spent_edit"], "think", "edit"))


def best_of(rounds: int | None = None) -> View:
    """The picture that is returned after at most `rounds` edits; None: all that were made."""

    def view(record: Record) -> Outcome:
        made = record["rounds"][:rounds]
        if not made:
            return Outcome(record["source"], _total(record["spent"]))
        best = record["best"][len(made) - 1]
        return Outcome(record["source"] if best is None else made[best]["judged"], _total(made[-1]["spent"]))

    return view


def _total(spent: Mapping[str, float], *tasks: str) -> float:
    return sum(seconds for name, seconds in spent.items() if not tasks or name in tasks)
