"""What travels on the pack's wires: frozen values, and the conversions between ComfyUI's IMAGE and the core's pictures.

Imports no ComfyUI, so that scripts and tests can use it; the socket types themselves are made in `host` from the names here.

    REASONEDIT_REASONER   ReasonerHandle
    REASONEDIT_EDITOR     EditorHandle
    REASONEDIT_EDITED     Made        what Edit made, with its latents: chained rounds hand these on
    REASONEDIT_VERDICT    Verdict     what Reflect thinks of it
    REASONEDIT_HISTORY    History     a tuple of HistoryRound, () before the first round
    REASONEDIT_FLOW       None        only its link matters: it ties LoopClose to its LoopOpen

IMAGE is (B, H, W, 3 or 4) in 0..1; the core's picture is (1, 3, H, W) in 0..1. Nothing in a value is changed once it is made.

How a graph repeats what `loop.think_edit_reflect` does, bit for bit:
- Edit gets the picture of the round as IMAGE and the round it came from as `previous` (a Made, or None for the source). The
  latents in it are used exactly when the IMAGE is the very picture that was made.
- Think may stand inside the loop: it is given `history`, thinks in round 1, hands its instruction through afterwards, and
  thinks again when the last round says so (`HistoryRound.rethink`).
- Reflect describes the target once per goal: it is given `history` and takes the description from there.
- `trace_of(history)` is the core's EditTrace, which `next_step` and `best_round` are asked with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from einops import rearrange

from ..reasonedit_core.errors import ConfigError
from ..reasonedit_core.regions import GuidanceInterval, Region, StepCache
from ..reasonedit_core.types import (
    Edited,
    EditRequest,
    EditTrace,
    OnStep,
    Policy,
    Reflection,
    Round,
    ShouldStop,
    Thought,
)

if TYPE_CHECKING:
    from ..reasonedit_core.dialogue.pack import Pack
    from ..reasonedit_core.generator import FlowGenerator, Plan
    from ..reasonedit_core.interfaces import Reasoner, Speaker
    from ..reasonedit_core.mllm.qwen25vl import QwenVL
    from .memory import ComfyMover

REASONER = "REASONEDIT_REASONER"
EDITOR = "REASONEDIT_EDITOR"
EDITED = "REASONEDIT_EDITED"
VERDICT = "REASONEDIT_VERDICT"
HISTORY = "REASONEDIT_HISTORY"
FLOW = "REASONEDIT_FLOW"
LORAS = "REASONEDIT_LORAS"

STEP1X = "reasonedit-s"


# ---- values --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA file and its strength. A stack of them is a tuple, in the order in which they are applied."""

    path: Path
    strength: float


@dataclass(frozen=True, slots=True)
class Script:
    """Recorded replies by task. A graph asks for them by their place in the history, so that a cached round uses none up."""

    replies: Mapping[str, tuple[str, ...]]

    def speaker(self, thoughts: int, rounds: int) -> Speaker:
        """A speaker whose first reply is that of the given thought (think, describe) or round (all other tasks)."""
        from ..reasonedit_core.reasoners.scripted import ScriptedSpeaker

        places = {"think": thoughts, "describe": thoughts}
        return ScriptedSpeaker({task: texts[places.get(task, rounds) :] for task, texts in self.replies.items()})


@dataclass(frozen=True, slots=True, eq=False)
class ReasonerHandle:
    """A reasoner that is ready to be asked: a dialogue pack and who speaks. Its weights are moved by ComfyUI when it does.

    mllm, mover: None where it does not run in this process. origin: which pack it is. notes: sentences for the user.
    """

    name: str
    pack: Pack
    speaker: Speaker | Script
    mllm: QwenVL | None = None
    mover: ComfyMover | None = None
    origin: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def under(self, policy: str, history: History = ()) -> Reasoner:
        """The reasoner of a policy (`reasonedit` or `released`) that goes on after `history`."""
        from ..reasonedit_core.reasoners.reasoner import PackReasoner

        speaker, released = self.speaker, policy == "released"
        if isinstance(speaker, Script):
            speaker = speaker.speaker(sum(made.rethink is not None for made in history), len(history))
        return PackReasoner(self.pack, speaker, paired=released, released=released)

    def expect(self) -> None:
        """Say what memory one question to the MLLM needs beside its weights."""
        if self.mover is not None:
            from .memory import reasoner_bytes

            self.mover.need("mllm", reasoner_bytes(self.mllm))


@dataclass(frozen=True, slots=True, eq=False)
class EditorHandle:
    """An editor that is ready to edit. Its weights are moved by ComfyUI when it runs.

    system: `reasonedit-s` or `reasonedit-q`. defaults: the checkpoint's steps, guidance and size_level, taken where a value
    of a node is 0. device: where it computes. pictures, latents: what the checkpoint states of itself (`settings.Settings`).
    """

    name: str
    system: str
    generator: FlowGenerator
    defaults: Mapping[str, Any]
    mllm: QwenVL
    mover: ComfyMover
    device: torch.device
    notes: tuple[str, ...] = ()
    pictures: str = "any"
    latents: str = "released"

    def remark(self, image: torch.Tensor) -> str:
        """What to tell the user about an IMAGE before it is edited; "" where there is nothing to say."""
        if self.pictures == "any":
            return ""
        from ..reasonedit_core.mini.scenes import picture_remark

        remarks = [picture_remark(self.pictures, picture) for picture in to_pictures(image)]
        return next((remark for remark in remarks if remark), "")

    def request(
        self,
        image: torch.Tensor,
        instruction: str,
        *,
        seed: int,
        steps: int = 0,
        guidance: float = 0.0,
        size: int = 0,
        negative: str = "",
        references: Sequence[torch.Tensor] = (),
        **loop: Any,
    ) -> EditRequest:
        """The core's request for a picture (1, 3, H, W). 0 and "" stand for the checkpoint's own. loop: further fields."""
        if references and self.system == STEP1X:
            raise ConfigError(
                f"reference_2, reference_3: expected none, as ReasonEdit-S edits one picture; found {len(references)}. Remove "
                "their wires, or load a Qwen-Image-Edit-2509 or -2511 checkpoint."
            )
        return EditRequest(
            image,
            instruction,
            seed=seed % 2**64,
            steps=steps or self.defaults["steps"],
            guidance=guidance or self.defaults["guidance"],
            size_level=size or self.defaults["size_level"],
            negative=negative or None,
            references=tuple(references),
            **loop,
        )

    def expect(self, request: EditRequest, picture: torch.Tensor, *, keep: bool = False, released: bool = False) -> Plan:
        """The sizes of an edit of `picture`; says on the way what memory each component needs beside its weights."""
        from .memory import editor_bytes

        sizes = [(p.shape[-1], p.shape[-2]) for p in (picture, *request.references)]
        plan = self.generator.geometry.plan(sizes, request.size_level, keep=keep, released=released)
        for component, needed in editor_bytes(self, plan, request).items():
            self.mover.need(component, needed)
        return plan

    def edit(
        self,
        request: EditRequest,
        *,
        policy: Policy,
        previous: Edited | None = None,
        on_step: OnStep | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Edited:
        """One edit, of the request's image or of `previous`, as the core's loop makes it. Its latents come back on the CPU."""
        picture, latents = request.image, None
        if previous is not None and not policy.released and previous.latents is not None:
            picture, latents = previous.generated, previous.latents.to(self.device)
        self.expect(request, picture, keep=latents is not None, released=policy.released)
        rng = torch.Generator().manual_seed(request.seed)
        made = self.generator.edit(
            request,
            picture,
            request.instruction,
            rng,
            latents=latents,
            released=policy.released,
            source_size=policy.source_size,
            on_step=on_step,
            should_stop=should_stop,
        )
        return replace(made, latents=made.latents.to("cpu"))


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """What one Edit node made. image: the IMAGE it gave out, (B, H, W, 3 or 4); items: one Edited per picture of it."""

    image: torch.Tensor
    items: tuple[Edited, ...]

    def behind(self, image: torch.Tensor) -> tuple[Edited, ...] | None:
        """The items when `image` is this very picture; None when something was done to it in between."""
        same = image is self.image or (image.shape == self.image.shape and torch.equal(image, self.image))
        return self.items if same else None


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """What Reflect made of one picture.

    goal: what it was judged against; original: the user's own words; target: the description of the picture that should
    result; source: (1, 3, H, W) the picture before any edit. reflection: None when the replies could not be read; `problem`
    then says why, and a loop ends with the rounds it has.
    """

    reflection: Reflection | None
    goal: str
    original: str
    target: str
    source: torch.Tensor
    seconds: float = 0.0
    problem: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class HistoryRound:
    """One finished round. instruction: what was edited with; input_index: the round whose picture was edited, None for the
    source; rethink: when set, the next round's Think thinks again, with this as feedback."""

    instruction: str
    input_index: int | None
    edited: Edited
    verdict: Verdict
    rethink: str | None = None


History = tuple[HistoryRound, ...]


def trace_of(
    history: History, *, max_rounds: int = 3, max_seconds: float | None = None, think: bool | None = None
) -> EditTrace:
    """The core's trace of a history that holds at least one round. think: whether a Think node can think again."""
    if not history:
        raise ConfigError("expected a history with at least one round, found an empty one. Wire it from a Loop Close node.")
    last = history[-1].verdict
    goals = [made.verdict.goal for made in history]
    thought = any(goal != last.original for goal in goals)
    request = EditRequest(
        last.source,
        last.original,
        max_rounds=max_rounds,
        max_seconds=max_seconds,
        think=thought if think is None else think,
    )
    rounds = tuple(
        Round(n, made.instruction, made.input_index, made.edited, made.verdict.reflection, made.verdict.seconds)
        for n, made in enumerate(history)
    )
    return EditTrace(
        request,
        thought=Thought(last.original, last.goal) if thought else None,
        target=last.target,
        rounds=rounds,
        earlier_thoughts=tuple(Thought(last.original, made.verdict.goal) for made in history[:-1] if made.rethink is not None),
        seconds=sum(made.seconds for made in rounds),
    )


def foreign(image: torch.Tensor) -> Edited:
    """An Edited for a picture (1, 3, H, W) of another editor: it has no latents to hand on."""
    return Edited(image, image, None)


# ---- pictures ------------------------------------------------------------------------------------------------------------


def check_image(image: torch.Tensor, name: str) -> None:
    """Raises ConfigError unless `image` is an IMAGE with at least one picture."""
    if not isinstance(image, torch.Tensor) or image.ndim != 4 or image.shape[-1] not in (3, 4) or 0 in image.shape:
        found = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
        raise ConfigError(f"{name}: expected an IMAGE (pictures, height, width, 3 or 4), found {found}. Wire an image to it.")


def to_pictures(image: torch.Tensor, name: str = "image") -> tuple[torch.Tensor, ...]:
    """(B, H, W, 3 or 4) -> B pictures (1, 3, H, W), clamped to 0..1. A fourth channel is composited on white."""
    check_image(image, name)
    colour = image[..., :3].to(torch.float32).clamp(0, 1)
    if (alpha := alpha_of(image)) is not None:
        colour = colour * alpha + (1 - alpha)
    return tuple(rearrange(picture, "h w c -> 1 c h w").contiguous() for picture in colour)


def to_picture(image: torch.Tensor, name: str = "image") -> torch.Tensor:
    """The one picture (1, 3, H, W) of an IMAGE. ConfigError for a batch."""
    check_image(image, name)
    if len(image) != 1:
        raise ConfigError(
            f"{name}: expected one picture, found a batch of {len(image)}. Pick one with Image From Batch, or queue one run "
            "each."
        )
    return to_pictures(image, name)[0]


def alpha_of(image: torch.Tensor) -> torch.Tensor | None:
    """The fourth channel (B, H, W, 1) in 0..1, or None."""
    return image[..., 3:].to(torch.float32).clamp(0, 1) if image.shape[-1] == 4 else None


def to_regions(mode: str, mask: torch.Tensor | None, count: int) -> list[Region | None]:
    """What region (off, auto or mask) each of `count` pictures is edited with. mask: a MASK (B, H, W), B being 1 or `count`."""
    if mode != "mask":
        return [None if mode == "off" else Region()] * count
    if mask is None:
        raise ConfigError("region_mask: expected a MASK where region is mask, found none. Wire one, or choose auto or off.")
    if mask.ndim != 3 or len(mask) not in (1, count):
        raise ConfigError(
            f"region_mask: expected 1 mask or {count}, one for each picture to edit, found {tuple(mask.shape)}. Pick one."
        )
    masks = mask.to(torch.float32).clamp(0, 1)
    return [Region(mask=masks[n if len(mask) == count else 0][None, None]) for n in range(count)]


def to_shortcuts(low: float = 0.0, high: float = 1.0, every: int = 0) -> dict[str, GuidanceInterval | StepCache | None]:
    """The fields of an `EditRequest` for guidance between two timesteps and for one computed step of `every`; None where that
    is everywhere and all of them. Raises ConfigError for bounds in the wrong order."""
    return {
        "guidance_interval": None if (low, high) == (0, 1) else GuidanceInterval(low, high),
        "step_cache": StepCache(every=every) if every else None,
    }


def to_image(pictures: Sequence[torch.Tensor], alpha: torch.Tensor | None = None) -> torch.Tensor:
    """Pictures (1, 3, H, W) of one size -> IMAGE (B, H, W, 3), or with `alpha` (B, h, w, 1) put back (B, H, W, 4)."""
    image = rearrange(torch.cat(list(pictures)), "b c h w -> b h w c").contiguous()
    if alpha is None:
        return image
    if alpha.shape[1:3] != image.shape[1:3]:
        planes = F.interpolate(rearrange(alpha, "b h w c -> b c h w"), image.shape[1:3], mode="bilinear", antialias=True)
        alpha = rearrange(planes, "b c h w -> b h w c")
    return torch.cat([image, alpha.to(image)], dim=-1)
