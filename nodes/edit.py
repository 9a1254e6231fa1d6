"""Edit: the generator follows an instruction."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch

from ..reasonedit_core import flow
from ..reasonedit_core.errors import ConfigError
from ..reasonedit_core.latents import unpack
from ..reasonedit_core.loop import POLICIES
from ..reasonedit_core.types import Edited, EditRequest
from . import host
from .host import EditedSocket, EditorSocket, io
from .sockets import EditorHandle, Made, alpha_of, to_image, to_pictures, to_regions, to_shortcuts
from .widgets import generation_inputs, policy_input, previous_input, region_inputs, seed_input, shortcut_inputs

log = logging.getLogger(__name__)


class Preview:
    """The core's `on_step`: one bar over several edits, and small pictures of where each step is heading.

    A step's latents still hold noise. What they head for follows from two of them in a row: on the way from x(a) to x(b) the
    velocity is their difference over b - a, and x(b) - b * velocity is the picture at noise 0.
    """

    def __init__(self, editor: EditorHandle, edits: int, steps: int) -> None:
        self._editor, self._steps, self._done = editor, steps, 0
        self._bar = host.StepBar(edits * steps)
        self._show = host.previewer(editor.system) if editor.latents == "released" else None  # others have other colours
        self._last: torch.Tensor | None = None

    def begin(self, request: EditRequest, picture: torch.Tensor, *, keep: bool = False, released: bool = False) -> None:
        """Say which edit comes next: its sizes give the shape of the latents."""
        plan = self._editor.expect(request, picture, keep=keep, released=released)
        self._grid = plan.grid
        self._sigmas = flow.sigmas(request.steps, self._grid[0] * self._grid[1], self._editor.generator.schedule)
        self._last = None

    def __call__(self, step: int, _steps: int, latents: torch.Tensor) -> None:
        """After one step. latents (1, T, C)."""
        self._done += 1
        picture = None
        if self._show is not None and self._last is not None:
            before, now = float(self._sigmas[step - 1]), float(self._sigmas[step])
            velocity = (latents.float() - self._last) / (now - before)
            picture = self._show(unpack(latents.float() - now * velocity, *self._grid))
        self._last = latents.float() if self._show is not None else None
        self._bar.update(self._done, picture)


def edit_all(
    editor: EditorHandle,
    image: torch.Tensor,
    instruction: str,
    *,
    seed: int,
    policy: str = "reasonedit",
    previous: Made | None = None,
    references: Sequence[torch.Tensor] = (),
    region: str = "off",
    region_mask: torch.Tensor | None = None,
    preview: Callable[[EditorHandle, int, int], Preview] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **values,
) -> Made:
    """Edit every picture of an IMAGE, each with its own seed (seed + its index). values: steps, guidance, size, negative, and
    what `to_shortcuts` gives.

    previous: what an earlier Edit made; its latents are used when `image` is its very picture. references: IMAGEs, of one
    picture for all or of one for each. region: off, auto or mask; region_mask: MASKs (B, H, W) for the last, as references.
    """
    rules, pictures = POLICIES[policy], to_pictures(image)
    earlier = previous.behind(image) if previous is not None else None
    regions = to_regions(region, region_mask, len(pictures))
    requests = [
        editor.request(
            picture,
            instruction,
            seed=seed + n,
            references=_references(references, n, len(pictures)),
            region=regions[n],
            **values,
        )
        for n, picture in enumerate(pictures)
    ]
    on_step = preview(editor, len(requests), requests[0].steps) if preview else None
    items: list[Edited] = []
    for n, request in enumerate(requests):
        before = earlier[n] if earlier else None
        if on_step is not None:
            chained = before is not None and not rules.released and before.latents is not None
            on_step.begin(request, before.generated if chained else request.image, keep=chained, released=rules.released)
        items.append(editor.edit(request, policy=rules, previous=before, on_step=on_step, should_stop=should_stop))
    return Made(to_image([item.image for item in items], alpha_of(image)), tuple(items))


def _references(images: Sequence[torch.Tensor], index: int, count: int) -> list[torch.Tensor]:
    found = []
    for number, image in enumerate(images, start=2):
        pictures = to_pictures(image, f"reference_{number}")
        if len(pictures) not in (1, count):
            raise ConfigError(
                f"reference_{number}: expected 1 picture or {count}, one for each picture to edit, found {len(pictures)}. Pick "
                "one."
            )
        found.append(pictures[index if len(pictures) == count else 0])
    return found


class Edit(io.ComfyNode):
    """Edit a picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            "ReasonEdit_Edit",
            display_name="Edit (ReasonEdit)",
            category=host.ROOT,
            description="Edits the picture as the instruction says, with ReasonEdit-S or ReasonEdit-Q. The result has the size "
            "of the picture; a batch is edited one by one.",
            inputs=[
                EditorSocket.Input("editor", tooltip="From Load Editor."),
                io.Image.Input("image", tooltip="The picture to edit. A fourth channel (alpha) is kept."),
                io.String.Input(
                    "instruction", multiline=True, default="", tooltip="What to change: Think's goal, or your words."
                ),
                seed_input(
                    "The noise of the first picture; the next of a batch takes seed + 1. Inside a loop: Loop Open's seed."
                ),
                *generation_inputs(),
                policy_input(),
                previous_input(),
                io.Image.Input(
                    "reference_2", optional=True, tooltip="A second picture to refer to (Qwen-Image-Edit-2509 and -2511 only)."
                ),
                io.Image.Input(
                    "reference_3", optional=True, tooltip="A third picture to refer to (Qwen-Image-Edit-2509 and -2511 only)."
                ),
                *region_inputs(),
                *shortcut_inputs(),
            ],
            outputs=[
                io.Image.Output("out_image", display_name="image", tooltip="The edited picture, of the size of the input."),
                EditedSocket.Output(
                    "edited", display_name="edited", tooltip="The same with its latents, for a further Edit or for Loop Close."
                ),
            ],
            hidden=host.WHO,
        )

    @classmethod
    def validate_inputs(cls, instruction) -> bool | str:
        """An empty text, before the run. What is named here loses ComfyUI's own check of its range."""
        if isinstance(instruction, str) and not instruction.strip():
            return "instruction: expected what to change, found an empty text. Write it, or wire Think's goal to it."
        return True

    @classmethod
    def execute(
        cls,
        editor,
        image,
        instruction,
        seed,
        steps,
        guidance,
        size,
        negative,
        policy,
        previous=None,
        reference_2=None,
        reference_3=None,
        region="off",
        region_mask=None,
        guidance_low=0.0,
        guidance_high=1.0,
        step_cache=0,
    ) -> io.NodeOutput:
        """Edit."""
        if previous is None and (remark := editor.remark(image)):
            log.warning("%s", remark)
            host.Watch(cls.hidden).show(remark)
        with host.cancellable(cls.hidden, "Edit"):
            made = edit_all(
                editor,
                image,
                instruction,
                seed=seed,
                policy=policy,
                previous=previous,
                references=[reference for reference in (reference_2, reference_3) if reference is not None],
                region=region,
                region_mask=region_mask,
                preview=Preview,
                should_stop=host.should_stop,
                steps=steps,
                guidance=guidance,
                size=size,
                negative=negative,
                **to_shortcuts(guidance_low, guidance_high, step_cache),
            )
        return io.NodeOutput(made.image, made)
