"""What the benchmark works on: random documents, grouped into packs or padded batches, and networks with random weights.

Nothing here measures anything; see `bench`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..reasonedit_core.packing import ImagePack, TextPack

MODES = ("packed", "padded")
SKIPPING = ("varlen", "interval", "flex", "batched")
"""Backends whose cost is that of what is seen."""

STREAMS = ("dit", "mllm")
FULL = {
    "dit": {
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "axes_dims_rope": (16, 56, 56),
        "joint_attention_dim": 4096,
        "connector_hidden_size": 4096,
        "connector_in_channels": 3584,
        "connector_heads_num": 32,
    },
    "mllm": {"hidden": 3584, "layers": 28, "heads": 28, "kv": 4, "inner": 18944, "vocabulary": 152064},
}
SMALL = {
    "dit": {
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "num_layers": 2,
        "num_single_layers": 4,
        "axes_dims_rope": (8, 12, 12),
        "joint_attention_dim": 128,
        "connector_hidden_size": 128,
        "connector_in_channels": 128,
        "connector_heads_num": 4,
    },
    "mllm": {"hidden": 128, "layers": 4, "heads": 4, "kv": 2, "inner": 384, "vocabulary": 4096},
}
"""Step1X-Edit and Qwen2.5-VL-7B, and the same in small for CPUs."""

Document = tuple[int, tuple[tuple[int, int], ...]]
"""(text tokens, grids of target and references)."""


@dataclass(frozen=True, slots=True)
class Case:
    """What one process measures. lengths: `mix` (drawn), or `edit` (one edit of 1024 x 1024 with its reference, or 2048 tokens
    of text). budget: tokens of a pack. rank: of the LoRA."""

    stream: str
    mode: str
    size: str
    device: str
    lengths: str = "mix"
    checkpointing: bool = True
    budget: int = 2048
    documents: int = 24
    batch: int = 4
    steps: int = 3
    warmup: int = 1
    rank: int = 16
    backend: str = "auto"
    seed: int = 0


# ---- documents -----------------------------------------------------------------------------------------------------------


def draw_documents(case: Case) -> list[Document]:
    """Random documents: half of 0.2 to 0.6 of what a budget allows, most others up to 0.75, a tenth very short ones."""
    if case.lengths == "edit":
        return [(640, ((64, 64), (64, 64)))] if case.stream == "dit" else [(2048, ())]
    rng = Random(case.seed)
    unit = case.budget / 4096
    found = []
    for _ in range(case.documents):
        low, high = rng.choices([(480, 1500), (1500, 3100), (40, 200)], [5, 4, 1])[0]
        length = max(8, int(rng.randint(low, high) * unit))
        if case.stream == "mllm":
            found.append((length, ()))
            continue
        side = max(2, int(math.sqrt(0.45 * length)))
        text = max(4, length - 2 * side * side)
        found.append((text, ((side, side), (side, side))))
    return found


def length_of(document: Document) -> int:
    """Tokens of a document, all of its pictures counted."""
    return document[0] + sum(height * width for height, width in document[1])


def group(case: Case, documents: Sequence[Document]) -> list[list[Document]]:
    """The packs of one pass over the documents: planned, or batches of like length grown to their longest."""
    if case.mode == "padded":
        ordered = sorted(documents, key=length_of)
        batches = [ordered[at : at + case.batch] for at in range(0, len(ordered), case.batch)]
        return [[max(batch, key=length_of)] * len(batch) for batch in batches]
    from .data.plan import Budgets, Item
    from .data.planner import plan

    stream = "image" if case.stream == "dit" else "text"
    loss = "fm" if case.stream == "dit" else "ntp"
    items = [Item(str(n), str(n), "any", loss, **{stream: length_of(d)}) for n, d in enumerate(documents)]
    most = max(case.budget, max(length_of(document) for document in documents))
    made = plan(items, seed=case.seed, epoch=0, budgets=Budgets(text=most, image=most))
    return [[documents[index] for index, _ in made.pack(number)] for number in range(made.n_packs)]


def image_pack(documents: Sequence[Document], width: int, seed: int) -> ImagePack:
    """Random latents and states for documents of the DiT stream."""
    import torch

    from ..reasonedit_core.packing import ImagePack

    rng = torch.Generator().manual_seed(seed)
    texts = torch.tensor([text for text, _ in documents])
    sizes = [(number, role, h * w) for number, (_, grids) in enumerate(documents) for role, (h, w) in enumerate(grids)]
    repeats = torch.tensor([n for *_, n in sizes])
    doc = torch.tensor([number for number, *_ in sizes]).repeat_interleave(repeats)
    role = torch.tensor([role for _, role, _ in sizes]).repeat_interleave(repeats)
    tokens, n_text = int(repeats.sum()), int(texts.sum())
    noise = torch.randn(tokens, 64, generator=rng) * (role == 0)[:, None]
    return ImagePack(
        text_index=torch.arange(n_text),
        text_doc=torch.arange(len(documents)).repeat_interleave(texts),
        clean=torch.randn(tokens, 64, generator=rng),
        noise=noise,
        sigma=torch.rand(len(documents), generator=rng),
        image_doc=doc,
        role=role,
        loss_weight=(role == 0).float(),
        grids=tuple(grids for _, grids in documents),
        states=torch.randn(n_text, width, generator=rng),
    )


def text_pack(documents: Sequence[Document], vocabulary: int, seed: int) -> TextPack:
    """Random token ids; the last quarter of each document is an answer."""
    import torch

    from ..reasonedit_core.packing import IGNORED, TextPack

    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([text for text, _ in documents])
    place = torch.cat([torch.arange(int(n)) for n in lengths])
    doc = torch.arange(len(documents)).repeat_interleave(lengths)
    ids = torch.randint(0, vocabulary - 100, (int(lengths.sum()),), generator=rng)
    answer = place >= (lengths[doc] * 3) // 4
    return TextPack(
        ids=ids,
        positions=place.expand(3, -1).contiguous(),
        doc_id=doc,
        labels=torch.where(answer, ids, torch.full_like(ids, IGNORED)),
        weights=answer.float(),
        patches=torch.zeros(0, 1176),
    )


# ---- models --------------------------------------------------------------------------------------------------------------


def build_unit(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, list[nn.Parameter]]:
    """(the unit, the network in it, what is trained): random weights, drawn where they stay, with a LoRA."""
    import torch

    from .presets import choose
    from .trainable import train_sets

    table = (FULL if case.size == "full" else SMALL)[case.stream]
    with torch.device("meta"):
        network = _dit(table) if case.stream == "dit" else _mllm(table)
    network = network.to(dtype)  # on the meta device still: nothing is moved
    _materialise(network, device, case.seed)
    name = "dit_lora" if case.stream == "dit" else "mllm_lora"
    chosen = choose(name, _train_set(case.rank), "reasonedit-s")
    groups = train_sets(case.stream, network, [chosen], seed=case.seed, weight_decay=0.0)
    unit = _wrap(case, network)
    return unit.train(), network, [parameter for found in groups for _, parameter in found.parameters]


def _train_set(rank: int):
    from .config import TrainSet

    return TrainSet(lr=1e-4, rank=rank)


def _dit(table: dict[str, Any]) -> nn.Module:
    from ..reasonedit_core.models.step1x_transformer import Step1XEditTransformer2DModel

    return Step1XEditTransformer2DModel(in_channels=64, **table)


def _mllm(table: dict[str, Any]) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = table["hidden"] // table["heads"] // 2
    side = half * 3 // 8
    text = {
        "hidden_size": table["hidden"],
        "num_hidden_layers": table["layers"],
        "num_attention_heads": table["heads"],
        "num_key_value_heads": table["kv"],
        "intermediate_size": table["inner"],
        "vocab_size": table["vocabulary"],
        "rope_scaling": {"type": "mrope", "mrope_section": [half - 2 * side, side, side]},
    }
    # The tower is not run here (documents are text), so the smallest one will do.
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": table["hidden"]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, attn_implementation="sdpa", tie_word_embeddings=False)
    config.image_token_id = table["vocabulary"] - 1
    return Qwen2_5_VLForConditionalGeneration(config)


def _wrap(case: Case, network: nn.Module) -> nn.Module:
    how = {"checkpointing": case.checkpointing, "backend": case.backend}
    if case.stream == "dit":
        from ..reasonedit_core.denoisers.packed import PackedStep1X

        return PackedStep1X(network, "v1.1", **how)
    from ..reasonedit_core.mllm.packed import PackedMLLM
    from ..reasonedit_core.mllm.qwen25vl import QwenVL

    return PackedMLLM(QwenVL(network, None), **how)


def _materialise(network: nn.Module, device: torch.device, seed: int) -> None:
    """Memory and random values for a network on the meta device, tensor by tensor, on the device itself."""
    import torch
    from torch import nn

    rng = torch.Generator(device).manual_seed(seed)
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            if parameter.ndim > 1:
                values.normal_(0.0, 0.02, generator=rng)
            else:
                values.fill_(0.0 if name == "bias" else 1.0)
            setattr(module, name, nn.Parameter(values, requires_grad=False))
    if hasattr(network, "lm_head"):
        from ..reasonedit_core.mllm.load import _fill_rotary

        _fill_rotary(network, device)
    for module in network.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
