"""LoRAs onto a DiT: as peft adapters beside the weights, or merged into them. Never partial in silence."""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import CheckpointError, ConfigError
from .fp8 import FP8_DTYPES, Fp8Linear
from .lora_keys import Normalised, Pair, Stated, normalise
from .weightfiles import naming, read_json, read_metadata, read_state

logger = logging.getLogger(__name__)

MODES = ("adapter", "merge")
DIFFUSERS_METADATA = "lora_adapter_metadata"


@dataclass(frozen=True, slots=True)
class LoraReport:
    """matched: modules that got a LoRA, named in modules; unmatched: keys of the file that met no module; style: how its
    keys are written; name: of the adapter, "" when merged."""

    matched: int
    modules: tuple[str, ...]
    unmatched: tuple[str, ...]
    style: str
    name: str = ""

    def __str__(self) -> str:
        text = f"{self.matched} modules, keys {self.style}"
        if self.unmatched:
            shown = ", ".join(self.unmatched[:10]) + (" ..." if len(self.unmatched) > 10 else "")
            text += f"; {len(self.unmatched)} keys met no module: {shown}"
        return text


def apply_lora(
    module: nn.Module, path: str | Path, scale: float = 1.0, *, name: str | None = None, mode: str = "adapter"
) -> LoraReport:
    """Apply the LoRA at `path` (a safetensors file, or a peft or diffusers folder) to `module`, times `scale`.

    adapter: through peft, beside the weights, several adding up; also for fp8 Linears. merge: W + scale * alpha / r * up @
    down, computed in float32. name: of the adapter; by default the file's. Raises CheckpointError where no key matches.
    """
    if mode not in MODES:
        raise ConfigError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}.")
    if not math.isfinite(scale):
        raise ConfigError(f"LoRA scale: expected a finite number, found {scale}.")
    path = Path(path)
    linears = {key: (layer.in_features, layer.out_features) for key, layer in find_linears(module).items()}
    state = read_state(path)
    with naming(path):
        found = normalise(state, linears, _stated(path))
    if not found.pairs:
        raise CheckpointError(
            f"{path}: expected a LoRA for this model, found no key that meets a module: {_first(list(state))}. The model's "
            f"modules are called {_first(list(linears))}. The LoRA is of another model, or is a LoRA of the text encoder."
        )
    if mode == "merge":
        _merge(module, found.pairs, scale, path)
        adapter = ""
    else:
        adapter = _add_adapter(module, found, scale, name or path.stem)
    report = LoraReport(len(found.pairs), tuple(found.pairs), found.unmatched, found.style, adapter)
    logger.log(logging.WARNING if report.unmatched else logging.INFO, "LoRA %s (%s, scale %g): %s", path, mode, scale, report)
    return report


def merge_lora(module: nn.Module, path: str | Path, scale: float = 1.0) -> LoraReport:
    """`apply_lora` with mode="merge"."""
    return apply_lora(module, path, scale, mode="merge")


def find_linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The Linears below `module` by name; one that already has adapters is found under its own name, its base returned."""
    found: dict[str, nn.Linear] = {}
    wrapped = ""  # the last Linear with adapters; what lies below it follows at once
    for name, child in module.named_modules():
        if wrapped and name.startswith(wrapped):
            continue
        base = getattr(child, "base_layer", None)
        if isinstance(base, nn.Linear):
            found[name] = base
            wrapped = f"{name}."
        elif isinstance(child, nn.Linear):
            found[name] = child
    return found


@torch.no_grad()
def _merge(module: nn.Module, pairs: Mapping[str, Pair], scale: float, path: Path) -> None:
    linears = find_linears(module)
    stored = [name for name in pairs if isinstance(linears[name], Fp8Linear) or linears[name].weight.dtype in FP8_DTYPES]
    if stored:  # before anything is changed
        raise ConfigError(
            f"{path}: a LoRA cannot be merged into fp8 weights ({stored[0]} and {len(stored) - 1} more) without losing it "
            "to rounding. Apply it as an adapter, or load the weights in full."
        )
    for name, pair in pairs.items():
        weight = linears[name].weight
        down, up = (half.to(weight.device, torch.float32) for half in (pair.down, pair.up))
        weight.copy_(weight.to(torch.float32) + scale * pair.gain * (up @ down))


def _add_adapter(module: nn.Module, found: Normalised, scale: float, name: str) -> str:
    """Inject one peft adapter that holds every pair, beside those that are active already; returns its name."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    active = _active_adapters(module)
    name = _free_name(name, getattr(module, "peft_config", {}))
    # One rank for all: shorter pairs are filled with zeros. peft's patterns by name would cost one regular expression per
    # pair of modules, and one set of target names by suffix would catch `proj_out` in every block.
    rank = max(pair.down.shape[0] for pair in found.pairs.values())
    targets = "|".join(re.escape(module_name) for module_name in found.pairs)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=f"(?:{targets})", init_lora_weights=False, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        if hasattr(module, "add_adapter"):
            module.add_adapter(config, adapter_name=name)  # diffusers: its switches (disable_adapters, ...) then know of it
        else:
            inject_adapter_in_model(config, module, adapter_name=name)
    dtype = _computing_dtype(module)
    for module_name, pair in found.pairs.items():
        layer = module.get_submodule(module_name)
        weight = layer.get_base_layer().weight
        kind = dtype if weight.dtype in FP8_DTYPES else weight.dtype
        for half, tensor in ((layer.lora_A, _filled(pair.down, rank, 0)), (layer.lora_B, _filled(pair.up, rank, 1))):
            half[name].weight = nn.Parameter(tensor.to(weight.device, kind, copy=True), requires_grad=False)
        layer.lora_alpha[name] = pair.gain * rank
        layer.set_scale(name, scale)
    for layer in module.modules():
        if isinstance(layer, LoraLayer):
            layer.set_adapter([*active, name])
            for half in (layer.lora_A, layer.lora_B):
                half.requires_grad_(False)
            layer.train(module.training)
    return name


def _active_adapters(module: nn.Module) -> list[str]:
    active: dict[str, None] = {}
    for layer in module.modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "active_adapters"):
            active.update(dict.fromkeys(layer.active_adapters))
    return list(active)


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    base = re.sub(r"\W", "_", name) or "lora"  # the name becomes a key of module dictionaries, which allow no dots
    return next(one for i in range(1, len(taken) + 2) if (one := base if i == 1 else f"{base}_{i}") not in taken)


def _filled(matrix: torch.Tensor, rank: int, axis: int) -> torch.Tensor:
    """The matrix with zeros appended along `axis` up to `rank`."""
    short = rank - matrix.shape[axis]
    if not short:
        return matrix
    shape = list(matrix.shape)
    shape[axis] = short
    return torch.cat([matrix, matrix.new_zeros(shape)], dim=axis)


def _computing_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the weights that are not stored low-bit."""
    dtypes = (p.dtype for p in module.parameters() if p.dtype.is_floating_point and p.dtype not in FP8_DTYPES)
    return next(dtypes, torch.float32)


def _stated(path: Path) -> Stated | None:
    """The alpha that a peft configuration beside the file, or diffusers' metadata inside it, states. Raises
    CheckpointError on adapters that are no plain LoRA."""
    folder = path if path.is_dir() else path.parent
    file = folder / "adapter_config.json"
    if file.is_file() and (path.is_dir() or path.stem == "adapter_model"):
        config, source = read_json(file), str(file)
    else:
        raw = read_metadata(path).get(DIFFUSERS_METADATA)
        if not raw:
            return None
        try:
            config = {key.removeprefix("transformer."): value for key, value in json.loads(raw).items()}
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{path}: expected `{DIFFUSERS_METADATA}` to be JSON, found {raw[:80]!r}.") from error
        source = f"{path} ({DIFFUSERS_METADATA})"
    kind = str(config.get("peft_type") or "LORA").rpartition(".")[2]
    if kind != "LORA" or config.get("use_dora"):
        found = "DoRA" if config.get("use_dora") else kind
        raise CheckpointError(
            f"{source}: expected a LoRA, found {found}. Merge it into the weights with the tool that made it."
        )
    if config.get("lora_alpha") is None:
        return None
    return Stated(config["lora_alpha"], bool(config.get("use_rslora")), config.get("alpha_pattern") or {})


def _first(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")
