"""The full-size presets on the meta device: the design page's parameter counts, and shapes from LLaVA to the denoiser."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reasonedit.reasonedit_core.conditioners.reasonbrain import as_conditioning
from reasonedit.reasonedit_core.denoisers.flux import FluxDenoiser, widen_flux
from reasonedit.reasonedit_core.denoisers.unet import UNetDenoiser, widen_unet
from reasonedit.reasonedit_core.mllm.llava import LORA_TARGETS
from reasonedit.reasonedit_core.models.reasonbrain.brain import ReasonBrain
from reasonedit.reasonedit_core.models.reasonbrain.frce import Features
from reasonedit.reasonedit_core.models.reasonbrain.spec import PRESETS
from reasonedit.reasonedit_core.types import Conditioning

REGIONS, OBJECTS, TEXT = 32, 16, 77
"""The most of each (design, section 2)."""


def millions(module: torch.nn.Module) -> float:
    return round(sum(p.numel() for p in module.parameters()) / 1e6, 2)


def whole(preset: str, **widths) -> ReasonBrain:
    with torch.device("meta"):
        return ReasonBrain(replace(PRESETS[preset], **widths)).eval()


def conditioning(brain: ReasonBrain) -> Conditioning:
    """What the largest features of one picture become."""
    spec = brain.spec
    n = spec.grid**2

    def valid(count):
        return torch.ones(1, count, dtype=torch.bool, device="meta")

    def of(*shape):
        return torch.zeros(1, *shape, device="meta")

    features = Features(
        of(n, spec.vision), of(n, len(spec.taps) * spec.vision), of(TEXT, spec.text), valid(TEXT), of(OBJECTS, spec.text),
        valid(OBJECTS), of(REGIONS, spec.grid, spec.grid), of(REGIONS, 8), valid(REGIONS),
    )  # fmt: skip
    cues = brain.cues(features)
    assert cues.visual.shape == (1, n + REGIONS, spec.frce) and cues.textual.shape == (1, OBJECTS, spec.frce)
    assert [part.shape[1:] for part, _ in brain.parts(cues)] == [(n + REGIONS, spec.language), (OBJECTS, spec.language)]
    states = of(spec.img_tokens, spec.language)
    assert brain.qformer(states).shape == (1, 77, spec.context)
    made = as_conditioning(brain.enhance(states, features, cues))
    assert made.tokens.shape == (1, 154, spec.context)
    assert [part.shape[1:] for part in made.residual] == [(spec.channels, spec.grid, spec.grid), (spec.channels,)]
    return made


@pytest.mark.parametrize(
    ("preset", "widths", "frce", "cme", "qformer"),
    [
        ("7b", {}, 81.90, 44.95, 64.96),
        ("3b", {}, 41.42, 22.07, 60.24),
        ("3b", {"language": 2560}, None, None, 57.88),
        ("flux", {}, None, 69.23, 64.96),
        ("flux", {"text": 4096}, None, 72.65, 64.96),
    ],
)
def test_parameters_are_those_of_the_design(preset, widths, frce, cme, qformer):
    brain = whole(preset, **widths)
    # The page's figures are of a prototype; ours has some norms more or fewer.
    if frce is not None:
        assert millions(brain.frce) == pytest.approx(frce, abs=0.011)
    if cme is not None:
        assert millions(brain.cme) == pytest.approx(cme, abs=0.011)
    assert millions(brain.qformer.model) == qformer
    if preset == "7b":
        assert [millions(layer) for layer in (brain.assembler.visual, brain.assembler.textual)] == [4.2, 4.2]


SD = {
    "7b": {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},  # SD 2.1
    "3b": {"cross_attention_dim": 768, "attention_head_dim": 8},  # SD 1.5
}


@torch.no_grad()
@pytest.mark.parametrize(("preset", "parameters"), [("7b", 865.9), ("3b", 859.5)])
def test_a_unet_of_full_size_takes_what_the_preset_makes(preset, parameters):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = widen_unet(UNet2DConditionModel(sample_size=64, **SD[preset]))
    assert round(millions(unet), 1) == parameters and unet.conv_in.in_channels == 8
    latents = torch.zeros(1, 4, 64, 64, device="meta")
    given = replace(conditioning(whole(preset)), reference=latents)
    timesteps = torch.zeros(1, dtype=torch.long, device="meta")
    assert UNetDenoiser(unet).predict(latents, timesteps, given).shape == latents.shape


@torch.no_grad()
def test_flux_of_full_size_takes_what_the_preset_makes():
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):  # blocks of the real widths; two of 57, as all of a kind are alike
        flux = widen_flux(FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True))
    assert flux.x_embedder.in_features == 128 and flux.x_embedder.out_features == PRESETS["flux"].channels
    latents = torch.zeros(1, 32 * 32, 64, device="meta")
    given = replace(conditioning(whole("flux")), reference=latents, pooled=torch.zeros(1, 768, device="meta"))
    assert FluxDenoiser(flux)(latents, torch.zeros(1, device="meta"), given, grid=(32, 32)).shape == latents.shape


def test_llava_7b_has_the_widths_of_the_preset():
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    spec = PRESETS["7b"]
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32064), vision_feature_layer=-2)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    assert (config.text_config.hidden_size, vision.hidden_size, 336 // 14) == (spec.language, spec.vision, spec.grid)
    assert millions(model.model.multi_modal_projector) == 20.98
    lora = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=LORA_TARGETS))
    trained = {name: p for name, p in lora.named_parameters() if p.requires_grad}
    assert round(sum(p.numel() for p in trained.values()) / 1e6, 2) == 8.39
    assert all(".language_model." in name for name in trained) and len(trained) == 32 * 4 * 2
    # A row of eq. 3 without its words: picture, cues, [IMG]; with a prompt of some fifty tokens about 1.31k (design, 3.4).
    assert spec.grid**2 + spec.grid**2 + REGIONS + OBJECTS + spec.img_tokens == 1232
