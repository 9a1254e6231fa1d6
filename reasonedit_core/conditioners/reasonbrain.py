"""The chain of ReasonBrain: FRCE -> LLaVA with its [IMG] tokens -> QFormer -> CME, as a conditioner and for training.

What the frozen encoders see (`features`) is apart from what is trained (`run`), so that training may keep the former.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..interfaces import ObjectExtractor, RegionFinder
from ..mllm.focus import ASKING, DROPPABLE, OTHER
from ..mllm.llava import Llava
from ..models.reasonbrain.assembler import Part, assemble, assembled
from ..models.reasonbrain.brain import ReasonBrain
from ..models.reasonbrain.cme import Enhanced
from ..models.reasonbrain.frce import Features
from ..segmenters.regions import batch_regions
from ..types import Conditioning, Regions
from .text_states import TextStates


@dataclass(frozen=True, slots=True)
class BrainOutput:
    """enhanced: what the denoiser is given. translated: V̂ (B, Q, d_c), before the CME. logits (B, r, vocabulary) at the places
    before each [IMG] token, or None."""

    enhanced: Enhanced
    translated: Tensor
    logits: Tensor | None = None


class ReasonBrainConditioner:
    """Picture + instruction -> conditioning of the denoiser.

    finder: needed where the region branch is on and no regions are handed in. extractor: names the objects where none are
    handed in; without one, or when it finds nothing, the whole instruction is the one object. pooler: the CLIP text encoder
    whose pooled vector the denoiser wants beside the context (FLUX).
    Raises CheckpointError when the widths of the parts do not fit each other.
    """

    def __init__(
        self,
        brain: ReasonBrain,
        llava: Llava,
        text: TextStates,
        *,
        finder: RegionFinder | None = None,
        extractor: ObjectExtractor | None = None,
        pooler: TextStates | None = None,
    ) -> None:
        _check_widths(brain, llava, text)
        self.brain = brain
        self.llava = llava
        self.text = text
        self.finder = finder
        self.extractor = extractor
        self.pooler = pooler

    def with_cues(self, finder: RegionFinder | None = None, extractor: ObjectExtractor | None = None) -> ReasonBrainConditioner:
        """The same conditioner with others to find regions and objects, such as the user's own; None keeps what there is."""
        other = copy.copy(self)
        other.finder, other.extractor = finder or self.finder, extractor or self.extractor
        return other

    def objects_of(self, instruction: str, image: Tensor | None = None) -> list[str]:
        """The names that stand for this instruction, for a user to see and correct; never empty.

        Raises ConfigError for an instruction without words.
        """
        if not instruction.strip():
            raise ConfigError("expected an instruction, found an empty one. Write what shall be seen.")
        found = self.extractor.extract(instruction, image) if self.extractor is not None else []
        return found or [instruction.strip()]

    def regions_of(self, image: Tensor) -> Regions:
        """The regions of image (1, 3, H, W). Raises ConfigError without a finder."""
        if self.finder is None:
            raise ConfigError(
                "expected a segmenter or regions for the region branch, found neither. Draw masks, name a segmenter (SAM, or "
                "`grid`, which needs no network), or load a model whose region branch is off."
            )
        return self.finder.regions(image, self.llava.grid)

    def pooled(self, instructions: Sequence[str]) -> Tensor | None:
        """CLIP's pooled vectors (B, P) of the instructions, None for a denoiser that wants none."""
        if self.pooler is None:
            return None
        return self.pooler.names([[instruction] for instruction in instructions])[0][:, 0]

    def features(
        self,
        pictures: Tensor,
        instructions: Sequence[str],
        *,
        objects: Sequence[Sequence[str]] | None = None,
        regions: Sequence[Regions] | None = None,
    ) -> Features:
        """What the frozen encoders see, without gradients: pictures (B, 3, H, W) in 0..1, B instructions.

        objects, regions: one entry per picture; None finds them.
        """
        if pictures.shape[0] != len(instructions):
            raise ConfigError(f"expected an instruction per picture, found {pictures.shape[0]} and {len(instructions)}.")
        switches = self.brain.switches
        with torch.no_grad():
            look = self.llava.look(pictures, self.brain.spec.taps)
            text, text_keep = self.text.states(instructions)
            features = Features(look.image, look.taps, text, text_keep)
            if switches.cues:
                if objects is None:
                    objects = [self.objects_of(h, p[None]) for h, p in zip(instructions, pictures, strict=True)]
                vectors, keep = self.text.names(objects)
                features = replace(features, objects=vectors, object_keep=keep)
            if switches.region_branch:
                regions = regions if regions is not None else [self.regions_of(p[None]) for p in pictures]
                masks, geometry, keep = batch_regions(regions)
                features = replace(features, masks=masks, geometry=geometry, region_keep=keep)
        own = next(self.brain.parameters())
        return features.to(own.device, own.dtype)

    def run(self, features: Features, instructions: Sequence[str], *, logits: bool = False) -> BrainOutput:
        """Eq. 3 and the enhancer, with gradients where the caller allows them. logits: also what eq. A1 needs."""
        count = len(instructions)
        cues = self.brain.cues(features)
        prompts = [self.llava.prompt(instruction) for instruction in instructions]
        before, after = (self.llava.embed([prompt[n] for prompt in prompts]) for n in (0, 1))
        queries = self.llava.embed([self.llava.img_ids] * count)
        projector = self.llava.projector
        image = projector(features.image.to(next(projector.parameters()).dtype))
        seen = torch.ones(image.shape[:2], dtype=torch.bool, device=image.device)
        parts = [before, (image, seen), *self.brain.parts(cues), after, queries]
        roles = assembled(self._roles(parts, features), parts) if self.llava.focus.token_select else None
        states, said = self.llava.run(*assemble(parts), logits=logits, roles=roles)
        own = next(self.brain.parameters())
        translated = self.brain.qformer(states.to(own.dtype))
        return BrainOutput(self.brain.cme(translated, features, cues), translated, said)

    def _roles(self, parts: Sequence[Part], features: Features) -> list[Tensor]:
        """Roles of `mllm.focus` for each token of each part of the row.

        Picture, patches and the background may be hidden. The other regions are the segmenter's objects and stay (which of them
        the instruction means is not known before the pass), and so do the objects' own tokens.
        """
        kinds = [OTHER, DROPPABLE, *([DROPPABLE, OTHER] if len(parts) > 4 else []), ASKING, ASKING]
        roles = [torch.full_like(keep, kind, dtype=torch.long) for (_, keep), kind in zip(parts, kinds, strict=True)]
        if len(parts) > 4 and features.geometry is not None and self.brain.switches.region_branch:
            background = features.geometry[..., -1] > 0.5
            roles[2][:, -background.shape[1] :] = torch.where(background, DROPPABLE, OTHER)
        return roles

    @torch.no_grad()
    def condition(
        self,
        image: Tensor | None,
        instruction: str,
        *,
        grid: tuple[int, int] | None = None,
        references: Sequence[Tensor] = (),
        released: bool = False,
        objects: Sequence[str] | None = None,
        regions: Regions | None = None,
    ) -> Conditioning:
        """image (1, 3, H, W) in 0..1. grid and released belong to the seam and change nothing here.

        Raises ConfigError without a picture and with references, which ReasonBrain has no place for.
        """
        if image is None or references:
            raise ConfigError(f"expected one picture to edit, found {0 if image is None else 1 + len(references)}.")
        features = self.features(
            image,
            [instruction],
            objects=None if objects is None else [objects],
            regions=None if regions is None else [regions],
        )
        made = as_conditioning(self.run(features, [instruction]).enhanced)
        return replace(made, pooled=self.pooled([instruction]))


def as_conditioning(enhanced: Enhanced) -> Conditioning:
    """The four outputs in the form of the seam: context as tokens, map and vector as residuals."""
    return Conditioning(
        tokens=enhanced.context, residual=tuple(x for x in (enhanced.map, enhanced.vector) if x is not None) or None
    )


def _check_widths(brain: ReasonBrain, llava: Llava, text: TextStates) -> None:
    found = {**llava.widths, "text": text.width, "img_tokens": len(llava.img_names)}
    faults = [f"{k} is {getattr(brain.spec, k)} and not {v}" for k, v in found.items() if getattr(brain.spec, k) != v]
    if faults:
        raise CheckpointError(
            f"expected a ReasonBrain for this LLaVA and text encoder, found one whose {', '.join(faults)}. Load it with the "
            "parts it was trained on, or build it with their widths."
        )
