"""Guidance by text and by picture in three passes, the drops in training that make it possible, and the sampler of the UNets.

The null context is the text encoder's states of the empty text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, Interrupted
from ..types import Conditioning

if TYPE_CHECKING:
    from ..types import ShouldStop
    from .unet import UNetDenoiser


@dataclass(frozen=True, slots=True)
class Scales:
    """How far each condition is followed; 1 and 1 need one pass."""

    text: float = 7.5
    image: float = 1.5


def drop(conditioning: Conditioning, null: Tensor | None, text: Tensor, image: Tensor) -> Conditioning:
    """The conditioning with text and picture taken from the rows where `text` and `image` (B,) bool say so.

    Without text the context is [null ; null] and R̄_textual zero; without the picture the source's latents and R̄_visual are.
    null: (1, L, D), or None for a denoiser that never goes without text (FLUX, whose context is wider than CLIP's states).
    Raises ConfigError for text to be dropped without a null, or with one of another width.
    """
    tokens, mask = conditioning.tokens, conditioning.mask
    if null is None and bool(text.any()):
        raise ConfigError("expected no text to be dropped without a null context, found some. Drop the picture alone.")
    text, image = text.to(tokens.device), image.to(tokens.device)
    if null is not None:
        tokens, mask = _without_text(conditioning, null, text)
    residual = None
    if conditioning.residual is not None:
        rows = {4: image, 2: text}  # the map is of the picture, the vector of the text
        residual = tuple(x.masked_fill(_over(rows[x.dim()], x), 0) for x in conditioning.residual)
    reference = conditioning.reference
    return replace(
        conditioning,
        tokens=tokens,
        mask=mask,
        residual=residual,
        reference=None if reference is None else reference.masked_fill(_over(image, reference), 0),
    )


def _without_text(conditioning: Conditioning, null: Tensor, text: Tensor) -> tuple[Tensor, Tensor | None]:
    """Context (B, T, D) and mask (B, T) with the null's in the rows of `text` (B,)."""
    shown, mask = conditioning.tokens, conditioning.mask
    if null.shape[-1] != shown.shape[-1]:
        raise ConfigError(
            f"expected a null context as wide as the context ({shown.shape[-1]}), found {null.shape[-1]}. Take the states of "
            "the text encoder that the denoiser was trained with."
        )
    tokens, keep = null_context(null.to(shown), shown.shape[1])
    if mask is not None or not bool(keep.all()):
        mask = torch.ones(shown.shape[:2], dtype=torch.bool, device=shown.device) if mask is None else mask
        mask = torch.where(text[:, None], keep.expand(shown.shape[:2]), mask)
    return torch.where(text[:, None, None], tokens, shown), mask


def null_context(null: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """null (1, L, D) repeated as often as it fits whole into `length` (cut where it does not fit once), then padding.

    -> (1, length, D) and mask (1, length) bool.
    """
    times, size = max(1, length // null.shape[1]), null.shape[1]
    tokens = null.repeat(1, times, 1)[:, :length]
    keep = torch.arange(length, device=null.device)[None] < times * size
    return torch.nn.functional.pad(tokens, (0, 0, 0, length - tokens.shape[1])), keep


def guided(full: Tensor, image: Tensor, none: Tensor, scales: Scales) -> Tensor:
    """none + s_I (image - none) + s_T (full - image): predictions with both conditions, the picture alone, neither."""
    return none + scales.image * (image - none) + scales.text * (full - image)


@torch.no_grad()
def sample(
    denoiser: UNetDenoiser,
    scheduler: Any,
    noise: Tensor,
    conditioning: Conditioning,
    null: Tensor,
    *,
    steps: int = 50,
    scales: Scales | None = None,
    on_step: Callable[[int, int, Tensor], None] | None = None,
    should_stop: ShouldStop | None = None,
) -> Tensor:
    """Denoise noise (1, 4, h, w) with a diffusers scheduler (DDIM or of its family) -> latents (1, 4, h, w).

    conditioning: batch 1, with the source's latents as reference. Raises ConfigError for fewer than one step or another batch,
    Interrupted when `should_stop` says so between steps.
    """
    scales = scales or Scales()
    if steps < 1 or noise.shape[0] != 1:
        raise ConfigError(f"expected at least one step and a batch of one, found {steps} steps, batch {noise.shape[0]}.")
    passes = 1 if scales == Scales(1.0, 1.0) else 3
    joint = conditioning if passes == 1 else three_conditions(conditioning, null)
    scheduler.set_timesteps(steps, device=noise.device)
    latents = noise * scheduler.init_noise_sigma
    for n, timestep in enumerate(scheduler.timesteps, start=1):
        if should_stop is not None and should_stop():
            raise Interrupted(f"stopped before step {n} of {len(scheduler.timesteps)}")
        seen = scheduler.scale_model_input(latents, timestep).expand(passes, -1, -1, -1)
        predicted = denoiser.predict(seen, timestep.expand(passes), joint)
        if passes == 3:
            predicted = guided(*predicted.chunk(3), scales)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
        if on_step is not None:
            on_step(n, len(scheduler.timesteps), latents)
    return latents


def three_conditions(conditioning: Conditioning, null: Tensor) -> Conditioning:
    """A conditioning of batch 1 -> batch 3: as it is, without text, without text and picture."""

    def three(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.expand(3, *x.shape[1:])

    batch = replace(
        conditioning,
        tokens=three(conditioning.tokens),
        mask=three(conditioning.mask),
        reference=three(conditioning.reference),
        residual=None if conditioning.residual is None else tuple(three(x) for x in conditioning.residual),
    )
    return drop(batch, null, torch.tensor([False, True, True]), torch.tensor([False, False, True]))


def _over(rows: Tensor, x: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (x.dim() - 1))
