"""The models of one stage, put together: base weights, what earlier stages trained, what this one trains, and the packed units.

Every stage begins from the files, also in the middle of a run: a run that is resumed at a stage then meets the same models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..reasonedit_core.detect import STEP1X
from ..reasonedit_core.errors import ConfigError
from .adapters import Trained, collect, restore
from .models import Base
from .presets import DIT, FULL, LORA, MLLM, Chosen
from .stages import Plan
from .swap import swap_blocks
from .trainable import draw_weights, match, plain_names, plain_parameters, train_sets
from .types import Models, ParamGroup

if TYPE_CHECKING:
    from ..reasonedit_core.mllm.qwen25vl import QwenVL

BLOCKS = (
    "DoubleBlock",
    "SingleBlock",
    "QwenImageTransformerBlock",
    "Qwen2_5_VLDecoderLayer",
    "Qwen2_5_VLVisionBlock",
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "PhiDecoderLayer",
    "Phi3DecoderLayer",
    "BasicTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
)
"""What FSDP2 cuts one by one. The connector's blocks are not among them: they are called piece by piece."""

_SAME = {"r": "rank", "lora_alpha": "alpha", "use_dora": "dora", "use_rslora": "rslora"}


@dataclass(frozen=True, eq=False)
class Loaded:
    """models: the units. groups: what is trained. modules: the parts that are loaded (mllm: transformers' model; dit). mllm:
    the MLLM, None where its states are cached. carried: what earlier stages trained, by part."""

    models: Models
    groups: tuple[ParamGroup, ...]
    modules: Mapping[str, nn.Module]
    mllm: QwenVL | None
    carried: Mapping[str, Trained]

    def trained(self) -> tuple[Trained, ...]:
        """Everything trained so far: of this stage and, where it left them alone, of those before. Under FSDP2 every rank
        must call this."""
        parts = dict(self.carried)
        for part, module in self.modules.items():
            before = self.carried.get(part)
            freed = {name for name, parameter in plain_parameters(module) if parameter.requires_grad}
            plain = plain_names(module)
            kept = {plain[name] for name in (before.whole if before else ())}
            now = collect(part, module, whole=kept | freed)
            if now is not None:
                parts[part] = now
        return tuple(parts[part] for part in (DIT, MLLM) if part in parts)


def load_stage(base: Base, plan: Plan, carried: Mapping[str, Trained]) -> Loaded:
    """Load and free what `plan` says. carried: what earlier stages trained, by part; parts that are not loaded are kept.

    Raises ConfigError where a set does not go with what was trained before.
    """
    base.release()
    modules: dict[str, nn.Module] = {}
    mllm = base.mllm(need_lm_head=plan.speaks) if plan.mllm else None
    if mllm is not None:
        modules[MLLM] = mllm.model
    if plan.dit:
        modules[DIT] = base.dit()
    groups: list[ParamGroup] = []
    for part, module in modules.items():
        groups += prepare(part, module, plan, carried.get(part), seed=base.config.run.seed)
    if plan.dit:
        _place(modules[DIT], base.config.model.swap_blocks, base.device)
    return Loaded(units(base, plan, mllm, modules.get(DIT)), tuple(groups), modules, mllm, carried)


def prepare(part: str, module: nn.Module, plan: Plan, before: Trained | None, *, seed: int) -> list[ParamGroup]:
    """Put back what was trained of a part before, draw what starts anew, and free the sets of the stage."""
    sets = plan.of(part)
    where = f"stage.{plan.stage.name}"
    if before is not None:
        for one in sets:
            _check_continues(one, module, before, where)
        if not next(module.parameters()).is_meta:
            restore(module, before, trainable=False)
    for one in sets:
        if one.random:
            kept = set(before.whole) if before else set()
            plain = plain_names(module)
            names = match(plain, one.include, one.exclude)
            draw_weights(module, [plain[name] for name in names if name not in kept], seed, one.table.std)
    return train_sets(part, module, sets, seed=seed, weight_decay=plan.stage.optim.weight_decay)


def units(base: Base, plan: Plan, mllm: QwenVL | None, dit: nn.Module | None) -> Models:
    """The modules whose forward takes a pack."""
    from ..reasonedit_core.denoisers.packed import PackedQwenImage, PackedStep1X
    from ..reasonedit_core.mllm.packed import PackedMLLM

    how = {"checkpointing": plan.stage.checkpointing, "backend": base.config.model.attention}
    packed = None
    if dit is not None:
        packed = PackedStep1X(dit, base.variant, **how) if base.system == STEP1X else PackedQwenImage(dit, **how)
    return Models(None if mllm is None else PackedMLLM(mllm, **how), packed)


def _check_continues(one: Chosen, module: nn.Module, before: Trained, where: str) -> None:
    """A LoRA goes on as it is; full weights cannot be trained beneath one."""
    if not before.lora:
        return
    if one.mode == FULL:
        taken = match(plain_names(module), one.include, one.exclude)
        beneath = [name for name in before.modules if f"{name}.weight" in taken]
        if beneath:
            raise ConfigError(
                f"{where}.train.{one.name}: expected weights without a LoRA beside them, as an earlier stage trained one on "
                f"{beneath[0]} and {len(beneath) - 1} more. Export that stage merged and start from the result, or train "
                "the LoRA."
            )
    if one.mode == LORA:
        table = one.table
        wanted = {"rank": table.rank, "alpha": table.alpha or table.rank, "dora": table.dora, "rslora": table.rslora}
        for theirs, ours in _SAME.items():
            if before.config[theirs] != wanted[ours]:
                raise ConfigError(
                    f"{where}.train.{one.name}.{ours}: expected {before.config[theirs]}, as the stage that began this LoRA has "
                    f"it, found {wanted[ours]}. Give the same, or start from `base`."
                )
        linears = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
        if set(match(linears, one.include, one.exclude)) != set(before.modules):
            raise ConfigError(
                f"{where}.train.{one.name}.include: expected the {len(before.modules)} modules of the stage that began this "
                "LoRA, found others. Give the same include and exclude, or start from `base`."
            )


def _place(dit: nn.Module, swapped: int, device: torch.device) -> None:
    """Blocks that are swapped stay in main memory; everything else goes to the device."""
    if not swapped:
        return
    blocks: Sequence[nn.Module] = [*dit.transformer_blocks, *getattr(dit, "single_transformer_blocks", ())]
    swap_blocks(blocks, swapped, device)
    parked = {id(module) for block in blocks[len(blocks) - swapped :] for module in block.modules()}
    for module in dit.modules():
        if id(module) in parked:
            continue
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(device)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
