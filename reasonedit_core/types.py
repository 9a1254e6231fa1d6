"""The values that travel between the rooms. All are frozen; behaviour lives in functions.

Pictures are float tensors (1, 3, H, W) in 0..1 (RGB). Latents are packed (B, T, C) unless a docstring says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .regions import GuidanceInterval, Region, RegionUse, StepCache


class Decision(StrEnum):
    """The outcome of a reflection. The value is what `trace.json` holds."""

    SUCCESS = "success"
    REFINE = "refine"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Draft:
    """How rounds are made while the loop looks for the right instruction: `steps`, and `guidance` (None: the request's)."""

    steps: int
    guidance: float | None = None


@dataclass(frozen=True, slots=True)
class EditRequest:
    """One run of the loop, as the user asked for it.

    image: (1, 3, H, W) in 0..1, the source. references: further pictures (1, 3, h, w), for systems that take several.
    guidance <= 1 skips the negative pass. size_level: square root of the generated area in pixels.
    max_rounds: the largest number of edits. max_seconds: no round is started after this time. draft: make rounds as drafts and
    only what led to the chosen one in full (`drafts`); of no effect without reflection.
    region: denoise only what is edited; guidance_interval: guide only at some timesteps; step_cache: extrapolate some steps
    (not with a region). All are faster and not exact. image_guidance: ReasonBrain's second scale, how far the source is
    followed; None: the checkpoint's.
    """

    image: torch.Tensor
    instruction: str
    seed: int = 0
    steps: int = 28
    guidance: float = 6.0
    size_level: int = 1024
    negative: str | None = None
    references: tuple[torch.Tensor, ...] = ()
    max_rounds: int = 3
    max_seconds: float | None = None
    think: bool = True
    reflect: bool = True
    region: Region | None = None
    guidance_interval: GuidanceInterval | None = None
    step_cache: StepCache | None = None
    draft: Draft | None = None
    image_guidance: float | None = None


@dataclass(frozen=True, slots=True)
class Thought:
    """What thinking made of the user's words. `instruction` is the goal that the run is judged against."""

    original: str
    instruction: str
    steps: tuple[str, ...] = ()
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Scores:
    """Self-scores of one edited picture, each 0..10; None where the score was not asked for.

    edit: (instruction followed, little changed beyond it); quality: (naturalness, freedom from artefacts);
    consistency: agreement of the picture with the target description, after the caps of the released code;
    consistency_reason: the scorer's words. asked: False while edit and quality could still be asked for (`Reasoner.grade`).
    """

    edit: tuple[float, ...] | None = None
    quality: tuple[float, ...] | None = None
    consistency: float | None = None
    consistency_reason: str = ""
    asked: bool = True


@dataclass(frozen=True, slots=True)
class Reflection:
    """The reasoner's verdict on one edited picture. `instruction` is the second instruction of a REFINE."""

    decision: Decision
    reason: str
    instruction: str | None = None
    scores: Scores = field(default_factory=Scores)
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Edited:
    """What the generator made.

    image: (1, 3, H, W) in 0..1 at the size the policy asks for (source size, or generated size).
    generated: (1, 3, h, w) the decoded picture at the generated size. latents: (1, T, C) its packed, normalised latents,
    which a chained round uses as reference so that no second VAE pass or resize degrades the picture; None for a picture
    that another editor made. region: what was made of the steps, where a region or an interval of guidance was asked for.
    """

    image: torch.Tensor
    generated: torch.Tensor
    latents: torch.Tensor | None
    region: RegionUse | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """One edit with its reflection. `input_index` names the round whose picture was edited; None means the source. full_of:
    the draft that this round repeats with all steps; such rounds come after all others and are not judged."""

    index: int
    instruction: str
    input_index: int | None
    edited: Edited
    reflection: Reflection | None = None
    seconds: float = 0.0
    full_of: int | None = None

    @property
    def image(self) -> torch.Tensor:
        """The picture of this round, (1, 3, H, W) in 0..1."""
        return self.edited.image


@dataclass(frozen=True, slots=True)
class EditTrace:
    """All rounds of a run. `best` is the index of the chosen round, or None when the source is returned unchanged.

    earlier_thoughts: thoughts that a FAILED verdict made the run give up; seconds: wall time of the run so far.
    """

    request: EditRequest
    thought: Thought | None = None
    target: str | None = None
    rounds: tuple[Round, ...] = ()
    best: int | None = None
    stop_reason: str = ""
    earlier_thoughts: tuple[Thought, ...] = ()
    seconds: float = 0.0

    @property
    def goal(self) -> str:
        """What reflection judges against: the instruction that thinking made, else the user's own."""
        return self.thought.instruction if self.thought else self.request.instruction

    @property
    def image(self) -> torch.Tensor:
        """The result: the best round's picture, or the source."""
        return self.request.image if self.best is None else self.rounds[self.best].image


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What a conditioner hands to a denoiser: the seam between the systems.

    tokens (B, T, D) text-side states; mask (B, T) bool or None when every token is valid; positions (T, 3) float ids of the
    text tokens where the denoiser wants them; text_embeds (B, T, D) and text_mask (B, T): MLLM input embeddings of quoted
    characters (Step1X v1.2); pooled (B, P). residual: of ReasonBrain, what is added behind the denoiser's first layer: maps
    (B, c, g, g) and vectors (B, c). reference: latents of the source, where a host hands them in here.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    text_mask: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    residual: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True, slots=True)
class FoundMasks:
    """What a segmenter found. masks (N, H, W) bool; iou, stability (N,) float in 0..1, how sure it is of each."""

    masks: torch.Tensor
    iou: torch.Tensor
    stability: torch.Tensor


@dataclass(frozen=True, slots=True)
class Regions:
    """The regions of one picture; the first is the background, where there is any.

    masks (R, g, g) uint8, the share of each vision token that a region covers in 1/255. geometry (R, 8) float32: centre x, y,
    width, height, area (shares of the picture), predicted IoU, stability, 1 for the background.
    """

    masks: torch.Tensor
    geometry: torch.Tensor


@dataclass(frozen=True, slots=True)
class LatentImage:
    """Packed latents of one picture. tokens (1, height * width, C); height, width: the token grid (pixels / 16)."""

    tokens: torch.Tensor
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Policy:
    """How the loop decides. Two are named: `reasonedit` (the default) and `released` (loop.POLICIES).

    released: reproduce the released pipelines' numerics and loop (shared between loop, generator and conditioner).
    on_failed: what follows a FAILED verdict: `restart` from the source with the goal, `rethink` once with the reason as
    feedback and stop after that, or `stop`. revise: what follows REFINE: `chain` edits the result with the second
    instruction, `merge` edits the source with goal and second instruction together. accept: consistency (0..10) at which a
    REFINE verdict stops as well, the picture agreeing with its description; doubt: consistency under which a SUCCESS
    verdict is not believed. source_size: return pictures of the source's size. lazy_scores: ask for edit and quality scores
    only when rounds are compared by them; stop reason, best round and pictures are the same either way.
    """

    name: str = "reasonedit"
    released: bool = False
    on_failed: str = "rethink"
    revise: str = "chain"
    accept: float = 9.0
    doubt: float = 3.0
    source_size: bool = True
    lazy_scores: bool = False


@dataclass(slots=True)
class Counts:
    """How often the costly calls of a run were made. The one mutable value: components add to the instance they share."""

    vision_passes: int = 0
    generate_calls: int = 0
    new_tokens: int = 0
    denoiser_forwards: int = 0
    vae_encodes: int = 0
    vae_decodes: int = 0


ShouldStop = Callable[[], bool]
"""Polled between denoising steps and between tokens; True makes the callee raise `Interrupted`."""

OnText = Callable[[str, str], None]
"""(task, text so far): streamed reasoner text."""

OnStep = Callable[[int, int, "torch.Tensor"], None]
"""(step index from 1, number of steps, packed latents (1, T, C) of the picture in the making)."""
