"""Packs for tests, made by hand from a tiny MLLM: documents with pictures, labels on their last tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from reasonedit.reasonedit_core.mllm.positions import rope_positions
from reasonedit.reasonedit_core.mllm.vision import preprocess
from reasonedit.reasonedit_core.packing import IGNORED, PADDING, TextPack

BOUNDS = {"min_pixels": 56 * 56, "max_pixels": 56 * 112}


def picture(seed=0, height=60, width=84):
    """(1, 3, height, width) of noise."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Document:
    """ids and labels (L,), positions (3, L), pictures as Patches."""

    ids: list[int]
    labels: list[int]
    positions: torch.Tensor
    patches: tuple = ()


def document(mllm, text, answer="", images=()):
    """A turn that shows the images and says `text`; the tokens of `answer` are labelled."""
    patches = tuple(preprocess(image, **BOUNDS) for image in images)
    prompt = mllm.tokenize(mllm.render("Be brief.", [*range(len(images)), text], n_images=len(images)))
    counts = iter([len(p.values) // 4 for p in patches])
    ids = [token for i in prompt for token in [i] * (next(counts) if i == mllm.image_token_id else 1)]
    said = mllm.tokenize(answer)
    positions = rope_positions(ids + said, [p.grid for p in patches], image_token_id=mllm.image_token_id)[:, 0]
    return Document(ids + said, [IGNORED] * len(ids) + said, positions, patches)


def pack(documents, padding=0, exports=(), seed=0):
    """The documents one behind another. Weights are drawn; exports: (start, stop) rows."""
    ids = torch.tensor([i for d in documents for i in d.ids] + [0] * padding)
    doc_id = [n for n, d in enumerate(documents) for _ in d.ids] + [PADDING] * padding
    patches = [p for d in documents for p in d.patches]
    return TextPack(
        ids=ids,
        positions=torch.cat([*(d.positions for d in documents), torch.zeros(3, padding, dtype=torch.long)], dim=1),
        doc_id=torch.tensor(doc_id),
        labels=torch.tensor([i for d in documents for i in d.labels] + [IGNORED] * padding),
        weights=torch.rand(len(ids), generator=torch.Generator().manual_seed(seed)) + 0.5,
        patches=torch.cat([p.values for p in patches]) if patches else torch.empty(0, 1176),
        grids=tuple(p.grid for p in patches),
        exports=tuple(exports),
        records=tuple(f"r{n}" for n in range(len(documents))),
    )


def lora(model, dropout=0.0, seed=0):
    """Put a LoRA with weights that do something on q, k, v and o of the language model; returns its parameters by name."""
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    targets = r".*language_model.*\.self_attn\.[qkvo]_proj"
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=targets), model)
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=rng)
            found[name] = parameter
    return found
