"""Draft rounds: few steps, or a few-step LoRA, while the loop looks for the right instruction; then one full run of it.

Reflection judges drafts. When the loop has ended, the rounds that led to the chosen draft are made once more with all steps,
each with the noise of its draft, and the last of them is the result. It was not judged itself: what is good in a draft may
come out otherwise in full, which is the price of the time saved. Here are the pure functions of it; the loop makes the rounds.
"""

from __future__ import annotations

from dataclasses import replace

from .types import EditRequest, EditTrace, Round


def draft_request(request: EditRequest) -> EditRequest:
    """The request with the draft's steps and guidance; as it is where there is no draft."""
    draft = request.draft
    if draft is None:
        return request
    return replace(request, steps=draft.steps, guidance=request.guidance if draft.guidance is None else draft.guidance)


def drafts(trace: EditTrace) -> EditTrace:
    """The trace without full runs: what the loop decides by."""
    if all(made.full_of is None for made in trace.rounds):
        return trace
    return replace(trace, rounds=tuple(made for made in trace.rounds if made.full_of is None))


def full_run(trace: EditTrace, index: int | None) -> int | None:
    """The round that repeats round `index` with all steps; `index` itself where there is none."""
    return next((made.index for made in trace.rounds if index is not None and made.full_of == index), index)


def left_to_make(trace: EditTrace, best: int | None) -> list[Round]:
    """The drafts between the source and round `best`, in order, that have no full run yet."""
    path: list[Round] = []
    while best is not None and trace.rounds[best].full_of is None:
        path.insert(0, trace.rounds[best])
        best = trace.rounds[best].input_index
    return [draft for draft in path if full_run(trace, draft.index) == draft.index]
