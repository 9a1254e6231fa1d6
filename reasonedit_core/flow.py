"""Flow matching: the schedule of sigmas, the Euler loop, and the rules that combine two predictions under true CFG.

sigma is the share of noise in the latents: 1 = noise, 0 = picture; velocity = noise - picture. The numbers equal those of
diffusers' FlowMatchEulerDiscreteScheduler (a test holds them together), so pictures of one seed can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import CheckpointError, ConfigError, Interrupted, ReasonEditError
from .types import Conditioning, OnStep, ShouldStop

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(latents (1, N, C), sigma ()) -> velocity (1, N, C)."""

Predict = Callable[[torch.Tensor, torch.Tensor, Conditioning], torch.Tensor]
"""(latents (B, N, C), sigma (B,), conditioning of batch B) -> velocity (B, N, C)."""

Combine = Callable[[torch.Tensor, torch.Tensor, float, "torch.Tensor | float"], torch.Tensor]
"""(conditional, unconditional (B, N, C), guidance scale, sigma ()) -> velocity (B, N, C)."""

Step = Callable[..., torch.Tensor]
"""`kernels.guided_step`, or what is called like it: guidance and Euler step in one."""

_UNSUPPORTED = ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling")


@dataclass(frozen=True, slots=True)
class FlowSchedule:
    """How N steps are spread over 1..0. The defaults are those of Step1X-Edit (FLUX.1).

    dynamic: the shift grows with the number of target tokens, linearly from `base_shift` at `base_tokens` to `max_shift` at
    `max_tokens`; else the fixed `shift` is used. terminal: the last non-zero sigma that the schedule is stretched to.
    """

    train_steps: int = 1000
    dynamic: bool = True
    shift: float = 3.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096
    terminal: float | None = None
    linear: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any], path: str = "scheduler_config.json") -> FlowSchedule:
        """Read the entries of a diffusers `scheduler_config.json`; `path` is named in errors."""
        name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise CheckpointError(
                f"{path}: expected a FlowMatchEulerDiscreteScheduler, found {name}. Take the scheduler folder of the "
                "Step1X-Edit or Qwen-Image-Edit release."
            )
        active = [key for key in _UNSUPPORTED if config.get(key)]
        if active:
            raise CheckpointError(f"{path}: {', '.join(active)} is on, which no supported system uses. Set it to false.")
        kind = config.get("time_shift_type", "exponential")
        if kind not in ("exponential", "linear"):
            raise CheckpointError(f"{path}: time_shift_type must be exponential or linear, found {kind!r}.")
        return cls(
            train_steps=int(config.get("num_train_timesteps", 1000)),
            dynamic=bool(config.get("use_dynamic_shifting", False)),
            shift=float(config.get("shift", 1.0)),
            base_shift=float(config.get("base_shift", 0.5)),
            max_shift=float(config.get("max_shift", 1.15)),
            base_tokens=int(config.get("base_image_seq_len", 256)),
            max_tokens=int(config.get("max_image_seq_len", 4096)),
            terminal=config.get("shift_terminal") or None,
            linear=kind == "linear",
        )


STEP1X = FlowSchedule()
QWEN = FlowSchedule(shift=1.0, max_shift=0.9, max_tokens=8192, terminal=0.02)
# Distilled Lightning LoRAs were trained with one shift of log 3 at every size and no stretched end.
LIGHTNING = FlowSchedule(shift=1.0, base_shift=math.log(3), max_shift=math.log(3), max_tokens=8192)


def shift_of(n_tokens: int, schedule: FlowSchedule) -> float:
    """The shift mu for a target of `n_tokens` packed tokens (references do not count)."""
    slope = (schedule.max_shift - schedule.base_shift) / (schedule.max_tokens - schedule.base_tokens)
    return n_tokens * slope + (schedule.base_shift - slope * schedule.base_tokens)


def sigmas(steps: int, n_tokens: int, schedule: FlowSchedule) -> torch.Tensor:
    """The sigmas of `steps` Euler steps, (steps + 1,) float32 on the CPU, from 1 down to 0."""
    if steps < 1:
        raise ConfigError(f"The number of denoising steps must be at least 1, got {steps}.")
    values = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    if schedule.dynamic:
        mu = shift_of(n_tokens, schedule)
        weight = mu if schedule.linear else math.exp(mu)
        values = weight / (weight + (1 / values - 1))
    else:
        values = schedule.shift * values / (1 + (schedule.shift - 1) * values)
    if schedule.terminal:
        rest = 1 - values
        # One step has nothing to stretch: the official formula is 0/0 there, so the single sigma stays as it is.
        if rest[-1] > 0:
            values = 1 - rest / (rest[-1] / (1 - schedule.terminal))
    return torch.cat([torch.from_numpy(values).to(torch.float32), torch.zeros(1)])


def euler(
    velocity: Velocity,
    latents: torch.Tensor,
    sigmas: torch.Tensor,
    *,
    on_step: OnStep | None = None,
    should_stop: ShouldStop | None = None,
) -> torch.Tensor:
    """Integrate from `latents` (1, N, C) at sigmas[0] down to sigmas[-1]; returns (1, N, C) in the same dtype.

    A `Guided` velocity that has a fused step takes it. on_step(i, n, latents) is called after step i of n. should_stop is
    polled before every step; true raises Interrupted.
    """
    n = len(sigmas) - 1
    sigmas = sigmas.to(latents.device, torch.float32)
    for i in range(n):
        if should_stop is not None and should_stop():
            raise Interrupted(f"Stopped before denoising step {i + 1} of {n}, as asked.")
        if isinstance(velocity, Guided) and velocity.fused:
            latents = velocity.advance(latents, sigmas[i], sigmas[i + 1])
        else:
            v = velocity(latents, sigmas[i])
            latents = euler_step(latents, v, sigmas[i], sigmas[i + 1])
        if i in (0, n - 1):
            check_finite(latents, i + 1, n)
        if on_step is not None:
            on_step(i + 1, n, latents)
    return latents


def euler_step(latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
    """latents and velocity (1, N, C) at sigma () -> latents at sigma_next (), in the dtype of the velocity."""
    # The sum is made in float32 from latents kept in the model's dtype: that is what the released scheduler does.
    return (latents.to(torch.float32) + (sigma_next - sigma) * velocity).to(velocity.dtype)


def check_finite(latents: torch.Tensor, step: int, steps: int) -> None:
    """Raise ReasonEditError for NaN and infinity. Only the first and the last step are looked at: each look waits for the
    device."""
    bad = int((~torch.isfinite(latents)).sum())
    if bad:
        raise ReasonEditError(
            f"After denoising step {step} of {steps}, {bad} of {latents.numel()} latent values are NaN or infinite "
            f"({str(latents.dtype).removeprefix('torch.')} on {latents.device.type}); the picture would be black. Usual "
            "causes: float16 overflow (load with dtype bfloat16 or float32), an attention backend that does not suit the card "
            "(`reasonedit doctor` names it), or damaged weights."
        )


@dataclass(frozen=True, slots=True)
class Step1XGuidance:
    """True CFG of Step1X-Edit with its norm rule: a per-token difference longer than 1 is divided by length ** power.

    truncate: the rule holds while sigma > truncate. 0 = always, which is what the released diffusers pipelines do (they
    compare a threshold meant for 0..1 with 0..1000); 0.93 = what the original v1.1 code does; 1 = never (v1.0).
    """

    power: float = 0.4
    truncate: float = 0.0

    def __call__(self, cond: torch.Tensor, uncond: torch.Tensor, scale: float, sigma: torch.Tensor | float) -> torch.Tensor:
        """(B, N, C) conditional and unconditional velocities -> (B, N, C)."""
        # Comparing sigma waits for the device, which the rule of every step does not need.
        on = self.truncate <= 0 or bool(sigma > self.truncate)
        return combine_step1x(cond, uncond, scale, power=self.power, on=on)


def step1x_guidance(variant: str) -> Step1XGuidance:
    """The rule of the released code of v1.0 (norm rule off), or of v1.1 and v1.2 (always on)."""
    return Step1XGuidance(truncate=1.0 if variant == "v1.0" else 0.0)


def combine_step1x(
    cond: torch.Tensor, uncond: torch.Tensor, scale: float, *, power: float = 0.4, on: bool = True
) -> torch.Tensor:
    """uncond + scale * (cond - uncond), the difference damped per token over the last axis when `on`. (B, N, C)."""
    step = scale * (cond - uncond)
    if on:
        length = torch.norm(cond - uncond, dim=-1, keepdim=True)
        step = step / torch.where(length > 1, length**power, torch.ones_like(length))
    return uncond + step


def combine_qwen(cond: torch.Tensor, uncond: torch.Tensor, scale: float, sigma: torch.Tensor | float = 1.0) -> torch.Tensor:
    """True CFG of Qwen-Image: the combined velocity gets the per-token length of the conditional one. (B, N, C).

    sigma is taken so that this is a `Combine`; the rule is the same at every step.
    """
    combined = uncond + scale * (cond - uncond)
    return combined * (torch.norm(cond, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True))


def rule_of(combine: Combine) -> dict[str, Any] | None:
    """What `kernels.guided_step` calls a guidance rule, as keyword arguments; None for a rule it does not have."""
    if isinstance(combine, Step1XGuidance):
        return {"rule": "step1x", "power": combine.power, "truncate": combine.truncate}
    return {"rule": "qwen"} if combine is combine_qwen else None


@dataclass(frozen=True, slots=True)
class Guided:
    """The velocity of one prediction without `uncond`, else of two that `combine` puts together; see `guided_velocity`."""

    predict: Predict
    cond: Conditioning
    uncond: Conditioning | None
    scale: float
    combine: Combine
    joined: Conditioning | None = None
    step: Step | None = None

    @property
    def fused(self) -> bool:
        """Whether `advance` can be used."""
        return self.step is not None and (self.uncond is None or rule_of(self.combine) is not None)

    def __call__(self, latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """latents (1, N, C), sigma () -> velocity (1, N, C)."""
        positive, negative = self._predictions(latents, sigma)
        return positive if negative is None else self.combine(positive, negative, self.scale, sigma)

    def advance(self, latents: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor) -> torch.Tensor:
        """latents (1, N, C) at sigma () -> those at sigma_next (), in the dtype of the predictions; nothing waits for the
        device, whatever the rule asks of sigma."""
        positive, negative = self._predictions(latents, sigma)
        if negative is None:
            return self.step(latents, positive, sigma, sigma_next)
        return self.step(latents, positive, sigma, sigma_next, uncond=negative, scale=self.scale, **rule_of(self.combine))

    def _predictions(self, latents: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.uncond is None:
            return self.predict(latents, sigma.expand(1), self.cond), None
        if self.joined is not None:
            return self.predict(torch.cat([latents, latents]), sigma.expand(2), self.joined).chunk(2)
        return tuple(self.predict(latents, sigma.expand(1), conditioning) for conditioning in (self.cond, self.uncond))


def guided_velocity(
    predict: Predict,
    cond: Conditioning,
    uncond: Conditioning | None,
    *,
    scale: float,
    combine: Combine,
    joined: Conditioning | None = None,
    step: Step | None = None,
) -> Guided:
    """The velocity that `euler` follows: one prediction without `uncond`, else two that `combine` puts together.

    joined: both conditionings as one batch of two (conditional first); given, each step is a single forward of batch two.
    step: `kernels.guided_step`, by which `euler` then combines and steps at once, in float32 and rounded once; None keeps the
    released order of roundings.
    """
    return Guided(predict, cond, uncond, scale, combine, joined, step)
