"""Tiny ReasonBrains and features for tests: the classes of the real ones, a few numbers wide."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch

from reasonedit.reasonedit_core.models.reasonbrain.brain import ReasonBrain
from reasonedit.reasonedit_core.models.reasonbrain.frce import Features
from reasonedit.reasonedit_core.models.reasonbrain.spec import BrainSpec, Switches

TINY = BrainSpec(
    vision=32,
    grid=4,
    language=48,
    text=24,
    context=24,
    channels=32,
    frce=32,
    frce_heads=4,
    cme=32,
    cme_heads=4,
    qformer=24,
    qformer_layers=2,
    qformer_heads=2,
)


def tiny_brain(seed: int = 0, spec: BrainSpec = TINY, **off) -> ReasonBrain:
    """A tiny ReasonBrain from `seed`; `off` are the fields of Switches."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ReasonBrain(spec, Switches(**off)).eval()


def random_features(spec: BrainSpec = TINY, batch: int = 1, regions: int = 5, objects: int = 3, text: int = 9, seed: int = 0):
    """Features of the right shapes, everything valid."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=rng)

    n = spec.grid**2
    return Features(
        image=draw(batch, n, spec.vision),
        taps=draw(batch, n, len(spec.taps) * spec.vision),
        text=draw(batch, text, spec.text),
        text_keep=torch.ones(batch, text, dtype=torch.bool),
        objects=draw(batch, objects, spec.text),
        object_keep=torch.ones(batch, objects, dtype=torch.bool),
        masks=(draw(batch, regions, spec.grid, spec.grid) > 0).float(),
        geometry=draw(batch, regions, 8),
        region_keep=torch.ones(batch, regions, dtype=torch.bool),
    )


def padded(features: Features, regions: int = 2, objects: int = 2, text: int = 3, value: float = 7.0) -> Features:
    """The same features with invalid regions, objects and text tokens of `value` behind the valid ones."""

    def longer(x: torch.Tensor, n: int) -> torch.Tensor:
        fill = False if x.dtype == torch.bool else value
        return torch.cat([x, torch.full((x.shape[0], n, *x.shape[2:]), fill, dtype=x.dtype)], dim=1)

    return replace(
        features,
        text=longer(features.text, text),
        text_keep=longer(features.text_keep, text),
        objects=longer(features.objects, objects),
        object_keep=longer(features.object_keep, objects),
        masks=longer(features.masks, regions),
        geometry=longer(features.geometry, regions),
        region_keep=longer(features.region_keep, regions),
    )


def write_llava(folder: Path, seed: int = 0, **language) -> Path:
    """A tiny LLaVA in transformers' layout: 56 pixels, 4 x 4 tokens, byte-level tokenizer of the Llama kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        PreTrainedTokenizerFast,
    )

    special = ["<s>", "</s>", "<pad>", "<image>"]
    vocab = {token: n for n, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    own = Tokenizer(models.BPE(vocab, []))
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", pad_token="<pad>", additional_special_tokens=["<image>"]
    )
    tokenizer.save_pretrained(folder)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14
        ),
        text_config=LlamaConfig(
            **{
                "vocab_size": len(vocab),
                "hidden_size": 48,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                **language,
            }
        ),
        image_token_id=3,
        vision_feature_layer=-2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    return folder


def write_text_encoder(folder: Path, width: int = 24, seed: int = 0) -> tuple[Path, Path]:
    """A tiny CLIP text encoder and its tokenizer, as the folders text_encoder and tokenizer of a diffusers pipeline."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from reasonedit.reasonedit_core.mini.tokenizer import byte_tokens

    letters = [*byte_tokens(), *(f"{token}</w>" for token in byte_tokens()), "<|startoftext|>", "<|endoftext|>"]
    place = folder / "tokenizer"
    place.mkdir(parents=True)
    (place / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(letters)}))
    (place / "merges.txt").write_text("#version: 0.2\n")
    eos = "<|endoftext|>"
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>", "eos_token": eos}
    (place / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": eos, "pad_token": eos}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(letters),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=len(letters) - 2,
                eos_token_id=len(letters) - 1,
                pad_token_id=len(letters) - 1,
            )
        ).save_pretrained(folder / "text_encoder")
    return folder / "text_encoder", place


def write_unet(folder: Path, seed: int = 0, channels: int = 4) -> Path:
    """A tiny UNet of SD's kind in diffusers' layout."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        UNet2DConditionModel(
            sample_size=8,
            in_channels=channels,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=8,
            norm_num_groups=32,
        ).save_pretrained(folder)
    return folder


def write_flux(folder: Path, seed: int = 0) -> Path:
    """A tiny FLUX transformer in diffusers' layout."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=40,  # of T5; CLIP's states, which the CME reads, are narrower
            pooled_projection_dim=24,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ).save_pretrained(folder)
    return folder


def write_vae(folder: Path, seed: int = 0, **config) -> Path:
    """A tiny autoencoder of SD's kind, 8 pixels per latent; with `shift_factor` of FLUX's."""
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = AutoencoderKL(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4, **kinds, **config)
        made.save_pretrained(folder)
    return folder


def write_scheduler(folder: Path, kind: str) -> Path:
    """The scheduler's configuration as the released folders have it: PNDM of SD, flow matching of FLUX."""
    from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler

    sd = {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1, "skip_prk_steps": True}
    made = PNDMScheduler(**sd) if kind == "sd" else FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    made.save_pretrained(folder)
    return folder


def write_bases(folder: Path, kind: str = "sd") -> Path:
    """All that a ReasonBrain is trained around, in the folders of its layout; pictures of 64 pixels, two steps."""
    write_llava(folder / "llava")
    write_text_encoder(folder)
    if kind == "sd":
        write_unet(folder / "unet")
        write_vae(folder / "vae", scaling_factor=0.18215)
    else:
        write_flux(folder / "transformer")
        write_vae(folder / "vae", scaling_factor=0.3611, shift_factor=0.1159)
    write_scheduler(folder / "scheduler", kind)
    (folder / "reasonedit.json").write_text(json.dumps({"steps": 2, "size_level": 64, "multiple": 16}))
    (folder / "reasonbrain.json").write_text(json.dumps({"segmenter": "grid"}))
    return folder


def write_system(folder: Path, kind: str = "sd", seed: int = 0, **off) -> Path:
    """A whole tiny system, as training would leave it: nothing that starts at zero is zero. off: fields of Switches."""
    write_bases(folder, kind)
    return write_trained(folder, folder, kind, seed, **off)


def write_trained(folder: Path, bases: Path, kind: str = "sd", seed: int = 0, **off) -> Path:
    """What training would leave in `folder` around the parts in `bases`."""
    from reasonedit.reasonedit_core.brain.layout import find_brain_parts
    from reasonedit.reasonedit_core.brain.model import FIRST, new_brain_model, save_brain_model

    parts = find_brain_parts(bases, trained=False)
    model = new_brain_model(parts, TINY, switches=Switches(**off), seed=seed)
    model.llava.add_lora(rank=2, alpha=4, dropout=0.0)
    first = getattr(model.network, FIRST[kind]).requires_grad_(True)
    trained = [*model.brain.parameters(), *model.llava.trainable().values(), *model.llava.projector.parameters()]
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in (*trained, *first.parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=rng))
    save_brain_model(folder, model, parts)
    return folder


def write_mini_brain(place: Path) -> Path:
    """A folder with a stand-in for mini-brain and the rows of its components table, to be named by REASONEDIT_MINIS."""
    from reasonedit.training.mini.brain_rows import COMPONENTS, FULL, PLACE

    folder = write_system(place / "mini-brain")
    for row, off in COMPONENTS.items():
        if row != FULL:
            write_trained(folder / PLACE / row, folder, **off)
            shutil.copy2(folder / "reasonedit.json", folder / PLACE / row)
    return place


def write_sam(folder: Path, kind: str = "sam", seed: int = 0) -> Path:
    """A tiny SAM or SAM 2 in transformers' layout: 64 pixels."""
    import transformers

    small = {"hidden_size": 16, "num_attention_heads": 2, "mlp_dim": 32, "iou_head_hidden_dim": 16}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "sam":
            vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            size = {"image_size": 64, "patch_size": 16}
            config = transformers.SamConfig(
                vision_config={**vision, **size, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8},
                prompt_encoder_config={"hidden_size": 16, "image_embedding_size": 4, **size, "mask_input_channels": 4},
                mask_decoder_config={**small, "num_hidden_layers": 2},
            )
            transformers.SamModel(config).save_pretrained(folder)
            return folder
        backbone = {
            "image_size": [64, 64],
            "hidden_size": 8,
            "blocks_per_stage": [1, 1, 1, 1],
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 1, 1, 1],
            "window_size_per_stage": [4, 4, 4, 2],
            "global_attention_blocks": [],
            "window_positional_embedding_background_size": [4, 4],
            "model_type": "sam2_hiera_det_model",
        }
        config = transformers.Sam2Config(
            vision_config={
                "model_type": "sam2_vision_model",
                "backbone_config": backbone,
                "backbone_channel_list": [64, 32, 16, 8],
                "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
                "fpn_hidden_size": 16,
            },
            prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
            mask_decoder_config=small,
        )
        transformers.Sam2Model(config).save_pretrained(folder)
    return folder
