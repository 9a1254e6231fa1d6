"""Stand-ins for Think, Edit and Reflect, for tests of the loop only: a pack that a test copies into a host, or gives to the
runner of graph_runner.py. They paint flat pictures, keep count of themselves and can be slow or fail on purpose.
"""

from __future__ import annotations

import hashlib
import sys
import time

import torch
from comfy_api.latest import ComfyExtension, io

RUNS: list[tuple[str, str]] = []
"""(class, node id) of everything that ran, in order."""

ON_STEP: list = []
"""Under the double: called with the number of steps made so far, in place of the host's progress and interrupt."""

STEPS = 4
FAILING_SEED = 666
GAIN = 0.25

Verdict, Edited, History = (io.Custom(f"REASONEDIT_{name}") for name in ("VERDICT", "EDITED", "HISTORY"))


def ours(name: str):
    """A module of the pack under test, by whatever name the host has imported it."""
    return next(m for n, m in list(sys.modules.items()) if n.endswith(f".{name}") and "reasonedit" in n.lower())


class Think(io.ComfyNode):
    """Puts brackets around the text; with `history`, thinks in round 1 and when asked to, and hands through otherwise."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Test_Think",
            category="test",
            inputs=[
                io.Image.Input("image"),
                io.String.Input("instruction", force_input=True),
                History.Input("history", optional=True),
                io.Boolean.Input("stubborn", default=False, optional=True),
            ],
            outputs=[io.String.Output("concrete"), io.String.Output("goal")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, image, instruction, history=(), stubborn=False):
        RUNS.append(("Think", cls.hidden.unique_id))
        if history and history[-1].rethink is None:
            return io.NodeOutput(instruction, history[-1].verdict.goal)
        told = f" because {history[-1].rethink}" if history and not stubborn else ""
        return io.NodeOutput(f"[{instruction}{told}]", f"[{instruction}{told}]")


class Edit(io.ComfyNode):
    """Four steps that make the picture brighter, by an amount that depends on the seed if `noisy`."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Test_Edit",
            category="test",
            inputs=[
                io.Image.Input("image"),
                io.String.Input("instruction", force_input=True),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
                io.Float.Input("step_s", default=0.0, min=0.0, max=9.0),
                Edited.Input("previous", optional=True),
                io.Boolean.Input("noisy", default=False, optional=True),
            ],
            outputs=[io.Image.Output("edited"), Edited.Output("made")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, image, instruction, seed, step_s, previous=None, noisy=False):
        RUNS.append(("Edit", cls.hidden.unique_id))
        _steps(step_s, instruction, cls.hidden.unique_id)
        if seed == FAILING_SEED and image.mean() > 0.2:
            raise ValueError("made to fail")
        gain = torch.rand((), generator=torch.Generator().manual_seed(seed)) / 2 if noisy else GAIN
        latents = previous.items[0].latents + 1 if previous is not None else torch.ones(1, 1, 64)
        edited = torch.cat([(image[..., :3] + gain).clamp(0, 1), image[..., 3:]], -1)
        pixels = edited[..., :3].movedim(-1, 1)
        made = ours("nodes.sockets").Made(edited, (ours("reasonedit_core.types").Edited(pixels, pixels, latents),))
        return io.NodeOutput(edited, made)


class Reflect(io.ComfyNode):
    """Scores brightness; success from `target` on, failed below `failed_under`."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Test_Reflect",
            category="test",
            inputs=[
                io.Image.Input("source"),
                io.Image.Input("edited"),
                io.String.Input("instruction", force_input=True),
                io.Float.Input("target", default=0.7),
                io.Float.Input("failed_under", default=-1.0, optional=True),
                io.String.Input("original", default="words", optional=True),
                io.Float.Input("worse_from", default=9.0, optional=True),
            ],
            outputs=[Verdict.Output("verdict")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, source, edited, instruction, target, failed_under=-1.0, original="words", worse_from=9.0):
        RUNS.append(("Reflect", cls.hidden.unique_id))
        types = ours("reasonedit_core.types")
        bright = float(edited.mean())
        decision = "success" if bright >= target else "failed" if bright < failed_under else "refine"
        second = f"{instruction}+" if decision == "refine" else None
        score = 10 * bright if bright < worse_from else 0.5
        reflection = types.Reflection(types.Decision(decision), "dark", second, types.Scores((score, 10.0), (10.0, 10.0)))
        first = source[:1, ..., :3].movedim(-1, 1)
        return io.NodeOutput(ours("nodes.sockets").Verdict(reflection, instruction, original, "bright", first))


class Judge(io.ComfyNode):
    """Verdicts from a list, one per round: `decision score consistency`, separated by commas; the last one repeats."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Test_Judge",
            category="test",
            inputs=[
                io.Image.Input("source"),
                io.Image.Input("edited"),
                io.String.Input("goal", force_input=True),
                History.Input("history"),
                io.String.Input("verdicts"),
            ],
            outputs=[Verdict.Output("verdict")],
        )

    @classmethod
    def execute(cls, source, edited, goal, history, verdicts):
        if history and history[-1].rethink is None:
            goal = history[-1].verdict.goal
        first = source[..., :3].movedim(-1, 1)
        seen = verdict_of(verdicts, len(history), goal)
        return io.NodeOutput(ours("nodes.sockets").Verdict(seen, goal, "words", "bright", first))


def verdict_of(verdicts: str, index: int, goal: str):
    """The core's Reflection for a round of Judge's list; `unread` stands for a reply that could not be read."""
    types, listed = ours("reasonedit_core.types"), verdicts.split(",")
    decision, score, consistency = listed[min(index, len(listed) - 1)].split()
    if decision == "unread":
        return None
    second = f"{goal} {score}" if decision == "refine" else None
    scores = types.Scores((float(score), 10.0), (10.0, 10.0), float(consistency), "unlike its description")
    return types.Reflection(types.Decision(decision), f"why {index}", second, scores)


class Show(io.ComfyNode):
    """An output node: the mean brightness of each picture, and a text."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Test_Show",
            category="test",
            is_output_node=True,
            inputs=[
                io.Image.Input("image"),
                io.String.Input("text", force_input=True, optional=True),
                io.Int.Input("number", force_input=True, optional=True),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, image, text="", number=0):
        RUNS.append(("Show", cls.hidden.unique_id))
        means = [round(float(p.mean()), 4) for p in image]
        digest = hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()
        return io.NodeOutput(ui={"means": means, "text": [text], "number": [number], "sha256": [digest]})


class Keep(io.ComfyNode):
    """An output node that gives back the values themselves; for the double only."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Test_Keep",
            category="test",
            is_output_node=True,
            inputs=[io.Image.Input("image"), History.Input("history"), io.String.Input("report", force_input=True)],
            outputs=[],
        )

    @classmethod
    def execute(cls, **values):
        return io.NodeOutput(ui=values)


class Paint(io.ComfyNode):
    """A flat picture, or a batch of them."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Test_Paint",
            category="test",
            inputs=[
                io.Float.Input("value", default=0.0),
                io.Int.Input("count", default=1, min=1, max=9),
                io.Int.Input("channels", default=3, min=3, max=4),
                io.Int.Input("height", default=32, optional=True),
                io.Int.Input("width", default=32, optional=True),
            ],
            outputs=[io.Image.Output("image")],
        )

    @classmethod
    def execute(cls, value, count, channels, height=32, width=32):
        return io.NodeOutput(torch.full((count, height, width, channels), value))


NODES = (Think, Edit, Reflect, Judge, Show, Keep, Paint)


def _steps(seconds: float, instruction: str, node_id: str) -> None:
    if ON_STEP:
        for _ in range(STEPS):
            ON_STEP[0]()
        return
    import comfy.utils
    from comfy.model_management import throw_exception_if_processing_interrupted
    from PIL import Image
    from server import PromptServer

    bar = comfy.utils.ProgressBar(STEPS)
    for step in range(STEPS):
        throw_exception_if_processing_interrupted()
        time.sleep(seconds)
        bar.update_absolute(step + 1, STEPS, ("JPEG", Image.new("RGB", (16, 16)), 64))
    PromptServer.instance.send_progress_text(instruction, node_id)


def _add_route() -> None:
    """GET /reasonedit_test/runs: what ran since the last time it was asked for."""
    from aiohttp import web
    from server import PromptServer

    @PromptServer.instance.routes.get("/reasonedit_test/runs")
    async def runs(_request):
        told = list(RUNS)
        RUNS.clear()
        return web.json_response(told)


class FakeBody(ComfyExtension):
    """The pack."""

    async def get_node_list(self):
        """Its nodes."""
        return list(NODES)


async def comfy_entrypoint():
    """Called by the host."""
    _add_route()
    return FakeBody()
