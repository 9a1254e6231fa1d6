"""A tiny random Stable Diffusion with an IP-Adapter that fits it, written as the released ones lie in their folders.

Use: `from reasonedit.tests.paint_tools import write_painter`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from reasonedit.tests.brains import write_text_encoder

WIDTH = 24  # of the text states, and of the picture's tokens
SEEN = 32  # of the picture encoder's projection


def write_painter(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """(diffusers folder, IP-Adapter weights with image_encoder/ beside them). The pipeline paints 16 x 16 unless told."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionConfig, CLIPVisionModelWithProjection

    encoder, tokenizer = write_text_encoder(folder / "parts", WIDTH, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
        )
        vision.projection_dim = SEEN
        seer = CLIPVisionModelWithProjection(vision)
        adapter = _adapter(unet)
    pipe = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=CLIPTextModel.from_pretrained(encoder),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizer),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder / "tiny-sd")
    seer.save_pretrained(folder / "adapter" / "image_encoder")
    save_file(adapter, folder / "adapter" / "tiny_ip.safetensors")
    return folder / "tiny-sd", folder / "adapter" / "tiny_ip.safetensors"


def _adapter(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The keys of the released adapters: a projection to four tokens, and two matrices per cross-attention, numbered oddly."""
    state = {
        "image_proj.proj.weight": torch.randn(4 * WIDTH, SEEN),
        "image_proj.proj.bias": torch.zeros(4 * WIDTH),
        "image_proj.norm.weight": torch.ones(WIDTH),
        "image_proj.norm.bias": torch.zeros(WIDTH),
    }
    crossed = [name for name in unet.attn_processors if "attn2" in name]
    modules = dict(unet.named_modules())
    for number, name in enumerate(crossed):
        wide = modules[name.removesuffix(".processor")].to_k.out_features
        for part in ("to_k_ip", "to_v_ip"):
            state[f"ip_adapter.{2 * number + 1}.{part}.weight"] = torch.randn(wide, WIDTH)
    return state
