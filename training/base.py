"""The weights that a run started from, read from the disk by the names that they have in memory.

For exports that need them: merged checkpoints, and the norms of a DoRA. Nothing is loaded into modules; tensors are mapped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..reasonedit_core import fp8, keymaps
from ..reasonedit_core.detect import ZERO_COND_T
from ..reasonedit_core.errors import CheckpointError
from ..reasonedit_core.lora_keys import short_name
from ..reasonedit_core.mllm.load import rename_keys
from ..reasonedit_core.parts import Parts, assemble_parts, find_parts
from ..reasonedit_core.weightfiles import find_prefix, naming, read_shapes, read_state
from .adapters import Adapters
from .presets import DIT, MLLM

_MARKERS = ("transformer_blocks.0.attn.norm_q.weight", "double_blocks.0.img_attn.qkv.weight")


def find_base(adapters: Adapters) -> Parts:
    """Where the parts of the weights lie that were trained on. CheckpointError where they are gone."""
    if not adapters.pieces:
        return find_parts(adapters.base, adapters.system)
    return assemble_parts(adapters.base, **adapters.pieces)


def place_of(parts: Parts, part: str) -> Path:
    """The file or folder with the weights of a part."""
    if part == DIT:
        return parts.transformer
    inner = parts.mllm / "text_encoder"
    return inner if (inner / "config.json").is_file() else parts.mllm


def hub_name(name: str) -> str:
    """A name of the MLLM in memory -> that of its published files, which ComfyUI has as well."""
    short = short_name(name)
    return short if short.startswith(("visual.", "lm_head")) else f"model.{short}"


def names_in_file(keys: Mapping[str, object], part: str) -> dict[str, str] | None:
    """{key of a file: name in memory}, or None where the names in memory are not those of single keys (the original names
    of Step1X, whose weights are fused). Keys of other components, and those that name no parameter, are left out."""
    if part == MLLM:
        return dict(zip(keys, rename_keys(dict.fromkeys(keys)), strict=True))  # type: ignore[arg-type]
    marker = next((one for one in _MARKERS if find_prefix(keys, one) is not None), None)
    if marker != _MARKERS[0]:
        return None
    prefix = find_prefix(keys, marker) or ""
    kept = [key for key in keys if key.startswith(prefix) and key.removeprefix(prefix) != ZERO_COND_T]
    return {key: key.removeprefix(prefix) for key in kept}


def read_base(parts: Parts, part: str) -> dict[str, Tensor]:
    """{name in memory: tensor} of a whole part, in the dtype of the file; low-bit weights as bfloat16."""
    import torch

    place = place_of(parts, part)
    with naming(place):
        state = fp8.dequantize(read_state(place), torch.bfloat16)
        names = names_in_file(state, part)
        if names is not None:
            named = {names[key]: tensor for key, tensor in state.items() if key in names}
            return named if part == MLLM else keymaps.fold_scale_factor(named)
        prefix = find_prefix(state, _MARKERS[1])
        if prefix is None:
            raise CheckpointError(f"{place}: expected the transformer of Step1X-Edit or Qwen-Image-Edit, found another file.")
        own = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        return keymaps.step1x_from_original(own)


def base_shapes(parts: Parts, part: str) -> dict[str, tuple[int, ...]]:
    """{name in memory: shape} of a whole part, from the headers alone."""
    import torch

    shapes = read_shapes(place_of(parts, part))
    names = names_in_file(shapes, part)
    if names is not None:
        scales = (".weight_scale", ".scale_weight", ".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
        return {names[key]: shape for key, shape in shapes.items() if key in names and not key.endswith(scales)}
    prefix = find_prefix(shapes, _MARKERS[1]) or ""
    empty = {key.removeprefix(prefix): torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return {name: tuple(tensor.shape) for name, tensor in keymaps.step1x_from_original(empty).items()}


def is_low_bit(place: Path) -> bool:
    """Whether a file or folder holds weights with scales or in 8 bits."""
    ends = (".scale_weight", ".weight_scale", ".comfy_quant", "scaled_fp8")
    if any(key.endswith(ends) for key in read_shapes(place)):
        return True
    return any(tensor.dtype in fp8.LOW_BIT for tensor in read_state(place).values())
