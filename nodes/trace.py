"""What a run leaves: a page to look at, a PNG that holds the whole trace, and reading it back."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from ..reasonedit_core import images, loop
from ..reasonedit_core.files import write_whole
from ..reasonedit_core.report import with_alpha
from ..reasonedit_core.types import EditTrace
from . import host, tracefile
from .folders import fingerprint
from .host import HistorySocket, io, ui
from .reflect import words
from .sockets import History, alpha_of, to_image, to_picture, trace_of
from .widgets import policy_input


def finished(history: History, policy: str) -> EditTrace:
    """The trace of a history with its best round chosen."""
    trace = trace_of(history)
    return replace(trace, best=loop.best_round(trace, loop.POLICIES[policy]))


def report(trace: EditTrace, policy: str) -> str:
    """All rounds in words."""
    rules = loop.POLICIES[policy]
    lines = [f"Goal: {trace.goal}", f"Target: {trace.target}"]
    for made in trace.rounds:
        before = "the source" if made.input_index is None else f"round {made.input_index + 1}"
        best = ", best" if made.index == trace.best else ""
        lines.append(f"\nRound {made.index + 1}{best}: {made.instruction} (from {before})")
        lines.append(words(made.reflection, made.reflection is not None and loop.believed(made.reflection, rules)))
    if trace.best is None:
        lines.append("\nNo round was an improvement: the source is the best picture.")
    return "\n".join(lines)


class ShowTrace(io.ComfyNode):
    """Show all rounds on one page."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonEdit_ShowTrace",
            display_name="Show Trace (ReasonEdit)",
            category=host.ROOT,
            description="Draws the source and every round with its instruction, verdict and scores on one page.",
            inputs=[
                HistorySocket.Input("history", tooltip="From Loop Close, Auto Loop or Load Trace."),
                policy_input(),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="The page as a picture."),
                io.String.Output("text", display_name="text", tooltip="All rounds in words."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, history, policy) -> io.NodeOutput:
        """Draw."""
        from ..reasonedit_core.sheet import draw_sheet

        trace = finished(history, policy)
        pictures = [images.to_pil(picture) for picture in (trace.request.image, *(made.image for made in trace.rounds))]
        sheet = to_image([images.from_pil(draw_sheet(trace, pictures))])
        text = report(trace, policy)
        shown = ui.PreviewImage(sheet).as_dict() | {"text": (text,)}
        return io.NodeOutput(sheet, text, ui=shown)


class SaveTrace(io.ComfyNode):
    """Save a picture with the run that led to it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonEdit_SaveTrace",
            display_name="Save Trace (ReasonEdit)",
            category=host.ROOT,
            description="Saves the result as PNG and puts the whole run into the file: every round's picture, latents, "
            "instruction and verdict, and the workflow. Load Trace reads it back.",
            inputs=[
                io.Image.Input("image", tooltip="The picture to save: the result of Loop Close or Auto Loop. One picture."),
                HistorySocket.Input("history", tooltip="From Loop Close or Auto Loop."),
                io.String.Input(
                    "filename_prefix", default="reasonedit/trace", tooltip="Folder and name below ComfyUI's output."
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="The file that was written.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, history, filename_prefix) -> io.NodeOutput:
        """Save."""
        to_picture(image)
        texts = {}
        if host.keeps_metadata():
            texts = {"prompt": json.dumps(cls.hidden.prompt)} if cls.hidden.prompt else {}
            texts |= {key: json.dumps(value) for key, value in (cls.hidden.extra_pnginfo or {}).items()}
        path, shown = host.output_file(filename_prefix, ".png")
        alpha = alpha_of(image)
        plane = None if alpha is None else alpha.movedim(-1, 1)
        picture = with_alpha(image[..., :3].movedim(-1, 1).clamp(0, 1), plane)
        write_whole(path, tracefile.encode(picture, history, texts))
        return io.NodeOutput(str(path), ui={"images": [shown]})


class LoadTrace(io.ComfyNode):
    """Read a run back."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonEdit_LoadTrace",
            display_name="Load Trace (ReasonEdit)",
            category=host.ROOT,
            description="Reads the run out of a PNG that Save Trace wrote, to look at it or to go on with it in a loop.",
            inputs=[
                io.Combo.Input(
                    "file",
                    host.input_names(".png"),
                    upload=io.UploadType.image,
                    image_folder=io.FolderType.input,
                    tooltip="A file of ComfyUI's input folder. Upload the one that Save Trace wrote.",
                ),
            ],
            outputs=[
                HistorySocket.Output("history", display_name="history", tooltip="All rounds, for Loop Open or Show Trace."),
                io.Image.Output("source", display_name="source", tooltip="The picture before any edit, for Loop Open."),
                io.String.Output("instruction", display_name="instruction", tooltip="The user's own words in that run."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file) -> bool | str:
        """A file that is gone, before the run. Also lets files of the output folder be named."""
        if isinstance(file, str) and not host.input_file(file).is_file():
            return f"file: expected a picture in ComfyUI's input folder, found no {file!r}. Upload the file again."
        return True

    @classmethod
    def fingerprint_inputs(cls, file) -> str:
        """Path, size and time of the file."""
        return fingerprint([host.input_file(file)])

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        """Read."""
        history = tracefile.decode(host.input_file(file))
        last = history[-1].verdict
        return io.NodeOutput(history, to_image([torch.clone(last.source)]), last.original)
