"""Draws depend on seed, epoch, record and purpose, on each of them, and on nothing else."""

from __future__ import annotations

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.latents import KLCodec, QwenCodec
from reasonedit.training import noise

WORDS = st.lists(st.text(max_size=4) | st.integers(-5, 5), max_size=4)


@settings(deadline=None)
@given(WORDS, WORDS)
def test_digests_of_different_words_differ(left, right):
    """Also where the words run together: ("ab", "c") and ("a", "bc")."""
    same = [str(word) for word in left] == [str(word) for word in right]
    assert (noise.digest(*left) == noise.digest(*right)) == same


def test_every_coordinate_counts_and_nothing_else():
    base = (7, 3, "r", "noise")
    others = [(8, 3, "r", "noise"), (7, 4, "r", "noise"), (7, 3, "s", "noise"), (7, 3, "r", "sigma"), (73, "", "r", "noise")]
    first = noise.normal((4, 5), *base)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert torch.equal(first, noise.normal((4, 5), *base)) and torch.equal(before, torch.get_rng_state())
    for other in others:
        assert not torch.equal(first, noise.normal((4, 5), *other))
        assert noise.uniform(*base) != noise.uniform(*other)


def test_draws_are_the_same_in_any_order_and_thread():
    keys = [(1, epoch, f"r{i}", purpose) for epoch in (0, 1) for i in range(5) for purpose in ("noise", "posterior")]
    expected = [noise.normal((8,), *key) for key in keys]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda key: noise.normal((8,), *key), reversed(keys)))
    assert all(torch.equal(a, b) for a, b in zip(expected, reversed(found), strict=True))


def test_values_never_change():
    """A run that is resumed with a newer version of this package draws as before."""
    assert noise.digest("a", 1).hex()[:16] == "0e9c3156ac694b08"
    assert noise.uniform(0, 0, "t-1", "sigma") == 0.3228418914016116


def test_uniform_numbers_are_uniform_and_uncorrelated():
    values = [noise.uniform(0, epoch, f"r{i}", "sigma") for epoch in range(2) for i in range(2000)]
    assert 0 < min(values) and max(values) < 1
    ordered = sorted(values)
    assert max(abs(v - (i + 0.5) / 4000) for i, v in enumerate(ordered)) < 1.95 / math.sqrt(4000)
    pairs = [(a - 0.5) * (b - 0.5) for a, b in zip(values[:2000], values[2000:], strict=True)]
    assert abs(sum(pairs) / 2000 * 12) < 4 / math.sqrt(2000)


def test_noise_of_records_is_normal_and_independent():
    draws = torch.stack([noise.normal((256,), 0, 0, f"r{i}") for i in range(64)])
    assert draws.dtype == torch.float32
    assert abs(float(draws.mean())) < 0.04 and abs(float(draws.std()) - 1) < 0.03
    correlation = (draws @ draws.T) / 256
    assert float((correlation - torch.diag(correlation.diag())).abs().max()) < 0.35


def test_repeats_of_a_record_draw_anew():
    names = [noise.occurrence("r", number) for number in range(3)]
    assert names[0] == "r" and len(set(names)) == 3
    assert len({noise.uniform(0, 0, name, "sigma") for name in names}) == 3


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_conditions_are_left_out_as_often_as_told(share):
    out = sum(noise.dropped(share, 0, 0, f"r{i}", noise.TEXT) for i in range(4000))
    assert abs(out - 4000 * share) <= 4 * math.sqrt(4000 * share * (1 - share))


def test_text_and_references_are_left_out_independently():
    both = [tuple(noise.dropped(0.5, 0, 0, f"r{i}", purpose) for purpose in (noise.TEXT, noise.REFERENCE)) for i in range(2000)]
    for pair in itertools.product((False, True), repeat=2):
        assert abs(both.count(pair) - 500) < 4 * math.sqrt(2000 * 3 / 16)


def test_refuses_shares_that_are_none():
    with pytest.raises(ConfigError, match=r"dropout\.text: .* found 1\.5"):
        noise.dropped(1.5, 0, 0, "r", noise.TEXT)


def test_posterior_is_sampled_as_at_inference_and_anew_each_epoch():
    config = SimpleNamespace(latent_channels=4, block_out_channels=[1, 1], shift_factor=0.5, scaling_factor=2.0)
    codec = KLCodec(SimpleNamespace(config=config))
    moments = (torch.full((1, 4, 2, 2), 3.0), torch.full((1, 4, 2, 2), math.log(0.25)))
    keys = ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    draws = [noise.posterior(codec, moments, 0, epoch, "r", picture) for epoch, picture in keys]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2]) and not torch.equal(draws[0], draws[3])
    many = torch.cat([noise.posterior(codec, moments, 0, epoch, "r", "a") for epoch in range(200)])
    assert float(many.mean()) == pytest.approx((3.0 - 0.5) * 2, abs=0.1) and float(many.std()) == pytest.approx(1.0, abs=0.1)


def test_posterior_of_a_mode_is_the_mode():
    config = SimpleNamespace(z_dim=2, temperal_downsample=[True], latents_mean=[1.0, 2.0], latents_std=[0.5, 4.0])
    codec = QwenCodec(SimpleNamespace(config=config))
    moments = (torch.ones(1, 2, 2, 2), None)
    assert torch.equal(noise.posterior(codec, moments, 0, 0, "r", "a"), noise.posterior(codec, moments, 1, 5, "s", "b"))
