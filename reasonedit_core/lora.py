"""LoRAs onto a DiT or an MLLM: as peft adapters beside the weights, or merged into them. Never partial in silence."""

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
from .fp8 import FP8_DTYPES, Fp8Linear, dequantize_tensor
from .lora_keys import Normalised, Pair, Stated, normalise
from .weightfiles import naming, read_json, read_metadata, read_state

logger = logging.getLogger(__name__)

MODES = ("adapter", "merge")
DIFFUSERS_METADATA = "lora_adapter_metadata"
DORA_NORM = "reasonedit.dora_norm"
"""Metadata of our own files: `weight` where `dora_scale` is to be divided by |W|, as ComfyUI does, not by |W + D|."""
WHOLE_FILE = "whole.safetensors"
"""Beside the adapter in a peft folder: parameters that were trained whole, as `<name>.set_weight`."""


@dataclass(frozen=True, slots=True)
class LoraReport:
    """matched: modules that got a LoRA, named in modules; unmatched: keys of the file that met no module; style: how its
    keys are written; name: of the adapter, "" when merged; whole: parameters that were replaced."""

    matched: int
    modules: tuple[str, ...]
    unmatched: tuple[str, ...]
    style: str
    name: str = ""
    whole: tuple[str, ...] = ()

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

    A DoRA moves the weight by scale * (DoRA's weight - W), W being what the LoRAs before it made of the weight; as an adapter
    its factors per row go into the weights themselves and the rest beside them. Parameters that the file holds whole move by
    scale * (theirs - ours).
    """
    return apply_lora_to({"": module}, path, scale, name=name, mode=mode)[""]


def apply_lora_to(
    modules: Mapping[str, nn.Module], path: str | Path, scale: float = 1.0, *, name: str | None = None, mode: str = "adapter"
) -> dict[str, LoraReport]:
    """`apply_lora` to whichever of several modules the keys belong to: {name of the module: report}, at least one.

    unmatched in each report: keys that met a module of none.
    """
    if mode not in MODES:
        raise ConfigError(f"mode: expected one of {', '.join(MODES)}, found {mode!r}.")
    if not math.isfinite(scale):
        raise ConfigError(f"LoRA scale: expected a finite number, found {scale}.")
    path = Path(path)
    state, stated, bare = read_lora(path)
    found: dict[str, Normalised] = {}
    names: list[str] = []
    for key, module in modules.items():
        linears = {name: (layer.in_features, layer.out_features) for name, layer in find_linears(module).items()}
        names += linears
        shapes = {name: tuple(tensor.shape) for name, tensor in find_parameters(module).items()}
        with naming(path):
            sorted_keys = normalise(state, linears, stated, shapes=shapes, bare=bare)
            if sorted_keys.pairs or sorted_keys.whole:
                found[key] = sorted_keys
                _check(module, sorted_keys, mode, path)
    if not found:
        raise CheckpointError(
            f"{path}: expected a LoRA for this model, found no key that meets a module: {_first(list(state))}. The model's "
            f"modules are called {_first(names)}. The LoRA is of another model, or of a part (DiT, MLLM) that is not loaded "
            "here."
        )
    unmatched = tuple(key for key in state if all(key in one.unmatched for one in found.values()))
    reports = {}
    for key, one in found.items():
        adapter = _apply(modules[key], one, scale, mode, name or path.stem)
        reports[key] = LoraReport(len(one.pairs), tuple(one.pairs), unmatched, one.style, adapter, tuple(one.whole))
    for key, report in reports.items():
        what = f"{path} onto {key}" if key else str(path)
        level = logging.WARNING if unmatched and report is next(iter(reports.values())) else logging.INFO
        logger.log(level, "LoRA %s (%s, scale %g): %s", what, mode, scale, report)
    return reports


def merge_lora(module: nn.Module, path: str | Path, scale: float = 1.0) -> LoraReport:
    """`apply_lora` with mode="merge"."""
    return apply_lora(module, path, scale, mode="merge")


def read_lora(path: Path) -> tuple[dict[str, torch.Tensor], Stated | None, bool]:
    """(tensors, stated alpha, whether `dora_scale` is over |W|) of a file or a peft or diffusers folder."""
    folder = path if path.is_dir() else path.parent
    beside = folder / WHOLE_FILE
    is_peft = path.is_dir() or path.stem == "adapter_model"
    if is_peft and beside.is_file() and not (folder / "adapter_config.json").is_file():
        return read_state(beside), None, False
    state = read_state(path)
    if is_peft and beside.is_file():
        state |= read_state(beside)
    with naming(path):
        stated = _stated(path, any(".lora_magnitude_vector" in key or key.endswith(".dora_scale") for key in state))
    return state, stated, read_metadata(path).get(DORA_NORM) == "weight"


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


def find_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `module` by their names without adapters, and without those of adapters."""
    named = module.named_parameters(remove_duplicate=False)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in named if ".lora_" not in name}


def _check(module: nn.Module, found: Normalised, mode: str, path: Path) -> None:
    """ConfigError for what fp8 weights cannot take, before anything is changed."""
    linears, parameters = find_linears(module), find_parameters(module)
    low = {name for name in found.pairs if _is_low(linears[name])}
    if mode == "merge" and low:
        raise ConfigError(
            f"{path}: a LoRA cannot be merged into fp8 weights ({min(low)} and {len(low) - 1} more) without losing it to "
            "rounding. Apply it as an adapter, or load the weights in full."
        )
    columns = [name for name in low if (m := found.pairs[name].magnitude) is not None and m.shape[0] == 1]
    whole = [name for name in found.whole if parameters[name].dtype in FP8_DTYPES]
    if columns or whole:
        what = "a DoRA over columns" if columns else "a whole tensor"
        name = (columns or whole)[0]
        raise ConfigError(f"{path}: {what} cannot be applied to fp8 weights ({name}). Load the weights in full.")


@torch.no_grad()
def _apply(module: nn.Module, found: Normalised, scale: float, mode: str, name: str) -> str:
    """Apply what was sorted onto `module`; returns the adapter's name, "" where none was made."""
    parameters = find_parameters(module)
    for key, tensor in found.whole.items():
        own = parameters[key]
        theirs = tensor.to(own.device, torch.float32)
        own.copy_(theirs if scale == 1 else torch.lerp(own.to(torch.float32), theirs, scale))
    if mode == "merge":
        linears = find_linears(module)
        for key, pair in found.pairs.items():
            linears[key].weight.copy_(merged_weight(linears[key].weight, pair, scale))
        return ""
    pairs = {key: _split_off(module.get_submodule(key), pair, scale) for key, pair in found.pairs.items()}
    return _add_adapter(module, pairs, scale, name) if pairs else ""


def merged_weight(weight: torch.Tensor, pair: Pair, scale: float = 1.0) -> torch.Tensor:
    """(out, in) float32: what a LoRA or DoRA makes of a weight (out, in) in any 16 or 32 bit type."""
    full = weight.to(torch.float32)
    down, up = (half.to(full) for half in (pair.down, pair.up))
    if pair.magnitude is None:
        return full + scale * pair.gain * (up @ down)
    factors = dora_factors(full, pair)
    return torch.lerp(full, factors * (full + pair.gain * (up @ down)), scale)


def dora_factors(weight: torch.Tensor, pair: Pair) -> torch.Tensor:
    """magnitude / norm of a DoRA, (out, 1) or (1, in) float32. weight (out, in) float32: what it was trained on."""
    bare, moved = dora_norms(weight, pair)
    rows = pair.magnitude.shape[1] == 1
    return pair.magnitude.to(weight) / (bare if pair.bare and rows else moved)


def dora_norms(weight: torch.Tensor, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
    """(|W|, |W + D|) over rows (out, 1) or columns (1, in), as the magnitude is."""
    axis = 1 if pair.magnitude.shape[1] == 1 else 0
    moved = weight + pair.gain * (pair.up.to(weight) @ pair.down.to(weight))
    return tuple(torch.linalg.vector_norm(one, dim=axis, keepdim=True) for one in (weight, moved))


def _split_off(layer: nn.Module, pair: Pair, scale: float) -> Pair:
    """The part of a DoRA that can stand beside the weights: its factors are brought into the layer's weight, and into the
    adapters that it has already."""
    if pair.magnitude is None:
        return pair
    base = getattr(layer, "base_layer", layer)
    weight = dequantize_tensor(base.weight, getattr(base, "weight_scale", None), torch.float32)
    for adapter in getattr(layer, "active_adapters", ()):
        weight = weight + layer.get_delta_weight(adapter).to(weight)
    factors = dora_factors(weight, pair)
    moves, rows = torch.lerp(torch.ones_like(factors), factors, scale), factors.shape[1] == 1
    if isinstance(base, Fp8Linear):
        base.weight_scale = base.weight_scale * moves[:, 0]
    else:
        base.weight.copy_(base.weight.to(torch.float32) * moves)
    for adapter in getattr(layer, "active_adapters", ()):
        half = (layer.lora_B if rows else layer.lora_A)[adapter].weight
        half.copy_(half.to(torch.float32) * moves)
    up = factors * pair.up.to(factors) if rows else pair.up
    down = pair.down if rows else pair.down.to(factors) * factors
    return Pair(down, up, pair.gain)


def _is_low(layer: nn.Linear) -> bool:
    return isinstance(layer, Fp8Linear) or layer.weight.dtype in FP8_DTYPES


def _add_adapter(module: nn.Module, pairs: Mapping[str, Pair], scale: float, name: str) -> str:
    """Inject one peft adapter that holds every pair, beside those that are active already; returns its name."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    active = _active_adapters(module)
    name = _free_name(name, getattr(module, "peft_config", {}))
    # One rank for all: shorter pairs are filled with zeros. peft's patterns by name would cost one regular expression per
    # pair of modules, and one set of target names by suffix would catch `proj_out` in every block.
    rank = max(pair.down.shape[0] for pair in pairs.values())
    targets = "|".join(re.escape(module_name) for module_name in pairs)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=f"(?:{targets})", init_lora_weights=False, lora_dropout=0.0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        if hasattr(module, "load_lora_adapter"):
            module.add_adapter(config, adapter_name=name)  # diffusers: its switches (disable_adapters, ...) then know of it
        else:
            inject_adapter_in_model(config, module, adapter_name=name)
    dtype = _computing_dtype(module)
    for module_name, pair in pairs.items():
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


def _stated(path: Path, has_magnitudes: bool) -> Stated | None:
    """The alpha that a peft configuration beside the file, or diffusers' metadata inside it, states. Raises
    CheckpointError on adapters that are no LoRA, and on a DoRA whose magnitudes are not there."""
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
    if kind != "LORA":
        raise CheckpointError(f"{source}: expected a LoRA, found {kind}. Merge it into the weights with the tool that made it.")
    if config.get("use_dora") and not has_magnitudes:
        raise CheckpointError(
            f"{source}: expected the magnitudes (lora_magnitude_vector, dora_scale) of the DoRA that it states, found none "
            "in the weights. Save them again with the tool that made them."
        )
    if config.get("lora_alpha") is None:
        return None
    return Stated(config["lora_alpha"], bool(config.get("use_rslora")), config.get("alpha_pattern") or {})


def _first(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")
