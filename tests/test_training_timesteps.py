"""Distributions of sigma: against their analytic form, against inference, and a validation grid that never moves."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core import flow
from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.training import noise
from reasonedit.training.timesteps import KINDS, STEP1X_SHIFT, Timesteps, dynamic_shift, shifted, validation_grid

N = 4000
KS = 1.95 / math.sqrt(N)
"""Bound on the Kolmogorov-Smirnov distance that a right distribution exceeds once in a thousand sets of draws."""


def draws(timesteps: Timesteps, n_tokens: int = 1024, seed: int = 0) -> list[float]:
    return sorted(noise.sigma(timesteps, n_tokens, seed, 0, f"r{i}") for i in range(N))


def distance(values: list[float], cdf) -> float:
    """Largest distance between the empirical and the given distribution function."""
    n = len(values)
    return max(max(abs(cdf(v) - i / n), abs(cdf(v) - (i + 1) / n)) for i, v in enumerate(values))


def logit(x: float) -> float:
    return math.log(x / (1 - x))


def unshifted(sigma: float, shift: float) -> float:
    return sigma / (shift - (shift - 1) * sigma)


CDFS = {
    "uniform": (Timesteps(), lambda s: s),
    "logit_normal": (Timesteps("logit_normal", mean=-0.3, std=0.8), lambda s: NormalDist(-0.3, 0.8).cdf(logit(s))),
    "shift": (Timesteps("shift"), lambda s: NormalDist().cdf(logit(unshifted(s, 3.1582)))),
    "dynamic": (
        Timesteps("dynamic"),
        lambda s: NormalDist().cdf(logit(unshifted(s, math.exp(flow.shift_of(1024, flow.STEP1X))))),
    ),
}


@pytest.mark.parametrize("name", CDFS)
def test_draws_follow_the_distribution(name):
    timesteps, cdf = CDFS[name]
    assert distance(draws(timesteps), cdf) < KS


@pytest.mark.parametrize("name", CDFS)
def test_the_distance_tells_distributions_apart(name):
    """The test above can fail: every pair of distributions here is further apart than its bound."""
    for other, (timesteps, _) in CDFS.items():
        if other != name:
            assert distance(draws(timesteps), CDFS[name][1]) > KS


def test_lightning_draws_its_grid_evenly():
    grid = flow.sigmas(4, 4096, flow.LIGHTNING)[:-1].tolist()
    found = draws(Timesteps("lightning", steps=4), 4096)
    assert sorted(set(found), reverse=True) == grid and grid[0] == 1.0
    counts = [found.count(sigma) for sigma in grid]
    assert max(abs(count - N / 4) for count in counts) < 4 * math.sqrt(N * 3 / 16)


def test_dynamic_shift_is_that_of_inference():
    """A quantile of one half is sigma one half before the shift: the sigma that inference visits there."""
    for schedule in (flow.STEP1X, flow.QWEN, flow.LIGHTNING, flow.FlowSchedule(dynamic=False, shift=2.5)):
        halfway = flow.sigmas(2, 3000, flow.FlowSchedule(**{**_fields(schedule), "terminal": None}))[1]
        assert torch.isclose(torch.tensor(Timesteps("dynamic", schedule=schedule).sigma(0.5, 3000)), halfway, atol=1e-6)
    assert dynamic_shift(4096, flow.STEP1X) > dynamic_shift(256, flow.STEP1X)


def _fields(schedule):
    return {name: getattr(schedule, name) for name in schedule.__dataclass_fields__}


@settings(deadline=None)
@given(st.sampled_from(KINDS), st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(1, 16384))
def test_sigma_is_in_range_and_grows_with_its_quantile(kind, quantile, n_tokens):
    timesteps = Timesteps(kind)
    sigma = timesteps.sigma(quantile, n_tokens)
    assert 0 <= sigma <= 1
    higher = timesteps.sigma(min(quantile + 0.01, math.nextafter(1.0, 0.0)), n_tokens)
    assert higher <= sigma if kind == "lightning" else higher >= sigma


def test_shift_keeps_the_ends_and_moves_towards_noise():
    assert (shifted(0.0, 3.0), shifted(1.0, 3.0)) == (0.0, 1.0)
    assert shifted(0.5, STEP1X_SHIFT) == pytest.approx(3.1582 / 4.1582) and shifted(0.5, 1.0) == 0.5


def test_validation_grid_is_fixed():
    assert validation_grid() == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert validation_grid(1) == (0.5,)


@pytest.mark.parametrize("wrong", [{"kind": "cosmap"}, {"shift": 0.0}, {"std": -1.0}, {"mean": math.nan}, {"steps": 0}])
def test_refuses_what_is_no_distribution(wrong):
    with pytest.raises(ConfigError, match=f"timesteps.{next(iter(wrong))}"):
        Timesteps(**wrong)


@pytest.mark.parametrize("quantile", [0.0, 1.0, math.nan])
def test_refuses_quantiles_at_the_ends(quantile):
    with pytest.raises(ConfigError, match="quantile"):
        Timesteps().sigma(quantile, 1)
