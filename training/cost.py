"""What a step costs, computed from shapes: memory as an estimate, work as a count of floating-point operations.

T text tokens, N picture tokens, L tokens of the MLLM stream; S = T + N. Nothing here is measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..reasonedit_core.fp8 import Fp8Linear
from .types import ParamGroup

GIB = 2**30

# Numbers that autograd keeps per token in a block, in units of the block's width: normed inputs, q, k, v, rotated copies,
# attention output, the 4x wide MLP before and after its activation, gated sums. Counted from the blocks' code.
DUAL_KEPT, SINGLE_KEPT = 24.0, 22.0
MLLM_KEPT = 10.0
"""Of a layer of the MLLM beside its MLP, which keeps three numbers per inner channel."""

LOGITS, PER_LOGIT = 2**25, 16
"""Most logits at a time (`kernels.cross_entropy.LOGITS`), and bytes for each at the peak."""

CONTEXT = 1.0 * GIB
"""What CUDA, its libraries and the allocator's gaps take; met on common cards, differs between them."""

_MODULATION = re.compile(r"(.*\.)?(norm1|norm1_context|norm)\.linear|(.*\.)?(img_mod|txt_mod)\.1")


@dataclass(frozen=True, slots=True)
class Load:
    """What a pack holds, for counting: tokens of each document, by stream. answers: tokens with a loss; patches: of the
    vision tower."""

    text: tuple[int, ...] = ()
    image: tuple[tuple[int, int], ...] = ()
    answers: int = 0
    patches: int = 0

    @property
    def tokens(self) -> tuple[int, int]:
        """Tokens of the MLLM stream, and of the DiT stream with its text."""
        return sum(self.text), sum(sum(pair) for pair in self.image)


# ---- floating-point operations -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Work:
    """Forward operations: of the Linears, and of attention."""

    linear: float
    attention: float

    def step(self, *, trained: str, checkpointing: bool) -> float:
        """Of forward and backward. trained: `full` (gradients of weights and inputs), `lora` (of inputs; the LoRA itself is
        not counted), or `` (forward only)."""
        forward = self.linear + self.attention
        if not trained:
            return forward
        backward = self.linear * (2 if trained == "full" else 1) + 2 * self.attention
        return forward + backward + (forward if checkpointing else 0)


def dit_work(dit: nn.Module, load: Load) -> Work:
    """Forward of the DiT's blocks and connector on one pack. Modulation is per document and left out."""
    linear = attention = 0.0
    width = _width(dit)
    lengths = [sum(pair) for pair in load.image]
    for block, dual in dit_blocks(dit):
        weights = sum(_size(one) for name, one in _linears(block) if not _MODULATION.fullmatch(name))
        linear += 2 * (weights / 2 if dual else weights) * sum(lengths)
        attention += sum(4 * length**2 * width for length in lengths)
    texts = sum(text for text, _ in load.image)
    for name in ("connector", "text_token_mapping", "txt_in"):
        module = getattr(dit, name, None)
        if module is not None:
            linear += 2 * texts * sum(_size(one) for _, one in _linears(module))
    return Work(linear, attention)


def mllm_work(model: nn.Module, load: Load) -> Work:
    """Forward of the language model (causal) and the rows of lm_head that a loss is asked of."""
    layers = model.model.language_model.layers
    width = model.config.get_text_config().hidden_size
    weights = sum(_size(one) for layer in layers for _, one in _linears(layer))
    head = _size(model.lm_head) if model.lm_head is not None else 0
    linear = 2.0 * weights * sum(load.text) + 2.0 * head * load.answers
    return Work(linear, sum(2.0 * length**2 * width for length in load.text) * len(layers))


def vision_work(model: nn.Module, load: Load) -> Work:
    """Forward of the vision tower, its attention left out (it is windowed in most layers)."""
    blocks = model.model.visual.blocks
    return Work(2.0 * load.patches * sum(_size(one) for block in blocks for _, one in _linears(block)), 0.0)


# ---- memory --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what they are for."""

    rows: tuple[tuple[str, float], ...]

    @property
    def total(self) -> float:
        """Of all rows."""
        return sum(size for _, size in self.rows)

    def lines(self) -> list[str]:
        """A row per line, then the sum."""
        unit, name = (GIB, "GiB") if self.total >= GIB else (2**20, "MiB")
        table = [f"  {row:<44}{size / unit:>8.2f} {name}" for row, size in self.rows if size]
        return [*table, f"  {'together (an estimate)':<44}{self.total / unit:>8.2f} {name}"]


def estimate(
    *,
    modules: Mapping[str, nn.Module],
    groups: Sequence[ParamGroup],
    load: Load,
    compute_bytes: int,
    checkpointing: bool,
    optimizer_bytes: int = 8,
    ema: bool = False,
    nf4: Sequence[str] = (),
    swapped: int = 0,
    cuda: bool = True,
    world: int = 1,
) -> Memory:
    """What one step needs on one device.

    modules: the loaded parts (mllm: transformers' model; dit), on the meta device or not. load: the fullest pack.
    optimizer_bytes: per trained weight. nf4: parts whose fp8 here stands for 4 bits. swapped: DiT blocks in main memory.
    world: ranks that weights, gradients and optimizer states are cut over (FSDP2).
    """
    trained = sum(parameter.numel() for group in groups for _, parameter in group.parameters)
    masters = sum(parameter.numel() * parameter.element_size() for group in groups for _, parameter in group.parameters)
    rows: list[tuple[str, float]] = []
    for part, module in modules.items():
        frozen = sum(_stored(p, part in nf4) for p in module.parameters() if not p.requires_grad)
        if part == "dit" and swapped:
            frozen -= parked_bytes(module, swapped)
        rows.append((f"frozen weights, {part}", frozen / world))
    rows += [
        ("trained weights", masters / world),
        ("their gradients", masters / world),
        ("optimizer states", optimizer_bytes * trained / world),
        ("moving average", 4 * trained / world if ema else 0),
        ("activations (an estimate)", _activations(modules, groups, load, compute_bytes, checkpointing)),
        (
            "one block's weights, brought in or unpacked",
            _largest_block(modules, compute_bytes) if _unpacks(modules, swapped) else 0,
        ),
        ("CUDA itself (assumed)", CONTEXT if cuda else 0),
    ]
    return Memory(tuple(rows))


def dit_blocks(dit: nn.Module) -> list[tuple[nn.Module, bool]]:
    """The DiT's blocks in the order they run, and whether each has two streams."""
    single = getattr(dit, "single_transformer_blocks", ())
    return [*((block, True) for block in dit.transformer_blocks), *((block, False) for block in single)]


def parked_bytes(dit: nn.Module, count: int) -> float:
    """Frozen bytes of the last `count` blocks, which swapping keeps in main memory."""
    blocks = [block for block, _ in dit_blocks(dit)]
    return sum(_stored(p, False) for block in blocks[len(blocks) - count :] for p in block.parameters() if not p.requires_grad)


def _activations(
    modules: Mapping[str, nn.Module], groups: Sequence[ParamGroup], load: Load, compute_bytes: int, checkpointing: bool
) -> float:
    text, image = load.tokens
    total = 0.0
    mllm_trained = any(name.startswith("mllm.") for group in groups for name, _ in group.parameters)
    if "dit" in modules:
        dit = modules["dit"]
        kept = [(DUAL_KEPT if dual else SINGLE_KEPT) * _width(dit) for _, dual in dit_blocks(dit)]
        total += image * compute_bytes * (len(kept) * _width(dit) + max(kept) if checkpointing else sum(kept))
    if "mllm" in modules:
        config = modules["mllm"].config.get_text_config()
        kept = MLLM_KEPT * config.hidden_size + 3 * config.intermediate_size
        layers = config.num_hidden_layers
        if not mllm_trained:
            total += text * compute_bytes * kept
        else:
            total += text * compute_bytes * (layers * config.hidden_size + kept if checkpointing else layers * kept)
        total += PER_LOGIT * min(LOGITS, load.answers * config.vocab_size)
    return total


def _unpacks(modules: Mapping[str, nn.Module], swapped: int) -> bool:
    return bool(swapped) or any(isinstance(one, Fp8Linear) for module in modules.values() for one in module.modules())


def _largest_block(modules: Mapping[str, nn.Module], compute_bytes: int) -> float:
    dit = modules.get("dit")
    if dit is not None:
        blocks = [block for block, _ in dit_blocks(dit)]
    else:
        blocks = list(modules["mllm"].model.language_model.layers)
    return max(sum(p.numel() for p in block.parameters() if not p.requires_grad) for block in blocks) * compute_bytes


def _width(dit: nn.Module) -> int:
    return dit.config.num_attention_heads * dit.config.attention_head_dim


def _linears(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Linears, those of adapters left out."""
    return [
        (name, one)
        for name, one in module.named_modules()
        if hasattr(one, "in_features") and ".lora_" not in name and not hasattr(one, "base_layer")
    ]


def _size(linear: nn.Module) -> int:
    return linear.in_features * linear.out_features


def _stored(parameter: nn.Parameter, nf4: bool) -> float:
    size = parameter.numel() * parameter.element_size()
    return size * 0.5625 if nf4 and parameter.element_size() == 1 else size  # half a byte, and the scales of 64 weights
