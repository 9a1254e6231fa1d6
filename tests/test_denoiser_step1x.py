"""The Step1X denoiser: positions per version, kept preparations, and one batch or two calls under guidance."""

from __future__ import annotations

import pytest
import torch

from reasonedit.reasonedit_core.denoisers import join_conditionings
from reasonedit.reasonedit_core.denoisers.dit import VARIANTS, Step1XDenoiser, image_positions
from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.models.step1x_transformer import Step1XEditTransformer2DModel
from reasonedit.reasonedit_core.types import Conditioning, Counts, LatentImage
from reasonedit.tests.peer import recipe

GRID = recipe.GRID
N = GRID[0] * GRID[1]


@pytest.fixture(scope="module")
def model():
    made = Step1XEditTransformer2DModel(**recipe.TINY, enable_text_token_mapping=True)
    return recipe.randomise(made, seed=3).eval().requires_grad_(False)


def conditioning(length: int, seed: int = 0, valid: int | None = None) -> Conditioning:
    """v1.2 has no mask and positions in the past; with `valid` it is padded, as v1.0 and v1.1 are."""
    positions = torch.zeros(length, 3)
    if valid is None:
        positions[:, 0] = torch.arange(length) - length
    return Conditioning(
        tokens=recipe.draw(f"tokens {length}", (1, length, 64), seed),
        mask=None if valid is None else torch.arange(length)[None] < valid,
        positions=positions,
        text_embeds=recipe.draw(f"embeds {length}", (1, length, 64), seed) if valid is None else None,
        text_mask=(torch.arange(length) % 3 == 0)[None] if valid is None else None,
    )


def latents(seed: int = 0, batch: int = 1) -> torch.Tensor:
    return recipe.draw("latents", (1, N, 64), seed).expand(batch, -1, -1)


def reference(seed: int = 1) -> LatentImage:
    return LatentImage(recipe.draw("reference", (1, N, 64), seed), *GRID)


@pytest.mark.parametrize("variant", VARIANTS)
def test_positions_of_target_and_reference(variant):
    ids = image_positions([(2, 3), (2, 3)], VARIANTS[variant].reference)
    grid = [[0, y, x] for y in range(2) for x in range(3)]
    moved = {"v1.0": (0, 0), "v1.1": (1, 1), "v1.2": (1, 0)}[variant]
    assert ids[:6].tolist() == grid
    assert ids[6:].tolist() == [[moved[0], y + moved[1], x + moved[1]] for _, y, x in grid]


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_plain_forward(model, variant):
    text = conditioning(11, valid=None if variant == "v1.2" else 7)
    t = torch.tensor([0.7])
    found = Step1XDenoiser(model, variant)(latents(), t, text, grid=GRID, references=[reference()])
    expected = model(
        torch.cat([latents(), reference().tokens], dim=1),
        (t * 1000) / 1000 if VARIANTS[variant].rounds else t,
        text.tokens,
        text.mask,
        txt_ids=text.positions,
        img_ids=image_positions([GRID, GRID], VARIANTS[variant].reference),
        text_embeds=text.text_embeds,
        text_mask=text.text_mask,
    )
    assert found.shape == (1, N, 64)
    torch.testing.assert_close(found, expected[:, :N], atol=1e-6, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [(11, 11), (11, 5), (4, 9)])
def test_batched_guidance_equals_two_calls(model, variant, lengths):
    if variant == "v1.2":
        pair = [conditioning(length, seed) for seed, length in enumerate(lengths)]
    else:
        pair = [conditioning(16, seed, valid=length) for seed, length in enumerate(lengths)]
    denoiser, t = Step1XDenoiser(model, variant), torch.tensor([0.6])
    call = dict(grid=GRID, references=[reference()])
    apart = torch.cat([denoiser(latents(), t, text, **call) for text in pair])
    together = denoiser(latents(batch=2), t.expand(2), join_conditionings(*pair), **call)
    assert (apart[0] - apart[1]).abs().max() > 1e-3
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=0)


def test_padding_is_hidden_in_v12_only(model):
    """Pads of the joint batch must not be seen; those of v1.1 are part of its text and are."""
    short, long = conditioning(5), conditioning(11, 1)
    both = join_conditionings(short, long)
    assert both.mask.tolist()[0] == [True] * 5 + [False] * 6 and both.mask[1].all()
    assert both.positions.shape == (2, 11, 3) and both.text_mask.shape == (2, 11)
    changed = both.tokens.clone()
    changed[0, 5:] = 9.0
    other = Conditioning(changed, both.mask, both.positions, both.text_embeds, both.text_mask)
    t, call = torch.tensor([0.5, 0.5]), dict(grid=GRID)
    for variant, same in (("v1.2", True), ("v1.1", False)):
        denoiser = Step1XDenoiser(model, variant)
        gap = denoiser(latents(batch=2), t, both, **call) - denoiser(latents(batch=2), t, other, **call)
        assert (gap[0].abs().max() < 1e-6) == same and gap[1].abs().max() < 1e-6


def test_join_without_padding_keeps_no_mask():
    both = join_conditionings(conditioning(6), conditioning(6, 1))
    assert both.mask is None and both.tokens.shape == (2, 6, 64)


def test_text_is_prepared_once_per_conditioning(model, monkeypatch):
    counts, prepared = Counts(), []
    original = model.prepare_text
    monkeypatch.setattr(model, "prepare_text", lambda *args, **kw: prepared.append(1) or original(*args, **kw))
    denoiser = Step1XDenoiser(model, "v1.2", counts=counts)
    pair = [conditioning(11), conditioning(5, 1)]
    for step in range(4):
        for text in pair:
            denoiser(latents(), torch.tensor([1 - step / 4]), text, grid=GRID, references=[reference()])
    assert len(prepared) == 2 and counts.denoiser_forwards == 8
    # The same text on another grid has other rotation tables, and equal text in another object is prepared anew.
    denoiser(recipe.draw("x", (1, 6, 64)), torch.tensor([0.5]), pair[0], grid=(2, 3))
    denoiser(latents(), torch.tensor([0.5]), conditioning(11), grid=GRID)
    assert len(prepared) == 4
    denoiser.forget()
    denoiser(latents(), torch.tensor([0.5]), pair[0], grid=GRID)
    assert len(prepared) == 5


def test_kept_preparations_do_not_change_the_result(model):
    text, t = conditioning(11), torch.tensor([0.3])
    denoiser = Step1XDenoiser(model, "v1.2")
    first = denoiser(latents(), torch.tensor([0.9]), text, grid=GRID)
    kept = denoiser(latents(), t, text, grid=GRID)
    assert torch.equal(kept, Step1XDenoiser(model, "v1.2")(latents(), t, text, grid=GRID))
    assert not torch.equal(kept, first)


@pytest.mark.parametrize("variant", VARIANTS)
def test_timestep_is_rounded_like_the_release(monkeypatch, variant):
    """In bfloat16 the result depends on the place: v1.0 rounds in 0..1, the pipelines of v1.1 and v1.2 in 0..1000."""
    got = []
    monkeypatch.setattr(
        Step1XEditTransformer2DModel, "forward", lambda self, x, t, *args, **kw: got.append(t) or torch.zeros_like(x)
    )
    text = conditioning(5) if variant == "v1.2" else conditioning(5, valid=3)
    half = Step1XEditTransformer2DModel(**recipe.TINY).bfloat16().requires_grad_(False)
    times = torch.linspace(0.01, 1, 100)
    for t in times:
        Step1XDenoiser(half, variant)(latents().bfloat16(), t[None], text, grid=GRID)
    in_one, in_thousand = times.bfloat16(), (times * 1000).bfloat16() / 1000
    found = torch.cat(got)
    assert found.dtype == torch.bfloat16 and not torch.equal(in_one, in_thousand)
    assert torch.equal(found, in_one if variant == "v1.0" else in_thousand)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near_fp32(model, dtype):
    text, t = conditioning(11), torch.tensor([0.7])
    exact = Step1XDenoiser(model, "v1.2")(latents(), t, text, grid=GRID, references=[reference()])
    low = recipe.randomise(Step1XEditTransformer2DModel(**recipe.TINY, enable_text_token_mapping=True), 3).to(dtype)
    found = Step1XDenoiser(low, "v1.2")(latents().to(dtype), t, text, grid=GRID, references=[reference()])
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), exact, atol=2e-2, rtol=0)


def test_wrong_calls_say_what_is_wrong(model):
    denoiser, t = Step1XDenoiser(model, "v1.2"), torch.tensor([0.5])
    with pytest.raises(ConfigError, match="target: expected 3 x 6 = 18 packed tokens, found 24"):
        denoiser(latents(), t, conditioning(5), grid=(3, 6))
    with pytest.raises(ConfigError, match="reference 1: expected"):
        denoiser(latents(), t, conditioning(5), grid=GRID, references=[LatentImage(reference().tokens, 2, 3)])
    with pytest.raises(ConfigError, match="one batch size, found 2 and 1"):
        denoiser(latents(batch=2), t.expand(2), conditioning(5), grid=GRID)
    with pytest.raises(ConfigError, match="text positions"):
        denoiser(latents(), t, Conditioning(torch.zeros(1, 5, 64)), grid=GRID)
    with pytest.raises(ConfigError, match="found 'v3'"):
        Step1XDenoiser(model, "v3")
