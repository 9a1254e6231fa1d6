"""The widened UNet and FLUX transformer, three-pass guidance and the drops, on tiny random models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reasonedit.reasonedit_core.denoisers.flux import FluxDenoiser, widen_flux
from reasonedit.reasonedit_core.denoisers.three_pass import Scales, drop, guided, sample, three_conditions
from reasonedit.reasonedit_core.denoisers.unet import UNetDenoiser, load_unet, widen_unet
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.types import Conditioning


def tiny_unet(channels: int = 4):
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=8,
            norm_num_groups=8,
        ).eval()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def conditioning() -> Conditioning:
    return Conditioning(draw(1, 154, 24), residual=(draw(1, 32, 4, 4), draw(1, 32)), reference=draw(1, 4, 8, 8, seed=1))


@torch.no_grad()
def test_a_widened_unet_starts_as_it_was_and_survives_its_folder(tmp_path):
    plain, wide = tiny_unet(), UNetDenoiser(widen_unet(tiny_unet()))
    given, z, t = replace(conditioning(), residual=None), draw(1, 4, 8, 8, seed=2), torch.tensor([500])
    assert torch.allclose(wide.predict(z, t, given), plain(z, t, given.tokens).sample, atol=1e-5)
    wide.unet.conv_in.weight[:, 4:] = 0.1
    moved = wide.predict(z, t, given)
    wide.unet.save_pretrained(tmp_path)
    assert torch.equal(UNetDenoiser(load_unet(tmp_path)).predict(z, t, given), moved)
    assert not torch.allclose(moved, plain(z, t, given.tokens).sample, atol=1e-4)


@torch.no_grad()
def test_the_residual_stands_behind_conv_in():
    wide, given = UNetDenoiser(widen_unet(tiny_unet())), conditioning()
    z, t = draw(1, 4, 8, 8, seed=2), torch.tensor([500])
    ours = wide.predict(z, t, given)
    spread = torch.nn.functional.interpolate(given.residual[0], (8, 8), mode="bilinear", align_corners=False)
    handle = wide.unet.conv_in.register_forward_hook(lambda m, a, out: out + spread + given.residual[1][:, :, None, None])
    assert torch.allclose(wide.predict(z, t, replace(given, residual=None)), ours, atol=1e-5)
    handle.remove()
    packed = wide(z.flatten(2).transpose(1, 2), torch.tensor([0.5]), given, grid=(8, 8))
    assert torch.allclose(packed.transpose(1, 2).view_as(ours), ours, atol=1e-5)


def test_drops_blind_what_they_name():
    given, null = conditioning(), draw(1, 77, 24, seed=3)
    three = three_conditions(given, null)
    assert torch.equal(three.tokens[0], given.tokens[0]) and torch.equal(three.tokens[1], null.repeat(1, 2, 1)[0])
    assert three.mask is None and three.residual[1].abs().sum(1).bool().tolist() == [True, False, False]
    assert three.residual[0].flatten(1).any(1).tolist() == [True, True, False]
    assert three.reference.flatten(1).any(1).tolist() == [True, True, False]
    longer = drop(replace(given, tokens=draw(1, 100, 24)), null, torch.tensor([True]), torch.tensor([False]))
    assert longer.mask.sum() == 77, "a context that [null] does not fill is masked"


@torch.no_grad()
def test_three_passes_equal_the_closed_form():
    from diffusers import DDIMScheduler

    unet, given, null, noise = UNetDenoiser(widen_unet(tiny_unet())), conditioning(), draw(1, 77, 24, seed=3), draw(1, 4, 8, 8)
    yes, no = torch.tensor([True]), torch.tensor([False])
    got = sample(unet, DDIMScheduler(), noise, given, null, steps=2, scales=Scales(7.5, 1.5))
    scheduler, z = DDIMScheduler(), noise
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        conditions = given, drop(given, null, yes, no), drop(given, null, yes, yes)
        full, image, none = (unet.predict(z, t[None], c) for c in conditions)
        z = scheduler.step(none + 1.5 * (image - none) + 7.5 * (full - image), t, z).prev_sample
        assert torch.allclose(guided(full, full, full, Scales()), full, atol=1e-5)
    assert torch.allclose(got, z, atol=1e-3, rtol=1e-3)
    assert unet.counts.denoiser_forwards == 2 + 6


def test_bad_input_is_a_sentence(tmp_path):
    unet, given = UNetDenoiser(widen_unet(tiny_unet())), conditioning()
    with pytest.raises(ConfigError, match="source latents of shape .*found none"):
        unet.predict(draw(1, 4, 8, 8), torch.tensor([1]), replace(given, reference=None))
    yes, no = torch.tensor([True]), torch.tensor([False])
    with pytest.raises(ConfigError, match="as wide as the context .24., found 32"):
        drop(given, draw(1, 77, 32), no, yes)
    with pytest.raises(ConfigError, match="without a null context"):
        drop(given, None, yes, no)
    assert torch.equal(drop(given, None, no, yes).tokens, given.tokens)
    with pytest.raises(CheckpointError, match="found 9. Inpainting"):
        widen_unet(tiny_unet(9))
    with pytest.raises(ConfigError, match="found a plain one"):
        UNetDenoiser(tiny_unet())
    with pytest.raises(CheckpointError, match="no config.json"):
        load_unet(tmp_path)


@torch.no_grad()
def test_flux_starts_as_it_was_and_takes_the_residual():
    from diffusers import FluxTransformer2DModel

    def tiny():
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=24, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
        ).eval()  # fmt: skip

    plain, wide = tiny(), FluxDenoiser(widen_flux(tiny()))
    given = Conditioning(draw(1, 154, 24), pooled=draw(1, 8), reference=draw(1, 16, 4, seed=1))
    z, t = draw(1, 16, 4, seed=2), torch.tensor([0.5])
    ids = torch.tensor([[0.0, y, x] for y in range(4) for x in range(4)])
    theirs = plain(z, given.tokens, given.pooled, t, ids, torch.zeros(154, 3), torch.tensor([3.5])).sample
    ours = wide(z, t, given, grid=(4, 4))
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(wide(z, t, replace(given, residual=(draw(1, 32, 4, 4),)), grid=(4, 4)), ours, atol=1e-3)
    # Tokens that a mask hides change nothing, and the rest is as without them.
    longer = torch.cat([given.tokens, draw(1, 6, 24, seed=5)], dim=1)
    keep = torch.arange(160)[None] < 154
    for hidden in (longer, torch.cat([given.tokens, draw(1, 6, 24, seed=6)], dim=1)):
        assert torch.allclose(wide(z, t, replace(given, tokens=hidden, mask=keep), grid=(4, 4)), ours, atol=1e-5)
    assert not torch.allclose(wide(z, t, replace(given, tokens=longer), grid=(4, 4)), ours, atol=1e-4)
    with pytest.raises(ConfigError, match="pooled text vector"):
        wide(z, t, replace(given, pooled=None), grid=(4, 4))
