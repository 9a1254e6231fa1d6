"""What of a part is trained: LoRA beside the Linears that a set names, full weights by name, everything else frozen.

Names are those of the part itself: transformers' of the MLLM, diffusers' of the DiT. Trained weights are kept in the `master`
dtype of their set.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..reasonedit_core.errors import ConfigError
from ..reasonedit_core.fp8 import FP8_DTYPES
from .presets import DIT, LORA, MLLM, Chosen
from .types import ParamGroup

ADAPTER = "default"
"""Name of the trained adapter in peft; a folder saved by peft has no other."""

# A DiT starts as the identity when these are zero: the modulation of every block, and what writes the velocity.
_ZEROED = re.compile(
    r"(.*\.(norm1|norm1_context|norm)\.linear|.*\.(img_mod|txt_mod)\.1|norm_out\.linear|proj_out)\.(weight|bias)"
)


def inject_lora(module: nn.Module, chosen: Chosen, *, seed: int) -> tuple[str, ...]:
    """Put the LoRA of a set beside the Linears of `module` that it names; returns their names. Weights in the set's master
    dtype, A drawn from `seed` and the name, B zero."""
    from peft import LoraConfig, inject_adapter_in_model

    table = chosen.table
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    names = match(linears, chosen.include, chosen.exclude)
    if not names:
        raise ConfigError(_no_match(chosen, linears))
    low = [name for name in names if linears[name].weight.dtype in FP8_DTYPES]
    if table.dora and low:
        raise ConfigError(
            f"train.{chosen.name}.dora: expected weights in full, as DoRA needs their norms, found {low[0]} in fp8. Use "
            "full weights (mllm_weights, dit_weights), or plain LoRA."
        )
    config = LoraConfig(
        r=table.rank,
        lora_alpha=table.alpha or table.rank,
        lora_dropout=table.dropout,
        use_dora=table.dora,
        use_rslora=table.rslora,
        target_modules="|".join(re.escape(name) for name in names),
    )
    # DoRA's magnitudes are computed from the weights at once; what a LoRA needs is made below, and peft need not.
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, module, adapter_name=ADAPTER, low_cpu_mem_usage=not table.dora)
    for name in names:
        _fill_adapter(name, module.get_submodule(name), getattr(torch, table.master), seed)
    return tuple(names)


def _fill_adapter(name: str, layer: nn.Module, master: torch.dtype, seed: int) -> None:
    """The first values of one adapter, where its Linear is: A drawn on the CPU, so that every device starts alike, B zero."""
    home = layer.get_base_layer().weight.device
    for key, parameter in list(layer.named_parameters()):
        if not _is_adapter(f".{key}"):
            continue
        if ".lora_A." in f".{key}" and home.type != "meta":
            drawn = torch.empty(parameter.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=named_generator(seed, f"{name}.{key}"))
            values = drawn.to(home, master)
        elif ".lora_B." in f".{key}":
            values = torch.zeros(parameter.shape, dtype=master, device=home)
        else:
            values = parameter.to(home, master)
        owner, _, leaf = key.rpartition(".")
        setattr(layer.get_submodule(owner), leaf, nn.Parameter(values.detach()))


def train_sets(part: str, module: nn.Module, sets: Sequence[Chosen], *, seed: int, weight_decay: float) -> list[ParamGroup]:
    """Freeze `module` and free what the sets name: adapters are injected, full weights brought to their master dtype.

    Raises ConfigError where a set names nothing, where two share a weight, and where a full one names low-bit weights.
    """
    for chosen in sets:  # all before anything is freed, as peft freezes what is no adapter
        if chosen.mode == LORA and not has_adapter(module):
            inject_lora(module, chosen, seed=seed)
    module.requires_grad_(False)
    groups: list[ParamGroup] = []
    owner: dict[str, str] = {}
    for chosen in sets:
        if chosen.mode == LORA:
            names = [name for name, _ in module.named_parameters() if _is_adapter(name)]
        else:
            plain = plain_names(module)
            names = [plain[name] for name in match(plain, chosen.include, chosen.exclude)]
        if not names:
            raise ConfigError(_no_match(chosen, plain_names(module)))
        for name in names:
            if name in owner:
                raise ConfigError(
                    f"train: expected every weight in one set, found {name} in {owner[name]} and {chosen.name}. Take one of "
                    "the sets away, or exclude the name from one."
                )
            owner[name] = chosen.name
        groups.append(free(part, module, chosen, names, weight_decay))
    return groups


def free(part: str, module: nn.Module, chosen: Chosen, names: Sequence[str], weight_decay: float) -> ParamGroup:
    """Bring the named parameters to the master dtype of their set and let them be trained; -> their group. ConfigError for
    low-bit weights."""
    table, parameters = chosen.table, dict(module.named_parameters())
    master = getattr(torch, table.master)
    members = []
    for name in names:
        parameter = parameters[name]
        if parameter.dtype in FP8_DTYPES or not parameter.dtype.is_floating_point:
            raise ConfigError(
                f"train.{chosen.name}: expected weights that can be trained, found {name} kept in {parameter.dtype}. Load the "
                f'{"MLLM" if part == MLLM else "DiT"} in full ({part}_weights = "full"), or train a LoRA.'
            )
        parameter.data = parameter.data.to(master)
        parameter.requires_grad_(True)
        members.append((f"{part}.{name}", parameter))
    decay = weight_decay if table.weight_decay is None else table.weight_decay
    return ParamGroup(chosen.name, tuple(members), table.lr, decay)


def match(names: Iterable[str], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The names that one of `include` matches as a whole and none of `exclude` does, in their order."""
    take, leave = (re.compile("|".join(f"(?:{one})" for one in some) or r"(?!)") for some in (include, exclude))
    return [name for name in names if take.fullmatch(name) and not leave.fullmatch(name)]


def draw_weights(module: nn.Module, names: Sequence[str], seed: int, std: float) -> None:
    """Draw the named parameters anew: matrices N(0, std), norms 1, biases 0, and the DiT's modulation and output 0.

    Every tensor has its own generator, so that its values do not depend on what else is drawn.
    """
    parameters = dict(module.named_parameters())
    for name in names:
        data = parameters[name].data
        if _ZEROED.fullmatch(name) or name.endswith("bias"):
            data.zero_()
        elif data.ndim <= 1:
            data.fill_(1.0)
        else:
            drawn = torch.randn(data.shape, generator=named_generator(seed, name), dtype=torch.float32)
            data.copy_(drawn.mul_(std))


def named_generator(seed: int, name: str) -> torch.Generator:
    """A generator of its own for the tensor `name`."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def has_adapter(module: nn.Module) -> bool:
    """Whether a LoRA has been put beside Linears of `module`."""
    return any(_is_adapter(name) for name, _ in module.named_parameters())


def _is_adapter(name: str) -> bool:
    return f".{ADAPTER}." in name and ".lora_" in name


def plain_parameters(module: nn.Module) -> Iterable[tuple[str, nn.Parameter]]:
    """The parameters that are no adapters, by name."""
    return ((name, parameter) for name, parameter in module.named_parameters() if not _is_adapter(name))


def plain_names(module: nn.Module) -> dict[str, str]:
    """{name without adapters: name now} of the parameters that are none: a LoRA puts `base_layer` into the names it covers."""
    return {name.replace(".base_layer.", "."): name for name, _ in plain_parameters(module)}


def _no_match(chosen: Chosen, names: Iterable[str]) -> str:
    some = list(names)
    shown = ", ".join(some[:3]) + (", ..." if len(some) > 3 else "")
    what = "a Linear" if chosen.mode == LORA else "a weight"
    return (
        f"train.{chosen.name}: expected {what} of the {'MLLM' if chosen.part == MLLM else 'DiT'} that matches "
        f"{' | '.join(chosen.include)}, found none. Its names are: {shown}."
    )


# ---- tables --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PartTable:
    """Weights of one part: all, trained, and the bytes they take as loaded."""

    part: str
    weights: int
    trained: int
    bytes: int


def part_tables(modules: Mapping[str, nn.Module]) -> list[PartTable]:
    """One row per part that is loaded."""
    rows = []
    for part, module in modules.items():
        tensors = list(module.parameters())
        rows.append(
            PartTable(
                part,
                sum(one.numel() for one in tensors),
                sum(one.numel() for one in tensors if one.requires_grad),
                sum(one.numel() * one.element_size() for one in (*tensors, *module.buffers())),
            )
        )
    return rows


def trainable_table(groups: Sequence[ParamGroup], modules: Mapping[str, nn.Module]) -> str:
    """What is trained and what is frozen, as text."""
    lines = [f"{'set':<14}{'tensors':>9}{'weights':>16}{'lr':>10}{'decay':>8}  dtype     first"]
    for group in groups:
        count = sum(parameter.numel() for _, parameter in group.parameters)
        dtype = str(group.parameters[0][1].dtype).removeprefix("torch.")
        lines.append(
            f"{group.name:<14}{len(group.parameters):>9}{count:>16,}{group.lr:>10.1e}{group.weight_decay:>8g}  {dtype:<9} "
            f"{group.parameters[0][0]}"
        )
    for row in part_tables(modules):
        share = 100 * row.trained / max(row.weights, 1)
        lines.append(f"{row.part}: {row.trained:,} of {row.weights:,} weights trained ({share:.3g} %)")
    absent = [name for name in (MLLM, DIT) if name not in modules] if {MLLM, DIT} & set(modules) else []
    return "\n".join([*lines, *(f"{name}: not loaded" for name in absent)])
