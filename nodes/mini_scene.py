"""Mini Scene: a drawn scene with an instruction, as a source for the miniature weights."""

from __future__ import annotations

from . import host
from .host import io
from .sockets import to_image
from .widgets import seed_input

KINDS = (
    "abstract",
    "factual",
    "conceptual",
    "procedural",
    "physical",
    "temporal",
    "causal",
    "story",
    "concrete",
    "compound",
    "recolour",
    "resize",
    "state",
    "label",
    "add",
    "remove",
    "move",
    "replace",
    "background",
)
"""What the world's items can be asked for (`mini.items.ITEM_KINDS`), written down here so that listing costs no import."""

LANGUAGES = {"english": "en", "chinese": "zh"}


class MiniScene(io.ComfyNode):
    """Draw a scene."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonEdit_MiniScene",
            display_name="Mini Scene (ReasonEdit)",
            category=host.ROOT,
            description="Draws a scene of the miniature world and asks something of it: a picture and an instruction for "
            "mini-s and mini-q, which edit such scenes only. Their training has never seen what this node draws.",
            inputs=[
                seed_input("Another seed draws another scene and another instruction."),
                io.Combo.Input(
                    "kind",
                    list(KINDS),
                    default="abstract",
                    tooltip="What is asked for. abstract: something that has to be thought about, by the kind of knowledge "
                    "(factual, conceptual, procedural) or by the kind of change (physical, temporal, causal, story). concrete: "
                    "something to be painted as it is said; compound: two at once; the rest: one of a kind.",
                ),
                io.Combo.Input("language", list(LANGUAGES), default="english", tooltip="The language of the instructions."),
            ],
            outputs=[
                io.Image.Output("image", display_name="image", tooltip="The scene, 96 x 96 pixels."),
                io.String.Output("instruction", display_name="instruction", tooltip="What is asked, in a user's words."),
                io.String.Output(
                    "concrete",
                    display_name="concrete",
                    tooltip="What that means, in plain words: what a faultless Think would say.",
                ),
                io.Image.Output("wanted", display_name="wanted", tooltip="The scene as it should be after the edit."),
            ],
        )

    @classmethod
    def execute(cls, seed, kind, language) -> io.NodeOutput:
        """Draw."""
        from ..reasonedit_core.mini.scenes import draw, held_out

        item = held_out(seed, kind, LANGUAGES[language])
        source, wanted = (to_image([draw(scene)]) for scene in (item.source, item.target))
        return io.NodeOutput(source, item.instruction, item.concrete, wanted)
