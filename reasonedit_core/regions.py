"""What region-aware denoising and guidance intervals are asked for, and what a run made of it. Values only, no torch at import.

An instruction mostly concerns a part of a picture. After some steps in full, only the tokens of that part go on through the
network; the others wait, and their keys and values stand in for them. `denoisers.region` does the work. Described by RegionE
(arXiv 2510.25590), which fixes 28 steps, one refresh and a table of factors; here each is a value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    import torch

FIRST, LAST, REFRESH = 6 / 28, 2 / 28, 16 / 28
"""Steps in full at the start and at the end, and where the one between stands, as shares of all steps: RegionE's numbers."""

DECAY_VERSION = 1


@dataclass(frozen=True, slots=True)
class Decay:
    """How a model's velocity changes from one timestep to a later one: what its reuse has to be corrected by.

    sigmas: K + 1 falling timesteps (1 = noise). gammas (K): the factor by which the velocity at sigmas[k] comes nearest to that
    at sigmas[k + 1]; drifts (K): the share of the later velocity's length that it then misses. Both are properties of the
    path, not of a schedule: `between` takes them over any stretch. about: what was fitted, in words.

    Raises ConfigError for numbers that no fit gives.
    """

    sigmas: tuple[float, ...]
    gammas: tuple[float, ...]
    drifts: tuple[float, ...]
    about: str = ""

    def __post_init__(self) -> None:
        counts = len(self.sigmas), len(self.gammas), len(self.drifts)
        if counts[0] < 2 or counts[1:] != (counts[0] - 1,) * 2:
            raise ConfigError(
                f"a decay has K + 1 >= 2 sigmas, K gammas and K drifts, found {counts[0]}, {counts[1]} and {counts[2]}. Fit it "
                "anew with bench.decay."
            )
        falling = all(a > b for a, b in zip(self.sigmas, self.sigmas[1:], strict=False))
        if not falling or not 0 <= self.sigmas[-1] < self.sigmas[0] <= 1:
            raise ConfigError(f"the sigmas of a decay fall within 1..0, found {[*self.sigmas]}. Fit it anew with bench.decay.")
        if not all(0 < x < math.inf for x in self.gammas) or not all(0 <= x < math.inf for x in self.drifts):
            raise ConfigError(
                "the gammas of a decay are positive and its drifts not negative, found "
                f"{[*self.gammas]} and {[*self.drifts]}. Fit it anew with bench.decay."
            )

    def between(self, sigma: float, later: float) -> tuple[float, float]:
        """The factor from the velocity at `sigma` to that at `later`, and the drift on the way.

        The factors of all timesteps between are multiplied and their drifts added; within two of them, and beyond the ends,
        both grow as they do over the nearest stretch.
        """
        logs = _at(later, self.sigmas, [math.log(x) for x in self.gammas]) - _at(
            sigma, self.sigmas, [math.log(x) for x in self.gammas]
        )
        return math.exp(logs), _at(later, self.sigmas, self.drifts) - _at(sigma, self.sigmas, self.drifts)

    def record(self) -> dict[str, Any]:
        """For JSON; `read_decay` reads it."""
        return {"version": DECAY_VERSION, **asdict(self)}


def _at(sigma: float, sigmas: Sequence[float], steps: Sequence[float]) -> float:
    """The sum of `steps` from sigmas[0] to `sigma`, linear within each of them and carried on beyond the ends."""
    sums = [0.0, *accumulate(steps)]
    k = sum(sigma < x for x in sigmas[1:-1])
    share = (sigmas[k] - sigma) / (sigmas[k] - sigmas[k + 1])
    return sums[k] + share * steps[k]


def read_decay(path: str | Path) -> Decay:
    """The decay in a JSON file that `bench.decay` wrote. Raises ConfigError naming file and fault."""
    fault = f"{path}: expected the JSON file that `python -m reasonedit.reasonedit_core.bench.decay` writes, found "
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{fault}none that can be read ({error}).") from error
    if not isinstance(found, Mapping) or found.get("version") != DECAY_VERSION:
        raise ConfigError(f"{fault}no object with version {DECAY_VERSION}.")
    try:
        numbers = [tuple(float(x) for x in found[name]) for name in ("sigmas", "gammas", "drifts")]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{fault}no lists of numbers named sigmas, gammas and drifts ({error!r}).") from error
    try:
        return Decay(*numbers, about=str(found.get("about", "")))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """Denoise only what is edited.

    mask: (1, 1, H, W) in 0..1 over the edited picture, at least 0.5 where it shall change; None: the region is found from the
    picture. threshold: a token is edited where the cosine between what it is heading for and the picture is at most this
    (None: the system's own). erode, dilate: tokens by which a found region is shrunk (specks go) and then grown.

    first, last: steps in full at the start, at least 1, and at the end; None: 6/28 and 2/28 of all. refresh: numbers, from 1,
    of further full steps; every: a full step after so many others. Both None: one, at 16/28 of all. Counts beyond the number
    of steps make all of them full.

    decay: of this model, for reusing velocities; None: none is reused. tolerance: the drift up to which one is.

    Raises ConfigError for values out of their range.
    """

    mask: torch.Tensor | None = None
    threshold: float | None = None
    erode: int = 1
    dilate: int = 2
    first: int | None = None
    last: int | None = None
    refresh: tuple[int, ...] | None = None
    every: int | None = None
    decay: Decay | None = None
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if self.mask is not None and (self.mask.ndim != 4 or self.mask.shape[:2] != (1, 1) or 0 in self.mask.shape):
            raise ConfigError(f"region: expected a mask (1, 1, H, W), found {tuple(self.mask.shape)}. Give one mask.")
        _within("threshold", self.threshold, -1, 1)
        _within("tolerance", self.tolerance, 0, math.inf)
        for name, least in (("erode", 0), ("dilate", 0), ("first", 1), ("last", 0), ("every", 1)):
            _within(name, getattr(self, name), least, math.inf)
        for number in self.refresh or ():
            _within("refresh", number, 1, math.inf)

    @property
    def mode(self) -> str:
        """`mask` or `auto`."""
        return "auto" if self.mask is None else "mask"

    def plan(self, steps: int) -> tuple[bool, ...]:
        """For each of `steps` steps whether it is made in full; the first always is.

        Raises ConfigError for a refresh beyond the last step.
        """
        beyond = [number for number in self.refresh or () if number > steps]
        if beyond:
            raise ConfigError(f"region: expected refresh steps from 1 to {steps}, found {beyond[0]}. Leave it out.")
        first = max(1, round(FIRST * steps)) if self.first is None else self.first
        last = round(LAST * steps) if self.last is None else self.last
        full = {*range(min(first, steps)), *range(max(steps - last, 0), steps)}
        if self.refresh is None and self.every is None:
            full.add(max(round(REFRESH * steps) - 1, 0))
        full |= {number - 1 for number in self.refresh or ()}
        if self.every is not None:
            full |= set(range(first + self.every, steps, self.every + 1))
        return tuple(step in full for step in range(steps))

    def record(self) -> dict[str, Any]:
        """For the trace: what was asked, without the mask's pixels."""
        names = ("threshold", "erode", "dilate", "first", "last", "every")
        made = {"mode": self.mode, **{name: getattr(self, name) for name in names}}
        made["refresh"] = None if self.refresh is None else [*self.refresh]
        if self.decay is not None:
            made |= {"tolerance": self.tolerance, "decay": self.decay.about}
        return made


@dataclass(frozen=True, slots=True)
class GuidanceInterval:
    """Guidance only at timesteps from `low` to `high` (0..1, 1 = noise; both included); elsewhere one pass instead of two.

    The idea is that of "Applying Guidance in a Limited Interval" (arXiv 2404.07724). Raises ConfigError unless
    0 <= low <= high <= 1.
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise ConfigError(
                f"guidance interval: expected 0 <= low <= high <= 1 (1 is noise), found {self.low:g} and {self.high:g}. "
                "Put the smaller one first."
            )

    def __contains__(self, sigma: float) -> bool:
        return self.low <= sigma <= self.high


@dataclass(frozen=True, slots=True)
class StepCache:
    """Compute only some steps; the velocities of the others are extrapolated from those before (`denoisers.step_cache`).

    every: of so many steps one is computed; 1: all are. first, last: steps at the start (at least 1) and at the end that are
    computed anyway. order: of the extrapolation; 0 takes the last velocity as it is. Raises ConfigError out of range.
    """

    every: int = 2
    first: int = 4
    last: int = 1
    order: int = 1

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("first", 1), ("last", 0), ("order", 0)):
            _within(name, getattr(self, name), least, math.inf, "step cache")

    def computes(self, step: int, steps: int) -> bool:
        """Whether step `step` (from 0) of `steps` is computed."""
        return step < self.first or step >= steps - self.last or (step - self.first + 1) % self.every == 0


@dataclass(frozen=True, slots=True)
class RegionUse:
    """What an edit made of its steps.

    tokens: of the target; edited: those of the region at the end (all of them where none was looked for). full: steps over
    all tokens; partial: over the region alone; cached: that reused a velocity; skipped: at which nothing was left to do, as
    the region was empty. guided: steps computed under guidance.
    """

    tokens: int
    edited: int
    full: int
    partial: int = 0
    cached: int = 0
    skipped: int = 0
    guided: int = 0

    def record(self) -> dict[str, int]:
        """For the trace."""
        return asdict(self)


def _within(name: str, value: float | None, low: float, high: float, what: str = "region") -> None:
    if value is None or low <= value <= high:
        return
    bounds = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
    raise ConfigError(f"{what}: expected a value {bounds} for {name}, found {value}. Correct it or leave it out.")
