"""What Loop Close and the auto loop have in common: their settings, their outputs, and the choice among finished rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from ..reasonedit_core.loop import POLICIES, believed
from ..reasonedit_core.types import EditTrace, Policy
from . import host
from .host import io
from .sockets import to_image

PICKS = ("best", "last", "last success")
ROUNDS_MAX = 8
"""Each round keeps its pictures and latents in memory until the host lets its outputs go."""


def settings_inputs() -> list[Any]:
    """The inputs that say how the loop decides, alike on Loop Close and on the auto loop. They may only be appended to."""
    return [
        io.Int.Input(
            "max_rounds",
            default=3,
            min=1,
            max=ROUNDS_MAX,
            tooltip="The largest number of edits, those of a continued history included.",
        ),
        io.Combo.Input(
            "policy",
            options=list(POLICIES),
            default="reasonedit",
            tooltip="reasonedit: ours, with the settings below. released: decide as the released Step1X-Edit v1p2 does; the "
            "settings below are then not used.",
        ),
        io.Combo.Input(
            "pick",
            options=list(PICKS),
            default="best",
            tooltip="Which picture is returned: the best round (the source, where every edit failed), the last round, or the "
            "last one that was judged a success (else the best).",
        ),
        io.Combo.Input(
            "on_failed",
            options=["rethink", "restart", "stop"],
            default="rethink",
            tooltip="After a Failed verdict: think again once, edit the source again with a new seed, or stop.",
        ),
        io.Combo.Input(
            "revise",
            options=["chain", "merge"],
            default="chain",
            tooltip="After a Refine verdict: edit the result further, or edit the source with both instructions together.",
        ),
        io.Float.Input(
            "accept",
            default=9.0,
            min=0.0,
            max=11.0,
            step=0.5,
            tooltip="Consistency score, 0 to 10, at which a Refine verdict stops too. 11: never.",
        ),
        io.Float.Input(
            "doubt",
            default=3.0,
            min=-1.0,
            max=10.0,
            step=0.5,
            tooltip="Consistency score, 0 to 10, under which a Success verdict is not believed. -1: always believed.",
        ),
        io.Float.Input(
            "max_seconds", default=0.0, min=0.0, max=86400.0, step=1.0, tooltip="No round starts after this time. 0: no limit."
        ),
    ]


def result_outputs() -> list[Any]:
    """The outputs of a finished loop, alike on Loop Close and on the auto loop. They may only be appended to."""
    return [
        io.Image.Output("o_image", display_name="image", tooltip="The picture that was picked."),
        io.Image.Output("all_rounds", display_name="all_rounds", tooltip="The pictures of all rounds, as one batch."),
        io.Int.Output("rounds", display_name="rounds", tooltip="How many rounds were made."),
        io.String.Output("report", display_name="report", tooltip="One line per round, and why the loop ended."),
        host.HistorySocket.Output("o_history", display_name="history", tooltip="All rounds, to be shown, saved or continued."),
    ]


def policy_of(policy: str, on_failed: str, revise: str, accept: float, doubt: float) -> Policy:
    """The core's policy for the widgets of a node."""
    named = POLICIES[policy]
    if named.released:
        return named
    # In a graph Reflect has asked for the scores before this policy is looked at.
    return replace(named, on_failed=on_failed, revise=revise, accept=accept, doubt=doubt, lazy_scores=False)


def picked(trace: EditTrace, policy: Policy, pick: str) -> int | None:
    """Index of the round to return, None for the source. trace: finished, so that `best` is set."""
    if pick == "last":
        return trace.rounds[-1].index
    if pick == "last success":
        good = [r.index for r in trace.rounds if r.reflection is not None and believed(r.reflection, policy)]
        return good[-1] if good else trace.best
    return trace.best


def all_rounds(trace: EditTrace, alpha: torch.Tensor | None = None) -> torch.Tensor:
    """The pictures of all rounds as one IMAGE, fitted to the first one's size: another editor may change it on the way."""
    pictures = [made.image for made in trace.rounds]
    size = pictures[0].shape[-2:]
    fitted = [p if p.shape[-2:] == size else F.interpolate(p, size, mode="bilinear", antialias=True) for p in pictures]
    return to_image(fitted, None if alpha is None else alpha.expand(len(fitted), -1, -1, -1))


def report_of(trace: EditTrace) -> str:
    """One line per round, and one for the result."""
    from ..reasonedit_core.run import outcome_line, round_line

    return "\n".join([*(round_line(made) for made in trace.rounds), outcome_line(trace)])
