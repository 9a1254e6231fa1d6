"""The closed loop in a graph: Loop Open, Loop Close and what happens between two rounds; and the loop in one node.

The artist wires Think, Edit and Reflect, or any other nodes, between Loop Open and Loop Close. When Loop Close runs, the
round is over: it asks the core's `next_step` what follows, and either returns the result or repeats the body (expand.py).

- A round edits the picture that the decision names, the source or an earlier round's, and `previous` hands its latents on.
- A Failed verdict may ask for thinking again. That needs Think inside the body, given Loop Open's `history`: the next round's
  Think finds the reason there. When the goal stays the same, the run ends with the rounds before; with Think's `goal` wired
  to Loop Close it does so before another edit is made.
- Limits, policy and pick sit on Loop Close, and what is decided travels as plain constants: changing them repeats no
  finished round unless the decision itself changes.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from ..reasonedit_core.errors import ConfigError
from ..reasonedit_core.loop import Step, Stop, finish, next_step, plain_words
from ..reasonedit_core.types import Edited, Policy
from . import expand, host
from .host import io
from .outcome import ROUNDS_MAX, all_rounds, picked, policy_of, report_of, result_outputs, settings_inputs
from .sockets import History, HistoryRound, Made, Verdict, alpha_of, foreign, to_image, to_picture, trace_of
from .widgets import no_text, seed_input

log = logging.getLogger(__name__)

_warned = False

CACHE_NONE = (
    "ReasonEdit: ComfyUI runs with --cache-none, where a loop in the graph {cost}. Use the node Auto Loop (ReasonEdit) in this "
    "mode, or start ComfyUI without --cache-none."
)

_OUTPUT = {"image": 0, "instruction": 1, "history": 2, "previous": 3}
"""Output indices of Advance by the input of Loop Open that each feeds."""


class LoopOpen(io.ComfyNode):
    """Where a round starts. The copies of later rounds get their values from Advance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See the class."""
        return io.Schema(
            node_id=expand.OPEN,
            display_name="Loop Open (ReasonEdit)",
            category=host.ROOT,
            description="Starts a round of think, edit, reflect. Wire what each round does between this node and Loop Close.",
            inputs=[
                io.Image.Input("image", tooltip="The source: one picture. Later rounds get the picture the loop chooses."),
                io.String.Input(
                    "instruction", multiline=True, default="", tooltip="What to change, in your own words, or Think's result."
                ),
                seed_input("Seed of the first round; every further round adds one. To Edit, by the output of that name."),
                host.HistorySocket.Input(
                    "history", optional=True, tooltip="Rounds of an earlier run, to be continued. Leave open for a new run."
                ),
                host.EditedSocket.Input(
                    "previous", optional=True, tooltip="Edit's `edited`, when the source itself was made by Edit just before."
                ),
            ],
            outputs=[
                host.FlowSocket.Output(
                    "flow", display_name="flow", tooltip="To Loop Close. Only marks where the round starts."
                ),
                io.Image.Output("o_image", display_name="image", tooltip="The picture to edit in this round."),
                io.String.Output(
                    "o_instruction", display_name="instruction", tooltip="The instruction of this round; yours in round 1."
                ),
                host.HistorySocket.Output(
                    "o_history", display_name="history", tooltip="The finished rounds. To Loop Close, and to Think and Reflect."
                ),
                io.Int.Output("round", display_name="round", tooltip="Number of finished rounds: 0 in the first round."),
                io.Int.Output("o_seed", display_name="seed", tooltip="seed + round. To Edit."),
                host.EditedSocket.Output(
                    "o_previous",
                    display_name="previous",
                    tooltip="What an earlier round made, with its latents. To Edit, so that chained edits lose no quality.",
                ),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
        )

    @classmethod
    def validate_inputs(cls, instruction) -> bool | str:
        """An empty text, before the run. A linked text is not known yet."""
        return no_text("instruction", instruction, "what to change", "Write it, or wire a text to it.")

    @classmethod
    def execute(cls, image, instruction, seed, history: History = (), previous: Made | None = None) -> io.NodeOutput:
        """Checks the picture and, in round 1, the wiring, before anything is paid for."""
        to_picture(image, "Loop Open, image")
        graph, me = cls.hidden.dynprompt, cls.hidden.unique_id
        history = history or ()
        if graph is not None and expand.decided_for(graph, me) is None:
            ends = expand.closing(graph, me)
            if ends:
                _check_host()
            for end in ends:
                expand.find_loop(graph, end)
            if history:
                step = continued(history)
                made = replace(history[-1], rethink=step.rethink)
                image, instruction, history, previous = _opened((*history[:-1], made), image, step)
        number = len(history)
        return io.NodeOutput(None, image, instruction, history, number, (seed + number) % 2**64, previous)


class LoopClose(io.ComfyNode):
    """Where a round ends: asks the core what follows, returns the result or repeats the body."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See the class."""
        return io.Schema(
            node_id=expand.CLOSE,
            display_name="Loop Close (ReasonEdit)",
            category=host.ROOT,
            description="Ends a round: stops with the chosen picture, or runs everything back to Loop Open once more.",
            inputs=[
                host.FlowSocket.Input("flow", tooltip="From Loop Open.", extra_dict={"rawLink": True}),
                io.Image.Input("image", lazy=True, tooltip="The picture that this round made."),
                host.VerdictSocket.Input("verdict", lazy=True, tooltip="What Reflect thinks of it."),
                host.HistorySocket.Input("history", tooltip="From the same Loop Open."),
                host.EditedSocket.Input(
                    "edited", optional=True, lazy=True, tooltip="From Edit: hands its latents on to the next round."
                ),
                io.String.Input(
                    "goal",
                    optional=True,
                    force_input=True,
                    tooltip="From Think, when Think stands inside the loop: lets a Failed verdict make it think once more.",
                ),
                *settings_inputs(),
            ],
            outputs=result_outputs(),
            hidden=[io.Hidden.unique_id, io.Hidden.dynprompt],
            enable_expand=True,
        )

    @classmethod
    def check_lazy_status(cls, history=None, goal=None, **given) -> list[str]:
        """Asks for the picture and the verdict, unless thinking again left the goal as it was."""
        if _thought_in_vain(history, goal):
            return []
        return [name for name in ("image", "verdict", "edited") if name in given and given[name] is None]

    @classmethod
    def execute(
        cls,
        flow,
        history: History,
        max_rounds: int,
        policy: str,
        pick: str,
        on_failed: str,
        revise: str,
        accept: float,
        doubt: float,
        max_seconds: float,
        image=None,
        verdict: Verdict | None = None,
        edited: Made | None = None,
        goal: str | None = None,
    ) -> io.NodeOutput:
        """One decision by the core, then the result or one more round."""
        graph, me = cls.hidden.dynprompt, cls.hidden.unique_id
        loop = expand.find_loop(graph, me)
        chosen = policy_of(policy, on_failed, revise, accept, doubt)
        thinks = goal is not None or expand.body_has(graph, loop, expand.THINK)
        limits = {"max_rounds": max_rounds, "max_seconds": max_seconds or None, "think": thinks}
        if _thought_in_vain(history, goal):
            # The last round asked for thinking again, and it led nowhere: the rounds before it are the run.
            return _result(trace_of(history, **limits), Stop("failed"), chosen, pick, history, loop.source)
        if _thought_in_vain(history, verdict.goal):  # known only now when `goal` is not wired
            return _result(trace_of(history, **limits), Stop("failed"), chosen, pick, history, loop.source)
        made_with, made_from = _made(loop, history, verdict)
        finished = HistoryRound(made_with, made_from, made_of(image, edited), verdict)
        rounds = (*history, finished)
        trace = trace_of(rounds, **limits)
        # A reply that could not be read is no verdict: the run ends with what it has.
        step = next_step(trace, chosen) if verdict.reflection is not None else Stop("unreadable reply")
        if isinstance(step, Stop):
            return _result(trace, step, chosen, pick, rounds, loop.source, alpha_of(image))
        constants: dict[str, str | int] = {
            "made_with": made_with,
            "made_from": _number(made_from),
            "instruction": step.instruction if step.rethink is None else verdict.original,
            "input_index": _number(step.input_index),
        }
        if step.rethink is not None:
            constants["rethink"] = step.rethink
        nodes, end = expand.next_round(
            graph,
            loop,
            len(rounds) + 1,
            constants=constants,
            carry=_OUTPUT,
            is_output=lambda node: host.is_output_node(graph.get_node(node)["class_type"]),
        )
        return io.NodeOutput(*([end, index] for index in range(len(result_outputs()))), expand=nodes)


class Advance(io.ComfyNode):
    """Between two rounds: appends the finished round to the history and gives the next one its picture and instruction."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See the class."""
        whole = {"min": -1, "max": ROUNDS_MAX, "default": -1}
        return io.Schema(
            node_id=expand.ADVANCE,
            display_name="Advance (ReasonEdit, internal)",
            category=f"{host.ROOT}/internal",
            description="Made by Loop Close between two rounds. Not meant to be placed by hand.",
            is_experimental=True,
            inputs=[
                io.Image.Input("image", tooltip="The picture of the finished round."),
                host.VerdictSocket.Input("verdict", tooltip="What Reflect thought of it."),
                host.HistorySocket.Input("history", tooltip="The rounds before it."),
                io.Image.Input("source", tooltip="The picture before any edit."),
                host.EditedSocket.Input("edited", optional=True, tooltip="What Edit made, with its latents."),
                io.String.Input("loop", default="", tooltip="Id of the Loop Close that the artist placed."),
                io.String.Input("made_with", default="", tooltip="The instruction of the finished round."),
                io.Int.Input("made_from", **whole, tooltip="The round whose picture it edited; -1 for the source."),
                io.String.Input("instruction", default="", tooltip="The instruction of the next round."),
                io.Int.Input("input_index", **whole, tooltip="The round whose picture is edited next; -1 for the source."),
                io.String.Input("rethink", optional=True, tooltip="Why Think is to think again."),
            ],
            outputs=[
                io.Image.Output("o_image", display_name="image", tooltip="The picture to edit next."),
                io.String.Output("o_instruction", display_name="instruction", tooltip="The next instruction."),
                host.HistorySocket.Output("o_history", display_name="history", tooltip="All finished rounds."),
                host.EditedSocket.Output("o_previous", display_name="previous", tooltip="That picture with its latents."),
            ],
        )

    @classmethod
    def execute(
        cls,
        image,
        verdict: Verdict,
        history: History,
        source,
        loop: str,
        made_with: str,
        made_from: int,
        instruction: str,
        input_index: int,
        edited: Made | None = None,
        rethink: str | None = None,
    ) -> io.NodeOutput:
        """Carries out what Loop Close decided."""
        finished = HistoryRound(made_with, _index(made_from), made_of(image, edited), verdict, rethink)
        return io.NodeOutput(*_opened((*history, finished), source, Step(instruction, _index(input_index))))


# ---- between two rounds --------------------------------------------------------------------------------------------------


def made_of(image: torch.Tensor, edited: Made | None) -> Edited:
    """The core's value for a round's IMAGE: with its latents when it is the very picture that Edit made."""
    items = edited.behind(image) if edited is not None else None
    return items[0] if items else foreign(to_picture(image, "Loop Close, image"))


def continued(history: History) -> Step:
    """What follows the rounds of an earlier run. ConfigError when that run had come to its end."""
    # The limits of this run sit on Loop Close; here only the verdicts count.
    step = next_step(trace_of(history, max_rounds=len(history) + 1, think=True))
    if isinstance(step, Stop):
        raise ConfigError(
            f"Loop Open: expected a history that can be continued, found {len(history)} rounds that ended with {step.reason}. "
            "Leave history open to start a new run, with the picture you want to go on from as image."
        )
    return step


def _opened(rounds: History, source: torch.Tensor, step: Step) -> tuple[torch.Tensor, str, History, Made | None]:
    if step.input_index is None:
        return source, step.instruction, rounds, None
    edited = rounds[step.input_index].edited
    image = to_image([edited.image], alpha_of(source))
    return image, step.instruction, rounds, None if edited.latents is None else Made(image, (edited,))


def _made(loop: expand.Loop, history: History, verdict: Verdict) -> tuple[str, int | None]:
    """The instruction of the round just finished, and the round whose picture it edited."""
    if loop.decided is not None:
        again = loop.decided.get("rethink") is not None
        return (verdict.goal if again else loop.decided["instruction"]), _index(loop.decided["input_index"])
    if history:
        step = continued(history)
        return (step.instruction if step.rethink is None else verdict.goal), step.input_index
    return verdict.goal, None


def _thought_in_vain(history: History | None, goal: str | None) -> bool:
    if not history or goal is None or history[-1].rethink is None:
        return False
    return plain_words(goal) == plain_words(history[-1].verdict.goal)


def _result(trace, stop: Stop, policy: Policy, pick: str, rounds: History, source: list, alpha=None) -> io.NodeOutput:
    trace = finish(trace, policy, stop.reason)
    index = picked(trace, policy, pick)
    others = (all_rounds(trace, alpha), len(trace.rounds), report_of(replace(trace, best=index)), rounds)
    if index is None:
        # By link, so that the very picture comes out that went in, its fourth channel included.
        return io.NodeOutput(source, *others, expand={})
    return io.NodeOutput(to_image([trace.rounds[index].image], alpha), *others)


def _number(index: int | None) -> int:
    return -1 if index is None else index


def _index(number: int) -> int | None:
    return None if number < 0 else number


def _check_host() -> None:
    global _warned
    if not host.caches_nothing():
        return
    if host.expansion_needs_cache():
        raise ConfigError(CACHE_NONE.format(cost="cannot run in this version"))
    if not _warned:
        _warned = True
        log.warning(CACHE_NONE.format(cost="runs its finished rounds again and again"))
