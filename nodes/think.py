"""Think: the user's words become an instruction that says what shall be seen."""

from __future__ import annotations

import torch

from ..reasonedit_core.errors import ConfigError
from ..reasonedit_core.types import Thought
from . import host
from .host import HistorySocket, ReasonerSocket, io
from .sockets import History, ReasonerHandle, to_picture
from .widgets import no_text, policy_input, seed_input


def require(reasoner: ReasonerHandle | None) -> ReasonerHandle:
    """The handle; ConfigError where a checkpoint's own MLLM cannot speak."""
    if reasoner is None:
        raise ConfigError(
            "reasoner: expected one that can speak, found a checkpoint whose text encoder has no lm_head. Wire a Load Reasoner "
            "node, or load a text encoder with lm_head."
        )
    return reasoner


def think_again(reasoner: ReasonerHandle, image: torch.Tensor, instruction: str, history: History, **run) -> Thought | None:
    """The thought of this round, or None when the instruction goes through as it is.

    image: IMAGE of one picture. run: seed, policy, on_text, should_stop.
    """
    if history and history[-1].rethink is None:
        return None
    policy = run.pop("policy")
    asked = require(reasoner).under(policy, history).bound(**run)
    reasoner.expect()
    if not history:
        return asked.think(to_picture(image), instruction)
    last = history[-1].verdict
    return asked.think(last.source, last.original, feedback=history[-1].rethink)


class Think(io.ComfyNode):
    """Think about an instruction."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonEdit_Think",
            display_name="Think (ReasonEdit)",
            category=host.ROOT,
            description="The reasoner looks at the picture and rewrites your words into what shall be seen: a concrete goal "
            "that an editor can follow. Works in front of any editor.",
            inputs=[
                ReasonerSocket.Input("reasoner", tooltip="From Load Editor or Load Reasoner."),
                io.Image.Input("image", tooltip="The picture to think about. One picture."),
                io.String.Input(
                    "instruction",
                    multiline=True,
                    default="",
                    tooltip="What you want, in your own words. Inside a loop: the instruction of Loop Open.",
                ),
                seed_input("Counts where the dialogue samples: most questions are answered greedily."),
                policy_input(),
                HistorySocket.Input(
                    "history",
                    optional=True,
                    tooltip="Inside a loop: the history of Loop Open. Think then thinks in the first round only, and again "
                    "when a Failed verdict asks for it.",
                ),
            ],
            outputs=[
                io.String.Output(
                    "goal", display_name="goal", tooltip="The instruction for Edit, and what Reflect judges against."
                ),
                io.String.Output("thought", display_name="thought", tooltip="All that was thought, as it came."),
            ],
            hidden=host.WHO,
        )

    @classmethod
    def validate_inputs(cls, instruction) -> bool | str:
        """An empty text, before the run. A linked text is not known yet."""
        return no_text("instruction", instruction, "what to change", "Write it, or wire a text to it.")

    @classmethod
    def execute(cls, reasoner, image, instruction, seed, policy, history=None) -> io.NodeOutput:
        """Think."""
        watch = host.Watch(cls.hidden)
        with host.cancellable(cls.hidden, "Think"):
            thought = think_again(
                reasoner,
                image,
                instruction,
                history or (),
                seed=seed,
                policy=policy,
                on_text=watch.on_text,
                should_stop=host.should_stop,
            )
        if thought is None:
            return io.NodeOutput(instruction, "")
        watch.show(thought.instruction)
        return io.NodeOutput(thought.instruction, thought.raw)
