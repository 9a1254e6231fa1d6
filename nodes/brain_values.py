"""What travels on the wires of ReasonBrain's nodes, and how it is loaded and asked. Imports no ComfyUI.

    REASONBRAIN_MODEL      BrainHandle
    REASONBRAIN_REGIONS    a tuple of the core's Regions, one per picture
    REASONBRAIN_GUIDANCE   Guidance   what ReasonBrain made of one picture and instruction, a megabyte on the CPU
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..reasonedit_core.errors import ConfigError
from ..reasonedit_core.loop import POLICIES
from ..reasonedit_core.types import Conditioning, EditRequest, Regions
from .sockets import Made, alpha_of, to_image, to_pictures

if TYPE_CHECKING:
    from ..reasonedit_core.brain.generator import BrainGenerator
    from ..reasonedit_core.generator import Plan
    from .memory import ComfyMover

BRAIN = "REASONBRAIN_MODEL"
REGIONS = "REASONBRAIN_REGIONS"
GUIDANCE = "REASONBRAIN_GUIDANCE"


@dataclass(frozen=True, slots=True, eq=False)
class BrainHandle:
    """A ReasonBrain that is ready to edit. Its weights are moved by ComfyUI when it runs.

    kind: sd or flux. defaults: the checkpoint's steps, guidance and size_level, taken where a value of a node is 0.
    latents: what the checkpoint states of its VAE (`settings.Settings`).
    """

    name: str
    kind: str
    generator: BrainGenerator
    defaults: Mapping[str, Any]
    mover: ComfyMover
    device: torch.device
    notes: tuple[str, ...] = ()
    latents: str = "released"

    def using(self, objects: str = "", regions: Sequence[Regions] | None = None, index: int = 0) -> BrainGenerator:
        """The generator with the user's objects (text) and regions in place of what it would find itself.

        index: the picture, of whose regions there may be one for all.
        """
        from ..reasonedit_core.extractors.given import GivenObjects
        from ..reasonedit_core.segmenters.regions import KnownRegions

        generator, names = copy.copy(self.generator), read_objects(objects)
        finder = None
        if regions is not None:
            finder = KnownRegions(regions[index if len(regions) > 1 else 0])
        generator.use_cues(finder, GivenObjects(names) if names else None)
        return generator

    def request(self, image: torch.Tensor, instruction: str, *, seed: int, **values: Any) -> EditRequest:
        """The core's request for a picture (1, 3, H, W). values: steps, guidance, image_guidance, size, negative; 0 and ""
        stand for the checkpoint's own."""
        own = self.defaults
        return EditRequest(
            image,
            instruction,
            seed=seed % 2**64,
            steps=values["steps"] or own["steps"],
            guidance=values["guidance"] or own["guidance"],
            size_level=values["size"] or own["size_level"],
            negative=values["negative"] or None,
            image_guidance=values["image_guidance"] or None,
            think=False,
            reflect=False,
        )

    def expect(self, picture: torch.Tensor, level: int, *, keep: bool = False) -> Plan:
        """The sizes of an edit; says on the way what memory each component needs beside its weights."""
        from .memory import brain_bytes

        plan = self.generator.geometry.plan([(picture.shape[-1], picture.shape[-2])], level, keep=keep)
        for component, needed in brain_bytes(self.generator, plan).items():
            self.mover.need(component, needed)
        return plan


@dataclass(frozen=True, slots=True, eq=False)
class Guidance:
    """What ReasonBrain made of one picture and one instruction, on the CPU.

    conditioning: context and residuals. null (1, L, D): context of the passes without the instruction. objects: the
    names it went by. level, geometry: the sizes it edits at.
    """

    kind: str
    conditioning: Conditioning
    null: torch.Tensor
    objects: tuple[str, ...]
    level: int
    geometry: Any


def read_objects(text: str) -> list[str]:
    """Names from a text: one a line, or with commas or semicolons between them."""
    return [name.strip() for name in re.split(r"[\n,;，；、]", text) if name.strip()]


def say_objects(names: Sequence[str]) -> str:
    """Names as `read_objects` reads them."""
    return ", ".join(re.sub(r"[\n,;，；、]+", " ", name) for name in names)


def find_objects(
    instruction: str, method: str, picture: torch.Tensor | None = None, speaker: Any = None
) -> list[str]:
    """Names of what the instruction is about, never empty. method: auto, mllm, rules or whole, or `spacy:DIR`."""
    from ..reasonedit_core.brain.cues import make_extractor

    extractor = make_extractor(method, root=Path(), speaker=speaker)
    found = extractor.extract(instruction, picture) if extractor is not None else []
    return found or [instruction.strip()]


def find_regions(brain: BrainHandle, image: torch.Tensor, mask: torch.Tensor | None) -> tuple[Regions, ...]:
    """Regions of every picture of an IMAGE: of the masks (N, H, W), which count for all, or found by the model's segmenter."""
    conditioner = brain.generator.conditioner
    if not conditioner.brain.switches.region_branch:
        raise ConfigError(
            f"{brain.name}: expected a model that sees regions, found one whose region branch is off. Leave the node out."
        )
    pictures = to_pictures(image)
    if mask is not None:
        from ..reasonedit_core.segmenters.regions import GivenRegions

        finder = GivenRegions(mask)
        return tuple(finder.regions(picture, conditioner.llava.grid) for picture in pictures)
    found = []
    with brain.mover("mllm"), torch.no_grad():
        for picture in pictures:
            made = conditioner.regions_of(picture.to(brain.device))
            found.append(Regions(made.masks.cpu(), made.geometry.cpu()))
    return tuple(found)


def show_regions(regions: Sequence[Regions], image: torch.Tensor) -> torch.Tensor:
    """Regions of all pictures as MASK (N, H, W) of the size of the IMAGE, in 0..1."""
    shares = torch.cat([made.masks for made in regions]).float() / 255
    return F.interpolate(shares[None], image.shape[1:3], mode="nearest")[0]


def reason(
    brain: BrainHandle, image: torch.Tensor, instruction: str, objects: str = "", regions: Sequence[Regions] | None = None
) -> Guidance:
    """What the denoiser is given for the one picture of an IMAGE."""
    (picture,) = to_pictures(image) if len(image) == 1 else (None,)
    if picture is None:
        raise ConfigError(f"image: expected one picture, found a batch of {len(image)}. Pick one with Image From Batch.")
    generator, names = brain.using(objects, regions), []
    generator.on_objects = names.extend
    brain.expect(picture, brain.defaults["size_level"])
    with brain.mover("mllm"), torch.no_grad():
        made = generator.condition(picture.to(brain.device), instruction)
        null = generator.conditioner.text.null()
    residual = made.residual and tuple(part.cpu() for part in made.residual)
    pooled = None if made.pooled is None else made.pooled.cpu()
    kept = Conditioning(made.tokens.cpu(), residual=residual, pooled=pooled)
    return Guidance(brain.kind, kept, null.cpu(), tuple(names), brain.defaults["size_level"], generator.geometry)


def edit_pictures(
    brain: BrainHandle,
    image: torch.Tensor,
    instruction: str,
    *,
    seed: int,
    objects: str = "",
    regions: Sequence[Regions] | None = None,
    previous: Made | None = None,
    preview: Callable[[BrainHandle, int], Any] | None = None,
    should_stop: Callable[[], bool] | None = None,
    **values: Any,
) -> tuple[Made, list[str]]:
    """Edit every picture of an IMAGE, each with its own seed (seed + its index); and the names of objects that it went by.

    previous: what an earlier edit made; its latents are used when `image` is its very picture. preview: makes the
    on_step of all edits, told their steps; its `begin` is told the grid of each edit. values: of `BrainHandle.request`.
    """
    pictures, names = to_pictures(image), []
    if regions is not None and len(regions) not in (1, len(pictures)):
        raise ConfigError(f"regions: expected those of 1 picture or of {len(pictures)}, found {len(regions)}. Wire one image.")
    earlier = previous.behind(image) if previous is not None else None
    requests = [brain.request(picture, instruction, seed=seed + n, **values) for n, picture in enumerate(pictures)]
    on_step, items = preview(brain, sum(request.steps for request in requests)) if preview else None, []
    for n, request in enumerate(requests):
        generator, latents, picture = brain.using(objects, regions, n), None, request.image
        generator.on_objects = names.extend
        if earlier and earlier[n].latents is not None:
            picture, latents = earlier[n].generated, earlier[n].latents.to(brain.device)
        plan = brain.expect(picture, request.size_level, keep=latents is not None)
        if on_step is not None:
            on_step.begin(plan.grid)
        made = generator.edit(
            request,
            picture.to(brain.device),
            instruction,
            torch.Generator().manual_seed(request.seed),
            latents=latents,
            source_size=POLICIES["reasonedit"].source_size,
            on_step=on_step,
            should_stop=should_stop,
        )
        items.append(replace(made, latents=made.latents.to("cpu")))
    return Made(to_image([item.image for item in items], alpha_of(image)), tuple(items)), list(dict.fromkeys(names))


# ---- for ComfyUI's own model ---------------------------------------------------------------------------------------------


def check_model(guidance: Guidance, channels: int | None, context: int | None, width: int | None) -> None:
    """ConfigError where a MODEL cannot be steered: channels of its input, width of its context and of its first layer."""
    if guidance.kind != "sd":
        raise ConfigError("guidance: expected that of an SD ReasonBrain, found FLUX's. Edit with ReasonBrain Edit.")
    if channels != 8:
        raise ConfigError(
            f"model: expected an SD 1.5 of 8 input channels, which sees the source, found {channels}. Load the UNet that "
            "training exported for ComfyUI, not the base model."
        )
    tokens, residual = guidance.conditioning.tokens, guidance.conditioning.residual or ()
    wanted = (tokens.shape[-1], *{part.shape[1] for part in residual})
    found = (context, width)[: len(wanted)]
    if found != wanted:
        raise ConfigError(
            f"model: expected the UNet that this ReasonBrain was trained with (context, channels: {wanted}), found {found}. "
            "Load the one that training exported."
        )


def as_comfy(guidance: Guidance, source: torch.Tensor) -> tuple[list, list, list]:
    """CONDITIONING with both conditions, with the picture alone, and with neither. source: its latents (1, 4, h, w).

    Attention over the empty text repeated is attention over it once, so the null context is not repeated here.
    """
    from .brain_patch import KEY

    cond = guidance.conditioning
    maps = tuple(part for part in cond.residual or () if part.dim() == 4)
    both = {"concat_latent_image": source} | ({KEY: cond} if cond.residual else {})
    picture = {"concat_latent_image": source} | ({KEY: replace(cond, residual=maps)} if maps else {})
    return [[cond.tokens, both]], [[guidance.null, picture]], [[guidance.null, {}]]
