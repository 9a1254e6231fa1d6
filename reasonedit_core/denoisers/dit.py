"""The denoiser of ReasonEdit-S: the Step1X-Edit DiT behind the `Denoiser` seam.

The three versions differ in what a position means to them (`VARIANTS`); the network is one. What does not depend on the
timestep (the prompt's half of the connector, the rotation tables) is made once per conditioning and kept for the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from ..errors import ConfigError
from ..types import Conditioning, Counts, LatentImage

if TYPE_CHECKING:
    from ..kernels.dispatch import Run
    from ..models.keyvalues import KeyValues
    from ..models.step1x_transformer import Rope, Step1XEditTransformer2DModel, TextState

TIMESTEPS = 1000

_KEPT = 3
"""Prepared conditionings kept: the conditional, the unconditional and their joint batch."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What a version of Step1X-Edit does with its inputs.

    reference: (axis 0, offset of axes 1 and 2) of a reference token at grid place (y, x). pads_seen: padded text tokens take
    part in the DiT's attention. rounds: the timestep is rounded to the latents' dtype in 0..1000 rather than in 0..1.
    """

    reference: tuple[int, int]
    pads_seen: bool
    rounds: bool = True


VARIANTS = {
    "v1.0": Variant(reference=(0, 0), pads_seen=True, rounds=False),
    # An offset of one on both axes: an accident of the training code that became the trained layout.
    "v1.1": Variant(reference=(1, 1), pads_seen=True),
    "v1.2": Variant(reference=(1, 0), pads_seen=False),
}


@dataclass(frozen=True, slots=True)
class _Prepared:
    """The step-independent part of one conditioning on one set of grids."""

    conditioning: Conditioning
    grids: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    text: TextState
    rope: Rope
    joint_mask: torch.Tensor | None


class Step1XDenoiser:
    """One velocity prediction of the Step1X-Edit DiT.

    variant: v1.0, v1.1 or v1.2. host: attention function of a host application, if it shall be used. backend: "auto", or the
    kernel backend that computes every attention in its place (`kernels.attend_with`).
    """

    kind: Literal["velocity"] = "velocity"

    def __init__(
        self,
        transformer: Step1XEditTransformer2DModel,
        variant: str,
        *,
        counts: Counts | None = None,
        host: Run | None = None,
        backend: str = "auto",
    ) -> None:
        if variant not in VARIANTS:
            raise ConfigError(f"expected a Step1X-Edit variant out of {', '.join(VARIANTS)}, found {variant!r}")
        self.transformer = transformer
        self.variant = VARIANTS[variant]
        self.counts = counts or Counts()
        self.host, self.backend = host, backend
        self._prepared: list[_Prepared] = []

    @torch.no_grad()
    def __call__(
        self,
        latents: torch.Tensor,
        t: torch.Tensor,
        conditioning: Conditioning,
        *,
        grid: tuple[int, int],
        references: Sequence[LatentImage] = (),
        keep: KeyValues | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """latents (B, N, C) packed, N = grid height x width; t (B,) in 0..1, 1 = noise -> velocity (B, N, C).

        A batch shares its references: two passes of guidance are one call with a conditioning of batch 2
        (`join_conditionings`) or two calls of batch 1, with the same results. keep, rows: see `interfaces.Denoiser`.
        """
        batch, n_target = latents.shape[:2]
        grids = (tuple(grid), *((image.height, image.width) for image in references))
        _check(latents, conditioning, grids, references, rows)
        prepared = self._prepare(conditioning, grids, latents)
        sequence = latents
        if rows is None:
            sequence = torch.cat([latents, *(image.tokens.to(latents).expand(batch, -1, -1) for image in references)], dim=1)
        # In bfloat16 the rounding of the timestep is part of the released numerics, and it depends on where it happens.
        rounded = (t * TIMESTEPS).to(latents.dtype) / TIMESTEPS if self.variant.rounds else t.to(latents.dtype)
        self.counts.denoiser_forwards += 1
        velocity = self.transformer(
            sequence,
            rounded,
            prepared.text,
            joint_mask=prepared.joint_mask,
            rope=prepared.rope,
            # A host's attention is only promised as many queries as keys.
            host=self.host if rows is None else None,
            backend=self.backend,
            keep=keep,
            rows=rows,
        )
        return velocity[:, :n_target]

    def forget(self) -> None:
        """Drop what was prepared. Needed after a change of weights while a conditioning lives on."""
        self._prepared.clear()

    def _prepare(self, conditioning: Conditioning, grids: tuple[tuple[int, int], ...], latents: torch.Tensor) -> _Prepared:
        for kept in self._prepared:
            if kept.conditioning is conditioning and kept.grids == grids and kept.dtype == latents.dtype:
                return kept
        tokens, positions = conditioning.tokens.to(latents), conditioning.positions.to(latents.device)
        mask = _on(conditioning.mask, latents.device)
        embeds = None if conditioning.text_embeds is None else conditioning.text_embeds.to(latents)
        text_mask = _on(conditioning.text_mask, latents.device)
        n_image = sum(height * width for height, width in grids)
        made = _Prepared(
            conditioning,
            grids,
            latents.dtype,
            self.transformer.prepare_text(tokens, mask, embeds, text_mask, host=self.host, backend=self.backend),
            self.transformer.rope(_all_positions(positions, image_positions(grids, self.variant.reference))),
            None if self.variant.pads_seen else _joint_mask(mask, n_image),
        )
        self._prepared = [*self._prepared, made][-_KEPT:]
        return made


def image_positions(grids: Sequence[tuple[int, int]], reference: tuple[int, int]) -> torch.Tensor:
    """Ids of the target's tokens, then of each reference's: (N, 3) float32 on the CPU, rows (axis 0, y, x)."""
    parts = []
    for number, (height, width) in enumerate(grids):
        axis0, offset = (0, 0) if number == 0 else reference
        ids = torch.full((height, width, 3), float(axis0))
        ids[..., 1] = torch.arange(height)[:, None] + offset
        ids[..., 2] = torch.arange(width)[None, :] + offset
        parts.append(ids.flatten(0, 1))
    return torch.cat(parts)


def _all_positions(text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """text (T, 3) or (B, T, 3), image (N, 3) -> (T + N, 3) or (B, T + N, 3), on the text's device."""
    return torch.cat([text, image.to(text).expand(*text.shape[:-2], -1, -1)], dim=-2)


def _joint_mask(mask: torch.Tensor | None, n_image: int) -> torch.Tensor | None:
    """(B, T) valid text tokens -> (B, 1, 1, T + n_image): every query sees valid text and all of the pictures."""
    if mask is None or bool(mask.all()):
        return None
    return torch.nn.functional.pad(mask, (0, n_image), value=True)[:, None, None]


def _on(mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if mask is None else mask.to(device, torch.bool)


def _check(
    latents: torch.Tensor,
    conditioning: Conditioning,
    grids: Sequence[tuple[int, int]],
    references: Sequence[LatentImage],
    rows: torch.Tensor | None,
) -> None:
    if conditioning.positions is None:
        raise ConfigError("expected a conditioning with text positions (made by Step1XConditioner), found one without")
    if conditioning.tokens.shape[0] != latents.shape[0]:
        raise ConfigError(
            f"expected latents and conditioning of one batch size, found {latents.shape[0]} and {conditioning.tokens.shape[0]}"
        )
    check_tokens(latents, grids, references, rows)


def check_tokens(
    latents: torch.Tensor,
    grids: Sequence[tuple[int, int]],
    references: Sequence[LatentImage],
    rows: torch.Tensor | None = None,
) -> None:
    """Raise ConfigError where tokens do not fill their grid, or where latents (B, n, C) are not of `rows` (n,)."""
    counted = [latents.shape[1], *(image.tokens.shape[1] for image in references)]
    if rows is not None:
        if rows.shape != latents.shape[1:2]:
            raise ConfigError(f"rows: expected one for each of {latents.shape[1]} tokens, found {tuple(rows.shape)}")
        counted[0] = grids[0][0] * grids[0][1]
    for number, ((height, width), tokens) in enumerate(zip(grids, counted, strict=True)):
        if height * width != tokens:
            what = "target" if number == 0 else f"reference {number}"
            raise ConfigError(f"{what}: expected {height} x {width} = {height * width} packed tokens, found {tokens}")
