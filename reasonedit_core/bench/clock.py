"""Arms side by side: warm-up, rounds in which every arm runs once, medians, spreads and paired ratios. Standard library only.

Machines slow down and speed up while a benchmark runs. Arms that take turns share that, and a ratio of two runs of one round
hardly sees it; so ratios are medians over rounds, not ratios of medians.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Run = Callable[[int], Mapping[str, float]]
"""Number of the run -> seconds by part; the part "total" is the arm itself."""

TOTAL = "total"


@dataclass(frozen=True, slots=True)
class Budget:
    """The seconds that something may take, counted from when this is made; without a number as many as it takes."""

    seconds: float = math.inf
    start: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        """Seconds that have passed."""
        return time.monotonic() - self.start

    @property
    def left(self) -> float:
        """Seconds that remain, not less than none."""
        return max(0.0, self.seconds - self.spent)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one arm, or of a part of it, over the rounds. ratio: how many times the baseline's time it fits in; None
    without a baseline. spread: median absolute deviation."""

    times: tuple[float, ...]
    median: float
    spread: float
    ratio: float | None = None


def interleave(
    arms: Mapping[str, Run], rounds: int, warmup: int = 1, budget: Budget | None = None
) -> dict[str, list[Mapping[str, float]]]:
    """Run every arm `warmup` times, then `rounds` rounds of all arms in turn; what the rounds gave, by arm.

    Every second round goes backwards, so that no arm always follows the same one. Runs are numbered alike in all arms.
    budget: no round after the first begins that, by the longest so far, would not end within it.
    """
    budget, longest = budget or Budget(), 0.0
    for number in range(warmup):
        for run in arms.values():
            run(number)
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in arms}
    for number in range(warmup, warmup + rounds):
        began = time.monotonic()
        if number > warmup and longest >= budget.left:
            break
        order = list(arms.items())
        for name, run in reversed(order) if number % 2 else order:
            found[name].append(run(number))
        longest = max(longest, time.monotonic() - began)
    return found


def summary(found: Mapping[str, Sequence[Mapping[str, float]]], baseline: str | None = None) -> dict[tuple[str, str], Timing]:
    """Timings by (arm, part), parts as the arms named them. The baseline's own ratio is 1."""
    out = {}
    for name, runs in found.items():
        for part in runs[0] if runs else ():
            times = tuple(run[part] for run in runs)
            ratio = None
            if baseline in found and all(times) and all(part in run for run in found[baseline]):
                base = [run[part] for run in found[baseline]]
                ratio = statistics.median(b / t for b, t in zip(base, times, strict=True))
            out[name, part] = Timing(times, statistics.median(times), deviation(times), ratio)
    return out


def deviation(times: Sequence[float]) -> float:
    """Median absolute deviation from the median."""
    middle = statistics.median(times)
    return statistics.median(abs(time - middle) for time in times)
