"""Region-aware denoising: after some full steps only the tokens of the edited region go on, the others wait.

    full       all tokens of target and references, as `flow.euler` does it. Where partial steps follow, the keys and values of
               every attention are kept, and tokens outside the region go on in one step, along their own velocity, to the
               timestep of the next full step: outside an edit the path is nearly straight
    partial    the region's tokens and the text are queries; all other target tokens and the references are kept keys
    cached     no forward: the last velocity, times the factor by which this model's velocity has changed since (`Decay`)
    skipped    the region is empty: everything has gone on already

After RegionE (arXiv 2510.25590). What differs: any number of steps and any plan of them; keys are kept ready for use; factors
between two timesteps are multiplied (RegionE takes the last alone), and reuse stops by how much direction was lost too, not by
length alone; a refresh looks for the region again, which can only grow; networks are called through their modules. A region
that covers everything is the full path, bit by bit.

Nothing is kept but in the objects of one call, so edits may run interleaved.

N tokens of the target, n of the region, C channels of a packed latent token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import flow
from ..errors import ConfigError, Interrupted
from ..models.keyvalues import KeyValues
from ..regions import GuidanceInterval, Region, RegionUse
from ..types import Conditioning, LatentImage, OnStep, ShouldStop
from .region_find import Grid, found_tokens, masked_tokens

EVERYWHERE = GuidanceInterval()


def denoise(
    guided: flow.Guided,
    latents: Tensor,
    sigmas: Tensor,
    *,
    grid: Grid,
    source: LatentImage | None = None,
    region: Region | None = None,
    interval: GuidanceInterval | None = None,
    threshold: float = 0.88,
    on_step: OnStep | None = None,
    should_stop: ShouldStop | None = None,
) -> tuple[Tensor, RegionUse]:
    """`flow.euler` over `sigmas` with a region, an interval of guidance, or both: latents (1, N, C) -> the same, and what was
    done.

    guided: its `predict` also takes `keep` and `rows`, see `interfaces.Denoiser`. grid: (height, width) of the target. source:
    the picture that is edited, which a region without a mask is found by. threshold: where the region states none.
    on_step is given all tokens at the timestep reached, those that wait on their straight way.

    Raises ConfigError for a region without source or mask, Interrupted as `flow.euler` does, ReasonEditError for latents that
    are not finite.
    """
    if region is not None and region.mask is None and source is None:
        raise ConfigError("region: expected a picture that is edited, found none. Give a mask, or leave the region out.")
    run = _Run(guided, sigmas.to(latents.device, torch.float32), [float(x) for x in sigmas], interval or EVERYWHERE)
    n = len(sigmas) - 1
    plan = (True,) * n if region is None else region.plan(n)
    area = None if region is None else _Area(region, grid, source, threshold, latents.device)
    waiting: _Waiting | None = None
    for i, full in enumerate(plan):
        if should_stop is not None and should_stop():
            raise Interrupted(f"Stopped before denoising step {i + 1} of {n}, as asked.")
        if full:
            after = next((k for k in range(i + 1, n) if plan[k]), n)
            latents, waiting = _full_step(run, latents, i, after, area)
        else:
            latents = _partial_step(run, latents, i, region, area)
        if i in (0, n - 1) and latents.device.type != "meta":
            flow.check_finite(latents, i + 1, n)
        if on_step is not None:
            on_step(i + 1, n, latents if waiting is None else waiting.shown(latents, run.levels[i + 1]))
    count = latents.shape[1]
    return latents, run.use(count, count if area is None else area.count(count))


def _full_step(run: _Run, latents: Tensor, i: int, after: int, area: _Area | None) -> tuple[Tensor, _Waiting | None]:
    """Step i over all tokens; `after` is the next one in full. Returns the latents, those outside the region at `after`."""
    if area is None or after == i + 1 or area.covers_all:
        latents = run.step(latents, run.predict(latents, i, guide=run.guides(i)), i, i + 1)
        run.did("full", i)
        run.remember(None, i)
        return latents, None
    guide = any(run.guides(k) for k in range(i, after))
    pair = run.predict(latents, i, guide=guide, keep=True)
    moved = run.step(latents, pair, i, i + 1)
    run.did("full", i)
    area.look(lambda: run.step(latents, pair, i, len(run.levels) - 1))
    run.remember(area.rows, i)
    if area.covers_all or not area.rows.numel():
        run.passes.clear()
    if area.covers_all:
        return moved, None
    far = run.step(latents, pair, i, after)
    both = far.index_copy(1, area.rows, moved.index_select(1, area.rows))
    return both, _Waiting(moved, far, area.others, run.levels[i + 1], run.levels[after])


def _partial_step(run: _Run, latents: Tensor, i: int, region: Region, area: _Area) -> Tensor:
    """Step i over the region alone; over all tokens where it covers them."""
    rows = area.rows
    if rows is not None and not rows.numel():
        run.did("skipped", i)
        return latents
    own = latents if rows is None else latents.index_select(1, rows)
    reused = run.reused(region, i)
    if reused is not None:
        own = run.step(own, (reused, None), i, i + 1)
        run.did("cached", i)
    else:
        own = run.step(own, run.predict(own, i, guide=run.guides(i), rows=rows), i, i + 1)
        run.remember(None, i)
        run.did("full" if rows is None else "partial", i)
    return own if rows is None else latents.index_copy(1, rows, own)


@dataclass(slots=True, eq=False)
class _Area:
    """The edited tokens so far. rows (n,) int64 on the latents' device, others (N - n,); rows None: all tokens."""

    region: Region
    grid: Grid
    source: LatentImage | None
    threshold: float
    device: torch.device
    edited: Tensor | None = None
    rows: Tensor | None = None
    others: Tensor | None = None

    def __post_init__(self) -> None:
        if self.region.mask is not None:
            self._take(masked_tokens(self.region.mask, self.grid))
        if self.region.threshold is not None:
            self.threshold = self.region.threshold

    @property
    def covers_all(self) -> bool:
        """Whether it is known that no token is outside."""
        return self.edited is not None and self.rows is None

    def count(self, tokens: int) -> int:
        """Edited tokens; all where none was looked for."""
        return tokens if self.edited is None else int(self.edited.sum())

    def look(self, estimate: Callable[[], Tensor]) -> None:
        """Find the region, or let it grow, by `estimate()`: the final latents as one step sees them. A mask is final."""
        if self.region.mask is not None:
            return
        clean = {"erode": self.region.erode, "dilate": self.region.dilate}
        found = found_tokens(estimate(), self.source, self.grid, threshold=self.threshold, **clean).cpu()
        self._take(found if self.edited is None else self.edited | found)

    def _take(self, edited: Tensor) -> None:
        self.edited, self.rows, self.others = edited, None, None
        if not bool(edited.all()):
            self.rows, self.others = (chosen.nonzero()[:, 0].to(self.device) for chosen in (edited, ~edited))


@dataclass(frozen=True, slots=True, eq=False)
class _Waiting:
    """Tokens outside the region on their straight way: `near` at sigma, `far` at `later`, both (1, N, C)."""

    near: Tensor
    far: Tensor
    others: Tensor
    sigma: float
    later: float

    def shown(self, latents: Tensor, now: float) -> Tensor:
        """`latents`, those outside the region at the timestep `now` between the two."""
        if self.sigma == self.later:
            return latents
        share = (self.sigma - now) / (self.sigma - self.later)
        near, far = (x.index_select(1, self.others) for x in (self.near, self.far))
        return latents.index_copy(1, self.others, torch.lerp(near.float(), far.float(), share).to(latents.dtype))


Pair = tuple[Tensor, "Tensor | None"]
"""Predictions with the condition and, under guidance, without it."""


@dataclass(slots=True, eq=False)
class _Run:
    """One denoising: its passes, what they keep, and the last velocity that was computed."""

    guided: flow.Guided
    sigmas: Tensor
    levels: Sequence[float]
    interval: GuidanceInterval
    passes: dict[str, KeyValues] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    last: Tensor | None = None
    velocity: Tensor | None = None
    since: int = 0

    def guides(self, i: int) -> bool:
        """Whether step i is guided."""
        return self.guided.uncond is not None and self.levels[i] in self.interval

    def predict(self, latents: Tensor, i: int, *, guide: bool, keep: bool = False, rows: Tensor | None = None) -> Pair:
        """latents (1, N, C), or (1, n, C) of `rows` -> predictions of step i, the second where the step is guided.

        guide: make both passes. Where keys are kept, a later step may need those of the second though this one does not.
        keep: keep keys and values of each pass for `rows` to come; a forward of all tokens lets go of earlier ones.
        """
        g = self.guided
        if rows is None:
            self.passes.clear()
        # What was kept jointly has keys of both branches only.
        joint = g.joined is not None and (guide if rows is None else "joined" in self.passes)
        if joint:
            both = self._forward("joined", torch.cat([latents, latents]), i, g.joined, keep, rows).chunk(2)
            return both if self.guides(i) else (both[0], None)
        positive = self._forward("cond", latents, i, g.cond, keep, rows)
        if not guide:
            return positive, None
        negative = self._forward("uncond", latents, i, g.uncond, keep, rows)
        return positive, negative if self.guides(i) else None

    def _forward(
        self, name: str, latents: Tensor, i: int, conditioning: Conditioning, keep: bool, rows: Tensor | None
    ) -> Tensor:
        options = {} if rows is None else {"keep": self.passes[name], "rows": rows}
        if keep:
            options = {"keep": self.passes.setdefault(name, KeyValues())}
        return self.guided.predict(latents, self.sigmas[i].expand(len(latents)), conditioning, **options)

    def step(self, latents: Tensor, pair: Pair, i: int, j: int) -> Tensor:
        """latents at step i -> those at step j along the velocity of step i; the guided velocity is kept in `last`."""
        g, (positive, negative) = self.guided, pair
        sigma, later = self.sigmas[i], self.sigmas[j]
        if g.fused:
            rule = {} if negative is None else {"uncond": negative, "scale": g.scale, **flow.rule_of(g.combine)}
            moved, self.last = g.step(latents, positive, sigma, later, velocity=True, **rule)
            return moved
        self.last = positive if negative is None else g.combine(positive, negative, g.scale, sigma)
        return flow.euler_step(latents, self.last, sigma, later)

    def remember(self, rows: Tensor | None, i: int) -> None:
        """Take the velocity of the last `step`, made at step i, for reuse; rows: only these of it."""
        self.velocity, self.since = self.last if rows is None else self.last.index_select(1, rows), i

    def reused(self, region: Region, i: int) -> Tensor | None:
        """The last velocity as it may stand for that of step i, or None where it may not."""
        # A guided velocity says nothing of one that is not, nor the other way round.
        if region.decay is None or self.guides(self.since) != self.guides(i):
            return None
        factor, drift = region.decay.between(self.levels[self.since], self.levels[i])
        return self.velocity * factor if drift <= region.tolerance else None

    def did(self, what: str, i: int) -> None:
        """Note a step."""
        guided = what in ("full", "partial") and self.guides(i)
        for name in (what, "guided") if guided else (what,):
            self.counts[name] = self.counts.get(name, 0) + 1

    def use(self, tokens: int, edited: int) -> RegionUse:
        """What was done."""
        return RegionUse(tokens, edited, **{"full": 0, **self.counts})
