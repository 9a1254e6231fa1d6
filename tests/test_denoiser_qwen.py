"""The Qwen-Image denoiser against diffusers' own attention: references, padding, batched guidance, zero_cond_t, limits."""

from __future__ import annotations

import pytest
import torch

from reasonedit.reasonedit_core.denoisers.qwen_image import QwenImageDenoiser
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError
from reasonedit.reasonedit_core.types import Conditioning, Counts, LatentImage

GRIDS = {
    "no reference": ((4, 6), ()),
    "one of the same size": ((4, 6), ((4, 6),)),
    "odd grids": ((3, 5), ((5, 3),)),
    "two, larger than the target": ((3, 4), ((4, 7), (9, 2))),
}
TEXT = 7


def make_transformer(**overrides):
    from diffusers import QwenImageTransformer2DModel

    config = dict(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
    )
    model = QwenImageTransformer2DModel(**{**config, **overrides}).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.2 + (parameter.ndim == 1))
    return model


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_inputs(name, batch=1):
    grid, ref_grids = GRIDS[name]
    latents = draw(batch, grid[0] * grid[1], 16, seed=1)
    references = [LatentImage(draw(1, h * w, 16, seed=10 + i), h, w) for i, (h, w) in enumerate(ref_grids)]
    return grid, latents, references


def run_stock(model, latents, t, tokens, mask, grid, references):
    """What the pipelines do with the transformer, on its own attention processor."""
    sequence = torch.cat([latents, *(r.tokens.expand(len(latents), -1, -1) for r in references)], 1)
    shapes = [(1, *grid), *((1, r.height, r.width) for r in references)]
    with torch.no_grad():
        out = model(
            hidden_states=sequence,
            timestep=t.to(latents.dtype),
            encoder_hidden_states=tokens,
            encoder_hidden_states_mask=mask,
            img_shapes=[shapes] * len(latents),
            return_dict=False,
        )[0]
    return out[:, : latents.shape[1]]


@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
@pytest.mark.parametrize("name", GRIDS)
def test_equals_the_stock_transformer(name, zero_cond_t):
    stock, ours = make_transformer(zero_cond_t=zero_cond_t), make_transformer(zero_cond_t=zero_cond_t)
    grid, latents, references = make_inputs(name)
    tokens, t = draw(1, TEXT, 32, seed=2), torch.tensor([0.7])
    expected = run_stock(stock, latents, t, tokens, None, grid, references)
    found = QwenImageDenoiser(ours)(latents, t, Conditioning(tokens), grid=grid, references=references)
    assert found.shape == latents.shape
    assert (found - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
def test_padding_is_masked_like_the_stock_transformer(zero_cond_t):
    stock, ours = make_transformer(zero_cond_t=zero_cond_t), make_transformer(zero_cond_t=zero_cond_t)
    grid, latents, references = make_inputs("one of the same size", batch=2)
    tokens, t = draw(2, TEXT, 32, seed=2), torch.tensor([0.7, 0.7])
    mask = torch.ones(2, TEXT, dtype=torch.bool)
    mask[1, 3:] = False
    expected = run_stock(stock, latents, t, tokens, mask, grid, references)
    found = QwenImageDenoiser(ours)(latents, t, Conditioning(tokens, mask), grid=grid, references=references)
    assert (found - expected).abs().max() < 1e-5 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("name", ["no reference", "two, larger than the target"])
@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
def test_batched_guidance_equals_sequential(name, zero_cond_t):
    denoiser = QwenImageDenoiser(make_transformer(zero_cond_t=zero_cond_t))
    grid, latents, references = make_inputs(name)
    positive, negative = draw(1, TEXT, 32, seed=2), draw(1, 3, 32, seed=3)
    t = torch.tensor([0.35])
    alone = [denoiser(latents, t, Conditioning(tokens), grid=grid, references=references) for tokens in (positive, negative)]
    padded = torch.cat([negative, torch.full((1, TEXT - 3, 32), 99.0)], 1)  # padding must not matter, whatever it holds
    mask = torch.tensor([[True] * TEXT, [True] * 3 + [False] * (TEXT - 3)])
    both = Conditioning(torch.cat([positive, padded]), mask)
    found = denoiser(latents.repeat(2, 1, 1), t.repeat(2), both, grid=grid, references=references)
    assert (found - torch.cat(alone)).abs().max() < 1e-5 * max(1.0, found.abs().max().item())


def test_order_of_references_and_text_matter():
    denoiser = QwenImageDenoiser(make_transformer())
    grid, latents, references = make_inputs("two, larger than the target")
    tokens, t = draw(1, TEXT, 32, seed=2), torch.tensor([0.7])
    one = denoiser(latents, t, Conditioning(tokens), grid=grid, references=references)
    other = denoiser(latents, t, Conditioning(tokens), grid=grid, references=references[::-1])
    swapped = denoiser(latents, t, Conditioning(tokens.flip(1)), grid=grid, references=references)
    assert (one - other).abs().max() > 1e-3 and (one - swapped).abs().max() > 1e-3


def test_the_2511_transformer_sees_references_as_clean():
    """With zero_cond_t the time enters the references only through attention, so the prediction differs from 2509's."""
    grid, latents, references = make_inputs("one of the same size")
    tokens, t = draw(1, TEXT, 32, seed=2), torch.tensor([0.7])
    made = [
        QwenImageDenoiser(make_transformer(zero_cond_t=flag))(
            latents, t, Conditioning(tokens), grid=grid, references=references
        )
        for flag in (False, True)
    ]
    assert (made[0] - made[1]).abs().max() > 1e-3


def test_timestep_is_rounded_as_the_pipelines_round_it():
    """In bfloat16 t * 1000 is rounded before it is divided; rounding t itself gives another number."""
    seen = []
    model = make_transformer().to(torch.bfloat16)
    model.time_text_embed.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    grid, latents, _ = make_inputs("no reference")
    t = torch.tensor([0.9163])
    out = QwenImageDenoiser(model)(latents.bfloat16(), t, Conditioning(draw(1, TEXT, 32).bfloat16()), grid=grid)
    assert out.dtype == torch.bfloat16
    assert torch.equal(seen[0], torch.tensor([916.3]).bfloat16() / 1000) and seen[0] != t.bfloat16()


def test_runs_through_our_dispatch_and_counts(monkeypatch):
    from reasonedit.reasonedit_core.kernels import dispatch

    hosts = []

    def spy(q, k, v, mask=None, *, host=None):
        hosts.append(host)
        assert q.shape == k.shape == v.shape == (1, TEXT + 24, 2, 16)
        return torch.zeros_like(q)

    monkeypatch.setattr(dispatch, "attention", spy)
    counts, host = Counts(), object()
    denoiser = QwenImageDenoiser(make_transformer(), counts=counts, host=host)
    grid, latents, _ = make_inputs("no reference")
    denoiser(latents, torch.tensor([0.5]), Conditioning(draw(1, TEXT, 32)), grid=grid)
    assert hosts == [host, host]  # once per block
    assert counts.denoiser_forwards == 1 and denoiser.kind == "velocity"


def test_adapters_on_the_projections_take_part():
    """LoRA wraps the projections of the attention module; our processor must call those, not cached weights."""
    from peft import LoraConfig

    model = make_transformer()
    denoiser = QwenImageDenoiser(model)
    grid, latents, _ = make_inputs("no reference")
    call = (latents, torch.tensor([0.5]), Conditioning(draw(1, TEXT, 32)))
    before = denoiser(*call, grid=grid)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "add_k_proj"], init_lora_weights=False))
    assert (denoiser(*call, grid=grid) - before).abs().max() > 1e-4


def test_errors_name_both_numbers():
    denoiser = QwenImageDenoiser(make_transformer())
    tokens = Conditioning(draw(1, TEXT, 32))
    with pytest.raises(ConfigError, match="target: expected 4 x 6 = 24 packed tokens, found 20"):
        denoiser(draw(1, 20, 16), torch.tensor([0.5]), tokens, grid=(4, 6))
    wrong = LatentImage(draw(1, 3, 16), 2, 2)
    with pytest.raises(ConfigError, match="reference 1: expected 2 x 2 = 4 packed tokens, found 3"):
        denoiser(draw(1, 24, 16), torch.tensor([0.5]), tokens, grid=(4, 6), references=[wrong])
    with pytest.raises(ConfigError, match="4096 text positions; 4095 text tokens that start at 3"):
        denoiser(draw(1, 24, 16), torch.tensor([0.5]), Conditioning(draw(1, 4095, 32)), grid=(4, 6))


@pytest.mark.parametrize("flag", ["guidance_embeds", "use_additional_t_cond", "use_layer3d_rope"])
def test_refuses_transformers_of_other_systems(flag):
    with pytest.raises(CheckpointError, match=flag):
        QwenImageDenoiser(make_transformer(**{flag: True}))
