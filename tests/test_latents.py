"""Packing, the two codecs and the order of their random draws."""

from __future__ import annotations

import pytest
import torch

from reasonedit.reasonedit_core import latents as latent
from reasonedit.reasonedit_core.errors import ConfigError
from reasonedit.reasonedit_core.mini.builder import random_tensor


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            parameter.copy_(random_tensor(key, tuple(parameter.shape), 0))
    return module.eval()


@pytest.fixture(scope="module")
def flux_vae():
    from diffusers import AutoencoderKL

    return randomise(
        AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            layers_per_block=1,
            norm_num_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )


@pytest.fixture(scope="module")
def qwen_vae():
    from diffusers import AutoencoderKLQwenImage

    return randomise(AutoencoderKLQwenImage(base_dim=8))


def pixels(height: int, width: int) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(5)) * 2 - 1


def test_packing_puts_a_block_into_a_token():
    latents = torch.arange(2 * 3 * 4 * 6).float().view(2, 3, 4, 6)
    packed = latent.pack(latents)
    assert packed.shape == (2, 6, 12)
    # Token 4 = row 1, column 1: latent rows 2..3, columns 2..3, channel after channel.
    assert torch.equal(packed[1, 4], latents[1, :, 2:4, 2:4].flatten())
    assert torch.equal(latent.unpack(packed, 2, 3), latents)
    image = latent.pack_image(latents[:1])
    assert (image.height, image.width) == (2, 3) and torch.equal(image.tokens, packed[:1])
    with pytest.raises(ConfigError, match="6 latent tokens do not fill a grid of 2 x 4"):
        latent.unpack(packed, 2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_codec_equals_the_released_calls(flux_vae, dtype):
    vae = flux_vae.to(dtype)
    codec = latent.KLCodec(vae)
    assert (codec.channels, codec.patch) == (16, 16)
    image = pixels(32, 48)
    with torch.no_grad():
        posterior = vae.encode(image.to(dtype)).latent_dist
        rng = torch.Generator().manual_seed(7)
        expected = [(posterior.sample(rng) - 0.1159) * 0.3611 for _ in range(2)]
        moments = codec.encode(image)
        ours = torch.Generator().manual_seed(7)
        found = [codec.sample(moments, ours) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not torch.equal(*found)
        assert torch.equal(ours.get_state(), rng.get_state())
        decoded = vae.decode(expected[0] / 0.3611 + 0.1159, return_dict=False)[0]
        assert torch.equal(codec.decode(found[0]), decoded) and decoded.shape == (1, 3, 32, 48)


def test_codec_takes_other_dtypes_than_its_own(flux_vae):
    codec = latent.KLCodec(flux_vae.float())
    with torch.no_grad():
        assert codec.encode(pixels(16, 16).half())[0].dtype == torch.float32
        assert codec.decode(torch.zeros(1, 16, 2, 2, dtype=torch.float16)).dtype == torch.float32


def test_qwen_codec_uses_the_mode_and_draws_nothing(qwen_vae):
    codec = latent.QwenCodec(qwen_vae)
    assert (codec.channels, codec.patch) == (16, 16)
    image, rng = pixels(32, 48), torch.Generator().manual_seed(1)
    before = rng.get_state()
    mean, std = (
        torch.tensor(values).view(1, 16, 1, 1, 1) for values in (qwen_vae.config.latents_mean, qwen_vae.config.latents_std)
    )
    with torch.no_grad():
        mode = qwen_vae.encode(image[:, :, None]).latent_dist.mode()
        moments = codec.encode(image)
        found = codec.sample(moments, rng)
        assert moments[1] is None and torch.equal(rng.get_state(), before)
        # to rounding: one frame takes two-dimensional convolutions
        assert torch.allclose(found, ((mode - mean) / std)[:, :, 0], rtol=1e-4, atol=1e-5) and found.shape == (1, 16, 4, 6)
        decoded = qwen_vae.decode(found[:, :, None] / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
        assert torch.allclose(codec.decode(found).clamp(-1, 1), decoded, rtol=1e-4, atol=1e-5) and decoded.std() > 0.01
        assert decoded.shape == (1, 3, 32, 48)


def test_noise_is_drawn_as_diffusers_draws_it():
    from diffusers.utils.torch_utils import randn_tensor

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = randn_tensor(
            (1, 16, 8, 6), generator=torch.Generator().manual_seed(3), device=torch.device("cpu"), dtype=dtype
        )
        found = latent.draw_normal((1, 16, 8, 6), torch.Generator().manual_seed(3), dtype=dtype, device="cpu")
        assert torch.equal(found, expected)
