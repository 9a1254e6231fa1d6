"""How noisy a training target is: sigma in 0..1, 1 = noise, drawn from a uniform number by the inverse of the distribution.

One uniform number in, one sigma out: a draw is then a pure function of (seed, epoch, record) and costs no generator. The
distributions are those that the public trainers use; the released recipe is `uniform`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from ..reasonedit_core import flow
from ..reasonedit_core.errors import ConfigError

Kind = Literal["uniform", "logit_normal", "shift", "dynamic", "lightning"]
KINDS: tuple[Kind, ...] = ("uniform", "logit_normal", "shift", "dynamic", "lightning")

STEP1X_SHIFT = 3.1582
"""The shift of the official LoRA script of Step1X-Edit."""

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Timesteps:
    """A distribution of sigma.

    uniform: as ReasonEdit was trained. logit_normal: the logistic of a normal number of `mean` and `std`. shift: a
    logit-normal number, moved towards noise by the fixed `shift` (what `shift` means in the official Step1X-Edit script).
    dynamic: the same, but the shift grows with the number of target tokens as `schedule` has it for inference. lightning:
    one of the `steps` sigmas that a distilled Lightning checkpoint visits, all equally often.
    """

    kind: Kind = "uniform"
    shift: float = STEP1X_SHIFT
    mean: float = 0.0
    std: float = 1.0
    steps: int = 4
    schedule: flow.FlowSchedule = flow.STEP1X

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"timesteps.kind: expected one of {', '.join(KINDS)}, found {self.kind!r}. Correct the recipe.")
        for name in ("shift", "std"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"timesteps.{name}: expected a number above 0, found {value}. Correct the recipe.")
        if not math.isfinite(self.mean):
            raise ConfigError(f"timesteps.mean: expected a number, found {self.mean}. Correct the recipe.")
        if self.steps < 1:
            raise ConfigError(f"timesteps.steps: expected at least 1 step, found {self.steps}. Correct the recipe.")

    def sigma(self, uniform: float, n_tokens: int) -> float:
        """The sigma at the quantile `uniform` (0 < uniform < 1); n_tokens: target tokens of the picture, without references."""
        if not 0 < uniform < 1:
            raise ConfigError(f"expected a quantile between 0 and 1, found {uniform}. Draw it with `noise.uniform`.")
        if self.kind == "uniform":
            return uniform
        if self.kind == "lightning":
            grid = flow.sigmas(self.steps, n_tokens, flow.LIGHTNING)
            return float(grid[int(uniform * self.steps)])
        plain = logistic(self.mean + self.std * _NORMAL.inv_cdf(uniform))
        if self.kind == "logit_normal":
            return plain
        return shifted(plain, self.shift if self.kind == "shift" else dynamic_shift(n_tokens, self.schedule))


def shifted(sigma: float, shift: float) -> float:
    """sigma moved towards noise (shift > 1) or picture (shift < 1); 0 and 1 stay."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def dynamic_shift(n_tokens: int, schedule: flow.FlowSchedule) -> float:
    """The factor by which inference shifts its sigmas for a target of this many tokens."""
    if not schedule.dynamic:
        return schedule.shift
    mu = flow.shift_of(n_tokens, schedule)
    return mu if schedule.linear else math.exp(mu)


def logistic(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow, strictly between 0 and 1 as far as float64 can tell."""
    value = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
    return min(max(value, math.ulp(0.0)), math.nextafter(1.0, 0.0))


def validation_grid(n: int = 9) -> tuple[float, ...]:
    """The sigmas of a validation: 1/(n+1), ..., n/(n+1). Fixed, whatever a stage draws in training, so that curves compare."""
    if n < 1:
        raise ConfigError(f"expected at least 1 validation sigma, found {n}.")
    return tuple(step / (n + 1) for step in range(1, n + 1))
