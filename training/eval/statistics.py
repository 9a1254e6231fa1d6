"""Means with their uncertainty: percentile bootstrap over items, and paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from ...reasonedit_core.mini.dice import digest

RESAMPLES = 10_000
COVERED = 0.95


def interval(values: Sequence[float], *key: object) -> tuple[float, float]:
    """The central 95 % of the means of resampled `values`. key: what the resampling is drawn from.

    Values measured on the same items get the same resamples when their keys are equal.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found):
        raise ValueError(f"expected one or more values in a row, found shape {found.shape}")
    means = found[_drawn(len(found), key)].mean(axis=1)
    tail = (1 - COVERED) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)


def paired(a: Sequence[float], b: Sequence[float], *key: object) -> tuple[float, float, float]:
    """Mean of a - b, item by item, and its interval."""
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return (float(difference.mean()), *interval(difference, *key))


@lru_cache(maxsize=8)
def _drawn(number: int, key: tuple[object, ...]) -> np.ndarray:
    """(RESAMPLES, number): which items each resample holds."""
    rng = np.random.Generator(np.random.PCG64(digest("bootstrap", number, *key)))
    return rng.integers(0, number, (RESAMPLES, number), dtype=np.int32)
