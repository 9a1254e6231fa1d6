"""The whole loop in one node: the core's `think_edit_reflect` under ComfyUI's memory management, progress and cancel.

Fewer nodes and no wiring, and the right one where the host caches nothing; but no round is kept between two runs. For one
seed it makes the same pictures, bit for bit, as the same loop wired in a graph.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch

from ..reasonedit_core.errors import ReasonerError
from ..reasonedit_core.interfaces import Pair
from ..reasonedit_core.loop import think_edit_reflect
from ..reasonedit_core.types import Edited, EditRequest, EditTrace, Reflection, Thought
from . import host
from .edit import Preview
from .host import io
from .outcome import all_rounds, picked, policy_of, report_of, result_outputs, settings_inputs
from .sockets import EditorHandle, History, HistoryRound, ReasonerHandle, Verdict, alpha_of, to_image, to_picture, to_shortcuts
from .think import require
from .widgets import generation_inputs, no_text, scores_input, seed_input, shortcut_inputs

log = logging.getLogger(__name__)


class _Asked:
    """A `Reasoner` that says what memory each question needs before it is asked. feedback: what thinking again was told."""

    def __init__(self, handle: ReasonerHandle, inner: Any, feedback: list[str]) -> None:
        self._handle, self._inner, self._feedback = handle, inner, feedback

    def bound(self, **run) -> _Asked:
        """See `Reasoner`."""
        return _Asked(self._handle, self._inner.bound(**run), self._feedback)

    def think(self, image: torch.Tensor, instruction: str, *, feedback: str | None = None) -> Thought:
        """See `Reasoner`."""
        self._handle.expect()
        if feedback is not None:
            self._feedback.append(feedback)
        return self._inner.think(image, instruction, feedback=feedback)

    def describe(self, image: torch.Tensor, goal: str, *, original: str | None = None) -> str:
        """See `Reasoner`."""
        self._handle.expect()
        return self._inner.describe(image, goal, original=original)

    def reflect(self, *pictures_and_texts: Any, **more: Any) -> Reflection:
        """See `Reasoner`."""
        self._handle.expect()
        return self._inner.reflect(*pictures_and_texts, **more)

    def grade(self, *pictures_and_texts: Any, original: str | None = None) -> list[tuple[Pair, Pair]]:
        """See `Reasoner`."""
        self._handle.expect()
        return self._inner.grade(*pictures_and_texts, original=original)


class _Edits:
    """A `Generator` that shows each edit's progress; latents wait on the CPU between two rounds, as they do in a graph."""

    def __init__(self, editor: EditorHandle, preview: Preview) -> None:
        self._editor, self._preview = editor, preview

    def edit(
        self,
        request: EditRequest,
        picture: torch.Tensor,
        instruction: str,
        rng: torch.Generator,
        *,
        latents: torch.Tensor | None = None,
        released: bool = False,
        on_step=None,
        **more: Any,
    ) -> Edited:
        """See `Generator`."""
        self._preview.begin(request, picture, keep=latents is not None, released=released)
        made = self._editor.generator.edit(
            request,
            picture,
            instruction,
            rng,
            latents=None if latents is None else latents.to(self._editor.device),
            released=released,
            on_step=self._preview,
            **more,
        )
        return replace(made, latents=made.latents.to("cpu"))


class Rounds:
    """The core's `on_round`: notes what each round was judged against, which a thought given up later no longer tells."""

    def __init__(self) -> None:
        self._judged: dict[int, tuple[str, str | None]] = {}
        self.feedback: list[str] = []

    def __call__(self, trace: EditTrace) -> None:
        """After an edit, and again after its reflection."""
        self._judged[len(trace.rounds) - 1] = (trace.goal, trace.target)

    def history(self, trace: EditTrace) -> History:
        """The trace as a graph's history. Rounds without a reflection have none to show."""
        request, told, rounds = trace.request, iter(self.feedback), []
        for made in trace.rounds:
            goal, target = self._judged[made.index]
            verdict = Verdict(made.reflection, goal, request.instruction, target or "", request.image, made.seconds)
            again = self._judged.get(made.index + 1, (goal, target))[0] != goal
            rounds.append(HistoryRound(made.instruction, made.input_index, made.edited, verdict, next(told) if again else None))
        return tuple(rounds)


class AutoLoop(io.ComfyNode):
    """Think, edit and reflect until the picture is good."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonEdit_AutoLoop",
            display_name="Auto Loop (ReasonEdit)",
            category=host.ROOT,
            description="Thinks about the instruction, edits, judges the result and goes on until it is good: the whole "
            "loop in one node. With Loop Open and Loop Close you wire each step yourself, and finished rounds are kept.",
            inputs=[
                host.EditorSocket.Input("editor", tooltip="From Load Editor."),
                io.Image.Input("image", tooltip="The picture to edit. One picture; a fourth channel (alpha) is kept."),
                io.String.Input("instruction", multiline=True, default="", tooltip="What you want, in your own words."),
                seed_input("The noise of the first round; every further round adds one."),
                *generation_inputs(),
                io.Boolean.Input("think", default=True, tooltip="Think about the instruction first. Needs a reasoner."),
                io.Boolean.Input(
                    "reflect", default=True, tooltip="Judge each result; without it one edit is made. Needs a reasoner."
                ),
                *settings_inputs(),
                host.ReasonerSocket.Input(
                    "reasoner",
                    optional=True,
                    tooltip="From Load Editor or Load Reasoner. May stay open when think and reflect are off.",
                ),
                io.Image.Input("reference_2", optional=True, tooltip="A second picture (Qwen-Image-Edit-2509 and -2511 only)."),
                io.Image.Input("reference_3", optional=True, tooltip="A third picture (Qwen-Image-Edit-2509 and -2511 only)."),
                scores_input(),
                *shortcut_inputs(),
            ],
            outputs=result_outputs(),
            hidden=host.WHO,
        )

    @classmethod
    def validate_inputs(cls, instruction) -> bool | str:
        """An empty text, before the run. A linked text is not known yet."""
        return no_text("instruction", instruction, "what to change", "Write it, or wire a text to it.")

    @classmethod
    def execute(
        cls,
        editor: EditorHandle,
        image,
        instruction,
        seed,
        steps,
        guidance,
        size,
        negative,
        think,
        reflect,
        max_rounds,
        policy,
        pick,
        on_failed,
        revise,
        accept,
        doubt,
        max_seconds,
        reasoner=None,
        reference_2=None,
        reference_3=None,
        scores="always",
        guidance_low=0.0,
        guidance_high=1.0,
        step_cache=0,
    ) -> io.NodeOutput:
        """Run the core's loop."""
        rules, watch, rounds = policy_of(policy, on_failed, revise, accept, doubt), host.Watch(cls.hidden), Rounds()
        rules = replace(rules, lazy_scores=scores == "lazy" and not rules.released)
        if remark := editor.remark(image):
            log.warning("%s", remark)
        references = [to_picture(r, f"reference_{n}") for n, r in ((2, reference_2), (3, reference_3)) if r is not None]
        request = editor.request(
            to_picture(image, "Auto Loop, image"),
            instruction,
            seed=seed,
            steps=steps,
            guidance=guidance,
            size=size,
            negative=negative,
            references=references,
            max_rounds=max_rounds,
            max_seconds=max_seconds or None,
            think=think,
            reflect=reflect,
            **to_shortcuts(guidance_low, guidance_high, step_cache),
        )
        asked = _Asked(reasoner, require(reasoner).under(policy), rounds.feedback) if think or reflect else None
        try:
            with host.cancellable(cls.hidden, "Auto Loop"):
                trace = think_edit_reflect(
                    request,
                    reasoner=asked,
                    generator=_Edits(editor, Preview(editor, max_rounds, request.steps)),
                    policy=rules,
                    on_round=rounds,
                    on_text=watch.on_text,
                    should_stop=host.should_stop,
                )
        except ReasonerError as error:
            trace = error.trace
            if not trace.rounds:
                raise
            # What was paid for is returned; the report says why there is no more of it.
            log.warning("the loop ended after %d rounds: %s", len(trace.rounds), error)
            trace = replace(trace, stop_reason=str(error))
        index = picked(trace, rules, pick)
        report = report_of(replace(trace, best=index))
        watch.show("\n".join(filter(None, (report, remark))))
        alpha = alpha_of(image)
        chosen = image if index is None else to_image([trace.rounds[index].image], alpha)
        return io.NodeOutput(chosen, all_rounds(trace, alpha), len(trace.rounds), report, rounds.history(trace))
