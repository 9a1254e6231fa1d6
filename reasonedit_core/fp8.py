"""Low-bit weights: reading the forms in the wild, and keeping fp8 at run time.

Four forms are met: plain float8 without scales; ComfyUI's older `scaled_fp8` with `.scale_weight` (and `.scale_input`);
its newer `.weight_scale` with a `.comfy_quant` note per layer; and int8 with rotated weights (ConvRot), which is refused.
`canonical` brings the first three to one: `<layer>.weight` and, where there is one, `<layer>.weight_scale` in float32,
with weight = stored * scale. Only weights are kept low-bit; scales of activations are dropped, the sums run in `dtype`.
Products in 8 bits are a choice of their own (`compute_in_fp8`), which takes its scales from the activations as they come.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import nn

from .errors import CheckpointError
from .kernels import devices, scaled

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
LOW_BIT = (*FP8_DTYPES, torch.int8, torch.uint8)
FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2, "int8_tensorwise": torch.int8}
DIT_SKIP = (
    "x_embedder",
    "context_embedder",
    "time_embed",
    "vec_embed",
    "connector",
    "text_token_mapping",
    "img_in",
    "txt_in",
    "time_text_embed",
    "norm_out",
    "proj_out",
)
"""The first and last layers of both DiTs: small, and everything passes through them, so they are not quantised by us."""


def canonical(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state with every known low-bit form brought to `.weight` + `.weight_scale` (float32, shape () or (rows,)).

    Raises CheckpointError for forms that cannot be dequantised here, naming the form and a layer.
    """
    notes = {key.removesuffix(".comfy_quant"): _note(key, value) for key, value in state.items() if _is_note(key)}
    result: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        layer, _, leaf = key.rpartition(".")
        if _is_note(key) or leaf in ("scaled_fp8", "scale_input", "input_scale"):
            continue
        if leaf in ("weight_scale_2", "pre_quant_scale"):
            raise CheckpointError(_refusal(layer, f"weights with a second scale ({leaf}), such as nvfp4"))
        if leaf in ("scale_weight", "weight_scale"):
            result[f"{layer}.weight_scale"] = _scale(layer, value, state.get(f"{layer}.weight"))
        elif leaf == "weight" and value.dtype in (torch.int8, torch.uint8):
            result[key] = _stored(layer, value, notes.get(layer))
        else:
            result[key] = value
        if leaf == "weight" and layer in notes:
            _check_note(layer, notes[layer])
    return result


def dequantize(state: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The state with every low-bit weight as `dtype` and no scales left; other tensors are handed on untouched."""
    plain = canonical(state)
    result = {}
    for key, value in plain.items():
        if key.endswith(".weight_scale"):
            continue
        scale = plain.get(f"{key}_scale") if key.endswith(".weight") else None
        low_bit = value.dtype in LOW_BIT if key.endswith(".weight") else value.dtype in FP8_DTYPES
        result[key] = dequantize_tensor(value, scale, dtype) if low_bit or scale is not None else value
    return result


def dequantize_tensor(weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """weight (rows, ...) low-bit, scale () or (rows,) float32 or None -> (rows, ...) in `dtype`, one rounding in all."""
    if scale is None:
        return weight.to(dtype)
    scale = scale.to(weight.device, torch.float32)
    scale = scale.reshape(-1, *[1] * (weight.ndim - 1)) if scale.ndim else scale
    return (weight.to(torch.float32) * scale).to(dtype)


def quantize_tensor(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (any shape) -> (float8_e4m3fn of that shape, float32 scale of shape ()) with weight ~ stored * scale.

    The scale is a power of two: scaling is then exact, so only the rounding to three mantissa bits is lost, and weights
    that were float8 before come back as they were.
    """
    weight = weight if weight.dtype in (torch.float32, torch.bfloat16) else weight.to(torch.float32)
    ends = torch.stack(torch.aminmax(weight)) if weight.numel() else torch.zeros(2)
    peak = ends.to(torch.float32).abs().max()
    if not torch.isfinite(peak):
        raise CheckpointError("expected finite weights to quantise to fp8, found NaN or infinity: the file is damaged.")
    mantissa, exponent = torch.frexp(peak / FP8_MAX)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    scale = torch.ldexp(torch.ones_like(peak), exponent) if peak > 0 else torch.ones_like(peak)
    return (weight / scale).to(FP8), scale


class Fp8Linear(nn.Linear):
    """A Linear whose weight is stored as float8_e4m3fn and brought to the input's dtype in the forward pass.

    weight (out, in) float8_e4m3fn; weight_scale () or (out,) float32; bias (out,) or None in the computing dtype.
    The result equals that of a Linear with the dequantised weight bit for bit; half the memory of bf16 is the point.
    `.to(dtype)` changes the bias alone.

    computing: multiply in 8 bits where the device can (`kernels.scaled`), which rounds the activations too; else, and where
    gradients are wanted, the dequantised form, with the reason in the log.
    """

    def __init__(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, *, computing: bool = False
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would allocate a weight in the default dtype
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("weight_scale", weight_scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.computing = computing

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, computing: bool = False) -> Fp8Linear:
        """A quantised copy of `linear`; on the meta device only the shapes."""
        if linear.weight.is_meta:
            empty = torch.empty(linear.weight.shape, dtype=FP8, device="meta")
            return cls(empty, torch.ones((), device="meta"), linear.bias, computing=computing)
        return cls(*quantize_tensor(linear.weight.detach()), linear.bias, computing=computing)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out) in the dtype of x."""
        if self.computing:
            reason = scaled.unable(x, self.weight)
            if reason is None:
                return scaled.product(x, self.weight, self.weight_scale, self.bias)
            if not torch.compiler.is_compiling():
                devices.log_once(
                    f"fp8 weights on {x.device.type} are brought to {x.dtype} and not multiplied in 8 bits: {reason}"
                )
        weight = dequantize_tensor(self.weight, self.weight_scale, x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Fp8Linear:
        # Moves follow, casts do not: `module.to(torch.bfloat16)` must not blow the stored weight up.
        stored = (self.weight, self.weight_scale)

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            kept = any(tensor is one for one in stored) and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if kept else moved

        return super()._apply(move, recurse)


def quantize_linears(
    module: nn.Module, *, skip: Collection[str] = DIT_SKIP, only: Collection[str] | None = None
) -> tuple[str, ...]:
    """Replace the Linears below `module` by Fp8Linear; returns their names.

    skip: names (a whole branch each) or shell patterns left alone. only: exactly these names, whatever `skip` says.
    Norms, biases, embeddings and convolutions are no Linears and stay. A meta module gets meta layers, ready to be loaded.
    """
    chosen = [
        name
        for name, child in module.named_modules()
        if type(child) is nn.Linear and (name in only if only is not None else not is_skipped(name, skip))
    ]
    for name in chosen:
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, leaf, Fp8Linear.from_linear(getattr(owner, leaf)))
    return tuple(chosen)


def compute_in_fp8(module: nn.Module) -> int:
    """Let the Fp8Linears below `module` multiply in 8 bits where their device can; returns how many there are."""
    layers = [child for child in module.modules() if isinstance(child, Fp8Linear)]
    for layer in layers:
        layer.computing = True
    return len(layers)


def module_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def is_skipped(name: str, skip: Collection[str]) -> bool:
    """Whether `name` is one of `skip`, lies below one, or matches one as a shell pattern."""
    return any(name == one or name.startswith(f"{one}.") or fnmatchcase(name, one) for one in skip)


def _is_note(key: str) -> bool:
    return key.endswith(".comfy_quant")


def _note(key: str, value: torch.Tensor) -> dict:
    try:
        note = json.loads(bytes(value.flatten().tolist()))
        note["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{key}: expected a JSON note with a `format`, found something else ({error}).") from error
    return note


def _check_note(layer: str, note: Mapping) -> None:
    if note.get("convrot"):
        raise CheckpointError(_refusal(layer, f"{note['format']} with rotated weights (ConvRot)"))
    if note["format"] not in FORMATS:
        raise CheckpointError(_refusal(layer, str(note["format"])))


def _stored(layer: str, weight: torch.Tensor, note: Mapping | None) -> torch.Tensor:
    if note is None:
        raise CheckpointError(_refusal(layer, f"{str(weight.dtype).removeprefix('torch.')} weights without a note on it"))
    _check_note(layer, note)
    dtype = FORMATS[note["format"]]
    # Some writers keep float8 in a uint8 container.
    return weight if weight.dtype == dtype else weight.view(dtype)


def _scale(layer: str, scale: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    if scale.dtype == torch.uint8 or scale.dtype in FP8_DTYPES:
        raise CheckpointError(_refusal(layer, "block-wise scales in 8 bits, such as mxfp8 or nvfp4"))
    rows = scale.numel() if weight is None else weight.shape[0]
    if scale.numel() == 1:
        return scale.reshape(()).to(torch.float32)
    if scale.numel() == rows and scale.shape[0] == rows:
        return scale.reshape(rows).to(torch.float32)
    raise CheckpointError(_refusal(layer, f"block-wise scales of shape {tuple(scale.shape)}"))


def _refusal(layer: str, form: str) -> str:
    return (
        f"{layer}: expected float8 (e4m3fn or e5m2) or plain int8 weights with one scale a tensor or a row, found {form}. "
        "Only ComfyUI's own kernels read this form: use the bf16, fp8_e4m3fn or fp8_scaled file of the same model, or load "
        "this one with ComfyUI's nodes."
    )
