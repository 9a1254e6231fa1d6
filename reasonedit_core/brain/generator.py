"""One edit of ReasonBrain from end to end: cues, conditioning, source latents, denoising, picture.

What differs between its denoisers is a `Sampler`: three guided passes of a UNet through a DDIM schedule, or one pass of FLUX
along a flow. The only random draw is the noise; the source's latents are the mode of the posterior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .. import flow, images
from ..conditioners.reasonbrain import ReasonBrainConditioner
from ..denoisers.flux import FluxDenoiser
from ..denoisers.three_pass import Scales, sample
from ..denoisers.unet import UNetDenoiser
from ..errors import ConfigError
from ..generator import Mover, Plan, Size
from ..interfaces import ObjectExtractor, RegionFinder
from ..latents import FluxCodec, SDCodec, draw_normal
from ..types import Conditioning, Counts, Edited, EditRequest, OnStep, ShouldStop
from .layout import Kind
from .model import BrainModel

if TYPE_CHECKING:
    from diffusers import DDIMScheduler


class Sampler(Protocol):
    """From noise to latents under a conditioning. kind: of the denoiser, sd or flux."""

    kind: Kind

    def prepare(self, request: EditRequest) -> Any:
        """What else the conditioning stage has to give, while text encoder and MLLM are on the device; ConfigError for fields
        of the request that this denoiser has no place for."""
        ...

    def run(
        self,
        noise: Tensor,
        conditioning: Conditioning,
        prepared: Any,
        request: EditRequest,
        *,
        grid: tuple[int, int],
        on_step: OnStep | None,
        should_stop: ShouldStop | None,
    ) -> Tensor:
        """noise (1, N, C) packed on a grid of (height, width), the source's packed latents as the conditioning's reference
        -> packed latents (1, N, C)."""
        ...


class ThreePassSampler:
    """SD: guidance by text and by picture (`three_pass.sample`) with DDIM. scheduler: a diffusers scheduler's configuration.

    image_scale: taken where the request states none.
    """

    kind: Kind = "sd"

    def __init__(
        self,
        denoiser: UNetDenoiser,
        codec: SDCodec,
        conditioner: ReasonBrainConditioner,
        scheduler: Mapping[str, Any],
        image_scale: float = 1.5,
    ) -> None:
        self.denoiser, self.codec, self.conditioner = denoiser, codec, conditioner
        self.scheduler, self.image_scale = dict(scheduler), image_scale

    def prepare(self, request: EditRequest) -> Tensor:
        """Context of the passes without the instruction (1, L, D): the empty text's states, or the negative prompt's."""
        text = self.conditioner.text
        return text.states([request.negative])[0] if request.negative else text.null()

    def run(self, noise, conditioning, prepared, request, *, grid, on_step, should_stop) -> Tensor:
        """See `Sampler`. request.guidance: the text's scale; request.image_guidance: the picture's."""
        image = self.image_scale if request.image_guidance is None else request.image_guidance
        unpack = self.codec.unpack

        def watch(step: int, steps: int, latents: Tensor) -> None:
            if step in (1, steps):
                flow.check_finite(latents, step, steps)
            if on_step is not None:
                on_step(step, steps, self.codec.pack(latents))

        made = sample(
            self.denoiser,
            sd_schedule(self.scheduler),
            unpack(noise, *grid),
            replace(conditioning, reference=unpack(conditioning.reference, *grid)),
            prepared,
            steps=request.steps,
            scales=Scales(request.guidance, image),
            on_step=watch,
            should_stop=should_stop,
        )
        return self.codec.pack(made)


SD_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""Of SD 1.5 and SD 2.1-base, for what a folder's scheduler leaves open: DDIM's own defaults would clip the latents."""


def sd_schedule(scheduler: Mapping[str, Any]) -> DDIMScheduler:
    """The noise schedule that a folder's scheduler configuration means; training and sampling must both take it from here.

    Released folders name PNDM; DDIM of the same noise schedule is what the editors of this family sample with.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config({**SD_SCHEDULE, **scheduler})


class FlowSampler:
    """FLUX: one pass a step; request.guidance is the input of the guidance that was distilled into the model."""

    kind: Kind = "flux"

    def __init__(self, denoiser: FluxDenoiser, schedule: flow.FlowSchedule) -> None:
        self.denoiser, self.schedule = denoiser, schedule

    def prepare(self, request: EditRequest) -> None:
        """ConfigError for a negative prompt or a scale of the picture, which need passes that FLUX does not make."""
        for name in ("negative", "image_guidance"):
            if getattr(request, name) is not None:
                raise ConfigError(f"{name}: expected none with FLUX, which guides in one pass, found one. Leave it out.")

    def run(self, noise, conditioning, prepared, request, *, grid, on_step, should_stop) -> Tensor:
        """See `Sampler`."""
        denoiser = FluxDenoiser(self.denoiser.transformer, guidance=request.guidance, counts=self.denoiser.counts)

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            return denoiser(latents, sigma.expand(1), conditioning, grid=grid)

        sigmas = flow.sigmas(request.steps, grid[0] * grid[1], self.schedule)
        return flow.euler(velocity, noise, sigmas, on_step=on_step, should_stop=should_stop)


@dataclass(frozen=True, slots=True)
class BrainGeometry:
    """Sizes of ReasonBrain: one picture; VAE and output share a size, LLaVA sees the picture as it is given.

    multiple: what sides are floored to multiples of, as of `patch`, pixels of a latent token. Implements `Geometry`.
    """

    multiple: int
    patch: int
    source_sized: bool = True

    def plan(self, sizes: Sequence[Size], level: int, *, keep: bool = False, released: bool = False) -> Plan:
        """See `Geometry`. Raises ConfigError for references."""
        if len(sizes) > 1:
            raise ConfigError(f"ReasonBrain edits one picture and takes no references, found {len(sizes) - 1}. Leave them out.")
        size = sizes[0] if keep else images.step1x_size(*sizes[0], level, math.lcm(self.multiple, self.patch))
        return Plan(size, (size,), (sizes[0],), self.patch)

    def to_vae(self, picture: Tensor, size: Size) -> Tensor:
        """Lanczos through 8 bits."""
        return images.resize_lanczos_pil(picture, *size)

    def to_mllm(self, picture: Tensor, size: Size) -> Tensor:
        """As it is: LLaVA's own resize follows."""
        return picture


class BrainGenerator:
    """Implements `interfaces.Generator`, so that the loop, and any reasoner, may edit with ReasonBrain.

    mover: entered with "mllm" (LLaVA, the modules, the text encoder), "dit" and "vae"; None: everything stays where it is.
    on_objects: told the names that each edit goes by, for a user to see and correct.
    """

    def __init__(
        self,
        conditioner: ReasonBrainConditioner,
        sampler: Sampler,
        codec: SDCodec | FluxCodec,
        *,
        geometry: BrainGeometry,
        counts: Counts | None = None,
        mover: Mover | None = None,
    ) -> None:
        self.conditioner, self.sampler, self.codec, self.geometry = conditioner, sampler, codec, geometry
        self.counts = counts or Counts()
        self.mover: Mover = mover or (lambda component: nullcontext())
        self.on_objects: Callable[[list[str]], None] | None = None

    def use_cues(self, finder: RegionFinder | None = None, extractor: ObjectExtractor | None = None) -> None:
        """Let all further edits take regions and objects from these, such as the user's own; None keeps what there is."""
        self.conditioner = self.conditioner.with_cues(finder, extractor)

    @torch.no_grad()
    def edit(
        self,
        request: EditRequest,
        picture: Tensor,
        instruction: str,
        rng: torch.Generator,
        *,
        latents: Tensor | None = None,
        released: bool = False,
        source_size: bool = True,
        on_step: OnStep | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Edited:
        """Edit `picture` (1, 3, H, W) with `instruction`; see `Generator`.

        Cues are found anew in every picture (the multi-step edits of Tab. A5 are the plain loop). Raises ConfigError for what
        ReasonBrain has no place for: references, regions to denoise, intervals of guidance, step caches.
        """
        _refuse(request)
        images.check_size(picture.shape[-1], picture.shape[-2])
        keep = latents is not None
        size = (picture.shape[-1], picture.shape[-2])
        plan = self.geometry.plan([size], request.size_level, keep=keep, released=released)
        with self.mover("mllm"):
            prepared = self.sampler.prepare(request)
        cond = self.condition(picture, instruction)
        with self.mover("vae"):
            source = self._source(picture, plan, latents)
        noise = draw_normal(tuple(source.shape), rng, dtype=cond.tokens.dtype, device=cond.tokens.device)
        with self.mover("dit"):
            made = self.sampler.run(
                self.codec.pack(noise),
                replace(cond, reference=self.codec.pack(source).to(noise)),
                prepared,
                request,
                grid=plan.grid,
                on_step=on_step,
                should_stop=should_stop,
            )
        with self.mover("vae"):
            decoded = self.codec.decode(self.codec.unpack(made, *plan.grid))
            self.counts.vae_decodes += 1
        generated = images.quantize(decoded).to(request.image.device)
        target = picture if released else request.image if source_size else generated
        shown = images.resize_bicubic_pil(generated, target.shape[-1], target.shape[-2])
        return Edited(shown, generated, made)

    def condition(self, picture: Tensor, instruction: str) -> Conditioning:
        """The conditioning of picture (1, 3, H, W) and instruction; the names that it goes by are told to `on_objects`."""
        objects = None
        if self.conditioner.brain.switches.cues:
            objects = self.conditioner.objects_of(instruction, picture)  # may ask a reasoner, which has a mover of its own
            if self.on_objects is not None:
                self.on_objects(objects)
        with self.mover("mllm"):
            return self.conditioner.condition(picture, instruction, objects=objects)

    def _source(self, picture: Tensor, plan: Plan, given: Tensor | None) -> Tensor:
        """The source's latents (1, C, h, w): encoded, or of the latents by which the picture was generated."""
        if given is None:
            self.counts.vae_encodes += 1
            return self.codec.source(self.codec.encode(self.geometry.to_vae(picture, plan.vae[0]) * 2 - 1))
        height, width = plan.grid
        if given.shape[1] != height * width:
            raise ConfigError(
                f"expected {height} x {width} = {height * width} latent tokens for this picture, found {given.shape[1]}. Pass "
                "the latents that belong to the picture, or none."
            )
        return self.codec.source_of(self.codec.unpack(given, height, width))


def make_generator(
    model: BrainModel,
    conditioner: ReasonBrainConditioner,
    *,
    multiple: int,
    image_scale: float,
    counts: Counts | None = None,
    mover: Mover | None = None,
) -> BrainGenerator:
    """The generator of a loaded model. multiple: of `BrainGeometry`; image_scale: of `ThreePassSampler`. CheckpointError."""
    counts, codec = counts or Counts(), model.codec
    if model.kind == "sd":
        steps = int(model.scheduler.get("num_train_timesteps", 1000))
        denoiser = UNetDenoiser(model.network, timesteps=steps, counts=counts)
        sampler: Sampler = ThreePassSampler(denoiser, codec, conditioner, model.scheduler, image_scale)
    else:
        schedule = flow.FlowSchedule.from_config(model.scheduler) if model.scheduler else flow.STEP1X
        sampler = FlowSampler(FluxDenoiser(model.network, counts=counts), schedule)
    geometry = BrainGeometry(multiple, codec.patch)
    return BrainGenerator(conditioner, sampler, codec, geometry=geometry, counts=counts, mover=mover)


def _refuse(request: EditRequest) -> None:
    names = ("region", "guidance_interval", "step_cache")
    found = [name for name in names if getattr(request, name) is not None] + ["references"] * bool(request.references)
    if found:
        raise ConfigError(f"expected a plain edit with ReasonBrain, found {', '.join(found)}. Leave it out.")
