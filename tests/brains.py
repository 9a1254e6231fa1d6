"""Tiny ReasonBrains and features for tests: the classes of the real ones, a few numbers wide."""

from __future__ import annotations

import json
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
