"""Weights into modules: read, rename, dequantise, check, assign; with a report of what did not match.

Modules are built without memory and the tensors are assigned one by one, so the peak is one copy of the weights. The source
file is only memory-mapped while this goes on, and is not needed afterwards.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import fp8, keymaps, sizes
from .detect import QWEN, STEP1X, ZERO_COND_T, Layout, detect, detect_keys, find_component, pipeline_variant, step1x_variant
from .errors import CheckpointError, ConfigError
from .fp8 import dequantize, dequantize_tensor, quantize_tensor
from .weightfiles import find_prefix, naming, read_json, read_shapes, read_state, strip_prefix

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage, QwenImageTransformer2DModel

    from .models.step1x_transformer import Step1XEditTransformer2DModel

__all__ = [
    "Layout",
    "LoadReport",
    "dequantize",
    "detect",
    "detect_keys",
    "find_component",
    "load_flux_vae",
    "load_into",
    "load_qwen_transformer",
    "load_qwen_vae",
    "load_step1x_transformer",
    "read_shapes",
    "read_state",
    "strip_prefix",
]

logger = logging.getLogger(__name__)

OnBytes = Callable[[int, int], None]
"""(bytes done, bytes in all): progress of a load."""

STEP1X_VARIANTS = ("v1.0", "v1.1", "v1.2")
WEIGHTS_DTYPES = ("auto", "fp8", "fp8-compute", "full")
_MARKERS = ("transformer_blocks.0.attn.norm_q.weight", "double_blocks.0.img_attn.qkv.weight")


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How a state met a module. matched: number of keys; the others are key names (wrong_shape with both shapes); notes:
    what was decided on the way; bytes: of the module as loaded."""

    what: str
    matched: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong_shape: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    bytes: int = 0

    def __str__(self) -> str:
        parts = [f"{self.what}: {self.matched} tensors, {self.bytes / 2**20:,.1f} MiB", *self.notes]
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} keys not used: {_some(self.unexpected)}")
        return "; ".join(parts)


def load_step1x_transformer(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    variant: str = "auto",
    weights_dtype: str = "auto",
    config: Mapping[str, Any] | None = None,
    on_bytes: OnBytes | None = None,
) -> tuple[Step1XEditTransformer2DModel, str, LoadReport]:
    """The Step1X-Edit DiT of a single file (original or diffusers names) or a folder -> (module, variant, report).

    variant: v1.0 | v1.1 | v1.2, or auto: by keys (`connector.scale_factor` -> v1.0, `text_token_mapping` -> v1.2), else by
    the class in model_index.json, else v1.1. weights_dtype: see `build`. config: in place of config.json and shapes.
    """
    from .models.step1x_transformer import Step1XEditTransformer2DModel

    if variant != "auto" and variant not in STEP1X_VARIANTS:
        raise ConfigError(f"variant: expected auto or one of {', '.join(STEP1X_VARIANTS)}, found {variant!r}.")
    place = find_component(path, "transformer")
    with naming(place):
        state = _transformer_state(place, STEP1X)
        notes = []
        if variant == "auto":
            variant = step1x_variant(state)
            if variant == "v1.1" and (stated := pipeline_variant(place)) in STEP1X_VARIANTS:
                variant = stated
            elif variant == "v1.1":
                notes.append("variant v1.1 by its keys (v1.2 without text mapping looks the same: name the variant if it is)")
        if keymaps.SCALE_FACTOR in state:
            notes.append("connector.scale_factor folded")
        if "double_blocks.0.img_attn.qkv.weight" in state:
            state = keymaps.step1x_from_original(state)
        else:
            state = keymaps.fold_scale_factor(state)
        shapes = _shapes(state)
        fields = dict(config or _config_of(place) or sizes.step1x_config(shapes))
        fields["enable_text_token_mapping"] = "text_token_mapping.weight" in shapes  # by keys, never by a name
        module, report = build(
            Step1XEditTransformer2DModel,
            fields,
            state,
            dtype=dtype,
            device=device,
            weights_dtype=weights_dtype,
            what=f"Step1X-Edit {variant} transformer",
            notes=notes,
            on_bytes=on_bytes,
        )
    return module, variant, report


def load_qwen_transformer(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    weights_dtype: str = "auto",
    config: Mapping[str, Any] | None = None,
    on_bytes: OnBytes | None = None,
) -> tuple[QwenImageTransformer2DModel, LoadReport]:
    """The Qwen-Image-Edit DiT of a ComfyUI single file or a diffusers folder -> (module, report).

    `zero_cond_t` (2511) comes from config.json or from ComfyUI's marker buffer. weights_dtype: see `build`.
    """
    from diffusers import QwenImageTransformer2DModel

    place = find_component(path, "transformer")
    with naming(place):
        state = _transformer_state(place, QWEN)
        marked = state.pop(ZERO_COND_T, None) is not None
        fields = dict(config or _config_of(place) or sizes.qwen_transformer_config(_shapes(state)))
        fields["zero_cond_t"] = bool(fields.get("zero_cond_t")) or marked
        return build(
            QwenImageTransformer2DModel,
            fields,
            state,
            dtype=dtype,
            device=device,
            weights_dtype=weights_dtype,
            what="Qwen-Image-Edit transformer",
            notes=["zero_cond_t (2511)"] if fields["zero_cond_t"] else [],
            on_bytes=on_bytes,
        )


def load_flux_vae(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    config: Mapping[str, Any] | None = None,
) -> tuple[AutoencoderKL, LoadReport]:
    """The FLUX autoencoder of a diffusers folder or a single file (its own layout or diffusers') -> (vae, report)."""
    from diffusers import AutoencoderKL

    place = find_component(path, "vae")
    with naming(place):
        state = dequantize(_vae_state(place, "bfl", "FLUX autoencoder"), dtype)
        if "encoder.down.0.block.0.conv1.weight" in state:
            state = keymaps.flux_vae_from_bfl(state)
        state = keymaps.flux_vae_modern(state)
        fields = dict(config or _config_of(place) or sizes.flux_vae_config(_shapes(state)))
        return build(AutoencoderKL, fields, state, dtype=dtype, device=device, what="FLUX autoencoder")


def load_qwen_vae(
    path: str | Path,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    config: Mapping[str, Any] | None = None,
) -> tuple[AutoencoderKLQwenImage, LoadReport]:
    """The Qwen-Image VAE of a diffusers folder or a single file (Wan or diffusers names) -> (vae, report)."""
    from diffusers import AutoencoderKLQwenImage

    place = find_component(path, "vae")
    with naming(place):
        state = dequantize(_vae_state(place, "wan", "Qwen-Image VAE"), dtype)
        if "encoder.downsamples.0.residual.0.gamma" in state:
            state = keymaps.qwen_vae_from_wan(state)
        fields = dict(config or _config_of(place) or sizes.qwen_vae_config(_shapes(state)))
        return build(AutoencoderKLQwenImage, fields, state, dtype=dtype, device=device, what="Qwen-Image VAE")


def build(
    cls: type,
    config: Mapping[str, Any],
    state: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    weights_dtype: str = "full",
    what: str = "",
    notes: Collection[str] = (),
    on_bytes: OnBytes | None = None,
) -> tuple[nn.Module, LoadReport]:
    """A diffusers module of class `cls`, filled from `state` (canonical keys; emptied on the way), in eval mode.

    weights_dtype: `full` brings every weight to `dtype`; `fp8` keeps the Linears of the blocks as float8_e4m3fn (quantising
    them where the file has not), and `fp8-compute` also multiplies in 8 bits where the device can (`fp8.Fp8Linear`); `auto`
    keeps the file's fp8 when every Linear in it is float8_e4m3fn, else is `full`.
    """
    from accelerate import init_empty_weights

    if weights_dtype not in WEIGHTS_DTYPES:
        raise ConfigError(f"weights_dtype: expected one of {', '.join(WEIGHTS_DTYPES)}, found {weights_dtype!r}.")
    known = set(inspect.signature(cls.__init__).parameters)
    unknown = sorted(key for key in config if key not in known and not key.startswith("_"))
    notes = [*notes, *([f"config fields not known here: {', '.join(unknown)}"] if unknown else [])]
    # Only parameters are left without memory: the class computes its buffers and tables itself.
    with init_empty_weights(include_buffers=False):
        module = cls.from_config({key: value for key, value in config.items() if key in known})
    kept = _fp8_linears(module, state, weights_dtype)
    if kept:
        fp8.quantize_linears(module, only=kept)
        computing = weights_dtype == "fp8-compute" and fp8.compute_in_fp8(module)
        notes.append(f"{len(kept)} Linears kept as fp8" + (", multiplied in 8 bits where the device can" if computing else ""))
    elif any(value.dtype in fp8.LOW_BIT for value in state.values()):
        notes.append(f"low-bit weights brought to {str(dtype).removeprefix('torch.')} (weights_dtype fp8 keeps them)")
    report = load_into(module, state, dtype=dtype, device=device, what=what, notes=notes, on_bytes=on_bytes)
    return module.eval(), report


def load_into(
    module: nn.Module,
    state: dict[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    what: str = "weights",
    notes: Collection[str] = (),
    strict: bool = True,
    on_bytes: OnBytes | None = None,
) -> LoadReport:
    """Assign `state` to `module` (its parameters may be on the meta device), each tensor copied to `device` and `dtype`.

    state: module keys, low-bit weights with their `.weight_scale` (see `fp8.canonical`); it is emptied on the way, so that
    no second copy lives. strict: raise CheckpointError on missing keys or wrong shapes. Unexpected keys are logged.
    """
    expected = module.state_dict()
    wrong = tuple(
        f"{key}: expected {tuple(expected[key].shape)}, found {tuple(value.shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape and not key.endswith(".weight_scale")
    )
    scales = {f"{key}_scale" for key in expected if key.endswith(".weight")}
    missing = tuple(key for key in expected if key not in state and key not in scales)
    unexpected = tuple(key for key in state if key not in expected and key not in scales)
    if strict and (missing or wrong):
        raise CheckpointError(_mismatch(what, missing, wrong, unexpected, len(expected)))

    total = sum(value.numel() * value.element_size() for value in state.values())
    ready: dict[str, torch.Tensor] = {}
    done = 0
    for key in [key for key in expected if key in state and key not in scales]:
        value, scale = state.pop(key), state.pop(f"{key}_scale", None) if key.endswith(".weight") else None
        done += value.numel() * value.element_size()
        if value.shape == expected[key].shape:
            ready.update(_prepared(key, value, scale, expected[key], dtype, device))
        if on_bytes:
            on_bytes(done, total)
    _assign_scales(module, ready)
    module.load_state_dict(ready, strict=False, assign=True)
    module.to(device)  # what the file does not hold: tables and buffers
    matched = sum(key not in scales for key in ready)
    report = LoadReport(what, matched, missing, unexpected, wrong, tuple(notes), fp8.module_bytes(module))
    logger.info("loaded %s", report)
    return report


def _prepared(
    key: str,
    value: torch.Tensor,
    scale: torch.Tensor | None,
    expected: torch.Tensor,
    dtype: torch.dtype,
    device: str | torch.device,
) -> dict[str, torch.Tensor]:
    """The tensor, and for a layer that stays fp8 its scale, owned (not mapped) and where they belong."""
    value = value.to(device)
    if expected.dtype == fp8.FP8:
        if value.dtype != fp8.FP8:
            full = value if scale is None and value.dtype not in fp8.LOW_BIT else dequantize_tensor(value, scale, torch.float32)
            value, scale = quantize_tensor(full)
        else:
            value = value.clone()
        scale = torch.ones((), dtype=torch.float32) if scale is None else scale
        return {key: value, f"{key}_scale": scale.to(device, torch.float32, copy=True)}
    if scale is not None:
        return {key: dequantize_tensor(value, scale, dtype)}
    target = dtype if value.dtype.is_floating_point or value.dtype in fp8.LOW_BIT else value.dtype
    return {key: value.to(target, copy=True)}


def _assign_scales(module: nn.Module, ready: Mapping[str, torch.Tensor]) -> None:
    """A file's scale may be one number or one per row; the layer's buffer takes the file's form before it is filled."""
    for name, layer in module.named_modules():
        if isinstance(layer, fp8.Fp8Linear):
            layer.weight_scale = ready[f"{name}.weight_scale"]


def _fp8_linears(module: nn.Module, state: Mapping[str, torch.Tensor], weights_dtype: str) -> set[str]:
    """Names of the Linears that stay fp8 at run time."""
    if weights_dtype == "full":
        return set()
    linears = {name for name, child in module.named_modules() if type(child) is nn.Linear}
    stored = {name for name in linears if f"{name}.weight" in state and state[f"{name}.weight"].dtype == fp8.FP8}
    if weights_dtype in ("fp8", "fp8-compute"):
        return stored | {name for name in linears if not fp8.is_skipped(name, fp8.DIT_SKIP)}
    return stored if stored == linears else set()


def _transformer_state(place: Path, system: str) -> dict[str, torch.Tensor]:
    state = read_state(place)
    layout = detect_keys(state, place)
    if layout.kind != "transformer" or layout.system != system:
        name = "Step1X-Edit" if system == STEP1X else "Qwen-Image-Edit"
        raise CheckpointError(
            f"{place}: expected the transformer of {name}, found a {layout.kind} of {layout.system or 'either system'}. "
            "Name the transformer's file or folder, or the other system."
        )
    marker = next(one for one in _MARKERS if find_prefix(state, one) is not None)
    return fp8.canonical(strip_prefix(state, marker))


def _vae_state(place: Path, names: str, what: str) -> dict[str, torch.Tensor]:
    state = read_state(place)
    layout = detect_keys(state, place)
    system = STEP1X if names == "bfl" else QWEN
    if layout.kind != "vae" or layout.system != system:
        raise CheckpointError(
            f"{place}: expected the {what}, found a {layout.kind} of {layout.system or 'either system'}. Name its file."
        )
    return strip_prefix(state, "decoder.conv1.weight" if layout.names == "wan" else "decoder.conv_in.weight")


def _config_of(place: Path) -> dict[str, Any] | None:
    file = place / "config.json"
    return read_json(file) if place.is_dir() and file.is_file() else None


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def _mismatch(what: str, missing: Collection[str], wrong: Collection[str], unexpected: Collection[str], n: int) -> str:
    faults = []
    if missing:
        faults.append(f"{len(missing)} keys missing: {_some(missing)}")
    if wrong:
        faults.append(f"{len(wrong)} of the wrong shape: {_some(wrong)}")
    if unexpected:
        faults.append(f"{len(unexpected)} keys of no use: {_some(unexpected, 3)}")
    return (
        f"{what}: expected {n} tensors, found {'; '.join(faults)}. The file is of another model or version, or not whole: "
        "compare its config.json and download it again."
    )


def _some(names: Collection[str], limit: int = 10) -> str:
    listed = list(names)[:limit]
    return ", ".join(listed) + (f" and {len(names) - limit} more" if len(names) > limit else "")
