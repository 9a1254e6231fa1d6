"""Region-aware denoising on both DiTs: exact where it must be, what is kept, what waits, and edits that do not mix."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from reasonedit.reasonedit_core import flow
from reasonedit.reasonedit_core.denoisers import join_conditionings
from reasonedit.reasonedit_core.denoisers.region import denoise
from reasonedit.reasonedit_core.errors import ConfigError, Interrupted
from reasonedit.reasonedit_core.fp8 import quantize_linears
from reasonedit.reasonedit_core.lora import apply_lora, find_linears
from reasonedit.reasonedit_core.models import qwen_attention, step1x_transformer
from reasonedit.reasonedit_core.models.keyvalues import KeyValues
from reasonedit.reasonedit_core.regions import GuidanceInterval, Region
from reasonedit.reasonedit_core.types import LatentImage
from reasonedit.tests import regions
from reasonedit.tests.regions import GRID, STEPS, SYSTEMS

N = GRID[0] * GRID[1]
CORNER = regions.corner()
ROWS = CORNER.flatten().nonzero()[:, 0]
OTHERS = (~CORNER).flatten().nonzero()[:, 0]
SOME = Region(mask=regions.mask_of(CORNER), first=2, last=1, refresh=(5,))


@pytest.fixture(params=SYSTEMS)
def system(request):
    return request.param


def setup(system, net=None, seed=0, **how):
    denoiser = regions.make(system, net)
    picture = regions.source(denoiser, seed + 1)
    return denoiser, picture, regions.guided(system, denoiser, picture, **how), regions.noise(denoiser, seed)


def run(system, region, net=None, seed=0, on_step=None, interval=None, **how):
    denoiser, picture, guided, noise = setup(system, net, seed, **how)
    return denoise(
        guided, noise, regions.schedule(system), grid=GRID, source=picture, region=region, interval=interval, on_step=on_step
    )


def full(system, net=None, seed=0, on_step=None, **how):
    _, _, guided, noise = setup(system, net, seed, **how)
    return flow.euler(guided, noise, regions.schedule(system), on_step=on_step)


# ---- the full path -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True], ids=["apart", "joint"])
@pytest.mark.parametrize("fused", [False, True], ids=["released", "fused"])
@pytest.mark.parametrize(
    "region",
    [Region(mask=torch.ones(1, 1, 9, 4)), Region(threshold=1.0), Region(first=STEPS), Region(every=1, first=STEPS - 1), None],
    ids=["mask of all", "all found", "no partial steps", "every second", "no region"],
)
def test_everything_edited_is_the_full_path_bit_by_bit(system, region, fused, batched):
    found, use = run(system, region, fused=fused, batched=batched)
    assert torch.equal(found, full(system, fused=fused, batched=batched))
    assert (use.edited, use.full, use.partial, use.guided) == (N, STEPS, 0, STEPS)


@pytest.mark.parametrize("batched", [False, True], ids=["apart", "joint"])
def test_partial_steps_bring_the_region_nearer_to_the_full_path(system, batched):
    """Nearer than no steps at all; joint and separate passes agree."""
    found, use = run(system, SOME, batched=batched)
    exact = full(system)
    idle = run(system, Region(mask=torch.zeros(1, 1, 4, 4), first=2, last=1, refresh=(5,)))[0]
    apart, without = ((x - exact)[:, ROWS].abs().mean() for x in (found, idle))
    assert 1e-6 < apart < 0.7 * without
    assert (use.tokens, use.edited, use.full, use.partial, use.guided) == (N, len(ROWS), 4, 4, STEPS)
    torch.testing.assert_close(found, run(system, SOME)[0], atol=1e-4, rtol=0)


# ---- what is kept --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A network with an adapter on keys, with 8-bit weights, or as it is."""

    @cache
    def make(system, change):
        net = regions.network(system)
        if change == "lora":
            name, path = "transformer_blocks.0.attn.to_k", tmp_path_factory.mktemp("lora") / "a.safetensors"
            layer = find_linears(net)[name]
            down, up = torch.full((2, layer.in_features), 0.1), torch.linspace(-1, 1, 2 * layer.out_features).view(-1, 2)
            save_file({f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}, path)
            apply_lora(net, path)
        if change == "fp8":
            quantize_linears(net)
        return net

    return make


def one_call(system, net, words=0, batched=False):
    """(call(latents, t, **part), latents, t) of one pass."""
    denoiser = regions.make(system, net)
    pair = [regions.conditioning(denoiser, length, seed) for seed, length in enumerate(regions.LENGTHS)]
    chosen = join_conditionings(*pair) if batched else pair[words]
    picture = regions.source(denoiser)
    batch = 2 if batched else 1

    def call(latents, t, **part):
        return denoiser(latents, torch.full((batch,), t), chosen, grid=GRID, references=(picture,), **part)

    return call, regions.noise(denoiser).expand(batch, -1, -1)


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "fused op"])
@pytest.mark.parametrize("batched", [False, True], ids=["one", "joint"])
@pytest.mark.parametrize("change", ["", "lora", "fp8"])
def test_a_partial_step_is_the_rows_of_the_full_one(system, change, batched, kernels, changed, monkeypatch):
    """Where nothing else has changed since; and the keys that it makes again are those that were kept."""
    if kernels:  # K1 writes into the rows of the cache; on the CPU its plain form does
        for module in (step1x_transformer, qwen_attention):
            monkeypatch.setattr(module, "has_kernel", lambda op, x: True)
    net = changed(system, change)
    call, latents = one_call(system, net, batched=batched)
    keep = KeyValues()
    whole = call(latents, 0.7, keep=keep)
    assert torch.equal(whole, call(latents, 0.7)), "keeping changes nothing"
    before = [(k.clone(), v.clone()) for k, v in keep.layers]
    some = call(latents[:, ROWS], 0.7, keep=keep, rows=ROWS)
    torch.testing.assert_close(some, whole[:, ROWS], atol=2e-5, rtol=0)
    for (k, v), (k_before, v_before) in zip(keep.layers, before, strict=True):
        torch.testing.assert_close(k, k_before, atol=2e-5, rtol=0)
        torch.testing.assert_close(v, v_before, atol=2e-5, rtol=0)
    if change:
        plain = one_call(system, None, batched=batched)[0](latents, 0.7)
        assert (plain - whole).abs().max() > 1e-3, "the change of weights shows"


def test_kept_keys_are_those_that_are_made_again(system):
    call, latents = one_call(system, None)
    first, second = KeyValues(), KeyValues()
    call(latents, 0.7, keep=first)
    call(latents, 0.4, keep=second)
    assert any((a[0] - b[0]).abs().max() > 1e-3 for a, b in zip(first.layers, second.layers, strict=True))
    call(latents, 0.7, keep=second)
    for mine, made in zip(first.layers, second.layers, strict=True):
        assert torch.equal(mine[0], made[0]) and torch.equal(mine[1], made[1])
    net = regions.shared(system).config
    assert len(first.layers) == net.num_layers + (net.num_single_layers if system == "s" else 0)


def test_a_partial_step_sees_the_kept_tokens_and_renews_its_own(system):
    call, latents = one_call(system, None)
    keep, other = KeyValues(), KeyValues()
    call(latents, 0.7, keep=keep)
    call(2 * latents, 0.7, keep=other)
    moved = latents[:, ROWS] + 1
    found = call(moved, 0.5, keep=keep, rows=ROWS)
    assert (found - call(moved, 0.5, keep=other, rows=ROWS)).abs().max() > 1e-4, "the others' keys are looked at"
    again = call(moved, 0.5, keep=keep, rows=ROWS)
    assert torch.equal(found, again), "its own keys do not depend on what they were before"


def test_rows_without_kept_keys_are_refused(system):
    call, latents = one_call(system, None)
    with pytest.raises(ConfigError, match="Run it whole first"):
        call(latents[:, ROWS], 0.7, keep=KeyValues(), rows=ROWS)
    with pytest.raises(ConfigError, match="expected one for each of 9 tokens"):
        call(latents[:, ROWS], 0.7, keep=KeyValues(), rows=ROWS[1:])


def test_references_modulated_as_clean_pictures():
    """Qwen-Image-Edit-2511: a partial step has no reference tokens, and so no second row of modulation."""
    net = regions.network("q")
    net.register_to_config(zero_cond_t=True)
    call, latents = one_call("q", net)
    keep = KeyValues()
    whole = call(latents, 0.7, keep=keep)
    assert (whole - one_call("q", None)[0](latents, 0.7)).abs().max() > 1e-4
    torch.testing.assert_close(call(latents[:, ROWS], 0.7, keep=keep, rows=ROWS), whole[:, ROWS], atol=2e-5, rtol=0)


# ---- what waits ----------------------------------------------------------------------------------------------------------


def test_waiting_tokens_end_where_their_own_velocity_led(system):
    sigmas, seen = regions.schedule(system), []
    full(system, on_step=lambda i, n, x: seen.append(x))
    region = Region(mask=SOME.mask, first=3, last=0, refresh=())
    found, use = run(system, region)
    a, b = float(sigmas[2]), float(sigmas[3])
    end = seen[1] + (0 - a) * (seen[2] - seen[1]) / (b - a)
    torch.testing.assert_close(found[:, OTHERS], end[:, OTHERS], atol=1e-4, rtol=0)
    assert (found - end)[:, ROWS].abs().max() > 1e-3
    assert (use.full, use.partial) == (3, 5)


@pytest.mark.parametrize("region", [Region(mask=torch.zeros(1, 1, 8, 8), refresh=(5,), first=2, last=1)], ids=["empty"])
def test_an_empty_region_makes_the_full_steps_only(system, region):
    denoiser, picture, guided, noise = setup(system)
    sigmas = regions.schedule(system)
    found, use = denoise(guided, noise, sigmas, grid=GRID, source=picture, region=region)
    assert (use.edited, use.full, use.partial, use.skipped, use.guided) == (0, 4, 0, 4, 4)
    assert denoiser.counts.denoiser_forwards == 2 * 4
    # the same as the full path over the timesteps of the full steps alone, of which the last leads to 0
    few = torch.stack([sigmas[i] for i in (0, 1, 4, 7, 8)])
    torch.testing.assert_close(found, flow.euler(setup(system)[2], noise, few), atol=1e-5, rtol=0)


def test_a_refresh_makes_the_region_grow_and_never_shrink(system, monkeypatch):
    from reasonedit.reasonedit_core.denoisers import region as module

    answers = [CORNER.flatten(), torch.zeros(N, dtype=torch.bool).index_fill(0, torch.tensor([N - 1]), True)]
    monkeypatch.setattr(module, "found_tokens", lambda *a, **k: answers.pop(0))
    _, use = run(system, Region(first=2, last=1, refresh=(5,)))
    assert (answers, use.edited) == ([], len(ROWS) + 1)


# ---- guidance interval ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True], ids=["apart", "joint"])
def test_guidance_within_an_interval_only(system, batched):
    sigmas = regions.schedule(system)
    low, high = float(sigmas[5]), float(sigmas[2])
    denoiser, picture, guided, noise = setup(system, batched=batched)
    found, use = denoise(guided, noise, sigmas, grid=GRID, interval=GuidanceInterval(low, high))
    assert (use.guided, use.full) == (4, STEPS)
    assert denoiser.counts.denoiser_forwards == 4 + 4 * (1 if batched else 2)
    plain, x = setup(system, scale=1.0)[2], noise
    both = setup(system, batched=batched)[2]
    for i in range(STEPS):
        x = (both if 2 <= i <= 5 else plain).advance(x, sigmas[i], sigmas[i + 1])
    assert torch.equal(found, x)


@pytest.mark.parametrize("batched", [False, True], ids=["apart", "joint"])
def test_a_guided_partial_step_finds_the_keys_of_both_passes(system, batched):
    """The full step before it is not guided itself."""
    sigmas = regions.schedule(system)
    interval = GuidanceInterval(float(sigmas[5]), float(sigmas[3]))
    region = Region(mask=SOME.mask, first=2, last=1, refresh=())
    found, use = run(system, region, interval=interval, batched=batched)
    assert (use.full, use.partial, use.guided) == (3, 5, 3)
    torch.testing.assert_close(found, run(system, region, interval=interval)[0], atol=1e-4, rtol=0)
    assert (found - run(system, region, batched=batched)[0]).abs().max() > 1e-4


# ---- state ---------------------------------------------------------------------------------------------------------------


def test_interleaved_edits_do_not_mix(system):
    """Another edit, with another picture, noise and region, runs between each two steps of this one."""
    net = regions.shared(system)
    other = Region(mask=regions.mask_of(regions.corner(rows=5, columns=2)), first=1, last=0, refresh=())
    alone, inner = run(system, SOME, net)[0], run(system, other, net, seed=5)[0]
    inside = []
    found, _ = run(system, SOME, net, on_step=lambda i, n, x: inside.append(run(system, other, net, seed=5)[0]))
    assert len(inside) == STEPS and torch.equal(found, alone)
    assert all(torch.equal(one, inner) for one in inside)


def test_nothing_stays_on_the_modules(system):
    net = regions.network(system)
    before = {name: set(vars(module)) for name, module in net.named_modules()}
    run(system, SOME, net)
    assert {name: set(vars(module)) for name, module in net.named_modules()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_stops_between_steps(system):
    _, picture, guided, noise = setup(system)
    with pytest.raises(Interrupted, match="denoising step 4 of 8"):
        polls = iter([False, False, False, True])
        denoise(
            guided,
            noise,
            regions.schedule(system),
            grid=GRID,
            source=picture,
            region=SOME,
            should_stop=lambda: next(polls),
        )


def test_a_region_that_nothing_says_is_refused(system):
    _, _, guided, noise = setup(system)
    with pytest.raises(ConfigError, match="Give a mask"):
        denoise(guided, noise, regions.schedule(system), grid=GRID, region=Region())


def test_a_source_on_another_grid(system):
    denoiser = regions.make(system)
    picture = regions.source(denoiser, grid=(3, 9))
    other = LatentImage(picture.tokens, 3, 9)
    guided = regions.guided(system, denoiser, other)
    found, use = denoise(
        guided, regions.noise(denoiser), regions.schedule(system), grid=GRID, source=other, region=Region(threshold=-1.0)
    )
    assert found.shape == (1, N, picture.tokens.shape[2]) and use.edited == 0
