"""Reflect: the reasoner looks at a result, scores it and decides."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from ..reasonedit_core import loop
from ..reasonedit_core.errors import MalformedReply
from ..reasonedit_core.interfaces import Reasoner
from ..reasonedit_core.types import Policy, Reflection
from . import host
from .host import HistorySocket, ReasonerSocket, VerdictSocket, io
from .sockets import History, ReasonerHandle, Verdict, to_picture
from .think import require
from .widgets import no_text, policy_input, scores_input, seed_input


def judge(
    reasoner: ReasonerHandle,
    source: torch.Tensor,
    edited: torch.Tensor,
    goal: str,
    *,
    original: str = "",
    target: str = "",
    history: History | None = None,
    policy: str = "reasonedit",
    seed: int = 0,
    lazy: bool = False,
    on_text: Callable[[str, str], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Verdict:
    """The verdict on `edited`. source, edited: IMAGEs of one picture. lazy: ask for the scores that compare rounds only where
    the result is neither accepted, by the policy's own measure of doubt, nor failed.

    Within a run (history) its goal, its user's words and its description of the target are kept, unless it thought again.
    There a reply that cannot be read makes a verdict without a reflection, so that the rounds already paid for are kept;
    alone (history None) it raises MalformedReply.
    """
    alone, history = history is None, history or ()
    if history:
        last = history[-1].verdict
        original = last.original
        if history[-1].rethink is None:
            goal, target = last.goal, last.target
    before, after = to_picture(source, "source"), to_picture(edited, "edited")
    asked = require(reasoner).under(policy, history).bound(seed=seed, on_text=on_text, should_stop=should_stop)
    reasoner.expect()
    started, original = time.monotonic(), original or goal
    reflection, problem = None, ""
    try:
        target = target or asked.describe(before, goal, original=original)
        reflection = _reflected(asked, before, after, goal, target, original, loop.POLICIES[policy], lazy)
    except MalformedReply as error:
        if alone:
            raise
        problem = str(error)
    return Verdict(reflection, goal, original, target, before, time.monotonic() - started, problem)


def _reflected(
    asked: Reasoner,
    before: torch.Tensor,
    after: torch.Tensor,
    goal: str,
    target: str,
    original: str,
    policy: Policy,
    lazy: bool,
) -> Reflection:
    if not lazy or policy.released:
        return asked.reflect(before, after, goal, target, original=original)
    seen = asked.reflect(before, after, goal, target, original=original, scores=False)
    if seen.scores.asked or not loop.may_stand(seen) or loop.believed(seen, policy):
        return seen
    ((edit, quality),) = asked.grade(before, [(after, goal, target)], original=original)
    return replace(seen, scores=replace(seen.scores, edit=edit, quality=quality, asked=True))


def words(reflection: Reflection | None, accepted: bool, problem: str = "") -> str:
    """A verdict in a few lines."""
    if reflection is None:
        return f"not judged: {problem or 'the reply could not be read'}"
    s = reflection.scores
    named = (("edit", s.edit), ("quality", s.quality), ("consistency", None if s.consistency is None else (s.consistency,)))
    parts = [f"{name} {' and '.join(f'{value:g}' for value in values)}" for name, values in named if values is not None]
    lines = [reflection.decision.value + ("" if accepted or reflection.decision != "success" else " (not believed)")]
    parts += [] if s.asked else ["edit and quality not asked for"]
    lines += [", ".join(parts)] if parts else []
    lines += [reflection.reason] if reflection.reason else []
    lines += [f"Next: {reflection.instruction}"] if reflection.instruction else []
    return "\n".join(lines)


class Reflect(io.ComfyNode):
    """Judge an edited picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonEdit_Reflect",
            display_name="Reflect (ReasonEdit)",
            category=host.ROOT,
            description="The reasoner compares a result with the goal: it scores the edit, its quality and its agreement with "
            "a description of the target, and decides success, refine or failed. Works on any two pictures.",
            inputs=[
                ReasonerSocket.Input("reasoner", tooltip="From Load Editor or Load Reasoner."),
                io.Image.Input("source", tooltip="The picture before any edit. One picture."),
                io.Image.Input("edited", tooltip="The picture to judge. One picture."),
                io.String.Input(
                    "goal", multiline=True, default="", tooltip="What should be seen: Think's goal, or your instruction."
                ),
                seed_input("Counts where the dialogue samples. Inside a loop leave it the same in all rounds."),
                policy_input(),
                io.String.Input(
                    "original",
                    optional=True,
                    default="",
                    multiline=True,
                    tooltip="Your own words, where the goal is what Think made of them: they stand beside it for the judge.",
                ),
                io.String.Input(
                    "target",
                    optional=True,
                    default="",
                    multiline=True,
                    tooltip="A description of the picture that should result. Empty: the reasoner writes it first.",
                ),
                HistorySocket.Input(
                    "history",
                    optional=True,
                    tooltip="Inside a loop: the history of Loop Open. Goal, your own words and the description are then those "
                    "of the first round.",
                ),
                scores_input(),
            ],
            outputs=[
                VerdictSocket.Output("verdict", display_name="verdict", tooltip="For Loop Close."),
                io.String.Output(
                    "next_instruction",
                    display_name="next instruction",
                    tooltip="What a further edit should do; empty unless the decision is refine.",
                ),
                io.Float.Output(
                    "score",
                    display_name="score",
                    tooltip="0 to 10: the geometric mean of the lower edit score, the lower quality score and the consistency.",
                ),
                io.Boolean.Output(
                    "accepted", display_name="accepted", tooltip="Whether the result is a success that is believed."
                ),
                io.String.Output("text", display_name="text", tooltip="The verdict in words."),
            ],
            hidden=host.WHO,
        )

    @classmethod
    def validate_inputs(cls, goal) -> bool | str:
        """An empty goal, before the run. A linked text is not known yet."""
        return no_text("goal", goal, "what should be seen", "Write it, or wire Think's goal to it.")

    @classmethod
    def execute(
        cls, reasoner, source, edited, goal, seed, policy, original="", target="", history=None, scores="always"
    ) -> io.NodeOutput:
        """Judge."""
        watch = host.Watch(cls.hidden)
        with host.cancellable(cls.hidden, "Reflect"):
            verdict = judge(
                reasoner,
                source,
                edited,
                goal,
                original=original,
                target=target,
                history=history,
                policy=policy,
                seed=seed,
                lazy=scores == "lazy",
                on_text=watch.on_text,
                should_stop=host.should_stop,
            )
        reflection = verdict.reflection
        accepted = reflection is not None and loop.believed(reflection, loop.POLICIES[policy])
        text = words(reflection, accepted, verdict.problem)
        watch.show(text)
        following, points = ("", 0.0) if reflection is None else (reflection.instruction or "", loop.score(reflection))
        return io.NodeOutput(verdict, following, points, accepted, text)
