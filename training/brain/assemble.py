"""The model of one stage: base models, what earlier stages trained, and what this one trains (freeze sets)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...reasonedit_core.brain.model import FIRST
from ...reasonedit_core.conditioners.brain_weights import (
    FILE,
    LORA,
    BrainNote,
    add_denoiser_lora,
    load_brain,
    read_note,
    warn_of_other_parts,
)
from ...reasonedit_core.errors import ConfigError
from ...reasonedit_core.mllm.focus import Focus
from ...reasonedit_core.weightfiles import read_json, read_shapes
from ..config import BrainStage
from ..presets import BRAIN, DENOISER, LLAVA, Chosen
from ..presets import LORA as LORA_MODE
from ..trainable import free, match, plain_names
from ..types import ParamGroup
from .base import BrainBase
from .unit import BrainModels, BrainUnit

if TYPE_CHECKING:
    from ...reasonedit_core.brain.model import BrainModel
    from ..stages import Plan


@dataclass(frozen=True)
class Carried:
    """What an earlier stage trained: a folder of `brain_weights.save_brain`."""

    folder: Path

    @cached_property
    def note(self) -> BrainNote:
        """Widths, switches and LoRA of the denoiser."""
        return read_note(self.folder)

    @cached_property
    def denoiser(self) -> frozenset[str]:
        """Names of the denoiser's parameters that it holds."""
        keys = read_shapes(self.folder / FILE)
        return frozenset(key.removeprefix("denoiser.") for key in keys if key.startswith("denoiser."))

    @cached_property
    def digest(self) -> str:
        """sha256 over its files."""
        whole = hashlib.sha256()
        for file in (self.folder / FILE, *sorted((self.folder / LORA).glob("*.safetensors"))):
            with open(file, "rb") as stream:
                whole.update(hashlib.file_digest(stream, "sha256").digest())
        return whole.hexdigest()


@dataclass(frozen=True, eq=False)
class BrainLoaded:
    """models: the unit. groups: what is trained. modules: the parts, by name, for tables. model: the same as inference has it.
    kept: parameters of the denoiser that earlier stages trained."""

    models: BrainModels
    groups: tuple[ParamGroup, ...]
    modules: Mapping[str, nn.Module]
    model: BrainModel
    kept: frozenset[str]
    mllm: None = None


def load_stage(base: BrainBase, plan: Plan, carried: Mapping[str, Carried]) -> BrainLoaded:
    """Load and free what `plan` says. carried: what earlier stages trained, under the name `brain`.

    Raises ConfigError where sets do not go together with each other or with what was trained before, or where nothing teaches
    the denoiser's first layer to see the source; CheckpointError where what is carried is of another model.
    """
    stage = plan.stage
    where = f"stage.{stage.name}"
    model = base.take()
    before = carried.get(BRAIN)
    modules = {BRAIN: model.brain, LLAVA: model.llava.model, DENOISER: model.network}
    _add_loras(model, plan, before, where, base.config.run.seed)
    if before is not None:
        warn_of_other_parts(before.folder, base.parts.around)
        load_brain(before.folder, model.brain, model.llava, model.network)
    for module in modules.values():
        module.requires_grad_(False)
    groups: list[ParamGroup] = []
    owner: dict[str, str] = {}
    for chosen in plan.sets:
        names = _names(modules[chosen.part], chosen, where)
        taken = [name for name in names if f"{chosen.part}.{name}" in owner]
        if taken:
            other = owner[f"{chosen.part}.{taken[0]}"]
            raise ConfigError(
                f"{where}.train: expected every weight in one set, found {taken[0]} in {other} and {chosen.name}. Take one of "
                "them away, or exclude the name from one."
            )
        owner |= {f"{chosen.part}.{name}": chosen.name for name in names}
        groups.append(free(chosen.part, modules[chosen.part], chosen, names, stage.optim.weight_decay))
    kept = before.denoiser if before is not None else frozenset()
    if plan.paints:
        _need_first(base, model, kept, where)
        _check_drops(model, stage.brain or BrainStage(), where)
    if stage.checkpointing:
        _checkpoint(model)
    table = stage.brain or BrainStage()
    model.llava.set_focus(Focus(table.token_select, table.tame_gamma))
    unit = BrainUnit(model, None if table.features else base.finder(), table.guidance)
    return BrainLoaded(BrainModels(brain=unit), tuple(groups), modules, model, kept)


def _add_loras(model: BrainModel, plan: Plan, before: Carried | None, where: str, seed: int) -> None:
    """The LoRAs of the stage and of those before."""
    lora = {one.part: one for one in plan.sets if one.mode == LORA_MODE}
    if DENOISER in lora or (before is not None and before.note.denoiser_lora is not None):
        was = before.note.denoiser_lora if before is not None else None
        if before is not None and was is None:
            beneath = sorted(name for name in before.denoiser if "attn" in name)
            if beneath:
                raise ConfigError(
                    f"{where}.train: expected a denoiser whose attention was not trained whole before, found {beneath[0]}. "
                    "Go on training it, or start from `base`."
                )
        said = was or {"rank": lora[DENOISER].table.rank, "alpha": _alpha(lora[DENOISER])}
        _check_same(lora.get(DENOISER), was, where)
        with _drawn(seed):
            add_denoiser_lora(model.network, **said)
    if before is not None and (before.folder / LORA).is_dir():
        stated = read_json(before.folder / LORA / "adapter_config.json")
        _check_same(lora.get(LLAVA), {"rank": stated["r"], "alpha": stated["lora_alpha"]}, where)
        return  # `load_brain` attaches it
    if LLAVA in lora:
        table = lora[LLAVA].table
        with _drawn(seed):
            model.llava.add_lora(table.rank, _alpha(lora[LLAVA]), table.dropout)


@contextmanager
def _drawn(seed: int) -> Iterator[None]:
    """A block in which peft draws from a seed and leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _alpha(chosen: Chosen) -> int:
    return int(chosen.table.alpha or chosen.table.rank)


def _check_same(chosen: Chosen | None, was: Mapping[str, Any] | None, where: str) -> None:
    if chosen is None or was is None:
        return
    now = {"rank": chosen.table.rank, "alpha": _alpha(chosen)}
    wrong = [name for name in now if now[name] != was[name]]
    if wrong:
        raise ConfigError(
            f"{where}.train.{chosen.name}.{wrong[0]}: expected {was[wrong[0]]}, as the stage that began this LoRA has it, "
            f"found {now[wrong[0]]}. Give the same, or start from `base`."
        )


def _names(module: nn.Module, chosen: Chosen, where: str) -> list[str]:
    """Names in the module of what a set trains."""
    if chosen.mode == LORA_MODE:
        names = match((name for name, _ in module.named_parameters()), chosen.include, chosen.exclude)
    else:
        plain = {short: name for short, name in plain_names(module).items() if "trainable_tokens" not in name}
        names = [plain[name] for name in match(plain, chosen.include, chosen.exclude)]
    if not names:
        some = ", ".join([name for name, _ in module.named_parameters()][:3])
        raise ConfigError(
            f"{where}.train.{chosen.name}: expected a weight of the {chosen.part} that matches {' | '.join(chosen.include)}, "
            f"found none. Its names are: {some}, ..."
        )
    return names


def _need_first(base: BrainBase, model: BrainModel, kept: frozenset[str], where: str) -> None:
    first = FIRST[model.kind]
    layer = getattr(model.network, first)
    sees = layer.weight.requires_grad or f"{first}.weight" in kept
    width = read_json(base.parts.network / "config.json").get("in_channels")
    own = layer.in_channels if model.kind == "sd" else layer.in_features
    if not sees and width != own:
        raise ConfigError(
            f"{where}.train: expected the set denoiser_first, as {base.parts.network} does not see the source yet, found none. "
            "Add [stage.train.denoiser_first] with a learning rate."
        )


def _check_drops(model: BrainModel, table: BrainStage, where: str) -> None:
    """FLUX guides in one pass, so it never goes without text and there is nothing to put in the text's place."""
    found = [name for name in ("drop_text", "drop_both") if getattr(table, name) > 0]
    if model.kind == "flux" and found:
        raise ConfigError(
            f"{where}.brain.{found[0]}: expected 0 with FLUX, which guides in one pass and has no null context, found "
            f"{getattr(table, found[0])}. Set drop_text and drop_both to 0; drop_image may stay."
        )


def _checkpoint(model: BrainModel) -> None:
    """Activations are computed again in the backward pass."""
    model.llava.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.network.enable_gradient_checkpointing()
