"""One edit from end to end: size plan, conditioning, reference latents, denoising, picture.

What differs between the systems is handed in: the conditioner, the denoiser, the codec, the schedule, a `Geometry` (which
sizes, which resizes) and the guidance rule. Random draws come from the caller's generator in the order of the released
pipelines: the posterior samples of the references, then the noise.
"""

from __future__ import annotations

import hashlib
import logging
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from . import flow, images
from . import latents as latent
from .denoisers import join_conditionings
from .denoisers.region import denoise
from .denoisers.step_cache import PredictedSteps
from .errors import ConfigError, ReasonEditError
from .interfaces import Codec, Conditioner, Denoiser
from .kernels import chosen_backends, guided_step
from .kernels.chosen import AUTO
from .types import Conditioning, Counts, Edited, EditRequest, LatentImage, OnStep, ShouldStop

Size = tuple[int, int]
"""(width, height) in pixels."""

Mover = Callable[[str], AbstractContextManager[None]]
"""Entered with "mllm", "dit" or "vae" around every use of that component: offloading moves weights there."""

PATCH = 16
"""Pixels of one latent token of the released systems: 8 of the VAE times 2 of the packing."""

_KEPT_MOMENTS = 4

SAFER = ("sdpa", "reference")
"""The attention that an edit goes over to when its first step is not finite or empty: torch's own, then plain torch in float32,
whose scores of all queries by all keys take gigabytes at full size."""

NOT_FINITE, ONE_VALUE = "NaN or infinity", "one value everywhere"
"""What can be wrong with a first step."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of one edit. output: what is generated. vae, mllm: per picture (the edited one first, then references).
    patch: pixels of a latent token on each side."""

    output: Size
    vae: tuple[Size, ...]
    mllm: tuple[Size, ...]
    patch: int = PATCH

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the output in latent tokens."""
        return token_grid(self.output, self.patch)


def token_grid(size: Size, patch: int) -> tuple[int, int]:
    """(height, width) of a picture in latent tokens of `patch` pixels."""
    return size[1] // patch, size[0] // patch


class Geometry(Protocol):
    """Which sizes a system works at and how its pictures get there.

    source_sized: the released pipeline resizes its result to the size of the picture it was given.
    """

    source_sized: bool

    def plan(self, sizes: Sequence[Size], level: int, *, keep: bool = False, released: bool = False) -> Plan:
        """sizes: of the edited picture, then of the references. level: square root of the generated area.

        keep: the edited picture is a generated one; it is edited at its own size. released: exactly as the released
        pipeline. Raises ConfigError for references that the system cannot take.
        """
        ...

    def to_vae(self, picture: torch.Tensor, size: Size) -> torch.Tensor:
        """(1, 3, H, W) in 0..1 -> the same at `size`, for the VAE."""
        ...

    def to_mllm(self, picture: torch.Tensor, size: Size) -> torch.Tensor:
        """(1, 3, H, W) in 0..1 -> the same at `size`, for the conditioner."""
        ...


@dataclass(frozen=True, slots=True)
class Step1XGeometry:
    """Step1X-Edit: one picture; VAE, MLLM and output share one size. variant: v1.0, v1.1 or v1.2. patch: pixels of a latent
    token, `Codec.patch`; sides are floored to multiples of `multiple`, and of it."""

    variant: str = "v1.2"
    multiple: int = PATCH
    patch: int = PATCH
    source_sized: bool = True

    def plan(self, sizes: Sequence[Size], level: int, *, keep: bool = False, released: bool = False) -> Plan:
        """See `Geometry`. The released rule is also the default one."""
        if len(sizes) > 1:
            raise ConfigError(
                f"ReasonEdit-S (Step1X-Edit) edits one picture and takes no references, found {len(sizes) - 1}. "
                "Leave them out, or take ReasonEdit-Q with a Qwen-Image-Edit-2509 or -2511 checkpoint."
            )
        size = sizes[0] if keep else images.step1x_size(*sizes[0], level, math.lcm(self.multiple, self.patch))
        return Plan(size, (size,), (size,), self.patch)

    def to_vae(self, picture: torch.Tensor, size: Size) -> torch.Tensor:
        """v1.2: torch's bilinear with antialias; v1.1: Lanczos; v1.0: bicubic, these two through 8 bits."""
        return images.resize_bilinear(picture, *size) if self.variant == "v1.2" else self.to_mllm(picture, size)

    def to_mllm(self, picture: torch.Tensor, size: Size) -> torch.Tensor:
        """Lanczos; v1.0: bicubic."""
        resize = images.resize_bicubic_pil if self.variant == "v1.0" else images.resize_lanczos_pil
        return resize(picture, *size)


class FlowGenerator:
    """Conditioner, denoiser and codec put together with a flow-matching sampler. Implements `interfaces.Generator`.

    combine: the guidance rule. default_negative: the negative prompt when a request has none. batched_cfg: both guidance
    passes as one forward of batch two. mover: see `Mover`; None when everything stays where it is.
    dtype: of latents and noise; None takes the dtype of the conditioning, as the released pipelines do. likeness: the cosine
    up to which a token counts as edited when a region is looked for (`Region.threshold`).
    """

    def __init__(
        self,
        conditioner: Conditioner,
        denoiser: Denoiser,
        codec: Codec,
        schedule: flow.FlowSchedule,
        *,
        geometry: Geometry,
        combine: flow.Combine,
        default_negative: str = "",
        counts: Counts | None = None,
        batched_cfg: bool = False,
        mover: Mover | None = None,
        dtype: torch.dtype | None = None,
        likeness: float = 0.88,
    ) -> None:
        self.conditioner, self.denoiser, self.codec, self.schedule = conditioner, denoiser, codec, schedule
        self.geometry, self.combine, self.default_negative = geometry, combine, default_negative
        self.counts = counts or Counts()
        self.batched_cfg = batched_cfg
        self.mover: Mover = mover or (lambda component: nullcontext())
        self.dtype, self.likeness = dtype, likeness
        self._moments: OrderedDict[bytes, latent.Moments] = OrderedDict()

    @torch.no_grad()
    def edit(
        self,
        request: EditRequest,
        picture: torch.Tensor,
        instruction: str,
        rng: torch.Generator,
        *,
        latents: torch.Tensor | None = None,
        released: bool = False,
        source_size: bool = True,
        on_step: OnStep | None = None,
        should_stop: ShouldStop | None = None,
    ) -> Edited:
        """Edit `picture` (1, 3, H, W) with `instruction`.

        latents (1, T, C): packed latents of `picture`, which is then a generated one; they save the VAE pass and the draw.
        released: the picture comes back at the size of `picture` (S) or as generated (Q). Otherwise it has the exact size
        of the request's source, or with source_size=False that of the generation.
        """
        if request.region is not None and request.step_cache is not None:
            raise ConfigError(
                "expected a region or a step cache, found both: a region has a cache of its own (its decay). Leave one out."
            )
        if request.image_guidance is not None:
            raise ConfigError("image_guidance: expected none outside ReasonBrain, found one. Leave it out.")
        if request.region is not None:
            request.region.plan(request.steps)  # refused before anything is computed
        pictures = (picture, *request.references)
        for number, image in enumerate(pictures):
            images.check_size(image.shape[-1], image.shape[-2], name="reference picture" if number else "the picture")
        sizes = [(p.shape[-1], p.shape[-2]) for p in pictures]
        plan = self.geometry.plan(sizes, request.size_level, keep=latents is not None, released=released)
        grid = plan.grid
        sigmas = flow.sigmas(request.steps, grid[0] * grid[1], self.schedule)

        cond, uncond = self._condition(request, pictures, plan, instruction, grid, released)
        dtype = self.dtype or cond.tokens.dtype
        with self.mover("vae"):
            references = self._references(pictures, plan, latents, rng)
        shape = (1, self.codec.channels, 2 * grid[0], 2 * grid[1])
        noise = latent.pack(latent.draw_normal(shape, rng, dtype=dtype, device=cond.tokens.device))
        with self.mover("dit"):
            velocity, use = self._velocity(cond, uncond, request.guidance, grid, references, released), None
            if request.step_cache is not None:
                steps = PredictedSteps(velocity.predict, request.step_cache, request.steps)
                velocity = replace(velocity, predict=steps)
            watched = {"on_step": on_step, "should_stop": should_stop}
            if request.region is None and request.guidance_interval is None:
                result = flow.euler(velocity, noise, sigmas, **watched)
            else:
                asked = {"region": request.region, "interval": request.guidance_interval, "threshold": self.likeness}
                result, use = denoise(velocity, noise, sigmas, grid=grid, source=references[0], **asked, **watched)
        with self.mover("vae"):
            decoded = self.codec.decode(latent.unpack(result, *grid))
            self.counts.vae_decodes += 1
        generated = images.quantize(decoded).to(request.image.device)
        return Edited(self._finish(generated, request, picture, released, source_size), generated, result, use)

    def _condition(
        self,
        request: EditRequest,
        pictures: Sequence[torch.Tensor],
        plan: Plan,
        instruction: str,
        grid: tuple[int, int],
        released: bool,
    ) -> tuple[Conditioning, Conditioning | None]:
        """The conditionings of the instruction and, with guidance, of the negative prompt, under the same pictures."""
        seen = [self.geometry.to_mllm(p, size) for p, size in zip(pictures, plan.mllm, strict=True)]

        def condition(text: str) -> Conditioning:
            return self.conditioner.condition(seen[0], text, grid=grid, references=tuple(seen[1:]), released=released)

        with self.mover("mllm"):
            cond = condition(instruction)
            if request.guidance <= 1:
                return cond, None
            return cond, condition(self.default_negative if request.negative is None else request.negative)

    def _references(
        self, pictures: Sequence[torch.Tensor], plan: Plan, given: torch.Tensor | None, rng: torch.Generator
    ) -> list[LatentImage]:
        """Latents of the edited picture (or those given) and of the further references, in order."""
        made = []
        for number, (picture, size) in enumerate(zip(pictures, plan.vae, strict=True)):
            if number == 0 and given is not None:
                height, width = token_grid(size, plan.patch)
                if given.shape[1] != height * width:
                    raise ConfigError(
                        f"expected {height} x {width} = {height * width} latent tokens for a picture of {size[0]} x {size[1]} "
                        f"pixels, found {given.shape[1]}. Pass the latents that belong to the picture, or none."
                    )
                made.append(LatentImage(given, height, width))
                continue
            made.append(latent.pack_image(self.codec.sample(self._encode(picture, size), rng)))
        return made

    def _encode(self, picture: torch.Tensor, size: Size) -> latent.Moments:
        """The VAE's moments of `picture` at `size`, computed once per distinct content. A sample is never kept."""
        key = _digest(picture, size)
        if key in self._moments:
            self._moments.move_to_end(key)
            return self._moments[key]
        moments = self.codec.encode(self.geometry.to_vae(picture, size) * 2 - 1)
        self.counts.vae_encodes += 1
        self._moments[key] = moments
        if len(self._moments) > _KEPT_MOMENTS:
            self._moments.popitem(last=False)
        return moments

    def _velocity(
        self,
        cond: Conditioning,
        uncond: Conditioning | None,
        scale: float,
        grid: tuple[int, int],
        references: Sequence[LatentImage],
        released: bool,
    ) -> flow.Guided:
        """The guided velocity of packed latents (1, N, C), from one, two or (batched) one double forward per step.

        released: guidance and step round where the released pipelines round, and not once at their end.
        """

        unseen = [each for each in (cond, uncond) if each is not None]

        def predict(x: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning, **part: Any) -> torch.Tensor:
            def forward() -> torch.Tensor:
                return self.denoiser(x, sigma, conditioning, grid=grid, references=references, **part)

            if not unseen:
                return forward()
            # The first forward of each pass is looked at, which waits for the device; one of both passes is the first of both.
            rest = [each for each in unseen if conditioning is not each and conditioning is not joined]
            first, unseen[:] = len(rest) < len(unseen), rest
            return self._checked(forward, x.dtype) if first else forward()

        joined = join_conditionings(cond, uncond) if self.batched_cfg and uncond is not None else None
        step = None if released else guided_step
        return flow.guided_velocity(predict, cond, uncond, scale=scale, combine=self.combine, joined=joined, step=step)

    def _checked(self, forward: Callable[[], torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The answer of a first forward. One that is not finite or empty is made again with safer attention, which is kept for
        good where it helps; where none does the attention was not the reason, and stays. Raises ReasonEditError for NaN."""
        velocity = forward()
        fault = _fault(velocity)
        was = getattr(self.denoiser, "backend", None)
        for safer in self._safer() if fault else ():
            now = self.denoiser.backend  # type: ignore[attr-defined]
            log.warning("the first step came out as %s with attention %s: trying %s%s", fault, now, safer, _price(safer))
            self._attend_by(safer)
            try:
                velocity = forward()
            except torch.OutOfMemoryError:
                log.warning("attention %s needs more memory than there is", safer)
                break
            fault = _fault(velocity)
            if fault is None:
                log.warning("attention %s gave a first step that is right: it is taken from here on", safer)
                return velocity
        if fault and was is not None:
            self._attend_by(was)
        if fault == NOT_FINITE:
            raise _not_finite(dtype)
        return velocity

    def _safer(self) -> tuple[str, ...]:
        """The backends that may be right where the denoiser's was not. Each goes past a host's attention, as any name does."""
        was = getattr(self.denoiser, "backend", SAFER[-1])
        if was == AUTO and chosen_backends(forget=False) == SAFER[:1]:
            was = SAFER[0]  # nothing else has run
        return SAFER[SAFER.index(was) + 1 :] if was in SAFER else SAFER

    def _attend_by(self, backend: str) -> None:
        self.denoiser.backend = backend  # type: ignore[attr-defined]
        # What was prepared of a text has been through attention too.
        forget = getattr(self.denoiser, "forget", None)
        if forget is not None:
            forget()

    def _finish(
        self, generated: torch.Tensor, request: EditRequest, picture: torch.Tensor, released: bool, source_size: bool
    ) -> torch.Tensor:
        """The generated picture at the size that is asked for."""
        if released:
            target = picture if self.geometry.source_sized else generated
        else:
            target = request.image if source_size else generated
        return images.resize_bicubic_pil(generated, target.shape[-1], target.shape[-2])


def _fault(velocity: torch.Tensor) -> str | None:
    """What is wrong with a first velocity (B, N, C), in words, or None. One value everywhere in a sample is what a kernel that
    wrote nothing leaves; a network that was never trained may answer it too, so only the attention is changed for it."""
    # Read at once: every value that is read waits for the device.
    lows, highs = torch.stack(velocity.detach().flatten(1).aminmax(dim=1)).tolist()
    if not all(map(math.isfinite, (*lows, *highs))):
        return NOT_FINITE
    return ONE_VALUE if velocity[0].numel() > 1 and any(map(operator.eq, lows, highs)) else None


def _price(backend: str) -> str:
    return ", which is slow and takes much memory" if backend == SAFER[-1] else ""


def _not_finite(dtype: torch.dtype | None) -> ReasonEditError:
    how = "a black picture" if dtype is None else f"a black picture in {str(dtype).removeprefix('torch.')}"
    return ReasonEditError(
        f"the first step came out as NaN or infinity, which would be {how}, also with plain attention. Choose --dtype bfloat16 "
        "or float32; where it stays, the weights are damaged or a LoRA does not belong to them."
    )


def _digest(picture: torch.Tensor, size: Size) -> bytes:
    """A key for the content of a picture at a size: equal pictures share it, wherever their tensors live."""
    content = picture.detach().to("cpu", torch.float32).contiguous()
    digest = hashlib.blake2b(repr((tuple(content.shape), size)).encode(), digest_size=16)
    digest.update(content.numpy())
    return digest.digest()
