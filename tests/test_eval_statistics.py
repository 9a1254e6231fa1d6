"""Intervals: right in the cases that can be computed by hand, repeatable, and covering what they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.training.eval.statistics import interval, paired


def test_equal_values_have_no_width():
    assert interval([3.5] * 7, 1) == pytest.approx((3.5, 3.5))


def test_the_width_is_that_of_the_mean():
    """For many values the interval is mean +- 1.96 standard errors."""
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = interval(values, 0)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.05 * error)
    assert high == pytest.approx(values.mean() + error, abs=0.05 * error)


def test_it_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        low, high = interval(rng.binomial(1, 0.3, 60) * 10.0, "cover")
        hits += low <= 3.0 <= high
    assert 0.90 <= hits / 200 <= 0.99


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(0, 10), min_size=1, max_size=30), st.integers())
def test_repeatable_and_around_the_mean(values, seed):
    low, high = interval(values, seed, "all")
    assert (low, high) == interval(values, seed, "all")
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


def test_the_key_draws_other_resamples():
    values = list(range(20))
    assert interval(values, 0) != interval(values, 1)


def test_pairs_are_compared_item_by_item():
    """A constant gain is certain, however much the items differ; each alone is not."""
    base = np.random.default_rng(2).uniform(0, 9, 50)
    assert paired(base + 0.5, base, 0) == pytest.approx((0.5, 0.5, 0.5))
    low, high = interval(base, 0)
    assert high - low > 0.5


def test_nothing_is_no_mean():
    with pytest.raises(ValueError, match="one or more"):
        interval([], 0)
