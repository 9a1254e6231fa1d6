"""Regions as values: plans of steps, masks, clean-up, decays and their files; and the loop on velocities that are known."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core import flow
from reasonedit.reasonedit_core.denoisers.region import denoise
from reasonedit.reasonedit_core.denoisers.region_find import cleaned, found_tokens, masked_tokens
from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.latents import pack
from reasonedit.reasonedit_core.regions import Decay, GuidanceInterval, Region, RegionUse, read_decay
from reasonedit.reasonedit_core.types import LatentImage
from reasonedit.tests.peer.recipe import draw
from reasonedit.tests.regions import known, mask_of


def letters(region: Region, steps: int) -> str:
    return "".join("F" if full else "P" for full in region.plan(steps))


# ---- plans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "steps", "plan"),
    [
        (Region(), 28, "FFFFFFPPPPPPPPPFPPPPPPPPPPFF"),  # RegionE's own: 9 of 28
        (Region(), 1, "F"),
        (Region(), 2, "F" + "P"),
        (Region(), 4, "FFPP"),
        (Region(), 8, "FFPPFPPF"),
        (Region(first=2, last=1, refresh=()), 8, "FFPPPPPF"),
        (Region(first=2, last=0, every=2), 9, "FFPPFPPFP"),
        (Region(first=1, last=0, every=3, refresh=(3,)), 9, "FPFPFPPPF"),
        (Region(first=99), 5, "FFFFF"),
        (Region(first=1, last=99), 5, "FFFFF"),
        (Region(first=1, last=0, refresh=(1, 4)), 5, "FPPFP"),
    ],
)
def test_plans(region, steps, plan):
    assert letters(region, steps) == plan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"first": 0}, "at least 1 for first, found 0"),
        ({"last": -1}, "at least 0 for last"),
        ({"every": 0}, "at least 1 for every"),
        ({"refresh": (0,)}, "at least 1 for refresh"),
        ({"threshold": 1.5}, "from -1 to 1 for threshold, found 1.5"),
        ({"tolerance": float("nan")}, "for tolerance, found nan"),
        ({"erode": -1}, "for erode"),
        ({"mask": torch.zeros(3, 4)}, r"expected a mask \(1, 1, H, W\), found \(3, 4\)"),
    ],
)
def test_values_out_of_range_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Region(**options)


def test_a_refresh_beyond_the_last_step_is_refused():
    with pytest.raises(ConfigError, match="from 1 to 4, found 5"):
        Region(refresh=(2, 5)).plan(4)


@pytest.mark.parametrize("bounds", [(0.6, 0.4), (-0.1, 1.0), (0.0, 1.1), (float("nan"), 1.0)])
def test_intervals_out_of_range_are_refused(bounds):
    with pytest.raises(ConfigError, match="expected 0 <= low <= high <= 1"):
        GuidanceInterval(*bounds)


# ---- the region ----------------------------------------------------------------------------------------------------------


@given(data=st.data(), height=st.integers(1, 9), width=st.integers(1, 9), cell=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_mask_marks_the_tokens_it_touches(data, height, width, cell):
    edited = torch.tensor(data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width)))
    found = masked_tokens(mask_of(edited.view(height, width), cell), (height, width))
    assert torch.equal(found, edited)


def test_a_mask_of_any_size_meets_the_grid():
    mask = torch.zeros(1, 1, 101, 67)
    mask[..., 60, 33] = 0.5
    assert masked_tokens(mask, (4, 5)).view(4, 5).nonzero().tolist() == [[2, 2]]
    assert masked_tokens(mask * 0.9, (4, 5)).sum() == 0, "less than a half is no mark"
    assert masked_tokens(torch.ones(1, 1, 1, 1), (4, 5)).all(), "smaller than the grid"


def picture(text: str) -> torch.Tensor:
    return torch.tensor([[c == "#" for c in row] for row in text.split()])


def test_clean_up_removes_specks_and_grows_the_rest():
    found = picture(".......... ..#....... .......... ......###. ......###. ......###. ..........")
    assert cleaned(found, 1, 0).nonzero().tolist() == [[4, 7]]
    assert torch.equal(cleaned(found, 0, 0), found)
    assert cleaned(found, 1, 1).nonzero().tolist() == [[y, x] for y in (3, 4, 5) for x in (6, 7, 8)]
    assert cleaned(found, 2, 2).sum() == 0


def test_clean_up_at_the_border():
    """The picture goes on beyond its border: a region there is not eaten from outside."""
    found = picture("##... ##... ##...")
    assert torch.equal(cleaned(found, 1, 0), picture("#.... #.... #...."))
    assert cleaned(torch.ones(3, 5, dtype=torch.bool), 2, 0).all()


def test_tokens_are_edited_where_they_head_for_something_else():
    grid, target = (6, 7), draw("picture", (1, 42, 64))
    edited = torch.zeros(grid, dtype=torch.bool)
    edited[1:5, 2:6] = True
    estimate = torch.where(edited.flatten()[None, :, None], draw("other", (1, 42, 64)), 1.7 * target)
    source = LatentImage(target, *grid)
    assert torch.equal(found_tokens(estimate, source, grid, threshold=0.9, erode=0, dilate=0).view(grid), edited)
    grown = found_tokens(estimate, source, grid, threshold=0.9).view(grid)
    assert grown.sum() > edited.sum() and (grown | ~edited).all()


def test_a_source_of_another_size_is_compared_by_its_look():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 12), torch.linspace(-1, 1, 16), indexing="ij")
    scene = torch.stack([y, x, y * x, y + x])[None]
    large, small = (torch.nn.functional.interpolate(scene, size, mode="bilinear") for size in ((24, 32), (12, 16)))
    source, estimate = LatentImage(pack(large), 12, 16), pack(small)
    found = found_tokens(estimate, source, (6, 8), threshold=0.9, erode=0, dilate=0)
    assert found.sum() <= 2
    assert found_tokens(estimate.flip(1), source, (6, 8), threshold=0.9, erode=0, dilate=0).sum() > 40


# ---- decays --------------------------------------------------------------------------------------------------------------

DECAY = Decay((1.0, 0.8, 0.5, 0.1), (0.9, 1.1, 1.3), (0.02, 0.01, 0.3), "a model")


def test_decays_are_multiplied_over_what_lies_between():
    assert DECAY.between(1.0, 0.8) == pytest.approx((0.9, 0.02))
    assert DECAY.between(1.0, 0.1) == pytest.approx((0.9 * 1.1 * 1.3, 0.33))
    assert DECAY.between(0.65, 0.5) == pytest.approx((1.1**0.5, 0.005)), "half of a stretch"
    assert DECAY.between(0.1, 0.0) == pytest.approx((1.3**0.25, 0.075)), "beyond the end as over the last stretch"
    assert DECAY.between(0.4, 0.4) == pytest.approx((1.0, 0.0))


@given(a=st.floats(0, 1), b=st.floats(0, 1), c=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_decay_over_two_stretches_is_that_of_both(a, b, c):
    whole, parts = DECAY.between(a, c), (DECAY.between(a, b), DECAY.between(b, c))
    assert whole == pytest.approx((parts[0][0] * parts[1][0], parts[0][1] + parts[1][1]), abs=1e-9)


def test_decay_files(tmp_path):
    path = tmp_path / "decay.json"
    path.write_text(json.dumps(DECAY.record()))
    assert read_decay(path) == DECAY


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "none that can be read"),
        ("[]", "no object with version 1"),
        ('{"version": 2}', "no object with version 1"),
        ('{"version": 1, "sigmas": [1, 0]}', "no lists of numbers"),
        ('{"version": 1, "sigmas": [1, 0.5], "gammas": [1, 1], "drifts": [0]}', "K gammas and K drifts, found 2, 2 and 1"),
        ('{"version": 1, "sigmas": [0.5, 1], "gammas": [1], "drifts": [0]}', "fall within 1..0"),
        ('{"version": 1, "sigmas": [1, 0.5], "gammas": [0], "drifts": [0]}', "gammas of a decay are positive"),
        ('{"version": 1, "sigmas": [1, 0.5], "gammas": [1], "drifts": [NaN]}', "drifts not negative"),
    ],
)
def test_faulty_decay_files_are_named(tmp_path, content, words):
    path = tmp_path / "decay.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words) as error:
        read_decay(path)
    assert str(path) in str(error.value)


# ---- the loop, on known velocities ---------------------------------------------------------------------------------------


@st.composite
def runs(draw_):
    steps = draw_(st.integers(1, 40))
    grid = draw_(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    edited = draw_(st.lists(st.booleans(), min_size=grid[0] * grid[1], max_size=grid[0] * grid[1]))
    region = Region(
        mask=mask_of(torch.tensor(edited).view(grid)),
        first=draw_(st.none() | st.integers(1, 45)),
        last=draw_(st.none() | st.integers(0, 45)),
        refresh=draw_(st.none() | st.lists(st.integers(1, steps), max_size=3).map(tuple)),
        every=draw_(st.none() | st.integers(1, 9)),
    )
    where = draw_(st.sampled_from([flow.STEP1X, flow.QWEN, flow.FlowSchedule(dynamic=False, shift=1.0)]))
    return steps, grid, torch.tensor(edited), region, flow.sigmas(steps, grid[0] * grid[1], where)


@given(runs())
@settings(max_examples=60, deadline=None)
def test_straight_paths_are_followed_exactly_by_any_plan(case):
    """Where velocities do not change, waiting loses nothing: every step shows what the full path shows."""
    steps, grid, edited, region, sigmas = case
    n, calls, shown, exact = len(edited), [], [], []
    noise, velocity = draw("noise", (1, n, 4)), draw("velocity", (1, n, 4))
    guided = known(lambda sigma: velocity, counts=calls)
    found, use = denoise(guided, noise, sigmas, grid=grid, region=region, on_step=lambda *step: shown.append(step))
    made = list(calls)
    wanted = flow.euler(guided, noise, sigmas, on_step=lambda *step: exact.append(step))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    assert [x[:2] for x in shown] == [x[:2] for x in exact] == [(i + 1, steps) for i in range(steps)]
    for one, other in zip(shown, exact, strict=True):
        torch.testing.assert_close(one[2], other[2], atol=1e-5, rtol=0)

    plan, some = region.plan(steps), int(edited.sum())
    partial = 0 if some in (0, n) else plan.count(False)
    skipped = plan.count(False) if some == 0 else 0
    assert use == RegionUse(n, some, steps - partial - skipped, partial, 0, skipped)
    assert plan[0] and sorted(made) == sorted([n] * use.full + [some] * use.partial)


@given(runs(), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_velocity_that_only_fades_is_reused_exactly(case, seed):
    """v(sigma) = gamma(sigma) v, with the decay that belongs to it: the full path's picture from a few velocities."""
    steps, grid, edited, region, sigmas = case
    n = len(edited)
    noise, direction = draw("noise", (1, n, 4), seed), draw("velocity", (1, n, 4), seed)

    def field(sigma):
        return direction * 2.0 ** (1.5 * (1 - sigma))

    decay = Decay((1.0, 0.6, 0.0), (2.0**0.6, 2.0**0.9), (0.0, 0.0))
    options = {name: getattr(region, name) for name in ("first", "last", "refresh", "every")}
    cached = Region(mask=torch.ones(1, 1, 1, 1), decay=decay, tolerance=0.0, **options)
    calls: list[int] = []
    found, use = denoise(known(field, counts=calls), noise, sigmas, grid=grid, region=cached)
    torch.testing.assert_close(found, flow.euler(known(field), noise, sigmas), atol=1e-4, rtol=1e-4)
    assert (use.cached, use.full) == (cached.plan(steps).count(False), cached.plan(steps).count(True))
    assert len(calls) == use.full


def test_reuse_stops_where_the_drift_since_the_last_velocity_is_too_large():
    """Each step drifts by 0.04, and 0.1 is allowed: after a velocity, two steps reuse it and the third does not."""
    steps, grid = 12, (2, 3)
    sigmas = flow.sigmas(steps, 6, flow.FlowSchedule(dynamic=False, shift=1.0))
    decay = Decay(tuple(sigmas[:-1].tolist()), (1.0,) * (steps - 1), (0.04,) * (steps - 1))
    region = Region(mask=mask_of(torch.eye(2, 3) > 0), first=2, last=1, refresh=(8,), decay=decay, tolerance=0.1)
    calls: list[int] = []
    velocity = draw("velocity", (1, 6, 4))
    found, use = denoise(known(lambda s: velocity, counts=calls), draw("n", (1, 6, 4)), sigmas, grid=grid, region=region)
    #                           1  2  3  4  5  6  7  8  9 10 11 12
    # full, partial, cached:    F  F  c  c  P  c  c  F  c  c  P  F
    assert calls == [6, 6, 2, 6, 2, 6]
    assert (use.full, use.partial, use.cached) == (4, 2, 6)


def test_a_velocity_is_not_reused_across_the_border_of_the_guidance():
    steps, n = 10, 6
    sigmas = flow.sigmas(steps, n, flow.FlowSchedule(dynamic=False, shift=1.0))
    decay = Decay((1.0, 0.0), (1.0,), (0.0,))
    region = Region(mask=torch.ones(1, 1, 1, 1), first=1, last=0, refresh=(), decay=decay)
    velocity, calls = draw("velocity", (1, n, 4)), []
    one = known(lambda s: velocity, counts=calls)
    pair = flow.guided_velocity(one.predict, one.cond, one.cond, scale=2.0, combine=flow.combine_qwen, step=one.step)
    _, use = denoise(pair, draw("n", (1, n, 4)), sigmas, grid=(2, 3), region=region, interval=GuidanceInterval(0.35, 0.75))
    assert (use.full, use.cached, use.guided, len(calls)) == (3, 7, 1, 4)
